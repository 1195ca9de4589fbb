"""What `aecontrol damage` is asked for, and the frames that it works on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.files import Picture, read_stack
from aecontrol.judged import Series
from aecontrol.types import Model, Positive

Pixels = NDArray[np.generic]

LIMIT_NM, LIMIT_PX = 0.12, 6.0
"""How far a frame is expected to have moved since the last one at most, where nobody says: less than half a lattice
vector of most crystals, but some pixels in any case."""
LARGEST = 1e15
"""Larger values are no detector's, and their squares leave single precision."""


class Request(Model):
    """How a series is to be judged."""

    pixel_size_nm: Positive | None = Field(None, description="side of a pixel, nm; None: what the files say")
    dose_per_frame: Positive | None = Field(None, description="fluence of a frame, e/A^2; None: what the file says")
    metric: str = Field("learned", description="name of the metric that maps and curve are of")
    channel: str | None = Field(None, description="which image of a file that holds several")
    limit_nm: Positive | None = Field(None, description="farthest that a frame moves from one to the next, nm")
    weights: Path | None = Field(None, description="of the metric; None: the shipped or installed ones")


def read_series(paths: Sequence[Path], request: Request) -> Series:
    """The series in a stack, in the files of a folder by name, or in several files in the order given. Raises BadInput
    for what is no series."""
    files = _files(paths)
    pictures = [read_stack(path, request.channel) for path in files]
    sizes = {picture.pixel_size_nm for picture in pictures}
    known = sorted(size for size in sizes if size is not None)
    if known and (known[-1] > 1.01 * known[0] or None in sizes) and request.pixel_size_nm is None:
        said = ", ".join([*(f"{size:g}" for size in known), *(["unknown"] if None in sizes else [])])
        raise BadInput(f"pixel sizes differ: {said} nm", "give frames of one pixel size, or --pixel-size-nm")
    shapes = {picture.array.shape[1:] for picture in pictures}
    if len(shapes) > 1:
        said = ", ".join(
            f"{next(p.name for p, q in zip(files, pictures, strict=True) if q.array.shape[1:] == s)} {s[0]} x {s[1]}"
            for s in sorted(shapes)
        )
        raise BadInput(f"frames of different shape: {said} px", "give frames of one shape; crop them alike")
    frames = np.concatenate([picture.array for picture in pictures])
    _check(frames)
    if request.limit_nm is not None and request.pixel_size_nm is None and not known:
        raise BadInput(
            f"--limit-nm {request.limit_nm:g} is in nm, but the files do not say how large a pixel is",
            "give --pixel-size-nm too",
        )
    pixel = request.pixel_size_nm or (known[0] if known else None)
    return Series(
        name=files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more",
        frames=frames,
        pixel_nm=pixel,
        dose=request.dose_per_frame or _told_dose(pictures),
        limit_nm=request.limit_nm or (max(LIMIT_NM, LIMIT_PX * pixel) if pixel else LIMIT_PX),
    )


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files that hold frames."""
    if len(paths) == 1 and paths[0].is_dir():
        files = sorted(path for path in paths[0].iterdir() if path.is_file() and not path.name.startswith("."))
        if not files:
            raise BadInput(f"the folder {str(paths[0])!r} holds no file", "give a folder of images")
        return files
    return list(paths)


def _check(frames: Pixels) -> None:
    from aecontrol.perception.damage.reading import PATCH_PX

    if len(frames) < 2:
        raise BadInput("1 frame; damage is a difference", "give at least 2 frames of the same place")
    rows, cols = frames.shape[1:]
    if min(rows, cols) < PATCH_PX:
        colour = "; images in colour are not read" if cols in (3, 4) else ""
        raise BadInput(
            f"{len(frames)} frames of {rows} x {cols} px; a patch is {PATCH_PX} x {PATCH_PX} px{colour}",
            "give a stack [frames, rows, columns] of larger images",
        )
    for k, frame in enumerate(frames):
        bad = int((~np.isfinite(frame)).sum())
        if bad:
            raise BadInput(
                f"frame {k} has {bad} pixels that are not numbers",
                "crop them off in all frames, or leave the frame out; the limit is 0",
            )
        if (largest := float(np.abs(frame.astype(np.float64)).max())) > LARGEST:
            raise BadInput(f"frame {k}: a value of {largest:.3g}; the limit is {LARGEST:g}", "give it as recorded")


def _told_dose(pictures: Sequence[Picture]) -> float | None:
    """Fluence of a frame, where one of our own simulations says it."""
    try:
        dose = float(json.loads(str(pictures[0].metadata.get("made", "")))["fluence_e_per_A2_per_frame"])
    except (ValueError, KeyError, TypeError):
        return None
    return dose if math.isfinite(dose) and dose > 0 else None
