"""The virtual microscope PC: carries out the real server's effects in order, and dies, hangs and stalls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import cache, partial

from aecontrol.errors import StorageFault
from aecontrol.exposure import InterlockLimits, Ledger
from aecontrol.exposure import messages as m
from aecontrol.exposure.server import Append, Discard, Effect, Facts, Fire, Off, Peer, Send, Server, Stamp
from aecontrol.types import Charge

from .column import CAPABILITIES, Column, Watchdog
from .invariants import Checker
from .network import Network
from .swarm import MS, SECOND, H
from .world import World

TICK_NS = 10 * MS
PAGE = 4  # records in one reply: small, so that they come in several

Event = Callable[[Server, int], list[Effect]]


@cache
def _facts(watchdog: bool, interlock: str) -> Facts:
    return Facts(watchdog=watchdog, interlock=interlock)


class Shell:
    """One machine with a disk, and a server process that a supervisor starts again when it ends.

    A watchdog, the server's process and its disk do not fail in the same instant: two failures at once of the two
    that guard one beam are beyond what the design promises.
    """

    def __init__(
        self, world: World, network: Network, column: Column, watchdog: Watchdog, checker: Checker,
        limits: InterlockLimits, timing: m.Timing,
    ) -> None:  # fmt: skip
        self._world, self._network, self._column = world, network, column
        self._watchdog, self._checker = watchdog, checker
        self._limits, self._timing = limits, timing
        self.disk: list[str] = []
        self.server: Server | None = None
        self.life = 0  # counts processes; what an earlier one had begun ends with it
        self._inbox: deque[Event] = deque()
        self._todo: deque[Effect] = deque()
        self._writing = self._ticking = self._full = False
        self._frozen_ns = 0
        self._offset_ns = 0
        self._interlock = ""
        self.latest_mirrored: Callable[[], int] = lambda: 0
        network.serve = self._arrived
        swarm = world.swarm
        world.every(swarm.server_crash_every_s, lambda: self.crash("any time"))
        world.every(swarm.server_hang_every_s, self._hang)
        world.every(swarm.watchdog_kill_every_s, self._kill_watchdog)
        world.every(swarm.disk_full_every_s, self._fill)
        world.every(swarm.interlock_every_s, self._trip_interlock)
        self._start()

    # ------------------------------------------------------------ process

    def _start(self) -> None:
        """A new process: it alone commands the column from here on, and the first thing is that the beam is off."""
        self.life += 1
        self._column.master = self.life
        self._column.off("server start")
        if not self._watchdog.alive:
            self._watchdog.restart()
        spooled = {key: {"HAADF": frame.sha256} for key, frame in self._column.spool.items()}
        boot_id = f"boot{self.life}"
        server = Server(Ledger.empty(CAPABILITIES), list(self.disk), self._limits, self._timing, boot_id)
        self._checker.booted(boot_id, self._offset_ns)
        try:
            self._todo.extend(server.boot(spooled))
        except StorageFault:
            self._world.tell("boot refused")
            return  # the supervisor may try again; the answer is the same until a person mends it
        self.server = server
        self._pump()

    def crash(self, why: str) -> None:
        """kill -9; now and then the whole machine."""
        if self.server is None or not self._watchdog.alive:
            return
        world = self._world
        world.tell("server crash", why)
        self.server = None
        self.life += 1
        self._inbox.clear()
        self._todo.clear()
        self._writing = self._ticking = False
        self._frozen_ns = 0
        if world.chance(world.swarm.reboot):
            world.tell("reboot")
            self._column.off("reboot")
            self._offset_ns = world.between(0, 10**6 * SECOND)
            self._watchdog.stamp(0, False)
        if world.swarm.restore_old_ledger and not self._checker.restored and world.rng.random() < 0.5:
            self._restore_old()
        world.at(20 * MS + int(2 * SECOND * world.rng.random() ** 3), self._start)

    def _restore_old(self) -> None:
        """Somebody brings back an old copy of the ledger, older than what the controller has seen. (Lines that any new
        process writes again, word for word, make no older copy.)"""
        known = self.latest_mirrored()
        while known and '"INDET"' in self.disk[known - 1]:
            known -= 1
        if known >= 2:
            self._world.tell("old ledger restored")
            del self.disk[self._world.rng.randrange(known) :]
            self._checker.restore()

    def _hang(self) -> None:
        """SIGSTOP."""
        if self.server is not None and self._watchdog.alive:
            length = self._world.between(10 * MS, 25 * H)
            self._world.tell("server hang")
            self._frozen_ns = self._world.now + length
            self._world.at(length, self._pump)

    def _kill_watchdog(self) -> None:
        if self._watchdog.alive and self.server is not None and not self._frozen and not self._writing:
            self._world.tell("watchdog killed")
            self._watchdog.kill()
            self._world.at(self._world.between(20 * MS, 4 * H), lambda: self._watchdog.restart())

    def _fill(self) -> None:
        self._world.tell("disk full")
        self._full = True

        def free() -> None:
            self._full = False

        self._world.at(self._world.between(20 * MS, 5 * H), free)

    def _trip_interlock(self) -> None:
        self._world.tell("interlock")
        self._interlock = "vacuum"

        def mend() -> None:
            self._interlock = ""

        self._world.at(self._world.between(20 * MS, 3 * H), mend)

    # ------------------------------------------------------------ events in

    @property
    def _frozen(self) -> bool:
        return self._world.now < self._frozen_ns

    def _arrived(self, peer: Peer, data: bytes) -> None:
        if self.server is not None:
            self._put(lambda server, now: self._request(server, peer, data, now))

    def _put(self, event: Event) -> None:
        self._inbox.append(event)
        self._pump()

    def _request(self, server: Server, peer: Peer, data: bytes, now: int) -> list[Effect]:
        try:
            request = m.decode_request(data)
        except m.Malformed:
            self._world.count["malformed"] += 1
            return []
        self._world.tell(request.t, f"{peer.user} {request.id}")
        match request:
            case m.Records():
                page = self.disk[request.after : request.after + PAGE]
                seq, head = len(server.heads) - 1, server.heads[-1]
                return [Send(peer.route, m.Recorded(re=request.id, bodies=page, seq=seq, head=head))]
            case m.Frames():
                return [Send(peer.route, self._spooled(request.id, request.key))]
        self._checker.took(peer.user, request.model_dump())
        return server.on_request(peer, request, now)

    def _spooled(self, re: int, key: str) -> m.Spooled | m.Refusal:
        frame = self._column.spool.get(key)
        if frame is None:
            return m.Refusal(re=re, code="UNKNOWN", reason="no such frame")
        file = m.SpoolFile(sha256=frame.sha256, nbytes=len(frame.data))
        return m.Spooled(
            re=re,
            channels={"HAADF": file},
            started_s=frame.started_s,
            electrons_per_pixel=max(frame.electrons, 1) / 64,
            flags=frame.flags,
        )

    def _tick(self, life: int) -> None:
        if life != self.life:
            return
        self._ticking = False
        self._put(lambda server, now: server.on_tick(now))

    # ------------------------------------------------------------ effects out

    def _pump(self) -> None:
        """Take in and carry out, one after the other, unless the process hangs or waits for its disk."""
        while self.server is not None and not self._writing and not self._frozen:
            if self._todo:
                self._perform(self._todo.popleft())
            elif self._inbox:
                self.server.facts = _facts(self._watchdog.seen_alive, self._interlock)
                now = self._world.now + self._offset_ns
                self._todo.extend(self._inbox.popleft()(self.server, now))
            else:
                break
        if self.server is not None and self.server.live is not None and not self._ticking:
            self._ticking = True
            self._world.at(TICK_NS, partial(self._tick, self.life))

    def _perform(self, effect: Effect) -> None:
        world = self._world
        match effect:
            case Append():
                self._append(effect.body)
            case Stamp():
                self._watchdog.stamp(effect.beat_ns - self._offset_ns, effect.armed)
            case Fire():
                order = partial(self._fire, self.life, self._column.blanked, effect)
                if world.chance(world.swarm.column_slow):
                    world.at(world.between(MS, 4 * H), order)
                else:
                    order()
            case Off():
                self._column.off(effect.reason.split(":")[0])
            case Send():
                self._network.to_client(effect.route, m.encode(effect.reply))
            case Discard():
                world.tell("discard", effect.key[:8])
                self._checker.discarded(effect.key)
                self._column.spool.pop(effect.key, None)

    def _append(self, body: str) -> None:
        world, swarm = self._world, self._world.swarm
        if self._full and not world.quiet:
            world.tell("write refused")
            self._fail()
            return
        if self._watchdog.alive and world.chance(swarm.server_crash_at_write):
            self.crash("before a write")
            return
        if world.chance(swarm.disk_error):
            world.tell("fsync failed")
            if world.rng.random() < 0.5:
                self._durable(body)
            self._fail()
            return
        self._writing = True
        stalled = world.chance(swarm.disk_stall) and self._watchdog.alive
        if stalled:
            world.tell("disk stall")
        delay = world.between(5 * MS, 3 * SECOND) if stalled else world.between(MS // 20, 2 * MS)
        world.at(delay, partial(self._written, self.life, body))

    def _fail(self) -> None:
        """The ledger cannot be written: blank and end."""
        self._column.off("ledger lost")
        if not self._watchdog.alive:
            self._watchdog.restart()
        self.crash("ledger lost")

    def _written(self, life: int, body: str) -> None:
        if life != self.life:
            return
        self._writing = False
        self._durable(body)
        if self._watchdog.alive and self._world.chance(self._world.swarm.server_crash_at_write):
            self.crash("after a write")
            return
        self._pump()

    def _durable(self, body: str) -> None:
        self.disk.append(body)
        server = self.server
        assert server is not None
        self._world.tell("S writes", body[:60])
        ahead = any(isinstance(effect, Append) for effect in self._todo)  # it believes more than the disk knows
        self._checker.s_wrote(body, None if ahead else server.ledger.charged.electrons)

    def _fire(self, life: int, blanked: int, effect: Fire) -> None:
        """The order has reached the column's process, which shares the machine's clock."""
        world = self._world
        late = world.now + self._offset_ns > effect.not_after_ns
        if late or blanked != self._column.blanked:
            world.tell("late" if late else "blanked before it began")
            self._back(life, lambda server, now: server.on_late(effect.key, now))
        elif not self._column.fire(life, effect.key, effect.region, partial(self._told, life)):
            world.tell("order of a dead server")

    def _told(self, life: int, key: str, measured: Charge | None, digests: Mapping[str, str]) -> None:
        if measured is None:
            self._back(life, lambda server, now: server.on_broken(key, "the column failed", now))
        else:
            self._back(life, lambda server, now: server.on_fired(key, measured, digests, now))

    def _back(self, life: int, event: Event) -> None:
        if life == self.life:
            self._put(event)
