"""C of the protocol behind a wire: one controller's end. Clock, connection and memory are handed in.

Nothing here runs in a thread: the heartbeats of a running exposure are sent by the very loop that waits for its
outcome, so that a hung controller cannot look alive. Between two exposures the controller says that it is *away*, which
keeps its lease and keeps the beam blanked.

A time-out is not an outcome. Whatever goes wrong on the way, the key is asked after with CANCEL until the bridge says
what became of it; only then does the session go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from aecontrol.chain import chain_hash
from aecontrol.errors import InstrumentFault
from aecontrol.types import Capabilities, Charge, InstrumentState, ScanRegion

from . import messages as m
from .keys import Outcome

ASK_S = 0.5
"""How long one request waits for its reply before it is asked again, s."""
LIMIT_S = 2.0
"""Longest pause between two attempts to reach the bridge, s."""


class Link(Protocol):
    """A connection to the bridge's control socket."""

    address: str

    def send(self, header: bytes) -> None:
        """Hand a message over; never blocks, may lose it."""

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None when none came in time."""

    def reconnect(self) -> None:
        """A fresh connection in place of this one; what was under way on the old one is lost."""


class Mirror(Protocol):
    """The controller's durable copy of the bridge's ledger: what it knows, nobody can take back unnoticed."""

    seq: int
    head: str

    def extend(self, bodies: Sequence[str]) -> None:
        """Add records; on the disk when it returns."""


class Client:
    """A session's end of the wire. Not to be shared between threads.

    ``session`` names the controller to the bridge: the same name takes its own lease back after a crash. ``now`` is a
    monotonic clock, s. ``patience_s``: how long an unreachable bridge is asked before InstrumentFault; ``first_s``: the
    same for the first contact. ``force``: take the lease from its holder, as operators may.
    """

    def __init__(
        self,
        link: Link,
        mirror: Mirror,
        session: str,
        now: Callable[[], float],
        patience_s: float = 60.0,
        first_s: float = 5.0,
        force: bool = False,
    ) -> None:
        self._link, self._mirror, self._session, self._now = link, mirror, session, now
        self._patience_s, self._first_s, self._force = patience_s, first_s, force
        self._welcome: m.Welcome | None = None
        self._attached = False
        self._epoch: int | None = None
        self._id = 0
        self._tick = 0
        self._beaten_s = self._heard_s = now()
        self._outcomes: dict[str, Outcome] = {}
        self._live: str | None = None
        self._boot_id = ""

    # ------------------------------------------------------------ what a session asks for

    def capabilities(self) -> Capabilities:
        """What the bridge's instrument is."""
        if self._welcome is None:
            self._attach()
        assert self._welcome is not None
        return self._welcome.capabilities

    @property
    def frames_port(self) -> int:
        """TCP port of the bridge's frames now. The bridge is asked: one that was started again may have another."""
        self.ask(m.Ping)
        self._attach()
        assert self._welcome is not None
        return self._welcome.frames_port

    def expose(self, key: str, region: ScanRegion, bound: Charge) -> Outcome:
        """Fire once; the outcome, however many messages were lost. Raises InstrumentFault when the bridge cannot be
        reached any more: the key is then open, and :meth:`settle` must be asked later."""
        with self._working():
            outcome = self._fire(key, region, bound)
            return outcome if outcome is not None else self.settle(key)

    def settle(self, key: str) -> Outcome:
        """The terminal outcome of ``key``; one that the bridge never saw is tombstoned there."""
        with self._working():
            give_up = self._now() + self._patience_s
            while True:
                self._attach()
                reply = self._ask(m.Cancel, ASK_S, beating=True, boot_id=self._boot_id, key=key)
                if isinstance(reply, m.Settled):
                    return reply.outcome
                if isinstance(reply, m.Firing):  # it ends by itself
                    give_up = self._now() + self._patience_s
                    self._wait(lambda: key in self._outcomes, self._heartbeat_s, beating=True)
                elif isinstance(reply, m.Refusal) and reply.code != "STALE":
                    raise InstrumentFault(f"the bridge will not settle {key[:12]}: {reply.code}, {reply.reason}")
                else:
                    self._lost(give_up, f"key {key[:12]} stays charged at its bound until `aecontrol resume`")

    def frames(self, key: str) -> m.Spooled | None:
        """Where the frame of ``key`` can be fetched; None when the bridge has none."""
        with self._working():
            reply = self._insist(m.Frames, key=key)
            return reply if isinstance(reply, m.Spooled) else None

    def forget(self, key: str) -> None:
        """The frame is durable here: the bridge may delete its own. What the bridge has written since is copied."""
        spooled = self.frames(key)
        with self._working():
            if spooled is not None:
                digests = {name: file.sha256 for name, file in spooled.channels.items()}
                self._insist(m.Forget, key=key, session=self._session, digests=digests)
            if not self._copy_ledger():
                self._attached = False  # the next contact begins with it

    def blank(self) -> None:
        """Blank the beam; needs no lease. Raises InstrumentFault when nobody answers."""
        with self._working():
            self._insist(m.Blank)

    def status(self) -> m.Told:
        """The instrument, the lease and what has been charged."""
        with self._working():
            reply = self._insist(m.Status)
            if not isinstance(reply, m.Told):
                raise InstrumentFault(f"STATUS was answered with {reply}")
            return reply

    def state(self) -> InstrumentState:
        """What the instrument says of itself."""
        return self.status().state

    def move_stage(self, to_nm: tuple[float, float]) -> None:
        """Move the stage and wait until it has settled; safe to repeat, for the target is absolute."""
        self._command(m.Stage, to_nm=to_nm)

    def park(self, at_nm: tuple[float, float]) -> None:
        """Rest the idle beam there; safe to repeat."""
        self._command(m.Park, at_nm=at_nm)

    def ask(self, kind: type[m.AnyRequest], **fields: Any) -> m.Reply:
        """Any request that may be repeated, until it is answered."""
        with self._working():
            return self._insist(kind, **fields)

    def release(self) -> None:
        """Copy the rest of the ledger and give the lease back, if the bridge is there."""
        if not self._attached:
            return
        try:
            self._copy_ledger()
        finally:
            if self._epoch is not None:
                self._ask(m.Release, ASK_S)
                self._epoch = None

    # ------------------------------------------------------------ exposing

    def _fire(self, key: str, region: ScanRegion, bound: Charge) -> Outcome | None:
        """Send EXPOSE until it is answered or its time has passed; None: nobody knows, ask."""
        beat = self._hold()
        deadline_ns = beat.mono_ns + int(self._timing.deadline_s * 1e9)
        until_s = self._now() + 0.9 * self._timing.deadline_s
        command: dict[str, Any] = {"key": key, "session": self._session, "region": region, "bound": bound}
        command |= {"boot_id": beat.boot_id, "deadline_ns": deadline_ns}
        while self._epoch is not None and (left := until_s - self._now()) > 0:
            reply = self._ask(m.Expose, min(left, ASK_S), beating=True, **command)
            if isinstance(reply, m.Settled):
                return reply.outcome
            if isinstance(reply, m.Firing):
                return self._outcome(key, bound.seconds)
            if isinstance(reply, m.Refusal) and reply.code == "STALE":  # another process: compare its ledger, then ask
                self._attached = False
                return None
            if isinstance(reply, m.Refusal):
                raise InstrumentFault(f"the bridge refused {key[:12]}: {reply.code}, {reply.reason}")
        return None

    def _outcome(self, key: str, seconds: float) -> Outcome | None:
        """Keep the beam alive with heartbeats until the outcome comes; None when it seems lost."""
        self._live = key
        self._heard_s = self._now()
        give_up = self._now() + 2.0 * seconds + self._patience_s

        def over() -> bool:
            silent = self._now() - self._heard_s > 5.0 * self._heartbeat_s
            return key in self._outcomes or self._live != key or self._epoch is None or silent

        self._wait(over, give_up - self._now(), beating=True)
        return self._outcomes.get(key)

    def _hold(self) -> m.Beating:
        """A lease that is alive, on a bridge that nothing hinders, and its clock."""
        give_up = self._now() + self._patience_s
        hindrance = ""
        while True:
            self._attach()
            reply = self._ask(m.Beat, ASK_S) if self._epoch is not None or self._acquire() else None
            if isinstance(reply, m.Beating) and reply.boot_id == self._boot_id:
                if not reply.hindrance:
                    return reply
                hindrance = reply.hindrance
                self._wait(lambda: False, self._heartbeat_s)
            elif isinstance(reply, m.Refusal):
                self._epoch = None
            else:
                self._lost(give_up, "nothing was sent; `aecontrol resume` goes on")
            if self._now() > give_up:
                raise InstrumentFault(f"the bridge could not expose for {self._patience_s:g} s: {hindrance}", "mend it")

    def _acquire(self) -> bool:
        known: dict[str, Any] = {"seq": self._mirror.seq, "head": self._mirror.head, "force": self._force}
        reply = self._ask(m.Acquire, ASK_S, session=self._session, **known)
        if isinstance(reply, m.Granted):
            self._epoch = reply.epoch
        elif isinstance(reply, m.Refusal):
            raise InstrumentFault(f"the bridge gives no lease: {reply.code}, {reply.reason}", "wait, or ask its holder")
        return self._epoch is not None

    def _command(self, kind: type[m.AnyRequest], **fields: Any) -> None:
        """Something that needs the lease and may be repeated."""
        with self._working():
            give_up = self._now() + self._patience_s
            while True:
                beat = self._hold()
                deadline = beat.mono_ns + int(self._timing.deadline_s * 1e9)
                when = {"boot_id": beat.boot_id, "deadline_ns": deadline}
                reply = self._ask(kind, self._patience_s, beating=True, **when, **fields)
                if isinstance(reply, m.Done):
                    return
                if isinstance(reply, m.Refusal):
                    raise InstrumentFault(f"the bridge refused: {reply.code}, {reply.reason}")
                self._lost(give_up, "ask for the stage's position before you go on")

    # ------------------------------------------------------------ the connection

    def _attach(self) -> None:
        """Be known to the bridge on a living connection, with a ledger that continues the one known here."""
        if self._attached:
            return
        patience = self._first_s if self._welcome is None else self._patience_s
        give_up = self._now() + patience
        while True:
            reply = self._ask(m.Hello, ASK_S, client=self._session)
            if isinstance(reply, m.Refusal):
                raise InstrumentFault(f"{self._link.address} turned us away: {reply.code}, {reply.reason}")
            if isinstance(reply, m.Welcome):
                self._meet(reply)
                if self._copy_ledger():
                    break
            self._lost(give_up, "address or key is wrong (a wrong key is silence), or the bridge does not run")
        self._attached = True

    def _meet(self, reply: m.Welcome) -> None:
        if self._welcome is not None and reply.capabilities != self._welcome.capabilities:
            raise InstrumentFault("the bridge now serves another instrument", "begin a new session")
        if reply.boot_id != self._boot_id:
            self._epoch = None
        self._welcome, self._boot_id = reply, reply.boot_id
        if reply.seq < self._mirror.seq:
            raise InstrumentFault(
                f"the bridge's ledger ends at record {reply.seq}, {self._mirror.seq} are known here",
                "it was restored from an old copy: bring back the newest one; nothing will be exposed",
            )

    def _copy_ledger(self) -> bool:
        """Make the bridge's new records durable here; False when it does not answer: nothing is copied then."""
        bodies: list[str] = []
        head, seq = self._mirror.head, self._mirror.seq
        while True:
            after = seq + len(bodies)
            reply = self._ask(m.Records, ASK_S, after=after)
            if reply is None:
                return False
            if not isinstance(reply, m.Recorded):
                raise InstrumentFault(f"RECORDS was answered with {reply}")
            for body in reply.bodies:
                head = chain_hash(head, body)
            bodies += reply.bodies
            if seq + len(bodies) >= reply.seq:
                break
            if not reply.bodies:
                raise InstrumentFault(f"the bridge has {reply.seq} records and sends none after {after}")
        if head != reply.head:
            raise InstrumentFault(
                f"the bridge's ledger is not the one known here: record {seq} and what follows do not fit",
                "compare both ledgers by hand; nothing will be exposed",
            )
        if bodies:
            self._mirror.extend(bodies)
        return True

    def _lost(self, give_up_s: float, mend: str) -> None:
        """No answer: another connection, unless patience has run out."""
        if self._now() >= give_up_s:
            self._attached = False
            raise InstrumentFault(f"no answer from {self._link.address}", mend)
        self._attached = False
        self._link.reconnect()
        self._wait(lambda: False, min(0.1 * LIMIT_S, give_up_s - self._now()))

    # ------------------------------------------------------------ messages

    @property
    def _timing(self) -> m.Timing:
        return self._welcome.timing if self._welcome is not None else m.Timing()

    @property
    def _heartbeat_s(self) -> float:
        return self._timing.heartbeat_s

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The main loop is here. When it leaves, the bridge is told that it is away; when the user interrupts, that
        the beam must go off."""
        try:
            yield
        except KeyboardInterrupt:
            self._send(m.Blank)
            raise
        if self._epoch is not None and self._attached:
            self._send(m.Away, seconds=self._timing.away_s)

    def _insist(self, kind: type[m.AnyRequest], **fields: Any) -> m.Reply:
        """Ask until there is an answer. For requests that may be repeated."""
        give_up = self._now() + self._patience_s
        while True:
            self._attach()
            reply = self._ask(kind, ASK_S, **fields)
            if reply is not None:
                return reply
            self._lost(give_up, "see whether the bridge runs; `aecontrol resume` goes on")

    def _ask(self, kind: type[m.AnyRequest], wait_s: float, beating: bool = False, **fields: Any) -> m.Reply | None:
        number = self._send(kind, **fields)
        answer: list[m.Reply] = []

        def come(reply: m.Reply) -> None:
            if reply.re == number:
                answer.append(reply)

        self._wait(lambda: bool(answer), wait_s, beating, come)
        return answer[0] if answer else None

    def _send(self, kind: type[m.AnyRequest], **fields: Any) -> int:
        """Every message is a turn of the main loop; one that needs the lease carries its epoch and the turn."""
        self._id += 1
        self._tick += 1
        own = {"id": self._id, "epoch": self._epoch, "tick": self._tick}
        fields |= {name: value for name, value in own.items() if name in kind.model_fields}
        self._link.send(m.encode(kind(**fields)))
        return self._id

    def _wait(
        self,
        over: Callable[[], bool],
        wait_s: float,
        beating: bool = False,
        come: Callable[[m.Reply], None] = lambda _: None,
    ) -> None:
        """Take in what arrives until ``over`` or ``wait_s`` have passed; with ``beating``, keep the beam alive."""
        until = self._now() + wait_s
        while not over() and (left := until - self._now()) > 0:
            if beating and self._epoch is not None and self._now() - self._beaten_s >= self._heartbeat_s / 2:
                self._beaten_s = self._now()
                self._send(m.Beat)
            header = self._link.receive(min(left, self._heartbeat_s / 4) if beating else left)
            if header is None:
                continue
            try:
                reply = m.decode_reply(header)
            except m.Malformed:
                continue
            self._take(reply)
            come(reply)

    def _take(self, reply: m.Reply) -> None:
        self._heard_s = self._now()
        if isinstance(reply, m.Settled):
            self._outcomes = {reply.outcome.key: reply.outcome}  # one key at a time is under way
        elif isinstance(reply, m.Beating):
            if reply.boot_id == self._boot_id:
                self._live = reply.live
            else:
                self._epoch, self._attached = None, False
        elif isinstance(reply, m.Refusal) and reply.code in ("FENCED", "NO_LEASE"):
            self._epoch = None
