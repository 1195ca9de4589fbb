"""One run in process: what happens when parts misbehave, and that resume and verify tell the same story."""

from __future__ import annotations

import json

import numpy as np
import pytest

from aecontrol.errors import BadInput, InstrumentFault, StorageFault
from aecontrol.folding import fold
from aecontrol.protocols import FrameData
from aecontrol.session import Session, quality_flags, read_events
from aecontrol.types import Budget, ScanRegion
from aecontrol.verify import compare_ledgers
from drivers.faults import FaultyColumn, FaultyMicroscope

from .parts import CountingColumn, Driver, Reckless, configuration

BUDGET = Budget(electrons=10**6)
TAME = Reckless(3, recklessness=0.0)


def run(folder, config):
    session = Session.create(config, folder)
    try:
        return session.run()
    finally:
        session.close()


def resume(folder, config):
    session = Session.reopen(folder, config)
    try:
        return session.run()
    finally:
        session.close()


def test_every_candidate_is_visited_once_and_the_ledger_is_exact(tmp_path):
    column = CountingColumn()
    state = run(tmp_path / "s", configuration(TAME, column, BUDGET))
    assert state.stopped.cause == "rule"
    assert sorted(scan.candidate for scan in state.scans) == list(range(6))
    assert state.charged.electrons == column.meter
    assert list(compare_ledgers(tmp_path / "s", state)) == []
    assert fold(read_events(tmp_path / "s")).charged == state.charged


@pytest.mark.parametrize("rule", [{"max_steps": 2}, {}])
def test_it_stops_by_rule_or_budget(tmp_path, rule):
    budget = BUDGET if rule else Budget(electrons=140_000)
    state = run(tmp_path / "s", configuration(TAME, CountingColumn(), budget, **rule))
    assert (state.stopped.cause, state.step) == (("rule", 2) if rule else ("budget", 2))


@pytest.mark.parametrize("fault", ["nan", "saturated", "constant"])
def test_a_spoiled_frame_is_kept_marked_charged_and_never_read(tmp_path, fault):
    column = CountingColumn()
    state = run(tmp_path / "s", configuration(TAME, FaultyColumn(column, {2: fault}), BUDGET))
    bad = [frame for frame in state.frames.values() if fault in frame.flags]
    assert len(bad) == 1
    assert len(state.scans) == 5  # six candidates, one of them unreadable; MeanPerceiver asserts that it saw none
    assert all((tmp_path / "s" / ref.path).is_file() for ref in bad[0].channels.values())
    assert state.charged.electrons == column.meter


def test_three_spoiled_frames_in_a_row_pause_and_resume_goes_on(tmp_path):
    column = CountingColumn()
    config = configuration(TAME, FaultyColumn(column, {2: "nan", 3: "nan", 4: "nan"}), BUDGET)
    state = run(tmp_path / "s", config)
    assert state.phase == "paused"
    assert len(state.frames) == 5
    state = resume(tmp_path / "s", config)
    assert state.stopped.cause == "rule"
    assert len(state.scans) == 3


def test_a_pulse_that_breaks_off_is_charged_in_full_and_not_repeated(tmp_path):
    column = CountingColumn()
    state = run(tmp_path / "s", configuration(TAME, FaultyColumn(column, {1: "break"}), BUDGET))
    lost = [record for record in state.keys.values() if record.state == "INDET"]
    assert len(lost) == 1
    assert lost[0].charge == lost[0].bound
    assert column.meter <= state.charged.electrons
    assert len(column.shots) == 7  # overview and six candidates, none twice


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("verb", ["expose", "fetch", "cancel"])
def test_a_lost_message_never_fires_again(tmp_path, verb, when):
    column = CountingColumn()

    class Unreliable(Driver):
        faults = {(verb, 1 if verb != "cancel" else 0): when}

        def build(self, folder, base, seed):
            return FaultyMicroscope(super().build(folder, base, seed), self.faults)

    config = configuration(TAME, column, BUDGET)
    config = type(config)(config.tables, Unreliable(column), config.perceiver, config.policy, {}, config.base)
    if verb == "cancel":  # only asked for after a crash: lose an exposure first
        Unreliable.faults = {**Unreliable.faults, ("expose", 1): "after"}
    with pytest.raises(InstrumentFault, match="injected"):
        run(tmp_path / "s", config)
    for _ in range(2):
        try:
            state = resume(tmp_path / "s", config)
            break
        except InstrumentFault:
            Unreliable.faults = {}
    assert state.stopped.cause == "rule"
    assert len(column.shots) == 7
    assert state.charged.electrons == column.meter
    assert len(state.scans) == 6


def test_an_overrun_is_posted_in_full_and_stops_the_session(tmp_path):
    column = CountingColumn()
    fire = column.fire

    def too_much(ordinal, region):
        pulse = fire(ordinal, region)
        return type(pulse)(pulse.channels, pulse.electrons * 3, pulse.pixels, pulse.seconds)

    column.fire = too_much
    state = run(tmp_path / "s", configuration(TAME, column, BUDGET))
    assert state.stopped.cause == "safety"
    assert "DOSE_OVERRUN" in state.stopped.reason
    assert state.charged.electrons == 3 * column.meter
    assert len(column.shots) == 1


def test_one_folder_one_run(tmp_path):
    config = configuration(TAME, CountingColumn(), BUDGET)
    session = Session.create(config, tmp_path / "s")
    with pytest.raises(BadInput, match="in use by another run"):
        Session.create(config, tmp_path / "s")
    with pytest.raises(BadInput, match="in use by another run"):
        Session.reopen(tmp_path / "s", config)
    session.close()
    with pytest.raises(BadInput, match="already holds a session"):
        Session.create(config, tmp_path / "s")
    with pytest.raises(BadInput, match="holds no session"):
        Session.reopen(tmp_path / "other", config)


def test_a_disk_without_room_pauses_before_the_reservation(tmp_path, monkeypatch):
    column = CountingColumn()
    config = configuration(TAME, column, BUDGET)
    monkeypatch.setattr("aecontrol.session.shutil.disk_usage", lambda path: type("U", (), {"free": 1000})())
    with pytest.raises(StorageFault, match="nothing was exposed"):
        run(tmp_path / "s", config)
    assert column.meter == 0
    assert not fold(read_events(tmp_path / "s")).keys
    monkeypatch.undo()
    assert resume(tmp_path / "s", config).stopped.cause == "rule"


def test_a_full_spool_refuses_to_fire(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("drivers.spool.os.posix_fallocate", full)
    column = CountingColumn()
    state = run(tmp_path / "s", configuration(TAME, column, BUDGET))
    assert state.stopped.cause == "safety"
    assert (column.meter, state.charged.electrons) == (0, 0)


def test_a_ledger_of_another_instrument_is_refused(tmp_path):
    config = configuration(TAME, CountingColumn(), BUDGET, max_steps=1)
    run(tmp_path / "s", config)
    other = CountingColumn()
    from drivers.instrument import Instrument

    from .parts import CAPABILITIES

    stranger = CAPABILITIES.model_copy(update={"identity": "another"})
    with pytest.raises(InstrumentFault, match="belongs to"):
        Instrument(other, stranger, Driver(other).limits, tmp_path / "s" / "instrument")


def test_events_are_plain_json_without_pixels(tmp_path):
    run(tmp_path / "s", configuration(TAME, CountingColumn(), BUDGET))
    bodies = [event.model_dump_json() for event in read_events(tmp_path / "s")]
    assert max(map(len, bodies)) < 8000
    assert json.loads(bodies[0])["kind"] == "session_started"


def test_the_last_second_of_the_budget_can_be_spent(tmp_path):
    """A window that the mask allows is not refused once the decision has been charged."""
    budget = Budget(electrons=10**6, seconds=3.005)
    state = run(tmp_path / "s", configuration(TAME, CountingColumn(), budget))
    assert state.stopped.cause == "budget"
    assert len(state.scans) == 2  # three decisions of a second each, the overview among them; a fourth does not fit
    assert state.charged.seconds <= 3.005


def test_another_perception_model_cannot_go_on(tmp_path):
    config = configuration(TAME, FaultyColumn(CountingColumn(), {1: "nan", 2: "nan", 3: "nan"}), BUDGET)
    assert run(tmp_path / "s", config).phase == "paused"
    config.perceiver.version = "another"
    with pytest.raises(BadInput, match="perception is not the one"):
        resume(tmp_path / "s", config)


@pytest.mark.parametrize(
    ("signal", "shape", "flags"),
    [
        ("images", (4, 6), ()),
        ("images", (4, 6, 9), ("partial",)),
        ("spectra", (4, 6, 9), ()),
        ("spectra", (4, 6), ("partial",)),
        ("spectra", (3, 6, 9), ("partial",)),
    ],
)
def test_a_frame_of_another_shape_is_no_whole_frame(signal, shape, flags):
    region = ScanRegion(center_nm=(0, 0), fov_nm=(6, 4), shape=(4, 6), dwell_time_s=1e-6, signal=signal)
    array = np.arange(np.prod(shape), dtype=float).reshape(shape)
    assert quality_flags(FrameData({"one": array}, 0.0, None), region) == flags
    if not flags:
        array[-1] = np.nan
        assert quality_flags(FrameData({"one": array}, 0.0, None, ("partial",)), region) == ("partial", "nan")
