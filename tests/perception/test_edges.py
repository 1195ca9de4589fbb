"""Edges in drawn images: where they are drawn, and none in noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aecontrol.errors import BadInput
from aecontrol.perception.edges import EdgePerceiver
from aecontrol.types import ScanRegion

SIDE = (6.0, 4.0)
"""Half the drawn flake's sides along its own axes, nm."""
PLACE, TURN = (13.0, 9.0), 0.4


def a_region(shape=(96, 128), fov=(26.0, 18.0), center=(13.0, 9.0), turn=0.0):
    return ScanRegion(center_nm=center, fov_nm=fov, shape=shape, rotation_rad=turn, dwell_time_s=1e-6)


def own_axes(x, y):
    """Positions in the specimen frame along the flake's axes."""
    c, s = math.cos(TURN), math.sin(TURN)
    return c * (x - PLACE[0]) + s * (y - PLACE[1]), -s * (x - PLACE[0]) + c * (y - PLACE[1])


def draw(region, contrast=2.0, noise=1.0, seed=0):
    """A turned rectangle, noisy, as ``region`` shows it."""
    rows, cols = np.mgrid[: region.shape[0], : region.shape[1]]
    px, py = region.pixel_size_nm
    dx, dy = (cols + 0.5) * px - region.fov_nm[0] / 2, (rows + 0.5) * py - region.fov_nm[1] / 2
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    u, v = own_axes(region.center_nm[0] + c * dx - s * dy, region.center_nm[1] + s * dx + c * dy)
    flake = (abs(u) < SIDE[0]) & (abs(v) < SIDE[1])
    return contrast * flake + noise * np.random.default_rng(seed).normal(size=region.shape)


def off_edge(reading):
    """Distance of every point found from the flake's outline, nm."""
    found = reading.found_atoms()
    u, v = own_axes(*np.array([(a.x_nm, a.y_nm) for a in found]).T)
    a, b = abs(u) - SIDE[0], abs(v) - SIDE[1]
    return np.where((a < 0) & (b < 0), -np.maximum(a, b), np.hypot(np.maximum(a, 0), np.maximum(b, 0)))


@pytest.mark.parametrize(
    "region",
    [a_region(), a_region(turn=-0.7), a_region((60, 200), (24.0, 17.0)), a_region((128, 96), (16.0, 24.0), turn=1.3)],
    ids=["plain", "turned", "high pixels", "turned, long"],
)
def test_points_lie_on_the_edges_all_along_them(region):
    reading = EdgePerceiver(spacing_nm=0.8).build().read_scan(draw(region), region, None)
    outline = 4 * (SIDE[0] + SIDE[1])
    assert np.percentile(off_edge(reading), 90) < 0.4
    assert off_edge(reading).max() < 1.0
    assert 0.5 * outline < 0.8 * len(reading.found) < 1.1 * outline
    assert reading.value == pytest.approx(len(reading.found), rel=0.02)
    assert {atom.label for atom in reading.found_atoms()} == {"edge"}


def test_noise_has_no_edges():
    """At most one frame in a hundred may show a point at the confidence of 0.99; 200 frames show few."""
    region, reader = a_region(), EdgePerceiver().build()
    flat = [reader.read_scan(5.0 + draw(region, 0.0, seed=n), region, None) for n in range(200)]
    assert sum(bool(reading.found) for reading in flat) <= 6
    assert all(reading.value < 2 for reading in flat)


def test_the_overview_tells_what_the_sub_scans_will_find():
    overview = a_region((72, 104))
    windows = [
        a_region((64, 64), (4.0, 4.0), (x, y)) for y in (3.0, 7.0, 11.0, 15.0) for x in (3.0, 7.0, 11.0, 15.0, 19.0)
    ]
    outside = a_region((64, 64), (4.0, 4.0), (27.0, 9.0))
    reader = EdgePerceiver().build()
    *promised, none = reader.read_overview(draw(overview), overview, [*windows, outside], None)
    found = [reader.read_scan(draw(w, seed=n), w, None).value for n, w in enumerate(windows, 1)]
    assert np.corrcoef([r.value for r in promised], found)[0, 1] > 0.8
    assert none.value is None


def test_it_abstains_and_says_why():
    region, reader = a_region(), EdgePerceiver().build()
    image = draw(region)
    image[3, 4] = np.nan
    for bad in (image, np.ones(region.shape), np.ones((4, 4)), np.zeros((3, 3, 3))):
        reading = reader.read_scan(bad, region, None)
        assert reading.value is None
        assert reading.note
        assert reading.found_atoms() == ()
    assert [r.value for r in reader.read_overview(image, region, [region], None)] == [None]
    with pytest.raises(BadInput, match="learn_patches"):
        reader.fit_embedding(np.zeros((0, 16, 16), np.float32), 0)


def test_its_version_follows_its_settings():
    assert EdgePerceiver().build().version == EdgePerceiver().build().version
    assert EdgePerceiver().build().version != EdgePerceiver(blur_nm=0.6).build().version
