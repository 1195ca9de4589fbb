"""A disk that remembers every write and sync of SQLite, and can be rebuilt as a power cut would have left it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import apsw

SECTOR = 512


@dataclass(frozen=True)
class Operation:
    """One call that reached the disk: ``at`` is an offset, or a file's new length."""

    kind: Literal["write", "sync", "truncate", "delete"]
    name: str
    at: int = 0
    data: bytes = b""


class Recorder(apsw.VFS):
    """A VFS that notes what passes through it; ``log`` is in order of time."""

    def __init__(self, name: str) -> None:
        self.log: list[Operation] = []
        super().__init__(name, "")

    def xOpen(self, name: Any, flags: list[int]) -> RecordedFile:
        return RecordedFile(self.log, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self.log.append(Operation("delete", Path(filename).name))


class RecordedFile(apsw.VFSFile):
    """One open file of the recorder."""

    def __init__(self, log: list[Operation], name: Any, flags: list[int]) -> None:
        self._log = log
        self._name = Path(name.filename() if isinstance(name, apsw.URIFilename) else name or "temporary").name
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._log.append(Operation("write", self._name, offset, bytes(data)))

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self._log.append(Operation("sync", self._name))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self._log.append(Operation("truncate", self._name, newsize))


def as_sqlite3(vfs: str, synchronous: str) -> SimpleNamespace:
    """What the journal takes for the module ``sqlite3``: the same statements, through the recorder."""

    class Connection(apsw.Connection):
        def execute(self, statement: str, *rest: Any) -> Any:
            return super().execute(statement.replace("synchronous=FULL", f"synchronous={synchronous}"), *rest)

    return SimpleNamespace(connect=lambda path, isolation_level: Connection(str(path), vfs=vfs), Error=apsw.Error)


@dataclass
class File:
    """What of a file is on the platter for certain, and what was handed over since the last sync."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)

    def apply(self, content: bytearray, operation: Operation, keep: Callable[[], bool]) -> None:
        """Carry ``operation`` out on ``content``; of a write, only the sectors that ``keep`` says."""
        if operation.kind == "truncate":
            if keep():
                del content[operation.at :]
            return
        start, end = operation.at, operation.at + len(operation.data)
        while start < end:
            stop = min((start // SECTOR + 1) * SECTOR, end)
            if keep():
                if len(content) < stop:
                    content.extend(bytes(stop - len(content)))
                content[start:stop] = operation.data[start - operation.at : stop - operation.at]
            start = stop

    def sync(self) -> None:
        """Everything handed over so far is on the platter."""
        for operation in self.pending:
            self.apply(self.synced, operation, lambda: True)
        self.pending.clear()


def _chance(rng: random.Random, share: float) -> bool:
    return rng.random() < share


def images(log: list[Operation], crashes: list[int], rng: random.Random) -> Iterator[tuple[int, dict[str, bytes]]]:
    """For each of ``crashes`` (indices into ``log``, rising) the files as a power cut just there would leave them: all
    that was synced, and any subset of the sectors that were not."""
    files: dict[str, File] = {}
    done = 0
    for crash in crashes:
        for operation in log[done:crash]:
            file = files.setdefault(operation.name, File())
            if operation.kind == "sync":
                file.sync()
            elif operation.kind == "delete":
                del files[operation.name]
            else:
                file.pending.append(operation)
        done = crash
        keep = partial(_chance, rng, rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)))
        image = {}
        for name, file in files.items():
            content = bytearray(file.synced)
            for operation in file.pending:
                file.apply(content, operation, keep)
            image[name] = bytes(content)
        yield crash, image
