"""Files that survive a power cut: written beside, synced, renamed, and the folder synced."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput, StorageFault

TRY_AGAIN_S = 0.01


def sha256_hex(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durable(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that after a crash the file is absent or complete. Raises StorageFault (disk full,
    I/O error); a failed fsync is never retried, because the kernel may have dropped the pages."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageFault(f"cannot write {path}: {error}", "free disk space or mend the disk, then resume") from error


def npy_bytes(array: NDArray[np.generic]) -> bytes:
    """The array as a .npy file, C order, no pickle: the bytes whose sha256 travels end to end."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def load_npy(data: bytes, source: str) -> NDArray[np.generic]:
    """Read .npy bytes. Raises StorageFault when they are damaged."""
    try:
        array: NDArray[np.generic] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise StorageFault(f"{source} is not a readable .npy file: {error}") from error
    return array


class FolderLock:
    """An operating-system lock on a folder; released by the kernel however the process ends. Raises BadInput when
    another process still holds it after ``wait_s``. Locks of another ``name`` do not hinder each other."""

    def __init__(self, folder: Path, name: str = "lock", wait_s: float = 0.0) -> None:
        self._descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + wait_s
        while not self._taken():
            if time.monotonic() >= deadline:
                os.close(self._descriptor)
                raise BadInput(
                    f"{folder} is in use by another run", "wait for it to end, or give another folder with --out"
                )
            time.sleep(TRY_AGAIN_S)

    def release(self) -> None:
        """Let the next run in."""
        os.close(self._descriptor)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
