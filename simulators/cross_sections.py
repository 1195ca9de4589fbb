"""Knock-on cross-sections of nuclei at rest and in thermal motion. Energies eV, cross-sections barn."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .elements import MASSES_U, NUMBERS
from .optics import REST_ENERGY_EV, velocity_ratio

Array = NDArray[np.float64]
BOHR_A = 0.529177210903
RYDBERG_EV = 13.605693122994
INVERSE_FINE_STRUCTURE = 137.035999084
ATOMIC_MASS_EV = 931494102.42
SPEED_OF_LIGHT_M_S = 299792458.0
BOLTZMANN_EV_K = 8.617333262e-5
BARN_A2 = 1e-8
"""One barn in square angstrom."""
ROOM_K = 300.0
"""Temperature at which velocity variances and critical fluences are given, K."""


def max_energy_transfer_eV(symbol: str, voltage_kV: float) -> float:
    """Highest energy that a head-on electron gives to a resting nucleus: 2 E (E + 2 m) M / ((M + m)^2 + 2 M E)."""
    energy, m, mass = voltage_kV * 1e3, REST_ENERGY_EV, MASSES_U[symbol] * ATOMIC_MASS_EV
    return 2.0 * energy * (energy + 2.0 * m) * mass / ((mass + m) ** 2 + 2.0 * mass * energy)


def knock_on_barn(symbol: str, threshold_eV: float, voltage_kV: float, transfer_eV: Array) -> Array:
    """McKinley-Feshbach cross-section for transfers above ``threshold_eV``, barn, where at most ``transfer_eV`` passes.

    sigma = 4 pi (a0 Z E_R / m)^2 (1 - b^2) / b^4 / x
            {1 + 2 pi a b sqrt(x) - x [1 + 2 pi a b + (b^2 + pi a b) ln(1/x)]},
    x = threshold / transfer <= 1, a = Z / 137.036, b = v/c; zero for x > 1 (W. A. McKinley and H. Feshbach, Phys. Rev.
    74, 1759 (1948), integrated over angles).
    """
    number = NUMBERS[symbol]
    b = velocity_ratio(voltage_kV)
    pi_a_b = math.pi * number / INVERSE_FINE_STRUCTURE * b
    x = np.minimum(threshold_eV / np.maximum(transfer_eV, 1e-12), 1.0)
    front = 4.0 * math.pi * (BOHR_A * number * RYDBERG_EV / REST_ENERGY_EV) ** 2 * (1.0 - b**2) / b**4
    bracket = 1.0 + 2.0 * pi_a_b * np.sqrt(x) - x * (1.0 + 2.0 * pi_a_b - (b**2 + pi_a_b) * np.log(x))
    return np.asarray(front / x * bracket / BARN_A2)


def thermal_knock_on_barn(symbol: str, threshold_eV: float, voltage_kV: float, variance_m2_s2: float) -> float:
    """Knock-on cross-section averaged over the velocity v of the nucleus along the beam, v ~ N(0, variance), barn.

    A nucleus that already moves with the beam receives T (1 + M v / 2 p)^2, p the electron's momentum (Meyer 2012).
    """
    at_rest = max_energy_transfer_eV(symbol, voltage_kV)
    if variance_m2_s2 == 0.0:
        return float(knock_on_barn(symbol, threshold_eV, voltage_kV, np.array(at_rest)))
    energy = voltage_kV * 1e3
    momentum = math.sqrt(energy * (energy + 2.0 * REST_ENERGY_EV))
    mass = MASSES_U[symbol] * ATOMIC_MASS_EV
    deviation = np.linspace(-8.0, 8.0, 4001)  # the integrand has a kink at threshold: a fine trapezoid, no quadrature
    velocity = deviation * math.sqrt(variance_m2_s2) / SPEED_OF_LIGHT_M_S
    transfer = at_rest * (1.0 + mass * velocity / (2.0 * momentum)) ** 2
    weight = np.exp(-0.5 * deviation**2)
    return float(np.sum(weight * knock_on_barn(symbol, threshold_eV, voltage_kV, transfer)) / np.sum(weight))


def classical_variance_m2_s2(symbol: str, temperature_K: float) -> float:
    """Velocity variance per axis of a classical nucleus, k T / M, m^2/s^2."""
    return BOLTZMANN_EV_K * temperature_K / (MASSES_U[symbol] * ATOMIC_MASS_EV) * SPEED_OF_LIGHT_M_S**2


def variance_at_m2_s2(symbol: str, room_variance_m2_s2: float, temperature_K: float) -> float:
    """Velocity variance at ``temperature_K`` of a nucleus that has ``room_variance_m2_s2`` at 300 K, m^2/s^2.

    A harmonic (Einstein) oscillator has (h f / 2 M) coth(h f / 2 k T), so that x coth(x) at 300 K, x = h f / 2 k T, is
    the stated variance over the classical one. A value at or below the classical one scales as T.
    """
    from scipy.optimize import brentq

    ratio = room_variance_m2_s2 / classical_variance_m2_s2(symbol, ROOM_K)
    if ratio <= 1.0 + 1e-9:
        return room_variance_m2_s2 * temperature_K / ROOM_K
    x = brentq(lambda x: x / math.tanh(x) - ratio, 1e-9, ratio, xtol=1e-12)
    return float(room_variance_m2_s2 * (math.tanh(x) / math.tanh(x * (ROOM_K / temperature_K))))
