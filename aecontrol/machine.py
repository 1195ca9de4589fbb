"""The pure core: ``state = apply(state, event)`` and ``command = next_command(state)``. No clock, disk or beam.

Phases: new -> overview -> ready -> decided -> reserved -> exposed -> recorded -> (learning) -> ready ... -> stopped;
paused from any of them. Step 0 is the overview; sub-scans count up from 1, measurements of drift down from -1.

Where the plan follows drift, a decision that is about to be carried out waits (``Drift.waiting``) while the reference
region is scanned: decided -> decided (drift) -> reserved -> exposed -> recorded -> decided, with the shift known anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from aecontrol.commands import (
    Command,
    Decide,
    Expose,
    Fetch,
    Finish,
    FollowPlan,
    Identify,
    Learn,
    MeasureDrift,
    Perceive,
    Reembed,
    Refuse,
    Reserve,
    Settle,
)
from aecontrol.dose import TileMap, Totals, bound_charge, over_budget, over_limits
from aecontrol.errors import AecontrolError, BadInput
from aecontrol.events import (
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
    Resumed,
    SessionEvent,
    SessionStarted,
    Stopped,
    Voided,
)
from aecontrol.exposure import KeyRecord, Outcome, make_key, settle
from aecontrol.protocols import History
from aecontrol.scoring import merge_duplicates
from aecontrol.types import (
    Atom,
    Capabilities,
    Charge,
    DriftPlan,
    Explanation,
    Frame,
    Observation,
    OverviewPlan,
    Plan,
    Scan,
    ScanPlan,
    ScanRegion,
    Stop,
    WindowPlan,
)

Phase = Literal[
    "new",
    "overview",
    "ready",
    "decided",
    "reserved",
    "exposed",
    "recorded",
    "learning",
    "reembedding",
    "paused",
    "stopped",
]
MAX_REFUSALS = 3  # decisions refused, or shots voided, in a row before the session stops as unsafe
MAX_UNMEASURED = 2  # measurements of drift in a row that told nothing before the session pauses
MAX_BAD_FRAMES = 3  # unusable frames in a row before the session pauses (SAFETY 6)


# ---------------------------------------------------------------- state


@dataclass(frozen=True)
class ScanRecord:
    """One perceived sub-scan."""

    step: int
    candidate: int
    key: str
    observation: Observation


@dataclass(frozen=True)
class Drift:
    """Where the specimen is, as far as that has been measured."""

    shift_nm: tuple[float, float] = (0.0, 0.0)  # how far it had moved in the instrument's field when last measured
    rate_nm: tuple[float, float] | None = None  # and how far it moved from one exposure to the next before that
    reference: str = ""  # key of the first frame of the reference region; empty: there is none yet
    since: int = 0  # exposures since the last accepted measurement, others of the reference region among them
    stale: bool = False  # nobody knows how much time has passed since then
    fresh: bool = True  # no time has passed since the last exposure but what its frame took to be read
    begun: int = 0  # measurements that were decided
    unmeasured: int = 0  # of those, how many in a row told nothing
    reason: str = ""  # why the last one did not
    waiting: tuple[int, int, Scan] | None = None  # step, attempt and decision to go back to

    @property
    def expected_nm(self) -> tuple[float, float]:
        """Where the specimen will be at the next exposure if it goes on moving as it did."""
        if self.rate_nm is None:
            return self.shift_nm
        steps = self.since + 1
        return self.shift_nm[0] + steps * self.rate_nm[0], self.shift_nm[1] + steps * self.rate_nm[1]


@dataclass(frozen=True)
class State:
    """A fold of the journal."""

    session: str
    seed: int
    plan: Plan
    phase: Phase = "new"
    resting: Phase = "new"  # where a paused session goes on
    capabilities: Capabilities | None = None
    perceiver: str = ""
    candidates: tuple[ScanRegion, ...] = ()
    step: int = 0  # the last overview or sub-scan that was decided
    intent: int = 0  # the step that is being carried out: this one, or a measurement of drift (< 0) before it
    attempt: int = 0
    decision: Scan | None = None
    current: str = ""
    unsettled: bool = False  # a new process took over while a key was reserved
    keys: Mapping[str, KeyRecord] = field(default_factory=dict)
    frames: Mapping[str, Frame] = field(default_factory=dict)
    charged: Totals = Totals()
    tiles: TileMap | None = None
    drift: Drift = Drift()
    decisions: tuple[Decided, ...] = ()
    closed: frozenset[int] = frozenset()  # candidates that must not be exposed (again)
    overview: tuple[Observation, ...] = ()
    scans: tuple[ScanRecord, ...] = ()
    embedding: str | None = None
    trained_on: int = 0
    refusals: int = 0
    bad_frames: int = 0
    alarm: str = ""
    stopped: Stopped | None = None
    paused: str = ""

    @property
    def tile_map(self) -> TileMap:
        """The areal ledger (empty before the instrument is known)."""
        assert self.tiles is not None
        return self.tiles

    @property
    def bounded(self) -> Capabilities:
        """The instrument as its bounds are computed: with the drift that the plan allows for."""
        assert self.capabilities is not None
        return self.capabilities if self.plan.drift is None else self.capabilities.held(self.plan.drift.limit_nm)

    def found(self) -> tuple[Atom, ...]:
        """Target objects found in all sub-scans; the more confident of two within ``match_nm`` stands for both."""
        every = [atom for scan in self.scans for atom in scan.observation.found]
        kept = merge_duplicates(
            [(atom.x_nm, atom.y_nm) for atom in every] or np.empty((0, 2)),
            self.plan.match_nm,
            [atom.confidence for atom in every],
        )
        return tuple(every[index] for index in kept)


def overview_region(plan: OverviewPlan, field_nm: tuple[float, float], margin_nm: float = 0.0) -> ScanRegion:
    """The overview as a region; by default it covers the whole field but for a margin."""
    return ScanRegion(
        center_nm=plan.center_nm or (field_nm[0] / 2, field_nm[1] / 2),
        fov_nm=plan.fov_nm or (field_nm[0] - 2 * margin_nm, field_nm[1] - 2 * margin_nm),
        shape=plan.shape,
        dwell_time_s=plan.dwell_time_s,
    )


def reference_region(plan: DriftPlan) -> ScanRegion:
    """The region by which drift is measured."""
    return ScanRegion(center_nm=plan.center_nm, fov_nm=plan.fov_nm, shape=plan.shape, dwell_time_s=plan.dwell_time_s)


def candidate_grid(plan: ScanPlan, field_nm: tuple[float, float], margin_nm: float = 0.0) -> tuple[ScanRegion, ...]:
    """All sub-scans that a policy may choose: the grid of each kind of window, one after the other. Raises BadInput when
    a window is larger than the field, or two kinds are the same."""
    grids = [_windows(kind, field_nm, margin_nm) for kind in plan.kinds]
    every = tuple(dict.fromkeys(region for grid in grids for region in grid))
    if len(every) < sum(len(grid) for grid in grids):
        raise BadInput("scan.choices: two kinds of windows cover the same places alike", "leave one of them out")
    return every


def _windows(plan: WindowPlan, field_nm: tuple[float, float], margin_nm: float) -> tuple[ScanRegion, ...]:
    """Windows of one kind, row by row from the top-left corner of the field less a margin.

    The grid starts flush with the corner; when the stride does not divide the field, the last column and row are moved
    back flush with the far edge. Raises BadInput when the window is larger than the field.
    """
    field_nm = (field_nm[0] - 2 * margin_nm, field_nm[1] - 2 * margin_nm)
    for side, name in ((0, "width"), (1, "height")):
        if plan.fov_nm[side] > field_nm[side] * (1 + 1e-9):
            less = f" less drift.margin_nm {margin_nm:g} nm on both sides" if margin_nm else ""
            raise BadInput(
                f"scan.fov_nm {name} {plan.fov_nm[side]:g} nm is larger than the field{less}, {field_nm[side]:g} nm",
                "make the sub-scan smaller or the field larger",
            )
    stride = plan.stride_nm or plan.fov_nm

    def starts(side: int) -> list[float]:
        free = field_nm[side] - plan.fov_nm[side]
        count = math.floor(free / stride[side] + 1e-9) + 1
        positions = [k * stride[side] for k in range(count)]
        if free - positions[-1] > 1e-6:
            positions.append(free)
        return positions

    return tuple(
        ScanRegion(
            center_nm=(x + margin_nm + plan.fov_nm[0] / 2, y + margin_nm + plan.fov_nm[1] / 2),
            fov_nm=plan.fov_nm,
            shape=plan.shape,
            dwell_time_s=plan.dwell_time_s,
        )
        for y in starts(1)
        for x in starts(0)
    )


def refusal(state: State, region: ScanRegion, bound: Charge, before_s: float = 0.0) -> str | None:
    """The guard: why ``region`` must not be exposed now, or None. It holds whatever a policy says. ``before_s``: time
    that will be charged before the exposure can begin."""
    assert state.capabilities is not None
    return over_limits(region, state.capabilities) or over_budget(
        region, bound, state.plan.budget, state.charged, state.tile_map, before_s
    )


def preflight(plan: Plan, capabilities: Capabilities) -> None:
    """Raise BadInput for a plan that this instrument cannot carry out within its budget, before any dose."""
    if plan.drift is not None and capabilities.pixel_size_nm is not None:
        raise BadInput("drift cannot be followed on a record, whose pixels stand still", "leave out the table [drift]")
    state = State(session="", seed=0, plan=plan, capabilities=capabilities)
    state = replace(state, tiles=TileMap.of(state.bounded))
    candidate_grid(plan.scan, capabilities.field_nm, plan.margin_nm)
    grids = [_windows(kind, capabilities.field_nm, plan.margin_nm) for kind in plan.scan.kinds]
    regions = [("sub-scan", grid[0]) for grid in grids]
    if plan.overview is not None:
        regions.insert(0, ("overview", overview_region(plan.overview, capabilities.field_nm, plan.margin_nm)))
    if plan.drift is not None:
        regions.insert(0, ("drift's reference region", reference_region(plan.drift)))
    for name, region in regions:
        if reason := refusal(state, region, bound_charge(region, state.bounded), plan.decision_seconds):
            raise BadInput(f"the {name} cannot be taken: {reason}", f"change the {name}'s table or raise the budget")


# ---------------------------------------------------------------- what next


def history(state: State) -> History:
    """What the policy may know, folded from the journal, with the guard's mask over the candidates."""
    charges = _bounds(state.candidates, state.bounded)
    then = _once_measured(state)
    feasible = tuple(
        index not in state.closed and refusal(then, _now(state, region), charge, state.plan.decision_seconds) is None
        for index, (region, charge) in enumerate(zip(state.candidates, charges, strict=True))
    )
    return History(
        step=state.step + 1,
        overview=state.overview,
        scans=tuple(scan.observation for scan in state.scans),
        scanned=tuple(scan.candidate for scan in state.scans),
        feasible=feasible,
        charges=charges,
    )


def _now(state: State, region: ScanRegion) -> ScanRegion:
    """A region of the specimen as it must be scanned next: with the shift that is expected."""
    return region.model_copy(update={"shift_nm": state.drift.expected_nm})


def _drift_is_due(state: State) -> bool:
    """True when the next exposure must wait for a measurement of drift: the first two follow each other, for one does
    not tell how fast the specimen moves."""
    drift, plan = state.drift, state.plan.drift
    if plan is None:
        return False
    return drift.rate_nm is None or drift.stale or drift.unmeasured > 0 or drift.since >= plan.every


def _once_measured(state: State) -> State:
    """The state as a measurement of drift, where it is due before the next exposure, would leave it at most charged."""
    if state.plan.drift is None or not _drift_is_due(state):
        return state
    region = reference_region(state.plan.drift)
    bound = bound_charge(region, state.bounded)
    tiles = state.tile_map.add(region, bound.peak_fluence_e_per_A2 or 0.0)
    return replace(state, charged=state.charged.plus(bound, state.plan.decision_seconds), tiles=tiles)


@lru_cache(maxsize=4)
def _bounds(candidates: tuple[ScanRegion, ...], capabilities: Capabilities) -> tuple[Charge, ...]:
    return tuple(bound_charge(region, capabilities) for region in candidates)


def next_command(state: State) -> Command | None:
    """What to do next; None when the session is over or waits for a person."""
    if state.phase in ("stopped", "paused"):
        return None
    if state.unsettled:
        return Settle(state.keys[state.current])
    if state.alarm:
        return Finish(Stopped(cause="safety", reason=state.alarm))
    match state.phase:
        case "new":
            return Identify()
        case "overview":
            return _take_overview(state)
        case "ready":
            return _when_ready(state)
        case "decided":
            return _when_decided(state)
        case "reserved":
            return Expose(state.keys[state.current])
        case "exposed":
            return Fetch(state.keys[state.current])
        case "recorded":
            return _when_recorded(state)
        case "learning":
            return Learn(tuple(scan.observation for scan in state.scans), tuple(scan.key for scan in state.scans))
        case "reembedding":
            assert state.embedding is not None
            return Reembed(tuple(s.observation for s in state.scans), state.embedding, state.trained_on)
    raise AecontrolError(f"no rule for phase {state.phase!r}")


def _take_overview(state: State) -> FollowPlan:
    assert state.capabilities is not None
    assert state.plan.overview is not None
    region = overview_region(state.plan.overview, state.capabilities.field_nm, state.plan.margin_nm)
    why = "first a cheap look at the whole field"
    return FollowPlan(0, Scan(regions=(region,), role="overview", explanation=Explanation(policy="overview", why=why)))


def _follow_drift(state: State, plan: DriftPlan) -> FollowPlan | Finish:
    """Scan the reference region; or say why that cannot go on."""
    drift = state.drift
    if drift.unmeasured >= MAX_UNMEASURED:
        return Finish(Paused(reason=f"drift could not be measured {drift.unmeasured} times in a row: {drift.reason}"))
    if state.refusals >= MAX_REFUSALS:
        return Finish(Stopped(cause="safety", reason=f"{state.refusals} exposures in a row could not be carried out"))
    region = reference_region(plan)
    if reason := over_limits(_now(state, region), state.bounded):
        return Finish(Paused(reason=f"the reference region has drifted out of reach: {reason}"))
    bound = bound_charge(region, state.bounded)
    if reason := refusal(state, _now(state, region), bound, state.plan.decision_seconds):
        return Finish(Stopped(cause="budget", reason=f"drift cannot be measured any more: {reason}"))
    why = "the reference to which later scans of this region are compared"
    if drift.reference:
        why = f"exposures since drift was measured: {drift.since}"
        why = "how fast the specimen moves is not known yet" if drift.rate_nm is None else why
        why = "time has passed since drift was measured" if drift.stale else why
    explanation = Explanation(policy="drift", why=why)
    return FollowPlan(-(drift.begun + 1), Scan(regions=(region,), role="drift", explanation=explanation))


def _when_ready(state: State) -> Command:
    rules = state.plan.stop
    if state.refusals >= MAX_REFUSALS:
        return Finish(Stopped(cause="safety", reason=f"{state.refusals} decisions in a row could not be carried out"))
    if state.bad_frames >= MAX_BAD_FRAMES:
        return Finish(Paused(reason=f"{state.bad_frames} unusable frames in a row: look at the detector, then resume"))
    if rules.max_steps is not None and state.step >= rules.max_steps:
        return Finish(Stopped(cause="rule", reason=f"max_steps: {state.step} sub-scans were taken"))
    if rules.max_found is not None and (n := len(state.found())) >= rules.max_found:
        return Finish(Stopped(cause="rule", reason=f"max_found: {n} objects were found"))
    view = history(state)
    if not any(view.feasible):
        if len(state.closed) == len(state.candidates):
            return Finish(Stopped(cause="rule", reason="every candidate region has been visited"))
        reach = "the remaining budget" if state.plan.drift is None else "the remaining budget and the drifted field"
        return Finish(Stopped(cause="budget", reason=f"no unvisited region fits {reach}"))
    return Decide(state.step + 1, view, state.candidates)


def _when_decided(state: State) -> FollowPlan | Refuse | Reserve | Finish:
    if state.plan.drift is not None and state.intent >= 0 and _drift_is_due(state):
        return _follow_drift(state, state.plan.drift)
    region = _now(state, _decided_region(state))
    if _candidate(state, state.intent, region) in state.closed:
        return Refuse(state.intent, "this region was exposed already; a second look needs a new plan")
    bound = bound_charge(region, state.bounded)
    if reason := refusal(state, region, bound):
        return Refuse(state.intent, reason)
    key = make_key(state.session, state.intent, state.attempt, region, bound)
    return Reserve(Reserved(key=key, step=state.intent, attempt=state.attempt, region=region, bound=bound))


def _when_recorded(state: State) -> Perceive | MeasureDrift:
    record, frame = state.keys[state.current], state.frames[state.current]
    if record.step >= 0:
        return Perceive(record, frame)
    reference = state.drift.reference
    return MeasureDrift(record, frame, state.frames[reference] if reference else None)


def candidate_index(state: State, region: ScanRegion) -> int:
    """Index of ``region``, wherever it has drifted, among the candidates; -1 when it is none of them."""
    return _indices(state.candidates).get(region.model_copy(update={"shift_nm": (0.0, 0.0)}), -1)


def _candidate(state: State, step: int, region: ScanRegion) -> int:
    """Index of the candidate that a step exposes; -1 when it is none of them, as no measurement of drift is."""
    return candidate_index(state, region) if step >= 0 else -1


@lru_cache(maxsize=4)
def _indices(candidates: tuple[ScanRegion, ...]) -> Mapping[ScanRegion, int]:
    return {region: index for index, region in reversed(list(enumerate(candidates)))}


# ---------------------------------------------------------------- what happened


def begin(event: SessionEvent) -> State:
    """The state after the first event of a journal. Raises AecontrolError when it is another event."""
    if not isinstance(event, SessionStarted):
        raise AecontrolError(f"a journal begins with session_started, not {event.kind}")
    return State(session=event.session, seed=event.seed, plan=event.plan)


def apply(state: State, event: SessionEvent) -> State:
    """The state after one more event. Raises AecontrolError when the event cannot follow."""
    match event:
        case InstrumentReady():
            return replace(
                state,
                phase="overview" if state.plan.overview is not None else "ready",
                capabilities=event.capabilities,
                perceiver=event.perceiver,
                candidates=candidate_grid(state.plan.scan, event.capabilities.field_nm, state.plan.margin_nm),
                tiles=TileMap.of(replace(state, capabilities=event.capabilities).bounded),
            )
        case Resumed():
            return _apply_resumed(state)
        case Decided():
            return _apply_decided(state, event)
        case Refused():
            if state.intent == 0:
                return replace(state, phase="ready", alarm=f"the overview was refused: {event.reason}")
            return _give_up(state, closed=_candidate(state, state.intent, _decided_region(state)))
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


def fold(events: list[SessionEvent]) -> State:
    """The state that a whole journal describes."""
    state = begin(events[0])
    for event in events[1:]:
        state = apply(state, event)
    return state


def _decided_region(state: State) -> ScanRegion:
    assert state.decision is not None
    return state.decision.regions[0]


def _apply_resumed(state: State) -> State:
    phase, bad_frames, drift = state.phase, state.bad_frames, replace(state.drift, stale=True, fresh=False)
    if phase == "paused":  # a person has looked, so the counts start anew
        phase, bad_frames, drift = state.resting, 0, replace(drift, unmeasured=0)
    unsettled = phase == "reserved"
    return replace(state, phase=phase, unsettled=unsettled, paused="", bad_frames=bad_frames, drift=drift)


def _apply_decided(state: State, event: Decided) -> State:
    charged = replace(state.charged, seconds=state.charged.seconds + state.plan.decision_seconds)
    step = event.step
    if step < 0:
        assert state.decision is not None
        waiting = (state.intent, state.attempt, state.decision)
        state = replace(state, drift=replace(state.drift, begun=-step, waiting=waiting))
        step = state.step
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
    return _go_back(state) if state.intent < 0 else replace(state, phase="ready")


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


def _apply_exposure(state: State, event: Reserved | Posted | Voided | Indeterminate) -> State:
    if isinstance(event, Reserved):
        record = KeyRecord(
            key=event.key, step=event.step, attempt=event.attempt, region=event.region, bound=event.bound
        )
        if event.key in state.keys:
            raise AecontrolError(f"key {event.key[:12]} is reserved twice")
        tiles = state.tile_map.add(event.region, event.bound.peak_fluence_e_per_A2 or 0.0)
        # the candidate is closed from here on: whatever becomes of the key, only this intent may still expose it
        index = _candidate(state, event.step, event.region)
        closed = state.closed | ({index} if index >= 0 else set())
        return _with_record(replace(state, phase="reserved", current=event.key, tiles=tiles, closed=closed), record)
    if event.key != state.current:
        raise AecontrolError(f"key {event.key[:12]} is settled, but {state.current[:12]} is the open one")
    record = settle(state.keys[event.key], outcome_of(event))
    fresh = not state.unsettled
    state = _with_record(replace(state, unsettled=False), record)
    if isinstance(event, Voided):
        index = _candidate(state, record.step, record.region)
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
    return replace(state, keys=keys, charged=charged)


def _apply_perceived(state: State, event: Perceived) -> State:
    record = state.keys[event.key]
    if record.step == 0:
        return replace(state, phase="ready", overview=event.observations)
    scans = state.scans
    if event.observations:
        index = candidate_index(state, record.region)
        scans = (*scans, ScanRecord(record.step, index, event.key, event.observations[0]))
    state = replace(state, phase="ready", scans=scans)
    if state.embedding is None and 0 < state.plan.learn_patches <= _patch_count(scans):
        return replace(state, phase="learning")
    return state


def _patch_count(scans: tuple[ScanRecord, ...]) -> int:
    return sum(scan.observation.patches.shape[0] for scan in scans if scan.observation.patches is not None)
