"""The pure core, what next: ``command = next_command(state)``, and the guard. No clock, disk or beam.

Phases: new -> overview -> ready -> decided -> reserved -> exposed -> recorded -> (measuring -> fitting) -> (learning)
-> ready ... -> stopped; paused from any of them. Step 0 is the overview; sub-scans count up from 1, frames of the
references of drift and damage down from -1.

Where the plan follows drift, a decision that is about to be carried out waits (``Drift.waiting``) while the reference
region is scanned: decided -> decided (drift) -> reserved -> exposed -> recorded -> decided, with the shift known anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from aecontrol.areas import AreaCharge, charge_within, over_areas, same_names
from aecontrol.commands import (
    Command,
    Decide,
    Expose,
    Fetch,
    Finish,
    FitResponse,
    FollowPlan,
    Identify,
    Learn,
    MeasureDamage,
    MeasureDrift,
    Perceive,
    Reembed,
    Refuse,
    Reserve,
    Settle,
)
from aecontrol.dose import TileMap, bound_charge, over_budget, over_limits
from aecontrol.errors import AecontrolError, BadInput
from aecontrol.events import (
    Paused,
    Reserved,
    Stopped,
)
from aecontrol.exposure import make_key
from aecontrol.harm import Harm, reference_frame, same_place
from aecontrol.protocols import History
from aecontrol.state import (
    MAX_BAD_FRAMES,
    MAX_REFUSALS,
    MAX_UNMEASURED,
    State,
    candidate_grid,
    candidate_of,
    first_look,
    frames_of,
    overview_region,
    reference_region,
    windows,
)
from aecontrol.types import (
    Capabilities,
    Charge,
    DriftPlan,
    Explanation,
    Plan,
    ReferencePlan,
    Scan,
    ScanRegion,
)


def refusal(state: State, region: ScanRegion, bound: Charge, before_s: float = 0.0) -> str | None:
    """The guard: why ``region`` must not be exposed now, or None. It holds whatever a policy says. ``before_s``: time
    that will be charged before the exposure can begin."""
    assert state.capabilities is not None
    return (
        over_limits(region, state.capabilities)
        or over_budget(region, bound, state.plan.budget, state.charged, state.tile_map, before_s)
        or _over_areas(state, region, bound)
    )


def _over_areas(state: State, region: ScanRegion, bound: Charge) -> str | None:
    """Why an exposure does not fit the limits of the plan's areas, or None."""
    if not state.plan.areas:
        return None
    damage = [(0.0, 0.0)] * len(state.plan.areas)
    if state.harm is not None:
        reserved = state.harm.reserve_by_area(region, bound)
        damage = [(now, now + more) for now, more in zip(state.harm.total.by_area, reserved, strict=True)]
    return over_areas(region, bound, state.plan.areas, state.areas, damage, state.tile_map, state.bounded)


def bound_of(state: State, region: ScanRegion) -> Charge:
    """The most that an exposure can cost, and the damage to reserve for it."""
    bound = _bound(region, state.bounded)
    return bound if state.harm is None else _harming(bound, state.harm.reserve(region, bound))


def _harming(bound: Charge, damage: float) -> Charge:
    return bound.model_copy(update={"damage": damage, "damage_basis": "model"})


def preflight(plan: Plan, capabilities: Capabilities) -> None:
    """Raise BadInput for a plan that this instrument cannot carry out within its budget, before any dose."""
    if plan.drift is not None and capabilities.pixel_size_nm is not None:
        raise BadInput("drift cannot be followed on a record, whose pixels stand still", "leave out the table [drift]")
    state = State(session="", seed=0, plan=plan, capabilities=capabilities)
    state = replace(
        state,
        tiles=TileMap.of(state.bounded),
        harm=Harm.of(plan, capabilities),
        areas=(AreaCharge(),) * len(plan.areas),
    )
    _check_damage(plan, state)
    candidate_grid(plan.scan, capabilities.field_nm, plan.margin_nm)
    if plan.drift is not None:
        _check_one(state, "drift's reference region", reference_region(plan.drift))
    start = state
    if plan.damage is not None and plan.damage.references:
        for region in plan.damage.exposures * [reference_frame(plan.damage, place) for place in plan.damage.references]:
            _check_one(state, "reference place", region)
            state = _once_exposed(state, region, _bound(region, state.bounded))
        # by then the first guess of damage will be mended
        start, state = replace(start, harm=None), replace(state, harm=None)
    if plan.overview is not None:
        overview = overview_region(plan.overview, capabilities.field_nm, plan.margin_nm)
        _check_one(state, "overview", overview)
    for kind in plan.scan.kinds:
        grid = windows(kind, capabilities.field_nm, plan.margin_nm)
        _check_one(start, "sub-scan", _first_allowed(start, grid) if plan.areas else grid[0])


def _check_one(state: State, name: str, region: ScanRegion) -> None:
    """Raise BadInput when ``region`` cannot be exposed in this state."""
    if reason := refusal(state, region, bound_of(state, region), state.plan.decision_seconds):
        mend = "keep it away from the area, or give the area more" if " the area " in reason else "or raise the budget"
        raise BadInput(f"the {name} cannot be taken: {reason}", f"change the {name}'s table: {mend}")


def _first_allowed(state: State, grid: Sequence[ScanRegion]) -> ScanRegion:
    """The first window that can be exposed, if there is one: others may meet areas with limits of their own."""
    allowed = (region for region in grid if refusal(state, region, bound_of(state, region)) is None)
    return next(allowed, grid[0])


def _check_damage(plan: Plan, state: State) -> None:
    """Raise BadInput for wishes about damage and areas that contradict each other or the instrument."""
    assert state.capabilities is not None
    if names := ", ".join(same_names(plan.areas)):
        raise BadInput(f"more than one area is called {names}", "give every area a name of its own")
    field = state.capabilities.field_nm
    for area in plan.areas:
        away = np.abs(np.array(area.center_nm) - np.array(field) / 2)
        if (away >= (np.array(area.fov_nm) + np.array(field)) / 2).any():
            raise BadInput(
                f"the area {area.name!r} at {area.center_nm} nm lies outside the field of {field} nm",
                "move its center_nm into the field; nothing would be protected",
            )
    if plan.damage is None:
        if plan.budget.damage is not None or any(area.damage is not None for area in plan.areas):
            raise BadInput("a budget of damage is given, but damage is not measured", "add the table [damage]")
        return
    if state.capabilities.beam_current_pA is None:
        raise BadInput("damage cannot be charged where electrons are not counted", "leave out the table [damage]")
    places = [reference_frame(plan.damage, place) for place in plan.damage.references]
    frames = plan.damage.exposures * sum(_bound(place, state.bounded).electrons or 0 for place in places)
    if plan.budget.electrons is not None and frames > plan.damage.share * plan.budget.electrons:
        raise BadInput(
            f"damage.references take up to {frames} electrons in {plan.damage.exposures} frames each; "
            f"damage.share allows {plan.damage.share:g} of the budget, {plan.damage.share * plan.budget.electrons:.6g}",
            "make them smaller, fewer or shorter, or raise damage.share",
        )


def history(state: State) -> History:
    """What the policy may know, folded from the journal, with the guard's mask over the candidates."""
    charges = bounds = tuple(_bound(region, state.bounded) for region in state.candidates)
    if state.harm is not None:  # what is reserved goes back once an exposure is settled, what is expected does not
        both = [state.harm.outlook(region, bound) for region, bound in zip(state.candidates, bounds, strict=True)]
        charges = tuple(_harming(bound, expected) for bound, (_, expected) in zip(bounds, both, strict=True))
        bounds = tuple(_harming(bound, reserved) for bound, (reserved, _) in zip(bounds, both, strict=True))
    then = _once_measured(state)
    feasible = tuple(
        index not in state.closed and refusal(then, _now(state, region), bound, state.plan.decision_seconds) is None
        for index, (region, bound) in enumerate(zip(state.candidates, bounds, strict=True))
    )
    return History(
        step=state.step + 1,
        overview=state.overview,
        scans=tuple(scan.observation for scan in state.scans),
        scanned=tuple(scan.candidate for scan in state.scans),
        feasible=feasible,
        charges=charges,
        left=_left(state),
        validity=() if state.harm is None else tuple(state.harm.intact(region) for region in state.candidates),
    )


def _left(state: State) -> dict[str, float]:
    """Share of the budget that nothing is charged to yet, by currency."""
    budget, charged = state.plan.budget, state.charged
    pairs = {
        "electrons": (budget.electrons, charged.electrons),
        "pixels": (budget.pixels, charged.pixels),
        "damage": (budget.damage, charged.damage),
        "seconds": (budget.seconds, charged.seconds),
    }
    return {name: max(0.0, 1.0 - spent / limit) for name, (limit, spent) in pairs.items() if limit is not None}


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
    return _once_exposed(state, region, bound_of(state, region))


def _once_exposed(state: State, region: ScanRegion, bound: Charge) -> State:
    """The state as an exposure would leave it at most charged; what it harms is not yet known."""
    tiles = state.tile_map.add(region, bound.peak_fluence_e_per_A2 or 0.0)
    areas = tuple(
        spent.plus(charge_within(region, bound, area, state.bounded))
        for area, spent in zip(state.plan.areas, state.areas, strict=True)
    )
    charged = state.charged.plus(bound, state.plan.decision_seconds)
    return replace(state, charged=charged, tiles=tiles, areas=areas)


@lru_cache(maxsize=65536)
def _bound(region: ScanRegion, capabilities: Capabilities) -> Charge:
    return bound_charge(region, capabilities)


def next_command(state: State) -> Command | None:
    """What to do next; None when the session is over or waits for a person."""
    if state.phase in ("stopped", "paused"):
        return None
    if state.unsettled:
        return Settle(state.keys[state.current])
    if state.alarm:
        return Finish(Stopped(cause="safety", reason=state.alarm))
    if state.harm is not None and state.harm.alarm:
        return Finish(Paused(reason=state.harm.alarm))
    match state.phase:
        case "new":
            return Identify()
        case "overview":
            return _before_overview(state) or _take_overview(state)
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
        case "measuring":
            return _measure_damage(state)
        case "fitting":
            assert state.harm is not None
            return FitResponse(len(state.harm.usable))
        case "learning":
            return Learn(tuple(scan.observation for scan in state.scans), tuple(scan.key for scan in state.scans))
        case "reembedding":
            assert state.embedding is not None
            return Reembed(tuple(s.observation for s in state.scans), state.embedding, state.trained_on)
    raise AecontrolError(f"no rule for phase {state.phase!r}")


def _before_overview(state: State) -> Command | None:
    """What must be known before the whole field is exposed: what the beam does to it."""
    if state.refusals >= MAX_REFUSALS:
        return Finish(Stopped(cause="safety", reason=f"{state.refusals} exposures in a row could not be carried out"))
    if state.bad_frames >= MAX_BAD_FRAMES:
        return Finish(Paused(reason=f"{state.bad_frames} unusable frames in a row: look at the detector, then resume"))
    place = _due_reference(state)
    return None if place is None else _look_at(state, place)


def _take_overview(state: State) -> FollowPlan | Finish:
    """The overview; or the end, where the references have shown that the budget does not bear it."""
    assert state.capabilities is not None
    assert state.plan.overview is not None
    region = overview_region(state.plan.overview, state.capabilities.field_nm, state.plan.margin_nm)
    bound = bound_of(state, region)
    if reason := refusal(_once_measured(state), _now(state, region), bound, state.plan.decision_seconds):
        return Finish(Stopped(cause="budget", reason=f"the overview cannot be taken any more: {reason}"))
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
    bound = bound_of(state, region)
    if reason := refusal(state, _now(state, region), bound, state.plan.decision_seconds):
        return Finish(Stopped(cause="budget", reason=f"drift cannot be measured any more: {reason}"))
    why = "the reference to which later scans of this region are compared"
    if drift.reference:
        why = f"exposures since drift was measured: {drift.since}"
        why = "how fast the specimen moves is not known yet" if drift.rate_nm is None else why
        why = "time has passed since drift was measured" if drift.stale else why
    explanation = Explanation(policy="drift", why=why)
    return FollowPlan(-(state.asides + 1), Scan(regions=(region,), role="drift", explanation=explanation))


def _due_reference(state: State) -> ReferencePlan | None:
    """The sacrificed place to look at next: each as often as planned before the first decision, the one seen least
    first; later on one more after every so many sub-scans, as long as the budget bears it."""
    plan = state.plan.damage
    if plan is None or not plan.references:
        return None
    seen = [frames_of(state, place) for place in plan.references]
    place = plan.references[seen.index(min(seen))]
    if min(seen) < plan.exposures:
        return place
    since = 0
    for record in state.keys.values():
        if record.state != "VOID":
            since = 0 if _is_reference(state, record.region) else since + (record.step > 0)
    if not plan.every or since < plan.every:
        return None
    region = _now(state, reference_frame(plan, place))
    return None if refusal(state, region, bound_of(state, region), state.plan.decision_seconds) else place


def _is_reference(state: State, region: ScanRegion) -> bool:
    assert state.plan.damage is not None
    return any(same_place(region, reference_frame(state.plan.damage, place)) for place in state.plan.damage.references)


def _look_at(state: State, place: ReferencePlan) -> FollowPlan | Finish:
    """One more frame of a sacrificed place; or the end, where the budget does not bear it any more."""
    assert state.plan.damage is not None
    why = f"frame {frames_of(state, place) + 1} of the reference for {place.phase!r}: what the beam does to it"
    region = reference_frame(state.plan.damage, place)
    now = _now(state, region)
    if reason := refusal(state, now, bound_of(state, now), state.plan.decision_seconds):
        return Finish(Stopped(cause="budget", reason=f"the beam's damage cannot be measured any more: {reason}"))
    scan = Scan(regions=(region,), role="reference", explanation=Explanation(policy="damage", why=why))
    return FollowPlan(-(state.asides + 1), scan)


def _measure_damage(state: State) -> MeasureDamage:
    record, frame = state.keys[state.current], state.frames[state.current]
    first = first_look(state, state.current)
    if first is None:
        return MeasureDamage(record, frame, None, None)
    return MeasureDamage(record, frame, state.keys[first], state.frames[first])


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
    if reason := _harmed_too_much(state):
        return Finish(Stopped(cause="budget", reason=reason))
    if place := _due_reference(state):
        return _look_at(state, place)
    view = history(state)
    if not any(view.feasible):
        if len(state.closed) == len(state.candidates):
            return Finish(Stopped(cause="rule", reason="every candidate region has been visited"))
        reach = "the remaining budget" if state.plan.drift is None else "the remaining budget and the drifted field"
        return Finish(Stopped(cause="budget", reason=f"no unvisited region fits {reach}"))
    return Decide(state.step + 1, view, state.candidates)


def _harmed_too_much(state: State) -> str:
    """Why the damage ends the session now; empty when it does not."""
    plan, limit = state.plan.damage, state.plan.budget.damage
    if plan is None or limit is None or state.harm is None:
        return ""
    chance = state.harm.exceeds(limit)
    return f"damage exceeds {limit:g} nm^2 with a chance of {chance:.2f}" if chance >= plan.confidence else ""


def _when_decided(state: State) -> FollowPlan | Refuse | Reserve | Finish:
    if state.plan.drift is not None and state.role != "drift" and _drift_is_due(state):
        return _follow_drift(state, state.plan.drift)
    region = _now(state, state.region)
    if candidate_of(state, state.intent, region) in state.closed:
        return Refuse(state.intent, "this region was exposed already; a second look needs a new plan")
    bound = bound_of(state, region)
    if reason := refusal(state, region, bound):
        return Refuse(state.intent, reason)
    key = make_key(state.session, state.intent, state.attempt, region, bound)
    return Reserve(Reserved(key=key, step=state.intent, attempt=state.attempt, region=region, bound=bound))


def _when_recorded(state: State) -> Perceive | MeasureDrift | MeasureDamage:
    record, frame = state.keys[state.current], state.frames[state.current]
    if state.role == "reference":
        return _measure_damage(state)
    if state.role != "drift":
        return Perceive(record, frame)
    reference = state.drift.reference
    return MeasureDrift(record, frame, state.frames[reference] if reference else None)
