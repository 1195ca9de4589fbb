"""Pictures of a judged series: frames above their maps, and score against dose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.canvas import coarse, draw_png, grey_limits, new_figure, scale_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from aecontrol.judged import Judged
    from aecontrol.perception.damage.reading import DamageReading

Floats = NDArray[np.float64]

SHOWN = 6
"""Frames in the picture, evenly taken from the series, the first and the last among them."""
WHOLE_PX = 512
PANEL_IN = 3.0
ACCENT, INK, LAW = "#0072B2", "#22303C", "#E69F00"
FLAGGED = "#00E5FF"  # no colour of the maps


def draw_maps(judged: Judged, frames: Floats) -> bytes:
    """PNG of the registered ``frames`` [n, rows, cols] above their maps of dissimilarity to the first one, all on one
    scale; flagged patches are framed."""
    png = draw_png(lambda: _maps(judged, frames))
    assert isinstance(png, bytes)
    return png


def draw_curve(judged: Judged) -> bytes:
    """PNG of score against dose: mean over the patches, how they scatter, the null, and the fitted response."""
    png = draw_png(lambda: _curve(judged))
    assert isinstance(png, bytes)
    return png


def _maps(judged: Judged, frames: Floats) -> Figure:
    shown = np.unique(np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int))
    rows, cols = frames.shape[1:]
    figure = new_figure(PANEL_IN * len(shown) + 0.7, 2 * PANEL_IN * rows / cols + 0.7)
    axes = figure.subplots(2, len(shown), squeeze=False)
    low, high = grey_limits(coarse(frames[0], WHOLE_PX))
    per_px = judged.series.pixel_nm or 1.0
    extent = (0.0, cols * per_px, rows * per_px, 0.0)
    scores = np.concatenate([r.score[r.valid] for r in judged.readings]) if judged.readings else np.zeros(0)
    top = float(np.quantile(scores, 0.99)) if scores.size else 1.0
    top = max(top, *(3.0 * float(np.median(r.sd[r.valid])) for r in judged.readings if r.valid.any()), 1e-12)
    painted = None
    for column, k in enumerate(shown):
        above, below = axes[:, column]
        above.imshow(coarse(frames[k], WHOLE_PX), cmap="gray", vmin=low, vmax=high, extent=extent)
        above.set_title(f"frame {k}" + ("" if judged.series.dose is None else f", {_dose(judged, k)}"))
        for ax in (above, below):
            ax.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
        if k == 0:
            if judged.series.pixel_nm is not None:
                scale_bar(above)
            below.axis("off")
            below.text(
                0.5, 0.5, "all maps compare\nwith this frame", ha="center", va="center", transform=below.transAxes
            )
        else:
            painted = _map(below, judged.readings[k - 1], per_px, top) or painted
    if painted is not None:
        figure.colorbar(painted, ax=axes[1], shrink=0.9, label=_unit(judged))
    return figure


def _map(ax: Axes, reading: DamageReading, per_px: float, top: float) -> Any:
    """One map; None where there is nothing to show."""
    from aecontrol.perception.damage.reading import PATCH_PX

    if reading.reason:
        ax.text(0.5, 0.5, _wrapped(reading.reason), ha="center", va="center", fontsize=7, transform=ax.transAxes)
        return None
    side = PATCH_PX * per_px
    rows, cols = reading.score.shape
    painted = ax.imshow(
        np.where(reading.valid, reading.score, np.nan),
        cmap="magma",
        vmin=0.0,
        vmax=top,
        extent=(0.0, cols * side, rows * side, 0.0),
        interpolation="nearest",
    )
    ax.set_facecolor("#C8CED4")
    flagged = reading.flagged
    ax.set_title(f"score {reading.mean_score:.3g}, {flagged[reading.valid].mean():.0%} flagged", fontsize=9)
    if not flagged.all():
        _outline(ax, flagged, side)
    return painted


def _outline(ax: Axes, flagged: NDArray[np.bool_], side: float) -> None:
    """The border around flagged patches."""
    padded = np.pad(flagged, 1)
    for row, col in zip(*np.nonzero(padded[1:, :] != padded[:-1, :]), strict=True):
        ax.plot([(col - 1) * side, col * side], [row * side] * 2, color=FLAGGED, linewidth=1.2)
    for row, col in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True):
        ax.plot([col * side] * 2, [(row - 1) * side, row * side], color=FLAGGED, linewidth=1.2)


def _curve(judged: Judged) -> Figure:
    figure = new_figure(6.4, 4.2)
    ax = figure.subplots()
    known = judged.series.dose is not None
    at = judged.fluence[1:] - judged.fluence[0]
    valid = [k for k, reading in enumerate(judged.readings) if reading.valid.any()]
    if judged.response is not None:
        _law(ax, judged, float(at[-1]))
    for k in valid:
        reading = judged.readings[k]
        low, high = np.quantile(reading.score[reading.valid], (0.05, 0.95))
        ax.plot([at[k]] * 2, [low, high], color=ACCENT, linewidth=5, alpha=0.25, solid_capstyle="butt")
    ax.plot([0.0, *at[valid]], [0.0, *(judged.readings[k].mean_score for k in valid)], "o", color=ACCENT)
    if valid:
        width = max(float(np.median(judged.readings[k].sd[judged.readings[k].valid])) for k in valid)
        ax.axhspan(-width, width, color="#8A96A3", alpha=0.2, linewidth=0)
        ax.annotate(
            "one undamaged patch, ± s.d.",
            (0.99, width),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
        )
    if not known:
        ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.axhline(0.0, color=INK, linewidth=0.6)
    ax.set(
        xlabel="fluence between the middles of the two frames (e/Å²)" if known else "frames after the first",
        ylabel=_unit(judged),
        title=f"{judged.series.name}: mean, and 5 to 95 % of the patches",
    )
    return figure


def _law(ax: Axes, judged: Judged, end: float) -> None:
    """The posterior of the dose response: 90 % band and median."""
    assert judged.response is not None
    response, start = judged.response, judged.fluence[0]
    x = np.linspace(0.0, end, 60)
    critical = np.array(response.critical_fluence_e_per_A2[0])[:, None]
    gain = np.array(response.amplitude)[:, None]
    k = response.exponent
    drawn = gain * (np.exp(-((start / critical) ** k)) - np.exp(-(((start + x) / critical) ** k)))
    low, middle, high = np.quantile(drawn, (0.05, 0.5, 0.95), axis=0)
    ax.fill_between(x, low, high, color=LAW, alpha=0.3, linewidth=0, label="fitted response, 90 %")
    ax.plot(x, middle, color=LAW)
    ax.legend(loc="upper left", frameon=False)


def _unit(judged: Judged) -> str:
    metric = judged.readings[0].metric if judged.readings else ""
    return "damaged fraction as estimated (learned)" if metric == "learned" else f"{metric}, excess over the null"


def _dose(judged: Judged, k: int) -> str:
    return f"{judged.fluence[k]:.0f} e/Å² at its middle"


def _wrapped(text: str) -> str:
    from textwrap import fill

    return fill(text, 28)
