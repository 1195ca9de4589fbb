"""The instrument's ledger (S of the protocol): a fold of durable records, and what must be written before what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from aecontrol.dose import TileMap, Totals, over_budget, over_limits
from aecontrol.errors import InstrumentFault
from aecontrol.types import Capabilities, Charge, Count, Model, ScanRegion, Sha256

from .interlocks import InterlockLimits, dose_disagreement, over_shot_limits, tile_bounds
from .keys import Outcome, command_digest, scanned_part


class LedgerRecord(Model):
    """One durable line of the instrument's ledger.

    OPEN (``reason``: the instrument's identity), EPOCH (who holds the lease from here on), FIRING, POST, VOID, INDET (a
    key's life), STAGE (where the stage is sent), LATCH and CLEAR (``reason``: why, and who says that it is mended).
    """

    kind: Literal["OPEN", "EPOCH", "FIRING", "POST", "VOID", "INDET", "STAGE", "LATCH", "CLEAR"]
    key: Sha256 | None = None
    session: str = ""
    holder: str = ""
    epoch: Count = 0
    stage_nm: tuple[float, float] | None = None
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
    session: str = ""
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
    epoch: int = 0
    stage_nm: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def empty(cls, capabilities: Capabilities, limits: InterlockLimits | None = None) -> Ledger:
        """A ledger with no record; ``limits``: whose drift its map of fluence allows for."""
        bounds = tile_bounds(capabilities, limits or InterlockLimits())
        return cls(capabilities, {}, (), Totals(), TileMap.of(bounds))


def delivered(entry: Entry) -> ScanRegion | None:
    """Where the electrons of a key that fired went, in the instrument's field (:func:`scanned_part`); None when a pulse
    ended before there were any. Of INDET nothing less than all is known."""
    assert entry.region is not None
    whole, measured = entry.region.sent, entry.measured
    part = scanned_part(whole, measured)
    return None if part is not whole and measured is not None and measured.electrons == 0 else part


def absorb(ledger: Ledger, record: LedgerRecord) -> Ledger:
    """The ledger after one more record."""
    match record.kind:
        case "OPEN":
            return ledger
        case "EPOCH":
            return replace(ledger, epoch=record.epoch)
        case "STAGE":
            return replace(ledger, stage_nm=record.stage_nm or (0.0, 0.0))
        case "LATCH" | "CLEAR":
            return replace(ledger, latched=record.reason if record.kind == "LATCH" else "")
        case _:
            return _absorb_key(ledger, record)


def _absorb_key(ledger: Ledger, record: LedgerRecord) -> Ledger:
    key = record.key
    assert key is not None
    before = ledger.entries.get(key)
    if record.kind in ("FIRING", "VOID"):
        entry = Entry(record.kind, record.command, record.session, record.region, record.bound, reason=record.reason)
    else:
        assert before is not None
        assert record.kind in ("POST", "INDET")
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
    ledger: Ledger,
    key: str,
    region: ScanRegion,
    bound: Charge,
    limits: InterlockLimits,
    refusal: str | None = None,
    session: str = "",
) -> LedgerRecord | None:
    """What S must write before it does anything about EXPOSE: FIRING (then fire), VOID (refused) or LATCH (one key for
    two commands); None when the key is known and its recorded outcome is the answer. ``refusal``: why the shell must
    refuse a new key, whatever the ledger says."""
    command = command_digest(region, bound)
    known = ledger.entries.get(key)
    if known is not None:
        if known.command is not None and known.command != command:
            return LedgerRecord(kind="LATCH", reason=f"KEY_REUSE: key {key[:12]} came with two different commands")
        return None
    refusal = (
        refusal
        or ledger.latched
        or over_limits(region, ledger.capabilities)
        or over_shot_limits(region, bound, ledger.capabilities, limits, ledger.stage_nm)
        or over_budget(region, bound, limits.budget, ledger.charged, ledger.tiles)
    )
    kind: Literal["VOID", "FIRING"] = "VOID" if refusal else "FIRING"
    return LedgerRecord(
        kind=kind, key=key, command=command, session=session, region=region, bound=bound, reason=refusal or ""
    )


def on_fired(
    ledger: Ledger, key: str, measured: Charge, digests: Mapping[str, str], limits: InterlockLimits
) -> list[LedgerRecord]:
    """What S must write once the beam is blanked and the frame is in the spool: POST with the measured charge in full,
    and a LATCH when that is more than the bound, or not what the declared current delivers in that time. INDET when
    electrons were promised to be metered and were not: a charge that nobody measured is not nothing."""
    entry = ledger.entries[key]
    assert entry.bound is not None
    assert entry.region is not None
    if measured.electrons is None and entry.bound.electrons is not None:
        reason = "the instrument metered nothing; charged at its bound"
        return [LedgerRecord(kind="INDET", key=key, digests=dict(digests), reason=reason)]
    records = [LedgerRecord(kind="POST", key=key, measured=measured, digests=dict(digests))]
    if (measured.electrons or 0) > (entry.bound.electrons or 0) or measured.pixels > entry.bound.pixels:
        records.append(
            LedgerRecord(
                kind="LATCH",
                reason=f"DOSE_OVERRUN: key {key[:12]} delivered {measured.electrons} electrons, "
                f"{measured.pixels} pixels; its bound was {entry.bound.electrons}, {entry.bound.pixels}",
            )
        )
    elif doubt := dose_disagreement(entry.region, measured, ledger.capabilities, limits):
        records.append(LedgerRecord(kind="LATCH", reason=f"DOSE_DISAGREEMENT: key {key[:12]}: {doubt}"))
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
