"""The instrument's ledger on a real file against a dictionary: whatever the order of shots, cancels and crashes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aecontrol.dose import bound_charge
from aecontrol.exposure import InterlockLimits, Ledger, LedgerRecord, absorb, on_boot, on_cancel, on_expose, on_fired
from aecontrol.journal import Journal
from aecontrol.types import Budget, Charge, ScanRegion

from .campaign import RAM
from .column import CAPABILITIES

BUDGET = 3 * 10**7
KEYS = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(20)]


class LedgerStates(RuleBasedStateMachine):
    """Twenty keys, one beam, one file; ``model`` is key -> (state, electrons charged)."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=RAM))
        self.limits = InterlockLimits(budget=Budget(electrons=BUDGET))
        self.model: dict[str, tuple[str, int]] = {}
        self.latched = False
        self.live: str | None = None
        self.shots: list[str] = []
        self.commands: dict[str, int] = {}
        self._open()

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)

    def _open(self) -> None:
        self.journal = Journal(self.folder / "ledger.sqlite")
        self.ledger = Ledger.empty(CAPABILITIES)
        for body in self.journal.bodies:
            self.ledger = absorb(self.ledger, LedgerRecord.model_validate_json(body))

    def _write(self, record: LedgerRecord) -> None:
        self.journal.append(record.model_dump_json(exclude_defaults=True))
        self.ledger = absorb(self.ledger, record)

    def _ask(self, key: str, dwell_s: float, short: int) -> tuple[LedgerRecord | None, int]:
        """EXPOSE with a bound that is ``short`` electrons too low; what was written, and the honest bound."""
        region = ScanRegion(center_nm=(3, 2), fov_nm=(2, 2), shape=(8, 8), dwell_time_s=dwell_s)
        bound = bound_charge(region, CAPABILITIES)
        most = bound.electrons
        assert most is not None
        bound = bound.model_copy(update={"electrons": most - short})
        record = on_expose(self.ledger, key, region, bound, self.limits, "busy" if self.live else None)
        if record is not None:
            self._write(record)
        return record, most

    @rule(key=st.sampled_from(KEYS), short=st.sampled_from([0, 0, 0, 1]))
    def expose(self, key: str, short: int) -> None:
        known = key in self.model
        short = self.commands.get(key, short)
        record, most = self._ask(key, 1e-3, short)
        if known:
            assert record is None
            return
        spent = sum(charge for _, charge in self.model.values())
        allowed = not (short or self.latched or self.live) and spent + most <= BUDGET
        assert record is not None
        assert record.kind == ("FIRING" if allowed else "VOID")
        self.commands[key] = short
        self.model[key] = (record.kind, most if allowed else 0)
        if allowed:
            self.live = key
            self.shots.append(key)

    @rule(key=st.sampled_from(KEYS))
    def reuse(self, key: str) -> None:
        """The key of one command with another one."""
        if key in self.commands:
            record, _ = self._ask(key, 2e-3, 0)
            assert record is not None
            assert record.kind == "LATCH"
            self.latched = True

    @rule(share=st.floats(0.0, 1.0), over=st.booleans())
    def fired(self, share: float, over: bool) -> None:
        if self.live is None:
            return
        most = self.model[self.live][1]
        electrons = most + 1 if over else int(most / 1.1 * share)
        entry = self.ledger.entries[self.live]
        assert entry.region is not None
        pixels = 64 if over else min(63, int(64 * share))
        seconds = entry.region.dwell_time_s * 64 * (1.0 if over else share)
        records = on_fired(
            self.ledger, self.live, Charge(electrons=electrons, pixels=pixels, seconds=seconds), {}, self.limits
        )
        assert [record.kind for record in records] == ["POST", "LATCH"][: 1 + over]
        for record in records:
            self._write(record)
        self.model[self.live] = ("POST", electrons)
        self.latched |= over
        self.live = None

    @rule(key=st.sampled_from(KEYS))
    def cancel(self, key: str) -> None:
        if key == self.live:
            return
        record = on_cancel(self.ledger, key)
        assert (record is None) == (key in self.model)
        if record is not None:
            self._write(record)
            self.model[key] = ("VOID", 0)

    @rule()
    def clear(self) -> None:
        self._write(LedgerRecord(kind="CLEAR", holder="operator", reason="looked at it"))
        self.latched = False

    @rule()
    def crash(self) -> None:
        """What is in memory is gone; the new process settles what was firing."""
        self.journal.close()
        self._open()
        for record in list(on_boot(self.ledger, {})):
            self._write(record)
        if self.live is not None:
            self.model[self.live] = ("INDET", self.model[self.live][1])
            self.live = None

    @invariant()
    def agrees(self) -> None:
        held = {
            key: (entry.state, (entry.charge.electrons or 0) if entry.charge else 0)
            for key, entry in self.ledger.entries.items()
        }
        assert held == self.model
        assert self.ledger.charged.electrons == sum(charge for _, charge in self.model.values())
        assert list(self.ledger.fired) == self.shots
        assert len(set(self.shots)) == len(self.shots)
        assert bool(self.ledger.latched) == self.latched


TestLedgerStates = LedgerStates.TestCase
TestLedgerStates.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
