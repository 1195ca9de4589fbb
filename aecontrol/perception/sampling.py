"""Images as the atom-finding network wants them: near its pixel size, and with local mean 0 and spread 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

NET_PIXEL_NM = 0.03
"""Pixel size that images are brought to. Chosen: 3 pixels across the narrowest column (FWHM 0.08 nm)."""
COARSEST_KEPT_NM = 0.042
"""Pixels up to this size are left alone (the network is trained for 0.02 to 0.042 nm), coarser ones interpolated."""
COARSEST_NM = 0.13
"""Beyond this, neighbouring atoms of any material fall in one pixel."""
SMALLEST_PX = 8
"""Shortest side of a usable image on the network's grid."""
NORMALISE_NM = 0.9
"""Width of the box that is applied twice for the local mean and spread: several lattice cells."""
CLIP = 10.0
"""Normalised values beyond this are hot pixels."""


@dataclass(frozen=True)
class Resampled:
    """An image near the network's sampling.

    ``binned``: sums over ``bins`` (rows, columns) original pixels; ``image``: that, interpolated if it was coarse, and
    normalised [h, w]; ``scale`` (y, x): original pixels per pixel of ``image``.
    """

    binned: NDArray[np.float64]
    bins: tuple[int, int]
    image: NDArray[np.float32]
    scale: tuple[float, float]


def resample(image: NDArray[np.generic], pixel_size_nm: tuple[float, float]) -> Resampled:
    """Bring ``image`` [rows, cols] with pixels ``pixel_size_nm`` (x, y) to the network's sampling and normalise it.

    Fine pixels are summed by whole numbers, so that counts stay counts; a last incomplete bin is dropped. Raises
    BadInput for images that are not 2-D, not finite, too coarse or too small.
    """
    data = np.asarray(image)
    if data.ndim != 2 or not np.isfinite(data).all():
        raise BadInput(f"the image has shape {data.shape} or holds NaN or infinity", "give one finite 2-D channel")
    size = (pixel_size_nm[1], pixel_size_nm[0])
    if not all(0 < p <= COARSEST_NM for p in size):
        raise BadInput(
            f"pixel size {pixel_size_nm} nm; atoms are found on pixels up to {COARSEST_NM} nm", "scan with finer pixels"
        )
    bins = (max(1, round(NET_PIXEL_NM / size[0])), max(1, round(NET_PIXEL_NM / size[1])))
    binned = bin_sum(data, bins)
    rows, cols = binned.shape
    coarse = (size[0] * bins[0], size[1] * bins[1])
    finest = min(coarse)
    # one axis much coarser than the other is brought to the finer one: the network knows square pixels only
    wanted = NET_PIXEL_NM if finest > COARSEST_KEPT_NM else finest
    zoom = [1.0 if p <= min(COARSEST_KEPT_NM, 1.1 * wanted) else p / wanted for p in coarse]
    shape = (round(rows * zoom[0]), round(cols * zoom[1]))
    if min(shape) < SMALLEST_PX:
        raise BadInput(
            f"the image spans {cols * coarse[1]:.3g} x {rows * coarse[0]:.3g} nm; at least "
            f"{SMALLEST_PX * NET_PIXEL_NM:.2g} nm a side is needed",
            "scan a larger window",
        )
    fine = binned
    if shape != binned.shape:
        from scipy.ndimage import zoom as spline

        factors = (shape[0] / rows, shape[1] / cols)
        fine = spline(binned, factors, order=3, mode="grid-mirror", grid_mode=True)
    scale = (rows * bins[0] / shape[0], cols * bins[1] / shape[1])
    return Resampled(binned, bins, normalise(fine, (size[0] * scale[0], size[1] * scale[1])), scale)


def bin_sum(image: NDArray[np.generic], bins: tuple[int, int]) -> NDArray[np.float64]:
    """Sums over ``bins`` (rows, columns) pixels; a last incomplete bin is dropped."""
    rows, cols = image.shape[0] // bins[0], image.shape[1] // bins[1]
    whole = image[: rows * bins[0], : cols * bins[1]].reshape(rows, bins[0], cols, bins[1])
    return np.asarray(whole.sum((1, 3), dtype=np.float64))


def normalise(image: NDArray[np.floating[Any]], pixel_yx_nm: tuple[float, float]) -> NDArray[np.float32]:
    """``image`` minus its local mean, over its local spread; unchanged by gain and offset, zero for a constant image.

    A tenth of the global variance is added to the local one, so that the noise of an empty area is not blown up to
    the contrast of atoms.
    """
    from scipy.ndimage import uniform_filter

    width = [max(3, round(NORMALISE_NM / p)) for p in pixel_yx_nm]
    # a large frame's copies fill the memory: they are single precision, which is enough once the mean is taken off
    deviation = (image - image.mean(dtype=np.float64)).astype(np.float32)
    scratch = np.empty_like(deviation)

    def smooth(x: NDArray[np.float32]) -> NDArray[np.float32]:
        uniform_filter(x, width, output=scratch)  # its running sums are in double precision
        return np.asarray(uniform_filter(scratch, width))

    deviation -= smooth(deviation)
    variance = smooth(deviation**2)
    np.maximum(variance, 0, out=variance)
    spread = np.sqrt(variance + 0.1 * variance.mean(), out=variance)
    known = spread > 1e-9 * max(abs(float(image.max())), abs(float(image.min())))
    normalised = np.divide(deviation, spread, out=np.zeros_like(deviation), where=known)
    return np.asarray(np.clip(normalised, -CLIP, CLIP, out=normalised))
