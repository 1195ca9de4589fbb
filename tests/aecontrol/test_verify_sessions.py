"""A bridge's ledger holds every session on its specimen: each is compared with its own entries only."""

from __future__ import annotations

import pytest

from aecontrol.exposure import LedgerRecord
from aecontrol.journal import Journal
from aecontrol.state import State
from aecontrol.types import Charge
from aecontrol.verify import compare_ledgers

KEY = "a" * 64


@pytest.mark.parametrize(("controller", "alarms"), [("mine", 1), ("yours", 0)])
def test_only_an_exposure_of_this_controller_that_it_never_reserved_is_an_alarm(tmp_path, controller, alarms):
    folder = tmp_path / "instrument"
    folder.mkdir()
    (folder / "controller").write_text("mine")
    journal = Journal(folder / "ledger.sqlite")
    charge = Charge(electrons=1, pixels=1, seconds=1.0)
    for record in (
        LedgerRecord(kind="FIRING", key=KEY, session=controller, bound=charge),
        LedgerRecord(kind="POST", key=KEY, measured=charge),
    ):
        journal.append(record.model_dump_json(exclude_defaults=True))
    journal.close()
    assert len(list(compare_ledgers(tmp_path, State(session="s", seed=0, plan=None)))) == alarms
