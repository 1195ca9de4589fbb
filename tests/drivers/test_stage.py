"""Stage and parked beam in the server's core: nothing is exposed while they move, nor where they were not sent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aecontrol.dose import bound_charge
from aecontrol.exposure import InterlockLimits, Ledger
from aecontrol.exposure import messages as m
from aecontrol.exposure.server import Append, Facts, Fire, MoveStage, ParkBeam, Peer, Send, Server
from aecontrol.types import Capabilities, ScanRegion
from drivers.contract import a_key

HERE = Capabilities(
    identity="a stage",
    simulated=True,
    unit="electrons",
    field_nm=(100.0, 100.0),
    channels=("HAADF",),
    beam_current_pA=100.0,
    stage_range_nm=200.0,
)
PEER = Peer(b"route", "somebody", "controller")


class Held:
    """A server whose lease somebody holds."""

    def __init__(self, **limits: float) -> None:
        self.core = Server(Ledger.empty(HERE), [], InterlockLimits(**limits), m.Timing(), "boot")
        self.core.facts = Facts(watchdog=True)
        self.core.boot({})
        self._id = 0
        self.ask(m.Acquire, session="s", seq=1, head=self.core.heads[1])

    def ask(self, kind, **fields):
        self._id += 1
        own = {"id": self._id, "epoch": 1, "tick": self._id, "boot_id": "boot", "deadline_ns": 10**9, "session": "s"}
        named = {name: value for name, value in own.items() if name in kind.model_fields}
        return self.core.on_request(PEER, kind(**{**named, **fields}), 0)

    def move(self, to_nm):
        """Move the stage; it arrives."""
        self.ask(m.Stage, to_nm=to_nm)
        self.core.facts = replace(self.core.facts, stage_nm=to_nm)
        self.core.on_moved("")

    def expose(self, name, shift_nm=(0.0, 0.0), center_nm=(50.0, 50.0)):
        """What became of it: the region that is fired, or the reason why not."""
        region = ScanRegion(center_nm=center_nm, fov_nm=(4.0, 4.0), shape=(8, 8), dwell_time_s=1e-6, shift_nm=shift_nm)
        effects = self.ask(m.Expose, key=a_key(name), region=region, bound=bound_charge(region, HERE))
        fired = [effect.region for effect in effects if isinstance(effect, Fire)]
        return fired[0] if fired else self.core.ledger.entries[a_key(name)].reason


LATER = {"epoch": 0, "tick": 0, "boot_id": "-", "deadline_ns": 0}


@pytest.mark.parametrize(
    ("order", "effect"),
    [
        (m.Stage(to_nm=(9.0, 0.0), **LATER), MoveStage((9.0, 0.0))),
        (m.Park(at_nm=(9.0, 0.0), **LATER), ParkBeam((9.0, 0.0))),
    ],
    ids=["stage", "parked beam"],
)
def test_nothing_is_exposed_and_nobody_answered_until_it_has_come_to_rest(order, effect):
    held = Held()
    began = held.ask(type(order), **order.model_dump(include={"to_nm", "at_nm"}))
    assert [e for e in began if not isinstance(e, Append)] == [effect]
    assert "BUSY" in held.expose("meanwhile")
    assert held.core.on_moved("") == [Send(b"route", m.Done(re=2))]
    if isinstance(order, m.Stage):
        assert "the stage is at (0.0, 0.0) nm, the ledger says (9.0, 0.0)" in held.expose("not yet there")
        held.core.facts = replace(held.core.facts, stage_nm=(9.0, 0.0))
    assert isinstance(held.expose("afterwards", (-9.0, 0.0)), ScanRegion)


def test_what_cannot_move_is_told_so():
    held = Held()
    held.ask(m.Stage, to_nm=(9.0, 0.0))
    (answer,) = held.core.on_moved("it sticks")
    assert (answer.reply.code, answer.reply.reason) == ("FAULT", "it sticks")
    assert "the ledger says (9.0, 0.0)" in held.expose("after that")
    (answer,) = held.ask(m.Stage, to_nm=(0.0, -201.0))
    assert answer.reply.reason == "201 nm from where the stage was; the limit is 200 nm"
    (answer,) = held.ask(m.Park, at_nm=(0.0, -1.0))
    assert "lies outside 0..100 x 0..100 nm" in answer.reply.reason


def test_a_specimen_point_is_charged_where_it_lies_wherever_the_stage_has_brought_it():
    """The stage at s: the specimen's point p is met at p - s, and the map of tiles grows to hold it."""
    held = Held(max_shift_nm=1.0)
    held.move((150.0, -20.0))
    fired = held.expose("seen", (-150.0, 20.0), (200.0, 30.0))
    assert fired.center_nm == (50.0, 50.0)
    tiles = held.core.ledger.tiles
    rows, cols = np.nonzero(tiles.fluence)
    centre = (cols.mean() + tiles.origin[0] + 0.5, rows.mean() + tiles.origin[1] + 0.5)
    assert centre == pytest.approx((200.0, 30.0))


def test_a_stage_move_that_is_left_out_of_the_shift_counts_as_drift():
    held = Held(max_shift_nm=1.0)
    held.move((30.0, 40.0))
    assert held.expose("forgotten") == "50 nm of drift; the instrument's limit is 1"
    assert "100 nm of drift" in held.expose("wrong sign", (30.0, 40.0), (20.0, 10.0))
    assert isinstance(held.expose("right", (-30.4, -40.4), (80.0, 90.0)), ScanRegion)
