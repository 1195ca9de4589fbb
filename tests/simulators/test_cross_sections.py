import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.constants import Boltzmann, atomic_mass, hbar
from scipy.integrate import quad
from scipy.optimize import bisect

from simulators.cross_sections import (
    knock_on_barn,
    max_energy_transfer_eV,
    thermal_knock_on_barn,
    variance_at_m2_s2,
)
from simulators.optics import velocity_ratio


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


def oscillator_variance(frequency_rad_s, mass_kg, temperature_K):
    """<v^2> of a harmonic oscillator, summed over its levels: half of the mean energy is kinetic."""
    step = hbar * frequency_rad_s / (Boltzmann * temperature_K)
    n = np.arange(int(60 / step) + 2)
    weight = np.exp(-n * step)
    return hbar * frequency_rad_s / mass_kg * np.sum(weight * (n + 0.5)) / np.sum(weight)


@settings(max_examples=30, deadline=None)
@given(excess=st.floats(1.001, 8.0), temperature=st.floats(20.0, 600.0))
def test_velocity_variance_follows_a_quantum_oscillator(excess, temperature):
    mass = 12.011 * atomic_mass
    stated = excess * Boltzmann * 300 / mass
    frequency = bisect(lambda w: oscillator_variance(w, mass, 300.0) - stated, 1e11, 3e15, xtol=1e3)
    expected = oscillator_variance(frequency, mass, temperature)
    assert variance_at_m2_s2("C", stated, temperature) == pytest.approx(expected, rel=1e-4)
    assert variance_at_m2_s2("C", stated, 300.0) == stated


def test_a_classical_velocity_variance_scales_with_temperature():
    assert variance_at_m2_s2("S", 7.78e4, 100.0) == pytest.approx(7.78e4 / 3)
    assert variance_at_m2_s2("S", 0.0, 100.0) == 0.0
