"""Evidence for single bright atoms in a coarse overview: how strongly a window promises them, before it is scanned.

Training-free: the spot fit of :mod:`aecontrol.perception.bright` on the overview itself, in units of the scatter of its
own response. For a spot of unknown brightness z standard deviations high, z^2 / 2 is the logarithm of the likelihood
ratio of "atom" against "no atom"; a window's evidence sums that of its spots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.perception.bright import SPOT_NM, fit_spots
from aecontrol.types import ScanRegion

_COVERED = 0.5  # share of a window that the overview must have seen

Evidence = tuple[float | None, float | None, dict[str, float]]


def bright_atom_evidence(
    image: NDArray[np.floating], region: ScanRegion, windows: Sequence[ScanRegion]
) -> list[Evidence]:
    """(value, variance, features) for each window: larger where more or brighter atoms are likely.

    ``image`` [rows, cols] is the overview over ``region``, any gain and offset. ``value``: the root of the summed
    squares of all positive responses z, one term per area of an atom, so in standard deviations; ``variance`` 1. It
    ranks windows, and follows the number of atoms up to a factor that differs between specimens. ``features``:
    'brightest' (largest z), 'level' (mean signal in units of the frame's spread) and 'roughness' (root mean square of
    z). (None, None, {}) for a window that the overview saw less than half of, or from a frame without contrast, too
    coarse or too small.
    """
    nothing: list[Evidence] = [(None, None, {})] * len(windows)
    try:
        response = fit_spots(image, region.pixel_size_nm).amplitude
    except BadInput:
        return nothing
    scatter = 1.4826 * float(np.median(np.abs(response)))
    spread = float(np.std(image))
    if scatter <= 1e-9 * spread or spread == 0.0:
        return nothing
    z = response / scatter
    ratio = np.maximum(z, 0.0) ** 2
    pixel_area = region.area_nm2 / region.pixels
    pixels_per_atom = 2 * math.pi * SPOT_NM**2 / pixel_area
    mean = float(np.mean(image))
    evidence: list[Evidence] = []
    for window in windows:
        inside = _inside(window, region)
        seen = np.count_nonzero(inside) * pixel_area / window.area_nm2
        if seen < _COVERED:
            evidence.append((None, None, {}))
            continue
        value = math.sqrt(float(ratio[inside].sum()) / pixels_per_atom / seen)
        features = {
            "brightest": float(z[inside].max()),
            "level": (float(image[inside].mean()) - mean) / spread,
            "roughness": float(np.sqrt(np.mean(z[inside] ** 2))),
        }
        evidence.append((value, 1.0, features))
    return evidence


def _inside(window: ScanRegion, region: ScanRegion) -> NDArray[np.bool_]:
    """Mask [rows, cols] of the pixels of ``region`` whose centres lie in ``window``."""
    u = (np.arange(region.shape[1]) + 0.5) * region.pixel_size_nm[0] - region.fov_nm[0] / 2
    v = (np.arange(region.shape[0]) + 0.5)[:, None] * region.pixel_size_nm[1] - region.fov_nm[1] / 2
    turn = region.rotation_rad - window.rotation_rad
    dx, dy = region.center_nm[0] - window.center_nm[0], region.center_nm[1] - window.center_nm[1]
    c, s = math.cos(window.rotation_rad), math.sin(window.rotation_rad)
    x = c * dx + s * dy + math.cos(turn) * u - math.sin(turn) * v
    y = c * dy - s * dx + math.sin(turn) * u + math.cos(turn) * v
    inside: NDArray[np.bool_] = (np.abs(x) <= window.fov_nm[0] / 2) & (np.abs(y) <= window.fov_nm[1] / 2)
    return inside
