"""The bridge's server, ``python -m drivers.bridge CONFIG``: it does what :mod:`aecontrol.exposure.server` decides.

Three processes, so that none can hold up another: this one owns the ledger and the sockets and never touches a pixel;
the column process holds the instrument and writes frames; the watchdog blanks when this one falls silent. It needs
pyzmq, numpy and pydantic, and nothing else of a microscope's computer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import zmq
from pydantic import Field

from aecontrol.durable import FolderLock
from aecontrol.errors import AecontrolError, BadInput, InstrumentFault, StorageFault
from aecontrol.exposure import InterlockLimits, Ledger, LedgerRecord, delivered
from aecontrol.exposure import messages as m
from aecontrol.exposure import server as core
from aecontrol.journal import Journal
from aecontrol.registry import validate
from aecontrol.types import Capabilities, Charge, InstrumentState, Model, Positive

from . import column_messages as column
from .beat_word import BeatWord
from .bridge_file import BridgeFile, read_bridge_file
from .bulk import BulkServer
from .column_link import Reply, column_lives, connect_or_start
from .desk import Desk
from .gate import Gate, check_address
from .keys import KeyRing
from .sockets import ControlServer
from .spool import Spool, spooled_channels
from .watchdog import start_watchdog

log = logging.getLogger(__name__)
LOCK = "bridge.lock"
ASK_S = 5.0
STATE_S = 0.05
"""How often the column is asked how it is, s."""
SILENT_S = 2.0
"""Age of what the instrument last said of itself from which nothing may be exposed, s."""
LOST_S = 30.0
"""Silence of the column process after which it is given up, s."""
SETTLE_S = 120.0
"""How long a pulse that an earlier server left behind may take to end once it was told to, s."""
WATCHDOG_S = 20.0
"""How long a new watchdog may take until it watches, s."""
LEAST_LEASE = 2.0
"""A lease that ends between two beats is none; in heartbeats."""
BATCH = 64
RESERVE_BYTES = 64 << 20
"""Room on the disk that is kept for the ledger, bytes."""


class BridgeTable(Model):
    """[bridge]: where it listens, and where its ledger and frames are."""

    address: str = Field("tcp://127.0.0.1:5555", description="control socket, tcp://HOST:PORT; port * is any free one")
    frames_address: str = Field("tcp://127.0.0.1:*", description="frames' socket, tcp://HOST:PORT")
    folder: Path = Field(description="ledger, spool and sockets; one folder a specimen, local disk, not shared")
    keys: Path | None = Field(None, description="folder made by `aecontrol keys new`; simulated on loopback: optional")
    lease_s: Positive = Field(1.0, le=60.0, description="silence after which another controller may take over, s")
    away_s: Positive = Field(
        900.0, le=86400.0, description="longest time for which a controller may keep its lease while away, s"
    )
    deadline_s: float = Field(1.0, ge=0.05, le=60.0, description="time within which an exposure must have begun, s")


class Bridge:
    """One running server. Building it brings everything up: column, ledger, watchdog, sockets; ``run`` serves."""

    def __init__(self, path: Path, settings: BridgeFile, table: BridgeTable, limits: InterlockLimits) -> None:
        self._path = path
        self.folder = _private_folder(settings.base / table.folder)
        keys = KeyRing.load(settings.base / table.keys) if table.keys else None
        for address in (table.address, table.frames_address):
            check_address(address, keys)
        if table.lease_s < LEAST_LEASE * settings.heartbeat.interval_s:
            raise BadInput(
                f"bridge.lease_s = {table.lease_s:g} s, heartbeat.interval_s = {settings.heartbeat.interval_s:g} s",
                f"a lease lasts at least {LEAST_LEASE:g} heartbeats",
            )
        timing = m.Timing(
            heartbeat_s=settings.heartbeat.interval_s,
            lease_s=table.lease_s,
            away_s=table.away_s,
            deadline_s=table.deadline_s,
        )
        self._stop = False
        self._pulses: dict[int, str] = {}
        self._moves: set[int] = set()
        self._state = InstrumentState(beam_on=False, clock_s=0.0)
        self._interlock = ""
        self._room_bytes = 0
        self._dark = False
        with contextlib.ExitStack() as stack:
            self._open(stack, keys, table, limits, timing)
            self._resources = stack.pop_all()

    def _open(
        self,
        stack: contextlib.ExitStack,
        keys: KeyRing | None,
        table: BridgeTable,
        limits: InterlockLimits,
        timing: m.Timing,
    ) -> None:
        """Bring everything up, in the order in which it must not fail; ``stack`` takes it down again."""
        stack.callback(FolderLock(self.folder, LOCK).release)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.term)
        self._link, ready = connect_or_start(context, self._path, self.folder)
        stack.callback(self._link.close)
        self._heard_s = self._stated_s = self._asked_s = time.monotonic()
        capabilities = ready.capabilities
        gate = Gate(keys, capabilities.simulated)
        stack.callback(gate.close)
        self._gate = gate
        self._journal = Journal(self.folder / "ledger.sqlite")
        stack.callback(self._journal.close)
        _same_instrument(self._journal.bodies, capabilities)
        self.core = core.Server(
            Ledger.empty(capabilities, limits), self._journal.bodies, limits, timing, uuid.uuid4().hex
        )
        self._spool = Spool(self.folder / "spool", spooled_channels(capabilities))
        self._word = BeatWord(self.folder)
        stack.callback(self._word.close)
        self._word.claim()
        self._watchdog = start_watchdog(self._path, self.folder)
        stack.callback(self._end_watchdog)
        settled = self._settle_column(ready)
        stack.callback(self._blank_and_disarm)
        self._desk = Desk(self.core, [*self._journal.bodies, *settled], self._spool, self._link)
        self._await_watchdog()
        self._frames = BulkServer(gate, table.frames_address, self._desk.resolve)
        stack.callback(self._frames.close)
        self.core.frames_port = int(self._frames.address.rsplit(":", 1)[1])
        self._control = ControlServer(gate, table.address)
        stack.callback(self._control.close)

    @property
    def address(self) -> str:
        """Where controllers connect."""
        address: str = self._control.address
        return address

    def run(self) -> None:
        """Serve until :meth:`stop`. Raises StorageFault when the ledger cannot be written: the beam is then blanked,
        and nothing that happened afterwards was said to anybody."""
        poller = zmq.Poller()
        self._control.register(poller)
        poller.register(self._link.socket, zmq.POLLIN)
        tick_ms = max(1, int(1e3 * self.core.timing.heartbeat_s / 20))
        try:
            while not self._stop:
                poller.poll(tick_ms)
                self._turn()
        finally:
            self.close()

    def clear_latch(self, reason: str) -> None:
        """A person has looked at what latched this ledger. Raises BadInput when the reason says nothing."""
        if len(reason.strip()) < 8:
            raise BadInput(f"the reason {reason!r} says too little", "say in a sentence what was wrong and is mended")
        self._perform([self.core.clear("at the bridge", reason)])

    def stop(self) -> None:
        """End after this turn. From a signal's handler or another thread."""
        self._stop = True

    # ------------------------------------------------------------ one turn

    def _turn(self) -> None:
        self._hear_column()
        for route, user, role, header in self._control.receive():
            try:
                request = m.decode_request(header)
            except m.Malformed as error:
                self._control.strike(route)
                self._send(route, m.Refusal(code="MALFORMED", reason=error.what))
                continue
            peer = core.Peer(route, user, role)
            if not self._desk.takes(request):
                self._perform(self.core.on_request(peer, request, time.monotonic_ns()))
            elif (reply := self._desk.answer(peer, request, self._state)) is not None:
                self._send(route, reply)
        self._watch()
        self._perform(self.core.on_tick(time.monotonic_ns()))

    def _watch(self) -> None:
        """Gather the facts on which exposures depend."""
        now_s = time.monotonic()
        if now_s - self._asked_s > STATE_S:
            self._asked_s = now_s
            with contextlib.suppress(InstrumentFault):
                self._link.send(column.State())
            self._room_bytes = shutil.disk_usage(self.folder).free - RESERVE_BYTES
        self._keep_watchdog()
        while self._gate.refusals:
            log.warning("turned away: %s", self._gate.refusals.popleft())
        unknown = now_s - self._stated_s > SILENT_S
        if unknown and (now_s - self._heard_s > LOST_S or not column_lives(self.folder)):
            self._lose_column()
        self.core.facts = core.Facts(
            watchdog=self._word.watched(self.core.timing.heartbeat_s),
            interlock="the instrument does not say how it is" if unknown else self._interlock,
            stage_nm=self._state.stage_nm,
            room_bytes=max(0, self._room_bytes),
        )

    def _stray(self, told: column.Stated) -> bool:
        """A beam that is on although nothing fires is blanked, and nothing is exposed until it is off."""
        stray = told.state.beam_on and told.firing is None and self.core.ledger.capabilities.blanker
        self._interlock = "the beam is on without an exposure" if stray else told.state.interlock
        return stray

    def _lose_column(self) -> None:
        """What the column was doing, nobody will tell any more: it is charged in full, and the server ends, so that the
        watchdog blanks on its own path. Raises InstrumentFault."""
        for key in list(self._pulses.values()):
            self._perform(self.core.on_broken(key, "the column process was lost", time.monotonic_ns()))
        self._perform(self.core.on_moved("the column process was lost"))
        raise InstrumentFault(
            f"the column process has ended or been silent for {LOST_S:g} s",
            f"see {self.folder / 'column.log'}, make sure that the beam is off, then start the bridge again",
        )

    def _keep_watchdog(self) -> None:
        """Start another when ours has ended and nobody watches. One that an earlier server left behind, and that hung
        meanwhile, keeps ours out and watches as well as ours would."""
        if self._watchdog.poll() is None or self._word.watched(self.core.timing.heartbeat_s):
            return
        log.error("the watchdog has ended; starting another")
        self._blank("the watchdog is down")
        self._watchdog = start_watchdog(self._path, self.folder)

    def _hear_column(self) -> None:
        for _ in range(BATCH):
            reply = self._link.receive()
            if reply is None:
                return
            self._heard_s = time.monotonic()
            self._perform(self._on_column(reply))

    def _on_column(self, reply: Reply) -> Iterable[core.Effect]:
        message, now_ns = reply.message, time.monotonic_ns()
        key = self._pulses.get(message.id, "")
        match message:
            case column.Stated():
                self._state, self._stated_s = message.state, self._heard_s
                if self._stray(message):
                    self._blank("the beam is on without an exposure")
                self.core.facts = replace(self.core.facts, stage_nm=message.state.stage_nm)
                if message.id in self._moves:
                    self._moves.discard(message.id)
                    return self.core.on_moved("")
            case column.Fired():
                self._pulses.pop(message.id, None)
                measured = Charge(electrons=message.electrons, pixels=message.pixels, seconds=message.seconds)
                return self.core.on_fired(message.key, measured, message.digests, now_ns)
            case column.Broke():
                self._pulses.pop(message.id, None)
                return self.core.on_broken(message.key, message.reason, now_ns)
            case column.Refused() if key:
                del self._pulses[message.id]
                log.warning("the column did not fire %s: %s", key[:12], message.reason)
                return self.core.on_late(key, now_ns)
            case column.Done() if message.id in self._moves:  # answered once it has said where it is now
                self._moves.discard(message.id)
                self._moves.add(self._link.send(column.State()))
            case column.Failed() | column.Refused() if message.id in self._moves:
                self._moves.discard(message.id)
                return self.core.on_moved(message.reason)
            case column.TruthIs() | column.Ideal() | column.Refused() | column.Failed():
                for route, answer in self._desk.told(reply):
                    self._send(route, answer)
        return ()

    # ------------------------------------------------------------ effects

    def _perform(self, effects: Iterable[core.Effect]) -> None:
        """Carry out effects in order, each finished before the next begins."""
        for effect in effects:
            match effect:
                case core.Append():
                    self._journal.append(effect.body)
                    self._desk.learn(effect.body)
                case core.Stamp():
                    self._word.stamp_ns, self._word.armed = effect.beat_ns, int(effect.armed)
                case core.Fire():
                    self._fire(effect)
                case core.Off():
                    self._blank(effect.reason)
                case core.MoveStage():
                    self._moves.add(self._link.send(column.MoveStage(to_nm=effect.to_nm)))
                case core.ParkBeam():
                    self._moves.add(self._link.send(column.Park(at_nm=effect.at_nm)))
                case core.Discard():
                    self._spool.delete(effect.key, self.core.ledger.entries[effect.key].digests)
                case core.Send():
                    self._send(effect.route, effect.reply)

    def _fire(self, effect: core.Fire) -> None:
        now_ns = time.monotonic_ns()
        if now_ns > effect.not_after_ns:
            self._perform(self.core.on_late(effect.key, now_ns))
            return
        order = column.Fire(
            key=effect.key, ordinal=effect.ordinal, region=effect.region, not_after_ns=effect.not_after_ns
        )
        try:
            self._pulses[self._link.send(order)] = effect.key
        except InstrumentFault as error:  # it was not sent and never will be
            log.error("%s", error)
            self._perform(self.core.on_late(effect.key, now_ns))

    def _blank(self, reason: str) -> None:
        log.info("blank: %s", reason)
        with contextlib.suppress(InstrumentFault):
            self._link.send(column.Blank())

    def _send(self, route: bytes, reply: m.Reply) -> None:
        self._control.send(route, m.encode(reply))

    # ------------------------------------------------------------ start and end

    def _await_watchdog(self) -> None:
        """Nobody is served before the watchdog has blanked the beam once and watches."""
        until_s = time.monotonic() + WATCHDOG_S
        while not self._word.watched(self.core.timing.heartbeat_s):
            if time.monotonic() > until_s:
                raise InstrumentFault(f"no watchdog after {WATCHDOG_S:g} s", f"see {self.folder / 'watchdog.log'}")
            self._keep_watchdog()
            time.sleep(0.01)

    def _settle_column(self, ready: column.Ready) -> list[str]:
        """Blank, wait for a pulse that an earlier server left behind, settle the ledger, and make sure that column and
        ledger know the same exposures. The records that this took."""
        self._link.ask(column.Blank(), ASK_S)
        until_s = time.monotonic() + SETTLE_S
        while not isinstance(told := self._link.ask(column.State(), ASK_S).message, column.Stated) or told.firing:
            if time.monotonic() > until_s:
                raise InstrumentFault(
                    f"the instrument does not come to rest within {SETTLE_S:g} s: {told}", "see column.log"
                )
            time.sleep(0.02)
        self._state = told.state
        ledger = self.core.ledger
        entries = ledger.entries
        if strange := [shot.key for shot in ready.shots if shot.key not in entries]:
            raise StorageFault(
                f"the instrument has fired {strange[0][:12]}, which the ledger does not know: the ledger is too old",
                "bring back the newest ledger of this specimen; nothing will be exposed from this one",
            )
        missing = []  # a column that has lived on knows what it did; one that has just begun is told
        for ordinal, key in enumerate(() if ready.shots else ledger.fired):
            if (region := delivered(entries[key])) is not None:
                missing.append(column.AbsorbedShot(key=key, ordinal=ordinal, region=region))
        for first in range(0, len(missing), column.MAX_ABSORBED // 4):
            shots = tuple(missing[first : first + column.MAX_ABSORBED // 4])
            answer = self._link.ask(column.Absorb(shots=shots), 600.0).message
            if not isinstance(answer, column.Done):
                raise InstrumentFault(f"the column did not take over {len(shots)} earlier exposures: {answer}")
        firing = [key for key, entry in entries.items() if entry.state == "FIRING"]
        spooled: dict[str, dict[str, str]] = {key: {} for key in self._spool.keys()}  # noqa: SIM118
        spooled |= self._spool.complete(firing)
        bodies = [effect.body for effect in self.core.boot(spooled) if isinstance(effect, core.Append)]
        self._journal.extend(bodies)
        return bodies

    def close(self) -> None:
        """Blank first, whatever failed; then let go of everything. The column process goes on by itself."""
        self._blank_and_disarm()
        self._resources.close()

    def _blank_and_disarm(self) -> None:
        """The word stays armed, and the watchdog alive, until the instrument has said that its beam is off."""
        with contextlib.suppress(InstrumentFault):
            said = self._link.ask(column.Blank(), ASK_S).message
            self._dark = isinstance(said, column.Blanked) and not said.beam_on
        if self._dark:
            self._word.armed = 0

    def _end_watchdog(self) -> None:
        """One whose server goes away with the beam not seen off blanks until it is, and ends by itself."""
        if not self._dark:
            log.error("the instrument has not said that its beam is off: the watchdog goes on blanking")
            return
        self._watchdog.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watchdog.wait(ASK_S)


def _private_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder, 0o700)
    except OSError as error:
        raise BadInput(f"bridge.folder {folder} cannot be used: {error}", "give a local folder of your own") from error
    return folder


def _same_instrument(bodies: list[str], capabilities: Capabilities) -> None:
    if bodies and (first := LedgerRecord.model_validate_json(bodies[0]).reason) != capabilities.identity:
        raise InstrumentFault(
            f"the ledger belongs to {first!r}, this instrument is {capabilities.identity!r}",
            "give another bridge.folder: a ledger belongs to one specimen in one instrument",
        )


def open_bridge(path: Path) -> Bridge:
    """A bridge that is up and not yet serving. Raises BadInput, InstrumentFault, StorageFault; nothing was exposed."""
    settings = read_bridge_file(path)
    table = validate(BridgeTable, settings.raw.get("bridge", {}), "bridge")
    limits = validate(InterlockLimits, settings.raw.get("limits", {}), "limits")
    return Bridge(path, settings, table, limits)


def serve(path: Path, clear_latch: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM. ``clear_latch``: a person on this computer says why the latch may go. Raises as
    :func:`open_bridge`, and StorageFault when the ledger is lost."""
    bridge = open_bridge(path)
    if clear_latch is not None:
        try:
            bridge.clear_latch(clear_latch)
        except BaseException:
            bridge.close()
            raise
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: bridge.stop())
    print(f"serving {bridge.core.ledger.capabilities.identity} at {bridge.address}", flush=True)
    bridge.run()


def main() -> int:
    """``python -m drivers.bridge CONFIG``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if len(sys.argv) != 2:
        print("usage: python -m drivers.bridge CONFIG", file=sys.stderr)
        return 2
    try:
        serve(Path(sys.argv[1]))
    except AecontrolError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
