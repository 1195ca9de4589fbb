"""The shared word: what server and watchdog tell each other without waiting for each other.

A file of 64-bit integers, mapped into both processes. Each number is written by one side only, with one aligned store,
and read with one aligned load, so that nobody ever sees half of it and a process that stops in between holds nobody
up. Times are CLOCK_MONOTONIC, which all processes of one machine share, in ns.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

_BYTES = 64


class _Number:
    """One integer of the word."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __get__(self, word: BeatWord, kind: type[BeatWord]) -> int:
        return word.numbers[self._place]

    def __set__(self, word: BeatWord, value: int) -> None:
        word.numbers[self._place] = value


class BeatWord:
    """The word in ``folder``; made when it is not there, all 0."""

    # written by the server
    server_pid = _Number(0)
    """Process that stamps; 0: none yet."""
    stamp_ns = _Number(1)
    """When the last valid heartbeat of a controller came in."""
    armed = _Number(2)
    """1 while the beam can be on: from before a pulse is asked for until the beam was seen blanked."""
    # written by the watchdog
    watchdog_pid = _Number(3)
    """Process that watches."""
    poll_ns = _Number(4)
    """When the watchdog last looked; 0 until it has blanked the beam for the first time."""
    trips = _Number(5)
    """How often it had to blank, ever; survives restarts of both."""
    blanked_ns = _Number(6)
    """When the last blanking that it asked for was carried out."""

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder / "beats", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _BYTES)
            self._map = mmap.mmap(descriptor, _BYTES)
        finally:
            os.close(descriptor)
        self.numbers = memoryview(self._map).cast("q")

    def claim(self) -> None:
        """This process is the server from now on. Nothing is armed."""
        self.armed = 0
        self.stamp_ns = time.monotonic_ns()
        self.server_pid = os.getpid()

    def watched(self, interval_s: float) -> bool:
        """True when the watchdog has looked within half a heartbeat ``interval_s``: else nothing may be fired."""
        return time.monotonic_ns() - self.poll_ns < 0.5e9 * interval_s

    def close(self) -> None:
        """Let go of the word; the file stays."""
        self.numbers.release()
        self._map.close()
