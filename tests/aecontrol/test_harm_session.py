"""Sessions that measure damage: what comes first, what is charged, what stops them; a crash changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from aecontrol.errors import BadInput
from aecontrol.folding import fold
from aecontrol.measuring import meter_of
from aecontrol.session import Session, read_events
from aecontrol.types import AreaPlan, Budget, DamagePlan, ReferencePlan
from aecontrol.verify import verify_session
from drivers.faults import Crash

from .parts import CountingColumn, Pulse, Reckless, configuration

TAME = Reckless(3, recklessness=0.0)
BUDGET = Budget(electrons=10**8)
DAMAGE = DamagePlan(
    metric="learned",
    references=(ReferencePlan(center_nm=(1.05, 1.05)),),
    fov_nm=(2.0, 2.0),
    shape=(80, 80),
    dwell_time_s=1.4e-6,
    exposures=3,
    every=2,
    alarm=1e-9,  # with so few sites chance is large
    critical_fluence_e_per_A2=1e4,
)


SITES = np.random.default_rng(5).uniform((0, 0), (6, 4), (360, 2))
PATIENCE = np.random.default_rng(6).exponential(size=len(SITES))


@dataclass
class FrailColumn(CountingColumn):
    """Bright sites, each of which vanishes for good once the fluence of its 1 nm tile has reached what was drawn for
    it, ``critical`` on average."""

    critical: float = 6e3

    def fire(self, ordinal, region):
        pulse = super().fire(ordinal, region)
        axes = [
            region.center_nm[k] + ((np.arange(n) + 0.5) / n - 0.5) * region.fov_nm[k]
            for k, n in ((0, region.shape[1]), (1, region.shape[0]))
        ]
        fluence = np.array([self.tiles.get((int(x), int(y)), 0.0) for x, y in SITES])
        height = 60.0 * (fluence < PATIENCE * self.critical)
        gx, gy = (np.exp(-((axis[:, None] - SITES[:, k]) ** 2) / (2 * 0.06**2)) for k, axis in enumerate(axes))
        image = np.random.default_rng((ordinal, 1)).poisson((gy * height) @ gx.T + 3.0).astype(np.float32)
        return Pulse({"HAADF": image}, pulse.electrons, pulse.pixels, pulse.seconds, float(ordinal))


def run(folder, **changes):
    session = Session.create(configuration(TAME, FrailColumn(), changes.pop("budget", BUDGET), **changes), folder)
    try:
        return session.run()
    finally:
        session.close()


def test_references_come_first_then_again_and_the_law_is_learned(tmp_path):
    state = run(tmp_path / "s", damage=DAMAGE)
    order = [record.step for record in state.keys.values()]
    assert order[:4] == [-1, -2, -3, 0]  # all frames of the reference before the overview
    assert order[4:7] == [1, 2, -4]  # and one more after every two sub-scans
    assert len(state.harm.usable) >= 3
    assert {event.scores.shape[0] for event in state.harm.usable} == {4}  # of 4 x 4 patches those inside the rim
    assert state.harm.response.method != "prior"
    assert 0 not in [scan.candidate for scan in state.scans]  # what lies in a sacrificed place is not offered
    assert 0.0 < state.charged.damage < 6.0
    assert state.stopped.cause == "rule"


@pytest.mark.parametrize("seed", range(2))
def test_a_crash_changes_neither_the_response_nor_the_charges(tmp_path, monkeypatch, seed):
    straight = run(tmp_path / "straight", damage=DAMAGE)
    config = configuration(TAME, FrailColumn(), BUDGET, damage=DAMAGE)
    crashes = set(np.random.default_rng(seed).integers(2, 80, 4).tolist())
    record, crossed = Session._record, [0]

    def failing(session, event):
        for half in (0, 1):
            crossed[0] += 1
            if crossed[0] in crashes:
                raise Crash
            if not half:
                record(session, event)

    session = Session.create(config, tmp_path / "s")
    monkeypatch.setattr(Session, "_record", failing)
    while True:
        try:
            session = session or Session.reopen(tmp_path / "s", config)
            state = session.run()
            break
        except Crash:
            if session is not None:
                session.close()
                session = None
    session.close()
    # the keys differ with the session's name; what was learned and charged does not
    assert state.harm.response == straight.harm.response
    assert state.charged == straight.charged
    assert np.array_equal(state.harm.fluence, straight.harm.fluence)


def test_a_budget_of_damage_ends_the_session_and_is_kept(tmp_path):
    whole = run(tmp_path / "whole", damage=DAMAGE, overview=False)
    limit = 0.8 * whole.charged.damage
    state = run(tmp_path / "part", damage=DAMAGE, overview=False, budget=Budget(electrons=10**8, damage=limit))
    assert state.stopped.cause == "budget"
    assert 0 < len(state.scans) < len(whole.scans)
    events = read_events(tmp_path / "part")
    for n, event in enumerate(events):
        if event.kind == "reserved":  # whatever a new response then made of it: each reserve fitted
            assert fold(events[: n + 1]).charged.damage <= limit


def test_a_warmer_specimen_than_the_references_were_pauses_the_session(tmp_path):
    column = FrailColumn(critical=1e9)
    session = Session.create(configuration(TAME, column, BUDGET, damage=DAMAGE), tmp_path / "s")

    def warm(state, event):
        if event.kind == "perceived" and len(state.scans) == 1:
            column.critical = 8e3

    state = session.run(warm)
    session.close()
    assert state.phase == "paused"
    assert "temperature" in state.paused
    fitted = state.harm.fitted
    session = Session.reopen(tmp_path / "s", configuration(TAME, column, BUDGET, damage=DAMAGE))
    state = session.run()
    session.close()
    assert state.harm.fitted > fitted  # a person has looked: what was measured is learned from


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"budget": Budget(electrons=10**6)}, "damage.share"),
        ({"damage": None, "budget": Budget(electrons=10**9, damage=1.0)}, "add the table [damage]"),
        ({"areas": (AreaPlan(name="a", center_nm=(1.0, 1.0), fov_nm=(1.0, 1.0), electrons=0),)}, "area 'a'"),
        ({"damage": DAMAGE.model_copy(update={"metric": "feeling"})}, "feeling"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_before_any_dose(tmp_path, changes, word):
    with pytest.raises(BadInput) as error:
        run(tmp_path / "s", **{"damage": DAMAGE, **changes})
    assert word in str(error.value)


def test_a_gain_that_is_known_divides_what_is_measured_and_sharpens_the_fit(tmp_path):
    plain = run(tmp_path / "plain", damage=DAMAGE, overview=False)
    known = DAMAGE.model_copy(update={"gain": 0.5, "gain_sd": 0.1})
    state = run(tmp_path / "known", damage=known, overview=False)
    before, after = plain.harm.usable[0], state.harm.usable[0]
    assert (after.mean, after.sd) == (pytest.approx(2.0 * before.mean), pytest.approx(2.0 * before.sd))
    assert (plain.harm.response.diagnostics["gain_sd"], state.harm.response.diagnostics["gain_sd"]) == (0.5, 0.1)


def test_verify_measures_and_fits_again(tmp_path, monkeypatch):
    run(tmp_path / "s", damage=DAMAGE)
    config = configuration(TAME, FrailColumn(), BUDGET, damage=DAMAGE)
    events = read_events(tmp_path / "s")
    monkeypatch.setattr("aecontrol.verify.config_of", lambda events: config)

    def differences(kind, change):
        told = [change(event) if event.kind == kind else event for event in events]
        monkeypatch.setattr("aecontrol.verify.read_events", lambda folder: told)
        return verify_session(tmp_path / "s")["differences"]

    def softer(event):
        critical = tuple(tuple(0.1 * f for f in phase) for phase in event.response.critical_fluence_e_per_A2)
        return event.model_copy(
            update={"response": event.response.model_copy(update={"critical_fluence_e_per_A2": critical})}
        )

    def less(event):
        return event if event.mean is None else event.model_copy(update={"mean": event.mean - 0.05})

    assert differences("response_fitted", lambda event: event) == []
    assert "does not give the response" in differences("response_fitted", softer)[0]
    assert "does not show the damage" in differences("damage_measured", less)[0]
    tomorrow = replace(meter_of(config.plan, "cpu"), version="of tomorrow", metric_sd=1.0)
    monkeypatch.setattr("aecontrol.verify.meter_of", lambda plan, device: tomorrow)
    assert all("not what is installed" in told for told in differences("damage_measured", lambda event: event))
