"""How far an image has moved against a reference, or why that cannot be told.

The middle of the reference is laid over every place of the image within reach (normalised cross-correlation of gently
smoothed images: whitening the spectrum, as pure phase correlation does, would give every noisy frequency the same say).
What the best fit leaves over is noise, and that says how sure the best place is against every other one. A lattice
looks the same after a lattice vector, so a shift is accepted only when nothing else within the limit explains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEAST_QUALITY = 5.0
"""Standard deviations by which the best place must lead; chosen on simulated frames."""
SMOOTHING_PX = 1.0
MOST_MISFIT = 0.08
"""Structure, beyond two standard deviations of noise, that only one of the images shows, relative to what both show. In
simulated frames of the same place it was below 0.04, in those of other places with scattered atoms mostly above 0.2."""
NOISE_PX = 2.0
"""Blur of what the best fit leaves over: the noise may change over this many pixels."""
_ALIKE = 1.0 / (8.0 * math.pi * SMOOTHING_PX**2)  # variance of white noise of variance 1 after smoothing twice
REACH = 2.0
"""Places up to this many limits away are looked at, to notice a shift beyond the limit."""
RIVALS = 12
"""So many of the other places that fit best, within the limit and beyond it, are compared one by one."""


@dataclass(frozen=True)
class Shift:
    """How far what the image shows has moved: ``dx_nm`` towards +x (columns), ``dy_nm`` towards +y (rows), with the
    standard deviation ``sigma_nm`` per axis. ``quality``: by how many standard deviations this place fits better than
    any other explanation. ``reason``: why the shift must not be used; empty when it is accepted."""

    dx_nm: float
    dy_nm: float
    sigma_nm: float
    quality: float
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """True when the shift may be used."""
        return not self.reason


def measure_shift(
    reference: NDArray[np.generic],
    image: NDArray[np.generic],
    pixel_size_nm: tuple[float, float],
    limit_nm: float,
    most_misfit: float = MOST_MISFIT,
) -> Shift:
    """The shift of ``image`` [rows, cols] against ``reference`` of the same shape, with pixels of ``pixel_size_nm``
    (fast, slow), where it is at most ``limit_nm``. Images that show different things, by more than ``most_misfit``,
    are refused. Nothing is raised for bad images: a refusal is an answer. Does not block; the same images give the same
    answer."""
    a, b = np.asarray(reference, np.float64), np.asarray(image, np.float64)
    reach = (math.ceil(REACH * limit_nm / pixel_size_nm[1]) + 1, math.ceil(REACH * limit_nm / pixel_size_nm[0]) + 1)
    if reason := _unusable(a, b, reach):
        return Shift(0.0, 0.0, 0.0, 0.0, reason)
    match = _Match.of(a, b, reach)
    y, x = (np.arange(-r, r + 1) * size for r, size in zip(reach, pixel_size_nm[::-1], strict=True))
    distance = np.hypot(y[:, None], x)
    peak = _highest(np.where(distance <= limit_nm, match.fit, -np.inf))
    best = _summit(match.fit, peak)
    dx, dy = (float(best[1]) - reach[1]) * pixel_size_nm[0], (float(best[0]) - reach[0]) * pixel_size_nm[1]
    sigma_px = match.sigma_px(best)
    quality, reason = _judge(match, peak, distance, limit_nm, most_misfit)
    if not reason and math.hypot(dx, dy) > limit_nm - 0.5 * min(pixel_size_nm):
        reason = f"the best place lies at the edge of the {limit_nm:g} nm that are searched"
    if not reason and not max(sigma_px) < 0.5:
        reason = "the best place is uncertain by half a pixel or more"
    sigma = max(sigma_px[0] * pixel_size_nm[1], sigma_px[1] * pixel_size_nm[0])
    return Shift(dx, dy, sigma, quality, reason)


def _unusable(a: Floats, b: Floats, reach: tuple[int, int]) -> str:
    """Why two images cannot be compared at all; empty when they can."""
    if a.shape != b.shape or a.ndim != 2:
        return f"the images differ in shape: {a.shape} and {b.shape}"
    if min(a.shape[axis] - 2 * reach[axis] for axis in (0, 1)) < 8:
        return f"{a.shape[0]} x {a.shape[1]} pixels leave too little overlap within the limit"
    for name, each in (("reference", a), ("image", b)):
        if not np.isfinite(each).all():
            return f"the {name} has pixels that are not numbers"
        if each.std() <= 1e-9 * max(1e-300, np.abs(each).max()):
            return f"the {name} has no contrast"
    return ""


@dataclass(frozen=True)
class _Match:
    """The middle of one image laid over another: ``fit`` [2 ry + 1, 2 rx + 1] correlation at every offset. ``core`` is
    the smoothed middle, ``over`` the spline through the smoothed other image, both scaled so that the unsmoothed ones
    have variance 1; ``noise`` [like core] is the part of it that they do not share, larger where more electrons are."""

    fit: Floats
    core: Floats
    over: Floats
    noise: Floats

    @classmethod
    def of(cls, a: Floats, b: Floats, reach: tuple[int, int]) -> _Match:
        """Match the middle of ``a`` with ``b``."""
        from scipy.ndimage import gaussian_filter, spline_filter
        from skimage.feature import match_template

        middle = np.s_[reach[0] : -reach[0], reach[1] : -reach[1]]
        a, b = ((each - each[middle].mean()) / each[middle].std() for each in (a, b))
        smooth_a, smooth_b = (gaussian_filter(each, SMOOTHING_PX) for each in (a, b))
        core = smooth_a[middle]
        fit: Floats = match_template(smooth_b, core)  # type: ignore[no-untyped-call]
        raw: Floats = match_template(b, a[middle])  # type: ignore[no-untyped-call]
        row, col = peak = _highest(fit)
        rows, cols = core.shape
        differ = gaussian_filter((a[middle] - b[row : row + rows, col : col + cols]) ** 2, NOISE_PX)
        noise = min(1.0, max(1.0 - _height(raw, _summit(raw, peak)), 1e-6)) * differ / differ.mean()
        return cls(fit, core - core.mean(), spline_filter(smooth_b), noise)

    def under(self, place: Floats) -> Floats:
        """The part of the other image that the middle lies on at ``place`` (row, column; between pixels too)."""
        from scipy.ndimage import map_coordinates

        rows, cols = (np.arange(size) + start for size, start in zip(self.core.shape, place, strict=True))
        part = map_coordinates(self.over, np.meshgrid(rows, cols, indexing="ij"), order=3, prefilter=False)
        return np.asarray(part - part.mean())

    def lead(self, place: Floats, rival: Floats) -> float:
        """By how many standard deviations of the noise ``place`` fits better than ``rival``. What both places share
        cancels, so the noise counts only where they differ."""
        from scipy.ndimage import gaussian_filter

        first, second = self.under(place), self.under(rival)
        size = math.sqrt(float((first**2).sum()))
        differ = first - second * (size / math.sqrt(float((second**2).sum())))
        common = 2.0 * _ALIKE * float((self.noise**2).sum())
        spread = 2.0 * float((gaussian_filter(differ, SMOOTHING_PX) ** 2 * self.noise).sum())
        return float((self.core * differ).sum()) / math.sqrt(max(spread - common, common))

    def stands_out(self, place: tuple[int, int]) -> float:
        """By how many standard deviations the fit is better than chance makes it for two images of mere noise."""
        return float(self.fit[place]) * math.sqrt(self.core.size / _ALIKE) / (4.0 * math.pi * SMOOTHING_PX**2)

    def misfit(self, place: Floats) -> float:
        """Variance of what only one of the images shows over the variance of what both show. Noise is white, so twice
        the smoothing leaves a quarter of its variance; what is left beyond that, and beyond what is left by chance, has
        structure."""
        from scipy.ndimage import gaussian_filter

        under = self.under(place)
        under *= math.sqrt(float((self.core**2).sum() / (under**2).sum()))
        differ = self.core - under
        core, under, twice = (
            gaussian_filter(part, math.sqrt(3.0) * SMOOTHING_PX) for part in (self.core, under, differ)
        )
        common = float((core * under).sum())
        chance = 2.0 * math.sqrt(16.0 * math.pi / differ.size) * SMOOTHING_PX
        structure = float((twice**2).sum() - 0.25 * (1.0 + chance) * (differ**2).sum())
        return structure / common if common > 0.0 else math.inf

    def sigma_px(self, place: Floats) -> tuple[float, float]:
        """Standard deviation of the best place along rows and columns, in pixels."""
        from scipy.ndimage import gaussian_filter

        under = self.under(place)
        result = []
        for axis in (0, 1):
            slope = np.gradient(under, axis=axis)
            spread = 2.0 * float((gaussian_filter(slope, SMOOTHING_PX) ** 2 * self.noise).sum())
            bend = float((np.gradient(self.core, axis=axis) * slope).sum())
            result.append(math.sqrt(spread) / bend if bend > 0.0 else math.inf)
        return result[0], result[1]


def _judge(
    match: _Match, peak: tuple[int, int], distance: Floats, limit_nm: float, most_misfit: float
) -> tuple[float, str]:
    """Quality of the best place and why it must not be believed (or nothing)."""
    best = _summit(match.fit, peak)
    others = [place for place in _maxima(match.fit) if place != peak]
    for rival in [place for place in others if distance[place] > limit_nm][:RIVALS]:
        if match.lead(best, _summit(match.fit, rival)) < -LEAST_QUALITY:
            return 0.0, f"a place {distance[rival]:.3g} nm away, beyond the limit of {limit_nm:g} nm, fits better"
    quality = max(match.stands_out(peak), 0.0)
    if quality < LEAST_QUALITY:
        return quality, f"the images hardly correlate ({quality:.1f} standard deviations of noise)"
    if (misfit := match.misfit(best)) > most_misfit:
        return quality, f"the images show different things ({misfit:.2f} of what they share)"
    for rival in [place for place in others if distance[place] <= limit_nm][:RIVALS]:
        lead = match.lead(best, _summit(match.fit, rival))
        quality = min(quality, lead)
        if quality < LEAST_QUALITY:
            where = f"another place, {distance[rival]:.3g} nm from where it was, fits about as well"
            return max(quality, 0.0), f"{where} (worse by {lead:.1f} standard deviations)"
    return quality, ""


def _maxima(fit: Floats) -> list[tuple[int, int]]:
    """Places where the fit is at a maximum, the best first. A place at the border counts when the fit rises to it."""
    from scipy.ndimage import maximum_filter

    summits = np.argwhere((fit >= maximum_filter(fit, 3)) & (fit > 0.0))
    return sorted(((int(row), int(col)) for row, col in summits), key=lambda place: -fit[place])


def _highest(values: Floats) -> tuple[int, int]:
    row, col = np.unravel_index(int(np.argmax(values)), values.shape)
    return int(row), int(col)


def _summit(fit: Floats, peak: tuple[int, int]) -> Floats:
    """Where the paraboloid through the 3 x 3 pixels around a peak is highest (row, column), at most half a pixel from
    the highest pixel."""
    middle = np.array([min(max(at, 1), size - 2) for at, size in zip(peak, fit.shape, strict=True)])
    slope, hessian = _paraboloid(fit, middle)
    if not (hessian[0, 0] < 0.0 and np.linalg.det(hessian) > 0.0):
        return np.array(peak, float)
    away: Floats = middle - np.array(peak) - np.linalg.solve(hessian, slope)
    return np.array(peak) + np.clip(away, -0.5, 0.5)


def _height(fit: Floats, place: Floats) -> float:
    """Height of that paraboloid at ``place``."""
    middle = np.clip(np.rint(place).astype(int), 1, np.array(fit.shape) - 2)
    slope, hessian = _paraboloid(fit, middle)
    step = place - middle
    return float(fit[tuple(middle)] + slope @ step + 0.5 * step @ hessian @ step)


def _paraboloid(fit: Floats, middle: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Slope [2] and Hessian [2, 2] of ``fit`` at a pixel."""
    row, col = middle
    near = fit[row - 1 : row + 2, col - 1 : col + 2]
    slope = np.array([near[2, 1] - near[0, 1], near[1, 2] - near[1, 0]]) / 2.0
    bend = near[2, 1] + near[0, 1] - 2.0 * near[1, 1], near[1, 2] + near[1, 0] - 2.0 * near[1, 1]
    twist = (near[2, 2] + near[0, 0] - near[0, 2] - near[2, 0]) / 4.0
    return slope, np.array([[bend[0], twist], [twist, bend[1]]])
