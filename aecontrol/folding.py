"""The pure core, what happened: ``state = apply(state, event)``. No clock, disk or beam."""

from __future__ import annotations

from dataclasses import replace

from aecontrol.areas import AreaCharge, charge_within
from aecontrol.dose import TileMap, Totals
from aecontrol.errors import AecontrolError
from aecontrol.events import (
    DamageMeasured,
    Decided,
    DriftMeasured,
    Indeterminate,
    InstrumentReady,
    ModelUpdated,
    Paused,
    Perceived,
    Posted,
    Recorded,
    Reembedded,
    Refused,
    Reserved,
    ResponseFitted,
    Resumed,
    SessionEvent,
    SessionStarted,
    Stopped,
    Voided,
)
from aecontrol.exposure import KeyRecord, Outcome, settle
from aecontrol.harm import MOST_SACRIFICED, Harm, sacrificed_share
from aecontrol.state import (
    MAX_REFUSALS,
    ScanRecord,
    State,
    candidate_grid,
    candidate_index,
    candidate_of,
    first_look,
    frames_of,
)
from aecontrol.types import (
    DamagePlan,
    Scan,
    ScanRegion,
    Stop,
)


def begin(event: SessionEvent) -> State:
    """The state after the first event of a journal. Raises AecontrolError when it is another event."""
    if not isinstance(event, SessionStarted):
        raise AecontrolError(f"a journal begins with session_started, not {event.kind}")
    return State(session=event.session, seed=event.seed, plan=event.plan)


def apply(state: State, event: SessionEvent) -> State:
    """The state after one more event. Raises AecontrolError when the event cannot follow."""
    match event:
        case InstrumentReady():
            candidates = candidate_grid(state.plan.scan, event.capabilities.field_nm, state.plan.margin_nm)
            return replace(
                state,
                phase=state.rest,
                capabilities=event.capabilities,
                perceiver=event.perceiver,
                metric=event.metric,
                candidates=candidates,
                closed=_sacrificed(state.plan.damage, candidates),
                tiles=TileMap.of(replace(state, capabilities=event.capabilities).bounded),
                harm=Harm.of(state.plan, event.capabilities),
                areas=(AreaCharge(),) * len(state.plan.areas),
            )
        case Resumed():
            return _apply_resumed(state)
        case Decided():
            return _apply_decided(state, event)
        case Refused():
            if state.intent == 0:
                return replace(state, phase="ready", alarm=f"the overview was refused: {event.reason}")
            return _give_up(state, closed=candidate_of(state, state.intent, state.region))
        case Reserved() | Posted() | Voided() | Indeterminate():
            return _apply_exposure(state, event)
        case Recorded():
            frames = {**state.frames, event.key: event.frame}
            bad = 0 if event.frame.usable else state.bad_frames + 1
            return replace(state, phase="recorded", frames=frames, bad_frames=bad)
        case Perceived():
            return _apply_perceived(state, event)
        case DriftMeasured():
            return _apply_drift(state, event)
        case DamageMeasured():
            return _apply_damage(state, event)
        case ResponseFitted():
            assert state.harm is not None
            harm = state.harm.refitted(event.response, event.measurements, state.keys)
            return _rest(_with_harm(state, harm))
        case ModelUpdated():
            return replace(state, phase="reembedding", embedding=event.sha256, trained_on=len(event.frames))
        case Reembedded():
            scans = tuple(
                replace(scan, observation=new) for scan, new in zip(state.scans, event.observations, strict=True)
            )
            return replace(state, phase="ready", scans=scans)
        case Paused():
            return replace(state, phase="paused", resting=state.phase, paused=event.reason)
        case Stopped():
            return replace(state, phase="stopped", stopped=event)
    raise AecontrolError(f"event {event.kind} cannot follow in phase {state.phase}")


def _sacrificed(plan: DamagePlan | None, candidates: tuple[ScanRegion, ...]) -> frozenset[int]:
    """Candidates that are not offered because they lie in sacrificed places."""
    if plan is None:
        return frozenset()
    return frozenset(k for k, one in enumerate(candidates) if sacrificed_share(plan, one) > MOST_SACRIFICED)


def fold(events: list[SessionEvent]) -> State:
    """The state that a whole journal describes."""
    state = begin(events[0])
    for event in events[1:]:
        state = apply(state, event)
    return state


def _apply_resumed(state: State) -> State:
    phase, bad_frames, drift = state.phase, state.bad_frames, replace(state.drift, stale=True, fresh=False)
    if phase == "paused":  # a person has looked, so the counts start anew
        phase, bad_frames, drift = state.resting, 0, replace(drift, unmeasured=0)
    unsettled = phase == "reserved"
    harm = state.harm
    if harm is not None and state.paused == harm.alarm:  # an alarm that nobody was told of stands
        harm = replace(harm, alarm="")
    return replace(state, phase=phase, unsettled=unsettled, paused="", bad_frames=bad_frames, drift=drift, harm=harm)


def _apply_decided(state: State, event: Decided) -> State:
    charged = replace(state.charged, seconds=state.charged.seconds + state.plan.decision_seconds)
    step = event.step
    if step < 0:
        state, step = replace(state, asides=-step), state.step
    if isinstance(event.decision, Scan) and event.decision.role == "drift":
        assert state.decision is not None
        waiting = (state.intent, state.attempt, state.decision)
        state = replace(state, drift=replace(state.drift, waiting=waiting))
    state = replace(
        state, decisions=(*state.decisions, event), step=step, intent=event.step, attempt=0, charged=charged
    )
    if isinstance(event.decision, Stop):
        stop = Stopped(cause="policy", reason=event.decision.reason)
        return replace(state, phase="stopped", stopped=stop, decision=None)
    return replace(state, phase="decided", decision=event.decision)


def _give_up(state: State, closed: int = -1) -> State:
    """Leave the current step without a frame; its candidate is not offered again."""
    state = replace(state, refusals=state.refusals + 1, closed=state.closed | ({closed} if closed >= 0 else set()))
    return _go_back(state) if state.role == "drift" else _rest(state)


def _go_back(state: State) -> State:
    """From a measurement of drift to the decision that waited for it."""
    assert state.drift.waiting is not None
    intent, attempt, decision = state.drift.waiting
    drift = replace(state.drift, waiting=None)
    return replace(state, phase="decided", intent=intent, attempt=attempt, decision=decision, drift=drift)


def _apply_drift(state: State, event: DriftMeasured) -> State:
    drift = state.drift
    if event.accepted:
        rate, (x, y), (before_x, before_y) = drift.rate_nm, event.shift_nm, drift.shift_nm
        if drift.reference and not drift.stale:
            rate = (x - before_x) / drift.since, (y - before_y) / drift.since
        drift = replace(
            drift,
            shift_nm=event.shift_nm,
            rate_nm=rate,
            reference=drift.reference or event.key,
            since=0,
            stale=not drift.fresh,
            unmeasured=0,
        )
    else:
        drift = replace(drift, unmeasured=drift.unmeasured + 1, reason=event.reason)
    return _go_back(replace(state, drift=drift))


def _apply_damage(state: State, event: DamageMeasured) -> State:
    assert state.harm is not None
    return _rest(_with_harm(state, state.harm.measured(event, state.keys)))


def _apply_exposure(state: State, event: Reserved | Posted | Voided | Indeterminate) -> State:
    if isinstance(event, Reserved):
        record = KeyRecord(
            key=event.key, step=event.step, attempt=event.attempt, region=event.region, bound=event.bound
        )
        if event.key in state.keys:
            raise AecontrolError(f"key {event.key[:12]} is reserved twice")
        tiles = state.tile_map.add(event.region, event.bound.peak_fluence_e_per_A2 or 0.0)
        # the candidate is closed from here on: whatever becomes of the key, only this intent may still expose it
        index = candidate_of(state, event.step, event.region)
        closed = state.closed | ({index} if index >= 0 else set())
        return _with_record(replace(state, phase="reserved", current=event.key, tiles=tiles, closed=closed), record)
    if event.key != state.current:
        raise AecontrolError(f"key {event.key[:12]} is settled, but {state.current[:12]} is the open one")
    record = settle(state.keys[event.key], outcome_of(event))
    fresh = not state.unsettled
    state = _with_record(replace(state, unsettled=False), record)
    if isinstance(event, Voided):
        index = candidate_of(state, record.step, record.region)
        tiles = TileMap(state.tile_map.field_nm, error_nm=state.tile_map.error_nm)
        for live in state.keys.values():
            if live.state != "VOID":
                tiles = tiles.add(live.region, live.bound.peak_fluence_e_per_A2 or 0.0)
        state = replace(state, tiles=tiles, attempt=state.attempt + 1, closed=state.closed - {index})
        if state.attempt < MAX_REFUSALS:
            return replace(state, phase="decided")
        if record.step == 0:
            return replace(state, phase="ready", alarm=f"the instrument refused the overview: {event.reason}")
        return _give_up(state, closed=index)
    state = replace(state, drift=replace(state.drift, since=state.drift.since + 1, fresh=fresh))
    if record.overrun:
        alarm = f"DOSE_OVERRUN: {record.charge.electrons} electrons, {record.charge.pixels} pixels were delivered"
        state = replace(state, alarm=f"{alarm}; at most {record.bound.electrons}, {record.bound.pixels} were reserved")
    if not record.digests:
        return _give_up(state)
    return replace(state, phase="exposed", refusals=0)


def outcome_of(event: Posted | Voided | Indeterminate) -> Outcome:
    """The instrument's answer that an event records."""
    match event:
        case Posted():
            return Outcome(key=event.key, state="POST", measured=event.measured, digests=event.digests)
        case Voided():
            return Outcome(key=event.key, state="VOID", reason=event.reason)
        case Indeterminate():
            return Outcome(key=event.key, state="INDET", digests=event.digests, reason=event.reason)


def _with_record(state: State, record: KeyRecord) -> State:
    keys = {**state.keys, record.key: record}
    before = state.keys.get(record.key)
    old, new = (before.charge if before else None), record.charge
    charged = state.charged.plus(new)
    if old is not None:
        charged = Totals(
            electrons=charged.electrons - (old.electrons or 0),
            pixels=charged.pixels - old.pixels,
            damage=charged.damage - old.damage,
            seconds=charged.seconds - old.seconds,
        )
    assert state.capabilities is not None
    areas = []
    for area, spent in zip(state.plan.areas, state.areas, strict=True):
        spent = spent.plus(charge_within(record.scanned, new, area, state.bounded))
        areas.append(spent if old is None else spent.minus(charge_within(record.region, old, area, state.bounded)))
    state = replace(state, keys=keys, charged=charged, areas=tuple(areas))
    if state.harm is None or record.state == "RESERVED":
        return state
    return _with_harm(state, state.harm.settled(record))


def _with_harm(state: State, harm: Harm) -> State:
    """The state with what is known of damage, and so with what is charged for it; no key is open."""
    return replace(state, harm=harm, charged=replace(state.charged, damage=harm.total.damage))


def _rest(state: State) -> State:
    """Ready for the next step, once the response has been fitted and the embedding been trained if it is time for
    that: the response waits for all first frames of the references."""
    harm = state.harm
    if harm is not None and len(harm.usable) > harm.fitted and not _references_wait(state, harm.plan):
        return replace(state, phase="fitting")
    if state.embedding is None and 0 < state.plan.learn_patches <= _patch_count(state.scans):
        return replace(state, phase="learning")
    return replace(state, phase=state.rest)


def _references_wait(state: State, plan: DamagePlan) -> bool:
    """True while some of the first frames of the references are still to come."""
    return any(frames_of(state, place) < plan.exposures for place in plan.references)


def _apply_perceived(state: State, event: Perceived) -> State:
    record = state.keys[event.key]
    if record.step == 0:
        return replace(state, phase="ready", overview=event.observations)
    scans = state.scans
    if event.observations:
        index = candidate_index(state, record.region)
        scans = (*scans, ScanRecord(record.step, index, event.key, event.observations[0]))
    state = replace(state, scans=scans)
    if state.harm is not None and state.frames[event.key].usable and first_look(state, event.key) is not None:
        return replace(state, phase="measuring")
    return _rest(state)


def _patch_count(scans: tuple[ScanRecord, ...]) -> int:
    return sum(scan.observation.patches.shape[0] for scan in scans if scan.observation.patches is not None)
