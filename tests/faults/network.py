"""The virtual network between controllers and server: loses, doubles, delays, reorders, damages, cuts."""

from __future__ import annotations

from collections.abc import Callable

from aecontrol.exposure.server import Peer

from .swarm import MS, H
from .world import World

Receive = Callable[[bytes], None]


class Network:
    """Carries bytes. The transport authenticates every message, so that a damaged one is never a valid other one; that
    is what CURVE does, and why a wire without it may leave the machine only as noise here."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.serve: Callable[[Peer, bytes], None] = lambda peer, data: None
        self._ends: dict[bytes, Receive] = {}
        self._last: dict[tuple[bytes, str], int] = {}
        self._routes = 0
        self._cut: frozenset[str] = frozenset()
        self._healed_ns = 0
        self.recorded: list[bytes] = []
        """What the controller sent: a rival may have listened in an earlier life."""
        world.every(world.swarm.partition_every_s, self._partition)

    def connect(self, receive: Receive) -> bytes:
        """A new connection; its route."""
        self._routes += 1
        route = b"%d" % self._routes
        self._ends[route] = receive
        return route

    def disconnect(self, route: bytes) -> None:
        """What is under way to ``route`` arrives nowhere."""
        self._ends.pop(route, None)

    def to_server(self, peer: Peer, data: bytes) -> None:
        """Send a request."""
        self._carry((peer.route, "up"), data, lambda arrived: self.serve(peer, arrived))

    def to_client(self, route: bytes, data: bytes) -> None:
        """Send a reply."""
        self._carry((route, "down"), data, lambda arrived: self._ends.get(route, lambda _: None)(arrived))

    def reachable(self) -> bool:
        """Whether the bulk channel works both ways now."""
        return not self._cut

    def _partition(self) -> None:
        """Nothing passes for a while: neither way, or only one way."""
        world = self._world
        self._cut = world.rng.choice((frozenset(("up", "down")), frozenset(("up",)), frozenset(("down",))))
        world.tell("partition" if len(self._cut) == 2 else "half_open")
        self._healed_ns = world.now + 20 * MS + int(30 * H * world.rng.random() ** 3)

        def heal(due: int = self._healed_ns) -> None:
            if due == self._healed_ns:
                self._cut = frozenset()

        world.at(self._healed_ns - world.now, heal)

    def _carry(self, way: tuple[bytes, str], data: bytes, arrive: Receive) -> None:
        world, swarm = self._world, self._world.swarm
        if way[1] in self._cut or world.chance(swarm.drop):
            world.count["dropped"] += 1
            return
        if world.chance(swarm.corrupt):
            world.count["corrupted"] += 1
            data = self._damaged(data)
        for _ in range(2 if world.chance(swarm.duplicate) else 1):
            delay = world.between(MS // 10, 2 * MS)
            if world.chance(swarm.slow):
                world.count["delayed"] += 1
                delay = world.between(2 * MS, 15 * H)
            due = world.now + delay
            if swarm.fifo:
                due = self._last[way] = max(due, self._last.get(way, 0))
            world.at(due - world.now, lambda: arrive(data))

    def _damaged(self, data: bytes) -> bytes:
        rng = self._world.rng
        place = rng.randrange(len(data))
        return rng.choice((data[:place], data[:place] + b"\xff" + data[place:], rng.randbytes(40), b"", data + b"}"))
