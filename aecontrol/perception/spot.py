"""The model of an image for the joint fit: many copies of one spot on a smooth background, worked on in windows.

The spot is an elliptical Gaussian core plus a share of the same core blurred further (the tails of a real probe),
sampled at pixel centres, of unit sum. The core is a product of functions of x and y, so that sums over columns'
windows are small batched matrix products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .refine import BLUR_RANGE_NM

Floats = NDArray[np.float64]

KNOT_NM = 0.8
"""Spacing of the background's knots: wide enough not to imitate a column, narrow enough for contamination."""
WINDOW = 3.7
"""Half width of a column's window in blurs; the core there is 0.1 % of its peak."""
TAIL = 2.5
"""Width of the tails over that of the core: fits diffraction-limited probes of any aperture to 0.6 % (RMS)."""
RIM = 8.0
"""The spot is not judged this close to the rim of an image, blurs."""


@dataclass(frozen=True)
class Spot:
    """The spot common to all columns: core's standard deviation exp(log_blur) nm, times exp(+-stretch) along x and y;
    ``shear`` its correlation of x and y; ``tail`` the share of counts in the tails."""

    log_blur: float
    stretch: float = 0.0
    shear: float = 0.0
    tail: float = 0.0

    @property
    def blur_nm(self) -> float:
        """Mean standard deviation of the core, nm."""
        return math.exp(self.log_blur)

    @property
    def tail_blur_nm(self) -> float:
        """Standard deviation of the Gaussian that widens the core to the tails, nm."""
        return self.blur_nm * math.sqrt(TAIL**2 - 1)

    def moved(self, step: Floats) -> Spot:
        """The spot after a step in its first parameters, kept within what a column can look like."""
        now = np.array([self.log_blur, self.stretch, self.shear, self.tail])
        now[: len(step)] += np.clip(step, -0.2, 0.2)
        return Spot(
            *np.clip(now, *zip(np.log(BLUR_RANGE_NM), (-0.3, 0.3), (-0.3, 0.3), (-0.2, 0.5), strict=True)).tolist()
        )


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
        shape = (rows + 2 * margin + -rows % bins, cols + 2 * margin + -cols % bins)
        hats = [
            torch.nn.functional.pad(_hats(n, p, image), (margin, full - margin - n))
            for n, full, p in zip((rows, cols), shape, pixel_nm[::-1], strict=True)
        ]
        return cls(shape, (rows, cols), margin, pixel_nm, hats[0], hats[1])

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
        y, x = (
            torch.exp(-2 * (math.pi * width_nm / p * f(n)) ** 2).to(image)
            for n, p, f in zip(self.shape, self.pixel_nm[::-1], (torch.fft.fftfreq, torch.fft.rfftfreq), strict=True)
        )
        return torch.fft.irfft2(torch.fft.rfft2(image) * y[:, None] * x, s=self.shape)


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
        return image.unfold(0, self.height, 1).unfold(1, self.width, 1)[self.corner_y, self.corner_x]

    def splat(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The image sum over columns and terms t of y[n, t, height] times x[n, t, width]."""
        image = y.new_zeros(self.grid.shape)
        image.view(-1).scatter_add_(0, self.index, torch.bmm(y.mT, x).reshape(-1))
        return image

    def core(self) -> torch.Tensor:
        """Image of all columns' cores; the shear enters to first order, as the mixed second derivative."""
        scale = self.gy.new_tensor([1.0, self.spot.shear * self.sx * self.sy])[:, None]
        return self.splat(self.gy[:, :2] * (scale * self.state.a[:, None, None]), self.gx[:, :2])

    def shape_images(self, tail: bool) -> torch.Tensor:
        """[3 or 4, rows, cols] derivative of the model by the spot's parameters, in the order of :class:`Spot`."""
        a = (self.state.a * self._inside())[:, None, None] * (1 - self.spot.tail)
        xx = self.splat(self.gy[:, :1] * (a * self.sx**2), self.gx[:, 2:])
        yy = self.splat(self.gy[:, 2:] * (a * self.sy**2), self.gx[:, :1])
        xy = self.splat(self.gy[:, 1:2] * (a * self.sx * self.sy), self.gx[:, 1:2])
        images = [xx + yy, xx - yy, xy]
        if tail:
            core = self.core()
            images.append(self.grid.smooth(core, self.spot.tail_blur_nm) - core)
        return torch.stack(images) * self._heart()

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
        q = torch.bmm(torch.bmm(self.gy[:, :2], self.gather(image)), self.gx[:, :2].mT) * (1 - self.spot.tail)
        a = self.state.a
        return torch.stack([q[:, 0, 0], a * q[:, 0, 1], a * q[:, 1, 0]], 1)


def _profile(at: torch.Tensor, first: torch.Tensor, sigma: float, length: int) -> torch.Tensor:
    """[n, 3, length] unit-sum Gaussian at pixels from ``first`` on, and its first and second derivative by ``at``."""
    d = (first[:, None] + torch.arange(length, device=at.device) + 0.5 - at[:, None]) / sigma
    g = torch.exp(-0.5 * d**2) / (math.sqrt(2 * math.pi) * sigma)
    return torch.stack([g, g * d / sigma, g * (d**2 - 1) / sigma**2], 1)
