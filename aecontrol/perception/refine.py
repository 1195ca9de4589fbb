"""Sub-pixel positions: one joint fit of all columns, their common spot and a smooth background.

Images are fitted tile by tile with a halo, so that time is proportional to area and memory bounded; the spot is fitted
on the tile with most columns. What is fitted, and how, is in :mod:`.joint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from .joint import Patch
    from .spot import Spot, State

Floats = NDArray[np.float64]

BLUR_RANGE_NM = (0.025, 0.13)
"""Blur outside this is no atomic column."""
TRUST_NM = 0.06
"""A column that leaves this radius around its start is put back: the fit has lost it."""
TILE_NM, HALO_NM = 6.5, 0.45
"""Sides of the largest tile and width of its halo, in which columns are fitted but not reported."""
PILOT_NM = 2.0
"""Sides of the square on which the first blur is chosen."""
FIRST_BLURS_NM = (0.04, 0.06, 0.09)
STEPS, MORE_STEPS, WING_STEPS = 2, 4, 3
"""Of the fit, again with the columns that it showed to be missing, and so with the spot's wings."""
FEW = 4.0
"""Relative excess of the variance over the inverse Fisher information times the squared significance: measured, from
10 counts a column up."""
SWOLLEN = 1.5
"""Wings by which the sum of all intensities changes more than this are not told from the background between the
columns, as in dense crystals whose spots are not alike: they are left out."""
BRIGHT = 1e5
"""Sum of squared significances (about the counts in all columns) from which the wings of the spot can be told."""


@dataclass(frozen=True)
class Fit:
    """Fitted columns; positions and standard errors in pixels, intensities in image units.

    The first columns are those asked for, in their order; the last ``added`` were found in the residual.
    """

    x: Floats
    y: Floats
    sigma_x: Floats
    sigma_y: Floats
    intensity: Floats
    sigma_intensity: Floats
    background: float
    blur_nm: float | None
    added: int = 0
    tail: float = 0.0
    """Share of the intensity outside the spot's Gaussian core."""

    @cached_property
    def significance(self) -> Floats:
        """[n] intensity over its standard error."""
        return self.intensity / np.maximum(self.sigma_intensity, 1e-300)


@dataclass(frozen=True)
class _Tile:
    """Rows and columns of pixels with halo, and the part that is reported: (first, end) each."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    core_rows: tuple[float, float]
    core_cols: tuple[float, float]

    def core(self, x: Floats, y: Floats) -> NDArray[np.bool_]:
        """Which points are reported by this tile."""
        (top, bottom), (left, right) = self.core_rows, self.core_cols
        return (x >= left) & (x < right) & (y >= top) & (y < bottom)

    def near(self, x: Floats, y: Floats, slack: tuple[float, float]) -> NDArray[np.bool_]:
        """Which points shine into the tile."""
        (top, bottom), (left, right) = self.rows, self.cols
        inside = (x > left - slack[0]) & (x < right + slack[0]) & (y > top - slack[1]) & (y < bottom + slack[1])
        return inside | self.core(x, y)


def refine(image: NDArray[Any], x: Floats, y: Floats, pixel_size_nm: tuple[float, float], device: str = "cpu") -> Fit:
    """Fit columns that start at ``x``, ``y`` (pixels, centre of pixel [0, 0] at (0.5, 0.5)) to ``image`` [rows, cols].

    Positions reach the joint Cramer-Rao bound for counts (:mod:`.bound`). A column that the fit drives further than
    ``TRUST_NM`` from its start is returned at its start with that radius as its standard error.
    """
    import torch

    if len(x) == 0:
        none = np.zeros(0)
        return Fit(none, none, none, none, none, none, float(np.mean(image, dtype=np.float64)), None)
    offset, unit = float(np.median(image)), float(np.std(image, dtype=np.float64)) or 1.0
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    tiles = _tiles(np.shape(image), pixel_size_nm)
    counts = [tile.core(x, y).sum() for tile in tiles]
    spot = None
    parts: list[_Part] = []
    for k in np.argsort([-c for c in counts], kind="stable"):
        tile = tiles[k]
        cut = np.asarray(image[slice(*tile.rows), slice(*tile.cols)], dtype=np.float64)
        data = torch.as_tensor(((cut - offset) / unit).astype(np.float32), device=device)
        near = np.flatnonzero(tile.near(x, y, (0.05 / pixel_size_nm[0], 0.05 / pixel_size_nm[1])))
        if len(near) == 0:
            continue
        part = _fit(data, x[near] - tile.cols[0], y[near] - tile.rows[0], pixel_size_nm, spot)
        spot = part.spot
        parts.append(part.placed(tile, near, x, y))
    return _gather(parts, x, y, pixel_size_nm, offset, unit)


def _tiles(shape: tuple[int, ...], pixel_nm: tuple[float, float]) -> list[_Tile]:
    """Equal tiles of at most ``TILE_NM`` that cover the image; the outermost reach beyond it."""
    axes = []
    for length, pixel in zip(shape, pixel_nm[::-1], strict=True):
        number = max(1, math.ceil(length * pixel / TILE_NM))
        edges = [round(length * k / number) for k in range(number + 1)]
        halo = math.ceil(HALO_NM / pixel)
        spans = [((max(0, a - halo), min(length, b + halo)), (float(a), float(b))) for a, b in pairwise(edges)]
        spans[0] = (spans[0][0], (-math.inf, spans[0][1][1]))
        spans[-1] = (spans[-1][0], (spans[-1][1][0], math.inf))
        axes.append(spans)
    return [_Tile(rows, cols, core_y, core_x) for rows, core_y in axes[0] for cols, core_x in axes[1]]


@dataclass(frozen=True)
class _Part:
    """What the fit of one tile found: columns [n, 6] (x, y, sigma x, sigma y, intensity, its sigma; the image's pixels,
    the fit's units), the number ``who`` of each start (-1: found in the residual), mean background, spot."""

    columns: Floats
    who: NDArray[np.int64]
    background: float
    area: int
    spot: Spot

    def placed(self, tile: _Tile, near: NDArray[np.int64], x: Floats, y: Floats) -> _Part:
        """In pixels of the image, numbered like the starts ``x``, ``y``, without the columns of the halo."""
        columns = self.columns + np.array([tile.cols[0], tile.rows[0], 0, 0, 0, 0])
        extra = columns[len(near) :]
        who = np.concatenate([near, np.full(len(extra), -1)])
        keep = np.concatenate([tile.core(x[near], y[near]), tile.core(extra[:, 0], extra[:, 1])])
        return replace(self, columns=columns[keep], who=who[keep])


def _fit(data: torch.Tensor, x: Floats, y: Floats, pixel_nm: tuple[float, float], spot: Spot | None) -> _Part:
    """Fit one tile; without ``spot`` the spot too."""
    import torch

    from .joint import Patch
    from .spot import WINGS, Spot

    free = spot is None
    if spot is None:
        spot = Spot(math.log(_first_blur(data, x, y, pixel_nm)))
    patch = Patch(data, pixel_nm, spot.blur_nm)
    state = patch.start(*(torch.as_tensor(a, dtype=data.dtype, device=data.device) for a in (x, y)))
    pairs = _pairs(patch, state, spot)
    state, spot, system = patch.step(state, spot, pairs, 0, _flat(patch))
    for _ in range(STEPS):
        state, spot, system = patch.step(state, spot, pairs, 3 * free)
    extra_x, extra_y = patch.missed(state, spot)
    bright = free and float((state.a**2 / system.covariance()[:, 0, 0]).nansum()) > BRIGHT
    if len(extra_x):
        state = state.joined(extra_x, extra_y)
        pairs = _pairs(patch, state, spot)
    core = state, spot
    for _ in range(WING_STEPS if bright else 0):
        state, spot, system = patch.step(state, spot, pairs, 3 + WINGS)
    if bright and abs(math.log(max(float(state.a.sum() / core[0].a.sum()), 1e-9))) > math.log(SWOLLEN):
        (state, spot), bright = core, False
    for _ in range(0 if bright else MORE_STEPS):
        state, spot, system = patch.step(state, spot, pairs, 3 * free)
    error = system.covariance().diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    # few counts: the likelihood is no parabola, and what is known is read off the same few counts
    significance = (state.a / error[:, 0]).clamp(min=1.0)
    error = error * (1 + FEW / significance**2).sqrt()[:, None]
    error = error * error.new_tensor([1.0, patch.bins, patch.bins])
    columns = torch.stack([state.x, state.y, error[:, 1], error[:, 2], state.a, error[:, 0]], 1).double().cpu().numpy()
    background = float(patch.crop(patch.grid.background(state.knots)).mean())
    return _Part(columns, np.arange(0), background, data.numel(), spot)


def _pairs(patch: Patch, state: State, spot: Spot) -> torch.Tensor:
    """[p, 2] columns whose windows overlap, now or after moving a little."""
    import torch
    from scipy.spatial import cKDTree

    from .joint import NARROW

    at = np.stack([state.x.cpu().numpy() * patch.grid.pixel_nm[0], state.y.cpu().numpy() * patch.grid.pixel_nm[1]], 1)
    reach = 2 * NARROW * spot.blur_nm * 1.2 + 3 * max(patch.coarse.pixel_nm)
    pairs = cKDTree(at).query_pairs(reach, p=np.inf, output_type="ndarray")
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    return torch.as_tensor(pairs, dtype=torch.int64, device=state.x.device)


def _flat(patch: Patch) -> torch.Tensor:
    """Equal weight of all pixels."""
    return patch.inside / (float(patch.image.square().sum() / patch.inside.sum()) + 1e-30)


def _first_blur(data: torch.Tensor, x: Floats, y: Floats, pixel_nm: tuple[float, float]) -> float:
    """The best of three blurs with positions held, on the square of ``PILOT_NM`` with most columns."""
    import torch

    from .joint import Patch
    from .spot import Spot

    number = [max(1, round(n * p / PILOT_NM)) for n, p in zip(data.shape, pixel_nm[::-1], strict=True)]
    cells = np.stack(
        [np.clip(a * k / n, 0, k - 1).astype(int) for a, k, n in zip((y, x), number, data.shape, strict=True)], 1
    )
    which, counts = np.unique(cells, axis=0, return_counts=True)
    best = which[np.argmax(counts)]
    (row, bottom), (col, right) = (
        (n * c // k, n * (c + 1) // k) for c, k, n in zip(best, number, data.shape, strict=True)
    )
    cut, near = data[row:bottom, col:right], (cells == best).all(1)
    misfits = []
    for blur in FIRST_BLURS_NM:
        patch = Patch(cut, pixel_nm, blur)
        spot = Spot(math.log(blur))
        at = (torch.as_tensor(a[near], dtype=data.dtype, device=data.device) for a in (x - col, y - row))
        state = patch.start(*at)
        state, spot, _ = patch.step(state, spot, _pairs(patch, state, spot), 0, _flat(patch))
        misfits.append(float(patch.residual(patch.model(state, spot)[1]).square().sum()))
    return FIRST_BLURS_NM[int(np.argmin(misfits))]


def _gather(parts: list[_Part], x: Floats, y: Floats, pixel_nm: tuple[float, float], offset: float, unit: float) -> Fit:
    """All tiles' columns, in the order of the starts, added ones last."""
    added = np.concatenate([part.columns[part.who < 0] for part in parts])
    columns = np.concatenate([np.zeros((len(x), 6)), added])
    for part in parts:
        columns[part.who[part.who >= 0]] = part.columns[part.who >= 0]
    trust = np.array([TRUST_NM / p for p in pixel_nm])
    start = np.concatenate([np.stack([x, y], 1), added[:, :2]])
    lost = np.hypot(*((columns[:, :2] - start) / trust).T) > 1
    at = np.where(lost[:, None], start, columns[:, :2])
    sigma = np.where(lost[:, None], trust, np.minimum(columns[:, 2:4], trust))
    area = sum(part.area for part in parts)
    return Fit(
        x=at[:, 0],
        y=at[:, 1],
        sigma_x=sigma[:, 0],
        sigma_y=sigma[:, 1],
        intensity=unit * columns[:, 4],
        sigma_intensity=unit * columns[:, 5],
        background=offset + unit * sum(part.background * part.area for part in parts) / area,
        blur_nm=parts[0].spot.blur_nm,
        added=len(added),
        tail=parts[0].spot.tail,
    )
