"""Identity and outcome of an exposure, and the controller's ledger of them (C of the protocol)."""

from __future__ import annotations

import hashlib
from typing import Literal

from aecontrol.errors import InstrumentFault
from aecontrol.types import Charge, Model, ScanRegion, Sha256

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


def scanned_part(region: ScanRegion, measured: Charge | None) -> ScanRegion:
    """All of ``region``, or the lines that a pulse which ended early has scanned of it (one that was begun counts).
    Unless all is known it is nothing less than all; the pixels of a record are counted when they are new, so they tell
    nothing."""
    if measured is None or measured.electrons is None or measured.pixels >= region.pixels:
        return region
    return region.first_lines(max(1, -(-measured.pixels // region.shape[1])))


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
    def scanned(self) -> ScanRegion:
        """Where its electrons went: all of its region, or what a pulse that ended early has scanned of it."""
        return scanned_part(self.region, self.measured)

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
