"""The guard: whatever a policy says and wherever the process dies, delivered <= charged <= budget.

The column is an independent electron counter that survives the process. A schedule is a list of failpoint crossings
at which the process dies: failpoints lie before and after every journal append of both ledgers, between the lines of
every pulse, and after it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aecontrol.dose import TileMap
from aecontrol.errors import AecontrolError, BadInput
from aecontrol.events import Resumed
from aecontrol.exposure import InterlockLimits, KeyRecord, absorb
from aecontrol.folding import apply, fold
from aecontrol.harm import Harm
from aecontrol.journal import Journal
from aecontrol.session import Session, read_events
from aecontrol.state import reference_region
from aecontrol.types import AreaPlan, Budget, Charge, DamagePlan, ReferencePlan
from aecontrol.verify import compare_ledgers
from drivers.faults import Crash
from drivers.instrument import Instrument

from .parts import REFERENCE, CountingColumn, DriftingColumn, Reckless, configuration

RAM = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # 2000 schedules would wear out a disk for nothing


class Failpoints:
    """Counts crossings and ends the process at the scheduled ones."""

    def __init__(self, schedule: set[int]) -> None:
        self.schedule, self.crossed, self.armed = schedule, 0, False

    def cross(self) -> None:
        if not self.armed:
            return
        self.crossed += 1
        if self.crossed in self.schedule:
            raise Crash


SACRIFICED = DamagePlan(
    metric="learned",
    references=(ReferencePlan(center_nm=(0.7, 3.2)),),
    fov_nm=(1.0, 1.0),
    shape=(80, 80),
    dwell_time_s=1e-7,
    exposures=2,
    share=1.0,
    critical_fluence_e_per_A2=1e5,
)


def check(folder: Path, column: CountingColumn, budget: Budget) -> None:
    """Delivered <= charged <= budget, in electrons, per tile and per area, and in damage; no intent fired twice."""
    state = fold(read_events(folder))
    assert column.meter <= state.charged.electrons <= budget.electrons
    assert len(column.shots) == len(set(column.shots)), "the column was fired twice for one shot"
    fired = [record.step for record in state.keys.values() if record.state in ("POST", "INDET")]
    assert len(fired) == len(set(fired)), "an intent fired twice"
    if state.tiles is not None:
        for (x, y), fluence in column.tiles.items():
            bound = state.tiles.fluence[y + 2, x + 2]
            assert fluence <= bound * (1 + 1e-9) <= budget.peak_fluence_e_per_A2 * (1 + 1e-9)
    for area, spent in zip(state.plan.areas, state.areas, strict=state.tiles is not None):
        low, high = (np.array(area.center_nm) + sign * np.array(area.fov_nm) / 2 for sign in (-1, 1))
        inside = [f for at, f in column.tiles.items() if (np.array(at) >= low).all() and (np.add(at, 1) <= high).all()]
        assert 100.0 * sum(inside) <= spent.electrons + 1e-6
        assert spent.electrons <= area.electrons
    assert budget.damage is None or state.charged.damage <= budget.damage


def survive(
    policy_seed: int,
    schedule: set[int],
    budget: Budget,
    server: Budget,
    drifting: bool = False,
    areas: tuple[AreaPlan, ...] = (),
    damage: DamagePlan | None = None,
) -> None:
    """Run a session to its end through every crash of the schedule; check after each."""
    folder = Path(tempfile.mkdtemp(dir=RAM))
    points = Failpoints(schedule)
    column = (DriftingColumn if drifting else CountingColumn)(on_line=points.cross)
    limits = InterlockLimits(budget=server)
    drift = REFERENCE if drifting else None
    config = configuration(
        Reckless(policy_seed),
        column,
        budget,
        overview=all(area.electrons for area in areas),  # which no protected area bears
        limits=limits,
        drift=drift,
        damage=damage,
        areas=areas,
    )
    append = Journal.append

    def failing_append(journal: Journal, body: str) -> None:
        points.cross()
        append(journal, body)
        points.cross()

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "append", failing_append)
            session = Session.create(config, folder / "s")
            points.armed, pauses = True, 0
            while True:
                try:
                    session = session or Session.reopen(folder / "s", config)
                    if session.run().phase == "stopped":
                        break
                    pauses += 1  # an alarm; somebody looks, and goes on
                    assert pauses < 5
                    session.close()
                    session = None
                except Crash:
                    if session is not None:
                        session.close()
                        session = None
                check(folder / "s", column, budget)
            state = session.state
            session.close()
        assert all(record.state != "RESERVED" for record in state.keys.values()), "a key was left unsettled"
        assert list(compare_ledgers(folder / "s", state)) == []
        check(folder / "s", column, budget)
        if not schedule & set(range(1, points.crossed + 1)):
            assert state.charged.electrons == column.meter, "without a crash the ledger is exact"
    finally:
        shutil.rmtree(folder)


@settings(max_examples=1520, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    policy_seed=st.integers(0, 2**32 - 1),
    schedule=st.sets(st.integers(1, 160), max_size=6),
    budget=st.integers(20_000, 400_000),
    server=st.one_of(st.none(), st.integers(20_000, 400_000)),
    peak=st.floats(150, 3_000),
)
def test_delivered_is_at_most_charged_is_at_most_the_budget(policy_seed, schedule, budget, server, peak):
    """1 520 schedules of a reckless policy with crashes everywhere."""
    limits = Budget(electrons=budget, peak_fluence_e_per_A2=peak)
    with contextlib.suppress(BadInput):  # a budget below the overview is refused before any dose
        survive(policy_seed, schedule, limits, Budget(electrons=server))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    policy_seed=st.integers(0, 2**32 - 1),
    schedule=st.sets(st.integers(1, 400), max_size=6),
    budget=st.integers(100_000, 1_500_000),
    server=st.one_of(st.none(), st.integers(100_000, 1_500_000)),
    peak=st.floats(500, 6_000),
)
def test_it_holds_for_a_specimen_that_drifts_and_is_followed(policy_seed, schedule, budget, server, peak):
    """The same with a reference region that is scanned again and again, tiles counted where the specimen is."""
    limits = Budget(electrons=budget, peak_fluence_e_per_A2=peak)
    with contextlib.suppress(BadInput):
        survive(policy_seed, schedule, limits, Budget(electrons=server), drifting=True)


# ---------------------------------------------------------------- a checker never seen to fail proves nothing


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    policy_seed=st.integers(0, 2**32 - 1),
    schedule=st.sets(st.integers(1, 200), max_size=5),
    budget=st.integers(100_000, 600_000),
    damage=st.floats(0.5, 12.0),
    corner=st.tuples(st.integers(0, 5), st.integers(0, 3)),
    electrons=st.one_of(st.just(0), st.integers(0, 200_000)),
)
def test_it_holds_for_areas_and_for_damage(policy_seed, schedule, budget, damage, corner, electrons):
    """The same with an area that has a limit of its own (0: protected), and a place that is sacrificed to learn."""
    center = (corner[0] + 0.5, corner[1] + 0.5)
    area = AreaPlan(name="dear", center_nm=center, fov_nm=(1.0, 1.0), electrons=electrons)
    limits = Budget(electrons=budget, peak_fluence_e_per_A2=1e6, damage=damage)
    with contextlib.suppress(BadInput):
        survive(policy_seed, schedule, limits, Budget(), areas=(area,), damage=SACRIFICED)


def _charge_nothing_for_indet(patch):
    honest = KeyRecord.charge.fget
    zero = Charge(electrons=0, pixels=0, seconds=0.0)
    patch.setattr(KeyRecord, "charge", property(lambda r: zero if r.state == "INDET" else honest(r)))


def _fire_before_firing_is_written(patch):
    write = Instrument._write

    def late(self, record):
        if record.kind == "FIRING":
            self._ledger = absorb(self._ledger, record)
            self._column.fire(len(self._ledger.fired) - 1, record.region)
        write(self, record)

    patch.setattr(Instrument, "_write", late)


def _fresh_key_after_a_crash(patch):
    def forget(state, event):
        after = apply(state, event)
        if isinstance(event, Resumed) and after.unsettled:
            return replace(after, unsettled=False, phase="decided", attempt=after.attempt + 1)
        return after

    patch.setattr("aecontrol.session.apply", forget)
    patch.setattr("aecontrol.folding.apply", forget)


def _no_guard(patch):
    patch.setattr("aecontrol.machine.refusal", lambda state, region, bound, before_s=0.0: None)


def _no_areal_guard(patch):
    patch.setattr(TileMap, "peak_after", lambda self, region, added: 0.0)


def _charge_what_was_planned_not_delivered(patch):
    honest = KeyRecord.charge.fget
    patch.setattr(
        KeyRecord,
        "charge",
        property(
            lambda r: r.bound.model_copy(update={"electrons": r.bound.electrons * 9 // 10}) if r.measured else honest(r)
        ),
    )


def _no_limits_of_areas(patch):
    patch.setattr("aecontrol.machine.over_areas", lambda *args: None)


def _areas_are_charged_their_part_of_the_pixels_rounded_down(patch):
    patch.setattr("aecontrol.areas.REACH_NM", -0.5)


def _damage_settles_at_twice_what_was_reserved(patch):
    honest = Harm._charge

    def twice(self, record):
        charge = honest(self, record)
        return charge._replace(damage=2.0 * self.reserve(record.region, record.bound))

    patch.setattr(Harm, "_charge", twice)


def _no_deduplication(patch):
    patch.setattr("aecontrol.state.candidate_index", lambda state, region: -1)
    patch.setattr("drivers.instrument.on_cancel", lambda ledger, key: None)


def _drift_scans_cost_nothing(patch):
    honest = KeyRecord.charge.fget
    zero = Charge(electrons=0, pixels=0, seconds=0.0)
    patch.setattr(KeyRecord, "charge", property(lambda r: zero if r.step < 0 else honest(r)))


def _tiles_forget_the_reference_region(patch):
    add = TileMap.add
    again = reference_region(REFERENCE).fov_nm, reference_region(REFERENCE).shape
    patch.setattr(TileMap, "add", lambda m, r, e: m if (r.fov_nm, r.shape) == again else add(m, r, e))


OF_AREAS = (
    _no_limits_of_areas,
    _areas_are_charged_their_part_of_the_pixels_rounded_down,
    _damage_settles_at_twice_what_was_reserved,
)
OF_DRIFT = (_drift_scans_cost_nothing, _tiles_forget_the_reference_region)


@pytest.mark.parametrize(
    "mutate",
    [
        *OF_DRIFT,
        *OF_AREAS,
        _charge_nothing_for_indet,
        _fire_before_firing_is_written,
        _fresh_key_after_a_crash,
        _no_guard,
        _no_areal_guard,
        _charge_what_was_planned_not_delivered,
        _no_deduplication,
    ],
)
def test_each_deliberate_defect_is_caught(mutate):
    """Deliberate defects of the protocol are noticed by the same checks within 300 schedules."""
    random = np.random.default_rng(7)
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        for _ in range(300):
            schedule = {int(n) for n in random.integers(1, 160, int(random.integers(0, 7)))}
            budget = Budget(electrons=int(random.integers(60_000, 400_000)), peak_fluence_e_per_A2=1000.0)
            more: dict = {"drifting": mutate in OF_DRIFT}
            if mutate in OF_AREAS:
                budget = Budget(electrons=500_000, peak_fluence_e_per_A2=1e6, damage=4.0)
                center = (float(random.integers(6)) + 0.5, float(random.integers(4)) + 0.5)
                limit = int(random.choice([0, random.integers(100_000)]))
                area = AreaPlan(name="dear", center_nm=center, fov_nm=(1.0, 1.0), electrons=limit)
                more = {"areas": (area,), "damage": SACRIFICED}
            try:
                survive(int(random.integers(2**32)), schedule, budget, Budget(), **more)
            except BadInput:
                continue
            except (AssertionError, AecontrolError, KeyError):
                return
    pytest.fail("300 schedules did not notice the defect")
