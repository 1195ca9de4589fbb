"""The picture of found atoms: the whole image, and a part of it near enough to judge every mark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.canvas import coarse, draw_png, grey_limits, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Box = tuple[float, float, float, float]
"""(left, right, bottom, top) in the unit of the positions; y points down."""

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#0072B2")
"""Okabe and Ito's palette without its red, which marks what is missing."""
MISSING, SUSPICIOUS, PAPER = "#FF4B3E", "#FFFFFF", "#303030"
WHOLE_PX = 1100
"""Pixels a side to which a large image is averaged."""
NEAR_SPACINGS = 14.0
"""Side of the near view in nearest-neighbour distances."""
PANEL_IN = 6.6
SHORTEST_IN = 1.6


def draw_overlay(title: str, image: NDArray[np.generic], result: dict[str, Any]) -> bytes:
    """PNG of ``image`` [rows, cols] with the atoms of ``result`` (see :func:`aecontrol.find.find_atoms`) by label,
    vacancies as open circles, suspicious areas framed."""
    png = draw_png(lambda: _figure(title, image, result))
    assert isinstance(png, bytes)
    return png


def _figure(title: str, image: NDArray[np.generic], result: dict[str, Any]) -> Figure:
    per_px = result["pixel_size_nm"] if result["unit"] == "nm" else 1.0
    height, width = (n * per_px for n in image.shape)
    everything, box = (0.0, width, height, 0.0), _near_box(result, width, height)
    stacked = width > 2 * height  # a flat image goes above its part, not beside it
    across_in = PANEL_IN * (2 if stacked else 1)
    down_in = float(np.clip(across_in * height / width, SHORTEST_IN, 2 * PANEL_IN))
    near_in = 0.7 * PANEL_IN if stacked else min(PANEL_IN, down_in)
    figure = new_figure(2 * PANEL_IN, down_in + 0.4 + (near_in + 0.3 if stacked else 0.0))
    if stacked:
        whole, near = figure.subplots(2, 1, gridspec_kw={"height_ratios": (down_in, near_in)})
    else:
        whole, near = figure.subplots(1, 2)
    labels = sorted({atom["label"] for atom in result["atoms"]})
    colours = {label: COLOURS[k % len(COLOURS)] for k, label in enumerate(labels)}
    pixels = np.asarray(image, dtype=np.float64)
    _show(whole, coarse(pixels, WHOLE_PX), everything, result["unit"])
    _mark(whole, result, colours, everything, _step(result, everything, (across_in, down_in)), near=False)
    _frames(whole, result, box)
    left, right, bottom, top = (round(edge / per_px) for edge in box)
    box = (left * per_px, right * per_px, bottom * per_px, top * per_px)
    _show(near, pixels[top:bottom, left:right], box, result["unit"])
    _mark(near, result, colours, box, _step(result, box, (across_in, near_in)), near=True)
    missing = len(result["vacancies"])
    whole.set_title(f"{title}: {len(result['atoms'])} atoms" + (f", {missing} missing" if missing else ""))
    near.set_title("the framed part")
    for ax in (whole, near):
        if ax.get_legend_handles_labels()[0]:  # below the image, where it hides no atom
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, facecolor=PAPER, labelcolor="white")
    return figure


def _step(result: dict[str, Any], box: Box, size_in: tuple[float, float]) -> float:
    """How far apart neighbouring atoms of ``box`` are on paper, 1/72 inch."""
    spacing = result["quality"]["spacing"]
    shown = min(size_in[0] / (box[1] - box[0]), size_in[1] / (box[2] - box[3]))
    return 72.0 * shown * (spacing["median"] if spacing else 0.1 * (box[1] - box[0]))


def _near_box(result: dict[str, Any], width: float, height: float) -> Box:
    """The part shown near: where most is missing, else where most atoms are, the middle deciding between equals."""
    spacing = result["quality"]["spacing"]
    side = min(NEAR_SPACINGS * spacing["median"] if spacing else np.inf, max(width, height) / 2)
    w, h = min(side, width), min(side, height)
    marks = _places(result["vacancies"] or result["atoms"])
    at = middle = np.array([width, height]) / 2
    if len(marks):
        cells, cell, count = np.unique(marks // [w, h], axis=0, return_inverse=True, return_counts=True)
        distance = np.hypot(*((cells + 0.5) * [w, h] - middle).T)
        best = np.lexsort((distance, -np.round(count / count.max(), 1)))[0]
        at = marks[cell.ravel() == best].mean(0)
    x, y = np.clip(at, (w / 2, h / 2), (width - w / 2, height - h / 2))
    return x - w / 2, x + w / 2, y + h / 2, y - h / 2


def _places(rows: list[dict[str, Any]]) -> Floats:
    return np.array([(row["x"], row["y"]) for row in rows], dtype=np.float64).reshape(-1, 2)


def _show(ax: Axes, pixels: Floats, box: Box, unit: str) -> None:
    from matplotlib_scalebar.scalebar import ScaleBar

    low, high = grey_limits(pixels)
    ax.imshow(pixels, cmap="gray", vmin=low, vmax=high, extent=box, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    kind: dict[str, Any] = {"dimension": "pixel-length"} if unit == "px" else {}
    bar = ScaleBar(1.0, unit, location="lower left", color="white", box_color="black", box_alpha=0.6, **kind)
    bar.set_zorder(0.9)  # under the marks, it hides none of them
    ax.add_artist(bar)


def _mark(ax: Axes, result: dict[str, Any], colours: dict[str, str], box: Box, step: float, near: bool) -> None:
    """Atoms as dots (from afar) or rings with a point (near), as large as ``step``, their distance on paper, allows."""
    for label, colour in colours.items():
        x, y = _inside([atom for atom in result["atoms"] if atom["label"] == label], box)
        if len(x) == 0:
            continue
        if near:
            ax.scatter(
                x,
                y,
                s=float(np.clip(0.45 * step, 3.0, 14.0)) ** 2,
                facecolors="none",
                edgecolors=colour,
                label=f"{label} ({len(x)})",
            )
            ax.scatter(x, y, s=4.0, color=colour, linewidths=0)
        else:
            ax.scatter(x, y, s=float(np.clip(0.3 * step, 0.7, 4.0)) ** 2, color=colour, linewidths=0)
    x, y = _inside(result["vacancies"], box)
    if len(x):
        size = float(np.clip(0.8 * step, 4.0, 16.0)) ** 2
        ax.scatter(x, y, s=size, facecolors="none", edgecolors=MISSING, linewidths=1.3, label=f"missing ({len(x)})")


def _inside(rows: list[dict[str, Any]], box: Box) -> Floats:
    """Positions [2, n] (x, y) of the rows that lie in ``box``."""
    x, y = _places(rows).T
    inside = (x >= box[0]) & (x <= box[1]) & (y >= box[3]) & (y <= box[2])
    return np.stack([x[inside], y[inside]])


def _frames(ax: Axes, result: dict[str, Any], box: Box) -> None:
    from matplotlib.patches import Rectangle

    near = (box[0], box[3], box[1] - box[0], box[2] - box[3])
    ax.add_patch(Rectangle(near[:2], *near[2:], fill=False, edgecolor="white", linewidth=1.5))
    for number, area in enumerate(result["quality"]["areas"]):
        dotted: dict[str, Any] = {"fill": False, "edgecolor": SUSPICIOUS, "linewidth": 1.0, "linestyle": ":"}
        label = None if number else "suspicious (why: atoms.json)"
        ax.add_patch(Rectangle((area["x"], area["y"]), area["width"], area["height"], label=label, **dotted))
