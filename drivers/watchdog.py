"""The process that blanks the beam when nobody else does: ``python -m drivers.watchdog CONFIG FOLDER``.

It looks at one shared word, 20 times per heartbeat, and trusts nothing else: when the word is armed and its stamp is
older than 1.5 heartbeats, or the server is gone, it blanks through its own path, again and again until the word is
well and the blanking was confirmed. It shares nothing with the server that could hang both: its own process and
session, no lock, no waiting.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import zmq

from aecontrol.durable import FolderLock
from aecontrol.errors import AecontrolError, BadInput, InstrumentFault

from .backend import Blanker
from .beat_word import BeatWord
from .bridge_file import read_bridge_file
from .column_link import ColumnLink, column_lives
from .column_messages import Blank, Blanked
from .first_in_line import run_first
from .log_aside import log_aside

log = logging.getLogger(__name__)
TRIP = 1.5
"""Age of the stamp, in heartbeats, from which an armed beam is blanked."""
POLL = 1 / 20
"""Time between two looks, in heartbeats."""
REPEAT = 1 / 2
"""Time between two attempts, in heartbeats."""
HELD_UP = 1 / 4
"""Time between two looks, in heartbeats, from which the machine is too busy to be relied on; it is logged."""
LOG_NS = 1_000_000_000
LOCK_S = 2.0


class BlankPath(Protocol):
    """A way to the blanker."""

    def begin(self) -> None:
        """Forget earlier confirmations."""

    def ask(self) -> None:
        """Have the beam blanked. Never raises, never waits for long."""

    def done_ns(self) -> int:
        """When a blanking asked for since :meth:`begin` was carried out; 0: not yet."""

    def exists(self) -> bool:
        """False when there is nothing left that could be blanked this way."""


class OwnPath:
    """The backend's second, independent path."""

    def __init__(self, blanker: Blanker) -> None:
        self._blanker, self._done_ns = blanker, 0

    def begin(self) -> None:
        """Forget earlier confirmations."""
        self._done_ns = 0

    def ask(self) -> None:
        """Blank; a call that raises was none."""
        try:
            self._blanker.blank()
            self._done_ns = time.monotonic_ns()
        except Exception as error:  # vendor software may raise anything
            log.error("blanking failed: %s", error)

    def done_ns(self) -> int:
        """When the call returned."""
        return self._done_ns

    def exists(self) -> bool:
        """Always: hardware outlives every process."""
        return True


class ColumnPath:
    """A second connection to the process that holds the instrument."""

    def __init__(self, link: ColumnLink, folder: Path) -> None:
        self._link, self._folder = link, folder
        self._first = 0
        self._done_ns = 0

    def begin(self) -> None:
        """Answers to earlier requests count no more."""
        self._first = self._done_ns = 0

    def ask(self) -> None:
        """Send BLANK."""
        try:
            number = self._link.send(Blank())
            self._first = self._first or number
        except InstrumentFault:
            log.debug("the column process takes no BLANK")

    def done_ns(self) -> int:
        """When the instrument was told to blank and then said that the beam is off."""
        while (reply := self._link.receive()) is not None:
            said = reply.message
            if self._first and said.id >= self._first and isinstance(said, Blanked) and not said.beam_on:
                self._done_ns = said.at_ns
        return self._done_ns

    def exists(self) -> bool:
        """False once the column process has ended."""
        return column_lives(self._folder)


class ServerProcess:
    """Whether the process that stamps the word is alive; one that was killed and not yet reaped is not."""

    def __init__(self) -> None:
        self._pid, self._descriptor = 0, -1
        self._poll = select.poll()

    def gone(self, pid: int) -> bool:
        """True when process ``pid`` has ended."""
        if pid != self._pid:
            self._follow(pid)
        return self._descriptor < 0 or bool(self._poll.poll(0))

    def _follow(self, pid: int) -> None:
        if self._descriptor >= 0:
            self._poll.unregister(self._descriptor)
            os.close(self._descriptor)
        self._pid, self._descriptor = pid, -1
        try:
            self._descriptor = os.pidfd_open(pid)
            self._poll.register(self._descriptor, select.POLLIN)
        except (OSError, ValueError):
            log.info("process %d has ended", pid)


class Watchdog:
    """One look after another at ``word``; blanks through ``path``. Begins by blanking."""

    def __init__(self, word: BeatWord, path: BlankPath, interval_s: float) -> None:
        self._word, self._path = word, path
        self._interval_ns = int(1e9 * interval_s)
        self._server = ServerProcess()
        self._late = self._gone = False
        self._blanking = True  # until it is confirmed, and for as long as the word is not well
        self._confirmed_ns = self._next_ns = 0
        self._log_ns = time.monotonic_ns() + LOG_NS
        self._watching = False  # the beam was blanked once: from now on the server may rely on this process

    def look(self, now_ns: int) -> bool:
        """Look once, at ``now_ns``; True when there is nothing left to watch: the server is gone and the beam blanked,
        or nothing is left that has a beam."""
        word = self._word
        gone = self._server.gone(word.server_pid)
        stale = now_ns - word.stamp_ns > TRIP * self._interval_ns
        late = bool(word.armed) and (stale or gone)
        if late and not self._late:
            word.trips = word.trips + 1
            self._begin("the server is gone with the beam armed" if gone else "the heartbeat is late")
        elif gone and not self._gone:
            self._begin("the server is gone")
        self._late, self._gone = late, gone
        if self._blanking:
            self._blank(now_ns)
            self._blanking = late or gone or not self._confirmed_ns
        if self._watching:
            word.poll_ns = now_ns
        return gone and self._nothing_left(now_ns)

    def _begin(self, why: str) -> None:
        log.warning("%s: blanking", why)
        self._blanking = True
        self._confirmed_ns = self._next_ns = 0
        self._log_ns = time.monotonic_ns() + LOG_NS
        self._path.begin()

    def _blank(self, now_ns: int) -> None:
        """Ask again and again: the call may be lost, or the server wake up and fire."""
        if now_ns >= self._next_ns:
            self._path.ask()
            self._next_ns = now_ns + int(REPEAT * self._interval_ns)
        done_ns = self._path.done_ns()
        if done_ns and not self._confirmed_ns:
            self._word.blanked_ns = done_ns
            self._watching = True
            log.info("blanked %.0f ms after the last stamp", 1e-6 * (done_ns - self._word.stamp_ns))
        self._confirmed_ns = done_ns
        if not done_ns and now_ns > self._log_ns:
            self._log_ns = now_ns + LOG_NS
            log.error("the blanking is not confirmed; trying again")

    def _nothing_left(self, now_ns: int) -> bool:
        """With the server gone: blanked when its last command to fire had run out, or nothing there to be blanked."""
        if self._confirmed_ns > self._word.stamp_ns + TRIP * self._interval_ns:
            return True
        return not self._confirmed_ns and now_ns > self._log_ns - LOG_NS // 2 and not self._path.exists()


def main(config: Path, folder: Path) -> int:
    """Watch until the server is gone and the beam blanked. Returns the exit code: 0 also when another process already
    watches this folder."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        lock = FolderLock(folder, "watchdog.lock", LOCK_S)
    except BadInput:
        log.info("another watchdog watches %s", folder)
        return 0
    settings = read_bridge_file(config)
    interval_s = settings.heartbeat.interval_s
    blanker = settings.backend.open_blanker(settings.base)
    run_first()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    path = ColumnPath(ColumnLink(context, folder), folder) if blanker is None else OwnPath(blanker)
    word = BeatWord(folder)
    word.poll_ns = 0  # not the last look of an earlier process
    word.watchdog_pid = os.getpid()
    watchdog = Watchdog(word, path, interval_s)
    gc.collect()
    gc.freeze()
    gc.disable()
    before_ns = time.monotonic_ns()
    while not watchdog.look(now_ns := time.monotonic_ns()):
        if now_ns - before_ns > HELD_UP * 1e9 * interval_s:
            log.warning("held up by the machine for %.0f ms", 1e-6 * (now_ns - before_ns))
        before_ns = now_ns
        time.sleep(POLL * interval_s)
    word.poll_ns = 0
    log.info("nothing left to watch")
    if blanker is not None:
        blanker.close()
    context.destroy(linger=0)
    lock.release()
    return 0


def start_watchdog(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start the watchdog of ``folder`` in a session of its own. The caller must have claimed the word before; it may
    fire once :meth:`BeatWord.watched` is true."""
    with open(folder / "watchdog.log", "ab") as log_file:
        return subprocess.Popen(
            [sys.executable, "-m", "drivers.watchdog", str(config), str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )


if __name__ == "__main__":
    listener = log_aside()
    try:
        sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
    except AecontrolError as error:
        sys.exit(f"{error}")
    finally:
        listener.stop()
