"""The model of an image for the joint fit: many copies of one spot on a smooth background, worked on in windows.

The spot is an elliptical Gaussian core and, in bright images, the wings of a real probe, sampled at pixel centres, of
unit sum. The core is a product of functions of x and y, so that sums over columns' windows are small batched matrix
products; the wings are the core convolved with wider functions, in Fourier space and for all columns at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len

from .refine import BLUR_RANGE_NM

Floats = NDArray[np.float64]

KNOT_NM = 0.8
"""Spacing of the background's knots: wide enough not to imitate a column, narrow enough for contamination."""
WINDOW = 3.7
"""Half width of a column's window in blurs; the core there is 0.1 % of its peak."""
WIDTHS = (1.5, 2.5, 4.5)
"""Of the Gaussians that share the intensity with the core, in blurs: together they follow the tails of an aberrated
probe to 0.5 % of its peak."""
WINGS = 10
"""Parameters of the wings: the shares of these Gaussians, then derivatives of the narrowest: of second order the
two-fold ones, of fourth order the two-fold, round and four-fold ones."""
RIM = 8.0
"""The spot is not judged this close to the rim of an image, blurs."""


@dataclass(frozen=True)
class Spot:
    """The spot common to all columns: core's standard deviation exp(log_blur) nm, times exp(+-stretch) along x and y;
    ``shear`` its correlation of x and y; ``wings`` none or ``WINGS`` numbers."""

    log_blur: float
    stretch: float = 0.0
    shear: float = 0.0
    wings: tuple[float, ...] = ()

    @property
    def blur_nm(self) -> float:
        """Mean standard deviation of the core, nm."""
        return math.exp(self.log_blur)

    @property
    def tail(self) -> float:
        """Share of the intensity outside the core."""
        return sum(self.wings[: len(WIDTHS)])

    @property
    def scales(self) -> tuple[float, float]:
        """Factors by which the core, of all the intensity, stands for the spot in its response to intensity and to
        place: its inner products with the spot over those with itself, (2 / (width^2 + 1)) and the square of that for a
        Gaussian of ``width`` blurs."""
        parts = [(share, 2 / (width**2 + 1)) for share, width in zip(self.wings, WIDTHS, strict=False)]
        return 1 - sum(t * (1 - k) for t, k in parts), 1 - sum(t * (1 - k**2) for t, k in parts)

    def values(self, number: int) -> list[float]:
        """The first ``number`` parameters; wings that the spot has not got are 0."""
        values = [self.log_blur, self.stretch, self.shear, *self.wings]
        return [*values, *[0.0] * (number - len(values))][:number]

    def moved(self, step: Floats) -> Spot:
        """The spot after a step in its first parameters, kept within what a column can look like."""
        now = np.array(self.values(max(len(step), 3 + len(self.wings))))
        now[: len(step)] += np.clip(step, -0.2, 0.2)
        now[0] = np.clip(now[0], *np.log(BLUR_RANGE_NM))
        now[1:] = np.clip(now[1:], -0.4, 0.4)
        shares = slice(3, 3 + len(WIDTHS))
        now[shares] = np.maximum(now[shares], 0.0)
        log_blur, stretch, shear, *wings = now.tolist()
        return Spot(log_blur, stretch, shear, tuple(wings))


@dataclass(frozen=True)
class State:
    """Columns' amplitudes and positions (pixels of the patch) [n] and the background's knots [ky, kx]."""

    a: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    knots: torch.Tensor

    def joined(self, x: torch.Tensor, y: torch.Tensor) -> State:
        """With more columns, of no intensity yet."""
        zeros = torch.zeros_like(self.a[:1]).expand(len(x))
        return State(torch.cat([self.a, zeros]), torch.cat([self.x, x]), torch.cat([self.y, y]), self.knots)


@dataclass(frozen=True)
class Grid:
    """Pixels of a patch with a margin around it, in which windows of columns near the rim end."""

    shape: tuple[int, int]
    inner: tuple[float, float]
    """Rows and columns without the margin."""
    margin: int
    pixel_nm: tuple[float, float]
    hat_y: torch.Tensor = field(repr=False)
    hat_x: torch.Tensor = field(repr=False)
    """[knots, length with margins] linear interpolation weights of the background's knots along each axis."""

    @classmethod
    def around(cls, image: torch.Tensor, pixel_nm: tuple[float, float], margin: int, bins: int) -> Grid:
        """Grid for ``image`` whose margins hold ``margin`` pixels or a little more, so that ``bins`` divides it."""
        margin = -(-margin // bins) * bins
        rows, cols = image.shape
        shape = tuple(bins * next_fast_len(-(-n // bins) + 2 * margin // bins, real=True) for n in (rows, cols))
        hats = [
            torch.nn.functional.pad(_hats(n, p, image), (margin, full - margin - n))
            for n, full, p in zip((rows, cols), shape, pixel_nm[::-1], strict=True)
        ]
        return cls((shape[0], shape[1]), (rows, cols), margin, pixel_nm, hats[0], hats[1])

    def binned(self, bins: int) -> Grid:
        """The grid of sums over ``bins`` x ``bins`` pixels."""
        hats = [h.view(len(h), -1, bins).sum(2) for h in (self.hat_y, self.hat_x)]
        shape = (self.shape[0] // bins, self.shape[1] // bins)
        inner = (self.inner[0] / bins, self.inner[1] / bins)
        return Grid(
            shape, inner, self.margin // bins, (self.pixel_nm[0] * bins, self.pixel_nm[1] * bins), hats[0], hats[1]
        )

    def background(self, knots: torch.Tensor) -> torch.Tensor:
        """Background image of the knots."""
        return self.hat_y.T @ knots @ self.hat_x

    def knots_of(self, image: torch.Tensor) -> torch.Tensor:
        """Inner products of an image with the background's functions, flat."""
        return (self.hat_y @ image @ self.hat_x.T).reshape(-1)

    def smooth(self, image: torch.Tensor, width_nm: float) -> torch.Tensor:
        """``image`` blurred with a Gaussian of standard deviation ``width_nm`` (round the rims: keep to the inside)."""
        y, x = _frequencies(self.shape, self.pixel_nm, image.device)
        bell = torch.exp(-0.5 * (width_nm * y) ** 2) * torch.exp(-0.5 * (width_nm * x) ** 2)
        smoothed: torch.Tensor = torch.fft.irfft2(torch.fft.rfft2(image) * bell, s=self.shape)
        return smoothed

    def wings(self, image: torch.Tensor, blur_nm: float) -> Iterator[torch.Tensor]:
        """``image`` convolved with each of the ``WINGS`` functions of a spot of ``blur_nm``."""
        transformed = torch.fft.rfft2(image)
        for part in _wings(self.shape, self.pixel_nm, blur_nm, image.device):
            yield torch.fft.irfft2(transformed * part, s=self.shape)

    def with_wings(self, image: torch.Tensor, spot: Spot) -> torch.Tensor:
        """All wings of an image of cores."""
        parts = _wings(self.shape, self.pixel_nm, spot.blur_nm, image.device)
        whole = (parts * parts.new_tensor(spot.wings)[:, None, None]).sum(0)
        wings: torch.Tensor = torch.fft.irfft2(torch.fft.rfft2(image) * whole, s=self.shape)
        return wings


def _frequencies(
    shape: tuple[int, int], pixel_nm: tuple[float, float], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, 1] and [1, cols/2 + 1] angular frequencies of ``rfft2``, rad/nm."""
    (rows, cols), (px, py) = shape, pixel_nm
    y = torch.fft.fftfreq(rows, py, device=device)[:, None]
    return 2 * math.pi * y, 2 * math.pi * torch.fft.rfftfreq(cols, px, device=device)[None]


@lru_cache(maxsize=8)
def _wings(shape: tuple[int, int], pixel_nm: tuple[float, float], blur_nm: float, device: torch.device) -> torch.Tensor:
    """[WINGS, rows, cols/2 + 1] transforms of the functions that the core is convolved with in the wings."""
    y, x = (blur_nm * q for q in _frequencies(shape, pixel_nm, device))
    bells = [torch.exp(-0.5 * (w**2 - 1) * y**2) * torch.exp(-0.5 * (w**2 - 1) * x**2) for w in WIDTHS]
    y, x = y * WIDTHS[0], x * WIDTHS[0]
    second, cross, square = x**2 - y**2, 2 * x * y, x**2 + y**2
    fourth = [square * second, square * cross, square**2, second**2 - cross**2, 2 * second * cross]
    return torch.stack([*bells, *(bells[0] * f for f in (second, cross, *fourth))])


def _hats(length: int, pixel_nm: float, like: torch.Tensor) -> torch.Tensor:
    """[knots, length] linear interpolation weights of knots about ``KNOT_NM`` apart."""
    knots = max(2, round(length * pixel_nm / KNOT_NM) + 1)
    at = (torch.arange(length).to(like) + 0.5) / length * (knots - 1)
    return (1 - (at - torch.arange(knots).to(like)[:, None]).abs()).clamp(min=0)


class Columns:
    """Windows of all columns at their present places: the core along each axis and its two derivatives by place."""

    def __init__(self, grid: Grid, state: State, spot: Spot, window: float = WINDOW) -> None:
        """``state`` in pixels of ``grid``; ``window``: half width of the windows in blurs."""
        self.grid, self.state, self.spot, self.window = grid, state, spot, window
        self.sx = spot.blur_nm * math.exp(spot.stretch) / grid.pixel_nm[0]
        self.sy = spot.blur_nm * math.exp(-spot.stretch) / grid.pixel_nm[1]
        self.corner_x, self.width = self._corners(state.x, self.sx, grid.shape[1])
        self.corner_y, self.height = self._corners(state.y, self.sy, grid.shape[0])
        self.gx = self.profile_x(state.x, self.corner_x)
        self.gy = self.profile_y(state.y, self.corner_y)
        offset = torch.arange(self.height)[:, None] * grid.shape[1] + torch.arange(self.width)
        first = self.corner_y * grid.shape[1] + self.corner_x
        self.index = (first[:, None] + offset.to(first.device).reshape(-1)).reshape(-1)

    def _corners(self, at: torch.Tensor, sigma: float, length: int) -> tuple[torch.Tensor, int]:
        """First pixel of every window, counted with the margin, and the windows' common length."""
        reach = min(max(2, round(self.window * sigma)), length // 2 - 1)
        corner = at.floor().long() - reach + self.grid.margin
        return corner.clamp(0, length - 2 * reach - 1), 2 * reach + 1

    def profile_x(self, at: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        """[n, 3, width] the core along x of columns ``at``, in windows that start at ``corner``."""
        return _profile(at, corner - self.grid.margin, self.sx, self.width)

    def profile_y(self, at: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
        """[n, 3, height] likewise along y."""
        return _profile(at, corner - self.grid.margin, self.sy, self.height)

    def gather(self, image: torch.Tensor) -> torch.Tensor:
        """Windows [n, height, width] of an image."""
        return image.reshape(-1).index_select(0, self.index).view(-1, self.height, self.width)

    def splat(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The image sum over columns and terms t of y[n, t, height] times x[n, t, width]."""
        image = y.new_zeros(self.grid.shape)
        image.view(-1).scatter_add_(0, self.index, torch.bmm(y.mT, x).reshape(-1))
        return image

    def core(self) -> torch.Tensor:
        """Image of all columns' cores; the shear enters to first order, as the mixed second derivative."""
        scale = self.gy.new_tensor([1.0, self.spot.shear * self.sx * self.sy])[:, None]
        return self.splat(self.gy[:, :2] * (scale * self.state.a[:, None, None]), self.gx[:, :2])

    def shape_images(self, wings: bool) -> torch.Tensor:
        """[3, rows, cols] derivative of the model by the spot's first parameters, in the order of :class:`Spot`; with
        ``wings`` by all."""
        a = (self.state.a * self._inside())[:, None, None] * (1 - self.spot.tail)
        xx = self.splat(self.gy[:, :1] * (a * self.sx**2), self.gx[:, 2:])
        yy = self.splat(self.gy[:, 2:] * (a * self.sy**2), self.gx[:, :1])
        xy = self.splat(self.gy[:, 1:2] * (a * self.sx * self.sy), self.gx[:, 1:2])
        images = torch.stack([xx + yy, xx - yy, xy])
        if wings:
            core = self.core()
            parts = torch.stack(list(self.grid.wings(core, self.spot.blur_nm)))
            parts[: len(WIDTHS)] -= core
            images = torch.cat([images, parts])
        return images * self._heart()

    def _heart(self) -> torch.Tensor:
        """1 in the image, 0 within ``RIM`` blurs of its rim: light from beyond would pose as tails."""
        lines = []
        for size, length, sigma in zip(self.grid.inner, self.grid.shape, (self.sy, self.sx), strict=True):
            rim = min(RIM * sigma, size / 4)
            at = torch.arange(length, device=self.gx.device) + 0.5 - self.grid.margin
            lines.append(((at > rim) & (at < size - rim)).to(self.gx))
        return lines[0][:, None] * lines[1]

    def _inside(self) -> torch.Tensor:
        """Which columns lie in the image: the others say nothing about the spot, but extrapolate it."""
        (rows, cols), x, y = self.grid.inner, self.state.x, self.state.y
        return (x > 0) & (x < cols) & (y > 0) & (y < rows)

    def moments(self, image: torch.Tensor) -> torch.Tensor:
        """[n, 3] inner products of ``image`` with the derivatives of the model by a, x, y: of round cores only, for
        shear and tails hold next to nothing about where a column is."""
        q = torch.bmm(torch.bmm(self.gy[:, :2], self.gather(image)), self.gx[:, :2].mT)
        return self._by_columns(q[..., None])[..., 0]

    def moments_of(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, m] the same of images [m, rows, cols], together: a pixel's values lie side by side in memory."""
        n, m = len(self.gx), len(images)
        pixels = images.flatten(1).T.contiguous().index_select(0, self.index)
        q = torch.bmm(self.gy[:, :2], pixels.view(n, self.height, self.width * m))
        q = q.view(n, 2, self.width, m).transpose(1, 2).reshape(n, self.width, 2 * m)
        return self._by_columns(torch.bmm(self.gx[:, :2], q).view(n, 2, 2, m).transpose(1, 2))

    def _by_columns(self, q: torch.Tensor) -> torch.Tensor:
        """[n, 3, m] by (a, x, y) of the inner products q [n, 2, 2, m] with the core and its derivatives along y, x."""
        by_a, by_place = self.spot.scales
        a = (by_place * self.state.a)[:, None]
        return torch.stack([by_a * q[:, 0, 0], a * q[:, 0, 1], a * q[:, 1, 0]], 1)


def _profile(at: torch.Tensor, first: torch.Tensor, sigma: float, length: int) -> torch.Tensor:
    """[n, 3, length] unit-sum Gaussian at pixels from ``first`` on, and its first and second derivative by ``at``."""
    d = (first[:, None] + torch.arange(length, device=at.device) + 0.5 - at[:, None]) / sigma
    g = torch.exp(-0.5 * d**2) / (math.sqrt(2 * math.pi) * sigma)
    return torch.stack([g, g * d / sigma, g * (d**2 - 1) / sigma**2], 1)
