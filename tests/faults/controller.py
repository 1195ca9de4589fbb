"""The real session, machine, journal, microscope and client, on a virtual link and in virtual time."""

from __future__ import annotations

import math
import random
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aecontrol.chain import GENESIS, chain_hash
from aecontrol.config import SessionConfig, SessionTable, Tables
from aecontrol.errors import AecontrolError, BadInput, InstrumentFault, StorageFault
from aecontrol.exposure.client import Client
from aecontrol.exposure.server import Peer
from aecontrol.journal import Journal
from aecontrol.protocols import History
from aecontrol.session import Session
from aecontrol.state import State
from aecontrol.types import Budget, Explanation, OverviewPlan, Scan, ScanPlan, ScanRegion, StopRules
from drivers.faults import Crash
from drivers.remote import RemoteMicroscope
from tests.aecontrol.parts import MeanPerceiver

from .column import Column
from .invariants import Checker
from .network import Network
from .swarm import MS, SECOND, H
from .world import World

RESTART_NS = 1 * SECOND
"""The user starts C again within this time."""


class Mirror:
    """C's durable copy of S's ledger."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self.bodies: list[str] = []
        self.head = GENESIS

    @property
    def seq(self) -> int:
        return len(self.bodies)

    def extend(self, bodies: Sequence[str]) -> None:
        self._controller.write("mirror", lambda: self._add(bodies))

    def _add(self, bodies: Sequence[str]) -> None:
        for body in bodies:
            self.bodies.append(body)
            self.head = chain_hash(self.head, body)


class Link:
    """A connection of one process of C; it ends with the process."""

    address = "virtual"

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._inbox: deque[bytes] = deque()
        self._route = controller.network.connect(self._inbox.append)

    def send(self, header: bytes) -> None:
        self._controller.wait(0)
        self._controller.network.recorded.append(header)
        self._controller.network.to_server(Peer(self._route, "alice", "controller"), header)

    def receive(self, timeout_s: float) -> bytes | None:
        self._controller.wait(math.ceil(timeout_s * SECOND), lambda: bool(self._inbox))
        return self._inbox.popleft() if self._inbox else None

    def reconnect(self) -> None:
        self.close()
        self._inbox = deque()
        self._route = self._controller.network.connect(self._inbox.append)

    def close(self) -> None:
        self._controller.network.disconnect(self._route)


@dataclass(frozen=True)
class Wanderer:
    """Decides at random, now and then against the rules; a decision can take long."""

    controller: Controller
    seed: int

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Scan:
        self.controller.think()
        rng = random.Random(self.seed * 1000 + history.step)
        feasible = [region for region, may in zip(candidates, history.feasible, strict=True) if may]
        region = rng.choice(feasible)
        if rng.random() < 0.15:
            twists: list[dict[str, Any]] = [
                {"center_nm": (rng.uniform(-2, 8), rng.uniform(-2, 8))},
                {"dwell_time_s": 0.04},
                {"rotation_rad": rng.uniform(-4, 4), "center_nm": (3.0, 2.0)},
                {"fov_nm": (0.3, 0.3), "center_nm": (3.0, 2.0)},
            ]
            region = region.model_copy(update=rng.choice(twists))
        return Scan(regions=(region,), explanation=Explanation(policy="wanderer", why="because"))


@dataclass(frozen=True)
class Driver:
    """Connects to the virtual microscope."""

    controller: Controller

    def build(self, folder: Path, base: Path, seed: int) -> RemoteMicroscope:
        c = self.controller
        link = Link(c)
        client = Client(link, c.mirror, "ours", lambda: c.world.now / SECOND, patience_s=c.patience_s, first_s=3.0)
        return RemoteMicroscope(client, c.fetch_bytes, link.close)


class Controller:
    """C's process, started again and again by its user until the session is over."""

    def __init__(
        self, world: World, network: Network, column: Column, checker: Checker, folder: Path, budget: Budget
    ) -> None:
        self.world, self.network, self.column, self.checker = world, network, column, checker
        self.folder, self.mirror = folder, Mirror(self)
        self.patience_s = world.rng.uniform(2.0, 6.0)
        self.state: State | None = None
        self.refused = ""
        self._session: Session | None = None
        self._killed, self._frozen_ns, self.running = False, 0, False
        tables = Tables(
            session=SessionTable(name="faults", match_nm=0.1, seed=1),
            overview=OverviewPlan(shape=(8, 12), dwell_time_s=1e-3),
            scan=ScanPlan(fov_nm=(2.0, 2.0), shape=(8, 8), dwell_time_s=10 ** world.rng.uniform(-2.8, -1.6)),
            budget=budget,
            stop=StopRules(max_steps=world.rng.randint(3, 8)),
        )
        policy = Wanderer(self, world.rng.randrange(2**32))
        self.config = SessionConfig(tables, Driver(self), MeanPerceiver(), policy, {}, Path("."))
        world.every(world.swarm.controller_crash_every_s, self._kill)
        world.every(world.swarm.controller_hang_every_s, self._freeze)

    # ------------------------------------------------------------ time, as C's process meets it

    def wait(self, ns: int, over: Any = None) -> None:
        """C waits; its process may be stopped for a while, or end."""
        world = self.world
        end = world.now + ns
        world.run(end, lambda: self._killed or world.now < self._frozen_ns or (over is not None and over()))
        while world.now < self._frozen_ns and not self._killed:
            world.run(self._frozen_ns, lambda: self._killed)
        if world.breach:
            raise world.breach
        if self._killed:
            raise Crash

    def write(self, what: str, action: Any) -> None:
        """One durable write of C: it may end before it, or right after it."""
        world, swarm = self.world, self.world.swarm
        self.wait(world.between(MS // 10, 3 * MS))
        if self.running and world.chance(swarm.controller_disk_full):
            world.tell("C's disk is full")
            raise StorageFault("no space left", "free some")
        if self.running and world.chance(swarm.controller_crash_at_write):
            self._die("before a write")
        action()
        world.tell("C writes", what)
        if self.running and world.chance(swarm.controller_crash_at_write):
            self._die("after a write")

    def think(self) -> None:
        """A fit."""
        world = self.world
        if world.chance(world.swarm.slow_fit):
            world.tell("slow fit")
            self.wait(world.between(1 * SECOND, 5 * SECOND))
        else:
            self.wait(world.between(MS, 30 * MS))

    def fetch_bytes(self, sha256: str, nbytes: int) -> bytes:
        """The bulk channel: a file of the spool, if all goes well."""
        world = self.world
        self.wait(world.between(MS // 2, 5 * MS))
        found = [frame.data for frame in self.column.spool.values() if frame.sha256 == sha256]
        if not found or not self.network.reachable():
            self.wait(SECOND // 2)
            raise InstrumentFault("the file did not come")
        if world.chance(world.swarm.bulk):
            world.tell("file damaged")
            return found[0][:-1] + bytes([found[0][-1] ^ 1])
        return found[0]

    def _kill(self) -> None:
        if self.running:
            self.world.tell("controller crash", "any time")
            self._killed = True

    def _die(self, why: str) -> None:
        self.world.tell("controller crash", why)
        self._killed = True
        raise Crash

    def _freeze(self) -> None:
        if self.running:
            self.world.tell("controller hang")
            self._frozen_ns = self.world.now + self.world.between(10 * MS, 25 * H)

    # ------------------------------------------------------------ lives

    def live(self, patch: pytest.MonkeyPatch) -> None:
        """Run the session to its end, through every crash and fault; leaves ``state``, and ``refused`` when the bridge
        is turned away for good."""
        self._patch(patch)
        while self.state is None and not self.refused:
            self._killed = False
            try:
                self._one_life()
            except Crash:
                pass
            except AecontrolError as error:
                self.world.tell("session ends: " + type(error).__name__)
                wrong_plan = isinstance(error, BadInput) and "cannot be taken" in str(error)
                wrong_ledger = "bring back the newest" in str(error) or self.world.quiet
                if wrong_plan or (self.checker.restored and wrong_ledger):
                    self.refused = str(error)
            finally:
                self.running = False
                if self._session is not None:
                    self._session.close()
                    self._session = None
            self.world.run(self.world.now + self.world.between(20 * MS, RESTART_NS))

    def _one_life(self) -> None:
        if (self.folder / "session.sqlite").exists():
            self._session = Session.reopen(self.folder, self.config)
        else:
            self._session = Session.create(self.config, self.folder)
        self.running = True
        state = self._session.run()
        if state.phase == "stopped":
            self.state = state

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        """The session's journal dies at appends, its ids follow the seed, and the wall clock jumps all the time."""
        controller, world = self, self.world

        class WatchedJournal(Journal):
            def append(self, body: str) -> None:
                controller.write("journal", lambda: self._durable(body))

            def _durable(self, body: str) -> None:
                super().append(body)
                session = controller._session
                controller.checker.c_wrote(body, None if session is None else session.state.charged.electrons)

        clock = SimpleNamespace(time=lambda: world.rng.uniform(0, 4e9), perf_counter=lambda: world.now / SECOND)
        ids = SimpleNamespace(uuid4=lambda: uuid.UUID(int=world.rng.getrandbits(128)))
        patch.setattr("aecontrol.session.Journal", WatchedJournal)
        patch.setattr("aecontrol.session.time", clock)
        patch.setattr("aecontrol.session.uuid", ids)
