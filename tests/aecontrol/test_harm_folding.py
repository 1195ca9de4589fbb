"""Sessions that measure damage, folded event by event: what is lost, what breaks off, and who has seen an alarm."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aecontrol.commands import Expose, Fetch, Finish, FitResponse, FollowPlan, MeasureDamage, Reserve
from aecontrol.errors import BadInput
from aecontrol.events import (
    DamageMeasured,
    Decided,
    Indeterminate,
    InstrumentReady,
    Paused,
    Posted,
    Recorded,
    ResponseFitted,
    Resumed,
    SessionStarted,
)
from aecontrol.folding import apply, begin
from aecontrol.machine import bound_of, history, next_command, preflight
from aecontrol.types import AreaPlan, Budget, Frame, OverviewPlan

from .test_harm import COLUMN, DAMAGE, PLAN, TABLE, response

LATER = OverviewPlan(fov_nm=(8.0, 8.0), center_nm=(8.0, 10.0), shape=(16, 16), dwell_time_s=1e-6)
TAUGHT = PLAN.model_copy(update={"overview": LATER, "damage": DAMAGE.model_copy(update={"exposures": 2})})
DIGESTS = {"HAADF": "0" * 64}


def started(plan=TAUGHT):
    state = begin(SessionStarted(session="s", seed=0, config={}, base=".", plan=plan, version="", created_unix_s=0.0))
    return apply(state, InstrumentReady(capabilities=COLUMN, perceiver="p", metric="m"))


def exposed(state, part=1.0, lost=False):
    """The next exposure that the plan asks for, of which ``part`` is delivered, and what its frame is said to show."""
    while True:
        match command := next_command(state):
            case FollowPlan():
                event = Decided(step=command.step, decision=command.scan, wall_s=0.0)
            case Reserve():
                event = command.event
            case Expose(record) if lost:
                return apply(state, Indeterminate(key=record.key, digests={}, reason="lost"))
            case Expose(record):
                bound = record.bound
                measured = bound.model_copy(
                    update={
                        "electrons": round(part * bound.electrons),
                        "pixels": round(part * bound.pixels),
                        "seconds": part * bound.seconds,
                    }
                )
                event = Posted(key=record.key, measured=measured, digests=DIGESTS)
            case Fetch(record):
                frame = Frame(region=record.region, channels={"HAADF": TABLE}, started_s=0.0)
                event = Recorded(key=record.key, frame=frame)
            case MeasureDamage(record, _, first):
                found = {} if first is None else {"first": first.key, "scores": TABLE, "mean": 0.1, "sd": 0.01}
                return apply(state, DamageMeasured(key=record.key, metric="m", **found))
            case _:
                return state
        state = apply(state, event)


def test_what_was_measured_is_learned_from_though_the_last_frame_of_the_references_is_lost():
    state = started(TAUGHT.model_copy(update={"damage": DAMAGE.model_copy(update={"exposures": 3})}))
    for _ in range(2):
        state = exposed(state)
    assert len(state.harm.usable) == 1
    assert isinstance(next_command(state), FollowPlan)  # one more frame
    assert isinstance(next_command(exposed(state, lost=True)), FitResponse)


def test_a_window_costs_a_policy_what_it_will_be_charged():
    state = exposed(started())
    charges = history(state).charges
    for region, charge in zip(state.candidates, charges, strict=True):
        bound = bound_of(state, region)
        assert 0.0 < charge.damage < bound.damage
        assert charge.electrons == bound.electrons


def test_only_a_person_who_was_told_of_an_alarm_can_lift_it():
    state = started()
    state = replace(state, harm=replace(state.harm, alarm="too warm"))
    for unseen in (state, apply(state, Paused(reason="interrupted by the user"))):
        again = next_command(apply(unseen, Resumed()))
        assert again.event.reason == "too warm"
    told = apply(apply(state, next_command(state).event), Resumed())
    assert isinstance(next_command(told), FollowPlan)


def test_a_pulse_that_ended_early_has_put_all_its_electrons_into_its_first_lines():
    top = AreaPlan(name="top", center_nm=(8.0, 6.5), fov_nm=(8.0, 1.0), electrons=10**9)
    state = started(TAUGHT.model_copy(update={"damage": None, "areas": (top,)}))
    state = exposed(state, part=0.125)
    (record,) = state.keys.values()
    assert record.charge.pixels == 32  # two lines, of 16
    assert state.areas[0].electrons == record.charge.electrons
    taught = started(TAUGHT.model_copy(update={"damage": DAMAGE.model_copy(update={"references": ()})}))
    taught = exposed(taught, part=0.125)
    assert taught.harm.intact(record.region.first_lines(2)) < taught.harm.intact(record.region)
    low = record.region.model_copy(update={"center_nm": (8.0, 12.0), "fov_nm": (8.0, 2.0)})
    assert taught.harm.intact(low) == pytest.approx(1.0, abs=1e-3)


def test_a_plan_whose_references_or_first_guess_cannot_be_carried_out_is_refused_and_no_other():
    once = started().harm.plan.dwell_time_s * 6.24e7 / 0.0625  # e/A^2 in pixels of 0.25 A
    few = Budget(electrons=10**11, peak_fluence_e_per_A2=8.0 * once)
    many = TAUGHT.model_copy(update={"budget": few, "damage": DAMAGE.model_copy(update={"exposures": 20})})
    with pytest.raises(BadInput, match="reference place"):
        preflight(many, COLUMN)
    preflight(TAUGHT.model_copy(update={"budget": few}), COLUMN)
    tails = TAUGHT.model_copy(update={"budget": Budget(electrons=10**11, damage=1e-6)})
    with pytest.raises(BadInput, match="reference place"):
        preflight(tails, COLUMN)
    frail = AreaPlan(name="frail", center_nm=(8.0, 10.0), fov_nm=(6.0, 6.0), damage=0.5)
    preflight(TAUGHT.model_copy(update={"areas": (frail,)}), COLUMN)  # the overview's harm is not yet known
    corner = AreaPlan(name="corner", center_nm=(1.0, 1.0), fov_nm=(2.0, 2.0), electrons=0)
    plan = PLAN.model_copy(update={"damage": None, "areas": (corner,), "budget": Budget(electrons=10**9)})
    preflight(plan, COLUMN.model_copy(update={"position_error_nm": 2.5}))  # other windows are far enough


def test_an_overview_that_the_budget_does_not_bear_any_more_ends_the_session_by_its_plan():
    state = started(TAUGHT.model_copy(update={"budget": Budget(electrons=10**9, damage=20.0)}))
    state = exposed(exposed(state))
    soft = response(hard=1.0, soft=1.0)
    command = next_command(apply(state, ResponseFitted(response=soft, measurements=1)))
    assert isinstance(command, Finish)
    assert command.event.cause == "budget"
