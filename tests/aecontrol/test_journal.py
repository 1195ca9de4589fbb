"""The journal keeps everything that was acknowledged and refuses to be altered."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.errors import StorageFault
from aecontrol.journal import Journal, read_journal


@settings(max_examples=25, deadline=None)
@given(bodies=st.lists(st.text(max_size=40), max_size=12), cuts=st.sets(st.integers(0, 12)))
def test_what_was_appended_is_read_back_across_reopening(tmp_path_factory, bodies, cuts):
    path = tmp_path_factory.mktemp("journal") / "j.sqlite"
    journal = Journal(path)
    for number, body in enumerate(bodies):
        if number in cuts:
            journal.close()
            journal = Journal(path)
            assert journal.bodies == bodies[:number]
        journal.append(body)
        assert list(read_journal(path))[-1] == body  # another connection sees it at once
    journal.close()
    assert list(read_journal(path)) == bodies


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE journal SET body = 'less' WHERE seq = 2",
        "DELETE FROM journal WHERE seq = 2",
        "UPDATE journal SET seq = 9 WHERE seq = 3",
        "UPDATE journal SET body = 'less' WHERE seq = 3",
    ],
)
def test_a_changed_record_refuses_to_open(tmp_path, damage):
    path = tmp_path / "j.sqlite"
    journal = Journal(path)
    for body in ("one", "two", "three"):
        journal.append(body)
    journal.close()
    connection = sqlite3.connect(path)
    connection.execute(damage)
    connection.commit()
    connection.close()
    with pytest.raises(StorageFault, match="hash chain"):
        Journal(path)
    with pytest.raises(StorageFault, match="hash chain"):
        list(read_journal(path))


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough to be read as one" * 40])
def test_a_file_that_is_no_journal_is_refused(tmp_path, content):
    path = tmp_path / "j.sqlite"
    path.write_bytes(content)
    if content:
        with pytest.raises(StorageFault):
            Journal(path)
    with pytest.raises(StorageFault):
        list(read_journal(path))


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path):
    path = tmp_path / "j.sqlite"
    journal = Journal(path)
    journal.append("kept")
    journal._connection.execute("PRAGMA max_page_count = 3")
    with pytest.raises(StorageFault, match="free disk space"):
        journal.append("x" * 40000)
    journal.close()
    assert next(iter(read_journal(path))) == "kept"
