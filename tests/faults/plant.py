"""Controller, server, watchdog and column in processes of their own; what dies is started again, as by a supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from drivers.beat_word import BeatWord
from drivers.keys import new_keys
from tests.drivers.running_bridge import end, kill

from .controller_process import PAUSED
from .metered import install

Victim = Literal["controller", "server", "watchdog"]
BRIDGE = """
[bridge]
folder = "specimen"
address = "tcp://127.0.0.1:{port}"
keys = "keys"

[backend]
kind = "metered"

[column]
idle_exit_s = 60.0
"""
SESSION = """
[session]
name = "killed"
match_nm = 0.1

[driver]
kind = "zmq"
address = "tcp://127.0.0.1:{link}"
secret_key = "keys/controller.secret"
server_key = "keys/server.public"
patience_s = 20.0

[scan]
fov_nm = [1.0, 1.0]
shape = [16, 16]
dwell_time_s = {dwell_s}

[perceiver]
kind = "mean"

[policy]
kind = "random"

[budget]
electrons = 1_000_000_000_000

[stop]
max_steps = {steps}
"""
MAX_STARTS = 200
"""A part that ends more often, killed or not, is broken."""


class Plant:
    """One specimen, one session of ``steps`` exposures of ``pulse_s`` each, and the processes that serve them."""

    def __init__(self, folder: Path, steps: int, pulse_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.session, self.specimen = folder, folder / "session", folder / "specimen"
        self.port = free_port()
        new_keys(folder / "keys")
        install(folder / "parts")
        (folder / "bridge.toml").write_text(BRIDGE.format(port=self.port))
        self._steps, self._pulse_s = steps, pulse_s
        self.connect(self.port)
        self.specimen.mkdir(mode=0o700)
        self.word = BeatWord(self.specimen)
        self.starts = {"controller": 0, "server": 0}
        self.gave_up = 0
        """How often the controller ended with an error, instead of waiting until what had died was back."""
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {"PYTHONPATH": str(folder / "parts"), "OMP_NUM_THREADS": "1"}
        self.done = False

    def connect(self, link: int) -> None:
        """Let the controller connect to this port; before it is first started."""
        text = SESSION.format(link=link, steps=self._steps, dwell_s=self._pulse_s / 256)
        (self.folder / "session.toml").write_text(text)

    def tend(self) -> None:
        """Start again what has ended, until the session has stopped."""
        server, controller = self._running.get("server"), self._running.get("controller")
        if server is None or server.poll() is not None:
            self._start("server", "drivers.bridge", self.folder / "bridge.toml")
        if controller is not None and controller.poll() == 0:
            self.done = True
        elif controller is None or controller.poll() is not None:
            self.gave_up += controller is not None and controller.returncode not in (PAUSED, -signal.SIGKILL)
            module = "tests.faults.controller_process"
            self._start("controller", module, self.folder / "session.toml", self.session)

    def until(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Tend until ``condition`` holds; False when it did not in time, or the session has stopped."""
        until_s = time.monotonic() + timeout_s
        while not condition():
            self.tend()
            if self.done or time.monotonic() > until_s:
                return False
            time.sleep(0.001)
        return True

    def pid(self, victim: Victim) -> int:
        """Process of a part; 0 when it does not run just now."""
        if victim == "watchdog":
            return int(self.word.watchdog_pid) if self.word.watched(0.1) else 0
        process = self._running.get(victim)
        return process.pid if process is not None and process.poll() is None else 0

    def log(self, name: str) -> str:
        """The last words of a part."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def end(self) -> None:
        """End everything, column included."""
        for process in self._running.values():
            kill(process.pid)
            process.wait()
        end(self.folder)
        self.word.remove()

    def _start(self, name: str, module: str, *arguments: Path) -> None:
        self.starts[name] += 1
        if self.starts[name] > MAX_STARTS:
            raise AssertionError(f"the {name} ends again and again: {self.log(name)}")
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", module, *map(str, arguments)]
            self._running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)


@contextlib.contextmanager
def plant(folder: Path, steps: int, pulse_s: float) -> Iterator[Plant]:
    """A plant; everything of it is ended at the end."""
    made = Plant(folder, steps, pulse_s)
    try:
        yield made
    finally:
        made.end()


def hit(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False when nobody is there any more."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
