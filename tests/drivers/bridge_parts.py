"""Real processes for the tests of the bridge: every one is ended by the test that began it, however it goes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time

import zmq

from aecontrol.types import ScanRegion
from drivers.column_link import connect_or_start
from drivers.column_messages import Fire

CONFIG = """
[backend]
kind = "simulated"
beam_current_pA = 30.0
real_time = {real_time}

[backend.specimen]
kind = "mos2"
size_nm = [{size}, {size}]

[column]
seed = 3
idle_exit_s = {idle_exit_s}
"""
FOREVER_NS = 1 << 62


def write_config(folder, real_time=True, size=6.0, idle_exit_s=30.0):
    path = folder / "bridge.toml"
    path.write_text(CONFIG.format(real_time=str(real_time).lower(), size=size, idle_exit_s=idle_exit_s))
    return path


def key_of(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def a_region(seconds=1.0, shape=(64, 64), fov=3.0, center=3.0):
    dwell = seconds / (shape[0] * shape[1])
    return ScanRegion(center_nm=(center, center), fov_nm=(fov, fov), shape=shape, dwell_time_s=dwell)


def fire(number, region, not_after_ns=FOREVER_NS):
    return Fire(key=key_of(number), ordinal=number, region=region, not_after_ns=not_after_ns)


def outcome(link, timeout_s=20.0):
    """The next FIRED or BROKE (or whatever comes)."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        reply = link.receive()
        if reply is not None:
            return reply.message
        link.socket.poll(50)
    raise AssertionError("no answer in time")


def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def end(pid):
    """End a process of the test for good."""
    for number in (signal.SIGCONT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def column(folder, **settings):
    """A link to a column process in ``folder``, and what it said of itself; it is closed or killed at the end."""
    folder.chmod(0o700)
    context = zmq.Context()
    link, ready = connect_or_start(context, write_config(folder, **settings), folder, timeout_s=30.0)
    try:
        yield link, ready
    finally:
        end(ready.pid)
        link.close()
        context.destroy(linger=0)


SERVER = """
import sys, time
from pathlib import Path
from drivers.beat_word import BeatWord
word = BeatWord(Path(sys.argv[1]))
word.claim()
word.armed = int(sys.argv[2])
while True:
    word.stamp_ns = time.monotonic_ns()
    time.sleep(0.05)
"""


@contextlib.contextmanager
def server(folder, armed=True):
    """A process that claims the word, arms it and stamps every 50 ms, as a server does while beats come in."""
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(folder), str(int(armed))])
    try:
        yield process
    finally:
        end(process.pid)
        process.wait()
