"""kill -9 at any moment, then resume: nothing forgotten, nothing repeated, the same decisions on the same replies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aecontrol.exposure import LedgerRecord
from aecontrol.folding import fold
from aecontrol.journal import read_journal
from aecontrol.session import read_events

SHORT = Path(__file__).parents[2] / "configs" / "short.toml"


def start(*arguments):
    command = [sys.executable, "-m", "aecontrol.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """What a process printed that came to its end."""
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return json.loads(out)


def session_config(tmp_path):
    """The short session without comparison and with the quick embedding."""
    text = SHORT.read_text().split("[compare]")[0].replace('kind = "vae"', 'kind = "pca"')
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def firings(folder):
    bodies = read_journal(folder / "instrument" / "ledger.sqlite")
    records = [LedgerRecord.model_validate_json(body) for body in bodies]
    return [record.key for record in records if record.kind == "FIRING"]


def events_so_far(folder):
    try:
        return len(read_events(folder))
    except Exception:  # not yet begun, or being written to for the first time
        return 0


def campaign(tmp_path, kills, seed):
    """Kill a session ``kills`` times at random events, then let it end: its folder, and what it printed."""
    random = np.random.default_rng(seed)
    folder = tmp_path / f"killed-{seed}"
    process = start("run", session_config(tmp_path), "--out", folder, "--json")
    for _ in range(kills):
        target = events_so_far(folder) + int(random.integers(1, 9))
        deadline = time.monotonic() + 120
        while events_so_far(folder) < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(float(random.uniform(0, 0.15)))
        process.kill()  # SIGKILL; harmless when it has just ended by itself
        process.communicate()
        if not events_so_far(folder):
            process = start("run", session_config(tmp_path), "--out", folder, "--json")
        else:
            process = start("resume", folder, "--json")
    return folder, ended(process)


def check(aecontrol, folder, result, straight):
    """The three promises, against the uninterrupted session ``straight``."""
    state = fold(read_events(folder))
    assert state.stopped is not None
    keys = firings(folder)
    assert len(keys) == len(set(keys))
    fired = [record.step for record in state.keys.values() if record.state in ("POST", "INDET")]
    assert len(fired) == len(set(fired)), "an exposure was repeated"
    assert set(keys) == {key for key, record in state.keys.items() if record.state in ("POST", "INDET")}
    summary = json.loads((folder / "summary.json").read_bytes())
    assert summary["electrons_delivered"] <= state.charged.electrons <= state.plan.budget.electrons
    assert json.loads(aecontrol("resume", folder, "--json")[1]) == result  # a finished session prints its summary
    verified = json.loads(aecontrol("verify", folder, "--json")[1])
    assert verified["identical"] == verified["decisions"]
    lost = [record for record in state.keys.values() if record.state == "INDET"]
    assert len(verified["notes"]) == len(lost)
    if not lost:
        assert result["decisions"] == straight["decisions"]
    return len(lost)


def test_killed_three_times_it_ends_as_if_nothing_had_happened(aecontrol, tmp_path):
    straight = json.loads(aecontrol("run", session_config(tmp_path), "--out", tmp_path / "straight", "--json")[1])
    assert straight["stopped"]["kind"] == "budget"
    check(aecontrol, *campaign(tmp_path, 3, seed=1), straight)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_campaign(aecontrol, tmp_path):
    """50 kills: pytest -m slow tests/aecontrol/test_kill.py"""
    straight = json.loads(aecontrol("run", session_config(tmp_path), "--out", tmp_path / "straight", "--json")[1])
    lost = sum(check(aecontrol, *campaign(tmp_path, 5, seed), straight) for seed in range(2, 12))
    print(f"50 kills, 10 sessions: {lost} exposures interrupted and charged in full, 0 repeated")
