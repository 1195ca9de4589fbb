import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulators.fluence import FluenceMap
from simulators.optics import Optics, wavelength_A

from .oracles import round_kernel

OPTICS = Optics()


def scattered(n, seed, span=40.0):
    return np.random.default_rng(seed).random((n, 2)) * span


def test_one_shot_gives_the_probe_profile_and_all_electrons_are_kept():
    fluence = FluenceMap(OPTICS, (-30.0, -30.0), (30.0, 30.0))
    fluence.deposit(np.array([[0.37, -0.81]]), 1e6)
    offsets = np.stack([np.linspace(0, 6, 30), np.linspace(0, 2, 30)], axis=1)
    exact = 1e6 * round_kernel(np.hypot(*offsets.T), 0.030 / wavelength_A(80), OPTICS.source_sigma_A**2)
    measured = fluence.at(offsets + np.array([0.37, -0.81]))
    assert np.abs(measured - exact).max() < 0.04 * exact[0]
    x = np.arange(-30.0, 30.0, fluence.step_A) + 0.1
    everywhere = fluence.at(np.stack(np.meshgrid(x, x), -1).reshape(-1, 2))
    assert everywhere.min() >= 0.0
    assert everywhere.sum() * fluence.step_A**2 == pytest.approx(1e6, rel=1e-9)
    assert fluence.electrons == pytest.approx(1e6, rel=1e-12)
    fluence.deposit(np.array([[31.0, 0.0]]), 5.0)
    assert fluence.lost == 5.0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), points=st.integers(1, 300))
def test_fluence_has_a_quick_upper_bound_and_one_value_however_it_is_computed(seed, points):
    fluence = FluenceMap(OPTICS, (-10.0, -10.0), (50.0, 50.0))
    fluence.deposit(scattered(points, seed), 100.0)
    atoms = scattered(200, seed + 1, 50.0)
    together = fluence.at(atoms)
    one_by_one = np.concatenate([fluence.at(atoms[i : i + 1]) for i in range(0, 200, 10)])
    assert one_by_one == pytest.approx(together[::10], rel=1e-9, abs=1e-9)
    assert np.all(fluence.ceiling_at(atoms) >= together)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.05, 1e6))
def test_no_electron_is_lost_or_made(seed, scale):
    random = np.random.default_rng(seed)
    electrons = random.random(400) * scale
    fluence = FluenceMap(OPTICS, (-30.0, -30.0), (70.0, 70.0))
    points = random.random((400, 2)) * 110.0 - 35.0  # some of them outside
    fluence.deposit(points, electrons)
    outside = np.any((points < -30.0) | (points > 70.0), axis=1)
    assert fluence.lost == pytest.approx(electrons[outside].sum(), rel=1e-6)
    assert fluence.electrons + fluence.lost == pytest.approx(electrons.sum(), rel=1e-6)


def test_fluence_is_zero_beyond_the_reach_of_the_probe():
    fluence = FluenceMap(OPTICS, (-30.0, -30.0), (130.0, 130.0))
    fluence.deposit(scattered(500, 0), 1e4)
    x = np.arange(-30.0, 130.0, 1.0)
    where = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    beyond = np.any((where < -fluence.reach_A) | (where > 40.0 + fluence.reach_A), axis=1)
    assert np.all(fluence.at(where)[beyond] == 0.0)
    assert fluence.at(where)[np.all((where > 0.0) & (where < 40.0), axis=1)].min() > 0.0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 1.2))
def test_the_point_that_reaches_a_threshold_is_where_the_fluence_does(seed, share):
    random = np.random.default_rng(seed)
    points, electrons = random.random((60, 2)) * 30.0, random.integers(0, 3, 60) * 100.0
    site = random.random(2) * 30.0
    whole, one_by_one = (FluenceMap(OPTICS, (-30.0, -30.0), (60.0, 60.0)) for _ in range(2))
    packet = whole.packet(points, electrons)
    whole.add(packet)
    threshold = share * whole.at(site[None])[0]
    history = []
    for point, amount in zip(points, electrons, strict=True):
        one_by_one.deposit(point[None], amount)
        history.append(one_by_one.at(site[None])[0])
    there = np.flatnonzero(np.array(history) >= threshold)
    assert whole.first_reaching(site, threshold, packet) == (there[0] if len(there) else None)
    assert whole.before(site, packet, 20) == history[19]
    whole.remove(packet)
    assert whole.electrons == 0.0
    assert whole.at(site[None])[0] == 0.0
