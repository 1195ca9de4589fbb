"""Joint fit of all columns of one patch of an image: amplitudes, positions, smooth background and the common spot.

Fisher scoring on the Poisson-like likelihood with variance v(model) = v0 + g model, whose two constants are read off
the residuals, so that counts and images of unknown gain are treated alike.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from . import normal
from .spot import WINDOW, Columns, Grid, Spot, State

COARSE = 0.68
"""Blurs: products of columns are smooth enough to be summed exactly (to 1e-6) on pixels of this size."""
NARROW = 3.0
"""Half width of the windows for the curvature, blurs; columns whose windows overlap are known to each other."""
MAX_STEP = 0.4
"""Blurs: a larger step leaves the region in which the linearised model is true."""
BRIGHTEST = 3.0
"""No column's peak exceeds this times the range of the image."""
MISSED = 5.0
"""Standard errors by which a missed column must show in the residual."""
FAINTEST = 0.05
"""Nothing dimmer than this share of the median column is a column: it is what the model lacks."""
APART_NM = 0.08
"""No missed column is looked for this close to a column."""
SAMPLE, CLASSES = 1 << 15, 24
"""Pixels from which the noise is read, and classes of brightness."""
LEAST = 0.003
"""Least variance of a pixel, as a share of the brightest one's."""


class Patch:
    """An image, its two grids (the pixels themselves, and bins for the curvature), and Fisher scoring on it."""

    def __init__(self, image: torch.Tensor, pixel_nm: tuple[float, float], blur_nm: float) -> None:
        """``image`` [rows, cols] float32; ``blur_nm``: about that of the spot."""
        self.rows, self.cols = image.shape
        self.bins = max(1, int(COARSE * blur_nm / max(pixel_nm)))
        margin = math.ceil(1.5 * WINDOW * blur_nm / min(pixel_nm)) + 2
        self.grid = Grid.around(image, pixel_nm, margin, self.bins)
        self.coarse = self.grid.binned(self.bins)
        self.image, self.inside = self._pad(image), self._pad(torch.ones_like(image))
        self.range = float(image.max() - image.min())

    def _pad(self, image: torch.Tensor) -> torch.Tensor:
        m, (height, width) = self.grid.margin, self.grid.shape
        return torch.nn.functional.pad(image, (m, width - m - self.cols, m, height - m - self.rows))

    def crop(self, image: torch.Tensor) -> torch.Tensor:
        """The part of a padded image that is inside."""
        m = self.grid.margin
        return image[m : m + self.rows, m : m + self.cols]

    def start(self, x: torch.Tensor, y: torch.Tensor) -> State:
        """Columns without intensity on the median of the image."""
        level = self.crop(self.image).median()
        return State(torch.zeros_like(x), x, y, level.expand(len(self.grid.hat_y), len(self.grid.hat_x)))

    def sums(self, image: torch.Tensor) -> torch.Tensor:
        """Sums of an image over bins."""
        b = self.bins
        rows = sum((image[k::b] for k in range(1, b)), start=image[::b])
        return sum((rows[:, k::b] for k in range(1, b)), start=rows[:, ::b])

    def model(self, state: State, spot: Spot) -> tuple[Columns, torch.Tensor]:
        """The columns and the expected image, with margins."""
        columns = Columns(self.grid, state, spot)
        spots = columns.core()
        if spot.wings:
            # they are smooth: convolved on the coarse grid and interpolated
            wings = self.coarse.with_wings(self.sums(spots) / self.bins**2, spot)[None, None]
            if self.bins > 1:
                wings = torch.nn.functional.interpolate(wings, self.grid.shape, mode="bicubic", antialias=True)
            spots = (1 - spot.tail) * spots + wings[0, 0]
        return columns, spots + self.grid.background(state.knots)

    def weight(self, columns: Columns, model: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Inverse variance of every pixel, 0 in the margin, and the gain."""
        alike = columns.splat(columns.gy[:, :1], columns.gx[:, :1])
        v0, gain, least = variance(self.crop(model), self.crop(residual), self.crop(alike))
        return self.inside / (v0 + gain * model).clamp(min=least), gain

    def residual(self, model: torch.Tensor) -> torch.Tensor:
        """Image less model, 0 in the margin."""
        return (self.image - model) * self.inside

    def step(
        self,
        state: State,
        spot: Spot,
        pairs: torch.Tensor,
        shapes: int = 0,
        weight: torch.Tensor | None = None,
    ) -> tuple[State, Spot, normal.System]:
        """One step of all columns, the background and the first ``shapes`` parameters of the spot (0, 3 or all).

        ``pairs`` [p, 2]: columns that overlap; ``weight``: of the pixels, where it is not to be read off the residual.
        Returns also the normal equations before the step, in pixels of the coarse grid.
        """
        columns, model = self.model(state, spot)
        residual = self.residual(model)
        weight = self.weight(columns, model, residual)[0] if weight is None else weight
        b = self.bins
        coarse = Columns(self.coarse, replace(state, x=state.x / b, y=state.y / b), spot, NARROW)
        images = coarse.shape_images(wings=shapes > 3) if shapes else None
        # the sum of b^2 pixels has b^2 times the signal: its weight is the sum of theirs / b^4
        system = normal.assemble(coarse, pairs, self.sums(weight) / b**4, images)
        force = weight * residual
        common = self.grid.knots_of(force)
        if images is not None:
            prior = (
                common.new_tensor(spot.values(len(images))) / common.new_tensor(normal.SHAPE_PRIOR[: len(images)]) ** 2
            )
            prior[0] = 0  # of the blur only the step is damped
            common = torch.cat([common, (images.flatten(1) @ self.sums(force).flatten()) / b**2 - prior])
        moments = columns.moments(force) * force.new_tensor([1.0, b, b])
        move, shared = system.solve(moments, common)
        limit = move.new_tensor([columns.sx, columns.sy]) * MAX_STEP
        shift = torch.minimum(torch.maximum(b * move[:, 1:], -limit), limit)
        k = state.knots.numel()
        knots = state.knots + shared[:k].view_as(state.knots)
        # off the rim, place and intensity of a column trade freely
        most = BRIGHTEST * self.range * 2 * math.pi * columns.sx * columns.sy
        state = State(
            (state.a + move[:, 0]).clamp(-most, most),
            (state.x + shift[:, 0]).clamp(-columns.sx, self.cols + columns.sx),
            (state.y + shift[:, 1]).clamp(-columns.sy, self.rows + columns.sy),
            knots,
        )
        return state, spot.moved(shared[k:].double().cpu().numpy()), system

    def missed(self, state: State, spot: Spot) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y of columns that the residual shows and ``state`` lacks.

        A matched filter: the significance with which a spot would be fitted at every place, all else held. Where the
        model itself is poor the significance is measured in its own spread.
        """
        columns, model = self.model(state, spot)
        residual = self.residual(model)
        weight, gain = self.weight(columns, model, residual)
        b, grid, blur = self.bins, self.coarse, spot.blur_nm
        # what a spot's own profile weighs of information, of light, and of its own area inside the image
        known, light, area = (
            grid.smooth(self.sums(image), width)
            for image, width in (
                (weight, blur / math.sqrt(2)),
                (weight * residual, blur),
                (self.inside, blur / math.sqrt(2)),
            )
        )
        known = known.clamp(min=1e-30) / (4 * math.pi * columns.sx * columns.sy)
        excess = light / known
        # fits that use less than a fifth of a spot are guesses about what lies beyond the rim
        whole = area > 0.2 * b**2
        score = torch.where(whole, _significance(excess, known, gain), 0.0)
        spread = 1.4826 * float(score[whole].abs().median())
        y, x = (2 * max(1, round(APART_NM / p)) + 1 for p in grid.pixel_nm[::-1])
        top = torch.nn.functional.max_pool2d(score[None, None], (y, 1), 1, (y // 2, 0))
        top = torch.nn.functional.max_pool2d(top, (1, x), 1, (0, x // 2))[0, 0]
        enough = excess > FAINTEST * state.a.median()
        row, col = torch.nonzero((score == top) & (score > MISSED * max(1.0, spread)) & enough).T
        x, y = ((at + 0.5 - grid.margin) * b for at in (col, row))
        near = torch.hypot(
            *((a[:, None] - at) * p for a, at, p in zip((x, y), (state.x, state.y), self.grid.pixel_nm, strict=True))
        )
        alone = (near > APART_NM).all(1)
        return x[alone], y[alone]


def _significance(excess: torch.Tensor, known: torch.Tensor, gain: float) -> torch.Tensor:
    """Standard deviations of ``excess`` intensity with information ``known``: the signed root of the likelihood ratio
    of Poisson counts, for few of them rise by chance further than a Gaussian does."""
    normal = excess * known.sqrt()
    if gain <= 0:
        return normal
    there, more = 1 / (known * gain**2).clamp(min=1e-30), excess.clamp(min=0) / gain
    ratio = 2 * ((there + more) * torch.log1p(more / there) - more)
    return torch.where(excess > 0, torch.minimum(ratio.clamp(min=0).sqrt(), normal), normal)


def variance(model: torch.Tensor, residual: torch.Tensor, alike: torch.Tensor) -> tuple[float, float, float]:
    """Variance of every pixel as (v0, g, least): max(v0 + g model, least), v0 + g model >= 0 where it is darkest.

    Fitted to the mean squared residual in classes of pixels, each weighed with the fit's own error there. The classes
    are made by ``alike``, the image of the columns if all had the same intensity: a class of the brightest pixels of
    the model itself would be one of fits that noise made too bright, and hide the gain.
    """
    from scipy.optimize import nnls

    stride = max(1, model.numel() // SAMPLE) | 1
    level, seen, order = (image.reshape(-1)[::stride] for image in (model, model + residual, alike))
    # a column on the rim may stray: what no pixel has ever shown says nothing of the noise
    slack = 0.05 * (seen.max() - seen.min())
    sane = (level >= seen.min() - slack) & (level <= seen.max() + slack)
    level, seen, order = level[sane], seen[sane], order[sane]
    group = (order / (order.max() + 1e-30) * (CLASSES - 1)).clamp(min=0).round().long()
    count, levels, squares = (
        torch.bincount(group, w, minlength=CLASSES).double().cpu().numpy() for w in (None, level, (seen - level) ** 2)
    )
    full = count > 0
    levels, squares, count = levels[full] / count[full], squares[full] / count[full], count[full]
    base, span = levels.min(), np.ptp(levels) + 1e-30
    shares = (levels - base) / span
    # the solver's tolerance is absolute: keep its numbers near 1
    unit = float(squares.max()) + 1e-300
    basis, fitted = np.stack([np.ones_like(shares), shares], 1), np.ones_like(shares)
    for _ in range(3):
        weight = np.sqrt(count / count.sum()) / np.maximum(fitted, 1e-3 * fitted.max() + 1e-12)
        v0, slope = nnls(basis * weight[:, None], squares / unit * weight)[0]
        fitted = v0 + slope * shares
    gain = float(unit * slope / span)
    # where the model itself is wrong, its squared error poses as gain: never let dark pixels rule the fit altogether
    return float(unit * v0 - gain * base), gain, float(LEAST * unit * (v0 + slope)) + 1e-30
