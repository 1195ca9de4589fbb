"""The pictures of a report, drawn from a session's record: where it looked, what it found, what the policy believed.

Every ``draw_*`` returns a matplotlib Figure, or one sentence saying why there is nothing to draw. Positions are nm in
the specimen frame, y down, as the arrays lie. Nothing here uses matplotlib's global state (no pyplot).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.canvas import (
    Floats,
    coarse,
    grey_limits,
    into_region,
    label,
    new_figure,
    order_map,
    place_image,
    scale_bar,
)
from aecontrol.events import Decided, DriftMeasured, SessionEvent
from aecontrol.exposure import KeyRecord
from aecontrol.measuring import load_array
from aecontrol.scoring import match
from aecontrol.state import ScanRecord, State
from aecontrol.types import ATOM_COLUMNS, ATOM_LABELS, Charge, Frame, ScanRegion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BEST = 6  # sub-scans shown
MAX_POINTS = 5000  # points of the latent scatter
NUMBER_ALL = 60  # with more regions than this only the first and last few bear their number
NUMBER_ENDS = 5

# Okabe and Ito's palette, which colour-blind readers can tell apart
FOUND, WRONG, MISSED = "#E69F00", "#CC79A7", "#56B4E9"
INK, MUTED, ACCENT = "#22303C", "#8A96A3", "#0072B2"
_CLASS_COLOURS = {
    "atom": "#009E73",
    "Mo": "#0072B2",
    "S2": "#009E73",
    "S1": "#F0E442",
    "S0": "#D55E00",
    "C": "#009E73",
    "Pt": "#F0E442",
    "edge": "#0072B2",
}
_LINES = ("#8A96A3", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00")


@dataclass(frozen=True)
class Record:
    """A session as its folder tells it: journal, the state it folds to, and the summary when one was written."""

    folder: Path
    events: Sequence[SessionEvent]
    state: State
    summary: dict[str, Any] | None

    @property
    def unit(self) -> str:
        """Currency in which exposures are metered."""
        return self.state.capabilities.unit if self.state.capabilities else "electrons"

    @property
    def field_nm(self) -> tuple[float, float]:
        """Width and height of the field; zero before the instrument is known."""
        return self.state.capabilities.field_nm if self.state.capabilities else (0.0, 0.0)

    @property
    def overview(self) -> tuple[ScanRegion, Frame] | None:
        """The overview's region and frame, where there is one."""
        for key, record in self.state.keys.items():
            if record.step == 0 and key in self.state.frames:
                return record.region, self.state.frames[key]
        return None

    @cached_property
    def targets(self) -> Floats | None:
        """True positions [n, 2] nm, where they are known."""
        truth = (self.summary or {}).get("truth")
        return np.asarray(truth["positions_nm"], float).reshape(-1, 2) if truth else None

    def exposed(self) -> list[KeyRecord]:
        """Sub-scans in the order in which they were taken; void keys, which never fired, are left out."""
        return [r for r in self.state.keys.values() if r.step > 0 and r.state not in ("VOID", "RESERVED")]

    def image(self, frame: Frame) -> Floats:
        """The channel that perception read."""
        return load_array(self.folder, next(iter(frame.channels.values()))).astype(float)

    def amount(self, charge: Charge) -> float:
        """A charge in the session's currency."""
        return float(charge.pixels if charge.electrons is None or self.unit == "pixels" else charge.electrons)


# ---------------------------------------------------------------- where it looked


def draw_visits(record: Record) -> Figure | str:
    """The overview with the visited regions in order, and beside it what the sub-scans saw at their places."""
    if record.state.capabilities is None:
        return "The instrument was never asked what it is, so there is no field to show."
    if record.overview is None and not record.exposed():
        return "Nothing has been exposed."
    figure = new_figure(11.0, 5.4 * _aspect(record) + 0.5)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _visits(left, record)
    _mosaic(right, record)
    return figure


def _visits(ax: Axes, record: Record) -> None:
    """Overview, outlines of the visited regions coloured and numbered in order."""
    from matplotlib.collections import PolyCollection

    _field(ax, record)
    _overview_image(ax, record)
    visits = record.exposed()
    if visits:
        order = np.arange(1, len(visits) + 1)
        many = len(visits) > NUMBER_ALL
        areas = PolyCollection([_inset(r.region) for r in visits], cmap=order_map(), clim=(1, max(2, len(visits))))
        colours = areas.to_rgba(order, alpha=0.5 if many else 1.0)
        areas.set(facecolors=colours if many else "none", edgecolors="none" if many else colours, linewidths=1.5)
        ax.add_collection(areas)
        if many:
            ax.figure.colorbar(areas, ax=ax, label="order of visits", shrink=0.8, pad=0.02)
        for number, visit in enumerate(visits, 1):
            if not many or number <= NUMBER_ENDS or number > len(visits) - NUMBER_ENDS:
                label(ax, visit.region.center_nm, str(number), 6 if many else 8)
    ax.set_title("overview; visited regions in order" if record.overview else "no overview; visited regions in order")


def _inset(region: ScanRegion) -> list[tuple[float, float]]:
    """The region's corners, a little inside of it, so that neighbours do not hide each other's outlines."""
    cx, cy = region.center_nm
    return [(cx + 0.97 * (x - cx), cy + 0.97 * (y - cy)) for x, y in region.corners_nm()]


def _mosaic(ax: Axes, record: Record) -> None:
    """The sub-scans at their places, the finds on them."""
    _field(ax, record)
    _overview_image(ax, record, dimmed=True)
    frames = [(r.region, record.state.frames[r.key]) for r in record.exposed() if r.key in record.state.frames]
    images = [(region, coarse(record.image(frame), 160)) for region, frame in frames if frame.usable]
    if images:
        low, high = grey_limits(np.concatenate([image.ravel() for _, image in images]))
        for region, image in images:
            place_image(ax, region, image, low, high)
    found = record.state.found()
    if found:
        xy = np.array([(atom.x_nm, atom.y_nm) for atom in found])
        ax.scatter(xy[:, 0], xy[:, 1], s=8 if len(found) < 100 else 3, color=FOUND, linewidths=0)
    ax.set(title=f"what the sub-scans saw; {len(found)} found (dots)", ylabel="")


def draw_picture(record: Record) -> Figure | str:
    """Overview in order of visits beside the best sub-scan: one picture of the session."""
    best = _best(record, 1)
    if not best:
        return "There is no readable sub-scan."
    figure = new_figure(11.0, 6.0)
    left, right = figure.subplots(1, 2)
    _visits(left, record)
    _legend_below(figure, *_sub_scan(right, record, best[0]))
    return figure


# ---------------------------------------------------------------- what it found


def draw_finds(record: Record) -> Figure | str:
    """The sub-scans with most finds: atoms coloured by class, finds circled, missed objects crossed where known."""
    best = _best(record, BEST)
    if not best:
        return "There is no readable sub-scan yet."
    columns = min(3, len(best))
    rows = math.ceil(len(best) / columns)
    figure = new_figure(11.0 if columns == 3 else 5.4 * columns, (3.9 if columns == 3 else 5.4) * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    classes: dict[str, None] = {}
    marks: dict[str, None] = {}
    for ax, scan in zip(axes, best, strict=False):
        names, kinds = _sub_scan(ax, record, scan)
        classes |= dict.fromkeys(names)
        marks |= dict.fromkeys(kinds)
    for ax in axes[len(best) :]:
        ax.set_axis_off()
    _legend_below(figure, list(classes), list(marks))
    return figure


def _best(record: Record, count: int) -> list[ScanRecord]:
    """Readable sub-scans with the most finds, then the highest value, then the earliest."""
    state = record.state
    readable = [s for s in state.scans if s.key in state.frames and state.frames[s.key].usable]

    def rank(scan: ScanRecord) -> tuple[float, float, int]:
        value = scan.observation.value
        return -len(scan.observation.found), -(value if value is not None else -math.inf), scan.step

    return sorted(readable, key=rank)[:count]


def _sub_scan(ax: Axes, record: Record, scan: ScanRecord) -> tuple[list[str], list[str]]:
    """One sub-scan in its own frame; returns the names of the classes and of the marks that were drawn."""
    region, observation = scan.observation.region, scan.observation
    image = record.image(record.state.frames[scan.key])
    low, high = grey_limits(image)
    width, height = region.fov_nm
    ax.imshow(image, cmap="gray", vmin=low, vmax=high, extent=(0, width, height, 0), interpolation="nearest")
    classes = []
    if observation.atoms is not None:
        table = load_array(record.folder, observation.atoms).astype(float)
        labels = table[:, ATOM_COLUMNS.index("label")].astype(int)
        local = into_region(region, table[:, :2])
        for index in np.unique(labels):
            classes.append(ATOM_LABELS[index])
            mine = local[labels == index]
            ax.scatter(mine[:, 0], mine[:, 1], s=5, linewidths=0, color=_CLASS_COLOURS[ATOM_LABELS[index]])
    found = np.array([(atom.x_nm, atom.y_nm) for atom in observation.found]).reshape(-1, 2)
    marks = _mark_finds(ax, record, region, found)
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.set_title(f"step {scan.step} at ({region.center_nm[0]:.1f}, {region.center_nm[1]:.1f}) nm: {len(found)} found")
    scale_bar(ax, under=True)
    return classes, marks


_MARKS = {
    "found": ("o", FOUND),
    "found, was there": ("o", FOUND),
    "found, was not there": ("s", WRONG),
    "missed": ("x", MISSED),
    "found, labelled": ("o", FOUND),
    "found, not labelled": ("s", WRONG),
    "labelled, not found": ("x", MISSED),
}


def _mark_finds(ax: Axes, record: Record, region: ScanRegion, found: Floats) -> list[str]:
    """Circle the finds; where the truth is known tell right from wrong and cross what was missed."""
    if record.targets is None:
        groups = {"found": found}
    else:
        half = np.array(region.fov_nm) / 2
        local = into_region(region, record.targets) - half
        gate = record.state.plan.match_nm
        right, seen = match(found, record.targets, gate)
        inside = np.asarray((np.abs(local) <= half).all(axis=1))
        inside[seen] = False
        wrong = np.setdiff1d(np.arange(len(found)), right)
        # people labelled the record: what they say is not quite what was there
        names = ("found, labelled", "found, not labelled", "labelled, not found")
        if record.unit != "pixels":
            names = ("found, was there", "found, was not there", "missed")
        groups = dict(zip(names, (found[right], found[wrong], record.targets[inside]), strict=True))
    drawn = []
    for name, xy in groups.items():
        if len(xy):
            marker, colour = _MARKS[name]
            local = into_region(region, xy)
            face, size = (colour, 6.0) if marker == "x" else ("none", 9.0)
            ax.plot(local[:, 0], local[:, 1], marker, ms=size, mfc=face, mec=colour, mew=1.4)
            drawn.append(name)
    return drawn


# ---------------------------------------------------------------- what the policy believed


def last_belief(record: Record) -> Decided | None:
    """The last decision that was journaled with a posterior over all candidates."""
    count = len(record.state.candidates)
    for decided in reversed(record.state.decisions):
        explanation = decided.decision.explanation
        if count and len(explanation.mean_map) == count == len(explanation.sd_map):
            return decided
    return None


def draw_belief(record: Record) -> Figure | str:
    """Overview evidence, posterior mean and uncertainty over the candidates, visited windows outlined."""
    decided = last_belief(record)
    if decided is None:
        return "No decision was journaled with a posterior over the candidates (the policy in force keeps none)."
    explanation = decided.decision.explanation
    maps = [
        ("posterior mean", "viridis", np.array(explanation.mean_map)),
        ("posterior standard deviation", "magma", np.array(explanation.sd_map)),
    ]
    evidence = np.array([np.nan if o.value is None else o.value for o in record.state.overview], float)
    if len(evidence) == len(record.state.candidates) and np.isfinite(evidence).any():
        maps.insert(0, ("evidence in the overview", "cividis", evidence))
    figure = new_figure(11.0, 10.0 / len(maps) * _aspect(record) + 1.0)
    axes = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for ax, (title, cmap, values) in zip(axes, maps, strict=True):
        _candidate_map(ax, record, decided, values, cmap)
        ax.set_title(title)
        ax.label_outer()
    return figure


def _candidate_map(ax: Axes, record: Record, decided: Decided, values: Floats, cmap: str) -> None:
    from matplotlib.collections import PolyCollection

    x, x_edges, column = _axis([c.center_nm[0] for c in record.state.candidates], record.field_nm[0])
    y, y_edges, row = _axis([c.center_nm[1] for c in record.state.candidates], record.field_nm[1])
    grid = np.full((len(y), len(x)), np.nan)
    grid[row, column] = values
    mesh = ax.pcolormesh(x_edges, y_edges, grid, cmap=cmap, zorder=0)
    ax.figure.colorbar(mesh, ax=ax, location="bottom", shrink=0.8, pad=0.02, aspect=30)
    before = [r.region for r in record.exposed() if r.step < decided.step]
    if len(before) > NUMBER_ALL:
        x_seen, y_seen = zip(*(region.center_nm for region in before), strict=True)
        ax.scatter(x_seen, y_seen, s=3, color="white", linewidths=0)
    else:
        outlines = [_inset(region) for region in before]
        ax.add_collection(PolyCollection(outlines, facecolors="none", edgecolors="white", linewidths=1.0))
    if decided.decision.kind == "scan":
        chosen = [_inset(r) for r in decided.decision.regions]
        ax.add_collection(PolyCollection(chosen, facecolors="none", edgecolors="#D55E00", linewidths=2.0))
    _field(ax, record)


def _axis(centres: Sequence[float], side: float) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Distinct centres, cell edges half-way between them and at the field's ends, and the cell of every candidate."""
    distinct, index = np.unique(np.round(centres, 6), return_inverse=True)
    edges = np.concatenate([[0.0], (distinct[1:] + distinct[:-1]) / 2, [side]])
    return distinct, edges, index


# ---------------------------------------------------------------- what the patches look like


def draw_latents(record: Record) -> Figure | str:
    """Latent vectors of all patches coloured by target score, and the mean patch of each part of the latent plane."""
    latents, targets, patches = _latent_points(record)
    if not len(latents):
        return "No embedding was trained, or no sub-scan gave patches."
    figure = new_figure(11.0, 5.2)
    left, right = figure.subplots(1, 2)
    keep = _pick(len(latents))
    keep = keep[np.argsort(targets[keep], kind="stable")]  # the rare high scores on top
    two = np.sort(np.argsort(-latents.var(axis=0), kind="stable")[:2])
    flat = latents.shape[1] == 1
    plane = np.stack([latents[:, 0], targets], axis=1) if flat else latents[:, two]
    dots = left.scatter(plane[keep, 0], plane[keep, 1], c=targets[keep], s=6, cmap="viridis", linewidths=0)
    figure.colorbar(dots, ax=left, label="target score of the atom", shrink=0.85, pad=0.02)
    left.set_xlabel(f"latent component {two[0] + 1}")
    left.set_ylabel("target score" if flat else f"latent component {two[1] + 1}")
    left.set_title(f"{len(keep)} of {len(latents)} patches")
    _manifold(right, plane, patches)
    right.set(xlabel=left.get_xlabel(), ylabel=left.get_ylabel(), title="mean patch of each part of the plane")
    return figure


def _latent_points(record: Record) -> tuple[Floats, Floats, Floats]:
    """Latents [n, d], target scores [n] and patches [n, size, size] of all sub-scans that share the last embedding."""
    every: list[tuple[Floats, Floats, Floats]] = []
    for scan in record.state.scans:
        o = scan.observation
        if o.latents is None or o.patches is None or o.embedding != record.state.embedding:
            continue
        z = load_array(record.folder, o.latents).astype(float)
        target = np.full(len(z), np.nan)
        if o.atoms is not None and o.patch_atoms is not None:
            rows = load_array(record.folder, o.patch_atoms).astype(int)
            target = load_array(record.folder, o.atoms).astype(float)[rows, ATOM_COLUMNS.index("target")]
        every.append((z, target, load_array(record.folder, o.patches).astype(float)))
    if not every:
        return np.empty((0, 2)), np.empty(0), np.empty((0, 1, 1))
    z, target, patches = (np.concatenate(parts) for parts in zip(*every, strict=True))
    return z, target, patches


def _pick(count: int) -> NDArray[np.intp]:
    """At most MAX_POINTS of ``count`` indices, always the same ones."""
    if count <= MAX_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(np.random.SeedSequence(0)).choice(count, MAX_POINTS, replace=False))


def _manifold(ax: Axes, plane: Floats, patches: Floats, cells: int = 11) -> None:
    """The mean of the real patches that fall into each cell of the latent plane, drawn at the cell."""
    low, high = np.percentile(plane, [0.5, 99.5], axis=0)
    size = np.where(high > low, high - low, 1.0)
    cell = np.floor((plane - low) / size * cells).astype(int)
    inside = ((cell >= 0) & (cell < cells)).all(axis=1)
    bottom, top = grey_limits(patches)
    for i, j in np.unique(cell[inside], axis=0):
        members = inside & (cell == (i, j)).all(axis=1)
        x, y = low + size * (np.array([i, j]) + 0.5) / cells
        hx, hy = 0.47 * size / cells
        mean = patches[members].mean(axis=0)
        ax.imshow(mean, cmap="gray", vmin=bottom, vmax=top, extent=(x - hx, x + hx, y - hy, y + hy), aspect="auto")
    ax.set(xlim=(low[0], low[0] + size[0]), ylim=(low[1], low[1] + size[1]))


# ---------------------------------------------------------------- what it cost


def draw_dose(record: Record) -> Figure | str:
    """The dose ledger over the exposures, and the finds against the charge beside other policies."""
    fired = [r for r in record.state.keys.values() if r.state != "VOID"]
    if not fired:
        return "Nothing has been charged."
    curve = (record.summary or {}).get("curve")
    figure = new_figure(11.0 if curve else 6.0, 4.2)
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    _ledger(axes[0], record, fired)
    if curve:
        _finds_against_charge(axes[1], record, curve)
    return figure


def _ledger(ax: Axes, record: Record, fired: list[KeyRecord]) -> None:
    steps = np.arange(len(fired) + 1)
    charged = np.concatenate([[0.0], np.cumsum([record.amount(r.charge) for r in fired])])
    reserved = charged + np.array([0.0, *(record.amount(r.bound) - record.amount(r.charge) for r in fired)])
    ax.step(steps, reserved, where="post", color=MUTED, ls="--", lw=1.2, label="reserved: charge before + bound")
    ax.step(steps, charged, where="post", color=ACCENT, lw=1.8, label="charged (measured where posted)")
    cut = [k + 1 for k, r in enumerate(fired) if r.state == "INDET"]
    if cut:
        ax.plot(cut, charged[cut], "x", color="#D55E00", label="interrupted: charged at its bound")
    limit = _budget(record)
    if limit is not None:
        ax.axhline(limit, color=INK, lw=1.0, label="budget")
    top = 1.08 * max(reserved.max(), limit or 0.0)
    ax.set(xlabel="exposures", ylabel=record.unit, title="dose ledger", xlim=(0, len(fired) + 0.5), ylim=(0, top))
    ax.legend(loc="lower right")


def _finds_against_charge(ax: Axes, record: Record, curve: dict[str, list[float]]) -> None:
    assert record.summary is not None
    true = record.summary["contract"]["targets"]["true"]
    share = record.unit == "pixels" and bool(true)
    for name, points, colour, width in _curves(record.summary, curve):
        charge, found = points["charge"], points.get("matched") or points["reported"]
        y = np.array([0.0, *found]) / (true if share else 1)
        ax.step([0.0, *charge], y, where="post", color=colour, lw=width, label=name)
    known = bool(curve.get("matched"))
    if known and true and not share:
        ax.axhline(true, color=INK, lw=0.8, ls=":", label=f"{true} were there")
    limit = _budget(record)
    if limit is not None:
        ax.axvline(limit, color=INK, lw=1.0, label="budget")
    what = "recall (of the labelled objects)" if share else "true objects found" if known else "objects reported"
    ax.set(xlabel=f"{record.unit} charged, overview included", ylabel=what, title="finds against charge")
    ax.set(xlim=(0, None), ylim=(0, 1.02) if share else (0, None))
    ax.legend()


def _curves(summary: dict[str, Any], own: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, float]]:
    yield "this session", own, ACCENT, 2.2
    for k, (kind, other) in enumerate(summary.get("comparison", {}).items()):
        if (other.get("curve") or {}).get("charge"):
            yield kind, other["curve"], _LINES[k % len(_LINES)], 1.5


# ---------------------------------------------------------------- how it drifted


def drift_of(record: Record) -> list[tuple[float, DriftMeasured]]:
    """Every measurement of drift with the instrument's clock (s) at its frame, in order."""
    frames = record.state.frames
    return [(frames[event.key].started_s, event) for event in record.events if isinstance(event, DriftMeasured)]


def draw_drift(record: Record) -> Figure | str:
    """How far the specimen had moved at each measurement, with three standard deviations; refused ones marked."""
    measured = drift_of(record)
    if not measured:
        return "Drift was not measured."
    figure = new_figure(7.0, 3.4)
    ax = figure.subplots()
    good = [(clock, event) for clock, event in measured if event.accepted]
    for axis, colour in ((0, ACCENT), (1, "#D55E00")):
        ax.errorbar(
            [clock for clock, _ in good],
            [event.shift_nm[axis] for _, event in good],
            [3.0 * event.sigma_nm for _, event in good],
            fmt="o-",
            ms=3,
            lw=1.2,
            capsize=2,
            color=colour,
            label=f"along {'xy'[axis]} (bars: 3 standard deviations)",
        )
    refused = [(clock, event.shift_nm[axis]) for clock, event in measured if not event.accepted for axis in (0, 1)]
    if refused:
        ax.plot(
            *zip(*refused, strict=True), "x", color=WRONG, ms=8, mew=2, label="refused; drawn where it was expected"
        )
    ax.set(xlabel="instrument clock / s", ylabel="shift / nm", title="where the specimen had moved to")
    ax.legend()
    return figure


def _budget(record: Record) -> float | None:
    budget = record.state.plan.budget
    return budget.electrons if record.unit == "electrons" else budget.pixels


def _aspect(record: Record) -> float:
    """Height over width of the field, kept within what fits a page."""
    width, height = record.field_nm
    return min(2.0, max(0.25, height / width))


def _field(ax: Axes, record: Record) -> None:
    """Axes over the whole field, y down, with a scale bar."""
    width, height = record.field_nm
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xlabel="x / nm", ylabel="y / nm")
    scale_bar(ax)


def _overview_image(ax: Axes, record: Record, dimmed: bool = False) -> None:
    ax.set_facecolor("#1d2328")
    if record.overview is not None:
        region, frame = record.overview
        image = record.image(frame)
        low, high = grey_limits(image)
        place_image(ax, region, image, low, high, 0.35 if dimmed else 1.0)


def _legend_below(figure: Figure, classes: list[str], marks: list[str]) -> None:
    """Legend of classes (dots) and of finds (rings, squares, crosses) under a figure."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], ls="", marker="o", ms=4, color=_CLASS_COLOURS[name], label=name) for name in classes]
    for name in marks:
        marker, colour = _MARKS[name]
        face = colour if marker == "x" else "none"
        handles.append(Line2D([], [], ls="", marker=marker, ms=8, mec=colour, mfc=face, mew=1.4, label=name))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
