"""How far the atoms of an image can be trusted: dose, precision, spacing, and areas where something is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model

from . import sampling
from .finder import Found

Floats = NDArray[np.float64]
Pixels = NDArray[np.generic]

TILE_NM = 0.5
"""Side of the areas that are judged: about one cell of a crystal."""
SUSPICIOUS = 4.0
"""Residual variance of a tile over what tiles of its brightness usually have. Noise alone stays below 1.6 in 256
pixels."""
SMOOTH_NM = 0.45
"""Width of the box that is applied twice: what varies over more than about this is background."""
RIM_NM = 0.15
"""Columns just outside the frame shine this far into it, and are not in the table."""
CLIPPED_PX = 8
"""Fewer pixels than this at the highest value are no saturation."""
MOST_AREAS = 50
DIM_COUNTS = 30.0
"""Columns with fewer counts are found less surely and placed less well than the bounds promise."""


class Area(Model):
    """A rectangle of the image where something is wrong; lengths in the unit of the positions."""

    x: float = Field(description="left edge")
    y: float = Field(description="upper edge")
    width: float
    height: float
    reason: str


class Spread(Model):
    """A quantity over all atoms."""

    median: float
    low: float = Field(description="5th percentile")
    high: float = Field(description="95th percentile")


class Quality(Model):
    """What a reader should know before believing the table of atoms; lengths in the unit of the positions."""

    atoms: int
    mended_pixels: int = Field(description="dead or hot pixels replaced by their neighbours")
    counts_per_column: dict[str, float] | None = Field(description="median by label; None: the gain is unknown")
    gain: float | None = Field(description="image units per count")
    gain_basis: str = Field(description="'the image holds counts', 'slope of the noise', or why it is unknown")
    precision: float | None = Field(description="median standard error of a position per axis")
    spacing: Spread | None = Field(description="distance to the nearest neighbour")
    areas: list[Area] = Field(description="suspicious areas, worst first")
    warnings: list[str]


def assess(
    found: Found,
    labels: Sequence[str],
    image: Pixels,
    pixel_nm: float,
    unit_px: float,
    bad: NDArray[np.bool_],
) -> Quality:
    """Judge the atoms ``found`` in ``image`` [rows, cols] (its ``bad`` pixels mended); ``unit_px``: what a pixel is in
    the unit of the positions."""
    gain, basis = noise_gain(image)
    counts = None
    if gain is not None and np.isfinite(found.intensity).all() and len(found):
        named = np.asarray(labels)
        counts = {str(name): float(np.median(found.intensity[named == name]) / gain) for name in np.unique(named)}
    sigma = np.concatenate([found.sigma_x, found.sigma_y])
    areas = [*_saturated(image, pixel_nm), *_unexplained(found, image, pixel_nm)][:MOST_AREAS]
    quality = Quality(
        atoms=len(found),
        mended_pixels=int(bad.sum()),
        counts_per_column=counts,
        gain=gain,
        gain_basis=basis,
        precision=float(np.median(sigma)) * unit_px if len(sigma) and np.isfinite(sigma).all() else None,
        spacing=_spacing(found, unit_px),
        areas=[
            Area(x=x * unit_px, y=y * unit_px, width=w * unit_px, height=h * unit_px, reason=reason)
            for (x, y, w, h), reason in areas
        ],
        warnings=[],
    )
    return quality.model_copy(update={"warnings": _warnings(quality, found, image)})


def _warnings(quality: Quality, found: Found, image: Pixels) -> list[str]:
    said = []
    if quality.atoms == 0:
        said.append("no atom was found" + (f": the image is {image.flat[0]} everywhere" if not np.ptp(image) else ""))
    if quality.mended_pixels:
        said.append(f"{quality.mended_pixels} dead or hot pixels were replaced by the median of their neighbours")
    if quality.counts_per_column and (dim := min(quality.counts_per_column.values())) < DIM_COUNTS:
        said.append(f"the dimmest kind of column has {dim:.3g} counts; below {DIM_COUNTS:g} some are missed")
    if len(found) and (doubtful := np.mean(found.confidence < 0.7)) > 0.1:
        said.append(f"{doubtful:.0%} of the atoms have a confidence below 0.7")
    if any(area.reason == SATURATED for area in quality.areas):
        said.append("the image is saturated: intensities and positions there are wrong")
    if float(image.min()) < 0:
        said.append("the image has negative values, so its noise was estimated without assuming counts")
    return said


# ---------------------------------------------------------------- dose


def noise_gain(image: Pixels) -> tuple[float | None, str]:
    """Image units per count, and how that is known.

    Noise variance against level in 16 classes of level: 1 and through the origin where whole numbers are counts; else
    the slope, if the noise grows with the level at all. Noise is taken from second differences along both axes,
    normalised to unit variance (J. Immerkaer, Comput. Vis. Image Underst. 64, 300 (1996)), to which the 3 x 3 mean
    that serves as the level is blind.
    """
    from scipy.ndimage import uniform_filter

    if min(image.shape) < 16 or not np.ptp(image):
        return None, "the image is too small or constant"
    step = max(1, image.shape[0] // 1024)  # a band of a large image tells enough
    data = np.asarray(image[: image.shape[0] // step], dtype=np.float64)
    level = uniform_filter(data, 3)[1:-1, 1:-1].ravel()
    square = ((np.diff(np.diff(data, 2, axis=0), 2, axis=1) / 6.0) ** 2).ravel()
    groups = np.array_split(np.argsort(level, kind="stable"), 16)
    at = np.array([level[g].mean() for g in groups])
    variance = np.array([square[g].mean() for g in groups])
    if not np.ptp(at) > 0:
        return None, "the image is too small or constant"
    if not variance.max() > 1e-30 * np.ptp(at) ** 2:
        return None, "the image holds no noise"
    if data.min() >= 0 and (data == np.round(data)).all():
        ratio = variance.sum() / at.sum()
        bright = variance[8:].sum() / at[8:].sum()
        if 0.8 < ratio < 1.25 and 0.8 < bright < 1.25:
            return 1.0, "the image holds counts"
    weight = 1 / np.maximum(variance, 1e-3 * variance.max())
    slope, intercept = np.polyfit(at - at.min(), variance, 1, w=weight)
    rise = slope * np.ptp(at)
    if not np.isfinite(slope) or rise < 0.3 * max(intercept, 0.0) or rise <= 0:
        return None, "the noise does not grow with the signal"
    return float(slope), "slope of the noise"


def _spacing(found: Found, unit_px: float) -> Spread | None:
    from scipy.spatial import cKDTree

    if len(found) < 2:
        return None
    at = np.stack([found.x_px, found.y_px], 1)
    low, median, high = np.percentile(cKDTree(at).query(at, 2)[0][:, 1], [5, 50, 95]) * unit_px
    return Spread(median=float(median), low=float(low), high=float(high))


# ---------------------------------------------------------------- suspicious areas

Box = tuple[float, float, float, float]
"""(x, y, width, height) px."""
SATURATED = "saturated"


def _saturated(image: Pixels, pixel_nm: float) -> list[tuple[Box, str]]:
    """Where values pile up at the highest one: more than twice as many as at the next lower."""
    from scipy.ndimage import binary_dilation

    top = image == image.max()
    many = int(top.sum())
    if many < CLIPPED_PX or many == top.size or many <= 2 * int((image == image[~top].max()).sum()):
        return []
    near = max(1, round(0.1 / pixel_nm))
    return [(_box(place, 1), SATURATED) for place in _slices(binary_dilation(top, iterations=near))]


def _unexplained(found: Found, image: Pixels, pixel_nm: float) -> list[tuple[Box, str]]:
    """Tiles in which image minus fitted columns varies ``SUSPICIOUS`` times more than in others of their brightness."""
    from scipy.ndimage import uniform_filter

    if found.blur_nm is None or not np.isfinite(found.intensity).all():
        return []
    bins = max(1, round(sampling.NET_PIXEL_NM / pixel_nm))
    binned = sampling.bin_sum(image, (bins, bins))
    residual = binned - _columns(found, binned.shape, bins, found.blur_nm / (pixel_nm * bins))
    width = round(SMOOTH_NM / (pixel_nm * bins))
    residual -= uniform_filter(uniform_filter(residual, width), width)
    side = max(4, round(TILE_NM / (pixel_nm * bins)))
    rim = round(RIM_NM / (pixel_nm * bins))
    if min(binned.shape) < 2 * (side + rim):
        return []
    inner = (slice(rim, -rim or None),) * 2
    variance = sampling.bin_sum(residual[inner] ** 2, (side, side)) / side**2
    excess = variance / _usual(sampling.bin_sum(binned[inner], (side, side)), variance)
    strange = [(float(excess[place].max()), place) for place in _slices(excess > SUSPICIOUS)]
    strange.sort(key=lambda pair: -pair[0])
    return [(_box(place, side * bins, rim * bins), f"{worst:.1f} times the usual misfit") for worst, place in strange]


def _columns(found: Found, shape: tuple[int, ...], bins: int, blur: float) -> Floats:
    """The fitted columns as an image of ``shape``, ``bins`` pixels a side summed; ``blur`` in binned pixels."""
    reach = int(np.ceil(3.2 * blur))
    steps = np.arange(-reach, reach + 1)

    def profile(at: Floats, length: int) -> tuple[NDArray[np.int64], Floats]:
        pixel = np.floor(at).astype(np.int64)[:, None] + steps
        weight = np.exp(-0.5 * ((pixel + 0.5 - at[:, None]) / blur) ** 2) / (np.sqrt(2 * np.pi) * blur)
        return np.clip(pixel, 0, length - 1), weight * ((pixel >= 0) & (pixel < length))

    total = np.zeros(shape[0] * shape[1])
    for part in range(0, len(found), 8192):  # bounded memory
        some = slice(part, part + 8192)
        cols, gx = profile(found.x_px[some] / bins, shape[1])
        rows, gy = profile(found.y_px[some] / bins, shape[0])
        light = (found.intensity[some, None] * gy)[:, :, None] * gx[:, None, :]
        place = rows[:, :, None] * shape[1] + cols[:, None, :]
        np.add.at(total, place.ravel(), light.ravel())
    return total.reshape(shape)


def _usual(level: Floats, variance: Floats) -> Floats:
    """The variance that tiles of this brightness usually have: the median in up to 8 classes, joined by lines."""
    order = np.argsort(level, axis=None, kind="stable")
    groups = np.array_split(order, int(np.clip(order.size // 16, 1, 8)))
    at = [float(np.median(level.ravel()[g])) for g in groups]
    usual = [float(np.median(variance.ravel()[g])) for g in groups]
    floor = 1e-12 * float(variance.max()) + 1e-300
    return np.asarray(np.maximum(np.interp(level, at, usual), floor))


def _slices(mask: NDArray[np.bool_]) -> list[tuple[slice, slice]]:
    """Where the connected parts of a mask lie."""
    from scipy.ndimage import find_objects, label

    return list(find_objects(label(mask)[0]))


def _box(place: tuple[slice, slice], side: int, rim: int = 0) -> Box:
    """Where a part of a map lies whose elements are ``side`` pixels, after a ``rim`` that was left out."""
    rows, cols = place
    size = (cols.stop - cols.start) * side, (rows.stop - rows.start) * side
    return rim + cols.start * side, rim + rows.start * side, *size
