"""Images with their ground truth, and how they are written: npz, or .hspy through RosettaSciIO (extra ``files``)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aecontrol import __version__
from aecontrol.errors import BadInput, StorageFault

Arrays = Mapping[str, NDArray[np.generic]]
SUFFIXES = (".npz", ".hspy")


@dataclass(frozen=True)
class ImageSet:
    """Images of one place (or of many, for training) and what is really there.

    ``channels`` name -> [rows, cols] or [frames, rows, cols]; ``pixel_size_nm`` (x, y); ``arrays``: everything else
    under the names that the file will have (``noiseless_*``, ``labels_*``, ``atoms_*``, ...); ``metadata``: how it was
    made, as JSON; ``stack`` names the first axis of a stack.
    """

    channels: Arrays
    pixel_size_nm: tuple[float, float]
    arrays: Arrays = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stack: str = "frame"


Progress = Callable[[int, int], None]
"""Told how far a long task is: parts done, parts in all."""


class Simulation(Protocol):
    """What the configuration of a simulation must offer."""

    def produce(self, device: str, workers: int, progress: Progress) -> Iterator[ImageSet]:
        """The image sets, one by one. Deterministic. Raises BadInput before anything is rendered."""


def check_target(path: Path) -> None:
    """Raises BadInput when ``path`` cannot be written as an image set."""
    if path.suffix not in SUFFIXES:
        raise BadInput(f"--out {str(path)!r}: the ending is none of {', '.join(SUFFIXES)}", "name a .npz or .hspy file")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"--out: the folder {str(path.absolute().parent)!r} does not exist", "create it first")
    if path.suffix == ".hspy":
        _writer()


def write_image_set(path: Path, images: ImageSet) -> None:
    """Write ``images`` to ``path`` (npz or hspy); a file of that name appears only when it is complete. Raises
    StorageFault when the disk is full or refuses."""
    check_target(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        (_write_hspy if path.suffix == ".hspy" else _write_npz)(partial, images)
        os.replace(partial, path)
    except OSError as error:
        raise StorageFault(f"{path} cannot be written: {error}", "free some space or choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_npz(path: Path, images: ImageSet) -> None:
    arrays: dict[str, Any] = dict(images.channels)
    arrays |= images.arrays
    arrays["pixel_size_nm"] = np.array(images.pixel_size_nm)
    arrays["metadata"] = np.array(json.dumps(images.metadata))
    np.savez_compressed(path, **arrays)


def _write_hspy(path: Path, images: ImageSet) -> None:
    """One signal [channel, frame, y, x] with calibrated axes; truth and settings in its original metadata."""
    data = np.stack([np.asarray(image) for image in images.channels.values()])
    rows, cols = data.shape[-2:]
    known = all(np.isfinite(images.pixel_size_nm))  # the frames of a training set have pixels of their own
    (x, y), units = (images.pixel_size_nm, "nm") if known else ((1.0, 1.0), "px")
    axes = [
        {"size": rows, "name": "y", "units": units, "scale": y, "offset": y / 2, "navigate": False},
        {"size": cols, "name": "x", "units": units, "scale": x, "offset": x / 2, "navigate": False},
    ]
    if data.ndim == 4:
        axes.insert(0, {"size": data.shape[1], "name": images.stack, "units": "", "scale": 1.0, "offset": 0.0})
    axes.insert(0, {"size": data.shape[0], "name": "channel", "units": "", "scale": 1.0, "offset": 0.0})
    for index, axis in enumerate(axes):
        axis |= {"index_in_array": index, "navigate": index < len(axes) - 2, "_type": "UniformDataAxis"}
        axis.setdefault("is_binned", False)
    signal = {
        "data": data,
        "axes": axes,
        "metadata": {
            "General": {"title": str(images.metadata.get("title", path.stem))},
            "Signal": {"signal_type": "", "quantity": "signal ()"},
            "_HyperSpy": {},
        },
        "original_metadata": {
            "aecontrol": {
                "channels": ", ".join(images.channels),
                "settings": json.dumps(images.metadata),
                **{name: _storable(array) for name, array in images.arrays.items()},
            }
        },
        "learning_results": {},
        "models": {},
        "package_info": {"package": "aecontrol", "package_version": __version__},
        "tmp_parameters": {},
        "attributes": {"_lazy": False, "ragged": False},
    }
    _writer()(str(path), signal)


def _storable(array: NDArray[np.generic]) -> Any:
    if array.ndim == 0:
        return array.item()
    return array.astype("S") if array.dtype.kind == "U" else array


def _writer() -> Any:
    try:
        from rsciio.hspy import file_writer
    except ImportError as error:
        raise BadInput(
            "writing .hspy needs RosettaSciIO, which is not installed",
            "write .npz, or pip install -c constraints.txt -e '.[files]'",
        ) from error
    return file_writer
