"""What a session knows of damage and charges for it: exposures and measurements folded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from aecontrol.dose import bound_charge
from aecontrol.events import DamageMeasured
from aecontrol.exposure import KeyRecord
from aecontrol.forecast import total
from aecontrol.harm import Harm, reference_frame
from aecontrol.harm_figure import draw_harm
from aecontrol.response import Response, prior
from aecontrol.types import (
    AreaPlan,
    ArrayRef,
    Budget,
    Capabilities,
    DamagePlan,
    Plan,
    ReferencePlan,
    ScanPlan,
    ScanRegion,
)

COLUMN = Capabilities(
    identity="", simulated=True, unit="electrons", field_nm=(20.0, 16.0), channels=("HAADF",), beam_current_pA=10.0
)
PLACE = ReferencePlan(center_nm=(3.0, 3.0), phase="glass")
DAMAGE = DamagePlan(references=(PLACE,), sites_per_nm2=1e9, critical_fluence_e_per_A2=2000.0)
AREAS = (AreaPlan(name="soft", center_nm=(15.0, 8.0), fov_nm=(6.0, 6.0), phase="soft", damage=5.0),)
PLAN = Plan(
    scan=ScanPlan(fov_nm=(4.0, 4.0), shape=(40, 40), dwell_time_s=1e-5),
    damage=DAMAGE,
    areas=AREAS,
    budget=Budget(electrons=10**9, damage=50.0),
    match_nm=0.1,
)
TABLE = ArrayRef(path="frames/x.npy", shape=(36, 4), dtype="float64", sha256="0" * 64)


def window(x=9.0, y=9.0, dwell_s=2e-6) -> ScanRegion:
    return ScanRegion(center_nm=(x, y), fov_nm=(4.0, 4.0), shape=(40, 40), dwell_time_s=dwell_s)


def response(hard=2000.0, soft=200.0, gain=1.0, tested=1e9) -> Response:
    return Response(
        phases=("glass", "soft"),
        critical_fluence_e_per_A2=((hard,), (soft,)),
        amplitude=(gain,),
        tested_e_per_A2=(tested, tested),
        patches=100,
        method="given",
    )


def key(number: int, region: ScanRegion, state="POST", part=0.95) -> KeyRecord:
    bound = bound_charge(region, COLUMN)
    measured = bound.model_copy(update={"electrons": round(part * bound.electrons)}) if state == "POST" else None
    return KeyRecord(
        key=f"{number:064x}",
        step=number,
        attempt=0,
        region=region,
        bound=bound.model_copy(update={"damage": 7.0}),
        state=state,
        measured=measured,
    )


def settled(*records: KeyRecord, believed: Response | None = None) -> tuple[Harm, dict[str, KeyRecord]]:
    harm = Harm.of(PLAN, COLUMN)
    assert harm is not None
    harm = replace(harm, response=believed or response())
    for record in records:
        harm = harm.settled(record)
    return harm, {record.key: record for record in records}


def seen(later: KeyRecord, first: KeyRecord, mean: float, sd=0.01) -> DamageMeasured:
    return DamageMeasured(key=later.key, first=first.key, metric="m", scores=TABLE, mean=mean, sd=sd)


def test_what_was_settled_adds_up_to_the_damage_of_the_whole_map():
    records = [key(1, window()), key(2, window(11.0)), key(3, window(15.0, 8.0)), key(4, window(15.0, 8.0))]
    harm, _ = settled(*records)
    whole = total(DAMAGE, harm.response, harm.ground, harm.fluence).expected
    assert harm.total.damage == pytest.approx(whole)
    assert harm.total.basis == "model"
    assert 0.7 * whole < harm.total.by_area[0] < whole  # most of it in the soft area
    assert harm.exceeds(0.99 * whole) == 1.0
    assert harm.exceeds(1.01 * whole) == 0.0


def test_what_never_fired_harms_nothing_and_what_nobody_knows_is_charged_as_reserved():
    harm, _ = settled(key(1, window(), "VOID"))
    assert harm.total.damage == 0.0
    assert not harm.fluence.any()
    harm, _ = settled(key(1, window(), "INDET"))
    assert harm.total.damage == 7.0
    assert harm.fluence.any()


def test_a_policy_sees_what_is_expected_and_the_guard_what_is_reserved():
    either = response().model_copy(
        update={"critical_fluence_e_per_A2": ((2000.0,) * 9 + (100.0,), (200.0,) * 10), "amplitude": (1.0,) * 10}
    )
    harm, _ = settled(believed=either)
    record = key(1, window(), part=1.0)
    reserved, expected = harm.outlook(record.region, record.bound)
    assert reserved == harm.reserve(record.region, record.bound) > 2.0 * expected
    assert expected == pytest.approx(harm.settled(record).total.damage, rel=0.1)


def test_the_reserve_covers_the_settlement_and_a_soft_phase_costs_more():
    harm, _ = settled()
    for x, y in ((9.0, 9.0), (15.0, 8.0)):
        record = key(1, window(x, y))
        reserved = harm.reserve(record.region, record.bound)
        assert reserved >= harm.settled(record).total.damage
    hard, soft = (harm.reserve(window(*at), key(1, window()).bound) for at in ((9.0, 12.0), (15.0, 8.0)))
    assert soft > 4.0 * hard
    assert harm.reserve_by_area(window(4.0, 12.0), key(1, window()).bound)[0] < 0.02 * soft  # tails
    assert harm.intact(window()) == 1.0
    after = harm.settled(key(1, window()))
    assert after.intact(window()) < 0.96
    assert after.intact(window(3.0, 12.0)) > 0.999


def test_a_new_response_values_everything_anew():
    records = [key(1, window()), key(2, window(15.0, 8.0))]
    harm, keys = settled(*records)
    believed = response(hard=500.0, soft=50.0)
    again = harm.refitted(believed, 0, keys)
    assert again.total.damage == pytest.approx(settled(*records, believed=believed)[0].total.damage)
    assert again.total.damage > 1.3 * harm.total.damage
    assert np.array_equal(again.fluence, harm.fluence)


def test_more_damage_than_foretold_is_charged_and_less_is_not_paid_back():
    records = [key(1, window()), key(2, window())]
    harm, keys = settled(*records)
    place = np.array([[9.0, 9.0]])
    evidence = harm.evidence(seen(records[1], records[0], 0.1), np.array([[*place[0], 0.1, 0.01]]), 0.36, keys)
    once = records[0].charge.electrons / 1600.0
    assert evidence.first == pytest.approx([0.5 * once])
    assert evidence.later == pytest.approx([1.5 * once])
    foretold = np.exp(-0.5 * once / 2000.0) - np.exp(-1.5 * once / 2000.0)
    same = harm.measured(seen(records[1], records[0], foretold), keys)
    less = harm.measured(seen(records[1], records[0], foretold - 0.02), keys)
    more = harm.measured(seen(records[1], records[0], foretold + 0.02), keys)
    assert same.total.damage == pytest.approx(harm.total.damage)
    assert less.total.damage == pytest.approx(harm.total.damage)
    assert more.total.damage == pytest.approx(harm.total.damage + 0.02 * 16.0, rel=0.02)
    assert more.total.basis == "measured"
    gained = settled(*records, believed=response(gain=0.5))[0].measured(
        seen(records[1], records[0], 0.5 * foretold + 0.02), keys
    )
    assert gained.total.damage == pytest.approx(harm.total.damage + 0.04 * 16.0, rel=0.02)


def test_what_nobody_knows_to_have_happened_does_not_make_a_specimen_look_hardier():
    frame = reference_frame(DAMAGE, PLACE)
    records = [key(1, frame), key(2, frame, "INDET"), key(3, frame)]
    harm, keys = settled(*records)
    without, fewer = settled(records[0], records[2])
    event, table = seen(records[2], records[0], 0.1), np.array([[3.0, 3.0, 0.1, 0.01]])
    assert harm.evidence(event, table, 0.36, keys).later == without.evidence(event, table, 0.36, fewer).later
    assert harm.fluence.sum() > 1.3 * without.fluence.sum()  # though it is charged


def test_a_measurement_that_contradicts_the_forecast_raises_the_alarm():
    frame = reference_frame(DAMAGE, PLACE)
    records = [key(1, frame), key(2, frame)]
    harm, keys = settled(*records)
    once = records[0].charge.electrons / (100.0 * frame.area_nm2)
    foretold = float(np.exp(-0.5 * once / 2000.0) - np.exp(-1.5 * once / 2000.0))
    assert not harm.measured(seen(records[1], records[0], foretold + 0.03), keys).alarm
    warm = harm.measured(seen(records[1], records[0], foretold + 0.15), keys)
    assert "temperature" in warm.alarm
    untaught = replace(harm, response=response().model_copy(update={"method": "prior"}))
    assert not untaught.measured(seen(records[1], records[0], 1.0), keys).alarm
    assert harm.total.damage < 1.5  # of 16: a sacrificed place, only tails count


def unread(later: KeyRecord, first: KeyRecord) -> DamageMeasured:
    return DamageMeasured(key=later.key, first=first.key, metric="m", reason="too different")


def test_a_place_that_cannot_be_compared_twice_in_a_row_raises_the_alarm_once_unless_it_was_foretold_gone():
    frame = reference_frame(DAMAGE, PLACE)
    records = [key(n, frame) for n in range(1, 7)]
    hardy, keys = settled(*records, believed=response(hard=1e6))
    told, *lost = seen(records[1], records[0], 0.02), *(unread(record, records[0]) for record in records[2:])
    once = hardy.measured(told, keys).measured(lost[0], keys)
    assert not once.alarm
    twice = once.measured(lost[1], keys)
    assert "too different" in twice.alarm
    assert not replace(twice, alarm="").measured(lost[2], keys).alarm
    assert not once.measured(told, keys).measured(lost[1], keys).alarm
    doomed = settled(*records, believed=response(hard=20.0, soft=20.0))[0]
    doomed = replace(doomed, measurements=(told,))
    assert not doomed.measured(lost[0], keys).measured(lost[1], keys).alarm
    untaught = replace(doomed, response=doomed.response.model_copy(update={"method": "prior"}))
    untaught = untaught.measured(lost[0], keys).measured(lost[1], keys)  # nobody has foretold anything yet
    assert not untaught.alarm
    assert not untaught.refitted(doomed.response, 1, keys).alarm
    assert "too different" in untaught.refitted(hardy.response, 1, keys).alarm
    records = [key(n, window()) for n in (1, 2, 3)]  # a sub-scan, which nobody relies on
    elsewhere, keys = settled(*records, believed=response(hard=1e6))
    lost = [unread(record, records[0]) for record in records[1:]]
    assert not elsewhere.measured(lost[0], keys).measured(lost[1], keys).alarm


def test_a_place_of_which_no_frame_could_be_compared_raises_the_alarm_after_two_and_before_the_session():
    records = [key(n, reference_frame(DAMAGE, PLACE)) for n in (1, 2, 3, 4)]
    prior = replace(settled()[0], response=Harm.of(PLAN, COLUMN).response)
    first = DamageMeasured(key=records[0].key, metric="m", reason="the first frame of its place")

    def after(lost, exposures):
        harm = replace(prior, plan=DAMAGE.model_copy(update={"exposures": exposures})).measured(
            first, {first.key: records[0]}
        )
        for n in range(2, lost + 2):
            assert not harm.alarm
            harm = harm.measured(unread(records[n - 1], records[0]), {record.key: record for record in records[:n]})
        return harm.alarm

    assert not after(1, exposures=5)
    assert "too different" in after(2, exposures=5)
    assert "too different" in after(1, exposures=2)


def test_an_alarm_as_unlikely_as_can_be_wished_can_be_asked_for():
    frame = reference_frame(DAMAGE, PLACE)
    records = [key(1, frame), key(2, frame)]
    harm, keys = settled(*records)
    harm = replace(harm, plan=DAMAGE.model_copy(update={"alarm": 1e-30}))
    assert not harm.measured(seen(records[1], records[0], 0.05), keys).alarm
    assert harm.measured(seen(records[1], records[0], 1.0, sd=0.001), keys).alarm


def test_whatever_quantile_is_asked_for_the_settlement_of_a_first_guess_stays_within_its_reserve():
    harm = replace(settled()[0], response=Harm.of(PLAN, COLUMN).response)
    for quantile in (0.5, 0.8, 0.95):
        bold = replace(harm, plan=DAMAGE.model_copy(update={"quantile": quantile}))
        for record in (key(1, window()), key(1, window(15.0, 8.0), part=1.0)):
            assert bold.settled(record).total.damage <= bold.reserve(record.region, record.bound)


def test_what_a_second_look_shows_in_an_area_is_charged_to_the_area():
    records = [key(1, window(15.0, 8.0)), key(2, window(15.0, 8.0))]
    harm, keys = settled(*records)
    more = harm.measured(seen(records[1], records[0], 1.5), keys)
    added = more.total.damage - harm.total.damage
    assert added > 5.0
    assert more.total.by_area[0] - harm.total.by_area[0] == pytest.approx(added, rel=0.05)
    unknown, _ = settled(key(1, window(15.0, 8.0), "INDET"))
    assert unknown.total.by_area == settled()[0].reserve_by_area(records[0].region, records[0].bound)


def test_a_session_that_measured_nothing_has_its_pictures_too():
    harm, keys = settled(key(1, window()), believed=prior(("glass", "soft"), 2000.0, 1.0))
    record = SimpleNamespace(state=SimpleNamespace(harm=harm, keys=keys), field_nm=COLUMN.field_nm)
    assert len(draw_harm(record).axes) == 3  # the colour bar is one of them
