"""`aecontrol find --what regions`: particles, grain boundaries and domain walls as a table, masks and a picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.canvas import draw_png
from aecontrol.errors import BadInput
from aecontrol.image_sets import Progress

if TYPE_CHECKING:
    from aecontrol.find_request import Request, Scale
    from aecontrol.perception.finder import Found
    from aecontrol.perception.regions import Regions

Pixels = NDArray[np.generic]
COLUMNS = ("class", "label", "x", "y", "area_nm2", "length_nm", "confidence", "at_rim")


def find_regions(
    image: Pixels, scale: Scale, request: Request, device: str, progress: Progress
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What `--json` prints of the regions of ``image`` [rows, cols], and the files beside the table: the picture, and
    the masks as labels (int32, 0: none) of every judged class at the image's sampling.

    Raises BadInput for an estimated scale: it rests on atoms, and areas and lengths are in nm.
    """
    from aecontrol.perception.mend import mend_pixels
    from aecontrol.perception.regions import RegionFinder
    from aecontrol.region_figure import draw_regions

    if scale.source == "estimated":
        raise BadInput("the file does not say how large its pixels are; regions are in nm", "give --pixel-size-nm")
    image, bad = mend_pixels(image, scale.pixel_nm)
    pixel = (scale.pixel_nm, scale.pixel_nm)
    finder = RegionFinder(request.weights, device)
    columns = _columns(image, scale, request, device, progress)
    found = finder.find(image, pixel, columns)
    picture = draw_png(lambda: draw_regions(image, found))
    assert isinstance(picture, bytes)
    return _result(found, image, bad, scale), {"masks.npz": _masks(found, scale), "overlay.png": picture}


def _columns(image: Pixels, scale: Scale, request: Request, device: str, progress: Progress) -> Found | None:
    """The atoms, where they can show domain walls."""
    from aecontrol.perception import views
    from aecontrol.perception.finder import AtomFinder

    pixel = (scale.pixel_nm, scale.pixel_nm)
    if not request.refine or views.why_not(image.shape, pixel, "columns"):
        return None
    return AtomFinder(None, device).find(image, pixel, request.threshold, progress=progress)


def _result(found: Regions, image: Pixels, bad: NDArray[np.bool_], scale: Scale) -> dict[str, Any]:
    nm = scale.pixel_nm
    rows = [dict(row, x=round(row.pop("x_px") * nm, 4), y=round(row.pop("y_px") * nm, 4)) for row in found.table()]
    said = [] if np.ptp(image) else [f"the image is {image.flat[0]} everywhere"]
    if bad.any():
        said.append(f"{bad.sum()} dead or hot pixels were replaced by the median of their neighbours")
    return {
        "pixel_size_nm": nm,
        "unit": "nm",
        "shape": list(found.shape),
        "scale": {"source": scale.source},
        "regions": [{name: row[name] for name in COLUMNS} for row in rows],
        "not_judged": dict(found.not_judged),
        "warnings": said,
    }


def _masks(found: Regions, scale: Scale) -> bytes:
    stream = io.BytesIO()
    labels: dict[str, Any] = {kind: found.labels(kind) for kind in found.maps}
    np.savez_compressed(stream, pixel_size_nm=np.float64(scale.pixel_nm), **labels)
    return stream.getvalue()


def region_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """A result for people: (what, how much)."""
    from aecontrol.region_figure import NAMES

    lines = []
    for kind, (_, name) in NAMES.items():
        rows = [row for row in result["regions"] if row["class"] == kind]
        said = str(len(rows))
        if kind in result["not_judged"]:
            said = f"not judged: {result['not_judged'][kind]}"
        elif rows and kind == "particle":
            said += f", median area {np.median([row['area_nm2'] for row in rows]):.3g} nm2"
        elif rows:
            said += f", {sum(row['length_nm'] for row in rows):.3g} nm in all"
        lines.append((name, said))
    lines.append(("pixel size", f"{result['pixel_size_nm']:.5g} nm ({result['scale']['source']})"))
    lines += [("note", said) for said in result["warnings"]]
    return [*lines, ("seconds", f"{result['seconds']:.3g}")]
