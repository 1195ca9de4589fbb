"""What exposures are expected to harm: electrons tile by tile, the law of damage, limits of single areas."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.areas import AreaCharge, charge_within, over_areas, share_within
from aecontrol.dose import TileMap, bound_charge
from aecontrol.forecast import MARGIN, area_tiles, footprint, forecast, ground, intact, local_fluence, total
from aecontrol.response import Response, prior
from aecontrol.types import AreaPlan, Capabilities, DamagePlan, ReferencePlan, ScanRegion
from simulators.damage import Damage, DamagedSpecimen
from simulators.optics import Optics
from simulators.scan import nominal_positions_nm
from simulators.specimens.sheets import Mos2

FIELD_NM = (20.0, 16.0)
COLUMN = Capabilities(
    identity="", simulated=True, unit="electrons", field_nm=FIELD_NM, channels=("HAADF",), beam_current_pA=10.0
)
PLAN = DamagePlan(sites_per_nm2=1e9)  # chance adds nothing
turned = st.floats(-3.2, 3.2)


def region(x=10.0, y=8.0, wide=4.0, high=3.0, turn=0.0, shape=(30, 40), dwell_s=1e-5) -> ScanRegion:
    return ScanRegion(center_nm=(x, y), fov_nm=(wide, high), rotation_rad=turn, shape=shape, dwell_time_s=dwell_s)


def response(critical=(1000.0,), tested=1e9, gain=1.0, exponent=1.0) -> Response:
    """A response that is known exactly, or as well as these draws say."""
    return Response(
        phases=("specimen",),
        critical_fluence_e_per_A2=(tuple(critical),),
        amplitude=(gain,) * len(critical),
        exponent=exponent,
        tested_e_per_A2=(tested,),
        patches=100,
        method="given",
    )


@settings(max_examples=15, deadline=None)
@given(st.floats(5, 15), st.floats(5, 11), st.floats(1, 6), st.floats(1, 6), turned)
def test_every_electron_falls_somewhere_and_most_of_them_inside(x, y, wide, high, turn):
    there = region(x, y, wide, high, turn)
    where = footprint(there, FIELD_NM)
    assert where.share.sum() == pytest.approx(1.0, abs=2e-3)  # the farthest tails may leave the ground
    cols = math.ceil(FIELD_NM[0]) + 2 * MARGIN
    tile = np.column_stack([where.tiles % cols, where.tiles // cols]) - MARGIN + 0.5
    c, s = math.cos(turn), math.sin(turn)
    u, v = (tile - (x, y)) @ np.array([[c, -s], [s, c]]).T.T[:, 0], (tile - (x, y)) @ np.array([-s, c])
    near = (np.abs(u) < wide / 2 + 0.71) & (np.abs(v) < high / 2 + 0.71)
    assert where.share[near].sum() > 0.94


def test_the_fluence_is_that_of_the_simulated_column():
    """Mean over the sites in each tile of what the exact memory of every probe position says, tails included."""
    sheet = Mos2(size_nm=FIELD_NM).build(0)
    optics = Optics(voltage_kV=80.0, semi_angle_mrad=30.0)
    body = DamagedSpecimen(sheet, Damage(displacement_threshold_eV={}, excitation_barn={}), optics, 0)
    there = region(turn=0.4, shape=(120, 160))
    points = nominal_positions_nm(there).reshape(-1, 2)
    body.expose(10.0 * points, 10.0)
    seen = body.fluence.at(sheet.positions_A[:, :2])
    where, expected = footprint(there, FIELD_NM), np.zeros(math.prod(ground(PLAN, (), FIELD_NM).shape))
    expected[where.tiles] = where.added(10.0 * len(points))
    x, y = np.floor(sheet.positions_A[:, :2].T / 10.0).astype(int) + MARGIN
    tile = y * (math.ceil(FIELD_NM[0]) + 2 * MARGIN) + x
    inside = expected[tile] > 0.999 * expected.max()
    assert seen[inside].mean() == pytest.approx(expected.max(), rel=0.03)
    assert seen.mean() == pytest.approx(expected[tile].mean(), rel=0.03)


@settings(max_examples=15, deadline=None)
@given(st.floats(10, 1e5), st.floats(0, 1), st.floats(100, 1e4), st.sampled_from([1.0, 2.0]))
def test_damage_does_not_depend_on_how_an_exposure_is_cut(electrons, part, critical, exponent):
    on, where, believed = (
        ground(PLAN, (), FIELD_NM),
        footprint(region(), FIELD_NM),
        response((critical,), 1e9, 1.0, exponent),
    )
    electrons *= 1e3
    at_once = forecast(PLAN, believed, on, on.fresh, where, electrons).expected
    between = on.fresh
    between[where.tiles] += where.added(part * electrons)
    first = forecast(PLAN, believed, on, on.fresh, where, part * electrons).expected
    second = forecast(PLAN, believed, on, between, where, (1 - part) * electrons).expected
    assert first + second == pytest.approx(at_once, rel=1e-9, abs=1e-12)
    assert 0.0 <= at_once <= len(where.tiles)


def test_a_dead_area_costs_nothing_more_and_is_worth_nothing():
    on, where, believed = ground(PLAN, (), FIELD_NM), footprint(region(), FIELD_NM), response()
    dead = on.fresh + 5e4
    assert forecast(PLAN, believed, on, dead, where, 1e7).expected < 1e-9
    assert intact(believed, on, dead, where) < 1e-9
    assert intact(believed, on, on.fresh, where) == 1.0


def test_a_uniform_exposure_harms_what_the_law_says():
    """All of a large field at F_c / 2: 1 - exp(-1/2) of it."""
    on, believed = ground(PLAN, (), FIELD_NM), response()
    done = total(PLAN, believed, on, on.fresh + 500.0)
    assert done.expected == pytest.approx(len(on.phase) * -math.expm1(-0.5))
    assert done.exceeds(done.expected - 1e-3) == 1.0
    assert done.exceeds(done.expected + 1e-3) == 0.0


def test_an_untested_phase_is_charged_by_the_slope():
    """Nothing was seen beyond the critical fluence: the straight line, which is never below the curve."""
    on, where = ground(PLAN, (), FIELD_NM), footprint(region(), FIELD_NM)
    known, slope = response(), response(tested=100.0)
    for electrons in (1e4, 1e5, 1e6, 1e7):
        line = forecast(PLAN, slope, on, on.fresh, where, electrons).expected
        assert line >= forecast(PLAN, known, on, on.fresh, where, electrons).expected
    few = forecast(PLAN, slope, on, on.fresh, where, 1e3).expected
    assert few == pytest.approx(1e3 / 100.0 / 1000.0, rel=2e-3)  # electrons / A^2 per nm^2 / F_c, wherever they fall


def test_chance_and_ignorance_widen_what_is_reserved():
    on, where = ground(PLAN, (), FIELD_NM), footprint(region(), FIELD_NM)
    sure = forecast(PLAN, response(), on, on.fresh, where, 1e5)
    assert sure.quantile(0.95) == pytest.approx(sure.expected, rel=1e-3)
    few = forecast(PLAN.model_copy(update={"sites_per_nm2": 2.0}), response(), on, on.fresh, where, 1e5)
    spread = sure.expected / 12.0  # one share p of 12 nm^2 with 24 sites: sd 12 sqrt(p (1 - p) / 24)
    assert few.quantile(0.95) - few.expected == pytest.approx(
        1.645 * 12 * math.sqrt(spread * (1 - spread) / 24), rel=0.15
    )
    guess = prior(("specimen",), 1000.0, 1.0)
    assert forecast(PLAN, guess, on, on.fresh, where, 1e5).quantile(0.95) > 5.0 * sure.expected


def test_sacrificed_places_do_not_count_and_weights_do():
    reference = ReferencePlan(center_nm=(10.0, 8.0))
    plan = PLAN.model_copy(update={"references": (reference,), "fov_nm": (4.0, 3.0)})
    there, believed = footprint(region(), FIELD_NM), response()
    on = ground(plan, (), FIELD_NM)
    whole = forecast(PLAN, believed, ground(PLAN, (), FIELD_NM), on.fresh, there, 1e6).expected
    assert forecast(plan, believed, on, on.fresh, there, 1e6).expected < 0.12 * whole
    area = AreaPlan(name="dear", center_nm=(10.0, 8.0), fov_nm=(10.0, 10.0), weight=3.0)
    on = ground(PLAN, (area,), FIELD_NM)
    assert forecast(PLAN, believed, on, on.fresh, there, 1e6).expected == pytest.approx(3.0 * whole, rel=0.01)
    inside = area_tiles(area, FIELD_NM)
    there = there.among(inside)
    assert forecast(PLAN, believed, on, on.fresh, there, 1e6).expected == pytest.approx(3.0 * whole, rel=0.01)


def test_local_fluence_is_electrons_per_area_inside_only():
    there = region(turn=0.5)
    found = local_fluence(np.array([[10.0, 8.0], [18.0, 8.0]]), there, 1.2e5)
    assert found == pytest.approx([1.2e5 / 1200.0, 0.0])


NOTHING = AreaCharge()
AREA = AreaPlan(name="dear", center_nm=(14.0, 8.0), fov_nm=(4.0, 4.0), electrons=0)


@settings(max_examples=60, deadline=None)
@given(st.floats(6, 16), st.floats(6, 10), turned, st.floats(0, 0.5))
def test_no_pixel_falls_into_an_area_uncounted(x, y, turn, error):
    there = region(x, y, turn=turn)
    shift = error * np.random.default_rng(0).uniform(-1, 1, (30, 40, 2)) / math.sqrt(2.0)
    off = np.abs(nominal_positions_nm(there) + shift - AREA.center_nm)
    assert (off <= np.array(AREA.fov_nm) / 2).all(axis=-1).mean() <= share_within(there, AREA, error)


def test_a_protected_area_is_never_exposed_and_others_keep_to_their_limits():
    tiles = TileMap.of(COLUMN)

    def refused(there, area, spent=NOTHING, damage=(0.0, 0.0), tiles=tiles):
        return over_areas(there, bound_charge(there, COLUMN), (area,), (spent,), (damage,), tiles, COLUMN)

    assert "'dear'" in (refused(region(10.0), AREA) or "")  # ends half a nm from it
    assert refused(region(8.0, wide=2.0), AREA) is None
    half = region(12.0, wide=4.0)
    bound = bound_charge(half, COLUMN)
    within = charge_within(half, bound, AREA, COLUMN).electrons
    assert 0.5 * bound.electrons <= within < bound.electrons
    roomy = AREA.model_copy(update={"electrons": within})
    assert refused(half, roomy) is None
    assert "electrons" in (refused(half, roomy, AreaCharge(1, 0.0)) or "")
    timed = AREA.model_copy(update={"electrons": None, "seconds": 0.4 * bound.seconds})
    assert "seconds" in (refused(half, timed) or "")
    bright = AREA.model_copy(update={"electrons": None, "peak_fluence_e_per_A2": 2.5 * bound.peak_fluence_e_per_A2})
    once = tiles.add(half, bound.peak_fluence_e_per_A2)
    assert refused(half, bright, tiles=once) is None
    assert "tile" in (refused(half, bright, tiles=once.add(half, bound.peak_fluence_e_per_A2)) or "")
    assert refused(region(8.0, wide=2.0), bright, tiles=once.add(half, 1e9)) is None  # what is over does not grow
    frail = AREA.model_copy(update={"electrons": None, "damage": 1.0})
    assert refused(half, frail, damage=(0.5, 0.9)) is None
    assert "damage" in (refused(half, frail, damage=(0.5, 1.1)) or "")


@pytest.mark.parametrize(
    ("limit", "changes"),
    [
        ({"electrons": 0}, {"drifts": True}),
        ({"seconds": 1e-9}, {"drifts": True}),
        ({"damage": 0.0}, {"drifts": True}),
        ({"peak_fluence_e_per_A2": 1e9}, {"position_error_nm": None}),
    ],
)
def test_no_place_is_far_enough_from_a_protected_area_for_a_beam_whose_error_has_no_bound(limit, changes):
    astray, far = COLUMN.model_copy(update=changes), region(4.0, wide=2.0)
    area = AREA.model_copy(update={"electrons": None, **limit})
    bound, tiles = bound_charge(far, astray), TileMap.of(astray)
    assert over_areas(far, bound, (area,), (NOTHING,), ((0.0, 0.0),), tiles, astray)
    assert over_areas(far, bound_charge(far, COLUMN), (area,), (NOTHING,), ((0.0, 0.0),), tiles, COLUMN) is None


def test_electrons_that_nobody_counts_do_not_fall_into_an_area_that_limits_them():
    record = COLUMN.model_copy(update={"unit": "pixels", "beam_current_pA": None, "pixel_size_nm": 0.1})
    tiles, on_it, far = TileMap.of(record), region(14.0), region(6.0)
    for there, refused in ((on_it, True), (far, False)):
        reason = over_areas(there, bound_charge(there, record), (AREA,), (NOTHING,), ((0.0, 0.0),), tiles, record)
        assert bool(reason) is refused


def test_an_overview_of_a_large_field_is_forecast_in_little_memory():
    tracemalloc.start()
    try:
        field_nm = (300.0, 280.0)
        whole = region(150.0, 140.0, 300.0, 280.0)
        where = footprint.__wrapped__(whole, field_nm)
        on = ground.__wrapped__(PLAN, (), field_nm)
        forecast(PLAN, prior(("specimen",), 1000.0, 1.0), on, on.fresh, where, 1e6)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6e7
    small = region(9.3, 7.7)
    straight, turned_little = (footprint(small.model_copy(update={"rotation_rad": r}), FIELD_NM) for r in (0.0, 1e-15))
    assert np.array_equal(straight.share, turned_little.share)


def test_where_a_window_lies_in_an_area_is_computed_once_however_far_it_drifts():
    bound, first = bound_charge(region(), COLUMN), charge_within(region(), bound_charge(region(), COLUMN), AREA, COLUMN)
    known = share_within.cache_info().misses
    drifted = region().model_copy(update={"shift_nm": (0.3, -0.2)})
    assert charge_within(drifted, bound, AREA, COLUMN) == first
    assert share_within.cache_info().misses == known
