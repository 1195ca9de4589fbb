"""Nion usim in its own process, driven only over ZMQ: the right place, sign and spectrum, and never a scan too many."""

from __future__ import annotations

import importlib.util
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aecontrol.dose import bound_charge
from aecontrol.errors import InstrumentFault
from aecontrol.exposure import LedgerRecord, Outcome
from aecontrol.folding import fold
from aecontrol.journal import read_journal
from aecontrol.protocols import FrameData
from aecontrol.session import quality_flags, read_events
from aecontrol.types import ScanRegion
from drivers.contract import a_key
from drivers.remote import RemoteMicroscope

from .running_bridge import Running, end, start, until

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nion") is None or importlib.util.find_spec("nion.usim_device") is None,
    reason="Nion Swift (extra 'nion', GPL-3) is not installed: usim over the bridge is NOT tested",
)

CONFIG = """
[bridge]
address = "tcp://127.0.0.1:*"
folder = "specimen"

[backend]
kind = "nion"

[column]
idle_exit_s = 60.0

[limits]
max_electrons_per_shot = 10_000_000_000
max_shift_nm = 1.0
{limits}
"""


def bridge_in(folder: Path, limits: str = "") -> Running:
    path = folder / "bridge.toml"
    path.write_text(CONFIG.format(limits=limits))
    return start(path)


class Over:
    """usim over the wire, as the checks of the backend itself want it: something that fires."""

    def __init__(self, bridge: Running, name: str) -> None:
        self.bridge = bridge
        self.microscope: RemoteMicroscope = bridge.driver().build(bridge.folder / name, bridge.folder, 0)
        self._numbers = itertools.count()
        self.name = name

    def expose(self, name: str, region: ScanRegion) -> Outcome:
        bound = bound_charge(region, self.microscope.capabilities())
        return self.microscope.expose(a_key(f"{self.name} {name}"), region, bound)

    def frame(self, name: str) -> FrameData:
        return self.microscope.fetch(a_key(f"{self.name} {name}"))

    def fire(self, ordinal: int, region: ScanRegion) -> FrameData:
        """Expose under a key of its own, fetch and acknowledge; it must succeed."""
        name = str(next(self._numbers))
        outcome = self.expose(name, region)
        assert outcome.state == "POST", outcome.reason
        frame = self.frame(name)
        self.microscope.acknowledge(outcome.key)
        return frame


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("nion")
    running = bridge_in(folder)
    yield running
    end(folder, running.process)


@pytest.fixture
def usim(bridge: Running, request: pytest.FixtureRequest) -> Iterator[Over]:
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)[:40]
    over = Over(bridge, name)
    yield over
    over.microscope.close()


def nion_checks():
    """The checks of the backend, and its regions; imported late, for that module needs Nion Swift."""
    from . import test_nion

    return test_nion


REGIONS = {
    "off centre": ((52, 40), (20, 20), (64, 64), 0.0),
    "anisotropic": ((52, 40), (30, 12), (48, 24), 0.0),
    "turned": ((52, 40), (24, 24), (64, 64), 0.6),
    "long, turned back": ((52, 40), (14, 28), (96, 48), -0.4),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_is_scanned_where_it_lies(usim: Over, name: str) -> None:
    """r > 0.7 with the overview there, and less with x and y exchanged or the turn reversed."""
    check = nion_checks()
    check.check_registration(usim, check.a_region(*REGIONS[name]))


def test_spectra_at_points_agree_with_the_overview(usim: Over) -> None:
    nion_checks().check_points(usim, points=30, agreeing=28)


def test_a_spectrum_image_is_made_of_spectra_at_points(usim: Over) -> None:
    check = nion_checks()
    region = check.a_region((52, 40), (20, 12), (3, 5), 0.5)
    check.check_spectrum_image(usim, region)
    spectra = region.model_copy(update={"signal": "spectra", "dwell_time_s": 1e-3})
    frame = usim.fire(0, spectra)
    axis = usim.microscope.capabilities().spectra
    assert {name: array.shape for name, array in frame.channels.items()} == {axis.channel: (3, 5, axis.size)}
    assert quality_flags(frame, spectra) == ()
    assert frame.electrons_per_pixel == pytest.approx(1e-3 * 200e-12 / 1.602176634e-19, rel=0.01)


def test_the_stage_brings_the_specimen_and_the_shift_says_so(usim: Over) -> None:
    """After a move to s the point p is met at p - s: a region at p with shift -s shows what it showed before."""
    check = nion_checks()
    region = check.a_region((60, 45), (40, 40), (160, 160))
    before = np.asarray(usim.fire(0, region).channels["HAADF"], float)
    to = (12.0, -7.0)
    usim.microscope.move_stage(to)
    assert usim.microscope.state().stage_nm == to
    there = region.model_copy(update={"shift_nm": (-to[0], -to[1])})
    assert check.r(before, np.asarray(usim.fire(0, there).channels["HAADF"], float)) > 0.9
    for shift in ((0.0, 0.0), to):
        refused = usim.expose(f"shift {shift}", region.model_copy(update={"shift_nm": shift}))
        assert refused.state == "VOID"
        assert "nm of drift; the instrument's limit is 1" in refused.reason
    with pytest.raises(InstrumentFault, match="the limit is 200 nm"):
        usim.microscope.move_stage((0.0, 250.0))
    usim.microscope.move_stage((0.0, 0.0))
    assert check.r(before, np.asarray(usim.fire(0, region).channels["HAADF"], float)) > 0.9


def test_exposures_may_follow_a_move_at_once(usim: Over) -> None:
    check = nion_checks()
    region = check.a_region((50, 50), (10, 10), (16, 16))
    for number in range(6):
        to = (5.0 * (number % 2), 3.0)
        usim.microscope.move_stage(to)
        usim.fire(0, region.model_copy(update={"shift_nm": (-to[0], -to[1])}))
        usim.microscope.park((10.0 + number, 20.0))
        usim.fire(0, region.model_copy(update={"shift_nm": (-to[0], -to[1])}))
    usim.microscope.move_stage((0.0, 0.0))


def in_a_thread(over: Over, name: str, region: ScanRegion):  # type: ignore[no-untyped-def]
    """Expose in a controller of its own, in a thread; returns what waits for the outcome and its frame."""
    found: list[object] = []

    def work() -> None:
        try:
            other = Over(over.bridge, name)
            try:
                found.append((other.expose(name, region), other.frame(name)))
            finally:
                other.microscope.close()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()

    def result():  # type: ignore[no-untyped-def]
        thread.join(30.0)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    return result


@pytest.mark.parametrize("signal_", ["images", "spectra"])
def test_abort_gives_a_partial_frame_and_busy_is_refused(usim: Over, signal_: str) -> None:
    """Anybody may blank: what was delivered is charged, the rest is NaN. Meanwhile a second exposure fires nothing."""
    check = nion_checks()
    shape, dwell = ((100, 100), 5e-4) if signal_ == "images" else ((8, 8), 0.1)
    region = check.a_region((50, 50), (40, 40), shape, dwell=dwell).model_copy(update={"signal": signal_})
    result = in_a_thread(usim, f"long {signal_}", region)
    until(lambda: usim.microscope.state().beam_on)
    second = check.a_region((50, 50), (5, 5), (8, 8))
    for refused in (lambda: usim.expose("second", second), lambda: usim.microscope.move_stage((1.0, 0.0))):
        with pytest.raises(InstrumentFault, match="LEASE_HELD"):
            refused()
    assert usim.microscope.cancel(a_key(f"{usim.name} second")).state == "VOID"
    time.sleep(1.0)
    usim.microscope.blank()
    asked = time.monotonic()
    until(lambda: not usim.microscope.state().beam_on)
    took = time.monotonic() - asked
    outcome, frame = result()
    bound = bound_charge(region, usim.microscope.capabilities())
    assert took < 0.3
    assert outcome.state == "POST"
    assert 0 < outcome.measured.electrons < 0.8 * bound.electrons
    assert frame.flags == ("partial",)
    assert set(quality_flags(frame, region)) == {"partial", "nan"}
    for array in frame.channels.values():
        whole = np.isfinite(array).reshape(region.pixels, -1).all(axis=1)
        assert array.shape[:2] == region.shape
        assert 0 < whole.sum() <= outcome.measured.pixels
    assert usim.expose("second", second).state == "VOID"


def fired(bridge: Running) -> int:
    """Scans that the bridge's ledger has ever charged."""
    bodies = read_journal(bridge.folder / "specimen" / "ledger.sqlite")
    return sum(LedgerRecord.model_validate_json(body).kind == "FIRING" for body in bodies)


def test_a_retried_key_gives_no_second_scan(usim: Over) -> None:
    """The same key, ten times and from another process's driver: one outcome, one frame, one scan."""
    region = nion_checks().a_region((50, 50), (20, 20), (32, 32), dwell=1e-5)
    first, frame, before = usim.expose("once", region), usim.frame("once"), fired(usim.bridge)
    assert all(usim.expose("once", region) == first for _ in range(10))
    usim.microscope.close()
    usim.microscope = Over(usim.bridge, usim.name).microscope
    assert usim.expose("once", region) == first
    again = usim.frame("once")
    assert np.array_equal(frame.channels["HAADF"], again.channels["HAADF"])
    assert again.started_s == frame.started_s
    assert fired(usim.bridge) == before


VICTIM = """
import sys
from pathlib import Path
from aecontrol.dose import bound_charge
from aecontrol.types import ScanRegion
from drivers.contract import a_key
from drivers.zmq import ZmqDriver
address, folder = sys.argv[1], Path(sys.argv[2])
microscope = ZmqDriver(address=address).build(folder, folder, 0)
region = ScanRegion(center_nm=(50, 50), fov_nm=(40, 40), shape=(100, 100), dwell_time_s=5e-4)
microscope.expose(a_key("victim"), region, bound_charge(region, microscope.capabilities()))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_dead_controller_leaves_no_beam(tmp_path: Path, how: signal.Signals) -> None:
    """Killed or stopped in the middle of a scan: blanked within 2 H. Another process settles its key."""
    running = bridge_in(tmp_path)
    watcher = running.driver("observer").build(tmp_path / "watcher", tmp_path, 0)
    command = [sys.executable, "-c", VICTIM, running.address, str(tmp_path / "victim")]
    process = subprocess.Popen(command)
    try:
        until(lambda: watcher.state().beam_on, 30.0)
        time.sleep(0.3)
        process.send_signal(how)
        began = time.monotonic()
        until(lambda: not watcher.state().beam_on)
        took = time.monotonic() - began
        process.kill()
        process.wait()
        heir = running.driver().build(tmp_path / "victim", tmp_path, 0)
        outcome = heir.cancel(a_key("victim"))
        flags = heir.fetch(a_key("victim")).flags
        heir.close()
    finally:
        process.kill()
        process.wait()
        watcher.close()
        end(tmp_path, running.process)
    assert took < 0.3  # 2 H, and how often the state is asked
    assert outcome.state == "POST"
    assert 0 < outcome.measured.seconds < 1.5
    assert flags == ("partial",)


def test_what_is_over_budget_or_out_of_limits_is_refused_by_name(tmp_path: Path) -> None:
    limits = "max_seconds_per_shot = 1.0\n[limits.budget]\nelectrons = 200_000_000\npeak_fluence_e_per_A2 = 50_000.0\n"
    running = bridge_in(tmp_path, limits)
    try:
        usim = Over(running, "one")
        check = nion_checks()
        middle = {"center": (50, 50), "fov": (20, 20), "shape": (64, 64)}
        wrong = {
            "outside the field": check.a_region((95, 50), (20, 20), (64, 64)),
            "dwell time 2 s is outside": check.a_region(**middle, dwell=2.0),
            "s in one exposure; the instrument's limit is 1": check.a_region(**middle, dwell=1e-3),
            "electrons; the budget is 2e+08": check.a_region(**middle, dwell=1e-4),
            "e/A^2 in one 1 nm tile; the budget is 50000": check.a_region((50, 50), (1, 1), (64, 64), dwell=1e-5),
        }
        for reason, region in wrong.items():
            outcome = usim.expose(reason, region)
            assert (outcome.state, reason in outcome.reason) == ("VOID", True), outcome.reason
        assert usim.expose("good", check.a_region(**middle)).state == "POST"
        usim.microscope.close()
    finally:
        end(tmp_path, running.process)


CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_shipped_session_runs_and_is_verified(tmp_path: Path) -> None:
    """Both shipped configurations, by their documented commands, with a smaller budget: windows with edges first."""
    bridge, session = ((CONFIGS / f"{name}.toml").read_text() for name in ("bridge_nion", "nion_usim"))
    (tmp_path / "bridge.toml").write_text(
        bridge.replace("../runs/nion_specimen", "specimen").replace("127.0.0.1:5556", "127.0.0.1:*")
    )
    running = start(tmp_path / "bridge.toml")
    try:
        session = session.replace("tcp://127.0.0.1:5556", running.address)
        (tmp_path / "session.toml").write_text(session.replace("2_000_000_000", "800_000_000"))
        run = [sys.executable, "-m", "aecontrol.cli"]
        out = str(tmp_path / "out")
        for command in (["run", "--json", str(tmp_path / "session.toml"), "--out", out], ["verify", out]):
            done = subprocess.run([*run, *command], capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, done.stderr[-2000:]
    finally:
        end(tmp_path, running.process)
    state = fold(read_events(tmp_path / "out"))
    values = [scan.observation.value for scan in state.scans]
    assert state.stopped is not None
    assert state.stopped.cause == "budget"
    assert len(values) == 9
    assert sorted(values)[len(values) // 2] >= 5  # usim has no seed for its noise
    assert len(state.found()) > 80
    assert all(key.state == "POST" for key in state.keys.values())
