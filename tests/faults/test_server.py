"""Whatever well-formed nonsense anybody sends: the server answers, and fires only under a lease."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol import dose, exposure, machine
from aecontrol.exposure import InterlockLimits, Ledger, LedgerRecord, absorb
from aecontrol.exposure import messages as m
from aecontrol.exposure.server import Append, Facts, Fire, Peer, Send, Server
from aecontrol.types import Budget, Capabilities, Charge

from .requests import KINDS, any_request, samples

CAPABILITIES = Capabilities(
    identity="x",
    simulated=True,
    unit="electrons",
    field_nm=(20, 20),
    channels=("HAADF",),
    beam_current_pA=10.0,
    stage_range_nm=50.0,
)
LIMITS = InterlockLimits(budget=Budget(electrons=10**7, peak_fluence_e_per_A2=1e5), max_shots_per_minute=3)
PEERS = [Peer(b"1", "ann", "controller"), Peer(b"2", "bob", "operator"), Peer(b"3", "eve", "observer")]
ACQUIRE = m.Acquire(session="s", seq=0, head="0" * 64)
steps = st.lists(
    st.tuples(st.sampled_from((PEERS[0], *PEERS)), any_request(), st.integers(0, 10**8), st.integers(0, 9)),
    min_size=5,
    max_size=60,
)


def knowing(server, request, now):
    """What a peer who knows the server well would fill in."""
    lease = server.lease
    known = {"epoch": server.ledger.epoch, "tick": lease.tick + 1 if lease else 1, "boot_id": "boot"}
    known |= {"deadline_ns": now + 10**9, "seq": len(server.heads) - 1, "head": server.heads[-1], "session": "s"}
    return {name: value for name, value in known.items() if name in type(request).model_fields}


@settings(max_examples=300, deadline=None)
@given(steps, st.sampled_from((True, True, False)))
def test_any_requests_in_any_order(steps, watchdog):
    server = Server(Ledger.empty(CAPABILITIES, LIMITS), [], LIMITS, m.Timing(lease_s=5.0), "boot")
    server.facts = Facts(watchdog=watchdog)
    now, bodies, ids = 0, [], {}
    effects = server.boot({})
    steps = [(PEERS[0], ACQUIRE, 0, 1), *steps]
    for peer, request, wait_ns, chance in steps:
        now += wait_ns
        ids[peer.route] = ids.get(peer.route, 0) + 1
        lease = server.lease
        request = request.model_copy(
            update={"id": ids[peer.route]} | (knowing(server, request, now) if chance > 1 else {})
        )
        new = server.on_request(peer, request, now)
        for fire in (effect for effect in new if isinstance(effect, Fire)):
            assert watchdog
            assert (lease.user, lease.epoch) == (peer.user, request.epoch)
            assert request.deadline_ns >= now
            assert server.ledger.entries[fire.key].state == "FIRING"
        told = [effect.reply for effect in new if isinstance(effect, Send)]
        assert all(m.decode_reply(m.encode(reply)) == reply for reply in told)
        if peer.role == "observer":
            assert not any(isinstance(effect, Append | Fire) for effect in new)
        effects += new
        if server.live is not None and chance > 4:
            charge = Charge(electrons=chance, pixels=1, seconds=1e-6)
            effects += server.on_fired(server.live.key, charge, {"HAADF": "c" * 64}, now)
        if chance == 9:
            effects += server.on_moved("")
        effects += server.on_tick(now)
    bodies = [effect.body for effect in effects if isinstance(effect, Append)]
    ledger = Ledger.empty(CAPABILITIES, LIMITS)
    for body in bodies:
        ledger = absorb(ledger, LedgerRecord.model_validate_json(body))
    assert ledger.entries == server.ledger.entries
    assert ledger.charged.electrons <= LIMITS.budget.electrons
    again = Server(Ledger.empty(CAPABILITIES, LIMITS), bodies, LIMITS, m.Timing(), "boot2")
    assert again.heads == server.heads


def test_every_kind_of_request_survives_the_wire():
    assert [type(m.decode_request(sample)) for sample in samples()] == list(KINDS)


@pytest.mark.parametrize("change", [b'{"v":1,"v":1', b'{"v":2', b'{"v":1,"more":1', b'{"v":1,"id":"7"', b'{"v":1.5'])
def test_another_version_an_unknown_field_or_a_wrong_type_is_malformed(change):
    for sample in samples():
        broken = sample.replace(b'{"v":1', change, 1)
        if b'"id":"7"' in change:
            broken = broken.replace(b',"id":7', b"", 1)
        with pytest.raises(m.Malformed):
            m.decode_request(broken)


LIGHT = """
import sys
import drivers.bridge, drivers.watchdog, drivers.column_host, drivers.backends.template, drivers.backends.recorded
tops = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(" ".join(sorted(name for name in tops if not name.startswith("_"))))
"""


def test_the_bridge_needs_pyzmq_numpy_and_pydantic_and_nothing_else():
    """Microscope computers are old. (What else is listed comes with these three.)"""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=True)
    theirs = {"zmq", "numpy", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert set(done.stdout.split()) - theirs - {"cython_runtime", "sitecustomize"} == {"aecontrol", "drivers"}


def test_the_core_has_no_clock_no_randomness_no_socket_and_no_file():
    """What decides is told everything: the same code runs in production and in the worlds of faults."""
    allowed = {
        "__future__",
        "annotated_types",
        "collections",
        "contextlib",
        "dataclasses",
        "hashlib",
        "json",
        "math",
        "typing",
    }
    core = [*Path(exposure.__file__).parent.glob("*.py"), Path(dose.__file__), Path(machine.__file__)]
    for path in core:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            tops = {name.partition(".")[0] for name in names}
            assert tops <= allowed | {"aecontrol", "numpy", "pydantic", "functools"}, f"{path}: {tops}"
            assert not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ("open", "print"), path
