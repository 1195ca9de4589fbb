"""report.html of a session: one file, every picture inline, nothing fetched from anywhere.

It is made from the journal, the stored arrays and, where the session has been concluded, ``summary.json``; it can be
made again at any time, also of a session that is paused or was killed. Every text is escaped.
"""

from __future__ import annotations

import base64
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from aecontrol.canvas import draw_png
from aecontrol.durable import write_durable
from aecontrol.events import (
    Decided,
    DriftMeasured,
    Indeterminate,
    InstrumentReady,
    ModelUpdated,
    Paused,
    Perceived,
    Recorded,
    Refused,
    Resumed,
    SessionStarted,
    Voided,
    step_text,
)
from aecontrol.exposure import KeyRecord
from aecontrol.figures import (
    Record,
    draw_belief,
    draw_dose,
    draw_drift,
    draw_finds,
    draw_latents,
    draw_picture,
    draw_visits,
    drift_of,
    last_belief,
)
from aecontrol.folding import fold
from aecontrol.harm_figure import draw_harm, harm_caption, harm_rows
from aecontrol.session import read_events
from aecontrol.state import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLURALS = {"vacancy": "vacancies", "atom_count": "atoms", "edges": "edge points"}
_PACKAGES = ("numpy", "scipy", "torch", "botorch", "gpytorch", "pyro-ppl", "scikit-image", "matplotlib")


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``picture.png`` into a session folder; returns the report's path.

    Works on a session in any state; what is missing is left out with one line saying why. Raises StorageFault when the
    journal or a stored array is damaged, or the disk is full.
    """
    record = open_record(folder)
    picture = draw_png(lambda: draw_picture(record))
    if isinstance(picture, bytes):
        write_durable(folder / "picture.png", picture)
    path = folder / "report.html"
    write_durable(path, render(record).encode())
    return path


def open_record(folder: Path) -> Record:
    """The session in ``folder``, read-only, with its summary if that is of the session as it stands. Raises
    StorageFault."""
    events = read_events(folder)
    state = fold(events)
    return Record(folder, events, state, _current_summary(folder / "summary.json", state))


def _current_summary(path: Path, state: State) -> dict[str, Any] | None:
    """The summary, unless there is none, it is unreadable, or the session went on after it was written."""
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
        contract = summary["contract"]
        of = contract["steps"], contract["stopped"]["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return summary if of == (state.step, state.stopped.cause if state.stopped else "paused") else None


def render(record: Record) -> str:
    """The whole page."""
    started = record.events[0]
    assert isinstance(started, SessionStarted)
    name = _name(started)
    sections = [
        _headline(record, started),
        _picture("Where it looked", lambda: draw_visits(record), _visits_caption(record)),
        _picture("What it found", lambda: draw_finds(record), _finds_caption(record)),
        _picture("What the policy believed", lambda: draw_belief(record), _belief_caption(record)),
        _picture("What the patches look like", lambda: draw_latents(record), _latents_caption(record)),
        _picture("What it cost", lambda: draw_dose(record), _dose_caption(record), _ledger_table(record)),
        *_harm_section(record),
        *_drift_section(record),
        _section(
            "Interruptions and faults", _list(_incidents(record), "None: every exposure was carried out and read.")
        ),
        _section("Decisions", _decision_table(record)),
        _section("Limits of this record", _list(_limits_of_record(record, started))),
        _section("Configuration as run", f"<pre>{escape(_toml(started.config))}</pre>"),
        _section("Versions", _table(("part", "version"), _versions(record, started))),
    ]
    page = Template((files("aecontrol") / "report_page.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(name), body="\n".join(sections))


# ---------------------------------------------------------------- headline


def _name(started: SessionStarted) -> str:
    session = started.config.get("session")
    return str(session.get("name", "session")) if isinstance(session, Mapping) else "session"


def _targets(started: SessionStarted) -> str:
    perceiver = started.config.get("perceiver")
    target = perceiver.get("target", perceiver) if isinstance(perceiver, Mapping) else None
    kind = target.get("kind") if isinstance(target, Mapping) else None
    return _PLURALS.get(str(kind), "target objects")


def _badge(record: Record) -> tuple[str, str]:
    """Class and text of the badge that says what kind of specimen this was."""
    capabilities = record.state.capabilities
    if capabilities is None:
        return "unknown", "instrument not asked"
    if capabilities.unit == "pixels":
        return "recorded", "recorded image"
    return ("simulated", "simulated specimen") if capabilities.simulated else ("real", "real specimen")


def _headline(record: Record, started: SessionStarted) -> str:
    state, summary = record.state, record.summary
    kind, badge = _badge(record)
    when = datetime.fromtimestamp(started.created_unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    identity = state.capabilities.identity if state.capabilities else "unknown instrument"
    cards = [(str(len(state.found())), f"{_targets(started)} found")]
    targets = summary["contract"]["targets"] if summary else {}
    if targets.get("true") is not None:
        matched = (summary or {})["curve"].get("matched") or [0]
        what = "of those labelled" if record.unit == "pixels" else "of those that were there"
        cards.append((f"{matched[-1]:.0f} of {targets['true']}", what))
        cards.append((_ratio(targets["precision"]), "precision"))
        cards.append((_ratio(targets["recall"]), "recall"))
    charged, limit = _charge_and_budget(record)
    cards.append((charged, f"{record.unit} charged" + (f" of {limit}" if limit else "")))
    cards.append((str(state.step), "sub-scans"))
    numbers = "".join(f"<div><dt>{escape(b)}</dt><dd>{escape(a)}</dd></div>" for a, b in cards)
    lines = [line for line in (summary or {}).get("lines", ()) if not line.startswith("report:")]
    if summary is None:
        lines = [_standing(state), "There is no summary of this session as it stands, so nothing is compared here."]
    return (
        f'<header><p class="badge {kind}">{escape(badge)}</p><h1>{escape(_name(started))}</h1>'
        f'<p class="sub">{escape(identity)} · seed {started.seed} · {when}</p>'
        f"<dl>{numbers}</dl>{_list(lines)}</header>"
    )


def _standing(state: State) -> str:
    if state.stopped is not None:
        return f"stopped ({state.stopped.cause}): {state.stopped.reason}"
    if state.paused:
        return f"paused: {state.paused}"
    return f"not finished: step {state.step}, {state.phase}"


def _charge_and_budget(record: Record) -> tuple[str, str]:
    charged, budget = record.state.charged, record.state.plan.budget
    if record.unit == "electrons":
        return _number(charged.electrons), _number(budget.electrons) if budget.electrons else ""
    return _number(charged.pixels), _number(budget.pixels) if budget.pixels else ""


# ---------------------------------------------------------------- captions


def _visits_caption(record: Record) -> str:
    text = f"Left: the overview and the {len(record.exposed())} regions visited after it, numbered in order"
    text += " (dark to bright). Right: the sub-scans at their places, over the dimmed overview, with all finds."
    return text


def _finds_caption(record: Record) -> str:
    text = "The sub-scans with the most finds. Dots: located atoms, coloured by class. Rings: target objects found."
    if record.targets is not None:
        what = "the labels" if record.unit == "pixels" else "what was there before the session began"
        text += (
            f" Compared with {what}, within {record.state.plan.match_nm:g} nm: crosses were not found, squares were "
            "reported where there is nothing."
        )
    return text


def _belief_caption(record: Record) -> str:
    decided = last_belief(record)
    if decided is None:
        return ""
    why = decided.decision.explanation.why
    return (
        f"At the last decision with a posterior (step {decided.step}). White frames or dots: windows visited before; "
        f"orange: the one chosen. {why}"
    )


def _latents_caption(record: Record) -> str:
    updates = [event for event in record.events if isinstance(event, ModelUpdated)]
    if not updates:
        return ""
    last = updates[-1]
    return (
        f"{last.method}, trained once on {last.patches} patches of {len(last.frames)} sub-scans, version "
        f"{last.sha256[:12]}. Each point is one patch around an atom; right, the mean of the real patches in each cell."
    )


def _dose_caption(record: Record) -> str:
    text = (
        "Before the instrument is asked, an exposure is charged at its bound, and the guard holds that sum (dashed) to "
    )
    text += "the budget; afterwards it is charged at what was measured."
    if (record.summary or {}).get("comparison"):
        text += " The other policies ran at the same dose on fresh copies, with the same detector of target objects."
    return text


def _harm_section(record: Record) -> list[str]:
    if record.state.harm is None and not record.state.plan.areas:
        return []
    heads = ("area", "electrons", "beam on it, s", "e/Å² in a tile", "damage, nm²")
    rows = harm_rows(record)
    table = _table(heads, rows) if rows else ""
    if record.state.harm is None:
        return [_section("Areas with limits of their own", table)]
    return [_picture("What it harmed", lambda: draw_harm(record), harm_caption(record), table)]


def _drift_section(record: Record) -> list[str]:
    if record.state.plan.drift is None:
        return []
    return [_picture("How it drifted", lambda: draw_drift(record), _drift_caption(record))]


def _drift_caption(record: Record) -> str:
    measured, keys = drift_of(record), record.state.keys.values()
    good = [(clock, event) for clock, event in measured if event.accepted]
    steps = {d.step for d in record.state.decisions if d.decision.kind == "scan" and d.decision.role == "drift"}
    spent = sum(record.amount(r.charge) for r in keys if r.step in steps)
    total = sum(record.amount(r.charge) for r in keys)
    text = (
        f"{len(measured)} measurements, {len(measured) - len(good)} of them refused, cost {_number(spent)} "
        f"{record.unit}, {100 * spent / max(total, 1):.1f} % of what was charged."
    )
    if len(good) < 2 or good[-1][0] <= good[0][0]:
        return text
    seconds = good[-1][0] - good[0][0]
    x, y = (now - then for now, then in zip(good[-1][1].shift_nm, good[0][1].shift_nm, strict=True))
    moved = f" The specimen moved by ({x:.3g}, {y:.3g}) nm in {seconds:.3g} s, {math.hypot(x, y) / seconds:.2g} nm/s."
    return text + moved


# ---------------------------------------------------------------- tables


def _damage_row(state: State) -> tuple[float | None, float | None, str]:
    """Damage charged, its budget, and on what it rests."""
    if state.harm is None:
        return None, state.plan.budget.damage, "not measured"
    basis = {"model": "expected by the fitted response", "measured": "expected, or measured where that was more"}
    return state.charged.damage, state.plan.budget.damage, basis.get(state.harm.total.basis, "nothing charged")


def _ledger_table(record: Record) -> str:
    state = record.state
    charged, budget = state.charged, state.plan.budget
    metered = record.unit == "electrons"
    bounded = state.capabilities is None or state.bounded.beam_error_nm is not None
    peak = float(state.tiles.fluence.max(initial=0.0)) if state.tiles is not None else 0.0
    measured = "measured; interrupted exposures at their bound"
    of_electrons = measured if metered else "unknown dose"
    rows = [
        (
            "electrons",
            charged.electrons if metered else None,
            budget.electrons,
            of_electrons,
        ),
        ("pixels", charged.pixels, budget.pixels, measured),
        (
            "peak fluence in a 1 nm tile, e/Å²",
            peak if metered and bounded else None,
            budget.peak_fluence_e_per_A2,
            (_basis_of_peak(record) if bounded else "the beam drifts: no bound for any tile")
            if metered
            else "unknown dose",
        ),
        ("damage, nm² wholly damaged", *_damage_row(state)),
        ("time, s", charged.seconds, budget.seconds, "exposures and a fixed time for each decision"),
    ]
    cells = [
        (name, "unknown" if spent is None else _number(spent), "no limit" if limit is None else _number(limit), basis)
        for name, spent, limit, basis in rows
    ]
    meter = (record.summary or {}).get("electrons_delivered")
    note = f"<p>The simulated column's own meter: {_number(meter)} electrons delivered.</p>" if meter else ""
    return _table(("ledger", "charged", "budget", "basis"), cells) + note


def _basis_of_peak(record: Record) -> str:
    plan, text = record.state.plan.drift, "upper bound, summed over all exposures"
    if plan is None:
        return text
    text += f", while the specimen is within {plan.limit_nm:g} nm of where it is expected"
    if any(not event.accepted for _, event in drift_of(record)):
        text += "; that could not be confirmed every time it was measured"
    return text


def _decision_table(record: Record) -> str:
    if not record.state.decisions:
        return _left_out("Nothing was decided.")
    columns = ("step", "x, y / nm", "expected", "value", "finds", "acquisition", "charge", "took / s", "notes", "why")
    keys: dict[int, list[KeyRecord]] = {}
    for key in record.state.keys.values():
        keys.setdefault(key.step, []).append(key)
    seen = {event.key: event for event in record.events if isinstance(event, Perceived | DriftMeasured)}
    refused = {event.step: event.reason for event in record.events if isinstance(event, Refused)}
    rows = [_decision(record, d, keys.get(d.step, []), seen, refused.get(d.step)) for d in record.state.decisions]
    return f'<div class="scroll">{_table(columns, rows)}</div>'


def _decision(
    record: Record,
    decided: Decided,
    keys: list[KeyRecord],
    seen: Mapping[str, Perceived | DriftMeasured],
    refused: str | None,
) -> tuple[str, ...]:
    decision = decided.decision
    explanation = decision.explanation
    place = "-"
    if decision.kind == "scan":
        x, y = decision.regions[0].center_nm
        place = f"{x:.2f}, {y:.2f}"
    notes = [f"refused: {refused}"] if refused else []
    charge, value, finds = 0.0, "-", "-"
    for key in keys:
        charge += record.amount(key.charge)
        notes += [_EXPOSURES[key.state]] if key.state in _EXPOSURES else []
        if key.key in record.state.frames:
            notes += record.state.frames[key.key].flags
        event = seen.get(key.key)
        if isinstance(event, DriftMeasured):
            notes.append(_shift(event))
        elif event is not None:
            first = event.observations[0] if event.observations and decided.step else None
            notes += [text for text in dict.fromkeys((event.note, first.note if first else "")) if text]
            value = "-" if first is None or first.value is None else f"{first.value:.4g}"
            finds = "-" if first is None else str(len(first.found))
    if explanation.fallback:
        notes.append(f"fallback: {explanation.fallback}")
    expected = "-"
    if explanation.mean is not None:
        expected = f"{explanation.mean:.3g}" + ("" if explanation.sd is None else f" ± {explanation.sd:.2g}")
    return (
        str(decided.step) if decided.step >= 0 else f"reference {-decided.step}",
        place,
        expected,
        value,
        finds,
        "-" if explanation.acquisition is None else f"{explanation.acquisition:.4g}",
        _number(charge),
        f"{decided.wall_s:.2f}",
        "; ".join(notes),
        f"{explanation.policy}: {explanation.why}",
    )


def _shift(event: DriftMeasured) -> str:
    if not event.accepted:
        return f"not measured: {event.reason}"
    x, y = event.shift_nm
    return f"shift ({x:.3f}, {y:.3f}) ± {event.sigma_nm:.3f} nm"


_EXPOSURES = {
    "INDET": "interrupted, charged at its bound",
    "VOID": "not fired, charged nothing",
    "RESERVED": "reserved, not settled yet",
}


def _incidents(record: Record) -> Iterator[str]:
    """Everything that did not go as planned, in order."""
    keys = record.state.keys
    for event in record.events:
        match event:
            case Indeterminate():
                key = keys[event.key]
                kept = "its frame was kept" if event.digests else "its frame was lost"
                amount = _number(record.amount(key.charge))
                yield (
                    f"{step_text(key.step)}: exposure {event.key[:12]} was interrupted ({event.reason}); charged in "
                    f"full, {amount} {record.unit}; {kept}"
                )
            case Voided():
                yield f"{step_text(keys[event.key].step)}: exposure {event.key[:12]} was not fired: {event.reason}"
            case Refused():
                yield f"{step_text(event.step)}: the guard refused the decision: {event.reason}"
            case Recorded() if not event.frame.usable:
                flags = ", ".join(event.frame.flags)
                yield f"{step_text(keys[event.key].step)}: the frame is {flags}: kept and charged, never read"
            case DriftMeasured() if not event.accepted:
                yield f"{step_text(keys[event.key].step)}: refused, nothing was assumed: {event.reason}"
            case Paused():
                yield f"paused: {event.reason}"
            case Resumed():
                yield "a new process took the session over"


def _harm_limit(record: Record) -> str:
    harm = record.state.harm
    if harm is None:
        return "Damage was neither measured nor charged ([damage] does both)."
    if not harm.usable:
        return "No frame told of damage: its charges rest on the first guess of the critical fluence alone."
    factor = math.exp(1.64 * harm.response.diagnostics.get("gain_sd", 0.0))
    return (
        f"Damage is charged by an exponential law fitted to {len(harm.usable)} comparisons of frames; places that were "
        "exposed once were never looked at again, so theirs is a forecast. Where damage did not yet saturate, how much "
        f"matter a score stands for is known to a factor of {factor:.2g} (90 %) from other specimens alone."
        + ("" if harm.response.diagnostics.get("r_hat", 1.0) < 1.1 else " The fit did not converge: do not rely on it.")
    )


def _limits_of_record(record: Record, started: SessionStarted) -> Iterator[str]:
    yield _drift_limit(record, started)
    yield _harm_limit(record)
    if record.unit == "pixels":
        yield "The dose of the record is unknown, so charges are pixels revealed for the first time, never electrons."
    if record.targets is not None:
        yield (
            "True objects are counted over the whole field as the session began, scanned or not; one find counts for "
            f"at most one object, within {record.state.plan.match_nm:g} nm."
        )
    if record.state.capabilities is not None:
        yield from (f"Said by the instrument: {note}" for note in record.state.capabilities.notes)


def _drift_limit(record: Record, started: SessionStarted) -> str:
    plan = record.state.plan.drift
    if plan is not None:
        return (
            "Drift is measured and followed: positions are those of the reference's first frame, off by how far the "
            f"specimen moved otherwise than it had before. A place more than {plan.limit_nm:g} nm from where it was "
            "expected is not looked for; on a perfect lattice such a jump would go unnoticed."
        )
    driver = started.config.get("driver")
    scan = driver.get("scan") if isinstance(driver, Mapping) else None
    drift = scan.get("drift_nm_per_s") if isinstance(scan, Mapping) else None
    if isinstance(drift, list | tuple) and any(drift):
        moves = f"The simulated stage drifts by ({', '.join(map(str, drift))}) nm/s, so positions are off by that much."
    elif record.unit == "pixels":
        moves = "A record holds still; what drift did while it was taken stays in it."
    elif record.state.capabilities is not None and record.state.capabilities.simulated:
        moves = "The simulated stage is set not to drift."
    else:
        moves = "How far the stage drifted is not known."
    return f"Drift is not corrected: a position assumes that the stage stands still. {moves}"


def _versions(record: Record, started: SessionStarted) -> list[tuple[str, str]]:
    rows = [("aecontrol, when the session began", started.version)]
    rows += [("perception model", e.perceiver) for e in record.events if isinstance(e, InstrumentReady)]
    rows += [(f"embedding ({e.method})", e.sha256) for e in record.events if isinstance(e, ModelUpdated)]
    rows.append(("Python, at this report", platform.python_version()))
    for name in _PACKAGES:
        try:
            rows.append((f"{name}, at this report", version(name)))
        except PackageNotFoundError:
            rows.append((f"{name}, at this report", "not installed"))
    return rows


# ---------------------------------------------------------------- HTML


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _picture(title: str, draw: Callable[[], Figure | str], caption: str, more: str = "") -> str:
    drawn = draw_png(draw)
    if isinstance(drawn, str):
        return _section(title, _left_out(drawn) + more)
    data = base64.b64encode(drawn).decode()
    image = f'<img alt="{escape(title)}. {escape(caption)}" src="data:image/png;base64,{data}">'
    return _section(title, f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>{more}")


def _left_out(why: str) -> str:
    return f'<p class="left-out">Left out: {escape(why)}</p>'


def _list(lines: Iterable[str], otherwise: str = "") -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else f"<p>{escape(otherwise)}</p>"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float) -> str:
    """Whole numbers with narrow spaces between thousands, others to 4 digits."""
    return f"{value:,.0f}".replace(",", "\u202f") if float(value).is_integer() else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """A configuration as TOML-like text, plain keys before the tables."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{key}]", _toml(value, f"{prefix}{key}.")]
    return "\n".join(lines).strip()
