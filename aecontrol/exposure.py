"""The exposure protocol: both halves as pure state machines, no clock, no disk, no beam.

The controller's half (C) and the instrument's half (S) each keep a ledger of keys::

    C:  RESERVED ------------------------------> POST(m) | VOID | INDET(r)
    S:  (absent) -> FIRING(r) -> POST(m)         normal
                 -> VOID                         refused by an interlock, or CANCEL tombstone
        FIRING(r) found at start-up -> INDET(r)  charged in full, never fired again

In process the two halves meet through :class:`~aecontrol.protocols.Microscope`; over a wire the same functions
answer messages. A *shell* makes each returned record durable before it acts on the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from aecontrol.dose import TileMap, Totals, over_budget, over_limits
from aecontrol.errors import InstrumentFault
from aecontrol.types import Budget, Capabilities, Charge, Model, ScanRegion, Sha256

KeyState = Literal["RESERVED", "POST", "VOID", "INDET"]


class Outcome(Model):
    """What became of a key. Terminal; a timeout is not an outcome.

    POST: fired, ``measured`` is what was delivered. VOID: never fired and never will be. INDET: it may have fired;
    charged at its bound. ``digests`` (sha256 of each channel's .npy bytes) is empty when there is no frame.
    """

    key: Sha256
    state: Literal["POST", "VOID", "INDET"]
    measured: Charge | None = None
    digests: dict[str, Sha256] = {}
    reason: str = ""


def make_key(session: str, intent: int, attempt: int, region: ScanRegion, bound: Charge) -> str:
    """Identity of one exposure attempt: sha256 of session, intent, attempt and command."""
    text = f"{session}\n{intent}\n{attempt}\n{command_digest(region, bound)}"
    return hashlib.sha256(text.encode()).hexdigest()


def command_digest(region: ScanRegion, bound: Charge) -> str:
    """Digest of what is asked for, to notice one key used for two different commands."""
    return hashlib.sha256(f"{region.model_dump_json()}\n{bound.model_dump_json()}".encode()).hexdigest()


# ---------------------------------------------------------------- C: the controller's half


class KeyRecord(Model):
    """One key in the controller's ledger."""

    key: Sha256
    step: int
    attempt: int
    region: ScanRegion
    bound: Charge
    state: KeyState = "RESERVED"
    measured: Charge | None = None
    digests: dict[str, Sha256] = {}

    @property
    def charge(self) -> Charge:
        """What this key counts: its bound while unknown, the measured charge once posted, nothing when void."""
        if self.state == "POST" and self.measured is not None:
            return self.measured
        if self.state == "VOID":
            return Charge(electrons=None if self.bound.electrons is None else 0, pixels=0, seconds=0.0)
        return self.bound

    @property
    def overrun(self) -> bool:
        """True when more was delivered than the bound allowed: the session must latch."""
        m, r = self.measured, self.bound
        return m is not None and ((m.electrons or 0) > (r.electrons or 0) or m.pixels > r.pixels)


def settle(record: KeyRecord, outcome: Outcome) -> KeyRecord:
    """The controller's record after the instrument's answer. Raises InstrumentFault when the answer contradicts what
    was settled before, or belongs to another key: then nobody knows what the beam did."""
    if outcome.key != record.key:
        raise InstrumentFault(f"asked for key {record.key[:12]}, the answer is for {outcome.key[:12]}")
    if outcome.state == "POST" and outcome.measured is None:
        raise InstrumentFault(f"key {record.key[:12]} was posted without a measured charge")
    after = record.model_copy(update={"state": outcome.state, "measured": outcome.measured, "digests": outcome.digests})
    if record.state != "RESERVED" and after != record:
        raise InstrumentFault(
            f"key {record.key[:12]} was settled as {record.state}, now the instrument says {outcome.state}",
            "compare both ledgers by hand before exposing again",
        )
    return after


# ---------------------------------------------------------------- S: the instrument's half


class LedgerRecord(Model):
    """One durable line of the instrument's ledger."""

    kind: Literal["OPEN", "FIRING", "POST", "VOID", "INDET", "LATCH"]
    key: Sha256 | None = None
    command: Sha256 | None = None
    region: ScanRegion | None = None
    bound: Charge | None = None
    measured: Charge | None = None
    digests: dict[str, Sha256] = {}
    reason: str = ""


@dataclass(frozen=True)
class Entry:
    """One key in the instrument's ledger."""

    state: Literal["FIRING", "POST", "VOID", "INDET"]
    command: str | None = None
    region: ScanRegion | None = None
    bound: Charge | None = None
    measured: Charge | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def charge(self) -> Charge | None:
        """What this key counts against the instrument's own budget."""
        if self.state == "VOID":
            return None
        return self.measured if self.state == "POST" else self.bound


@dataclass(frozen=True)
class Ledger:
    """The instrument's ledger: a fold of its records. ``fired`` lists keys in the order of their FIRING."""

    capabilities: Capabilities
    entries: Mapping[str, Entry]
    fired: tuple[str, ...]
    charged: Totals
    tiles: TileMap
    latched: str = ""

    @classmethod
    def empty(cls, capabilities: Capabilities) -> Ledger:
        """A ledger with no record."""
        return cls(capabilities, {}, (), Totals(), TileMap.of(capabilities))


class InterlockLimits(Model):
    """Limits owned by the instrument; the controller can neither read them away nor raise them."""

    budget: Budget = Budget()


def absorb(ledger: Ledger, record: LedgerRecord) -> Ledger:
    """The ledger after one more record."""
    if record.kind == "OPEN":
        return ledger
    if record.kind == "LATCH":
        return replace(ledger, latched=record.reason)
    key = record.key
    assert key is not None
    before = ledger.entries.get(key)
    if record.kind in ("FIRING", "VOID"):
        entry = Entry(record.kind, record.command, record.region, record.bound, reason=record.reason)
    else:
        assert before is not None
        entry = replace(
            before, state=record.kind, measured=record.measured, digests=record.digests, reason=record.reason
        )
    entries = {**ledger.entries, key: entry}
    if record.kind != "FIRING":
        return replace(ledger, entries=entries, charged=_charged(entries))
    assert entry.region is not None
    assert entry.bound is not None
    return replace(
        ledger,
        entries=entries,
        fired=(*ledger.fired, key),
        charged=_charged(entries),
        tiles=ledger.tiles.add(entry.region, entry.bound.peak_fluence_e_per_A2 or 0.0),
    )


def _charged(entries: Mapping[str, Entry]) -> Totals:
    result = Totals()
    for entry in entries.values():
        if (charge := entry.charge) is not None:
            result = result.plus(charge)
    return result


def on_expose(
    ledger: Ledger, key: str, region: ScanRegion, bound: Charge, limits: InterlockLimits
) -> LedgerRecord | None:
    """What S must write before it does anything about EXPOSE: FIRING (then fire), VOID (refused) or LATCH (one key for
    two commands); None when the key is known and its recorded outcome is the answer."""
    command = command_digest(region, bound)
    known = ledger.entries.get(key)
    if known is not None:
        if known.command is not None and known.command != command:
            return LedgerRecord(kind="LATCH", reason=f"KEY_REUSE: key {key[:12]} came with two different commands")
        return None
    refusal = (
        ledger.latched
        or over_limits(region, ledger.capabilities)
        or over_budget(region, bound, limits.budget, ledger.charged, ledger.tiles)
    )
    if refusal:
        return LedgerRecord(kind="VOID", key=key, command=command, region=region, bound=bound, reason=refusal)
    return LedgerRecord(kind="FIRING", key=key, command=command, region=region, bound=bound)


def on_fired(ledger: Ledger, key: str, measured: Charge, digests: Mapping[str, str]) -> list[LedgerRecord]:
    """What S must write once the beam is blanked and the frame is in the spool: POST with the measured charge in full,
    and a LATCH when that is more than the bound."""
    entry = ledger.entries[key]
    assert entry.bound is not None
    records = [LedgerRecord(kind="POST", key=key, measured=measured, digests=dict(digests))]
    if (measured.electrons or 0) > (entry.bound.electrons or 0) or measured.pixels > entry.bound.pixels:
        records.append(
            LedgerRecord(
                kind="LATCH",
                reason=f"DOSE_OVERRUN: key {key[:12]} delivered {measured.electrons} electrons, "
                f"{measured.pixels} pixels; its bound was {entry.bound.electrons}, {entry.bound.pixels}",
            )
        )
    return records


def on_cancel(ledger: Ledger, key: str) -> LedgerRecord | None:
    """What S must write before it answers CANCEL: a VOID tombstone for a key never seen, INDET for one that is found
    FIRING with no pulse running; None when the key is terminal."""
    entry = ledger.entries.get(key)
    if entry is None:
        return LedgerRecord(kind="VOID", key=key, reason="cancelled before it fired")
    if entry.state == "FIRING":
        return LedgerRecord(kind="INDET", key=key, reason="the pulse broke off; charged at its bound")
    return None


def on_boot(ledger: Ledger, spooled: Mapping[str, Mapping[str, str]]) -> Iterable[LedgerRecord]:
    """What S must write at start-up: every FIRING without POST becomes INDET. ``spooled`` maps keys to the digests of
    complete, verified frames in the spool."""
    for key, entry in ledger.entries.items():
        if entry.state == "FIRING":
            yield LedgerRecord(
                kind="INDET",
                key=key,
                digests=dict(spooled.get(key, {})),
                reason="found firing at start-up; charged at its bound",
            )


def answer(ledger: Ledger, key: str) -> Outcome:
    """The outcome of a terminal key."""
    entry = ledger.entries[key]
    if entry.state == "FIRING":
        raise InstrumentFault(f"key {key[:12]} is still firing", "wait, or cancel it")
    return Outcome(
        key=key, state=entry.state, measured=entry.measured, digests=dict(entry.digests), reason=entry.reason
    )
