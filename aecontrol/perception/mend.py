"""Dead and hot pixels: what no spot of a probe can look like, replaced by what surrounds it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

from .refine import BLUR_RANGE_NM

COARSEST_NM = 0.035
"""On coarser pixels one pixel may be most of an atom, and none is judged."""
NOISE_FACTOR = 3.0
"""Outliers exceed this times the 99.5th percentile of the pixel noise: 10 standard deviations of Gaussian noise."""
FEWEST_COUNTS = 6.0
"""Fewer counts than this may fall on one pixel by chance, however empty its neighbourhood (1e-11 at 0.05 counts)."""
DARK_SHARE = 0.4
"""A dead pixel has less than this of what its surroundings have above the image's darkest level (a choice)."""
MOST = 0.01
"""A larger share of bad pixels is no matter of single pixels."""

Pixels = NDArray[np.generic]
Mask = NDArray[np.bool_]


def mend_pixels(image: Pixels, pixel_nm: float) -> tuple[Pixels, Mask]:
    """``image`` [rows, cols] with its bad pixels replaced by the median of their good neighbours, and where they were.

    Bad are values that are not finite, and on pixels up to ``COARSEST_NM`` those that stand out of their surroundings
    as no spot with a blur of ``BLUR_RANGE_NM`` can. The type of the image is kept. Raises BadInput when a bad pixel has
    no good neighbour or more than 1 % are bad.
    """
    bad = ~np.isfinite(image)
    filled = _filled(image, bad)
    if pixel_nm <= COARSEST_NM and min(image.shape) >= 3:
        bad |= _outliers(filled.astype(np.float32), pixel_nm)
        filled = _filled(image, bad)
    return filled, bad


def _filled(image: Pixels, bad: Mask) -> Pixels:
    if not bad.any():
        return image
    if bad.mean() > MOST:
        raise BadInput(
            f"{bad.sum()} of {bad.size} pixels are dead, hot or not finite; the limit is {MOST:.0%}",
            "crop the image to what was recorded",
        )
    rows, cols = np.nonzero(bad)
    around = np.pad(bad, 1, constant_values=True), np.pad(image, 1)
    steps = [(dy, dx) for dy in range(3) for dx in range(3) if (dy, dx) != (1, 1)]
    unknown, values = (np.stack([a[rows + dy, cols + dx] for dy, dx in steps], 1) for a in around)
    if unknown.all(1).any():
        lost = int(np.argmax(unknown.all(1)))
        raise BadInput(
            f"pixel (row {rows[lost]}, column {cols[lost]}) and all around it are dead, hot or not finite",
            "crop the image to what was recorded",
        )
    filled = np.array(image)
    filled[rows, cols] = np.nanmedian(np.where(unknown, np.nan, values.astype(np.float64)), axis=1)
    return filled


def _outliers(image: NDArray[np.float32], pixel_nm: float) -> Mask:
    """Pixels far above the lower, or below the higher, of two opposite neighbours, along each of four lines.

    A spot of blur s, at most half a pixel p from the pixel's centre, has on its far side at least exp(-p^2/s^2) of what
    the pixel has: whatever is brighter than the lower neighbour over that, is no spot.
    """
    padded = np.pad(image, 1, mode="reflect")
    rows, cols = image.shape
    pairs = [
        (padded[1 - dy : 1 - dy + rows, 1 - dx : 1 - dx + cols], padded[1 + dy : 1 + dy + rows, 1 + dx : 1 + dx + cols])
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1))
    ]
    base = float(np.percentile(image[:: max(1, rows // 1024), :: max(1, cols // 1024)], 0.1))
    noise = float(np.percentile(np.abs(image - 0.5 * (pairs[0][0] + pairs[0][1])), 99.5))
    least = NOISE_FACTOR * noise
    if (image == np.round(image)).all():
        least = max(least, FEWEST_COUNTS)
    least = max(least, 1e-5 * float(np.abs(image).max()))  # single precision tells nothing finer
    share = float(np.exp(-((pixel_nm / BLUR_RANGE_NM[0]) ** 2)))
    lower = np.minimum(*pairs[0])
    higher = np.maximum(*pairs[0])
    for one, other in pairs[1:]:
        np.maximum(lower, np.minimum(one, other), out=lower)
        np.minimum(higher, np.maximum(one, other), out=higher)
    hot = image > base + np.maximum(lower - base, 0) / share + least
    dead = image < base + DARK_SHARE * (higher - base) - least
    return np.asarray(hot | dead)
