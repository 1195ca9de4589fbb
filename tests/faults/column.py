"""The physical column and the watchdog: they outlive the server's process, and what they do is what is true."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from aecontrol.durable import npy_bytes, sha256_hex
from aecontrol.types import Capabilities, Charge, ScanRegion
from aecontrol.units import electrons_per_second

from .invariants import Checker
from .swarm import MS, SECOND, H
from .world import World

LATENCY_NS = 2 * MS
CAPABILITIES = Capabilities(
    identity="virtual column",
    simulated=True,
    unit="electrons",
    field_nm=(6.0, 4.0),
    channels=("HAADF",),
    beam_current_pA=10.0,
    blanker_latency_s=LATENCY_NS / SECOND,
    dwell_time_range_s=(1e-7, 0.05),
    max_pixels=512,
)


@dataclass(frozen=True)
class Frame:
    """A spooled frame."""

    data: bytes
    sha256: str
    electrons: int
    started_s: float
    flags: tuple[str, ...]


@dataclass
class Pulse:
    """The pulse that runs: its end is loaded in hardware; an order to blank can only bring it nearer."""

    key: str
    region: ScanRegion
    on_ns: int
    off_ns: int
    electrons_per_ns: float
    whole: bool = True

    def electrons(self, now_ns: int) -> int:
        """Delivered so far."""
        return math.ceil(self.electrons_per_ns * (min(now_ns, self.off_ns) - self.on_ns))

    def pixels(self, now_ns: int) -> int:
        """Pixels exposed so far."""
        share = (min(now_ns, self.off_ns) - self.on_ns) / (self.region.dwell_time_s * SECOND)
        return min(self.region.pixels, math.floor(share + 1e-9))


Told = Callable[[str, Charge | None, Mapping[str, str]], None]
"""How the column's process reports to the server that commanded it: key, measured charge (None: it broke), digests."""


class Column:
    """Fires what it is told, counts every electron, spools the frame. Only the newest connection is obeyed; an order to
    blank overtakes and voids an order to fire that was given before it."""

    def __init__(self, world: World, checker: Checker) -> None:
        self._world, self._checker = world, checker
        self.master = 0
        self.blanked = 0  # orders to blank so far
        self.pulse: Pulse | None = None
        self.spool: dict[str, Frame] = {}

    def fire(self, master: int, key: str, region: ScanRegion, told: Told) -> bool:
        """Start the pulse; False when the order is an older server's. Reports to ``told`` once the frame is spooled."""
        if master != self.master:
            return False
        world = self._world
        if self.pulse is not None:
            world.fail("I1", f"{key[:8]} was fired while {self.pulse.key[:8]} was on")
        rate = electrons_per_second(10.0) * world.rng.uniform(0.96, 1.04) / SECOND
        length = round(region.pixels * region.dwell_time_s * SECOND)
        self.pulse = Pulse(key, region, world.now, world.now + length, rate)
        world.tell("pulse", key[:8])
        self._checker.beam_on(key)
        world.at(length, partial(self._end, self.pulse, world.now + length, told))
        self._told = told
        return True

    def off(self, reason: str) -> None:
        """Blank; takes the blanker's latency, and does nothing without a beam."""
        self.blanked += 1
        pulse, now = self.pulse, self._world.now
        if pulse is None or pulse.off_ns <= now + LATENCY_NS:
            return
        pulse.off_ns, pulse.whole = now + LATENCY_NS, False
        self._world.tell("cut: " + reason, pulse.key[:8])
        self._world.at(LATENCY_NS, partial(self._end, pulse, pulse.off_ns, self._told))

    def _end(self, pulse: Pulse, off_ns: int, told: Told) -> None:
        if self.pulse is not pulse or pulse.off_ns != off_ns:
            return
        self.pulse = None
        world = self._world
        electrons, pixels = pulse.electrons(off_ns), pulse.pixels(off_ns)
        self._checker.beam_off(pulse.key, pulse.region, electrons, pixels, pulse.on_ns)
        if world.chance(world.swarm.column_broken):
            world.tell("column broke", pulse.key[:8])
            world.at(MS, lambda: told(pulse.key, None, {}))
            return
        delay = world.between(MS, 800 * MS if world.chance(world.swarm.spool_slow) else 3 * MS)
        measured = Charge(electrons=electrons, pixels=pixels, seconds=(off_ns - pulse.on_ns) / SECOND)
        world.at(delay, lambda: self._spool(pulse, measured, told))

    def _spool(self, pulse: Pulse, measured: Charge, told: Told) -> None:
        image = np.full(pulse.region.shape, float(len(pulse.key)), np.float32)
        image.flat[0] = self._world.rng.random()
        data = npy_bytes(image)
        sha = sha256_hex(data)
        assert measured.electrons is not None
        flags = () if pulse.whole else ("partial",)
        self.spool[pulse.key] = Frame(data, sha, measured.electrons, pulse.on_ns / SECOND, flags)
        self._checker.spooled(pulse.key, sha, pulse.whole)
        told(pulse.key, measured, {"HAADF": sha})


class Watchdog:
    """W as specified: polls the shared word every H/20, blanks when it is armed and older than 1.5 H."""

    def __init__(self, world: World, column: Column) -> None:
        self._world, self._column = world, column
        self.beat_ns, self.armed = 0, False
        self.alive, self._died_ns = True, 0
        self._polling = False

    def stamp(self, beat_ns: int, armed: bool) -> None:
        """What the server writes into the shared word."""
        self.beat_ns, self.armed = beat_ns, armed
        self._poll_later()

    def kill(self) -> None:
        """The process ends."""
        self.alive, self._died_ns = False, self._world.now

    def restart(self) -> None:
        """A new process: the beam is blanked first."""
        self.alive = True
        self._column.off("watchdog start")
        self._poll_later()

    @property
    def seen_alive(self) -> bool:
        """What the server can see: the watchdog's own stamp is at most five polls old."""
        return self.alive or self._world.now - self._died_ns < H // 4

    def _poll_later(self) -> None:
        if self.armed and self.alive and not self._polling:
            self._polling = True
            self._world.at(H // 20, self._poll)

    def _poll(self) -> None:
        self._polling = False
        if self.armed and self.alive and self._world.now - self.beat_ns > 1.5 * H:
            self._column.off("watchdog")
        self._poll_later()
