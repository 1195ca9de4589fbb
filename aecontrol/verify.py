"""Is the record true to itself? The policy is asked again; both ledgers and all arrays are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aecontrol.commands import Decide, FollowPlan, MeasureDamage, MeasureDrift
from aecontrol.dose import Totals
from aecontrol.errors import StorageFault
from aecontrol.events import (
    DamageMeasured,
    Decided,
    DriftMeasured,
    Perceived,
    Recorded,
    Reembedded,
    ResponseFitted,
    SessionEvent,
    step_text,
)
from aecontrol.exposure import LedgerRecord
from aecontrol.folding import apply, begin
from aecontrol.journal import read_journal
from aecontrol.machine import next_command
from aecontrol.measuring import Meter, fit, load_array, measure_damage, measure_drift, meter_of
from aecontrol.session import config_of, read_events
from aecontrol.state import State
from aecontrol.types import ArrayRef


def verify_session(folder: Path) -> dict[str, Any]:
    """Check a session folder; nothing is exposed or changed.

    Returns ``decisions`` (how many), ``identical`` (how many the policy takes again), ``differences`` (what is not
    as it should be: another decision, a ledger that disagrees, an array that is gone) and ``notes`` (exposures
    that were charged in full because a crash interrupted them). Raises StorageFault when the journal itself is damaged.
    """
    events = read_events(folder)
    config = config_of(events)
    policy, meter = config.policy, meter_of(config.plan, "cpu")
    state = begin(events[0])
    decisions = identical = 0
    differences: list[str] = []
    for event in events[1:]:
        if isinstance(event, Decided):
            command = next_command(state)
            again = None
            if isinstance(command, Decide):
                again = policy.decide(command.history, command.candidates, state.seed)
            elif isinstance(command, FollowPlan):
                again = command.scan
            decisions += 1
            if again == event.decision:
                identical += 1
            else:
                differences.append(
                    f"{step_text(event.step)}: the policy now decides {_short(again)}, not {_short(event.decision)}"
                )
        if isinstance(event, DriftMeasured):
            differences += _drift(folder, event, state)
        if isinstance(event, DamageMeasured):
            differences += _damage(folder, event, state, meter)
        if isinstance(event, ResponseFitted):
            differences += _response(folder, event, state, meter)
        state = apply(state, event)
    differences += compare_ledgers(folder, state)
    differences += _arrays(folder, events)
    notes = [
        f"{step_text(r.step)}: exposure {r.key[:12]} was interrupted and charged in full "
        f"({r.charge.electrons if r.charge.electrons is not None else r.charge.pixels}); "
        + ("its frame was saved" if r.digests else "its frame was lost")
        for r in state.keys.values()
        if r.state == "INDET"
    ]
    return {"decisions": decisions, "identical": identical, "differences": differences, "notes": notes}


def _short(decision: Any) -> str:
    if decision is None:
        return "nothing"
    if decision.kind == "stop":
        return f"stop ({decision.reason})"
    x, y = decision.regions[0].center_nm
    return f"({x:.3f}, {y:.3f}) nm"


def _drift(folder: Path, event: DriftMeasured, state: State) -> Iterator[str]:
    """Whether the stored frames still say what was made of them, to within a tenth of a standard deviation."""
    command = next_command(state)
    try:
        again = measure_drift(folder, command, state) if isinstance(command, MeasureDrift) else None
    except StorageFault:
        return  # damaged frames are reported with the other arrays
    off = 0.0 if again is None else math.dist(again.shift_nm, event.shift_nm)
    if again is None or again.accepted != event.accepted or off > 0.1 * event.sigma_nm + 1e-9:
        yield f"{step_text(state.intent)}: its frame does not show the shift that was recorded"


def _damage(folder: Path, event: DamageMeasured, state: State, meter: Meter | None) -> Iterator[str]:
    """Whether the stored frames still say what was made of them, to within a tenth of a standard deviation."""
    command = next_command(state)
    if meter is None or meter.version != event.metric or not isinstance(command, MeasureDamage):
        yield f"{step_text(state.intent)}: damage was measured by {event.metric}, which is not what is installed"
        return
    try:
        again = measure_damage(folder, command, state, meter)
    except StorageFault:
        return  # damaged frames are reported with the other arrays
    off = abs((again.mean or 0.0) - (event.mean or 0.0))
    if (again.mean is None) != (event.mean is None) or off > 0.1 * (event.sd or 0.0) + 1e-9:
        yield f"{step_text(state.intent)}: its frame does not show the damage that was recorded"


def _response(folder: Path, event: ResponseFitted, state: State, meter: Meter | None) -> Iterator[str]:
    """Whether the stored readings still give the response that was charged by: its median critical fluences to within
    half their spread, which another stream of random numbers does not explain."""
    if meter is None or meter.version != state.metric:
        return  # said of every measurement; another metric has other errors
    try:
        again = fit(folder, state, meter)
    except StorageFault:
        return  # damaged arrays are reported with the others
    ours, theirs = (np.log(r.response.critical_fluence_e_per_A2) for r in (again, event))
    off = np.abs(np.median(ours, axis=1) - np.median(theirs, axis=1))
    if again.measurements != event.measurements or (off > 0.5 * theirs.std(axis=1) + 1e-9).any():
        yield f"{step_text(state.intent)}: what was measured does not give the response that was recorded"


def compare_ledgers(folder: Path, state: State) -> Iterator[str]:
    """Differences between the controller's ledger and the instrument's own, entry by entry. What other controllers
    exposed on the same specimen is theirs to compare."""
    path = folder / "instrument" / "ledger.sqlite"
    if not path.is_file():
        if state.keys:
            yield "the instrument's ledger is not here to be compared"
        return
    name = path.with_name("controller")  # of a bridge, whose ledger holds every session on this specimen
    ours = name.read_text() if name.is_file() else ""
    last: dict[str, LedgerRecord] = {}
    foreign: set[str] = set()
    for body in read_journal(path):
        line = LedgerRecord.model_validate_json(body)
        if line.key is not None:
            last[line.key] = line
            if line.session and line.session != ours:
                foreign.add(line.key)
    for key, record in state.keys.items():
        theirs = last.pop(key, None)
        if record.state == "RESERVED":
            continue  # not yet settled: charged at its bound here, whatever the instrument says
        if theirs is None or theirs.kind != record.state or theirs.measured != record.measured:
            said = "nothing" if theirs is None else theirs.kind
            where = f"{step_text(record.step)}: this ledger says {record.state} for {key[:12]}"
            yield f"{where}, the instrument's says {said}"
    for key, line in last.items():
        if line.kind != "VOID" and key not in foreign:
            yield f"the instrument's ledger has {line.kind} for {key[:12]}, which was never reserved here"
    totals = Totals()
    for record in state.keys.values():
        totals = totals.plus(record.charge)
    if (totals.electrons, totals.pixels) != (state.charged.electrons, state.charged.pixels):
        yield f"the charges add up to {totals.electrons} electrons, the state says {state.charged.electrons}"


def _arrays(folder: Path, events: list[SessionEvent]) -> Iterator[str]:
    """Stored arrays that are missing or damaged."""
    for ref in {ref.path: ref for event in events for ref in _refs(event)}.values():
        try:
            load_array(folder, ref)
        except StorageFault as error:
            yield error.what


def _refs(event: SessionEvent) -> Iterator[ArrayRef]:
    if isinstance(event, Recorded):
        yield from event.frame.channels.values()
    if isinstance(event, DamageMeasured) and event.scores is not None:
        yield event.scores
    if isinstance(event, Perceived | Reembedded):
        for o in event.observations:
            yield from (ref for ref in (o.atoms, o.patches, o.patch_atoms, o.latents) if ref is not None)
