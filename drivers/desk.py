"""What the bridge tells without touching the beam: its state, its ledger, where frames lie, what is true."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

from aecontrol.dose import dwell_share, over_limits
from aecontrol.durable import sha256_hex, write_durable
from aecontrol.errors import InstrumentFault, StorageFault
from aecontrol.exposure import LedgerRecord
from aecontrol.exposure import messages as m
from aecontrol.exposure.server import Peer, Server
from aecontrol.types import InstrumentState

from . import column_messages as column
from .column_link import ColumnLink, Reply
from .spool import Spool


class Desk:
    """Answers the requests that read: STATUS, RECORDS, FRAMES, TRUTHS. ``bodies``: the ledger's records so far."""

    def __init__(self, core: Server, bodies: list[str], spool: Spool, link: ColumnLink) -> None:
        self._core, self._spool, self._link = core, spool, link
        self._bodies: list[str] = []
        self._files: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._asked: dict[int, tuple[bytes, int]] = {}
        for body in bodies:
            self.learn(body)

    def learn(self, body: str) -> None:
        """One more record of the ledger."""
        self._bodies.append(body)
        record = LedgerRecord.model_validate_json(body)
        if record.key is not None and record.digests:
            with self._lock:
                self._files |= {sha: self._spool.path(record.key, name) for name, sha in record.digests.items()}

    def resolve(self, sha256: str) -> Path | None:
        """The file with this digest; from any thread."""
        with self._lock:
            return self._files.get(sha256)

    def takes(self, request: m.Request) -> bool:
        """Whether this request is answered here."""
        return isinstance(request, m.Status | m.Records | m.Frames | m.Truths)

    def answer(self, peer: Peer, request: m.Request, state: InstrumentState) -> m.Reply | None:
        """The reply to a request that reads; None when the column was asked, which :meth:`told` will pass on."""
        match request:
            case m.Status():
                return self._status(request, state)
            case m.Records():
                return self._records(request)
            case m.Frames():
                return self._frames(request)
            case m.Truths():
                return self._ask(peer, request)
        raise AssertionError(request.t)

    def told(self, reply: Reply) -> Iterator[tuple[bytes, m.Reply]]:
        """What the column says is true, for the peer that asked."""
        route, re = self._asked.pop(reply.message.id, (b"", 0))
        if not route:
            return
        if not isinstance(reply.message, column.TruthIs | column.Ideal):
            yield route, m.Refusal(re=re, code="FAULT", reason=str(reply.message))
            return
        files = []
        for part in (reply.message.model_dump_json().encode(), *reply.parts):
            sha = sha256_hex(part)
            path = self._spool.folder / f"{sha}.truth"
            try:
                write_durable(path, part)
            except StorageFault as error:  # nothing that a score needs may end the server
                yield route, m.Refusal(re=re, code="FAULT", reason=error.what)
                return
            with self._lock:
                self._files[sha] = path
            files.append(m.SpoolFile(sha256=sha, nbytes=len(part)))
        yield route, m.Arrays(re=re, files=files)

    def _status(self, request: m.Status, state: InstrumentState) -> m.Told:
        core = self._core
        lease = core.lease
        return m.Told(
            re=request.id,
            state=state,
            holder=lease.user if lease else "",
            session=lease.session if lease else "",
            held_s=(time.monotonic_ns() - lease.since_ns) / 1e9 if lease else 0.0,
            epoch=core.ledger.epoch,
            latched=core.ledger.latched,
            electrons=core.ledger.charged.electrons,
            pixels=core.ledger.charged.pixels,
        )

    def _records(self, request: m.Records) -> m.Recorded:
        size, chosen = 0, list[str]()
        for body in self._bodies[request.after :]:
            size += len(body.encode()) + 16
            if chosen and size > m.RECORDS_BYTES:
                break
            chosen.append(body)
        return m.Recorded(re=request.id, bodies=chosen, seq=len(self._bodies), head=self._core.heads[-1])

    def _frames(self, request: m.Frames) -> m.Reply:
        entry = self._core.ledger.entries.get(request.key)
        if entry is None or not entry.digests:
            return m.Refusal(re=request.id, code="UNKNOWN", reason=f"there is no frame for {request.key[:12]}")
        try:
            started_s, flags = self._spool.about(request.key)
            channels = {
                name: m.SpoolFile(sha256=sha, nbytes=self._spool.path(request.key, name).stat().st_size)
                for name, sha in entry.digests.items()
            }
        except (OSError, InstrumentFault, StorageFault) as error:
            return m.Refusal(re=request.id, code="UNKNOWN", reason=f"the frame is no longer in the spool: {error}")
        charge = entry.measured or entry.bound
        assert charge is not None
        assert entry.region is not None
        share = dwell_share(entry.region, self._core.ledger.capabilities)
        return m.Spooled(
            re=request.id,
            channels=channels,
            started_s=started_s,
            electrons_per_pixel=charge.electrons * share if charge.electrons else None,
            flags=flags if entry.measured else (*flags, "dose = upper bound"),
        )

    def _ask(self, peer: Peer, request: m.Truths) -> m.Reply | None:
        if not self._core.ledger.capabilities.simulated:
            return m.Refusal(re=request.id, code="UNKNOWN", reason="a real specimen keeps its truth to itself")
        lease = self._core.lease
        if lease is not None and lease.user != peer.user:
            return m.Refusal(re=request.id, code="BUSY", reason=f"{lease.user} is at the instrument")
        order: column.Request = column.AskTruth(target=request.target or "")
        if request.region is not None:
            if reason := over_limits(request.region, self._core.ledger.capabilities):
                return m.Refusal(re=request.id, code="REFUSED", reason=reason)
            order = column.AskNoiseless(region=request.region)
        try:
            self._asked[self._link.send(order)] = (peer.route, request.id)
        except InstrumentFault as error:
            return m.Refusal(re=request.id, code="FAULT", reason=error.what)
        return None
