"""Beam damage: knock-on, electronic excitation and radiolysis, as events that do not depend on how a scan is split.

An atom is hit by a process once its fluence F reaches E / sigma, with E ~ Exp(1) drawn once per atom and process; then
P(hit by F) = 1 - exp(-sigma F). Energies eV, cross-sections barn outside (1 b = 1e-8 A^2), fluence e/A^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, NonNegative, Positive
from aecontrol.units import nm_to_angstrom

from .elements import MASSES_U, NUMBERS, SYMBOLS
from .fluence import FluenceMap
from .optics import REST_ENERGY_EV, Optics, velocity_ratio
from .specimens import MARGIN_NM, Specimen
from .streams import stream

Array = NDArray[np.float64]
BARN_A2 = 1e-8
BOHR_A = 0.529177210903
RYDBERG_EV = 13.605693122994
INVERSE_FINE_STRUCTURE = 137.035999084
ATOMIC_MASS_EV = 931494102.42
SPEED_OF_LIGHT_M_S = 299792458.0
WORLD_MARGIN_NM = MARGIN_NM + 1.0
KNOCK_ON, RADIOLYSIS = 0, 1


class Damage(Model):
    """What the beam does to which element. An element that is not named is not harmed by that process.

    The excitation cross-section and every critical fluence are assumptions, not measured properties. Radiolysis moves
    an atom by a Gaussian displacement or removes it. There is no dose-rate effect.
    """

    displacement_threshold_eV: dict[str, Positive] = Field(
        {"S": 6.9, "C": 21.13}, description="energy that ejects an atom: S from MoS2, C from graphene, eV"
    )
    velocity_variance_m2_s2: dict[str, NonNegative] = Field(
        {"S": 7.78e4, "C": 3.17e5}, description="thermal velocity variance along the beam near 300 K, m^2/s^2"
    )
    excitation_barn: dict[str, NonNegative] = Field(
        {"S": 1.0}, description="cross-section added to knock-on by electronic excitation (60-80 kV), barn"
    )
    critical_fluence_e_per_A2: dict[str, Positive] = Field(
        {}, description="radiolysis: fluence at which 1/e of the atoms are still untouched, e/A^2"
    )
    radiolysis_removes: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of radiolysed atoms that leave; the others are displaced"
    )
    radiolysis_displacement_nm: NonNegative = Field(
        0.05, description="standard deviation per axis of the displacement of a radiolysed atom, nm"
    )

    def knock_on_A2(self, symbol: str, voltage_kV: float) -> float:
        """Cross-section of removal, knock-on with thermal velocities plus excitation, angstrom^2."""
        barn = self.excitation_barn.get(symbol, 0.0)
        if symbol in self.displacement_threshold_eV:
            variance = self.velocity_variance_m2_s2.get(symbol, 0.0)
            barn += thermal_knock_on_barn(symbol, self.displacement_threshold_eV[symbol], voltage_kV, variance)
        return barn * BARN_A2


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


@dataclass(frozen=True)
class Event:
    """``atom`` was changed by ``process`` when the probe was at point ``point`` of the exposure."""

    atom: int
    process: int
    point: int


class DamagedSpecimen:
    """A specimen that remembers every electron. ``alive`` and ``positions_A`` are its present state.

    Fluence is always taken at an atom's original site, so that a displacement cannot make events depend on the split.
    """

    def __init__(self, specimen: Specimen, model: Damage, optics: Optics, seed: int) -> None:
        self.specimen = specimen
        self.alive = specimen.alive.copy()
        self.positions_A = specimen.positions_A.copy()
        width, height = (nm_to_angstrom(side + WORLD_MARGIN_NM) for side in specimen.size_nm)
        margin = nm_to_angstrom(WORLD_MARGIN_NM)
        self.fluence = FluenceMap(optics, (-margin, -margin), (width, height))
        random = stream(seed, "damage")
        drawn = random.exponential(size=(2, len(specimen)))
        self._leaves = random.random(len(specimen)) < model.radiolysis_removes
        self._shift = nm_to_angstrom(model.radiolysis_displacement_nm) * random.standard_normal((len(specimen), 3))
        knock_on = {symbol: model.knock_on_A2(symbol, optics.voltage_kV) for symbol in SYMBOLS.values()}
        radiolysis = {symbol: 1.0 / fluence for symbol, fluence in model.critical_fluence_e_per_A2.items()}
        hazards = np.stack([_per_atom(specimen, knock_on), _per_atom(specimen, radiolysis)])
        with np.errstate(divide="ignore"):
            # Fluence at which each process [2] hits each atom [n]; becomes inf once it has.
            self._critical = drawn / hazards
        self._critical[:, ~specimen.alive] = np.inf
        self._next = self._critical.min(axis=0)

    def expose(self, points_A: Array, electrons_per_point: float) -> list[Event]:
        """Deliver ``electrons_per_point`` at each of ``points_A`` [m, 2] in order; the changes, in order of time."""
        points = np.asarray(points_A).reshape(-1, 2)
        if not len(points):
            return []
        self.fluence.deposit(points, electrons_per_point)
        atoms = self._within_reach(points)
        if not len(atoms):
            return []
        sites = self.specimen.positions_A[:, :2]
        atoms = atoms[self.fluence.ceiling_at(sites[atoms]) >= self._next[atoms]]
        events = []
        x, y = np.ascontiguousarray(points.T)
        for atom, fluence in zip(atoms, self.fluence.at(sites[atoms]), strict=True):
            for process in np.flatnonzero(self._critical[:, atom] <= fluence):
                excess = fluence - self._critical[process, atom]
                point = self._point_of_excess(sites[atom], x, y, float(excess) / electrons_per_point)
                events.append(Event(int(atom), int(process), point))
        events.sort(key=lambda event: (event.point, event.atom, event.process))
        return [event for event in events if self._happens(event)]

    def apply(self, event: Event, alive: NDArray[np.bool_], positions_A: Array) -> None:
        """Make the change of ``event`` in the given arrays."""
        if event.process == KNOCK_ON or self._leaves[event.atom]:
            alive[event.atom] = False
        else:
            positions_A[event.atom] += self._shift[event.atom]

    def _happens(self, event: Event) -> bool:
        """Apply ``event`` to the present state, unless its atom has gone already."""
        if not self.alive[event.atom]:
            return False
        self.apply(event, self.alive, self.positions_A)
        gone = not self.alive[event.atom]
        self._critical[slice(None) if gone else event.process, event.atom] = np.inf
        self._next[event.atom] = self._critical[:, event.atom].min()
        return True

    def _within_reach(self, points: Array) -> NDArray[np.int64]:
        """Atoms that can still be hit and lie within the probe's tails of ``points``."""
        reach = self.fluence.reach_A
        low, high = points.min(axis=0) - reach, points.max(axis=0) + reach
        sites = self.specimen.positions_A[:, :2]
        near = np.isfinite(self._next) & np.all((sites > low) & (sites < high), axis=1)
        return np.flatnonzero(near)

    def _point_of_excess(self, site: Array, x: Array, y: Array, excess: float) -> int:
        """Index of the point (``x``, ``y``) from which on ``site`` received its last ``excess``, fluence per electron
        of a point."""
        dx, dy = x - site[0], y - site[1]
        near = np.flatnonzero((np.abs(dx) < self.fluence.reach_A) & (np.abs(dy) < self.fluence.reach_A))
        if not len(near):
            return 0  # only rounding brought the fluence to its threshold just now
        gains = self.fluence.gains(site, x[near], y[near])
        later = np.cumsum(gains[::-1])[::-1]
        return int(near[max(0, int(np.count_nonzero(later > excess)) - 1)])


def _per_atom(specimen: Specimen, by_symbol: Mapping[str, float]) -> Array:
    table = np.zeros(max(SYMBOLS) + 1)
    for number, symbol in SYMBOLS.items():
        table[number] = by_symbol.get(symbol, 0.0)
    return np.asarray(table[specimen.atomic_numbers])
