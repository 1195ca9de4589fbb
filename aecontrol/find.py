"""`aecontrol find`: the atoms of any microscopy image as a table, a picture and a judgement of both."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.files import Picture, read_image
from aecontrol.image_sets import Progress
from aecontrol.types import Model, Positive

if TYPE_CHECKING:
    from aecontrol.perception.finder import Found

Pixels = NDArray[np.generic]

LARGEST = 1e15
"""Larger values are no detector's, and their squares leave single precision."""
_LENGTHS = ("x", "y", "sigma_x", "sigma_y")


class Request(Model):
    """What is to be found, and where."""

    pixel_size_nm: Positive | None = Field(None, description="side of a pixel, nm; None: what the file says")
    channel: str | None = Field(None, description="which image of a file that holds several")
    frame: int | None = Field(None, description="which frame of a stack, from 0")
    threshold: float = Field(0.5, gt=0, le=1, description="least confidence of an atom")
    refine: bool = Field(True, description="fit positions and intensities, not only the network's centres")
    weights: Path | None = Field(None, description="safetensors file; None: the shipped ones")


@dataclass(frozen=True)
class Scale:
    """Side of a pixel, nm, and where it is from: 'given' or 'file'."""

    pixel_nm: float
    source: str


def find(path: Path, request: Request, out: Path | None, device: str, progress: Progress) -> dict[str, Any]:
    """Find the atoms of the image in ``path`` and write tables and picture to the folder ``out``.

    ``out`` None: a folder named after the file, in the working directory. Returns what `--json` prints; ``progress`` is
    told of the parts of the image that the network has read. Raises BadInput, StorageFault.
    """
    from aecontrol.find_figure import draw_overlay

    picture = read_image(path, request.channel, request.frame)
    scale = _scale(picture, request.pixel_size_nm, path.name)
    folder = out or Path(_name(path, request))
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{str(folder)!r} is a file", "give another --out")
    started = time.perf_counter()
    image, result = find_atoms(_plain(picture.array, path.name), scale, request, device, progress)
    result["seconds"] = round(time.perf_counter() - started, 4)
    written = {
        "atoms.csv": _table(result["atoms"], _COLUMNS, result["unit"]),
        "vacancies.csv": _table(result["vacancies"], _COLUMNS[:4], result["unit"]),
        "overlay.png": draw_overlay(path.name, image, result),
    }
    result["files"] = {name: str(folder / name) for name in (*written, "atoms.json")}
    _make(folder)
    for name, data in written.items():
        write_durable(folder / name, data)
    write_durable(folder / "atoms.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def find_atoms(
    image: Pixels, scale: Scale, request: Request, device: str, progress: Progress
) -> tuple[Pixels, dict[str, Any]]:
    """The image with its dead and hot pixels mended, and its atoms, vacancies and quality as `--json` prints them."""
    from aecontrol.perception.finder import AtomFinder
    from aecontrol.perception.mend import mend_pixels
    from aecontrol.perception.quality import assess

    image, bad = mend_pixels(image, scale.pixel_nm)
    pixel = (scale.pixel_nm, scale.pixel_nm)
    found = AtomFinder(request.weights, device).find(image, pixel, request.threshold, request.refine, progress)
    labels, vacancies = _named(found)
    quality = assess(found, labels, image, scale.pixel_nm, scale.pixel_nm, bad)
    columns = (found.x_px, found.y_px, labels, found.confidence, found.sigma_x, found.sigma_y, found.intensity)
    atoms = [dict(zip(_COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]
    return image, {
        "pixel_size_nm": scale.pixel_nm,
        "unit": "nm",
        "shape": list(image.shape),
        "scale": {"source": scale.source},
        "atoms": [_in_unit(atom, scale.pixel_nm) for atom in atoms],
        "vacancies": [_in_unit(vacancy, scale.pixel_nm) for vacancy in vacancies],
        "quality": quality.model_dump(mode="json"),
    }


_COLUMNS = ("x", "y", "label", "confidence", "sigma_x", "sigma_y", "intensity")


def _named(found: Found) -> tuple[list[str], list[dict[str, Any]]]:
    """A label for every atom, and the vacancies ({x, y, label, confidence}), positions in px."""
    return ["atom"] * len(found), []


def _in_unit(row: dict[str, Any], per_px: float) -> dict[str, Any]:
    """A row of a table with its lengths in the unit of the positions, and None for what is not known."""

    def told(name: str, value: Any) -> Any:
        if isinstance(value, str):
            return value
        number = float(value) * (per_px if name in _LENGTHS else 1.0)
        return float(f"{number:.7g}") if math.isfinite(number) else None

    return {name: told(name, value) for name, value in row.items()}


def _scale(picture: Picture, given: float | None, name: str) -> Scale:
    if given is not None:
        return Scale(given, "given")
    if picture.pixel_size_nm is None:
        raise BadInput(f"{name} does not say how large its (square) pixels are", "give --pixel-size-nm")
    return Scale(picture.pixel_size_nm, "file")


def _plain(image: Pixels, name: str) -> Pixels:
    """The image in a type that sums do not overflow in soon."""
    if image.dtype.kind == "b" or image.dtype == np.float16:
        image = image.astype(np.float32)
    if (largest := float(np.nanmax(np.abs(image[np.isfinite(image)].astype(np.float64))))) > LARGEST:
        raise BadInput(f"{name}: a value of {largest:.3g}; the limit is {LARGEST:g}", "give the image as recorded")
    return image


def _name(path: Path, request: Request) -> str:
    parts = [path.stem, request.channel, None if request.frame is None else f"frame{request.frame}", "find"]
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in "_".join(part for part in parts if part))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"the folder {str(folder)!r} cannot be made: {error}", "give another --out") from error


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[str], unit: str) -> bytes:
    """CSV with a unit in the name of every length; empty where nothing is known."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([f"{name}_{unit}" if name in _LENGTHS else name for name in columns])
    writer.writerows([row[name] for name in columns] for row in rows)
    return stream.getvalue().encode()


def summary_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The quality of a result for people: (what, how much)."""
    quality, unit = result["quality"], result["unit"]
    lines = [("atoms", str(quality["atoms"]))]
    labels = [atom["label"] for atom in result["atoms"]]
    for label in sorted(set(labels)) if len(set(labels)) > 1 else ():
        lines.append((f"  {label}", str(labels.count(label))))
    lines.append(("missing atoms", str(len(result["vacancies"]))))
    lines.append(("pixel size", f"{result['pixel_size_nm']:.5g} nm ({result['scale']['source']})"))
    for label, counts in (quality["counts_per_column"] or {}).items():
        lines.append((f"counts per column, {label}", f"{counts:.3g} ({quality['gain_basis']})"))
    if quality["precision"] is not None:
        pm = f"{1000 * quality['precision']:.2g} pm" if unit == "nm" else f"{quality['precision']:.2g} px"
        lines.append(("standard error of a position, median", pm))
    if (spacing := quality["spacing"]) is not None:
        ends = f"{spacing['low']:.4g} to {spacing['high']:.4g}"
        lines.append(("nearest neighbour", f"{spacing['median']:.4g} {unit} (5-95 %: {ends})"))
    for area in quality["areas"][:5]:
        place = f"{area['width']:.3g} x {area['height']:.3g} {unit} at ({area['x']:.3g}, {area['y']:.3g})"
        lines.append(("suspicious", f"{place}: {area['reason']}"))
    if len(quality["areas"]) > 5:
        lines.append(("", f"and {len(quality['areas']) - 5} more areas"))
    lines += [("note", said) for said in quality["warnings"]]
    return [*lines, ("seconds", f"{result['seconds']:.3g}")]
