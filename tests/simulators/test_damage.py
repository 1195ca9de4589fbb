import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom

from simulators.cross_sections import (
    knock_on_barn,
    max_energy_transfer_eV,
    thermal_knock_on_barn,
)
from simulators.damage import KNOCK_ON, Damage, DamagedSpecimen
from simulators.fluence import FluenceMap
from simulators.optics import Optics, velocity_ratio, wavelength_A
from simulators.specimens.sheets import Graphene, Mos2, SulphurVacancies

from .oracles import round_kernel

OPTICS = Optics()
RADIOLYTIC = Damage(critical_fluence_e_per_A2={"S": 300.0}, radiolysis_removes=0.5)


@pytest.mark.parametrize(
    ("symbol", "kV", "expected"),
    [("C", 60, 11.60), ("C", 80, 15.76), ("C", 200, 43.68), ("S", 80, 5.90), ("S", 90, 6.70), ("Li", 200, 75.6)],
)
def test_energy_transfer_matches_the_published_values(symbol, kV, expected):
    assert max_energy_transfer_eV(symbol, kV) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("symbol", "threshold", "kV"), [("C", 21.13, 120), ("S", 6.9, 100), ("S", 6.9, 300)])
def test_cross_section_is_the_angular_integral_of_mckinley_feshbach(symbol, threshold, kV):
    number = {"C": 6, "S": 16}[symbol]
    beta, a = velocity_ratio(kV), number / 137.035999
    transfer = max_energy_transfer_eV(symbol, kV)
    front = (number * 2.8179403e-5 / 2) ** 2 * (1 - beta**2) / beta**4

    def per_angle(theta):
        s = math.sin(theta / 2)
        mott = 1 - beta**2 * s**2 + math.pi * beta * a * s * (1 - s)
        return 2 * math.pi * math.sin(theta) * front * s**-4 * mott

    lowest = 2 * math.asin(math.sqrt(threshold / transfer))
    expected = quad(per_angle, lowest, math.pi, epsrel=1e-10)[0] * 1e8
    assert knock_on_barn(symbol, threshold, kV, np.array(transfer)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("symbol", "threshold", "kV", "expected"),
    [
        ("C", 21.13, 100, 0.0),
        ("C", 21.13, 120, 5.41),
        ("C", 12.0, 80, 25.9),
        ("S", 6.9, 80, 0.0),
        ("S", 6.9, 100, 31.5),
        ("S", 6.5, 200, 160.0),
        ("O", 20.0, 300, 19.4),
        ("Li", 10.0, 60, 39.6),
    ],
)
def test_static_cross_sections_match_the_published_table(symbol, threshold, kV, expected):
    assert thermal_knock_on_barn(symbol, threshold, kV, 0.0) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("symbol", "threshold", "variance", "kV", "expected"),
    [
        ("C", 21.13, 3.17e5, 80, 4e-6),
        ("C", 21.13, 3.17e5, 90, 0.0053),
        ("C", 21.13, 3.17e5, 100, 0.34),
        ("C", 21.13, 3.17e5, 110, 2.46),
        ("S", 6.9, 7.78e4, 70, 0.012),
        ("S", 6.9, 7.78e4, 80, 0.84),
        ("S", 6.9, 7.78e4, 100, 35.0),
    ],
)
def test_thermal_vibration_opens_the_threshold_as_published(symbol, threshold, variance, kV, expected):
    assert thermal_knock_on_barn(symbol, threshold, kV, variance) == pytest.approx(expected, rel=0.03)


def test_only_s_of_mos2_and_c_of_graphene_can_leave_at_the_defaults():
    damage = Damage()
    assert damage.knock_on_A2("S", 80) == pytest.approx(1.84e-8, rel=0.02)  # 0.84 b knock-on + 1 b excitation
    assert damage.knock_on_A2("Mo", 80) == 0.0
    assert 0.0 < damage.knock_on_A2("C", 80) < 1e-13


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


def small_mos2():
    return Mos2(size_nm=(4, 4), vacancies=SulphurVacancies(background_fraction=0.0, n_clusters=0)).build(0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), pieces=st.integers(2, 20))
def test_splitting_an_exposure_cannot_change_what_it_destroys(seed, pieces):
    specimen = small_mos2()
    points = scattered(6000, seed)
    whole, split = (DamagedSpecimen(specimen, RADIOLYTIC, OPTICS, seed) for _ in range(2))
    events = whole.expose(points, 60.0)
    assert len(events) > 20
    for piece in np.array_split(points, pieces):
        split.expose(piece, 60.0)
    assert np.array_equal(whole.alive, split.alive)
    assert np.array_equal(whole.positions_A, split.positions_A)


def test_events_come_in_the_order_of_the_beam_and_stop_where_it_does():
    specimen = small_mos2()
    points = scattered(6000, 1)
    whole = DamagedSpecimen(specimen, RADIOLYTIC, OPTICS, 7)
    events = whole.expose(points, 60.0)
    assert [event.point for event in events] == sorted(event.point for event in events)
    cut = 2500
    expected = [event for event in events if event.point < cut]
    assert len(expected) > 10
    reversed_future = np.concatenate([points[:cut], points[cut:][::-1]])
    for other in (points[:cut], reversed_future):
        again = DamagedSpecimen(specimen, RADIOLYTIC, OPTICS, 7).expose(other, 60.0)
        assert [event for event in again if event.point < cut] == expected


def test_removed_fraction_follows_the_exponential_law():
    specimen = Mos2(size_nm=(40, 40), vacancies=SulphurVacancies(background_fraction=0, n_clusters=0)).build(0)
    one = np.flatnonzero(specimen.site == "S")
    copies = replace(  # all S atoms under one known fluence: moved to the same place
        specimen, positions_A=np.where((specimen.site == "S")[:, None], (200.0, 200.0, 0.0), specimen.positions_A)
    )
    body = DamagedSpecimen(copies, Damage(excitation_barn={"S": 1e4}), OPTICS, 3)
    body.expose(np.array([[200.0, 200.0]]), 1.5e3)
    fluence = body.fluence.at(np.array([[200.0, 200.0]]))[0]
    chance = 1 - math.exp(-(1e4 + 0.8425) * 1e-8 * fluence)
    low, high = binom.interval(0.999, len(one), chance)
    assert 0.03 < chance < 0.3
    assert low <= np.count_nonzero(~body.alive) <= high


def test_nothing_happens_beyond_the_reach_of_the_probe_or_below_threshold():
    specimen = small_mos2()
    body = DamagedSpecimen(specimen, RADIOLYTIC, OPTICS, 0)
    body.expose(np.array([[20.0, 20.0]]), 1e9)
    hit = np.any(body.positions_A != specimen.positions_A, axis=1) | ~body.alive
    offset = np.abs(specimen.positions_A[:, :2] - 20.0).max(axis=1)
    assert hit.any()
    assert offset[hit].max() <= body.fluence.reach_A
    assert hit[(offset < 8.0) & (specimen.site == "S")].all()
    sheet = Graphene(size_nm=(4, 4)).build(0)
    carbon = DamagedSpecimen(sheet, Damage(), OPTICS, 0)
    assert carbon.expose(scattered(500, 0), 1e6) == []  # 80 kV is safe for graphene


def test_knock_on_wins_over_later_radiolysis_of_the_same_atom():
    both = Damage(critical_fluence_e_per_A2={"S": 1e3}, excitation_barn={"S": 1e5}, radiolysis_removes=1.0)
    body = DamagedSpecimen(small_mos2(), both, OPTICS, 0)
    events = body.expose(scattered(4000, 2), 200.0)
    atoms = [event.atom for event in events]
    assert len(atoms) == len(set(atoms)) > 50
    assert {event.process for event in events} == {KNOCK_ON, 1}
