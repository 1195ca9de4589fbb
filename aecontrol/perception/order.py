"""Is there a lattice here? Bragg peaks in two directions, which noise, films and edges do not have."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

WINDOW_PX = 40
"""Side of the window whose spectrum is looked at: several cells."""
SPACINGS_NM = (0.115, 0.45)
"""Spacings of lattice planes that are looked for."""
APART_DEG = 25.0
"""The second peak lies at least this far from the direction of the first: an edge makes a streak, not a lattice."""
SIGNIFICANT = 10.0
"""A peak is this many times the mean power at its spacing. One of 20 windows of noise or film has two such peaks, four
of five windows of a lattice at 30 counts a column."""
AWAY_NM = 1.0
"""How far from a boundary the windows beside it are centred."""
MOST_WINDOWS = 48
SHARE = 0.6
"""Of the windows beside a boundary at least this share shows a lattice: more than those of one side."""


def between_lattices(
    image: NDArray[np.float32], pixel_yx_nm: tuple[float, float], inside: NDArray[np.bool_], at: tuple[int, int]
) -> bool:
    """Whether there is a lattice on both sides of the mask ``inside``, whose first pixel is ``at`` in ``image``."""
    from scipy.ndimage import distance_transform_edt

    margin = [math.ceil(AWAY_NM / p) + 1 for p in pixel_yx_nm]
    away = distance_transform_edt(np.pad(~inside, [(m, m) for m in margin], constant_values=True), pixel_yx_nm)
    beside = np.argwhere(np.abs(away - AWAY_NM) < 0.6 * max(pixel_yx_nm)) - margin + at
    beside = beside[np.all((beside >= 0) & (beside < image.shape), axis=1)]
    if not len(beside):
        return False
    some = beside[np.linspace(0, len(beside) - 1, min(MOST_WINDOWS, len(beside))).astype(int)]
    last = np.maximum(np.array(image.shape) - WINDOW_PX, 0)
    return bool(ordered(image, pixel_yx_nm, np.clip(some - WINDOW_PX // 2, 0, last)).mean() >= SHARE)


def ordered(
    image: NDArray[np.float32], pixel_yx_nm: tuple[float, float], corners: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which of the windows of ``image`` [h, w] with first pixels ``corners`` [n, 2] (row, column) show a lattice.

    Windows are WINDOW_PX a side, or the image where that is smaller. The mean power at a spacing is that of exponential
    noise whose lower 30 % are as observed, so that the peaks themselves do not raise it.
    """
    sides = tuple(min(WINDOW_PX, n) for n in image.shape)
    window = np.outer(*(np.hanning(n + 2)[1:-1] for n in sides))
    ky, kx = (np.fft.fftfreq(sides[0], pixel_yx_nm[0])[:, None], np.fft.rfftfreq(sides[1], pixel_yx_nm[1])[None])
    k, angle = np.hypot(ky, kx), np.degrees(np.arctan2(ky, kx))
    band = (k > 1 / SPACINGS_NM[1]) & (k < 1 / SPACINGS_NM[0])
    k, angle = k[band], angle[band]
    ring = (k * 0.5 * min(n * p for n, p in zip(sides, pixel_yx_nm, strict=True))).astype(int)
    seconds = []
    for top, left in corners:
        part = image[top : top + sides[0], left : left + sides[1]].astype(np.float64)
        power = np.abs(np.fft.rfft2((part - (part * window).sum() / window.sum()) * window))[band] ** 2
        for r in np.unique(ring):
            same = ring == r
            power[same] /= np.quantile(power[same], 0.3) / -np.log(0.7) + 1e-30
        off = np.abs((angle - angle[power.argmax()] + 90.0) % 180.0 - 90.0)
        seconds.append(power[off > APART_DEG].max(initial=0.0))
    return np.asarray(seconds) > SIGNIFICANT
