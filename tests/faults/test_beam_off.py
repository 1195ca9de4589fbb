"""What the server may still say of a beam that was told to go off, and of electrons that nobody metered."""

from __future__ import annotations

import pytest

from aecontrol.dose import bound_charge
from aecontrol.exposure import InterlockLimits, Ledger, make_key
from aecontrol.exposure import messages as m
from aecontrol.exposure.server import Facts, Fire, Off, Peer, Send, Server, Stamp
from aecontrol.types import Capabilities, Charge, ScanRegion

CAPABILITIES = Capabilities(
    identity="x", simulated=True, unit="electrons", field_nm=(20, 20), channels=("HAADF",), beam_current_pA=10.0
)
REGION = ScanRegion(center_nm=(5, 5), fov_nm=(4, 4), shape=(8, 8), dwell_time_s=1e-3)
BOUND = bound_charge(REGION, CAPABILITIES)
KEY = make_key("s", 1, 0, REGION, BOUND)
ANN, EVE = Peer(b"1", "ann", "controller"), Peer(b"2", "eve", "observer")
MS = 1_000_000


def firing() -> Server:
    """A server whose pulse runs, since the time 0."""
    server = Server(Ledger.empty(CAPABILITIES), [], InterlockLimits(), m.Timing(), "boot")
    server.facts = Facts(watchdog=True)
    server.boot({})
    server.on_request(ANN, m.Acquire(id=1, session="s", seq=1, head=server.heads[-1]), 0)
    command = {"key": KEY, "session": "s", "region": REGION, "bound": BOUND, "boot_id": "boot", "deadline_ns": 10**9}
    effects = server.on_request(ANN, m.Expose(id=2, epoch=1, tick=2, **command), 0)
    assert any(isinstance(effect, Fire) for effect in effects)
    assert Stamp(0, True) in effects
    return server


@pytest.mark.parametrize("who", ["observer", "interlock"])
def test_a_pulse_that_was_told_to_end_is_stamped_no_more(who):
    """The word to end it may be lost in a column that hangs: the watchdog must then see the heartbeat grow old."""
    server = firing()
    assert Stamp(10 * MS, True) in server.on_request(ANN, m.Beat(id=3, epoch=1, tick=3), 10 * MS)
    if who == "observer":
        effects = server.on_request(EVE, m.Blank(id=1), 20 * MS)
    else:
        server.facts = Facts(watchdog=True, interlock="vacuum")
        effects = server.on_tick(20 * MS)
    assert any(isinstance(effect, Off) for effect in effects)
    for number in range(4, 9):
        effects = server.on_request(ANN, m.Beat(id=number, epoch=1, tick=number), 20 * MS + number)
        assert not any(isinstance(effect, Stamp) for effect in effects)
    measured = Charge(electrons=1, pixels=1, seconds=1e-3)
    assert Stamp(20 * MS + 8, False) in server.on_fired(KEY, measured, {}, 30 * MS)


def test_a_lease_that_changes_hands_disarms_no_running_pulse():
    server = firing()
    boss = Peer(b"3", "bob", "operator")
    request = m.Acquire(id=1, session="t", seq=1, head=server.heads[1], force=True)
    effects = server.on_request(boss, request, 20 * MS)
    assert any(isinstance(effect, Off) for effect in effects)
    assert not any(isinstance(effect, Stamp) for effect in effects)


def test_electrons_that_nobody_metered_are_charged_at_the_bound():
    server = firing()
    effects = server.on_fired(KEY, Charge(electrons=None, pixels=64, seconds=0.064), {"HAADF": "a" * 64}, 90 * MS)
    (outcome,) = [e.reply.outcome for e in effects if isinstance(e, Send) and isinstance(e.reply, m.Settled)]
    assert (outcome.state, outcome.digests) == ("INDET", {"HAADF": "a" * 64})
    assert server.ledger.charged.electrons == BOUND.electrons
