"""Beam damage: knock-on and radiolysis of single atoms, driven by the fluence that each atom really received.

Every atom draws one threshold E ~ Exp(1) per process when the specimen is made; it is hit when its cumulative hazard (cross
section x fluence) reaches E. How a dose is split into scans therefore cannot change what it destroys. Lengths are
angstrom, energies eV, cross sections barn (1 b = 1e-8 A^2).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, NonNegative, Positive

from .optics import REST_ENERGY_EV, velocity_ratio
from .streams import stream

Array = NDArray[np.float64]
BARN_A2 = 1e-8
BOHR_A = 0.529177
RYDBERG_EV = 13.6057
FINE_STRUCTURE = 137.036
ATOMIC_MASS_EV = 931.494e6
BOLTZMANN_EV_PER_K = 8.617333e-5
SPEED_OF_LIGHT_M_PER_S = 299792458.0
MASS_U = {"C": 12.011, "N": 14.007, "Si": 28.085, "S": 32.06, "Mo": 95.95}
ATOMIC_NUMBER = {"C": 6, "N": 7, "Si": 14, "S": 16, "Mo": 42}
GRAPHENE_VELOCITY2_300K = 3.17e5
"""Mean square out-of-plane velocity of C in graphene at 300 K, m^2/s^2 (Meyer et al. 2012, recalled)."""


class Damage(Model):
    """What the beam does to atoms. The defaults are assumptions (order of magnitude), not properties of a sample."""

    temperature_K: Positive = Field(300.0, description="specimen temperature: changes thermal velocities only")
    displacement_eV: dict[str, Positive] = Field(
        {"S": 6.9, "C": 21.13}, description="displacement threshold by element; elements not named never leave"
    )
    excitation_b: dict[str, NonNegative] = Field(
        {"S": 1.0}, description="added cross section of excitation-assisted loss by element, barn (assumed)"
    )
    critical_fluence_e_per_A2: dict[str, Positive] = Field(
        {}, description="radiolytic loss by element: fluence at which 1/e is left; none by default"
    )

    def rates_A2(self, symbols: NDArray[np.str_], voltage_kV: float) -> tuple[Array, Array]:
        """Hazard per fluence [n] of each atom by knock-on (with excitation) and by radiolysis, A^2."""
        knock_on, radiolysis = np.zeros(len(symbols)), np.zeros(len(symbols))
        for symbol in np.unique(symbols):
            same = symbols == symbol
            if symbol in self.displacement_eV:
                barn = thermal_cross_section_b(
                    str(symbol), self.displacement_eV[str(symbol)], voltage_kV, self.temperature_K
                )
                knock_on[same] = BARN_A2 * (barn + self.excitation_b.get(str(symbol), 0.0))
            if symbol in self.critical_fluence_e_per_A2:
                radiolysis[same] = 1.0 / self.critical_fluence_e_per_A2[str(symbol)]
        return knock_on, radiolysis


def thresholds(seed: int, atoms: int) -> tuple[Array, Array]:
    """Exp(1) thresholds [atoms] of both processes."""
    return (
        stream(seed, "damage-knock-on").standard_exponential(atoms),
        stream(seed, "damage-radiolysis").standard_exponential(atoms),
    )


def max_transfer_eV(symbol: str, voltage_kV: float, velocity_m_per_s: float | Array = 0.0) -> float | Array:
    """Most energy that a beam electron gives to a nucleus.

    At rest: 2E(E + 2m)M / ((M + m)^2 + 2ME), exact. Moving along the beam at v: (2p + Mv)^2 / 2M, in the limit of a
    heavy nucleus (Meyer et al. 2012), scaled so that both agree at v = 0.
    """
    energy, mass = voltage_kV * 1e3, MASS_U[symbol] * ATOMIC_MASS_EV
    rest = 2 * energy * (energy + 2 * REST_ENERGY_EV) * mass
    rest /= (mass + REST_ENERGY_EV) ** 2 + 2 * mass * energy
    momentum = math.sqrt(energy * (energy + 2 * REST_ENERGY_EV))
    own = mass * velocity_m_per_s / SPEED_OF_LIGHT_M_PER_S
    return rest * ((2 * momentum + own) / (2 * momentum)) ** 2


def knock_on_cross_section_b(symbol: str, threshold_eV: float, transfer_eV: float | Array, voltage_kV: float) -> Array:
    """McKinley-Feshbach cross section in barn for an energy transfer above ``threshold_eV``; zero below (W. A.
    McKinley and H. Feshbach, Phys. Rev. 74, 1759 (1948), integrated over angles)."""
    beta, a = velocity_ratio(voltage_kV), ATOMIC_NUMBER[symbol] / FINE_STRUCTURE
    x = np.minimum(threshold_eV / np.maximum(np.asarray(transfer_eV, dtype=np.float64), 1e-12), 1.0)
    front = 4 * math.pi * (BOHR_A * ATOMIC_NUMBER[symbol] * RYDBERG_EV / REST_ENERGY_EV) ** 2
    front *= (1 - beta**2) / beta**4
    bracket = 1 + 2 * math.pi * a * beta * np.sqrt(x)
    bracket -= x * (1 + 2 * math.pi * a * beta + (beta**2 + math.pi * a * beta) * np.log(1 / x))
    return np.asarray(np.where(x < 1, front / x * bracket, 0.0) / BARN_A2)


def thermal_cross_section_b(symbol: str, threshold_eV: float, voltage_kV: float, temperature_K: float) -> float:
    """The cross section averaged over the nucleus's velocity along the beam, N(0, kT/M) (graphene: the published
    out-of-plane value, scaled with temperature), barn."""
    if symbol == "C":
        square = GRAPHENE_VELOCITY2_300K * temperature_K / 300.0
    else:
        square = BOLTZMANN_EV_PER_K * temperature_K / (MASS_U[symbol] * ATOMIC_MASS_EV) * SPEED_OF_LIGHT_M_PER_S**2
    return mean_cross_section_b(symbol, threshold_eV, voltage_kV, square)


def mean_cross_section_b(symbol: str, threshold_eV: float, voltage_kV: float, velocity2: float) -> float:
    """The average for a mean square velocity along the beam, m^2/s^2, by the trapezoid rule over +-8 deviations."""
    z = np.linspace(-8.0, 8.0, 4001)
    weight = np.exp(-(z**2) / 2)
    transfer = max_transfer_eV(symbol, voltage_kV, z * math.sqrt(velocity2))
    values = knock_on_cross_section_b(symbol, threshold_eV, transfer, voltage_kV)
    return float((weight * values).sum() / weight.sum())
