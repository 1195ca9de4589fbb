"""A bridge in processes of its own, for tests: started from a configuration, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drivers.beat_word import BeatWord
from drivers.keys import new_keys
from drivers.zmq import ZmqDriver

CONFIG = """
[bridge]
folder = "specimen"
address = "tcp://127.0.0.1:*"
{bridge}

[backend]
kind = "simulated"
beam_current_pA = 30.0
real_time = {real_time}
{backend}

[backend.specimen]
kind = "mos2"
size_nm = [{size}, {size}]

[column]
seed = 3
idle_exit_s = 60.0

{limits}
"""


@dataclass
class Running:
    """One running server and where it listens."""

    process: subprocess.Popen[str]
    address: str
    folder: Path

    def driver(self, role: str = "controller", **settings: object) -> ZmqDriver:
        """How a peer of this role reaches it."""
        keys = self.folder / "keys"
        if keys.is_dir():
            settings |= {"secret_key": keys / f"{role}.secret", "server_key": keys / "server.public"}
        return ZmqDriver(address=self.address, **settings)

    def pids(self) -> dict[str, int]:
        """Server, watchdog and column."""
        word = BeatWord(self.folder / "specimen")
        (column,) = serving(self.folder, b"drivers.column_host")
        found = {"server": self.process.pid, "watchdog": word.watchdog_pid, "column": column}
        word.close()
        return found


def write_bridge(
    folder: Path, keys: bool = True, real_time: bool = False, size: float = 6.0, limits: str = "", backend: str = ""
) -> Path:
    """A bridge's configuration in ``folder``, with keys."""
    if keys and not (folder / "keys").exists():
        new_keys(folder / "keys")
    path = folder / "bridge.toml"
    text = CONFIG.format(
        bridge='keys = "keys"' if keys else "",
        real_time=str(real_time).lower(),
        size=size,
        limits=limits,
        backend=backend,
    )
    path.write_text(text)
    return path


def start(config: Path) -> Running:
    """Start the server; its column and watchdog come with it."""
    with (config.parent / "bridge.log").open("ab") as log:
        command = [sys.executable, "-m", "drivers.bridge", str(config)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if " at tcp://" not in line:
        end(config.parent, process)
        raise AssertionError(f"the bridge did not start: {line!r} {(config.parent / 'bridge.log').read_text()[-3000:]}")
    return Running(process, line.rsplit(" at ", 1)[1].strip(), config.parent)


def end(folder: Path, process: subprocess.Popen[str] | None = None) -> None:
    """End everything that serves ``folder``, column included, for good."""
    if process is not None:
        kill(process.pid)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    for pid in serving(folder):
        kill(pid)


def serving(folder: Path, module: bytes = b"drivers.") -> list[int]:
    """Processes of the bridge in ``folder``."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if any(part.startswith(module) for part in command) and str(folder / "specimen").encode() in command:
                found.append(int(name))
    return found


def kill(pid: int) -> None:
    """SIGKILL, also to a stopped process."""
    for number in (signal.SIGCONT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.contextmanager
def running(folder: Path, **settings: object) -> Iterator[Running]:
    """A bridge in ``folder``; ended at the end."""
    bridge = start(write_bridge(folder, **settings))  # type: ignore[arg-type]
    try:
        yield bridge
    finally:
        end(folder, bridge.process)


def until(condition, timeout_s: float = 10.0):  # type: ignore[no-untyped-def]
    """Wait for something; what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)
    return found
