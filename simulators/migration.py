"""What becomes of vacancies with time: which one heals or hops next, and where to. Event-driven, exact in time.

Every vacancy draws its waiting times when it opens, from the identity of its site and how often that has changed; what
it waited for lapses when the site is filled. All waiting times are exponential, so drawing anew changes no law.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import draws
from .cells import CellIndex
from .clocks import HEALING, HOP, ROLES
from .materials import Damage
from .specimens import Specimen

HOP_REACH_A = 6.0
"""No hop is longer than this in projection, angstrom."""
HEIGHT_A = 1.0
"""Sites of a sublattice differ in height by less than this, angstrom."""
SHELL = 1.2
"""Sites up to this many times further away than the nearest one count as nearest."""


class Moment(NamedTuple):
    """At ``time_s`` the vacancy at site ``atom`` heals or hops (``process``), if its site is still at ``turn``."""

    time_s: float
    key: int
    process: int
    atom: int
    turn: int


class Vacancies:
    """The vacancies that wait. ``turn`` counts how often each site was emptied or filled."""

    def __init__(self, specimen: Specimen, model: Damage, seed: int, keys: draws.Keys) -> None:
        self._specimen, self._seed, self._keys = specimen, seed, keys
        self._healing_per_s = model.migration.healing_rate(model.temperature_K)
        self._hops_per_s = model.migration.hop_rate(model.temperature_K)
        self._index = CellIndex(specimen.positions_A[:, :2], HOP_REACH_A)
        self._waiting: list[Moment] = []
        self._healing: set[int] = set()
        self.turn: Counter[int] = Counter()
        for atom in np.flatnonzero(~specimen.alive):
            self._wait(int(atom), HOP, self._hops_per_s, 0.0)

    def open(self, atom: int, time_s: float, heals: bool) -> None:
        """The site of ``atom`` is vacant from ``time_s`` on; ``heals`` where the beam made the vacancy."""
        self.turn[atom] += 1
        self._wait(atom, HOP, self._hops_per_s, time_s)
        if heals:
            self._healing.add(atom)
            self._wait(atom, HEALING, self._healing_per_s, time_s)

    def close(self, atom: int) -> bool:
        """The site is filled. Returns True where its vacancy would have healed."""
        self.turn[atom] += 1
        healing = atom in self._healing
        self._healing.discard(atom)
        return healing

    def next(self) -> Moment | None:
        """The next thing to happen to a vacancy, if no electron comes first."""
        while self._waiting and self._waiting[0].turn != self.turn[self._waiting[0].atom]:
            heapq.heappop(self._waiting)
        return self._waiting[0] if self._waiting else None

    def destination(self, atom: int, alive: NDArray[np.bool_]) -> int | None:
        """The occupied site to which the vacancy at ``atom`` hops: one of the nearest of its element at its height."""
        sites, numbers = self._specimen.positions_A, self._specimen.atomic_numbers
        near = self._index.box(sites[atom, :2] - HOP_REACH_A, sites[atom, :2] + HOP_REACH_A)
        alike = alive[near] & (numbers[near] == numbers[atom]) & (near != atom)
        near = near[alike & (np.abs(sites[near, 2] - sites[atom, 2]) < HEIGHT_A)]
        distance = np.linalg.norm(sites[near] - sites[atom], axis=1)
        near = near[distance <= min(SHELL * distance.min(initial=np.inf), HOP_REACH_A)]
        if not len(near):
            return None
        near = near[np.argsort(self._keys[near])]
        choice = draws.uniform(self._seed, "damage-destination", self._keys[[atom]], self.turn[atom])[0]
        return int(near[int(choice * len(near))])

    def _wait(self, atom: int, process: int, rate_per_s: float, time_s: float) -> None:
        if rate_per_s > 0.0:
            turn = self.turn[atom]
            role = f"{ROLES[process]}-time"
            waits = draws.exponential(self._seed, role, self._keys[[atom]], turn)[0] / rate_per_s
            heapq.heappush(self._waiting, Moment(time_s + float(waits), int(self._keys[atom]), process, atom, turn))
