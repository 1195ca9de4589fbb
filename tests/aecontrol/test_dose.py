"""Bounds are bounds: against direct counting of scan points and electrons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aecontrol.dose import TileMap, bound_charge, over_budget, over_limits, tile_fluence, total
from aecontrol.types import Budget, Capabilities, ScanRegion
from aecontrol.units import electrons_per_second
from simulators.scan import ScanModel, nominal_positions_nm

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


@given(regions, st.floats(0, 1e-3), st.floats(0, 1e-3), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_no_tile_gets_more_than_the_bound_of_a_beam_that_is_never_blanked(region, flyback, latency, shift):
    scan = ScanModel(flyback_s=flyback, flyback_blanked=False, blanker_latency_s=latency)
    rate = electrons_per_second(10.0)
    path = scan.beam_path(region, nominal_positions_nm(region), 0.0, rate)
    tile = np.floor(path.points_nm + shift).astype(int)
    _, inverse = np.unique(tile, axis=0, return_inverse=True)
    most = np.bincount(inverse.ravel(), weights=path.electrons).max()
    open_beam = CAPABILITIES.model_copy(
        update={"flyback_s": flyback, "beam_on_in_flyback": True, "blanker_latency_s": latency}
    )
    bound = bound_charge(region, open_beam)
    assert path.electrons.sum() == pytest.approx(rate * scan.beam_on_s(region))
    assert path.electrons.sum() <= bound.electrons
    # thirty-two points stand for a way: one more of them than its share may fall into a tile
    grain = 2 * rate * flyback / 32 * (math.floor(math.sqrt(2) / region.pixel_size_nm[1]) + 2)
    assert most / 100.0 <= (bound.peak_fluence_e_per_A2 + grain / 100.0) * (1 + 1e-9)


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
    assert "does not meter" in over_budget(region, bound, Budget(electrons=10**9), total([]), tiles)
    assert over_budget(region, bound, Budget(pixels=64), total([]), tiles) is None
    assert "65" in over_budget(
        region.model_copy(update={"shape": (5, 13)}),
        bound.model_copy(update={"pixels": 65}),
        Budget(pixels=64),
        total([]),
        tiles,
    )
