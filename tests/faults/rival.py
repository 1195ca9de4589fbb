"""A second controller that wants the same microscope, and somebody who plays back what was recorded."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any, cast

from aecontrol.dose import bound_charge
from aecontrol.exposure import messages as m
from aecontrol.exposure.server import Peer
from aecontrol.types import Charge, ScanRegion

from .column import CAPABILITIES
from .invariants import Checker
from .network import Network
from .swarm import MS, H
from .world import World


class Rival:
    """Acquires (at times by force), exposes, goes silent, cancels and blanks the other's work, repeats its bytes."""

    def __init__(self, world: World, network: Network, checker: Checker) -> None:
        self._world, self._network, self._checker = world, network, checker
        self._role: m.Role = world.rng.choice(("controller", "operator"))
        self._route = network.connect(self._take)
        self._id = self._tick = self._shots = 0
        self._epoch = 0
        self._welcome: m.Welcome | None = None
        self._mono: tuple[str, int] = ("", 0)
        world.every(world.swarm.rival_every_s, self._act)

    def _act(self) -> None:
        if self._checker.restored:
            return
        action = self._world.rng.choice(
            (self._acquire, self._acquire, self._expose, self._expose, self._cancel, self._blank)
            + (self._replay,) * 2 + (self._storm, self._reuse)
        )  # fmt: skip
        self._world.tell("rival: " + action.__name__[1:])
        action()

    def _send(self, kind: type[m.AnyRequest], **fields: Any) -> None:
        self._id += 1
        self._tick += 1
        own = {"id": self._id, "epoch": self._epoch, "tick": self._tick}
        fields |= {name: value for name, value in own.items() if name in kind.model_fields}
        self._network.to_server(Peer(self._route, "bob", self._role), m.encode(kind(**fields)))

    def _take(self, data: bytes) -> None:
        try:
            reply = m.decode_reply(data)
        except m.Malformed:
            return
        match reply:
            case m.Welcome():
                self._mono = reply.boot_id, reply.mono_ns
                force = self._role == "operator" and self._world.rng.random() < 0.5
                self._send(m.Acquire, session="theirs", seq=reply.seq, head=reply.head, force=force)
            case m.Granted():
                self._epoch = reply.epoch
                self._world.tell("rival holds the lease")
            case m.Beating():
                self._mono = reply.boot_id, reply.mono_ns

    # ------------------------------------------------------------ actions

    def _acquire(self) -> None:
        self._send(m.Hello, client="bob")

    def _expose(self) -> None:
        """A shot of its own, under an epoch that may be over; then beats, for a while."""
        rng = self._world.rng
        self._shots += 1
        key = hashlib.sha256(b"theirs %d" % self._shots).hexdigest()
        self._checker.foreign.add(key)
        dwell = rng.uniform(1e-3, 1e-2)
        region = ScanRegion(center_nm=(3.0, 2.0), fov_nm=(2.0, 2.0), shape=(8, 8), dwell_time_s=dwell)
        bound = bound_charge(region, CAPABILITIES)
        if rng.random() < 0.3:
            bound = bound.model_copy(update={"electrons": cast(int, bound.electrons) // 2})
        self._send_expose(key, region, bound)
        for n in range(rng.randrange(20)):
            self._world.at((n + 1) * H // 2, lambda: self._send(m.Beat))

    def _send_expose(self, key: str, region: ScanRegion, bound: Charge) -> None:
        boot_id, mono_ns = self._mono
        if boot_id:
            deadline = mono_ns + self._world.between(10 * MS, 30 * H)
            what: dict[str, Any] = {"key": key, "session": "theirs", "region": region, "bound": bound}
            self._send(m.Expose, boot_id=boot_id, deadline_ns=deadline, **what)

    def _cancel(self) -> None:
        if keys := list(self._checker.steps):
            self._send(m.Cancel, boot_id=self._mono[0] or "boot1", key=self._world.rng.choice(keys[-2:]))

    def _blank(self) -> None:
        self._send(m.Blank)

    def _reuse(self) -> None:
        """The other's key for another command: latches, until an operator has looked."""
        known = [key for key in self._checker.steps if key in self._checker.s.state]
        if not known or self._world.rng.random() < 0.7:
            return
        region = ScanRegion(center_nm=(1.5, 1.5), fov_nm=(1.0, 1.0), shape=(4, 4), dwell_time_s=1e-3)
        key = self._world.rng.choice(known)
        self._send_expose(key, region, bound_charge(region, CAPABILITIES))

    def _replay(self) -> None:
        """Bytes of the other controller from another connection, under one of the two names."""
        if self._network.recorded:
            self._again(self._world.rng.choice(self._network.recorded[-60:]))

    def _storm(self) -> None:
        """The other's last heartbeats again and again: as if it still lived."""
        beats = [data for data in self._network.recorded[-40:] if b'"BEAT"' in data][-8:]
        for n in range(24 if beats else 0):
            self._world.at(n * 30 * MS, partial(self._again, beats[n % len(beats)]))

    def _again(self, data: bytes) -> None:
        route = self._network.connect(lambda _: None)
        user = self._world.rng.choice(("alice", "bob"))
        self._network.to_server(Peer(route, user, "controller"), data)
