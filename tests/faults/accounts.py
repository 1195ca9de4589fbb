"""What a campaign with real processes has to show at its end: column, server and controller tell the same story."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aecontrol.errors import AecontrolError
from aecontrol.exposure import KeyRecord, Ledger, LedgerRecord
from aecontrol.exposure.ledger import Entry, absorb
from aecontrol.folding import fold
from aecontrol.journal import read_journal
from aecontrol.measuring import load_array
from aecontrol.session import read_events
from aecontrol.state import State
from drivers.spool import Spool, spooled_channels

from .metered import CAPABILITIES, Metered, read_meter


@dataclass(frozen=True)
class Accounts:
    """Three counts of the same electrons: the column's own log with its list of fired keys, the server's ledger, the
    controller's journal."""

    folder: Path
    pulses: list[Metered]
    fired: Mapping[int, str]
    server: Ledger
    controller: State
    meter: int


def read_accounts(folder: Path, fired: Mapping[int, str], meter: int) -> Accounts:
    """``fired``: ordinal -> key, as the column says; ``meter``: electrons that it says it has delivered."""
    server = Ledger.empty(CAPABILITIES)
    for body in read_journal(folder / "specimen" / "ledger.sqlite"):
        server = absorb(server, LedgerRecord.model_validate_json(body))
    return Accounts(folder, read_meter(folder), fired, server, fold(read_events(folder / "session")), meter)


def complaints(a: Accounts) -> Iterator[str]:
    """Everything that is not as it must be; nothing, when the campaign has shown what it should."""
    yield from _double(a)
    yield from _uncharged(a)
    yield from _lost(a)
    yield from _open(a)
    if a.controller.stopped is None:
        yield "the session has not stopped"
    verified = json.loads((a.folder / "session" / "verified.json").read_bytes())
    yield from verified["differences"]
    if verified["identical"] != verified["decisions"]:
        yield f"{verified['identical']} of {verified['decisions']} decisions are identical"


def _double(a: Accounts) -> Iterator[str]:
    for ordinal, times in Counter(pulse.ordinal for pulse in a.pulses).items():
        if times > 1:
            yield f"shot {ordinal} was fired {times} times"
    if len(set(a.fired.values())) < len(a.fired):
        yield "a key was fired twice"
    records = a.controller.keys
    steps = Counter(records[a.fired[p.ordinal]].step for p in a.pulses if a.fired.get(p.ordinal) in records)
    for step, times in steps.items():
        if times > 1:
            yield f"step {step} was fired {times} times"


def _uncharged(a: Accounts) -> Iterator[str]:
    delivered = sum(pulse.electrons or 0 for pulse in a.pulses)
    charged = {"server": a.server.charged.electrons, "controller": a.controller.charged.electrons}
    for who, electrons in charged.items():
        if delivered > electrons or a.meter > electrons:
            yield f"{delivered} electrons were delivered (meter {a.meter}), the {who} has charged {electrons}"
    for pulse in a.pulses:
        key = a.fired.get(pulse.ordinal, "")
        entry, record = a.server.entries.get(key), a.controller.keys.get(key)
        if pulse.electrons is None:
            yield f"shot {pulse.ordinal} still runs"
        elif entry is None or record is None:
            yield f"shot {pulse.ordinal} is in no ledger"
        else:
            yield from _one(pulse.electrons, entry, record)


def _one(electrons: int, entry: Entry, record: KeyRecord) -> Iterator[str]:
    charges = {"server": entry.charge, "controller": record.charge}
    for who, charge in charges.items():
        if charge is None or (charge.electrons or 0) < electrons:
            yield f"{record.key[:12]} delivered {electrons}, the {who} has charged {charge}"
    if entry.measured is not None and entry.measured.electrons != electrons:
        yield f"{record.key[:12]} delivered {electrons}, {entry.measured.electrons} were posted"


def _lost(a: Accounts) -> Iterator[str]:
    """A frame is complete in the spool, or the controller has it."""
    spool = Spool(a.folder / "specimen" / "spool", spooled_channels(CAPABILITIES))
    for key, entry in a.server.entries.items():
        if not entry.digests:
            continue
        frame = a.controller.frames.get(key)
        if frame is None:
            if not spool.complete([key]):
                yield f"the frame of {key[:12]} is nowhere"
            continue
        try:
            for name, ref in frame.channels.items():
                load_array(a.folder / "session", ref)
                if ref.sha256 != entry.digests[name]:
                    yield f"channel {name} of {key[:12]} is {ref.sha256[:12]}, not {entry.digests[name][:12]}"
        except AecontrolError as error:
            yield f"the frame of {key[:12]}: {error.what}"


def _open(a: Accounts) -> Iterator[str]:
    """Everything is settled, on both sides in the same way; the controller's copy of the ledger is the ledger."""
    for key, entry in a.server.entries.items():
        if entry.state == "FIRING":
            yield f"{key[:12]} is still FIRING in the server's ledger"
        elif key not in a.controller.keys:
            yield f"{key[:12]} is unknown to the controller"
    for key, record in a.controller.keys.items():
        other = a.server.entries.get(key)
        if other is None or (other.state, other.measured) != (record.state, record.measured):
            yield f"{key[:12]}: the controller says {record.state}, the server {other and other.state}"
        elif dict(other.digests) != dict(record.digests):
            yield f"{key[:12]}: the digests differ"
    ours, theirs = (
        list(read_journal(a.folder / place / "ledger.sqlite")) for place in ("session/instrument", "specimen")
    )
    if theirs[: len(ours)] != ours:
        yield "the controller's copy of the server's ledger is not its beginning"
