"""Regions of an image: particles, grain boundaries and domain walls, outlined and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

from . import order, views
from .ensemble import Ensemble
from .polar import Columns

if TYPE_CHECKING:
    from torch import Tensor

    from . import windows

Maps = NDArray[np.float32]
Labels = NDArray[np.int32]

SMOOTH_PX = 1.0
"""Probabilities are smoothed with a Gaussian of this width before they are outlined."""
OUTLINE = 0.5
"""A region's outline, in probability."""
CARRIED_PX = 24
"""How far a line that the frame cuts is carried on before its middle is looked for: more than its width."""


@dataclass(frozen=True)
class Rules:
    """When a region of a class is reported: its largest smoothed probability and its least size (nm^2, or nm along
    a line)."""

    evidence: float
    least_size: float
    line: bool


RULES: Mapping[str, Rules] = {
    "particle": Rules(0.8, 0.5, line=False),
    "boundary": Rules(0.8, 1.0, line=True),
    "wall": Rules(0.8, 1.0, line=True),
}


@dataclass(frozen=True)
class Region:
    """One region. ``label``: its number within its class, from 1. Positions are px of the given image, the centre of
    pixel [0, 0] at (0.5, 0.5)."""

    kind: str
    label: int
    x_px: float
    y_px: float
    area_nm2: float
    length_nm: float | None
    """Length of a boundary or wall along its middle line; None for a particle."""
    confidence: float
    """Mean probability inside."""
    at_rim: bool
    """Cut by the frame: it is larger than this."""


@dataclass(frozen=True)
class ClassMap:
    """One class on the grid of its view, which covers the image: ``probability`` and ``labels`` [h, w] (0: none)."""

    probability: Maps
    labels: Labels


@dataclass(frozen=True)
class Regions:
    """What was found in an image of ``shape`` (rows, columns): by class the maps, and all regions.

    ``not_judged``: class -> why the image does not show it. A class that was judged and is absent has no regions.
    """

    shape: tuple[int, int]
    pixel_size_nm: tuple[float, float]
    maps: Mapping[str, ClassMap]
    regions: tuple[Region, ...]
    not_judged: Mapping[str, str]

    def probability(self, kind: str) -> Maps:
        """Probability [rows, cols] of a judged class at the image's sampling (linear interpolation)."""
        import torch

        grid = torch.from_numpy(self.maps[kind].probability)[None, None]
        return np.asarray(torch.nn.functional.interpolate(grid, self.shape, mode="bilinear", antialias=True)[0, 0])

    def labels(self, kind: str) -> Labels:
        """Labels [rows, cols] of a judged class at the image's sampling; 0 outside its regions."""
        labels = self.maps[kind].labels
        rows, cols = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(self.shape, labels.shape, strict=True))
        return np.asarray(labels[rows[:, None], cols])

    def table(self) -> list[dict[str, Any]]:
        """One row a region, ready for JSON."""
        return [
            {
                "class": r.kind,
                "label": r.label,
                "x_px": round(r.x_px, 2),
                "y_px": round(r.y_px, 2),
                "area_nm2": round(r.area_nm2, 3),
                "length_nm": None if r.length_nm is None else round(r.length_nm, 2),
                "confidence": round(r.confidence, 3),
                "at_rim": r.at_rim,
            }
            for r in self.regions
        ]


class RegionFinder:
    """Outlines particles, grain boundaries and domain walls in HAADF-like images of any gain and offset."""

    def __init__(self, weights: Path | None = None, device: str = "cpu") -> None:
        """``weights``: a safetensors file as ``train_regions`` writes; None: the shipped ones. Raises BadInput when
        the file cannot be read."""
        self._networks = Ensemble("regions", weights, device)
        self._device = device

    @property
    def version(self) -> str:
        """Hash of the weights."""
        return self._networks.version

    def find(
        self, image: NDArray[np.generic], pixel_size_nm: tuple[float, float], columns: Columns | None = None
    ) -> Regions:
        """Regions of ``image`` [rows, cols] with pixels ``pixel_size_nm`` (x, y).

        ``columns``: the atoms found in it, from which domain walls are read. A class that cannot be judged (no columns,
        image too coarse or too small) is named with the reason. Deterministic. Raises BadInput for an image that is not
        2-D and finite, and for one in which no class can be judged.
        """
        data = views.checked(image, pixel_size_nm)
        reasons = {kind: views.why_not(data.shape, pixel_size_nm, scale) for kind, scale in views.CLASSES.items()}
        if all(reasons.values()):
            raise BadInput("; ".join(sorted(set(reasons.values()))), "scan a larger window with finer pixels")
        maps: dict[str, ClassMap] = {}
        regions: list[Region] = []
        for kind, scale in views.CLASSES.items():
            if not reasons[kind] and scale == "columns":
                seen, reasons[kind] = _views_of_columns(columns, data.shape, pixel_size_nm)
            elif not reasons[kind]:
                seen = [views.view(data, pixel_size_nm, scale)]
            if not reasons[kind]:
                maps[kind], found = self.outlined(kind, seen, pixel_size_nm)
                regions += found
        return Regions(data.shape, pixel_size_nm, maps, tuple(regions), {k: why for k, why in reasons.items() if why})

    def outlined(
        self, kind: str, seen: Sequence[views.View], pixel_size_nm: tuple[float, float]
    ) -> tuple[ClassMap, list[Region]]:
        """The regions of a class in the views that show it, of an image with pixels ``pixel_size_nm``."""
        heat = np.max([self.probability(kind, one.image) for one in seen], axis=0)
        pixel = seen[0].pixel_yx_nm
        told = partial(order.between_lattices, seen[0].image, pixel) if views.CLASSES[kind] == "lattice" else None
        return outline(heat, pixel, kind, pixel_size_nm, told)

    def probability(self, kind: str, image: Maps) -> Maps:
        """Mean probability [h, w] of a class, of the ensemble, in a view [h, w] of the kind that shows this class."""
        from . import windows

        channel = list(views.CLASSES).index(kind)
        total = np.zeros(image.shape, dtype=np.float32)
        for net in self._networks.members:
            total += windows.heat(_OneChannel(cast(windows.Net, net), channel), image, self._device)[0]
        return np.asarray(total / np.float32(len(self._networks.members)))


class _OneChannel:
    """A network of which one channel is wanted: the maps of the others would fill the memory."""

    def __init__(self, net: windows.Net, channel: int) -> None:
        self.net, self.channel = net, channel
        self.multiple, self.reach_px = net.multiple, net.reach_px

    def __call__(self, x: Tensor) -> Tensor:
        """[n, 1, h, w] -> logits [n, 1, h, w]."""
        return self.net(x)[:, self.channel : self.channel + 1]


def _views_of_columns(
    columns: Columns | None, shape: tuple[int, ...], pixel_size_nm: tuple[float, float]
) -> tuple[list[views.View], str]:
    """The views of found columns, or why there are none."""
    if columns is None:
        return [], "it is read from columns: find the atoms first"
    xy_nm = np.stack([columns.x_px, columns.y_px], axis=1) * pixel_size_nm
    size_nm = (shape[1] * pixel_size_nm[0], shape[0] * pixel_size_nm[1])
    seen = views.of_columns(xy_nm, columns.intensity, size_nm)
    return seen, "" if seen else "too few columns have the four neighbours that a perovskite has along [001]"


def outline(
    probability: Maps,
    pixel_yx_nm: tuple[float, float],
    kind: str,
    image_pixel_nm: tuple[float, float],
    told: Callable[[NDArray[np.bool_], tuple[int, int]], bool] | None = None,
) -> tuple[ClassMap, list[Region]]:
    """The regions of one class: connected where the smoothed probability is large, kept by RULES and, where given, by
    what the image ``told`` of the region's mask, whose first pixel is at a place in the view."""
    from scipy.ndimage import find_objects, gaussian_filter, label

    rules = RULES[kind]
    smooth = gaussian_filter(probability, SMOOTH_PX, mode="nearest")
    pieces, _ = label(smooth > OUTLINE, np.ones((3, 3)))
    labels = np.zeros(pieces.shape, dtype=np.int32)
    regions: list[Region] = []
    for number, box in enumerate(find_objects(pieces), start=1):
        inside = pieces[box] == number
        area = float(inside.sum()) * pixel_yx_nm[0] * pixel_yx_nm[1]
        if smooth[box][inside].max() < rules.evidence:
            continue
        ends = [(s.start == 0, s.stop == n) for s, n in zip(box, pieces.shape, strict=True)]
        length = middle_line_nm(inside, ends, pixel_yx_nm) if rules.line else None
        if (area if length is None else length) < rules.least_size:
            continue
        if told and not told(inside, (box[0].start, box[1].start)):
            continue
        labels[box][inside] = len(regions) + 1
        rows, cols = np.nonzero(inside)
        y, x = ((at.mean() + s.start + 0.5) * p for at, s, p in zip((rows, cols), box, pixel_yx_nm, strict=True))
        regions.append(
            Region(
                kind,
                len(regions) + 1,
                float(x / image_pixel_nm[0]),
                float(y / image_pixel_nm[1]),
                area,
                length,
                float(probability[box][inside].mean()),
                any(any(pair) for pair in ends),
            )
        )
    return ClassMap(probability, labels), regions


def middle_line_nm(inside: NDArray[np.bool_], ends: list[tuple[bool, bool]], pixel_yx_nm: tuple[float, float]) -> float:
    """Length of the middle line (skeleton) of a mask, nm, all branches together.

    Where the frame cuts the mask (``ends``: first and last row, first and last column) it is carried on beyond, so that
    the line reaches the rim. Each of the line's steps counts what it covers on average of a straight line that it
    follows: 0.948 pixels along the axes, 1.343 on a diagonal (D. Proffitt and D. Rosen, Comput. Graph. Image Process.
    10, 318 (1979)).
    """
    from skimage.morphology import skeletonize

    pad = [tuple(CARRIED_PX if end else 1 for end in pair) for pair in ends]
    carried = np.pad(inside, [(CARRIED_PX * a, CARRIED_PX * b) for a, b in ends], mode="edge")
    carried = np.pad(carried, [(0 if a else 1, 0 if b else 1) for a, b in ends])
    middle = skeletonize(carried)  # type: ignore[no-untyped-call]
    line = middle[tuple(slice(a, n - b) for (a, b), n in zip(pad, carried.shape, strict=True))]
    straight = (line[1:] & line[:-1]).sum() + (line[:, 1:] & line[:, :-1]).sum()
    # a diagonal step counts only where no corner joins its two pixels
    down = line[1:, 1:] & line[:-1, :-1] & ~(line[1:, :-1] | line[:-1, 1:])
    up = line[1:, :-1] & line[:-1, 1:] & ~(line[1:, 1:] | line[:-1, :-1])
    pixel = float(np.sqrt(pixel_yx_nm[0] * pixel_yx_nm[1]))
    return pixel * (0.948 * float(straight) + 1.343 * float(down.sum() + up.sum()))
