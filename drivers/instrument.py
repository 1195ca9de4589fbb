"""The instrument's side of the exposure protocol, around any column: its own ledger, its own interlocks, its own spool.

The shell makes every record that :mod:`aecontrol.exposure` asks for durable before it acts on it: FIRING before the
beam, the frame in the spool before POST. A column is only ever asked to fire; it is never asked to fire again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from aecontrol.dose import dwell_share
from aecontrol.errors import AecontrolError, InstrumentFault, StorageFault
from aecontrol.exposure import (
    InterlockLimits,
    Ledger,
    LedgerRecord,
    Outcome,
    absorb,
    answer,
    delivered,
    on_boot,
    on_cancel,
    on_expose,
    on_fired,
)
from aecontrol.journal import Journal
from aecontrol.protocols import Change, FrameData, Truth
from aecontrol.types import Capabilities, Charge, ScanRegion

from .backend import Pulse
from .spool import Spool, frame_bytes, spooled_channels

log = logging.getLogger(__name__)


class Column(Protocol):
    """The physics behind a driver: fires once per call and remembers what it did to the specimen."""

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Expose ``region`` as the ``ordinal``-th shot of this specimen (0, 1, ...). Blocks until blanked."""

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """Account in full for a shot fired by an earlier process, so that the specimen is as that shot left it."""

    def targets(self, kind: str) -> tuple[NDArray[np.float64], tuple[str, ...]] | None:
        """True objects of ``kind``: positions [n, 2] nm and labels, as the session started; None when not known."""


@runtime_checkable
class KnowsAll(Protocol):
    """A column that is simulated, and knows what it did."""

    @property
    def meter(self) -> int:
        """All electrons ever delivered."""

    def atoms_nm(self) -> NDArray[np.float64]:
        """Positions [n, 2] of the atoms left, nm."""

    def changes(self) -> tuple[Change, ...]:
        """What the beam has done so far."""

    def sites(self) -> NDArray[np.float64]:
        """Every site as born [n, 3]: (x, y) in nm and the atomic number of what sat there, 0 for a vacant one."""

    def noiseless(self, region: ScanRegion) -> Mapping[str, NDArray[np.generic]]:
        """Ideal images of ``region``; nothing is exposed."""


class Instrument:
    """A :class:`~aecontrol.protocols.Microscope` in this process, with a durable ledger in ``folder``.

    Opening the folder of an earlier process settles what it left firing (INDET, charged in full) and brings the
    column to the state in which the earlier shots left it. Raises StorageFault on a damaged ledger, InstrumentFault
    when the ledger belongs to another instrument.
    """

    def __init__(self, column: Column, capabilities: Capabilities, limits: InterlockLimits, folder: Path) -> None:
        self._column, self._capabilities, self._limits = column, capabilities, limits
        self._spool = Spool(folder / "spool", spooled_channels(capabilities))
        self._journal = Journal(folder / "ledger.sqlite")
        self._ledger = Ledger.empty(capabilities, limits)
        records = [LedgerRecord.model_validate_json(body) for body in self._journal.bodies]
        if records and records[0].reason != capabilities.identity:
            raise InstrumentFault(
                f"the ledger belongs to {records[0].reason!r}, this instrument is {capabilities.identity!r}",
                "resume with the configuration that the session was begun with",
            )
        for record in records:
            self._ledger = absorb(self._ledger, record)
        firing = [key for key, entry in self._ledger.entries.items() if entry.state == "FIRING"]
        for record in list(on_boot(self._ledger, self._spool.complete(firing))):
            self._write(record)
        for ordinal, key in enumerate(self._ledger.fired):
            if (region := delivered(self._ledger.entries[key])) is not None:
                column.absorb(ordinal, region)
        if not records:
            self._write(LedgerRecord(kind="OPEN", reason=capabilities.identity))

    # ------------------------------------------------------------ Microscope

    def capabilities(self) -> Capabilities:
        """What the instrument is."""
        return self._capabilities

    def expose(self, key: str, region: ScanRegion, bound: Charge) -> Outcome:
        """Fire once, or give the outcome that the key already has; see the protocol."""
        record = on_expose(self._ledger, key, region, bound, self._limits)
        if record is not None and record.kind == "FIRING":
            record = self._reserve_spool(key, region, record)
        if record is not None:
            self._write(record)
            if record.kind == "LATCH":
                raise InstrumentFault(record.reason, "stop: two controllers, or a defect in one")
            if record.kind == "FIRING":
                self._fire(key, region)
        return answer(self._ledger, key)

    def cancel(self, key: str) -> Outcome:
        """The terminal outcome of ``key``; a key never seen is tombstoned."""
        record = on_cancel(self._ledger, key)
        if record is not None:
            self._write(record)
        return answer(self._ledger, key)

    def fetch(self, key: str) -> FrameData:
        """The spooled frame, digests checked."""
        entry = self._ledger.entries.get(key)
        if entry is None or not entry.digests:
            raise InstrumentFault(f"there is no frame for key {key[:12]}")
        channels, started_s, flags = self._spool.read(key, entry.digests)
        measured = entry.measured
        if measured is None:
            flags = (*flags, "dose = upper bound")
            measured = entry.bound
        assert measured is not None
        assert entry.region is not None
        electrons = (
            None if measured.electrons is None else measured.electrons * dwell_share(entry.region, self._capabilities)
        )
        return FrameData(channels, started_s, electrons, flags)

    def acknowledge(self, key: str) -> None:
        """Delete the spooled copy."""
        entry = self._ledger.entries.get(key)
        self._spool.delete(key, entry.digests if entry else ())

    def blank(self) -> None:
        """The beam of an in-process column is blanked whenever ``fire`` is not running."""

    def close(self) -> None:
        """Close the ledger."""
        self._journal.close()

    def truth(self, target: str) -> Truth | None:
        """True objects, for the scorer only."""
        found = self._column.targets(target)
        if found is None:
            return None
        if not isinstance(self._column, KnowsAll):
            return Truth(
                targets=found[0], labels=tuple(found[1]), electrons_delivered=getattr(self._column, "meter", None)
            )
        return Truth(
            targets=found[0],
            labels=tuple(found[1]),
            electrons_delivered=self._column.meter,
            atoms=self._column.atoms_nm(),
            changes=self._column.changes(),
            sites=self._column.sites(),
        )

    def noiseless(self, region: ScanRegion) -> Mapping[str, NDArray[np.generic]] | None:
        """The ideal image of ``region``, for the scorer only."""
        return self._column.noiseless(region) if isinstance(self._column, KnowsAll) else None

    # ------------------------------------------------------------ inside

    def _write(self, record: LedgerRecord) -> None:
        self._journal.append(record.model_dump_json(exclude_defaults=True))
        self._ledger = absorb(self._ledger, record)

    def _fire(self, key: str, region: ScanRegion) -> None:
        ordinal = len(self._ledger.fired) - 1
        try:
            pulse = self._column.fire(ordinal, region.sent)
            measured = Charge(electrons=pulse.electrons, pixels=pulse.pixels, seconds=pulse.seconds)
            digests = self._spool.write(key, pulse)
        except (AecontrolError, OSError, ValueError, RuntimeError, MemoryError) as error:
            # the beam has been on for nobody knows how long: charged at the bound, never fired again
            self._write(LedgerRecord(kind="INDET", key=key, reason=f"the pulse broke off: {error}"))
            log.error("shot %s broke off: %s", key[:12], error)
            return
        for record in on_fired(self._ledger, key, measured, digests, self._limits):
            self._write(record)

    def _reserve_spool(self, key: str, region: ScanRegion, firing: LedgerRecord) -> LedgerRecord:
        """FIRING only with room for its frame on the disk: otherwise the beam would be spent on nothing."""
        try:
            self._spool.reserve(key, frame_bytes(region, self._capabilities))
        except StorageFault as error:
            return firing.model_copy(update={"kind": "VOID", "reason": error.what})
        return firing
