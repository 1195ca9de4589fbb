"""Real images in which people have marked the atoms, as a source of training patches.

Some of a file's images are trained on, named one by one; the others are held out, to be judged on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from aecontrol.errors import BadInput
from aecontrol.types import Model, Positive, PositiveInt

Floats = NDArray[np.float64]

FROM_PIXEL_CENTRE = 0.5
"""Labels count from the centre of pixel [0, 0], positions elsewhere here from its corner."""
MARGIN_PX = 12
"""Labels this far outside a crop are kept: half a spot of one may lie inside."""


@dataclass(frozen=True)
class LabelledScene:
    """A crop of one image, perhaps mirrored, turned and magnified; see ``learn_atoms.Scene``."""

    image: NDArray[np.float32]
    pixel_size_nm: tuple[float, float]
    positions_px: Floats

    @property
    def wanted(self) -> NDArray[np.bool_]:
        """[n] True: every label is to be found."""
        return np.ones(len(self.positions_px), dtype=bool)


class LabelledScenes(Model):
    """Crops of hand-labelled images of one npz file: arrays ``img_NAME`` [rows, cols] and ``xy_NAME`` [n, 2], pixels
    (x, y) from the centre of pixel [0, 0]."""

    kind: Literal["labelled"] = "labelled"
    file: Path = Field(description="npz file")
    images: tuple[str, ...] = Field(min_length=1, description="names of those trained on; the others are held out")
    pixel_nm: Positive = Field(description="pixel size, nm: known, or such that spots are as wide as simulated")
    size_px: PositiveInt = Field(144, ge=16, description="rows and columns of a crop")
    magnification: tuple[Positive, Positive] = Field(
        (0.85, 1.2), description="range of magnifications: other probes and samplings than the file's own"
    )
    mirrored: bool = Field(True, description="also mirrored crops, and crops turned by quarters; False: as they are")

    gate_nm: ClassVar[float] = 0.2

    @field_validator("file")
    @classmethod
    def _readable(cls, path: Path) -> Path:
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        return path

    def render(self, seed: int, index: int) -> LabelledScene:
        """Crop ``index`` of stream ``seed``; the same numbers give the same crop in any process. Raises BadInput when
        the file does not hold the images."""
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(b"labelled"), index)))
        pictures = read_labelled(self.file)
        name = self.images[rng.integers(len(self.images))]
        if name not in pictures:
            raise BadInput(f"{self.file} holds no image {name!r}", f"it holds {', '.join(pictures)}")
        image, xy = pictures[name]
        zoom = float(np.exp(rng.uniform(*np.log(self.magnification))))
        image, xy = _cut(rng, image, xy, round(self.size_px / zoom))
        if self.mirrored:
            image, xy = _turned(rng, image, xy)
        image, xy = _magnified(image, xy, zoom)
        return LabelledScene(image.astype(np.float32), (self.pixel_nm, self.pixel_nm), xy)

    def held_out(self) -> Mapping[str, LabelledScenes]:
        """Crops, as they are, of the images that are not trained on; empty when there are none."""
        others = tuple(name for name in read_labelled(self.file) if name not in self.images)
        plain = {"images": others, "magnification": (1.0, 1.0), "mirrored": False, "size_px": 256}
        return {f"{self.file.stem}, images not trained on": self.model_copy(update=plain)} if others else {}


@lru_cache(maxsize=4)
def read_labelled(file: Path) -> Mapping[str, tuple[NDArray[np.float64], Floats]]:
    """Name -> (image [rows, cols], labels [n, 2] (x, y) px, the centre of pixel [0, 0] at (0.5, 0.5)).

    Raises BadInput for a file that is not such an archive.
    """
    try:
        with np.load(file) as archive:
            names = [key[4:] for key in archive if key.startswith("img_")]
            pictures = {n: (archive[f"img_{n}"].astype(float), archive[f"xy_{n}"] + FROM_PIXEL_CENTRE) for n in names}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadInput(f"{file}: {error}", "give an npz file with arrays img_NAME and xy_NAME") from error
    for name, (image, xy) in pictures.items():
        if image.ndim != 2 or xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(image).all():
            raise BadInput(
                f"{file}: img_{name} has shape {image.shape}, xy_{name} {xy.shape}",
                "give finite [rows, cols] and [n, 2]",
            )
    if not pictures:
        raise BadInput(f"{file} holds no array img_NAME", "give an npz file with arrays img_NAME and xy_NAME")
    return pictures


def _cut(rng: np.random.Generator, image: Floats, xy: Floats, side: int) -> tuple[Floats, Floats]:
    """A random square of ``side`` px (the image's own length where that is shorter)."""
    top, left = (int(rng.integers(max(1, length - side + 1))) for length in image.shape)
    crop = image[top : top + side, left : left + side]
    xy = xy - [left, top]
    size = np.array(crop.shape[::-1])
    return crop, xy[((xy > -MARGIN_PX) & (xy < size + MARGIN_PX)).all(1)]


def _turned(rng: np.random.Generator, image: Floats, xy: Floats) -> tuple[Floats, Floats]:
    """One of the square's eight symmetries."""
    if rng.random() < 0.5:
        image, xy = image.T, xy[:, ::-1]
    if rng.random() < 0.5:
        image, xy = image[::-1], np.stack([xy[:, 0], image.shape[0] - xy[:, 1]], 1)
    if rng.random() < 0.5:
        image, xy = image[:, ::-1], np.stack([image.shape[1] - xy[:, 0], xy[:, 1]], 1)
    return image, xy


def _magnified(image: Floats, xy: Floats, zoom: float) -> tuple[Floats, Floats]:
    """Interpolated to ``zoom`` times as many pixels a side."""
    from scipy.ndimage import zoom as spline

    shape = tuple(round(length * zoom) for length in image.shape)
    if shape == image.shape:
        return image, xy
    factors = (shape[0] / image.shape[0], shape[1] / image.shape[1])
    return spline(image, factors, order=3, mode="grid-mirror", grid_mode=True), xy * factors[::-1]
