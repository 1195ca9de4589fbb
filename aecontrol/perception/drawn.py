"""Many columns drawn into an image with one spot, as a sparse matrix: sums over columns' windows at the memory's speed.

Lengths are in the unit of the pixel sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .columns import TAIL_RATIO

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_REACH = 3.3
"""Half width of a spot's window in standard deviations of its core."""
_CHUNK = 256
"""Columns worked on at once where products of windows are formed: they then stay in the processor's cache."""


class Drawn:
    """Spots of unit sum (core and tail Gaussian, sampled at pixel centres) of n columns in an image of ``shape``."""

    def __init__(
        self, xy: Floats, shape: tuple[int, int], pixel: tuple[float, float], blur: float, tail: float
    ) -> None:
        """``xy`` [n, 2], ``pixel`` (x, y), ``blur`` the core's standard deviation, ``tail`` the share outside of it."""
        from scipy.sparse import csr_matrix

        self.shape, self._blur, n = shape, blur, len(xy)
        (at_x, self._off_x, core_x, tail_x), (at_y, self._off_y, core_y, tail_y) = (
            _profiles(xy[:, a], size, length, blur)
            for a, (size, length) in enumerate(zip(pixel, shape[::-1], strict=True))
        )
        window = (n, at_y.shape[1], at_x.shape[1])
        share, index = np.empty(window), np.empty(window, dtype=np.int32)
        for rows in _chunks(n):
            np.multiply((1 - tail) * core_y[rows, :, None], core_x[rows, None], out=share[rows])
            share[rows] += tail * tail_y[rows, :, None] * tail_x[rows, None]
            np.add(at_y[rows, :, None] * np.int32(shape[1]), at_x[rows, None], out=index[rows])
        k = window[1] * window[2]
        # every row holds k pixels, the same ones of share 0 again where a window leaves the frame
        starts = np.arange(0, n * k + 1, k, dtype=np.int32)
        self._matrix = csr_matrix((share.ravel(), index.ravel(), starts), (n, shape[0] * shape[1]))
        self._transposed = self._matrix.T
        self._window = window

    def draw(self, amplitude: Floats) -> Floats:
        """The image [rows, cols] of columns with these integrals [n]."""
        return np.asarray(self._transposed @ amplitude).reshape(self.shape)

    def project(self, image: Floats) -> Floats:
        """Inner product [n] of every spot with an image."""
        return np.asarray(self._matrix @ image.ravel())

    def squares(self, weight: Floats) -> Floats:
        """Sum [n] of every spot's squares times ``weight`` [rows, cols]."""
        drawn = self._matrix
        square = type(drawn)((drawn.data**2, drawn.indices, drawn.indptr), drawn.shape)
        return np.asarray(square @ weight.ravel())

    def windows(self, rows: slice | Ints) -> tuple[NDArray[np.int32], Floats]:
        """Flat pixel indices and shares [m, k] of some columns."""
        index, share = (a.reshape(self._window[0], -1) for a in (self._matrix.indices, self._matrix.data))
        return index[rows], share[rows]

    def pulls(self, image: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """Inner products [n, 2] of ``image`` with every core's derivatives by x and y, and the sums of the squares of
        these times ``weight``."""
        force, known = np.empty((2, self._window[0], 2))
        image, weight = image.ravel(), weight.ravel()
        for rows in _chunks(len(force)):
            index, share = self.windows(rows)
            seen, weights = image[index], weight[index]
            share = share.reshape(-1, *self._window[1:]) / self._blur**2
            for axis, off in enumerate((self._off_x[rows, None], self._off_y[rows, :, None])):
                slope = (share * off).reshape(index.shape)
                force[rows, axis] = np.einsum("np,np->n", slope, seen)
                known[rows, axis] = np.einsum("np,np->n", slope * slope, weights)
        return force, known


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, n, _CHUNK))


def _profiles(at: Floats, size: float, length: int, blur: float) -> tuple[NDArray[np.int32], Floats, Floats, Floats]:
    """Along one axis [n, k]: pixels, their distances from the columns, and core and tail there, 0 off the frame."""
    half = math.ceil(_REACH * blur / size)
    pixel = np.floor(at / size).astype(np.int32)[:, None] + np.arange(-half, half + 1, dtype=np.int32)
    off = (pixel + 0.5) * size - at[:, None]
    inside = (pixel >= 0) & (pixel < length)
    core, tail = (
        np.exp(-0.5 * (off / width) ** 2) * (size / (math.sqrt(2 * np.pi) * width)) * inside
        for width in (blur, TAIL_RATIO * blur)
    )
    return np.where(inside, pixel, 0), off, core, tail
