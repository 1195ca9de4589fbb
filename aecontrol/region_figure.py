"""The picture of found regions: the image with every region outlined and numbered, a scale bar and a legend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aecontrol.canvas import coarse, grey_limits, label, new_figure, scale_bar
from aecontrol.perception.regions import Regions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# of Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = {"particle": "#E69F00", "boundary": "#56B4E9", "wall": "#CC79A7"}
NAMES = {
    "particle": ("particle", "particles"),
    "boundary": ("grain boundary", "grain boundaries"),
    "wall": ("domain wall", "domain walls"),
}
"""Singular and plural."""
SHOWN_PX = 1200
"""Larger images are averaged down to about this."""
NUMBERED = 60
"""With more regions of a class than this, none bears its number."""


def draw_regions(image: NDArray[np.generic], found: Regions) -> Figure:
    """``image`` [rows, cols] with what was found in it; axes in nm. Classes that were not judged are named as such."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    shown = coarse(np.asarray(image, dtype=np.float64), SHOWN_PX)
    width, height = (n * p for n, p in zip(found.shape[::-1], found.pixel_size_nm, strict=True))
    wide = float(np.clip(7 * width / height, 4, 14))
    figure = new_figure(wide, wide * height / width + 0.6)
    ax = figure.add_subplot()
    low, high = grey_limits(shown)
    ax.imshow(shown, cmap="gray", vmin=low, vmax=high, extent=(0, width, height, 0))
    marks = []
    for kind, grids in found.maps.items():
        inside = grids.labels > 0
        rows, cols = inside.shape
        x, y = (np.arange(cols) + 0.5) * width / cols, (np.arange(rows) + 0.5) * height / rows
        regions = [r for r in found.regions if r.kind == kind]
        if regions:
            tint = np.zeros((rows, cols, 4))
            tint[inside] = to_rgba(COLOURS[kind], 0.25)
            ax.imshow(tint, extent=(0, width, height, 0), interpolation="nearest")
            if not inside.all():
                ax.contour(x, y, inside, [0.5], colors=[COLOURS[kind]], linewidths=1.2)
        for region in regions if len(regions) <= NUMBERED else ():
            at = (region.x_px * found.pixel_size_nm[0], region.y_px * found.pixel_size_nm[1])
            label(ax, at, str(region.label), 8)
        marks.append(Patch(color=COLOURS[kind], label=f"{len(regions)} {NAMES[kind][len(regions) != 1]}"))
    marks += [
        Patch(facecolor="none", edgecolor="grey", label=f"{NAMES[kind][1]}: not judged") for kind in found.not_judged
    ]
    ax.set(xlim=(0, width), ylim=(height, 0), xlabel="x / nm", ylabel="y / nm")
    scale_bar(ax, under=True)
    ax.legend(handles=marks, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure
