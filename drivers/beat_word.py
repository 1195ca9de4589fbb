"""The shared word: what server and watchdog tell each other without waiting for each other.

64-bit integers in memory that both processes map. It belongs to a folder, but lies in no file of a disk, where a store
may have to wait until the disk has written what was stored before. Each number is written by one side only, with one
aligned store, and read with one aligned load, so that nobody ever sees half of it and a process that stops in between
holds nobody up. Times are CLOCK_MONOTONIC, which all processes of one machine share, in ns.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from pathlib import Path

from aecontrol.errors import BadInput

MEMORY = Path("/dev/shm")
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
    """The word of ``folder``; made when it is not there, all 0. Raises BadInput when somebody else has made it."""

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
    """How often it had to blank; survives restarts of both, not of the machine."""
    blanked_ns = _Number(6)
    """When the last blanking that it asked for was carried out."""

    def __init__(self, folder: Path) -> None:
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
        self._path = MEMORY / f"aecontrol-{name}"
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise BadInput(f"{self._path} belongs to another user", "delete it, as that user")
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
        """Let go of the word; it stays for the others."""
        self.numbers.release()
        self._map.close()

    def remove(self) -> None:
        """Let go, and forget the word: for a bridge that is given up."""
        self.close()
        self._path.unlink(missing_ok=True)
