"""Beam damage: knock-on, electronic excitation and radiolysis, as events that do not depend on how a scan is split.

Everything random is drawn per atom (or bond unit) from its own identity; an event happens at the point at which the
fluence at its site reaches the threshold drawn (see clocks), or at a time drawn (see migration). Both are the same to
the last bit however exposures are cut into pieces and whatever order the atoms are listed in.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aecontrol.errors import BadInput
from aecontrol.units import nm_to_angstrom

from . import draws
from .clocks import HEALING, HOP, KNOCK_ON, ROLES, Clocks
from .elements import SYMBOLS
from .fluence import FluenceMap, Packet
from .materials import Damage as Damage  # part of this module's interface
from .migration import Moment, Vacancies
from .optics import Optics
from .specimens import MARGIN_NM, Specimen

Array = NDArray[np.float64]
Kind = Literal["removed", "displaced", "healed", "hopped"]
WORLD_MARGIN_NM = MARGIN_NM + 1.0
MANY = 4_000_000
"""Clocks due times points from which an exposure is worked off in halves: each clock looks at every point."""


@dataclass(frozen=True)
class Event:
    """What happened to ``atom`` by ``process`` when the probe came to point ``point`` of the exposure (-1: beam
    blanked), at the fluence ``fluence_e_per_A2`` at its site (at its unit's centroid for radiolysis) and the clock
    ``time_s`` (None where the exposure came without times).

    ``kind``: 'removed'; 'displaced'; 'healed', back at its own site; 'hopped', where a vacancy moved: one event for the
    atom that left its site and one for the vacant site that it filled.
    """

    atom: int
    process: int
    point: int
    fluence_e_per_A2: float
    time_s: float | None
    kind: Kind


class _Due(NamedTuple):
    """A clock that comes due at a point."""

    point: int
    process: int
    key: int
    clock: int
    threshold: float


@dataclass(frozen=True)
class _Exposure:
    """Electrons on the map (None: only time passes), the times of their points, the number of the first, and what is
    due among them."""

    packet: Packet | None
    times: Array | None
    first: int
    queue: list[_Due]


@dataclass(frozen=True)
class _Now:
    """A moment of an exposure: the point that comes with or after it and how many have been delivered."""

    exposure: _Exposure
    point: int
    delivered: int
    time_s: float | None


class DamagedSpecimen:
    """A specimen that remembers every electron. ``alive`` and ``positions_A`` are its present state, ``fluence`` the
    map of the electrons.

    Fluence is always taken at original sites, so that a displacement cannot make events depend on the split.
    """

    def __init__(self, specimen: Specimen, model: Damage, optics: Optics, seed: int) -> None:
        self.specimen = specimen
        self.alive = specimen.alive.copy()
        self.positions_A = specimen.positions_A.copy()
        width, height = (nm_to_angstrom(side + WORLD_MARGIN_NM) for side in specimen.size_nm)
        margin = nm_to_angstrom(WORLD_MARGIN_NM)
        self.fluence = FluenceMap(optics, (-margin, -margin), (width, height))
        self._model, self._seed = model, seed
        self._keys = draws.identities(specimen.positions_A, specimen.atomic_numbers)
        self._clocks = Clocks(specimen, model, optics.voltage_kV, seed, self._keys)
        self._vacancies = Vacancies(specimen, model, seed, self._keys) if model.migration.on else None

    def expose(self, points_A: Array, electrons: ArrayLike, times_s: Array | None = None) -> list[Event]:
        """Deliver ``electrons`` (one number, or one for each point) at each of ``points_A`` [m, 2] in order, at the
        clock ``times_s`` [m], ascending; the changes, in order of time. Raises BadInput for electrons that are negative
        or not finite, and, where vacancies heal or move, for times that are missing."""
        points = np.asarray(points_A, dtype=np.float64).reshape(-1, 2)
        amount = np.broadcast_to(np.asarray(electrons, dtype=np.float64).reshape(-1), len(points))
        if not (np.isfinite(amount).all() and (amount >= 0.0).all()):
            raise BadInput("electrons of an exposure are negative or not finite", "deliver 0 electrons or more")
        if times_s is None and self._vacancies is not None:
            raise BadInput("vacancies that heal or move need the time of every point", "give times_s")
        times = None if times_s is None else np.asarray(times_s, dtype=np.float64).reshape(len(points))
        return self._deliver(self.fluence.packet(points, amount), times, 0) if len(points) else []

    def idle(self, seconds_from: float, seconds_to: float) -> list[Event]:
        """Let the clock run from ``seconds_from`` to ``seconds_to`` with the beam blanked; the changes in order."""
        if self._vacancies is None:
            return []
        if seconds_to < seconds_from:
            raise BadInput(f"the clock cannot run from {seconds_from} s back to {seconds_to} s", "let time go on")
        return self._replay(_Exposure(None, np.array([seconds_to]), -1, []))

    def apply(self, event: Event, alive: NDArray[np.bool_], positions_A: Array) -> None:
        """Make the change of ``event`` in the given arrays."""
        if event.kind == "displaced":
            positions_A[event.atom] += self._shift_A(event.atom)
            return
        alive[event.atom] = event.kind == "healed" or (event.kind == "hopped" and not alive[event.atom])
        if alive[event.atom]:
            positions_A[event.atom] = self.specimen.positions_A[event.atom]

    # ------------------------------------------------------------ inside

    def _deliver(self, packet: Packet, times: Array | None, first: int) -> list[Event]:
        """Expose ``packet``, whose points count from ``first``."""
        self.fluence.add(packet)
        due = self._due(packet)
        if len(due) * len(packet) > MANY and len(packet) > 1:
            self.fluence.remove(packet)
            half = len(packet) // 2
            early, late = (None, None) if times is None else (times[:half], times[half:])
            events = self._deliver(packet.part(0, half), early, first)
            return events + self._deliver(packet.part(half, len(packet)), late, first + half)
        exposure = _Exposure(packet, times, first, [])
        for clock in due:
            self._schedule(exposure, int(clock))
        return self._replay(exposure)

    def _due(self, packet: Packet) -> NDArray[np.int64]:
        """Clocks that may have come due: all that have, and some that have not."""
        low, high = self.fluence.bounds_A(packet)
        clocks = self._clocks.running(low, high)
        return clocks[self.fluence.may_reach(self._clocks.site_A[clocks], self._clocks.critical[clocks])]

    def _schedule(self, exposure: _Exposure, clock: int) -> None:
        """Queue a clock that comes due in this exposure. At one point the order is by process, then by atom."""
        if exposure.packet is None:
            return
        threshold = float(self._clocks.critical[clock])
        point = self.fluence.first_reaching(self._clocks.site_A[clock], threshold, exposure.packet)
        if point is not None:
            key = int(self._keys[self._clocks.of(clock)[0]])
            heapq.heappush(exposure.queue, _Due(point, int(self._clocks.process[clock]), key, clock, threshold))

    def _replay(self, exposure: _Exposure) -> list[Event]:
        """Let everything that is due happen in its order. What falls into the time before a point comes before it."""
        events: list[Event] = []
        while True:
            moment, point = self._next_moment(exposure)
            if moment is not None and (not exposure.queue or point <= exposure.queue[0].point):
                events += self._after_waiting(_Now(exposure, point, point, moment.time_s), moment)
            elif exposure.queue:
                due = heapq.heappop(exposure.queue)
                if self._clocks.critical[due.clock] == due.threshold:
                    time = None if exposure.times is None else float(exposure.times[due.point])
                    events += self._hit(_Now(exposure, due.point, due.point + 1, time), due)
            else:
                return events

    def _next_moment(self, exposure: _Exposure) -> tuple[Moment | None, int]:
        """What happens next to a vacancy in the time of this exposure, and the first point after it."""
        moment = self._vacancies.next() if self._vacancies is not None else None
        if moment is None or exposure.times is None or moment.time_s > exposure.times[-1]:
            return None, 0
        return moment, int(np.searchsorted(exposure.times, moment.time_s))

    def _hit(self, now: _Now, due: _Due) -> list[Event]:
        """What the beam does when a clock is due."""
        self._clocks.critical[due.clock] = np.inf
        atoms = [int(atom) for atom in self._clocks.of(due.clock)]
        if due.process == HOP:
            return self._hop(now, atoms[0], due.threshold)
        events = []
        for atom in atoms:
            if self.alive[atom]:
                leaves = due.process == KNOCK_ON or self._leaves(atom)
                events.append(self._make(now, atom, due.process, due.threshold, "removed" if leaves else "displaced"))
                if leaves:
                    self._vacate(now, atom, heals=True)
        return events

    def _after_waiting(self, now: _Now, moment: Moment) -> list[Event]:
        """A vacancy heals or hops of itself."""
        fluence = self._fluence(now, moment.atom)
        if moment.process == HOP:
            return self._hop(now, moment.atom, fluence)
        event = self._make(now, moment.atom, HEALING, fluence, "healed")
        self._fill(now, moment.atom)
        return [event]

    def _hop(self, now: _Now, atom: int, fluence: float) -> list[Event]:
        """The vacancy at the site ``atom`` moves on, if there is an atom to change places with."""
        assert self._vacancies is not None
        partner = self._vacancies.destination(atom, self.alive)
        heals = self._vacancies.close(atom)
        if partner is None:
            self._vacate(now, atom, heals)
            return []
        events = [self._make(now, site, HOP, fluence, "hopped") for site in (partner, atom)]
        self._vacate(now, partner, heals)
        self._fill(now, atom)
        return events

    def _make(self, now: _Now, atom: int, process: int, fluence: float, kind: Kind) -> Event:
        """The event, which happens."""
        event = Event(atom, process, now.exposure.first + now.point, fluence, now.time_s, kind)
        self.apply(event, self.alive, self.positions_A)
        return event

    def _vacate(self, now: _Now, atom: int, heals: bool) -> None:
        """The site ``atom`` has become vacant."""
        self._stop(KNOCK_ON, atom)
        if self._vacancies is not None and now.time_s is not None:
            self._vacancies.open(atom, now.time_s, heals)
            self._restart(now, HOP, atom)

    def _fill(self, now: _Now, atom: int) -> None:
        """The site ``atom`` is occupied again."""
        assert self._vacancies is not None
        self._vacancies.close(atom)
        self._stop(HOP, atom)
        self._restart(now, KNOCK_ON, atom)

    def _stop(self, process: int, atom: int) -> None:
        clock = self._clocks.single(process, atom)
        if clock is not None:
            self._clocks.critical[clock] = np.inf

    def _restart(self, now: _Now, process: int, atom: int) -> None:
        """Draw a new threshold from the present fluence on: the exponential law has no memory."""
        clock = self._clocks.single(process, atom)
        if clock is None or self._vacancies is None:
            return
        drawn = draws.exponential(self._seed, ROLES[process], self._keys[[atom]], self._vacancies.turn[atom])[0]
        fluence = self._fluence(now, atom)
        due = fluence + float(drawn) / self._clocks.hazard_A2[process][atom]
        self._clocks.critical[clock] = max(due, np.nextafter(fluence, np.inf))
        self._schedule(now.exposure, clock)

    def _fluence(self, now: _Now, atom: int) -> float:
        """Fluence at the site of ``atom`` now, e/A^2."""
        return self.fluence.before(self.specimen.positions_A[atom, :2], now.exposure.packet, now.delivered)

    def _leaves(self, atom: int) -> bool:
        share = self._model.removed_share(SYMBOLS[int(self.specimen.atomic_numbers[atom])])
        return bool(draws.uniform(self._seed, "damage-leaves", self._keys[[atom]])[0] < share)

    def _shift_A(self, atom: int) -> Array:
        sigma = nm_to_angstrom(self._model.radiolysis_displacement_nm)
        return np.asarray(sigma * draws.normal(self._seed, "damage-shift", self._keys[[atom]])[0])
