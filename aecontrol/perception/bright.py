"""Single bright atoms on an uneven support: a spot and a plane fitted around every pixel, training-free.

Around each point the image is modelled as ``A g + b + c.x``: a Gaussian spot g of one atom's width, a background and
its slope, by least squares with Gaussian weights. Only pixels of the frame enter, so near an edge, where spot and slope
can hardly be told apart, A is uncertain instead of wrong (a filter that mirrors the image there sees atoms of its own
making).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.perception.finder import Found

Floats = NDArray[np.float64]

SPOT_NM = 0.094
"""Standard deviation of one atom's image: the median profile of hand-labelled Pt atoms in aberration-corrected HAADF
images."""
CONTEXT_NM = 0.35
"""Standard deviation of the weights of the fit: a few atoms. With one half to one and a half of it the ranking of atoms
changes by a few per cent only."""
SEPARATION_NM = 0.15
"""Of two maxima closer than this only the higher is an atom."""
CALIBRATION = (0.83, 9.1)
"""Confidence = 1 / (1 + exp(-a (z - z0))), z the amplitude in standard errors: a logistic regression of hand labels on
z over the two committed images of Pt on carbon, read in windows of 32 x 32 pixels. On twelve other images of the
series: z = 7 to 8, predicted 0.21, labelled 0.19; 9 to 10, 0.58 and 0.49; above 12, 0.97 and 0.81. Another support or
dose needs its own."""
_REVISION = "1"
_COARSEST = 1.5  # pixel / SPOT_NM: coarser pixels may miss an atom between them
_SMALLEST = 4.0  # frame / SPOT_NM: a smaller frame does not tell an atom from a slope


@dataclass(frozen=True)
class SpotFit:
    """Amplitude of a spot centred on each pixel [rows, cols], image units, and its standard error for pixels whose
    noise has a standard deviation of 1."""

    amplitude: Floats
    unit_error: Floats


def fit_spots(image: NDArray[np.generic], pixel_nm: tuple[float, float]) -> SpotFit:
    """The fit of the module's first lines around every pixel of ``image`` [rows, cols]; ``pixel_nm`` (x, y).

    Invariant under ``image -> gain * image + plane`` up to the gain. Raises BadInput for an image that is not 2-D, not
    finite, too coarse or too small to tell an atom.
    """
    data = np.asarray(image, dtype=np.float64)
    if data.ndim != 2 or not np.isfinite(data).all():
        raise BadInput(f"an image of shape {data.shape}, or with pixels that are not finite", "give a finite 2-D image")
    if max(pixel_nm) > _COARSEST * SPOT_NM:
        raise BadInput(f"pixels of {max(pixel_nm):.3g} nm", f"an atom needs at most {_COARSEST * SPOT_NM:.3g} nm")
    if min(data.shape[0] * pixel_nm[1], data.shape[1] * pixel_nm[0]) < _SMALLEST * SPOT_NM:
        raise BadInput(
            f"a frame of {data.shape[1] * pixel_nm[0]:.3g} x {data.shape[0] * pixel_nm[1]:.3g} nm",
            f"an atom and its surroundings need at least {_SMALLEST * SPOT_NM:.3g} nm",
        )
    solution, unit_error = _geometry(data.shape, pixel_nm)
    weight, terms = _terms(pixel_nm)
    centred = data - data.mean()
    amplitude = sum(solution[k] * _correlate(centred, weight * term) for k, term in enumerate(terms))
    return SpotFit(np.asarray(amplitude), unit_error)


def pixel_noise(image: NDArray[np.generic], pixel_nm: tuple[float, float]) -> Floats:
    """Standard deviation of the noise of each pixel [rows, cols], averaged over ``CONTEXT_NM``: from second differences
    along both axes, to which structure wider than a few pixels adds nothing (J. Immerkaer, Comput. Vis. Image
    Underst. 64, 300 (1996))."""
    from scipy.ndimage import convolve, gaussian_filter

    kernel = np.array([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6
    difference = convolve(np.asarray(image, dtype=np.float64), kernel, mode="reflect")
    widths = (CONTEXT_NM / pixel_nm[1], CONTEXT_NM / pixel_nm[0])
    return np.asarray(np.sqrt(gaussian_filter(difference**2, widths, mode="reflect")))


class BrightAtomFinder:
    """Finds single bright atoms one by one; the same interface as the network's finder, but no weights."""

    @property
    def version(self) -> str:
        """Hash of the constants and of this code's revision."""
        text = repr((_REVISION, SPOT_NM, CONTEXT_NM, SEPARATION_NM, CALIBRATION))
        return hashlib.sha256(text.encode()).hexdigest()

    def find(self, image: NDArray[np.generic], pixel_size_nm: tuple[float, float], threshold: float = 0.5) -> Found:
        """Atoms of ``image`` [rows, cols] with at least ``threshold`` confidence, the surest first; positions in px,
        the centre of pixel [0, 0] at (0.5, 0.5). Raises BadInput as :func:`fit_spots`."""
        from scipy.ndimage import maximum_filter

        data = np.asarray(image, dtype=np.float64)
        fit = fit_spots(data, pixel_size_nm)
        error = fit.unit_error * pixel_noise(data, pixel_size_nm)
        z = np.divide(fit.amplitude, error, out=np.zeros_like(error), where=error > 0)
        size = [2 * max(1, round(SEPARATION_NM / pixel)) + 1 for pixel in (pixel_size_nm[1], pixel_size_nm[0])]
        slope, middle = CALIBRATION
        confidence = 1 / (1 + np.exp(-slope * (np.clip(z, -50.0, 50.0) - middle)))
        rows, cols = np.nonzero((z == maximum_filter(z, size, mode="nearest")) & (z > 0) & (confidence >= threshold))
        order = np.argsort(-z[rows, cols], kind="stable")
        rows, cols = rows[order], cols[order]
        top, spot = z[rows, cols], 2 * np.pi * SPOT_NM**2 / (pixel_size_nm[0] * pixel_size_nm[1])
        # Cramer-Rao bound of a Gaussian's position in white noise: sqrt(2) widths per standard error of its amplitude
        sigma_nm = np.sqrt(2) * SPOT_NM / top
        return Found(
            x_px=cols + 0.5 + _vertex(z, rows, cols, axis=1),
            y_px=rows + 0.5 + _vertex(z, rows, cols, axis=0),
            confidence=confidence[rows, cols],
            sigma_x=sigma_nm / pixel_size_nm[0],
            sigma_y=sigma_nm / pixel_size_nm[1],
            intensity=fit.amplitude[rows, cols] * spot,
            sigma_intensity=error[rows, cols] * spot,
            disagreement=np.zeros(len(rows)),
            spread_nm=np.zeros(len(rows)),
            completed=np.zeros(len(rows), dtype=bool),
            background=float(np.median(data)),
            blur_nm=SPOT_NM if len(rows) else None,
        )


def _vertex(z: Floats, rows: NDArray[np.intp], cols: NDArray[np.intp], axis: int) -> Floats:
    """Where between the pixels the parabola through a maximum and its two neighbours peaks, px; 0 at an edge."""
    place = (rows, cols)[axis]
    inner = (place > 0) & (place < z.shape[axis] - 1)
    step = np.array([1 - axis, axis])[:, None]
    at = np.stack([rows, cols])
    low, high = (np.clip(at + sign * step, 0, np.array(z.shape)[:, None] - 1) for sign in (-1, 1))
    before, here, after = z[tuple(low)], z[rows, cols], z[tuple(high)]
    curvature = before - 2 * here + after
    vertex = np.divide(0.5 * (before - after), curvature, out=np.zeros_like(here), where=curvature < 0)
    return np.where(inner, np.clip(vertex, -0.5, 0.5), 0.0)


def _correlate(image: Floats, kernel: Floats) -> Floats:
    from scipy.signal import fftconvolve

    reach = (kernel.shape[0] // 2, kernel.shape[1] // 2)
    full = fftconvolve(image, kernel[::-1, ::-1], mode="full")
    return np.asarray(full[reach[0] : reach[0] + image.shape[0], reach[1] : reach[1] + image.shape[1]])


def _terms(pixel_nm: tuple[float, float]) -> tuple[Floats, tuple[Floats, ...]]:
    """Weights of the fit and its four terms (spot, constant, slopes) around a pixel, on an odd grid."""
    reach_x, reach_y = (max(1, int(np.ceil(2.5 * CONTEXT_NM / pixel))) for pixel in pixel_nm)
    x = np.arange(-reach_x, reach_x + 1) * pixel_nm[0]
    y = np.arange(-reach_y, reach_y + 1)[:, None] * pixel_nm[1]
    square = x**2 + y**2
    weight: Floats = np.exp(-square / (2 * CONTEXT_NM**2))
    ones: Floats = np.ones_like(square)
    spot: Floats = np.exp(-square / (2 * SPOT_NM**2))
    return weight, (spot, ones, ones * x / CONTEXT_NM, ones * y / CONTEXT_NM)


@lru_cache(maxsize=8)
def _geometry(shape: tuple[int, int], pixel_nm: tuple[float, float]) -> tuple[Floats, Floats]:
    """What the fit needs of the frame alone: the row of the inverse normal matrix that gives A [4, rows, cols], and A's
    standard error for unit noise [rows, cols] (the weights are not inverse variances, hence the sandwich)."""
    weight, terms = _terms(pixel_nm)
    frame = np.ones(shape)
    normal = np.empty((*shape, 4, 4))
    spread = np.empty_like(normal)
    for i, a in enumerate(terms):
        for j, b in enumerate(terms[: i + 1]):
            normal[..., i, j] = normal[..., j, i] = _correlate(frame, weight * a * b)
            spread[..., i, j] = spread[..., j, i] = _correlate(frame, weight**2 * a * b)
    first = np.linalg.inv(normal)[..., 0, :]
    variance = np.einsum("...i,...ij,...j->...", first, spread, first)
    solution = np.moveaxis(first, -1, 0)
    return np.ascontiguousarray(solution), np.sqrt(np.maximum(variance, 0.0))
