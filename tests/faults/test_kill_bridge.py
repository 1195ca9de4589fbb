"""Real processes are killed and stopped at any moment: nothing is fired twice, uncharged, or lost."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import replace

import pytest

from .accounts import complaints, read_accounts
from .blank import campaign as blanking
from .blank import table
from .kill import Tally, begun, campaign, column_says, session
from .metered import LOG, read_meter
from .plant import hit, plant


def test_killed_four_times_a_session_ends_and_all_accounts_agree(tmp_path):
    tally = Tally()
    assert session(tmp_path / "a", random.Random("1 1"), 4, tally, steps=8) == 4
    assert tally.gave_up == 0
    assert tally.keys["POST"] + tally.keys["INDET"] == 8


def test_the_accounts_complain_of_every_breach(tmp_path):
    """Each promise is broken by hand after a session without faults: its checker says so, and says nothing before."""
    with plant(tmp_path, 3, 0.02) as it:
        assert it.until(lambda: begun(it), 30.0)
        it.until(lambda: False, 30.0)
        fired, meter = column_says(it.specimen)

        def wrong(fired=fired, meter=meter):
            return " ".join(complaints(read_accounts(tmp_path, fired, meter)))

        accounts = read_accounts(tmp_path, fired, meter)
        assert wrong() == ""
        assert "server has charged" in wrong(meter=10 * meter)
        assert "in no ledger" in wrong(fired={0: fired[0], 1: fired[1]})
        assert "key was fired twice" in wrong(fired=fired | {3: fired[0]})
        key, entry = next(iter(accounts.server.entries.items()))
        left = {**accounts.server.entries, key: replace(entry, state="FIRING")}
        assert "still FIRING" in " ".join(complaints(replace(accounts, server=replace(accounts.server, entries=left))))

        log, text = tmp_path / LOG, (tmp_path / LOG).read_text()
        log.write_text(text + text.splitlines()[0] + "\n")
        assert "fired 2 times" in wrong()
        *head, last = text.splitlines()
        words = last.split()
        words[-1] = str(int(words[-1]) + 1)
        log.write_text("\n".join([*head, " ".join(words)]) + "\n")
        assert "were posted" in wrong()
        log.write_text(text)

        frames = tmp_path / "session" / "frames"
        kept = shutil.copytree(frames, tmp_path / "kept")
        next(frames.iterdir()).unlink()
        assert "the frame of" in wrong()
        shutil.copytree(kept, frames, dirs_exist_ok=True)
        assert wrong() == ""


def test_with_the_whole_stack_the_beam_is_off_two_heartbeats_after_the_last(tmp_path):
    trials = list(blanking(tmp_path, 6, seed=1))
    for trial in trials:
        assert trial.since_beat <= 2.0 + trial.overslept, trial
        assert trial.since_beat > trial.since_fault - 0.2, trial  # a stamp after the fault is at most under way


def test_a_watchdog_that_hung_while_its_server_was_replaced_watches_the_new_one(tmp_path):
    """It keeps the new server's own watchdog out; that must not blank the beam again and again."""
    with plant(tmp_path, 8, 1.0) as it:
        assert it.until(lambda: begun(it), 30.0)
        watchdog, server = it.pid("watchdog"), it.pid("server")
        hit(watchdog, signal.SIGSTOP)
        hit(server, signal.SIGKILL)
        it.until(lambda: "watchdog has ended" in it.log("server"), 10.0)
        hit(watchdog, signal.SIGCONT)
        before = len(read_meter(tmp_path))
        assert it.until(lambda: len(read_meter(tmp_path)) > before + 4, 20.0)
        assert it.pid("watchdog") == watchdog
        assert all(p.off_ns - p.on_ns == 1_000_000_000 for p in read_meter(tmp_path)[before + 1 : -1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills(tmp_path):
    campaign(tmp_path, 50, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_blanking_campaign(tmp_path):
    trials = list(blanking(tmp_path, 100, seed=2))
    print(*table(trials), sep="\n")
    assert max(trial.since_beat for trial in trials) <= 2.0
