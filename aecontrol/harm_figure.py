"""Pictures and words for what a session learned of damage: the response of the specimen, and where it was harmed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from aecontrol.canvas import label, new_figure, scale_bar
from aecontrol.figures import ACCENT, MUTED, Record
from aecontrol.forecast import MARGIN
from aecontrol.harm import Harm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASES = (ACCENT, "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def draw_harm(record: Record) -> Figure | str:
    """Left what the metric showed against fluence, with the response that was fitted to it; right the share of the
    matter that is expected to be damaged, tile by tile, with areas and sacrificed places."""
    harm = record.state.harm
    if harm is None:
        return "Damage was not measured."
    figure = new_figure(11.0, 4.4)
    left, right = figure.subplots(1, 2)
    _draw_response(left, record, harm)
    _draw_map(right, record, harm)
    return figure


def _draw_response(ax: Axes, record: Record, harm: Harm) -> None:
    response = harm.response
    points = [(*harm.middle(event, record.state.keys), event.mean, event.sd) for event in harm.usable]
    reach = max([1.2 * later for _, _, later, _, _ in points] or [3.0 * harm.plan.critical_fluence_e_per_A2])
    fluence = np.linspace(0.0, reach, 120)
    for k, name in enumerate(response.phases):
        colour, phase = _PHASES[k % len(_PHASES)], np.full(len(fluence), k)
        low, middle, high = np.quantile(
            response.score(phase, np.zeros_like(fluence), fluence), (0.05, 0.5, 0.95), axis=0
        )
        if response.method != "prior":
            ax.fill_between(fluence, low, high, color=colour, alpha=0.18, lw=0)
            ax.plot(fluence, middle, color=colour, lw=1.5, label=f"{name}: median and 90 % of the posterior")
        mine = [point for point in points if point[0] == k]
        if mine:
            _, first, later, mean, sd = np.array(mine).T
            # a comparison starts at the first frame, which was itself not undamaged
            missed = [float(np.median(response.score(np.array([k]), np.zeros(1), np.array([f])))) for f in first]
            ax.errorbar(later, mean + missed, yerr=sd, fmt="o", ms=4, color=colour, label=f"{name}: measured")
    ax.axhline(0.0, color=MUTED, lw=0.8)
    ax.set(xlabel="fluence, e/Å²", ylabel="damage shown by the metric", title="response to the beam", xlim=(0.0, reach))
    if points or response.method != "prior":
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)  # hides no point


def _draw_map(ax: Axes, record: Record, harm: Harm) -> None:
    from matplotlib.patches import Rectangle

    rows, cols = harm.ground.shape
    share = harm.response.damaged(harm.ground.phase, harm.fluence).mean(axis=0).reshape(rows, cols)
    shown = ax.imshow(
        share,
        cmap="viridis",
        vmin=0.0,
        vmax=max(float(share.max()), 1e-3),
        interpolation="nearest",
        extent=(-MARGIN, cols - MARGIN, rows - MARGIN, -MARGIN),
    )
    wide, high = record.field_nm
    ax.set(xlim=(0, wide), ylim=(high, 0), xticks=[], yticks=[], title="expected share of the matter damaged")
    for spine in ax.spines.values():
        spine.set_visible(False)
    for area in harm.areas:
        (x, y), (w, h) = area.center_nm, area.fov_nm
        ax.add_patch(Rectangle((x - w / 2, y - h / 2), w, h, fill=False, ec="white", lw=1.2))
        label(ax, (x, y), area.name, 7)
    for k, place in enumerate(harm.plan.references):
        (x, y), (w, h) = place.center_nm, harm.plan.fov_nm
        name = "sacrificed places" if k == 0 else None
        ax.add_patch(Rectangle((x - w / 2, y - h / 2), w, h, fill=False, ec="#E69F00", lw=1.5, label=name))
    if harm.plan.references:
        ax.legend(loc="lower right")
    if ax.figure is not None:
        ax.figure.colorbar(shown, ax=ax, shrink=0.85, label="forecast; 1: all of it")
    scale_bar(ax)


def harm_caption(record: Record) -> str:
    """What the pictures say, in a few sentences."""
    harm = record.state.harm
    assert harm is not None
    limit = record.state.plan.budget.damage
    of = "" if limit is None else f" of {limit:.4g}"
    text = f"{harm.total.damage:.4g}{of} nm² of wholly damaged specimen charged, basis {harm.total.basis}. "
    text += f"{len(harm.usable)} comparisons of frames with the metric {harm.plan.metric!r}. "
    return text + " ".join(response_lines(harm))


def response_lines(harm: Harm) -> Iterator[str]:
    """What is known of each phase. A critical fluence is named only where it was passed: before that only the slope is
    known."""
    response = harm.response
    if response.method == "prior":
        yield "Nothing could be learned from the references: charges rest on the first guess alone."
        return
    for name, draws, tested in zip(
        response.phases, response.critical_fluence_e_per_A2, response.tested_e_per_A2, strict=True
    ):
        low, middle, high = np.quantile(draws, (0.05, 0.5, 0.95))
        if tested == 0.0:
            yield f"{name}: never tested, charged as the others suggest."
        elif middle < tested:
            yield f"{name}: critical fluence {middle:.3g} e/Å² (90 %: {low:.3g} to {high:.3g})."
        else:
            slope = np.quantile(1e4 / np.array(draws), (0.5, 0.05, 0.95))
            yield (
                f"{name}: {slope[0]:.3g} % damaged per 100 e/Å² ({slope[1]:.3g} to {slope[2]:.3g}), tested up to "
                f"{tested:.3g} e/Å² only, where damage does not yet saturate; charged by this slope."
            )


def harm_rows(record: Record) -> list[tuple[str, str, str, str, str]]:
    """A table of the areas with limits of their own: name, electrons, seconds, peak and damage charged."""
    state = record.state
    rows = []
    damage = state.harm.total.by_area if state.harm else (math.nan,) * len(state.areas)
    for area, spent, harm in zip(state.plan.areas, state.areas, damage, strict=True):
        cells = ((spent.electrons, area.electrons), (spent.seconds, area.seconds), (harm, area.damage))
        texts = [f"{now:.4g}" + ("" if limit is None else f" of {limit:.4g}") for now, limit in cells]
        peak = "" if area.peak_fluence_e_per_A2 is None else f"at most {area.peak_fluence_e_per_A2:.4g}"
        rows.append((area.name, texts[0], texts[1], peak, texts[2]))
    return rows
