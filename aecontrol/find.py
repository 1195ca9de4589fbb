"""`aecontrol find`: the atoms of any microscopy image as a table, a picture and a judgement of both; or its regions."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.files import Picture, read_image
from aecontrol.find_request import Request, Scale
from aecontrol.image_sets import Progress

if TYPE_CHECKING:
    from aecontrol.perception.finder import Found
    from aecontrol.perception.sites import Missing, Sites

Pixels = NDArray[np.generic]

LARGEST = 1e15
"""Larger values are no detector's, and their squares leave single precision."""
LEAST_CONTRAST = 1e-6
"""Values that differ by less of their level than this are lost in single precision."""
STANDS_OUT = 3.0
"""Standard errors from which an atom's own intensity outweighs the judgement that its site is vacant."""
_LENGTHS = ("x", "y", "sigma_x", "sigma_y")
_ATOM = ("x", "y", "label", "grain", "confidence", "disagreement", "sigma_x", "sigma_y", "intensity")
_VACANCY = ("x", "y", "label", "confidence", "intensity", "expected")


def find(path: Path, request: Request, out: Path | None, device: str, progress: Progress) -> dict[str, Any]:
    """Find the atoms or regions of the image in ``path`` and write tables and picture to the folder ``out``.

    ``out`` None: a folder named after the file, in the working directory. Returns what `--json` prints; ``progress`` is
    told of the parts of the image that the network has read. Raises BadInput, StorageFault.
    """
    picture = read_image(path, request.channel, request.frame)
    plain = _plain(picture.array, path.name)
    scale = _scale(picture, plain, request.pixel_size_nm, path.name)
    folder = out or Path(_name(path, request))
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{str(folder)!r} is a file", "give another --out")
    started = time.perf_counter()
    if request.what == "regions":
        from aecontrol.find_regions import COLUMNS, find_regions

        result, written = find_regions(plain, scale, request, device, progress)
        result["seconds"] = round(time.perf_counter() - started, 4)
        written["regions.csv"] = _table(result["regions"], COLUMNS, result["unit"])
    else:
        from aecontrol.find_figure import draw_overlay

        image, result = find_atoms(plain, scale, request, device, progress)
        result["seconds"] = round(time.perf_counter() - started, 4)
        written = {
            "atoms.csv": _table(result["atoms"], _ATOM, result["unit"]),
            "vacancies.csv": _table(result["vacancies"], _VACANCY, result["unit"]),
            "overlay.png": draw_overlay(path.name, image, result),
        }
    facts = f"{request.what}.json"
    result["files"] = {name: str(folder / name) for name in (*written, facts)}
    _make(folder)
    for name, data in written.items():
        write_durable(folder / name, data)
    write_durable(folder / facts, (json.dumps(result, indent=1) + "\n").encode())
    return result


def find_atoms(
    image: Pixels, scale: Scale, request: Request, device: str, progress: Progress
) -> tuple[Pixels, dict[str, Any]]:
    """The image with its dead and hot pixels mended, and its atoms, vacancies and quality as `--json` prints them."""
    from aecontrol.perception.finder import AtomFinder
    from aecontrol.perception.mend import mend_pixels
    from aecontrol.perception.quality import assess
    from aecontrol.perception.sites import name_sites

    image, bad = mend_pixels(image, scale.pixel_nm)
    pixel = (scale.pixel_nm, scale.pixel_nm)
    found = AtomFinder(request.weights, device).find(image, pixel, request.threshold, request.refine, progress)
    sites = name_sites(found, image, pixel if scale.unit == "nm" else None) if request.refine else None
    if sites is not None:
        found, sites = _agreed(found, sites)
    labels = ["atom"] * len(found) if sites is None or not sites.grains else list(sites.label)
    quality = assess(found, labels, image, scale.pixel_nm, scale.unit_px, bad)
    return image, {
        "pixel_size_nm": scale.pixel_nm,
        "unit": scale.unit,
        "shape": list(image.shape),
        "scale": {"source": scale.source} | ({"how": scale.how} if scale.how else {}),
        "atoms": [_in_unit(atom, scale.unit_px) for atom in _atoms(found, labels, sites)],
        "vacancies": [_in_unit(vacancy, scale.unit_px) for vacancy in _vacancies(sites.missing if sites else None)],
        "crystal": _crystal(sites),
        "quality": quality.model_dump(mode="json"),
    }


def _agreed(found: Found, sites: Sites) -> tuple[Found, Sites]:
    """Both without contradiction: where a site is judged vacant and an atom was found on it, the atom stays if its own
    intensity stands out, else the vacancy."""
    missing = sites.missing
    empty = np.char.endswith(missing.label, " vacant") & (missing.atom >= 0)
    there = np.zeros(len(missing), dtype=bool)
    there[empty] = (found.intensity > STANDS_OUT * found.sigma_intensity)[missing.atom[empty]]
    keep = np.ones(len(found), dtype=bool)
    keep[missing.atom[empty & ~there]] = False
    row = np.append(np.cumsum(keep) - 1, -1)
    left = missing.where(~there)
    left = replace(left, atom=np.where(keep[left.atom] | (left.atom < 0), row[left.atom], -1))
    return found.where(keep), replace(sites, label=sites.label[keep], grain=sites.grain[keep], missing=left)


def _atoms(found: Found, labels: Sequence[str], sites: Sites | None) -> Iterator[dict[str, Any]]:
    """Rows of the table of atoms, positions in px."""
    grain = np.full(len(found), -1) if sites is None else sites.grain
    columns = (found.x_px, found.y_px, labels, grain, found.confidence, found.disagreement)
    fitted = (found.sigma_x, found.sigma_y, found.intensity)
    return (dict(zip(_ATOM, values, strict=True)) for values in zip(*columns, *fitted, strict=True))


def _vacancies(missing: Missing | None) -> Iterator[dict[str, Any]]:
    """Rows of the table of what is missing, positions in px."""
    if missing is None:
        return iter(())
    columns = (missing.x_px, missing.y_px, missing.label, missing.confidence, missing.intensity, missing.expected)
    return (dict(zip(_VACANCY, values, strict=True)) for values in zip(*columns, strict=True))


def _crystal(sites: Sites | None) -> dict[str, Any]:
    """Grains and sublattices, lengths in the unit of the positions."""
    if sites is None:
        return {"grains": [], "sublattices": [], "note": "sites are named from fitted positions: leave out --no-refine"}
    grains = [{**asdict(g), "vectors": g.vectors.tolist(), "basis": g.basis.tolist()} for g in sites.grains]
    sublattices = [_in_unit(asdict(s), 1.0) for s in sites.sublattices]
    return {"grains": grains, "sublattices": sublattices, "note": sites.note}


def _in_unit(row: dict[str, Any], per_px: float) -> dict[str, Any]:
    """A row of a table with its lengths in the unit of the positions, and None for what is not known."""

    def told(name: str, value: Any) -> Any:
        if isinstance(value, str | int | np.integer):
            return value if isinstance(value, str) else int(value)
        number = float(value) * (per_px if name in _LENGTHS else 1.0)
        return float(f"{number:.7g}") if math.isfinite(number) else None

    return {name: told(name, value) for name, value in row.items()}


def _scale(picture: Picture, image: Pixels, given: float | None, name: str) -> Scale:
    """The scale as given, else the file's, else estimated from the width of the atoms in ``image``."""
    from aecontrol.perception.scale import estimate

    if given is not None:
        return Scale(given, "given")
    if picture.pixel_size_nm is not None:
        return Scale(picture.pixel_size_nm, "file")
    finite = np.isfinite(image)
    try:
        middle = np.median(image[finite].astype(np.float64)) if finite.any() else 0.0
        estimated = estimate(np.where(finite, image, middle))
    except BadInput as error:
        raise BadInput(f"{name} does not say how large its pixels are; {error.what}", "give --pixel-size-nm") from error
    return Scale(estimated.pixel_size_nm, "estimated", estimated.how)


def _plain(image: Pixels, name: str) -> Pixels:
    """The image in a type that sums do not overflow in soon."""
    if image.dtype.kind == "b" or image.dtype == np.float16:
        image = image.astype(np.float32)
    if (largest := float(np.nanmax(np.abs(image[np.isfinite(image)].astype(np.float64))))) > LARGEST:
        raise BadInput(f"{name}: a value of {largest:.3g}; the limit is {LARGEST:g}", "give the image as recorded")
    spread = float(np.ptp(image[np.isfinite(image)].astype(np.float64)))
    if 0 < spread < LEAST_CONTRAST * largest:
        what = f"{name}: the values differ by {spread:.3g} on a level of {largest:.3g}"
        raise BadInput(f"{what}; the limit is a part in {1 / LEAST_CONTRAST:.0e}", "subtract the level")
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
    if "regions" in result:
        from aecontrol.find_regions import region_lines

        return region_lines(result)
    quality, unit = result["quality"], result["unit"]
    lines = [("atoms", str(quality["atoms"]))]
    labels = [atom["label"] for atom in result["atoms"]]
    for label in sorted(set(labels)) if len(set(labels)) > 1 else ():
        lines.append((f"  {label}", str(labels.count(label))))
    lines.append(("missing atoms", str(len(result["vacancies"]))))
    lines += [(f"  {v}", str(n)) for v, n in Counter(row["label"] for row in result["vacancies"]).most_common()]
    lines.append(("pixel size", f"{result['pixel_size_nm']:.5g} nm ({result['scale']['source']})"))
    lines += [("", result["scale"]["how"])] if "how" in result["scale"] else []
    lines += _crystal_lines(result["crystal"], unit)
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


def _crystal_lines(crystal: dict[str, Any], unit: str) -> list[tuple[str, str]]:
    """Grains and sublattices for people."""
    lines = []
    for grain in crystal["grains"][:4]:
        lengths = " and ".join(f"{math.hypot(*vector):.4g}" for vector in grain["vectors"])
        lines.append(
            ("crystal", f"cell {lengths} {unit}, {len(grain['basis'])} columns a cell, {grain['count']} atoms")
        )
    if len(crystal["grains"]) > 4:
        lines.append(("", f"and {len(crystal['grains']) - 4} more grains"))
    for row in crystal["sublattices"]:
        off = f"{1000 * row['rms']:.2g} pm" if unit == "nm" else f"{row['rms']:.2g} px"
        lines.append((f"  {row['label']}", f"{off} rms from the lattice"))
    return [*lines, ("note", crystal["note"])] if crystal["note"] else lines
