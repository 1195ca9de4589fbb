"""Off-centring of the columns of a perovskite along [001], and the map of it in which domain walls are looked for.

Every column has four nearest neighbours of the other sublattice. Its displacement from their mean, the sign turned
where it is the brighter one, is that of B against A; it takes no fit of a lattice and does not see slow distortions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

AVERAGED_NM = 0.3
"""Width of the Gaussian with which off-centrings are averaged: some seven columns."""
REACH = 4.0
"""Columns further than this many of its widths do not take part."""
UNEVEN = 0.45
"""The four neighbours of a column differ in distance by less than this share, or it is no perovskite's."""
STRONGEST = 10.0
"""Averages further than this many standard errors from the middle are cut off there."""
LEAST_COLUMNS = 40


class Columns(Protocol):
    """What is needed of found atoms; px of the image, the centre of pixel [0, 0] at (0.5, 0.5)."""

    @property
    def x_px(self) -> Floats:
        """[n]."""

    @property
    def y_px(self) -> Floats:
        """[n]."""

    @property
    def intensity(self) -> Floats:
        """[n]."""


@dataclass(frozen=True)
class OffCentring:
    """Of n columns: ``xy_nm`` [n, 2] where and ``shift_nm`` [n, 2] by how much B is off the middle of its A."""

    xy_nm: Floats
    shift_nm: Floats


def off_centring(xy_nm: Floats, intensity: Floats) -> OffCentring:
    """Of columns at ``xy_nm`` [n, 2] those that have four neighbours as in a perovskite along [001]."""
    from scipy.spatial import cKDTree

    if len(xy_nm) < 6:
        return OffCentring(np.zeros((0, 2)), np.zeros((0, 2)))
    distance, near = cKDTree(xy_nm).query(xy_nm, k=6)
    arms = xy_nm[near[:, 1:5]] - xy_nm[:, None]
    angle = np.sort(np.arctan2(arms[..., 1], arms[..., 0]), axis=1)
    corner = np.diff(np.concatenate([angle, angle[:, :1] + 2 * np.pi], axis=1), axis=1)
    even = distance[:, 4] < (1 + UNEVEN) * distance[:, 1]
    alone = distance[:, 5] > 1.05 * distance[:, 4]  # the next are those of the own sublattice
    square = np.abs(corner - np.pi / 2).max(axis=1) < np.radians(35)
    others = intensity[near[:, 1:5]]
    dim = (intensity < others.min(axis=1)).astype(int) - (intensity > others.max(axis=1))
    good = even & alone & square & (dim != 0)
    return OffCentring(xy_nm[good], -dim[good, None] * arms[good].mean(axis=1))


def maps(of: OffCentring, shape: tuple[int, int], pixel_yx_nm: tuple[float, float]) -> NDArray[np.float32] | None:
    """Two maps [2, h, w] of the averaged off-centring, along the direction in which it varies most and across it, each
    from its middle value and in units of its standard error; 0 where there are no columns. None for too few."""
    if len(of.xy_nm) < LEAST_COLUMNS:
        return None
    _, axes = np.linalg.eigh(np.cov(of.shift_nm.T))
    values = of.shift_nm @ axes[:, ::-1]
    weight_y, weight_x = (_bells(of.xy_nm[:, 1 - axis], shape[axis], pixel_yx_nm[axis]) for axis in (0, 1))
    total, squared = (weight_y @ weight_x.T).toarray(), (weight_y**2 @ (weight_x**2).T).toarray()
    known = total > 1.0
    made = np.zeros((2, *shape), dtype=np.float32)
    for component, value in enumerate(values.T):
        mean = np.divide((weight_y * value[None] @ weight_x.T).toarray(), total, out=np.zeros(shape), where=known)
        low, high = np.percentile(mean[known], [5, 95]) if known.any() else (0.0, 0.0)
        index = [
            np.clip((of.xy_nm[:, 1 - axis] / pixel_yx_nm[axis]).astype(int), 0, shape[axis] - 1) for axis in (0, 1)
        ]
        spread = 1.4826 * np.median(np.abs(value - mean[index[0], index[1]])) + 1e-6
        error = spread * np.sqrt(squared[known]) / total[known]
        made[component][known] = np.clip((mean[known] - 0.5 * (low + high)) / error, -STRONGEST, STRONGEST) / 3
    return made


def _bells(at_nm: Floats, count: int, pixel_nm: float) -> Any:
    """The weights [count, n] of columns at ``at_nm`` [n] in ``count`` pixels of one axis, as a sparse array: columns
    further off than ``REACH`` widths do not count, and memory grows with the image, not with its square."""
    from scipy.sparse import csr_array

    reach = math.ceil(REACH * AVERAGED_NM / pixel_nm)
    pixel = np.floor(at_nm / pixel_nm).astype(int) + np.arange(-reach, reach + 1)[:, None]
    weight = np.exp(-0.5 * (((pixel + 0.5) * pixel_nm - at_nm) / AVERAGED_NM) ** 2)
    column = np.broadcast_to(np.arange(len(at_nm)), pixel.shape)
    inside = (pixel >= 0) & (pixel < count)
    return csr_array((weight[inside], (pixel[inside], column[inside])), shape=(count, len(at_nm)))
