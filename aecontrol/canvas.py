"""Small parts that every picture shares: axes in nm, images at their places, scale bars, grey levels."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.types import ScanRegion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
_LARGE_BYTES = 300_000
_STYLE: Any = {
    "figure.facecolor": "white",
    "figure.dpi": 130,
    "savefig.dpi": "figure",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#8A96A3",
    "axes.labelcolor": "#22303C",
    "text.color": "#22303C",
    "xtick.color": "#22303C",
    "ytick.color": "#22303C",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names and reasons are text, whatever they contain
    "legend.fontsize": 8,
    "legend.framealpha": 0.85,
}


def draw_png(draw: Callable[[], Figure | str]) -> bytes | str:
    """What ``draw`` draws as a PNG file in the report's style, or its sentence when there is nothing to draw. The same
    figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = draw()
        if isinstance(figure, str):
            return figure
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    return _compact(buffer.getvalue())


def _compact(png: bytes) -> bytes:
    """A large picture with a palette of 256 colours. Shot noise does not compress, and most of it is grey; the palette
    is spread over the colours that occur, so that rare ones (a ring, a line) keep theirs."""
    from PIL import Image

    if len(png) < _LARGE_BYTES:
        return png
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        palette = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure that needs no display and leaves no trace in matplotlib's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def scale_bar(ax: Axes, under: bool = False) -> None:
    """A scale bar on axes whose unit is nm; ``under`` the marks, it hides none of them."""
    from matplotlib_scalebar.scalebar import ScaleBar

    bar = ScaleBar(
        1.0, "nm", location="lower left", color="white", box_color="black", box_alpha=0.6, width_fraction=0.008
    )
    bar.set_zorder(0.9 if under else 6)
    ax.add_artist(bar)


def place_image(ax: Axes, region: ScanRegion, image: Floats, low: float, high: float, alpha: float = 1.0) -> None:
    """An image where its region lies, turned as it was scanned."""
    from matplotlib.transforms import Affine2D

    hx, hy = region.fov_nm[0] / 2, region.fov_nm[1] / 2
    turn = Affine2D().rotate(region.rotation_rad).translate(*region.center_nm)
    limits = ax.get_xlim(), ax.get_ylim()
    shown = ax.imshow(image, cmap="gray", vmin=low, vmax=high, extent=(-hx, hx, hy, -hy), alpha=alpha)
    shown.set_transform(turn + ax.transData)
    ax.set(xlim=limits[0], ylim=limits[1])


def grey_limits(image: Floats) -> tuple[float, float]:
    """Grey levels between which a noisy image is shown."""
    known = image[np.isfinite(image)]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, [1.0, 99.3])
    return float(low), float(high if high > low else low + 1.0)


def coarse(image: Floats, size: int) -> Floats:
    """The image averaged to about ``size`` pixels a side, for the mosaic."""
    step = max(1, math.ceil(max(image.shape) / size))
    rows, cols = (n // step for n in image.shape)
    if step == 1 or not rows or not cols:
        return image
    blocks: Floats = image[: rows * step, : cols * step].reshape(rows, step, cols, step).mean(axis=(1, 3))
    return blocks


def into_region(region: ScanRegion, xy: Floats) -> Floats:
    """Positions [n, 2] nm of the specimen frame in the region's own frame, from its first corner."""
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    d = np.asarray(xy, float).reshape(-1, 2) - region.center_nm
    half = np.array(region.fov_nm) / 2
    return np.stack([c * d[:, 0] + s * d[:, 1], c * d[:, 1] - s * d[:, 0]], axis=1) + half


def order_map() -> Any:
    """Plasma without its darkest end, which would vanish on a dark image."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["plasma"](np.linspace(0.3, 1.0, 256)))


def label(ax: Axes, xy: tuple[float, float], text: str, size: int) -> None:
    """A number that stays readable on any image."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="black")]
    ax.text(*xy, text, color="white", weight="bold", ha="center", va="center", fontsize=size, path_effects=halo)
