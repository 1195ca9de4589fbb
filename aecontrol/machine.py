"""The pure core: ``state = apply(state, event)`` and ``command = next_command(state)``. No clock, disk or beam.

Phases: new -> overview -> ready -> decided -> reserved -> exposed -> recorded -> (learning) -> ready ... -> stopped;
paused from any of them. Step 0 is the overview; sub-scans count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from aecontrol.dose import TileMap, Totals, bound_charge, over_budget, over_limits
from aecontrol.errors import AecontrolError, BadInput
from aecontrol.events import (
    Decided,
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
    Explanation,
    Frame,
    Observation,
    OverviewPlan,
    Plan,
    Scan,
    ScanPlan,
    ScanRegion,
    Stop,
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
MAX_BAD_FRAMES = 3  # unusable frames in a row before the session pauses (SAFETY 6)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Identify:
    """Ask instrument and perceiver what they are."""


@dataclass(frozen=True)
class TakeOverview:
    """Plan the overview (step 0)."""

    scan: Scan


@dataclass(frozen=True)
class Decide:
    """Ask the policy."""

    step: int
    history: History
    candidates: tuple[ScanRegion, ...]


@dataclass(frozen=True)
class Refuse:
    """Record that the guard turned a decision down."""

    step: int
    reason: str


@dataclass(frozen=True)
class Reserve:
    """Charge an exposure at its bound, durably, before anything is sent."""

    event: Reserved


@dataclass(frozen=True)
class Expose:
    """Fire a reserved key."""

    record: KeyRecord


@dataclass(frozen=True)
class Settle:
    """Ask what became of a key that an earlier process reserved; never fires."""

    record: KeyRecord


@dataclass(frozen=True)
class Fetch:
    """Bring the frame of a settled key into the session folder."""

    record: KeyRecord


@dataclass(frozen=True)
class Perceive:
    """Read a recorded frame."""

    record: KeyRecord
    frame: Frame


@dataclass(frozen=True)
class Learn:
    """Train the embedding on the sub-scans so far."""

    observations: tuple[Observation, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Reembed:
    """Encode all earlier sub-scans with the new embedding."""

    observations: tuple[Observation, ...]
    embedding: str
    trained_on: int


@dataclass(frozen=True)
class Finish:
    """End or pause the session."""

    event: Stopped | Paused


Command = (
    Identify | TakeOverview | Decide | Refuse | Reserve | Expose | Settle | Fetch | Perceive | Learn | Reembed | Finish
)


# ---------------------------------------------------------------- state


@dataclass(frozen=True)
class ScanRecord:
    """One perceived sub-scan."""

    step: int
    candidate: int
    key: str
    observation: Observation


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
    step: int = 0
    attempt: int = 0
    decision: Scan | None = None
    current: str = ""
    unsettled: bool = False  # a new process took over while a key was reserved
    keys: Mapping[str, KeyRecord] = field(default_factory=dict)
    frames: Mapping[str, Frame] = field(default_factory=dict)
    charged: Totals = Totals()
    tiles: TileMap | None = None
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

    def found(self) -> tuple[Atom, ...]:
        """Target objects found in all sub-scans; the more confident of two within ``match_nm`` stands for both."""
        every = [atom for scan in self.scans for atom in scan.observation.found]
        kept = merge_duplicates(
            [(atom.x_nm, atom.y_nm) for atom in every] or np.empty((0, 2)),
            self.plan.match_nm,
            [atom.confidence for atom in every],
        )
        return tuple(every[index] for index in kept)


def overview_region(plan: OverviewPlan, field_nm: tuple[float, float]) -> ScanRegion:
    """The overview as a region; by default it covers the whole field."""
    return ScanRegion(
        center_nm=plan.center_nm or (field_nm[0] / 2, field_nm[1] / 2),
        fov_nm=plan.fov_nm or field_nm,
        shape=plan.shape,
        dwell_time_s=plan.dwell_time_s,
    )


def candidate_grid(plan: ScanPlan, field_nm: tuple[float, float]) -> tuple[ScanRegion, ...]:
    """All sub-scans that a policy may choose, row by row from the top-left corner.

    The grid starts flush with the corner; when the stride does not divide the field, the last column and row are moved
    back flush with the far edge. Raises BadInput when the window is larger than the field.
    """
    for side, name in ((0, "width"), (1, "height")):
        if plan.fov_nm[side] > field_nm[side] * (1 + 1e-9):
            raise BadInput(
                f"scan.fov_nm {name} {plan.fov_nm[side]:g} nm is larger than the field, {field_nm[side]:g} nm",
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
            center_nm=(x + plan.fov_nm[0] / 2, y + plan.fov_nm[1] / 2),
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
    state = State(session="", seed=0, plan=plan, capabilities=capabilities, tiles=TileMap.of(capabilities))
    regions = [("sub-scan", region) for region in candidate_grid(plan.scan, capabilities.field_nm)[:1]]
    if plan.overview is not None:
        regions.insert(0, ("overview", overview_region(plan.overview, capabilities.field_nm)))
    for name, region in regions:
        if reason := refusal(state, region, bound_charge(region, capabilities), plan.decision_seconds):
            raise BadInput(f"the {name} cannot be taken: {reason}", f"change the {name}'s table or raise the budget")


# ---------------------------------------------------------------- what next


def history(state: State) -> History:
    """What the policy may know, folded from the journal, with the guard's mask over the candidates."""
    assert state.capabilities is not None
    charges = _bounds(state.candidates, state.capabilities)
    feasible = tuple(
        index not in state.closed and refusal(state, region, charge, state.plan.decision_seconds) is None
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
            return Perceive(state.keys[state.current], state.frames[state.current])
        case "learning":
            return Learn(tuple(scan.observation for scan in state.scans), tuple(scan.key for scan in state.scans))
        case "reembedding":
            assert state.embedding is not None
            return Reembed(tuple(s.observation for s in state.scans), state.embedding, state.trained_on)
    raise AecontrolError(f"no rule for phase {state.phase!r}")


def _take_overview(state: State) -> TakeOverview:
    assert state.capabilities is not None
    assert state.plan.overview is not None
    region = overview_region(state.plan.overview, state.capabilities.field_nm)
    why = "first a cheap look at the whole field"
    return TakeOverview(Scan(regions=(region,), role="overview", explanation=Explanation(policy="overview", why=why)))


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
        return Finish(Stopped(cause="budget", reason="no unvisited region fits the remaining budget"))
    return Decide(state.step + 1, view, state.candidates)


def _when_decided(state: State) -> Refuse | Reserve:
    assert state.decision is not None
    assert state.capabilities is not None
    region = state.decision.regions[0]
    index = candidate_index(state, region)
    if index in state.closed:
        return Refuse(state.step, "this region was exposed already; a second look needs a new plan")
    bound = bound_charge(region, state.capabilities)
    if reason := refusal(state, region, bound):
        return Refuse(state.step, reason)
    key = make_key(state.session, state.step, state.attempt, region, bound)
    return Reserve(Reserved(key=key, step=state.step, attempt=state.attempt, region=region, bound=bound))


def candidate_index(state: State, region: ScanRegion) -> int:
    """Index of ``region`` among the candidates, -1 when it is none of them."""
    return _indices(state.candidates).get(region, -1)


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
                candidates=candidate_grid(state.plan.scan, event.capabilities.field_nm),
                tiles=TileMap.of(event.capabilities),
            )
        case Resumed():
            phase = state.resting if state.phase == "paused" else state.phase
            # a person has looked, so the count of bad frames starts anew
            bad_frames = 0 if state.phase == "paused" else state.bad_frames
            return replace(state, phase=phase, unsettled=phase == "reserved", paused="", bad_frames=bad_frames)
        case Decided():
            return _apply_decided(state, event)
        case Refused():
            if state.step == 0:
                return replace(state, phase="ready", alarm=f"the overview was refused: {event.reason}")
            return _give_up(state, closed=candidate_index(state, _decided_region(state)))
        case Reserved() | Posted() | Voided() | Indeterminate():
            return _apply_exposure(state, event)
        case Recorded():
            frames = {**state.frames, event.key: event.frame}
            bad = 0 if event.frame.usable else state.bad_frames + 1
            return replace(state, phase="recorded", frames=frames, bad_frames=bad)
        case Perceived():
            return _apply_perceived(state, event)
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


def _apply_decided(state: State, event: Decided) -> State:
    charged = replace(state.charged, seconds=state.charged.seconds + state.plan.decision_seconds)
    state = replace(state, decisions=(*state.decisions, event), step=event.step, attempt=0, charged=charged)
    if isinstance(event.decision, Stop):
        stop = Stopped(cause="policy", reason=event.decision.reason)
        return replace(state, phase="stopped", stopped=stop, decision=None)
    return replace(state, phase="decided", decision=event.decision)


def _give_up(state: State, closed: int = -1) -> State:
    """Leave the current step without a frame; its candidate is not offered again."""
    return replace(
        state, phase="ready", refusals=state.refusals + 1, closed=state.closed | ({closed} if closed >= 0 else set())
    )


def _apply_exposure(state: State, event: Reserved | Posted | Voided | Indeterminate) -> State:
    if isinstance(event, Reserved):
        record = KeyRecord(
            key=event.key, step=event.step, attempt=event.attempt, region=event.region, bound=event.bound
        )
        if event.key in state.keys:
            raise AecontrolError(f"key {event.key[:12]} is reserved twice")
        tiles = state.tile_map.add(event.region, event.bound.peak_fluence_e_per_A2 or 0.0)
        # the candidate is closed from here on: whatever becomes of the key, only this intent may still expose it
        index = candidate_index(state, event.region)
        closed = state.closed | ({index} if index >= 0 else set())
        return _with_record(replace(state, phase="reserved", current=event.key, tiles=tiles, closed=closed), record)
    if event.key != state.current:
        raise AecontrolError(f"key {event.key[:12]} is settled, but {state.current[:12]} is the open one")
    record = settle(state.keys[event.key], outcome_of(event))
    state = _with_record(replace(state, unsettled=False), record)
    if isinstance(event, Voided):
        index = candidate_index(state, record.region)
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
