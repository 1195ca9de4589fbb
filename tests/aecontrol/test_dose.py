"""Bounds are bounds: against direct counting of scan points and electrons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aecontrol.dose import TileMap, bound_charge, over_budget, over_limits, tile_fluence, total
from aecontrol.errors import BadInput
from aecontrol.types import Budget, Capabilities, ScanRegion
from aecontrol.units import electrons_per_second
from simulators.scan import Charging, ScanModel

CAPABILITIES = Capabilities(
    identity="x", simulated=True, unit="electrons", field_nm=(20, 20), channels=("HAADF",), beam_current_pA=10.0
)

regions = st.builds(
    ScanRegion,
    center_nm=st.tuples(st.floats(5, 15), st.floats(5, 15)),
    fov_nm=st.tuples(st.floats(0.3, 6), st.floats(0.3, 6)),
    rotation_rad=st.one_of(st.just(0.0), st.just(math.pi / 2), st.floats(-4, 4)),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    dwell_time_s=st.floats(1e-7, 1e-4),
)


def scan_points(region):
    px, py = region.pixel_size_nm
    u = (np.arange(region.shape[1]) + 0.5) * px - region.fov_nm[0] / 2
    v = (np.arange(region.shape[0]) + 0.5)[:, None] * py - region.fov_nm[1] / 2
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    return region.center_nm[0] + c * u - s * v, region.center_nm[1] + s * u + c * v


def test_ten_picoampere_for_a_microsecond_is_62_electrons():
    assert electrons_per_second(10.0) * 1e-6 == pytest.approx(62.42, abs=0.01)  # METHODS 0


@given(regions, st.integers(1, 10**9), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_no_tile_gets_more_than_its_bound(region, electrons, shift):
    x, y = scan_points(region)
    tiles = np.stack([np.floor(x + shift[0]), np.floor(y + shift[1])]).reshape(2, -1)
    most = np.unique(tiles, axis=1, return_counts=True)[1].max()
    assert most * electrons / region.pixels / 100.0 <= tile_fluence(region, electrons) * (1 + 1e-9)


wide_regions = st.builds(
    ScanRegion,
    center_nm=st.just((100.0, 100.0)),
    fov_nm=st.tuples(st.floats(0.5, 120.0), st.floats(0.5, 30.0)),
    rotation_rad=st.floats(-3.2, 3.2) | st.just(0.0),
    shape=st.tuples(st.integers(1, 100), st.integers(1, 60)),
    dwell_time_s=st.floats(1e-7, 1e-4),
)
scans = st.builds(
    ScanModel,
    flyback_s=st.floats(0, 1e-3),
    flyback_blanked=st.booleans(),
    blanker_latency_s=st.floats(0, 1e-3),
    line_jitter_nm=st.floats(0, 0.05),
    swing_nm=st.floats(-0.5, 0.5),
    rotation_error_deg=st.floats(-0.2, 0.2),
    charging=st.builds(Charging, offset_nm=st.tuples(st.floats(-1, 1), st.floats(-1, 1)), decay_s=st.floats(1e-4, 1)),
)


@settings(deadline=None, max_examples=150)
@given(wide_regions | regions, scans, st.tuples(st.floats(0, 1), st.floats(0, 1)), st.integers(0, 99))
@example(  # four lines span 1.002 nm: 2 pm of jitter put them into one tile
    ScanRegion(center_nm=(100, 100), fov_nm=(10, 36 * 0.334), shape=(36, 50), dwell_time_s=1e-6), ScanModel(), (0, 0), 0
)
@example(  # what the flyback leaves over crowds the first pixels of every line into half their width
    ScanRegion(center_nm=(100, 100), fov_nm=(10, 10), shape=(100, 100), dwell_time_s=1e-6),
    ScanModel(swing_nm=0.5, line_jitter_nm=0.0), (0, 0), 0,
)  # fmt: skip
def test_no_tile_gets_more_than_its_bound_wherever_the_beam_really_goes(region, scan, shift, seed):
    rate = electrons_per_second(10.0)
    path = scan.beam_path(region, scan.positions_nm(region, 0.0, seed, 0), 0.0, rate)
    assert path.electrons.sum() == pytest.approx(rate * scan.beam_on_s(region))
    instrument = CAPABILITIES.model_copy(
        update={
            "field_nm": (200, 200),
            "flyback_s": scan.flyback_s,
            "beam_on_in_flyback": not scan.flyback_blanked,
            "blanker_latency_s": scan.blanker_latency_s,
            "position_error_nm": scan.position_error_nm((200, 200)),
        }
    )
    bound = bound_charge(region, instrument)
    assert path.electrons.sum() <= bound.electrons
    _tile, inverse = np.unique(np.floor(path.points_nm + shift).astype(int), axis=0, return_inverse=True)
    most = np.bincount(inverse.ravel(), weights=path.electrons)
    assert most.max() / 100.0 <= bound.peak_fluence_e_per_A2 * (1 + 1e-9)
    hit = np.floor(path.points_nm).astype(int) + 2
    touched = TileMap.of(instrument).touched(region)
    inside = np.all((hit >= 0) & (hit < touched.shape[::-1]), axis=1)
    assert touched[hit[inside, 1], hit[inside, 0]].all()


def test_a_drifting_beam_has_no_bound_so_no_fluence_budget_is_accepted():
    assert ScanModel(drift_nm_per_s=(0.1, 0.0)).drifts
    assert ScanModel(drift_wander_nm_per_s=0.1).drifts
    drifting = CAPABILITIES.model_copy(update={"drifts": True})
    region = ScanRegion(center_nm=(10, 10), fov_nm=(2, 2), shape=(8, 8), dwell_time_s=1e-6)
    bound = bound_charge(region, drifting)
    assert bound.electrons is not None
    reason = over_budget(region, bound, Budget(peak_fluence_e_per_A2=1e9), total([]), TileMap.of(drifting))
    assert "drifts without a bound" in reason
    held = drifting.held(0.2)
    assert bound_charge(region, held) == bound_charge(
        region, CAPABILITIES.model_copy(update={"position_error_nm": 0.2})
    )
    assert (
        over_budget(region, bound_charge(region, held), Budget(peak_fluence_e_per_A2=1e9), total([]), TileMap.of(held))
        is None
    )


@given(regions)
def test_every_tile_with_a_scan_point_is_touched(region):
    x, y = scan_points(region)
    touched = TileMap((20, 20)).touched(region)
    assert touched[np.floor(y).astype(int) + 2, np.floor(x).astype(int) + 2].all()


@given(regions)
def test_the_bound_covers_every_current_within_tolerance(region):
    seconds = region.pixels * region.dwell_time_s
    most = electrons_per_second(10.0 * 1.05) * seconds
    bound = bound_charge(region, CAPABILITIES)
    assert most <= bound.electrons < most + 2
    assert bound.pixels == region.pixels


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dwell_time_s": 2.0}, "dwell"),
        ({"center_nm": (0.9, 5.0)}, "outside the field"),
        ({"rotation_rad": math.pi / 4, "center_nm": (1.2, 5.0)}, "outside the field"),
        ({"shape": (5000, 5000)}, "largest frame"),
    ],
)
def test_what_the_instrument_cannot_do_is_named(change, word):
    region = ScanRegion(center_nm=(1.0, 5.0), fov_nm=(2, 2), shape=(8, 8), dwell_time_s=1e-6)
    assert over_limits(region, CAPABILITIES) is None
    assert word in over_limits(region.model_copy(update=change), CAPABILITIES)


def test_a_budget_in_a_currency_that_is_not_metered_refuses():
    record = CAPABILITIES.model_copy(update={"beam_current_pA": None, "unit": "pixels"})
    region = ScanRegion(center_nm=(1.0, 5.0), fov_nm=(2, 2), shape=(8, 8), dwell_time_s=1e-6)
    bound = bound_charge(region, record)
    assert bound.electrons is None
    tiles = TileMap((20, 20))
    assert "not meter them" in over_budget(region, bound, Budget(electrons=10**9), total([]), tiles)
    assert over_budget(region, bound, Budget(pixels=64), total([]), tiles) is None
    assert "65" in over_budget(
        region.model_copy(update={"shape": (5, 13)}),
        bound.model_copy(update={"pixels": 65}),
        Budget(pixels=64),
        total([]),
        tiles,
    )


@given(st.floats(-60, 60), st.floats(-60, 60), st.floats(-3, 3), st.floats(0, 4))
def test_a_map_grows_with_the_stage_and_forgets_nothing(x, y, turn, error):
    """Wherever the stage has brought the specimen, every point of a region lies in a tile that was charged."""
    first = ScanRegion(center_nm=(10, 10), fov_nm=(4, 3), shape=(8, 8), dwell_time_s=1e-6)
    region = ScanRegion(center_nm=(x, y), fov_nm=(7, 5), rotation_rad=turn, shape=(8, 8), dwell_time_s=1e-6)
    tiles = TileMap((20, 20), error_nm=error).add(first, 5.0).add(region, 3.0)
    ox, oy = tiles.origin
    for corner_x, corner_y in region.corners_nm():
        assert tiles.fluence[math.floor(corner_y) - oy, math.floor(corner_x) - ox] >= 3.0
    assert tiles.fluence[10 - oy, 10 - ox] >= 5.0
    assert tiles.peak_after(region, 1.0) >= 4.0


@pytest.mark.parametrize(
    "wrong", [{"fov_nm": (1e-310, 4.0)}, {"fov_nm": (1e308, 4.0)}, {"center_nm": (1e308, 4.0)}, {"dwell_time_s": 1e300}]
)
def test_a_region_beyond_all_measure_is_none(wrong):
    """A server that divides by a length must not be ended by one."""
    region = {"center_nm": (5.0, 5.0), "fov_nm": (4.0, 4.0), "shape": (8, 8), "dwell_time_s": 1e-6}
    with pytest.raises(ValueError, match="Input should be"):
        ScanRegion(**(region | wrong))


@pytest.mark.parametrize("fov", [1.001e-15, 1e-7, 1e9])
@pytest.mark.parametrize("pixel_nm", [None, 0.05])
def test_the_least_and_the_largest_region_are_refused_with_a_reason(fov, pixel_nm):
    region = ScanRegion(center_nm=(5, 5), fov_nm=(fov, fov), shape=(8, 8), dwell_time_s=1e-6)
    assert "nm" in over_limits(region, CAPABILITIES.model_copy(update={"pixel_size_nm": pixel_nm}))
    assert bound_charge(region, CAPABILITIES).electrons > 0


def test_more_electrons_than_can_be_counted_are_refused():
    region = ScanRegion(center_nm=(5, 5), fov_nm=(4, 4), shape=(10**9, 10**9), dwell_time_s=1e-6)
    with pytest.raises(BadInput, match="can be counted"):
        bound_charge(region, CAPABILITIES)
