"""The server of :mod:`tests.drivers.wire_server`, running, for the tests of the wire."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
import zmq

from drivers.keys import new_keys

from .wire_client import ANSWER_S, GROWTH, ROOT, Wire, fastest


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    keys, spool = tmp_path_factory.mktemp("wire") / "keys", tmp_path_factory.mktemp("spool")
    new_keys(keys)
    command = [sys.executable, "-m", "tests.drivers.wire_server", str(keys), str(spool)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        try:
            assert server.stdout is not None
            addresses = json.loads(server.stdout.readline())
            yield Wire(**addresses, keys=keys, spool=spool, process=psutil.Process(server.pid), context=context)
            server.communicate(timeout=5)
            assert server.returncode == 0
        finally:
            server.kill()
            context.destroy(0)


@pytest.fixture
def steady(wire: Wire) -> Iterator[Wire]:
    """Whatever the test does, a good client's connection made before it still answers at once, a new one is let in, and
    the server's memory has not grown much."""
    before = wire.process.memory_info().rss
    with wire.dealer("operator") as good:
        wire.ask(good)
        yield wire
        assert fastest(lambda: wire.ask(good)) < ANSWER_S
        with wire.dealer("operator") as fresh:
            assert wire.ask(fresh) == b"operator operator ping"
    assert wire.process.memory_info().rss - before < GROWTH
