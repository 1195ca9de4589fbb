"""How wide atoms are in an image of unknown pixel size, and the pixel size under which they look as in training.

No calibration: an atom's image is as wide as the probe makes it, 0.035 to 0.11 nm (standard deviation). In a lattice
0.05 nm is assumed, which six images of known crystals bear out within 20 %; on a thick support, not in focus
throughout, 0.07 nm. What is found with such a pixel size is to be reported in pixels.

A lattice is read from its autocorrelation, isolated atoms from the image's third moment: amorphous supports have
structure on every scale, so that their autocorrelation tells nothing, but only atoms are bright, small and few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

Floats = NDArray[np.float64]

LATTICE_SPOT_NM, ISOLATED_SPOT_NM = 0.05, 0.07
"""Standard deviation of an atom's image that is assumed: the middle (geometric mean) of what is trained on."""
SMALLEST_PX, LARGEST_PX = 0.9, 14.0
"""Standard deviations looked for: below, an atom is one pixel; above, the image should be binned."""
STEP = 0.1
"""Of the logarithm of the widths tried."""
LATTICE_PEAK = 60.0
"""A spectral peak this many times its surroundings' median is a lattice's: noise exceeds 25 once in 10^7 bins."""
SURE = 6.0
"""Standard errors by which a spot's skewness must exceed zero."""
LEAST_SHARE = 0.04
"""Of the variance in a lattice's spots: white noise seems to have up to 0.03 in spots of one pixel."""
ENOUGH_PX = 512
"""The middle of a larger image is looked at only."""


@dataclass(frozen=True)
class Scale:
    """``spot_px``: standard deviation of an atom's image, px; ``pixel_size_nm``: what a pixel would be if that were
    the width assumed; ``how``: in words, what was assumed."""

    pixel_size_nm: float
    spot_px: float
    how: str


def estimate(image: NDArray[np.generic]) -> Scale:
    """The scale of ``image`` [rows, cols], atoms bright on dark; does not depend on its gain and offset.

    Right within about 25 % where round spots of 1.2 px or more stand clear of each other; atoms in clusters on a rough
    support seem up to 1.5 times as wide, those of a lattice as dense as graphene's up to 40 % narrower. Raises
    BadInput for an image that is not 2-D, not finite, smaller than 32 px or without structure that noise does not
    explain.
    """
    data = np.asarray(image, dtype=np.float64)
    if data.ndim != 2 or not np.isfinite(data).all() or min(data.shape) < 32:
        raise BadInput(
            f"an image of shape {data.shape}, or with pixels that are not finite",
            "give one finite 2-D channel of at least 32 x 32 pixels, or its pixel size",
        )
    data = data[tuple(slice(max(0, (n - ENOUGH_PX) // 2), (n + ENOUGH_PX) // 2) for n in data.shape)]
    data = (data - data.mean()) / (data.std() or 1.0)
    widths = np.exp(np.arange(np.log(SMALLEST_PX), np.log(min(LARGEST_PX, min(data.shape) / 8)), STEP))
    ways = [
        ("the autocorrelation of a lattice", _from_autocorrelation, LATTICE_SPOT_NM),
        ("isolated bright spots", _from_skewness, ISOLATED_SPOT_NM),
    ]
    for name, way, assumed in ways if _is_lattice(data) else ways[1:]:
        spot = way(data, widths)
        if spot is not None:
            return Scale(
                assumed / spot,
                spot,
                f"pixel size unknown; spots {spot:.2g} px wide (standard deviation, from {name}) are assumed to be "
                f"{assumed} nm: an assumption, not a calibration",
            )
    raise BadInput("no atoms stand out of the noise, so their width cannot be estimated", "give the pixel size")


def _is_lattice(data: Floats) -> bool:
    """Whether the spectrum has sharp peaks (those on its axes are scan lines' and do not count)."""
    from scipy.ndimage import median_filter

    window = np.outer(*(np.hanning(length) for length in data.shape))
    power = np.fft.fftshift(np.abs(np.fft.rfft2(data * window)) ** 2, axes=0)
    near = np.zeros((15, 15), dtype=bool)
    near[::3, ::3] = True
    surroundings = median_filter(power, footprint=near)
    sharp = power > LATTICE_PEAK * np.maximum(surroundings, 1e-12 * power.max())
    middle = power.shape[0] // 2
    sharp[middle - 2 : middle + 3] = False
    return bool(sharp[:, 3:].any())


def _from_skewness(data: Floats, widths: Floats) -> float | None:
    """Width of the band in which spots stand out most, by the third moment: noise is symmetric, spots are not.

    The third moment alone peaks at the spots' own width whatever the noise, but is misled by clusters and texture; over
    the third power of the spread (skewness) it resists these, but peaks at wider bands in more noise. Hence the middle,
    right within 20 % at any noise; where clusters leave it no maximum, the skewness.
    """
    from scipy.ndimage import gaussian_filter

    moments = []
    for width in widths:
        band = gaussian_filter(data, width) - gaussian_filter(data, 1.6 * width)
        moments.append((((band - band.mean()) ** 3).mean(), max(float(band.std()), 1e-12)))
    third, spread = np.array(moments).T
    # independent values of a band: about one in 2 pi width^2 pixels; the skewness of n Gaussians scatters by sqrt(6/n)
    sure = third / spread**3 / np.sqrt(6 * 2 * np.pi * widths**2 / data.size)
    for power in (1.5, 3.0):
        height = third / spread**power
        peaks = [k for k in _maxima(height) if sure[k] > SURE]
        if peaks:
            k = max(peaks, key=lambda k: float(sure[k]))
            before, at, after = np.log(np.maximum(height[k - 1 : k + 2], 1e-3 * height[k]))
            return float(widths[k] * np.exp(0.5 * STEP * (before - after) / (before - 2 * at + after)))
    return None


def _maxima(v: Floats) -> list[int]:
    """Where a sequence has inner maxima."""
    return [k for k in range(1, len(v) - 1) if v[k - 1] < v[k] >= v[k + 1]]


def _from_autocorrelation(data: Floats, widths: Floats) -> float | None:
    """Least width at which the autocorrelation of the high-passed image is neither wider nor narrower than a spot's:
    wider ones are of contamination and of the lattice itself."""
    share, ahead = _tendency(data, widths[0])
    for width in widths[1:]:
        next_share, following = _tendency(data, width)
        if ahead >= 0 > following and share > LEAST_SHARE:
            return float(width * np.exp(-STEP * following / (following - ahead)))
        share, ahead = next_share, following
    return None


def _tendency(data: Floats, width: float) -> tuple[float, float]:
    """Share of the variance in spots of ``width`` px, and by how much (logarithm) the spots are wider than that;
    NaN where there are none.

    The image minus its blur by w = 3 widths; of white noise and spots that is known: in Fourier space spots of
    standard deviation s have the power exp(-4 pi^2 s^2 k^2) (1 - exp(-2 pi^2 w^2 k^2))^2. Lags on the axes (scan lines)
    and zero (noise) are left out. The derivative by the width is fitted with the spots and the noise's rest.
    """
    from scipy.ndimage import gaussian_filter

    w = 3 * width
    lag, correlation = _autocorrelation(data - gaussian_filter(data, w, truncate=3.0), w)

    def gaussian(variance: float) -> Floats:
        return np.asarray(np.exp(-0.5 * lag**2 / variance) / variance)

    def spots(s: float) -> Floats:
        return gaussian(2 * s**2) - 2 * gaussian(2 * s**2 + w**2) + gaussian(2 * s**2 + 2 * w**2)

    wider = (spots(1.02 * width) - spots(0.98 * width)) / 0.04
    terms = np.stack([spots(width), wider, -2 * gaussian(w**2) + gaussian(2 * w**2)], 1)
    size = np.abs(terms).max(0)
    amount, change, _ = np.linalg.lstsq(terms / size, correlation, rcond=None)[0] / size
    peak = 1 / (2 * width**2) - 2 / (2 * width**2 + w**2) + 1 / (2 * width**2 + 2 * w**2)
    return float(amount * peak), float(change / amount) if amount > 0 else np.nan


def _autocorrelation(data: Floats, reach: float) -> tuple[Floats, Floats]:
    """Lengths of all lags off the axes up to ``reach`` px, and the autocorrelation there, 1 at zero."""
    r = int(np.ceil(reach))
    shape = [length + r + 1 for length in data.shape]
    spectrum = np.abs(np.fft.rfft2(data, shape)) ** 2
    sums = np.fft.irfft2(spectrum, shape)
    dy, dx = (lags.ravel() for lags in np.mgrid[-r : r + 1, 1 : r + 1])
    keep = (dy != 0) & (np.hypot(dx, dy) <= reach)
    dy, dx = dy[keep], dx[keep]
    pairs = (data.shape[0] - np.abs(dy)) * (data.shape[1] - dx)
    return np.hypot(dx, dy), sums[dy, dx] / pairs / max(sums[0, 0] / data.size, 1e-300)
