"""Images as the region network wants them: one view for particles, a finer one that resolves the lattice, and a
map of the off-centring of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

from . import polar, sampling

Scale = Literal["particles", "lattice", "columns"]
CLASSES: Mapping[str, Scale] = {"particle": "particles", "boundary": "lattice", "wall": "columns"}
"""What is looked for, in the order of the network's channels, and the view in which it is."""
PIXEL_NM: Mapping[Scale, float] = {"particles": 0.12, "lattice": 0.06, "columns": 0.2}
"""Pixel size of each view: several pixels across the smallest particle; two across the closest columns; half of
a perovskite's cell."""
COARSEST_NM: Mapping[Scale, float] = {"particles": 0.5, "lattice": 0.1, "columns": 0.1}
"""Images with larger pixels do not show it."""
LEAST_PX = 16
"""Shortest side of a usable view."""


@dataclass(frozen=True)
class View:
    """``image`` [h, w] normalised float32; ``pixel_yx_nm`` of its pixels, within a few per cent of PIXEL_NM."""

    image: NDArray[np.float32]
    pixel_yx_nm: tuple[float, float]


def checked(image: NDArray[np.generic], pixel_size_nm: tuple[float, float]) -> NDArray[np.float64]:
    """``image`` as numbers. Raises BadInput when it is not 2-D and finite, or the pixel size (x, y) not positive."""
    data = np.asarray(image, dtype=np.float64)
    if data.ndim != 2 or not data.size or not np.isfinite(data).all():
        raise BadInput(f"the image has shape {data.shape} or holds NaN or infinity", "give one finite 2-D channel")
    if not all(np.isfinite(p) and p > 0 for p in pixel_size_nm):
        raise BadInput(f"pixel size {pixel_size_nm} nm", "give the pixel size in nm, above 0")
    return data


def why_not(shape: tuple[int, ...], pixel_size_nm: tuple[float, float], scale: Scale) -> str:
    """Why an image of ``shape`` cannot be seen at this scale; '' when it can."""
    if max(pixel_size_nm) > COARSEST_NM[scale]:
        return f"pixels of {max(pixel_size_nm):.3g} nm are larger than {COARSEST_NM[scale]} nm"
    side = min(shape[0] * pixel_size_nm[1], shape[1] * pixel_size_nm[0])
    least = LEAST_PX * PIXEL_NM[scale]
    return f"the image is {side:.3g} nm wide or high, less than {least:.2g} nm" if side < least else ""


def grid(size_nm: tuple[float, float], scale: Scale) -> tuple[tuple[int, int], tuple[float, float]]:
    """(rows, columns) of a view of a frame of ``size_nm`` (width, height), and the pixel (y, x) that fits, nm."""
    rows, cols = (max(1, round(side / PIXEL_NM[scale])) for side in size_nm[::-1])
    return (rows, cols), (size_nm[1] / rows, size_nm[0] / cols)


def of_columns(xy_nm: NDArray[np.float64], intensity: NDArray[np.float64], size_nm: tuple[float, float]) -> list[View]:
    """The views in which walls are looked for, of columns [n, 2] in a frame: see ``polar.maps``. Empty when too few of
    the columns are those of a perovskite along [001]."""
    shape, pixel = grid(size_nm, "columns")
    made = polar.maps(polar.off_centring(xy_nm, intensity), shape, pixel)
    return [] if made is None else [View(image, pixel) for image in made]


def view(image: NDArray[np.float64], pixel_size_nm: tuple[float, float], scale: Scale) -> View:
    """A checked image, brought to the scale's pixels (triangular kernel; linear interpolation of coarser ones).

    The lattice is normalised as for atoms, by its local mean and spread; particles by percentiles of the whole image,
    because they differ from what is round them by their brightness. Neither depends on the image's gain and offset.
    """
    import torch

    shape, pixel = grid((image.shape[1] * pixel_size_nm[0], image.shape[0] * pixel_size_nm[1]), scale)
    middle = float(np.median(image))
    spread = float(np.abs(image - middle).max())
    if spread <= 1e-9 * max(abs(middle), 1e-300):
        return View(np.zeros(shape, dtype=np.float32), pixel)
    scaled = torch.from_numpy(((image - middle) / spread).astype(np.float32))
    brought = torch.nn.functional.interpolate(scaled[None, None], shape, mode="bilinear", antialias=True)[0, 0].numpy()
    if scale == "lattice":
        return View(sampling.normalise(brought.astype(np.float64), pixel), pixel)
    low, mid, high = np.percentile(brought, [1, 50, 99])
    normalised = (brought - mid) * (4 / max(high - low, 1e-9))
    return View(np.clip(normalised, -sampling.CLIP, sampling.CLIP).astype(np.float32), pixel)
