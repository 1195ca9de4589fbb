"""When which atom is due: thresholds of fluence drawn once, before the first electron.

A process of cross-section sigma has happened to an atom once the fluence F at its site reaches E / sigma, with
E ~ Exp(1); then P(happened by F) = 1 - exp(-sigma F). Radiolysis breaks a bond unit at once: its atoms share one E and
the fluence at their centroid. A unit breaks once: atoms that come back to it later are only subject to knock-on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from aecontrol.units import angstrom_to_nm

from . import draws
from .cells import CellIndex
from .cross_sections import BARN_A2
from .elements import SYMBOLS
from .materials import Damage
from .specimens import Specimen
from .specimens.base import SINGLE_LAYER_NM

Array = NDArray[np.float64]
Atoms = NDArray[np.int64]
KNOCK_ON, RADIOLYSIS, HOP, HEALING = 0, 1, 2, 3
"""Processes; the last two only where migration is switched on."""
ROLES = ("damage-knock-on", "damage-radiolysis", "damage-hop", "damage-healing")
"""Random stream of each process."""
SURFACE_DEPTH_A = 3.0
"""Atoms less than this below the last atom along the beam belong to the exit surface, angstrom."""
SURFACE_CELL_A = 3.0
"""The last atom is looked for in a square of three times this side, angstrom."""
INDEX_CELL_A = 10.0


class Clocks:
    """All thresholds of a specimen. Clock c watches ``site_A`` [c, 2] and is due at the fluence ``critical`` [c]
    (infinite: never, or no more); ``process`` [c] then happens to the atoms ``of(c)``."""

    def __init__(self, specimen: Specimen, model: Damage, voltage_kV: float, seed: int, keys: draws.Keys) -> None:
        """``keys`` [n] are the identities of the atoms."""
        knock_on = _knock_on_A2(specimen, model, voltage_kV)
        hop = np.full(len(specimen), model.migration.hop_barn * BARN_A2)
        parts = [_single(KNOCK_ON, knock_on, specimen, seed, keys), _single(HOP, hop, specimen, seed, keys)]
        parts.append(_units(specimen, model, seed, keys))
        sites, critical, members, sizes = zip(*parts, strict=True)
        self.hazard_A2 = {KNOCK_ON: knock_on, HOP: hop}
        self.site_A = np.concatenate(sites)
        self.critical = np.concatenate(critical)
        self.process = np.repeat([KNOCK_ON, HOP, RADIOLYSIS], [len(part) for part in critical])
        self._members = np.concatenate(members)
        self._first = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        self._index = CellIndex(self.site_A, INDEX_CELL_A)
        self._begin = {KNOCK_ON: 0, HOP: len(critical[0])}
        self._single = {KNOCK_ON: members[0], HOP: members[1]}

    def of(self, clock: int) -> Atoms:
        """The atoms that a clock watches, in an order that is theirs."""
        return np.asarray(self._members[self._first[clock] : self._first[clock + 1]])

    def running(self, low_A: Array, high_A: Array) -> Atoms:
        """The clocks in and about a box (x, y) that are still to come."""
        near = self._index.box(low_A, high_A)
        return np.asarray(near[np.isfinite(self.critical[near])])

    def single(self, process: int, atom: int) -> int | None:
        """The clock of ``process`` for one atom; None where that cannot happen."""
        place = int(np.searchsorted(self._single[process], atom))
        known = place < len(self._single[process]) and self._single[process][place] == atom
        return self._begin[process] + place if known else None


Part = tuple[Array, Array, Atoms, Atoms]
"""Sites [c, 2], thresholds [c], members in one row, number of members [c]."""


def _single(process: int, hazard_A2: Array, specimen: Specimen, seed: int, keys: draws.Keys) -> Part:
    """One clock per atom with a hazard. Knock-on waits for atoms, a hop for what is missing."""
    atoms = np.flatnonzero(hazard_A2 > 0.0)
    critical = draws.exponential(seed, ROLES[process], keys[atoms]) / hazard_A2[atoms]
    critical[specimen.alive[atoms] == (process == HOP)] = np.inf
    return specimen.positions_A[atoms, :2], critical, atoms, np.ones(len(atoms), dtype=np.int64)


def _units(specimen: Specimen, model: Damage, seed: int, keys: draws.Keys) -> Part:
    """One clock per bond unit (per unit and critical fluence where a unit has several)."""
    scale = _per_atom(specimen, model.critical_fluence_at, np.inf)
    if not np.isfinite(scale).any():
        return np.zeros((0, 2)), np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    # Everything goes by the order of the keys, so that not even a centroid's rounding depends on the atoms' numbers.
    order = np.lexsort((keys, specimen.unit))
    ordered = specimen.unit[order]
    start = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    count = np.diff(start, append=len(order))
    centroid = np.add.reduceat(specimen.positions_A[order, :2], start) / count[:, None]
    drawn = draws.exponential(seed, ROLES[RADIOLYSIS], keys[order[start]]) ** (1.0 / model.induction_exponent)
    unit = np.repeat(np.arange(len(start)), count)
    order, unit = order[np.isfinite(scale[order])], unit[np.isfinite(scale[order])]
    again = np.lexsort((scale[order], unit))  # stable: the keys stay in order
    order, unit = order[again], unit[again]
    first = np.flatnonzero((np.diff(unit, prepend=-1) != 0) | (np.diff(scale[order], prepend=0.0) != 0.0))
    clock_unit = unit[first]
    critical = scale[order[first]] * drawn[clock_unit]
    critical *= model.sensitivity(angstrom_to_nm(1.0) * centroid[clock_unit])  # a unit breaks at once, in one zone
    return centroid[clock_unit], critical, order, np.diff(first, append=len(order))


def _knock_on_A2(specimen: Specimen, model: Damage, voltage_kV: float) -> Array:
    surface = _per_atom(specimen, lambda symbol: model.knock_on_A2(symbol, voltage_kV), 0.0)
    bulk = _per_atom(specimen, lambda symbol: model.bulk_knock_on_A2(symbol, voltage_kV), 0.0)
    return np.where(exit_surface(specimen), surface, bulk)


def exit_surface(specimen: Specimen) -> NDArray[np.bool_]:
    """Which atoms [n] the beam can eject: the last SURFACE_DEPTH_A before the vacuum behind the specimen, as built (the
    beam goes to +z; what sputtering uncovers later does not count). Every atom of a sheet."""
    if specimen.thickness_nm <= SINGLE_LAYER_NM:
        return np.ones(len(specimen), dtype=np.bool_)
    flat, height = specimen.positions_A[:, :2], specimen.positions_A[:, 2]
    x, y = ((flat - flat.min(axis=0)) / SURFACE_CELL_A).astype(np.int64).T + 1
    top = np.full((y.max() + 2, x.max() + 2), -np.inf)
    there = specimen.alive
    np.maximum.at(top, (y[there], x[there]), height[there])
    for axis in (0, 1):
        near = [np.roll(top, shift, axis) for shift in (-1, 0, 1)]  # the border is empty: nothing comes round
        top = np.maximum.reduce(near)
    return np.asarray(height > top[y, x] - SURFACE_DEPTH_A)


def _per_atom(specimen: Specimen, value: Callable[[str], float], missing: float) -> Array:
    """``value`` of each atom's element [n]."""
    table = np.full(max(SYMBOLS) + 1, missing)
    for number in np.unique(specimen.atomic_numbers):
        table[number] = value(SYMBOLS[int(number)])
    return np.asarray(table[specimen.atomic_numbers])
