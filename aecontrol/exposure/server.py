"""S of the protocol behind a wire: lease, fencing, heartbeats, and when the beam may be on. No clock, disk or socket.

``Server`` is told what arrived and what time it is, and answers with a list of effects that a shell carries out *in
order*, each finished (an :class:`Append` on the disk) before the next begins. If one fails, the shell must blank and
end: what the server believes is then newer than what the disk knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from aecontrol.chain import GENESIS, chain_hash
from aecontrol.errors import StorageFault
from aecontrol.types import Charge, ScanRegion

from . import messages as m
from .interlocks import DUTY_WINDOW_S, InterlockLimits, frame_bytes, over_rates
from .ledger import Ledger, LedgerRecord, absorb, answer, on_boot, on_cancel, on_expose, on_fired

TRIP = 1.5
"""The beam is blanked this many heartbeat intervals after the last valid beat: with polling and the blanker's own time
that keeps it below 2."""
STAGE_NM = 1.0
"""The stage is where the ledger says when it is this close, nm."""
MAX_CONNECTIONS = 1024
"""Connections whose last request id is remembered; the oldest is forgotten first."""


@dataclass(frozen=True)
class Peer:
    """Who sent a request: ``route`` leads back to the connection, ``user`` and ``role`` follow from the key that it
    proved to hold."""

    route: bytes
    user: str
    role: m.Role


# ---------------------------------------------------------------- effects


@dataclass(frozen=True)
class Append:
    """Write one record to the ledger; on the disk before anything that follows."""

    body: str


@dataclass(frozen=True)
class Stamp:
    """Tell the watchdog: the last valid beat, and whether a beam may be on."""

    beat_ns: int
    armed: bool


@dataclass(frozen=True)
class Fire:
    """Start the pulse, unless it is later than ``not_after_ns`` (writing FIRING can take long on a bad disk). It ends
    by itself; its end comes back as :meth:`Server.on_fired` or :meth:`Server.on_broken`, a start that came too late as
    :meth:`Server.on_late`."""

    key: str
    ordinal: int
    region: ScanRegion
    not_after_ns: int


@dataclass(frozen=True)
class Off:
    """Blank the beam at once and end the pulse that runs."""

    reason: str


@dataclass(frozen=True)
class MoveStage:
    """Move the stage; its end comes back as :meth:`Server.on_moved`."""

    to_nm: tuple[float, float]


@dataclass(frozen=True)
class ParkBeam:
    """Rest the idle beam there; its end comes back as :meth:`Server.on_moved`."""

    at_nm: tuple[float, float]


@dataclass(frozen=True)
class Discard:
    """Delete the spooled frame of a key."""

    key: str


@dataclass(frozen=True)
class Send:
    """Answer a peer."""

    route: bytes
    reply: m.Reply


_ANYBODY: frozenset[m.Role] = frozenset(("observer", "controller", "operator"))
_CONTROLLERS: frozenset[m.Role] = frozenset(("controller", "operator"))
_ROLES: Mapping[str, frozenset[m.Role]] = {
    **dict.fromkeys(("HELLO", "PING", "BLANK", "STATUS", "RECORDS", "FRAMES", "TRUTHS"), _ANYBODY),
    **dict.fromkeys(
        ("ACQUIRE", "BEAT", "AWAY", "RELEASE", "EXPOSE", "STAGE", "PARK", "CANCEL", "FORGET"), _CONTROLLERS
    ),
    "CLEAR": frozenset(("operator",)),
}

Effect = Append | Stamp | Fire | Off | MoveStage | ParkBeam | Discard | Send


# ---------------------------------------------------------------- state


@dataclass
class Lease:
    """Who may expose, since when, and when the main loop was last heard."""

    user: str
    session: str
    epoch: int
    since_ns: int
    beat_ns: int
    tick: int = 0
    away_until_ns: int = 0


@dataclass
class Live:
    """The pulse that runs, whom its outcome is owed, and when it was last told to end."""

    key: str
    route: bytes
    re: int
    off_ns: int | None = None


@dataclass(frozen=True)
class Facts:
    """What the shell sees of the world: whether the watchdog lives, what the instrument's own interlock says, where its
    stage is, and how many bytes of frames the spool can take."""

    watchdog: bool = False
    interlock: str = ""
    stage_nm: tuple[float, float] = (0.0, 0.0)
    room_bytes: int = 1 << 62


class Server:
    """The state of S. ``records``: the ledger's bodies from the disk, oldest first."""

    def __init__(
        self, ledger: Ledger, records: list[str], limits: InterlockLimits, timing: m.Timing, boot_id: str
    ) -> None:
        self.limits, self.timing, self.boot_id = limits, timing, boot_id
        self.frames_port = 0
        self.facts = Facts()
        self.heads = [GENESIS]
        self.ledger = ledger
        for body in records:
            self._learn(LedgerRecord.model_validate_json(body), body)
        self.lease: Lease | None = None
        self.live: Live | None = None
        self.moving: tuple[bytes, int] | None = None
        self._recent: deque[tuple[float, float]] = deque()
        self._last_id: dict[bytes, int] = {}
        self.ignored = 0

    def boot(self, spooled: Mapping[str, Mapping[str, str]]) -> list[Effect]:
        """First of all: the beam is off, a new ledger is opened, what an earlier process left firing is settled.
        ``spooled``: digests of complete frames by key. Raises StorageFault when the spool knows keys that the ledger
        does not: the ledger is older than what the beam did."""
        foreign = [key for key in spooled if key not in self.ledger.entries]
        if foreign:
            raise StorageFault(
                f"the spool holds a frame of {foreign[0][:12]}, which the ledger does not know: the ledger is too old",
                "restore the newest ledger of this specimen; nothing will be exposed from this one",
            )
        effects: list[Effect] = [Off("start")]
        if len(self.heads) == 1:
            effects.append(self._append(LedgerRecord(kind="OPEN", reason=self.ledger.capabilities.identity)))
        effects += [self._append(record) for record in list(on_boot(self.ledger, spooled))]
        return effects

    # ------------------------------------------------------------ events

    def on_request(self, peer: Peer, request: m.Request, now_ns: int) -> list[Effect]:
        """What a peer asks for. A request whose id does not rise within its connection is dropped and counted."""
        if request.id <= self._last_id.get(peer.route, 0):
            self.ignored += 1
            return []
        self._last_id[peer.route] = request.id
        if len(self._last_id) > MAX_CONNECTIONS:
            del self._last_id[next(iter(self._last_id))]
        if peer.role not in _ROLES[request.t]:
            return [self._refuse(peer, request, "FORBIDDEN", f"{request.t} is not for the role {peer.role}")]
        match request:
            case m.Hello():
                return [Send(peer.route, self._welcome(peer, request.id, now_ns))]
            case m.Ping():
                return [Send(peer.route, self._beating(request.id, now_ns))]
            case m.Acquire():
                return self._on_acquire(peer, request, now_ns)
            case m.Beat():
                return self._on_beat(peer, request, now_ns)
            case m.Away():
                return self._on_away(peer, request, now_ns)
            case m.Release():
                return self._on_release(peer, request, now_ns)
            case m.Expose():
                return self._on_expose(peer, request, now_ns)
            case m.Stage() | m.Park():
                return self._on_move(peer, request, now_ns)
            case m.Cancel():
                return self._on_cancel(peer, request)
            case m.Forget():
                return self._on_forget(peer, request)
            case m.Blank():
                return [*self._off(now_ns, "BLANK was asked for"), Send(peer.route, m.Done(re=request.id))]
            case m.Clear():
                return [self.clear(peer.user, request.reason), Send(peer.route, m.Done(re=request.id))]
            case _:  # STATUS, RECORDS, FRAMES, TRUTHS need the disk or the instrument: the shell answers them
                return [self._refuse(peer, request, "UNKNOWN", f"{request.t} is not answered here")]

    def on_tick(self, now_ns: int) -> list[Effect]:
        """Time has passed; to be called every few milliseconds, and whenever ``facts`` have changed."""
        if self.lease is not None and self._expired(self.lease, now_ns):
            self.lease = None
        if self.live is None:
            return []
        if (off_ns := self.live.off_ns) is not None:  # it was told, and has not ended: say it again
            return self._off(now_ns, "still on") if now_ns - off_ns > self._heartbeat_ns else []
        if self.lease is None or now_ns - self.lease.beat_ns > TRIP * self._heartbeat_ns:
            return self._off(now_ns, "no heartbeat")
        if not self.facts.watchdog:
            return self._off(now_ns, "the watchdog is down")
        if self.facts.interlock:
            return self._off(now_ns, f"interlock: {self.facts.interlock}")
        return []

    def on_fired(self, key: str, measured: Charge, digests: Mapping[str, str], now_ns: int) -> list[Effect]:
        """The pulse has ended: the beam is off and the frame is in the spool. A pulse of an earlier process is settled
        already and changes nothing."""
        if self.live is None or self.live.key != key:
            self.ignored += 1
            return []
        effects: list[Effect] = [self._append(r) for r in on_fired(self.ledger, key, measured, digests, self.limits)]
        return [*effects, *self._ended(now_ns)]

    def on_broken(self, key: str, reason: str, now_ns: int) -> list[Effect]:
        """The pulse broke off, nobody knows where: charged at its bound."""
        if self.live is None or self.live.key != key:
            self.ignored += 1
            return []
        record = LedgerRecord(kind="INDET", key=key, reason=f"the pulse broke off: {reason}"[:500])
        return [self._append(record), *self._ended(now_ns)]

    def on_late(self, key: str, now_ns: int) -> list[Effect]:
        """The pulse was not started because its time had passed: nothing was delivered, there is no frame."""
        entry = self.ledger.entries[key]
        assert entry.bound is not None
        electrons = None if entry.bound.electrons is None else 0
        return self.on_fired(key, Charge(electrons=electrons, pixels=0, seconds=0.0), {}, now_ns)

    def on_moved(self, error: str) -> list[Effect]:
        """The stage has settled, or the idle beam rests where it was sent; or ``error`` says why not. ``facts`` must be
        those of afterwards."""
        if self.moving is None:
            return []
        (route, re), self.moving = self.moving, None
        return [Send(route, m.Refusal(re=re, code="FAULT", reason=error) if error else m.Done(re=re))]

    def clear(self, who: str, reason: str) -> Append:
        """An operator has looked, and says why the latch may go."""
        return self._append(LedgerRecord(kind="CLEAR", holder=who, reason=reason))

    # ------------------------------------------------------------ the lease

    def _on_acquire(self, peer: Peer, request: m.Acquire, now_ns: int) -> list[Effect]:
        lease = self.lease
        if request.seq >= len(self.heads) or self.heads[request.seq] != request.head:
            reason = f"this ledger does not continue the one that you knew up to record {request.seq}"
            return [self._refuse(peer, request, "LEDGER_MISMATCH", reason)]
        mine = lease is not None and (lease.user, lease.session) == (peer.user, request.session)
        forced = request.force and peer.role == "operator"
        if lease is not None and not mine and not forced and not self._expired(lease, now_ns):
            held = (now_ns - lease.since_ns) / 1e9
            return [self._refuse(peer, request, "LEASE_HELD", f"{lease.user} has held the lease for {held:.1f} s")]
        effects: list[Effect] = self._off(now_ns, "the lease changed hands")
        epoch = self.ledger.epoch + 1
        record = LedgerRecord(kind="EPOCH", epoch=epoch, holder=peer.user, session=request.session)
        effects.append(self._append(record))
        self.lease = Lease(peer.user, request.session, epoch, since_ns=now_ns, beat_ns=now_ns)
        return [*effects, *self._stamp(), Send(peer.route, m.Granted(re=request.id, epoch=epoch))]

    def _on_beat(self, peer: Peer, request: m.Beat, now_ns: int) -> list[Effect]:
        if refusal := self._renew(peer, request.epoch, request.tick, now_ns):
            return [self._refuse(peer, request, *refusal)]
        return [*self._stamp(), Send(peer.route, self._beating(request.id, now_ns))]

    def _on_away(self, peer: Peer, request: m.Away, now_ns: int) -> list[Effect]:
        if refusal := self._renew(peer, request.epoch, request.tick, now_ns):
            return [self._refuse(peer, request, *refusal)]
        assert self.lease is not None
        away_s = min(request.seconds, self.timing.away_s)
        self.lease.away_until_ns = now_ns + int(away_s * 1e9)
        off = self._off(now_ns, "the controller is away") if self.live is not None else []
        return [*off, Send(peer.route, self._beating(request.id, now_ns))]

    def _on_release(self, peer: Peer, request: m.Release, now_ns: int) -> list[Effect]:
        effects: list[Effect] = []
        if self.lease is not None and (self.lease.user, self.lease.epoch) == (peer.user, request.epoch):
            effects = self._off(now_ns, "the lease was given back")
            self.lease = None
        return [*effects, Send(peer.route, m.Done(re=request.id))]

    def _renew(self, peer: Peer, epoch: int, tick: int, now_ns: int) -> tuple[m.Code, str] | None:
        """Why this is no sign of life of the holder's main loop; or None, and the lease is renewed."""
        lease = self.lease
        if lease is None or self._expired(lease, now_ns):
            return "NO_LEASE", "the lease has expired" if epoch == self.ledger.epoch else "there is no such lease"
        if epoch != lease.epoch or peer.user != lease.user:
            return "FENCED", f"epoch {epoch} has ended; {lease.user} holds {lease.epoch}"
        if tick <= lease.tick:
            return "STALLED", f"tick {tick} came before: the main loop stands still"
        lease.tick, lease.beat_ns, lease.away_until_ns = tick, now_ns, 0
        return None

    def _expired(self, lease: Lease, now_ns: int) -> bool:
        return now_ns > max(lease.beat_ns + int(self.timing.lease_s * 1e9), lease.away_until_ns)

    # ------------------------------------------------------------ exposures

    def _on_expose(self, peer: Peer, request: m.Expose, now_ns: int) -> list[Effect]:
        key = request.key
        if request.boot_id != self.boot_id:
            return [self._restarted(peer, request)]
        known = key in self.ledger.entries
        refusal = None if known else self._may_not_fire(peer, request, now_ns)
        record = on_expose(self.ledger, key, request.region, request.bound, self.limits, refusal, request.session)
        if record is None:
            return self._outcome_or_wait(peer, request.id, key)
        effects: list[Effect] = [self._append(record)]
        if record.kind == "LATCH":
            return [
                *effects,
                *self._off(now_ns, record.reason),
                self._refuse(peer, request, "KEY_REUSE", record.reason),
            ]
        if record.kind == "VOID":
            return [*effects, self._settled(peer.route, request.id, key)]
        self.live = Live(key, peer.route, request.id)
        self._recent.append((now_ns / 1e9, request.bound.seconds))
        ordinal = len(self.ledger.fired) - 1
        not_after = min(request.deadline_ns, now_ns + int(TRIP * self._heartbeat_ns))
        fire = Fire(key, ordinal, request.region.sent, not_after)
        return [*effects, *self._stamp(), fire, Send(peer.route, m.Firing(re=request.id, key=key))]

    def _may_not_fire(self, peer: Peer, request: m.Expose, now_ns: int) -> str | None:
        """Why a new key must not fire now, or None; the lease is renewed by the request itself."""
        if reason := self._may_not_move(peer, request, now_ns):
            return reason
        recent = self._recent
        while recent and now_ns / 1e9 - recent[0][0] > DUTY_WINDOW_S:
            recent.popleft()
        size = frame_bytes(request.region, self.ledger.capabilities)
        if size > self.facts.room_bytes:
            return f"the spool has room for {self.facts.room_bytes} bytes, the frames may take {size}"
        return over_rates(recent, now_ns / 1e9, request.bound.seconds, self.limits) or None

    def _may_not_move(self, peer: Peer, request: m.Expose | m.Stage | m.Park, now_ns: int) -> str | None:
        """Why nothing that needs the lease may begin now, or None."""
        if request.boot_id != self.boot_id:
            return "STALE: the bridge has been restarted since"
        if now_ns > request.deadline_ns:
            return f"STALE: {(now_ns - request.deadline_ns) / 1e9:.3f} s after its deadline"
        if refusal := self._renew(peer, request.epoch, request.tick, now_ns):
            return ": ".join(refusal)
        if hindrance := self._hindrance(now_ns):
            return hindrance
        if isinstance(request, m.Expose):
            return self._stage_elsewhere()
        return None

    def _hindrance(self, now_ns: int) -> str:
        """Why nothing can be exposed just now, though that will pass; or ''."""
        if self.live is not None or self.moving is not None:
            return "BUSY: an exposure or a move of stage or beam is running"
        if not self.facts.watchdog:
            return "the watchdog is down"
        if self.facts.interlock:
            return f"interlock: {self.facts.interlock}"
        return over_rates(self._recent, now_ns / 1e9, 0.0, self.limits)

    def _stage_elsewhere(self) -> str | None:
        there, meant = self.facts.stage_nm, self.ledger.stage_nm
        if max(abs(there[0] - meant[0]), abs(there[1] - meant[1])) <= STAGE_NM:
            return None
        return (
            f"the stage is at ({there[0]:.1f}, {there[1]:.1f}) nm, the ledger says ({meant[0]:.1f}, {meant[1]:.1f}): "
            "what would be exposed is not what is asked for"
        )

    def _on_move(self, peer: Peer, request: m.Stage | m.Park, now_ns: int) -> list[Effect]:
        capabilities = self.ledger.capabilities
        reason = self._may_not_move(peer, request, now_ns) or self.ledger.latched
        if isinstance(request, m.Park):
            width, height = capabilities.field_nm
            if not reason and not (0 <= request.at_nm[0] <= width and 0 <= request.at_nm[1] <= height):
                reason = f"({request.at_nm[0]:g}, {request.at_nm[1]:g}) nm lies outside 0..{width:g} x 0..{height:g} nm"
            if reason:
                return [self._refuse(peer, request, "REFUSED", reason)]
            self.moving = (peer.route, request.id)
            return [ParkBeam(request.at_nm)]
        reach = capabilities.stage_range_nm
        farthest = max(abs(request.to_nm[0]), abs(request.to_nm[1]))
        if not reason and (reach is None or farthest > reach):
            reason = f"{farthest:g} nm from where the stage was; the limit is {0 if reach is None else reach:g} nm"
        if reason:
            return [self._refuse(peer, request, "REFUSED", reason)]
        self.moving = (peer.route, request.id)
        return [self._append(LedgerRecord(kind="STAGE", stage_nm=request.to_nm)), MoveStage(request.to_nm)]

    def _on_cancel(self, peer: Peer, request: m.Cancel) -> list[Effect]:
        if request.boot_id != self.boot_id:
            return [self._restarted(peer, request)]
        effects: list[Effect] = []
        if self.live is None or self.live.key != request.key:
            record = on_cancel(self.ledger, request.key)
            if record is not None:
                effects.append(self._append(record))
        return [*effects, *self._outcome_or_wait(peer, request.id, request.key)]

    def _on_forget(self, peer: Peer, request: m.Forget) -> list[Effect]:
        entry = self.ledger.entries.get(request.key)
        if entry is None or not entry.digests or dict(entry.digests) != request.digests:
            return [self._refuse(peer, request, "REFUSED", "these are not the digests of that frame; it is kept")]
        if entry.session != request.session:
            return [self._refuse(peer, request, "REFUSED", "another session exposed that frame; it is kept")]
        return [Discard(request.key), Send(peer.route, m.Done(re=request.id))]

    # ------------------------------------------------------------ inside

    @property
    def _heartbeat_ns(self) -> int:
        return int(self.timing.heartbeat_s * 1e9)

    def _learn(self, record: LedgerRecord, body: str) -> None:
        self.ledger = absorb(self.ledger, record)
        self.heads.append(chain_hash(self.heads[-1], body))

    def _append(self, record: LedgerRecord) -> Append:
        body = record.model_dump_json(exclude_defaults=True)
        self._learn(record, body)
        return Append(body)

    def _stamp(self) -> list[Effect]:
        """A pulse that was told to end is stamped no more: where the word to end it was lost, the watchdog sees the
        stamp grow old and blanks on its own path, however well the controller is."""
        assert self.lease is not None
        if self.live is not None and self.live.off_ns is not None:
            return []
        return [Stamp(self.lease.beat_ns, self.live is not None)]

    def _off(self, now_ns: int, reason: str) -> list[Effect]:
        """Blank; without a pulse there is nothing to end, but it costs nothing to say it again."""
        if self.live is not None:
            self.live.off_ns = now_ns
        return [Off(reason)]

    def _ended(self, now_ns: int) -> list[Effect]:
        assert self.live is not None
        live, self.live = self.live, None
        beat_ns = self.lease.beat_ns if self.lease is not None else now_ns
        return [Stamp(beat_ns, False), self._settled(live.route, live.re, live.key)]

    def _outcome_or_wait(self, peer: Peer, re: int, key: str) -> list[Effect]:
        if self.live is not None and self.live.key == key:
            self.live.route, self.live.re = peer.route, re
            return [Send(peer.route, m.Firing(re=re, key=key))]
        return [self._settled(peer.route, re, key)]

    def _settled(self, route: bytes, re: int, key: str) -> Send:
        return Send(route, m.Settled(re=re, outcome=answer(self.ledger, key)))

    def _restarted(self, peer: Peer, request: m.Request) -> Send:
        """Nothing is said of a key, nor written, before the controller has compared this process's ledger with what it
        knows: it may be an old copy."""
        return self._refuse(peer, request, "STALE", "the bridge has been restarted since")

    def _refuse(self, peer: Peer, request: m.Request, code: m.Code, reason: str) -> Send:
        return Send(peer.route, m.Refusal(re=request.id, code=code, reason=reason))

    def _beating(self, re: int, now_ns: int) -> m.Beating:
        return m.Beating(
            re=re,
            boot_id=self.boot_id,
            mono_ns=now_ns,
            live=self.live.key if self.live is not None else None,
            hindrance=self._hindrance(now_ns),
            seq=len(self.heads) - 1,
            latched=self.ledger.latched,
        )

    def _welcome(self, peer: Peer, re: int, now_ns: int) -> m.Welcome:
        return m.Welcome(
            re=re,
            capabilities=self.ledger.capabilities,
            timing=self.timing,
            boot_id=self.boot_id,
            mono_ns=now_ns,
            seq=len(self.heads) - 1,
            head=self.heads[-1],
            role=peer.role,
            frames_port=self.frames_port,
        )
