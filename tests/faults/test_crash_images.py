"""A power cut at any write leaves every acknowledged record in the ledger, whatever the disk had not yet written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from aecontrol.errors import StorageFault
from aecontrol.journal import Journal

from .campaign import RAM
from .disk import Operation, Recorder, as_sqlite3, images


def record(folder: Path, synchronous: str) -> tuple[list[Operation], list[tuple[int, str]]]:
    """A journal's life under the recorder: small and large records, a close and a reopening, checkpoints; what was
    written, and after how many operations each record was acknowledged."""
    recorder = Recorder(f"recorder-{synchronous}")
    rng = random.Random(4)
    acknowledged = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aecontrol.journal.sqlite3", as_sqlite3(f"recorder-{synchronous}", synchronous))
        journal = Journal(folder / "ledger.sqlite")
        for n in range(150):
            body = f"{n} " + "x" * (rng.randrange(16_000) if n % 3 == 0 else rng.randrange(300))
            journal.append(body)
            acknowledged.append((len(recorder.log), body))
            if n in (20, 60):
                journal.close()
                journal = Journal(folder / "ledger.sqlite")
        journal.close()
    recorder.unregister()
    return recorder.log, acknowledged


def crash_points(log: list[Operation], count: int, rng: random.Random) -> list[int]:
    """Half of them anywhere, half near a write to the database itself: there a checkpoint is under way."""
    near = [n for n, operation in enumerate(log) if operation.name == "ledger.sqlite"]
    close = [min(len(log), max(0, rng.choice(near) + rng.randint(-3, 3))) for _ in range(count // 2)]
    return sorted(close + [rng.randint(0, len(log)) for _ in range(count - len(close))])


def lost(tmp_path: Path, synchronous: str, count: int) -> int:
    """In how many of ``count`` images an acknowledged record is missing, or the chain does not verify."""
    folder = tmp_path / synchronous
    folder.mkdir()
    log, acknowledged = record(folder, synchronous)
    assert sum(operation.name == "ledger.sqlite" and operation.kind == "write" for operation in log) > 100
    rng = random.Random(11)
    failures = 0
    for n, (crash, image) in enumerate(images(log, crash_points(log, count, rng), rng)):
        rebuilt = tmp_path / f"{synchronous}-{n}"
        rebuilt.mkdir()
        for name, content in image.items():
            (rebuilt / name).write_bytes(content)
        promised = [body for at, body in acknowledged if at <= crash]
        try:
            journal = Journal(rebuilt / "ledger.sqlite")
            failures += journal.bodies[: len(promised)] != promised
            journal.close()
        except StorageFault:
            failures += 1
        shutil.rmtree(rebuilt)
    return failures


@pytest.fixture
def ram(tmp_path):
    """A folder in memory where there is one: thousands of rebuilt disks would wear out a real one."""
    if RAM is None:
        yield tmp_path
        return
    folder = RAM / tmp_path.name
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_no_acknowledged_record_is_lost(ram):
    """2 000 crash images of the journal's own statements: 0 with a record lost."""
    assert lost(ram, "FULL", 2000) == 0


@pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
def test_the_images_notice_a_journal_that_does_not_sync(ram, synchronous):
    assert lost(ram, synchronous, 100) > 10


@pytest.mark.slow
def test_no_acknowledged_record_is_lost_in_many_images(ram):
    """50 000 images; prints how many lost a record."""
    failures = lost(ram, "FULL", 50_000)
    print(f"50 000 crash images, {failures} with a record lost")
    assert failures == 0
