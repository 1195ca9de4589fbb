"""Unit conversions and the few constants that the core needs (CODATA 2018 exact values)."""

from __future__ import annotations

ANGSTROM_PER_NM = 10.0
ELECTRON_CHARGE_C = 1.602176634e-19


def electrons_per_second(current_pA: float) -> float:
    """Electrons per second in a current of ``current_pA`` picoampere (1 pA = 6.2415e6 e/s)."""
    return current_pA * 1e-12 / ELECTRON_CHARGE_C


def nm_to_angstrom(length_nm: float) -> float:
    """nm to angstrom."""
    return length_nm * ANGSTROM_PER_NM


def angstrom_to_nm(length_A: float) -> float:
    """Angstrom to nm."""
    return length_A / ANGSTROM_PER_NM


def fluence_e_per_A2(electrons: float, area_nm2: float) -> float:
    """Mean fluence in e/A^2 of ``electrons`` spread over ``area_nm2``."""
    return electrons / (area_nm2 * ANGSTROM_PER_NM**2)
