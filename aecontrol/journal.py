"""The durable memory: an append-only, hash-chained table of JSON records in SQLite.

One file has one writing connection (WAL, ``synchronous=FULL``, it alone checkpoints); readers open ``mode=ro``. Every
``append`` has reached the disk when it returns. A record whose hash does not fit the chain is never skipped or
dropped: in a dose ledger a dropped record is a forgotten exposure, so opening refuses.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from aecontrol.chain import GENESIS, chain_hash
from aecontrol.durable import sync_folder
from aecontrol.errors import StorageFault

_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (
    seq INTEGER PRIMARY KEY CHECK (seq > 0),
    prev TEXT NOT NULL CHECK (length(prev) = 64),
    sha256 TEXT NOT NULL UNIQUE CHECK (length(sha256) = 64),
    body TEXT NOT NULL
) STRICT
"""


def read_journal(path: Path) -> Iterator[str]:
    """The bodies of an existing journal, oldest first, chain verified; opens read-only.

    Raises StorageFault when the file is missing, damaged, or the chain breaks."""
    if not path.is_file():
        raise StorageFault(f"{path} does not exist", "give the folder of a session")
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            yield from _verified(connection, path)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StorageFault(f"{path} cannot be read: {error}", "restore it from a copy; nothing was changed") from error


def _verified(connection: sqlite3.Connection, path: Path) -> Iterator[str]:
    prev, expected = GENESIS, 1
    for seq, stored_prev, sha, body in connection.execute("SELECT seq, prev, sha256, body FROM journal ORDER BY seq"):
        if seq != expected or stored_prev != prev or chain_hash(prev, body) != sha:
            raise StorageFault(
                f"{path}: record {seq} does not fit the hash chain",
                "the file was changed or damaged; restore it from a copy. Nothing will be exposed from it",
            )
        yield body
        prev, expected = sha, seq + 1


class Journal:
    """The writing end of one journal file; see the module text."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(_SCHEMA)
            sync_folder(path.parent)
            self.bodies = list(_verified(self._connection, path))
            row = self._connection.execute("SELECT seq, sha256 FROM journal ORDER BY seq DESC LIMIT 1").fetchone()
        except sqlite3.Error as error:
            raise StorageFault(f"{path} cannot be opened: {error}", "restore it from a copy") from error
        self.seq: int = row[0] if row else 0
        self.head: str = row[1] if row else GENESIS

    def append(self, body: str) -> None:
        """Add one record; it is on the disk when this returns. Raises StorageFault (disk full, I/O error): the record
        must then be taken as not written, and nothing may be exposed."""
        self.extend((body,))

    def extend(self, bodies: Sequence[str]) -> None:
        """Add several records at once, all or none. Raises as :meth:`append`."""
        seq, head, rows = self.seq, self.head, []
        for body in bodies:
            seq, prev, head = seq + 1, head, chain_hash(head, body)
            rows.append((seq, prev, head, body))
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT INTO journal (seq, prev, sha256, body) VALUES (?, ?, ?, ?)", rows)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise StorageFault(
                f"cannot append to {self._path}: {error}", "free disk space or mend the disk, then resume"
            ) from error
        self.seq, self.head = seq, head

    def close(self) -> None:
        """Checkpoint and close."""
        self._connection.close()
