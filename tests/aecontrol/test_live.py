"""The live view: what it says of each step, that it stays out of the way, and that no terminal is too odd for it."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from aecontrol.live import LiveView
from aecontrol.session import Session
from drivers.faults import FaultyColumn

from .lattice import lattice_session

HOSTILE = "best [/red] place \x1b[2J\r\nstep 99: forged"


def watch(folder, config, view):
    session = Session.create(config, folder)
    try:
        with view:
            state = session.run(view.observe)
            view.progress("comparison: serpentine")
    finally:
        session.close()
    return state


def test_plain_lines_name_region_value_finds_dose_damage_time_and_reason(tmp_path, capsys):
    config = lattice_session(column=lambda c: FaultyColumn(c, {2: "nan", 3: "break"}), note="a note")
    state = watch(tmp_path / "s", config, LiveView(tmp_path / "s", config, quiet=False))
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == len(state.frames)  # the overview included
    first = state.scans[0].observation
    x, y = first.region.center_nm
    line = steps[1]
    assert line.startswith(
        f"step 1: ({x:.1f}, {y:.1f}) nm, 3 x 3 nm | value {first.value:.3g}, finds {len(first.found)} "
    )
    assert re.search(
        r"[\d.e+]+ of 1\.6e\+07 electrons \(\d+\.\d %\), damage none yet, \d+\.\d s \| next to the best", line
    )
    assert line.endswith("; a note")
    assert any("value not read" in step and "nan" in step for step in steps)
    assert any("interrupted and is charged in full" in line for line in lines)
    assert lines[-2].startswith("stopped (budget)")
    assert lines[-1] == "comparison: serpentine"


def test_quiet_says_nothing(tmp_path, capsys):
    config = lattice_session(max_steps=2)
    watch(tmp_path / "s", config, LiveView(tmp_path / "s", config, quiet=True))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("width", "height"), [(130, 40), (60, 12), (7, 3), (1, 1)])
def test_the_display_survives_any_terminal_and_any_text(tmp_path, width, height):
    config = lattice_session(why=HOSTILE, note="[bold]", max_steps=3)
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    watch(tmp_path / "s", config, LiveView(tmp_path / "s", config, quiet=False, console=console))
    shown = console.file.getvalue()
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is given back
    assert "\x1b[2J" not in shown
    if width == 130:
        assert "[/red]" in shown
        for word in ("x, y nm", "finds", "dose", "damage", "why this place", "7.5, 4.5", "comparison: serpentine"):
            assert word in shown


def test_a_long_reason_does_not_squeeze_the_numbers(tmp_path):
    config = lattice_session(why="because " * 50, max_steps=1)
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=30, color_system=None)
    watch(tmp_path / "s", config, LiveView(tmp_path / "s", config, quiet=False, console=console))
    rows = [line for line in console.file.getvalue().splitlines() if line.endswith("...") and "7.5, 4.5" in line]
    assert re.match(r" +1 +7\.5, 4\.5 +3 x 3 +11 +11 \(all 11\) +21\.1 % +none yet +\d\.\d s +because", rows[-1])
    assert len(rows[-1]) <= 120


def test_the_terminal_is_restored_when_the_run_fails():
    config = lattice_session()
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with pytest.raises(OSError, match="unplugged"), LiveView("s", config, quiet=False, console=console):
        raise OSError("unplugged")
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_closed_pipe_does_not_end_the_session(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    config = lattice_session(max_steps=2)
    state = watch(tmp_path / "s", config, LiveView(tmp_path / "s", config, quiet=False))
    assert state.stopped.cause == "rule"


def test_plain_lines_fit_an_ascii_only_stream(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    config = lattice_session(why="5 ± 1", max_steps=1)
    watch(tmp_path / "s", config, LiveView(tmp_path / "s", config, quiet=False))
    stream.flush()
    assert b"5 ? 1" in stream.buffer.getvalue()
