"""The bridge in real processes, over real sockets: everything that a session does, by its own means."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aecontrol.dose import bound_charge
from aecontrol.errors import BadInput, InstrumentFault
from aecontrol.exposure import LedgerRecord
from aecontrol.journal import read_journal
from aecontrol.session import Session
from aecontrol.types import Budget, ScanRegion
from aecontrol.verify import compare_ledgers
from drivers.beat_word import BeatWord
from drivers.bridge import open_bridge
from drivers.contract import MicroscopeContract, a_key
from tests.aecontrol.parts import Reckless, configuration

from .running_bridge import end, kill, running, start, until, write_bridge


def a_region(seconds=1.0, shape=(64, 64), fov=3.0, center=3.0, **more):
    dwell = seconds / (shape[0] * shape[1])
    return ScanRegion(center_nm=(center, center), fov_nm=(fov, fov), shape=shape, dwell_time_s=dwell, **more)


def expose(microscope, name, region):
    return microscope.expose(a_key(name), region, bound_charge(region, microscope.capabilities()))


class Controller:
    """A controller in a thread of its own (a driver belongs to one thread); ``result`` waits for ``work`` and raises
    what it raised."""

    def __init__(self, bridge, folder, work):
        self._found = []
        self._thread = threading.Thread(target=self._run, args=(bridge.driver(), folder, work))
        self._thread.start()

    def _run(self, driver, folder, work):
        try:
            microscope = driver.build(folder / "controller", folder, 0)
            try:
                self._found.append(work(microscope))
            finally:
                microscope.close()
        except Exception as error:
            self._found.append(error)

    def result(self, timeout_s=40.0):
        self._thread.join(timeout_s)
        (found,) = self._found
        if isinstance(found, Exception):
            raise found
        return found


class TestOverTheBridge(MicroscopeContract):
    """The contract of every driver, with CURVE, a server, a watchdog and a column process in between."""

    @pytest.fixture(autouse=True)
    def _bridges(self):
        self.bridges = {}
        yield
        for folder, bridge in self.bridges.items():
            end(folder, bridge.process)

    def open(self, folder):
        if folder not in self.bridges:
            self.bridges[folder] = start(write_bridge(folder))
        return self.bridges[folder].driver().build(folder / "client", folder, 0)


def test_spectra_stage_and_parking_are_refused_where_the_instrument_has_none(tmp_path):
    with running(tmp_path) as bridge:
        microscope = bridge.driver().build(tmp_path / "client", tmp_path, 0)
        region = a_region(1e-3).model_copy(update={"signal": "spectra"})
        outcome = expose(microscope, "spectra", region)
        assert (outcome.state, "spectra" in outcome.reason) == ("VOID", True)
        with pytest.raises(InstrumentFault, match="limit is 0 nm"):
            microscope.move_stage((100.0, 0.0))
        assert microscope.noiseless(a_region(1e-3)) is not None
        assert microscope.noiseless(a_region(1e6, shape=(10**6, 10**6))) is None  # it would take all memory there is
        microscope.close()


def test_abort_ends_a_scan_within_a_tenth_of_a_second_and_a_ping_does_not_wait(tmp_path):
    region = a_region(3.0)

    def work(microscope):
        outcome = expose(microscope, "long", region)
        return outcome, microscope.fetch(a_key("long")).flags, bound_charge(region, microscope.capabilities())

    with running(tmp_path, real_time=True) as bridge:
        watcher = bridge.driver("observer").build(tmp_path / "watcher", tmp_path, 0)
        controller = Controller(bridge, tmp_path, work)
        until(lambda: watcher.state().beam_on)
        pings = []
        for _ in range(50):
            before = time.perf_counter()
            watcher.ping()
            pings.append(time.perf_counter() - before)
        before = time.monotonic()
        bridge.driver("observer").blank(tmp_path)
        until(lambda: not watcher.state().beam_on)
        took = time.monotonic() - before
        outcome, flags, bound = controller.result()
        watcher.close()
    assert np.median(pings) < 0.02
    assert took < 0.2
    assert outcome.state == "POST"
    assert 0 < outcome.measured.electrons < 0.9 * bound.electrons
    assert "partial" in flags


def test_limits_roles_and_leases(tmp_path):
    limits = "[limits]\nmax_electrons_per_shot = 200_000\n[limits.budget]\nelectrons = 300_000\n"
    with running(tmp_path, limits=limits) as bridge:
        one = bridge.driver().build(tmp_path / "one", tmp_path, 0)
        region = a_region(6e-4)
        assert expose(one, "a", region).state == "POST"
        big = expose(one, "b", a_region(5e-3))
        assert "200000" in big.reason.replace("_", "")
        assert expose(one, "c", region).state == "POST"
        spent = expose(one, "d", region)
        assert (spent.state, "budget is 300000" in spent.reason) == ("VOID", True)

        two = bridge.driver().build(tmp_path / "two", tmp_path, 0)
        with pytest.raises(InstrumentFault, match="LEASE_HELD"):
            expose(two, "e", region)
        looker = bridge.driver("observer").build(tmp_path / "looker", tmp_path, 0)
        with pytest.raises(InstrumentFault, match="FORBIDDEN"):
            expose(looker, "f", region)
        boss = bridge.driver("operator", force=True).build(tmp_path / "boss", tmp_path, 0)
        assert expose(boss, "g", region).state == "VOID"  # the budget is spent, the lease is his
        with pytest.raises(InstrumentFault, match="LEASE_HELD"):
            expose(one, "h", region)
        for microscope in (one, two, looker, boss):
            microscope.close()


def test_a_wrong_key_is_silence_and_says_so(tmp_path):
    with running(tmp_path) as bridge:
        stranger = bridge.driver().model_copy(update={"server_key": tmp_path / "keys" / "other.public"})
        (tmp_path / "keys" / "other.public").write_text("rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7")
        with pytest.raises(InstrumentFault, match="address or key"):
            stranger.build(tmp_path / "client", tmp_path, 0)


@pytest.mark.parametrize(
    ("address", "word"), [("192.0.2.1:*", "no keys"), ("0.0.0.0:*", "every interface"), ("localhost:*", "IP address")]
)
def test_an_address_that_must_not_be_served_is_refused_before_anything_starts(tmp_path, address, word):
    path = write_bridge(tmp_path, keys=False)
    path.write_text(path.read_text().replace("127.0.0.1:*", address))
    done = subprocess.run([sys.executable, "-m", "drivers.bridge", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert word in done.stderr
    assert not (tmp_path / "specimen" / "column.log").exists()


def sessions(folder, driver):
    """The reckless session of the other tests, on this driver."""
    config = configuration(Reckless(1), None, Budget(electrons=3_000_000, peak_fluence_e_per_A2=5e4))
    session = Session.create(replace(config, driver=driver, base=folder), folder / "session")
    state = session.run()
    session.close()
    return state


def test_a_session_over_the_bridge_is_the_session_in_process(tmp_path):
    """The same specimen, seed and policy: the same decisions, frames and charges; both ledgers agree."""
    from drivers.bridge_file import read_bridge_file
    from drivers.simulated import SimulatedDriver

    with running(tmp_path, size=20.0) as bridge:
        there = sessions(tmp_path, bridge.driver())
        assert list(compare_ledgers(tmp_path / "session", there)) == []
        backend = read_bridge_file(tmp_path / "bridge.toml").backend
    table = backend.model_dump(exclude={"kind", "real_time"}, exclude_defaults=True)
    config = configuration(Reckless(1), None, Budget(electrons=3_000_000, peak_fluence_e_per_A2=5e4))

    class Seeded:
        def build(self, folder, base, seed):
            return SimulatedDriver.model_validate(table).build(folder, base, 3)

    (tmp_path / "here").mkdir()
    session = Session.create(replace(config, driver=Seeded(), base=tmp_path), tmp_path / "here" / "session")
    here = session.run()
    session.close()
    assert [d.decision for d in there.decisions] == [d.decision for d in here.decisions]
    assert there.charged == here.charged
    assert [f.channels for f in there.frames.values()] == [f.channels for f in here.frames.values()]


@pytest.mark.parametrize("victim", ["server", "watchdog"])
def test_killed_in_the_middle_of_a_scan_nothing_is_forgotten(tmp_path, victim):
    """Server killed: the watchdog blanks, a new server charges the key in full. Watchdog killed: the server blanks."""
    region = a_region(4.0)

    def work(microscope):
        long = expose(microscope, "long", region)
        return long, expose(microscope, "after", a_region(0.01)), bound_charge(region, microscope.capabilities())

    with running(tmp_path, real_time=True) as bridge:
        watcher = bridge.driver("observer").build(tmp_path / "watcher", tmp_path, 0)
        controller = Controller(bridge, tmp_path, work)
        until(lambda: watcher.state().beam_on)
        kill(bridge.pids()[victim])
        if victim == "server":
            bridge.process.wait()
            bridge.process.stdout.close()
            time.sleep(0.3)  # the watchdog's business
            path = tmp_path / "bridge.toml"
            port = bridge.address.rsplit(":", 1)[1]
            path.write_text(path.read_text().replace("127.0.0.1:*", f"127.0.0.1:{port}"))
            bridge.process = start(path).process
        outcome, after, bound = controller.result()
        meter = watcher.state().electrons
        watcher.close()
    assert outcome.state == ("INDET" if victim == "server" else "POST")
    assert after.state == "POST"
    charged = bound.electrons if victim == "server" else outcome.measured.electrons
    assert 0 < meter <= charged + after.measured.electrons
    assert meter < 0.5 * bound.electrons


def test_a_column_that_dies_in_the_middle_of_a_scan_ends_the_server_and_leaves_nothing_open(tmp_path):
    """Nobody will ever tell what was delivered: it is charged in full, and no controller waits for ever."""
    with running(tmp_path, real_time=True) as bridge:
        watcher = bridge.driver("observer").build(tmp_path / "watcher", tmp_path, 0)
        driver = bridge.driver(patience_s=2.0)
        bridge.driver = lambda: driver
        controller = Controller(bridge, tmp_path, lambda microscope: expose(microscope, "long", a_region(20.0)))
        until(lambda: watcher.state().beam_on)
        watcher.close()
        kill(bridge.pids()["column"])
        assert bridge.process.wait(10.0) == InstrumentFault.exit_code
        with contextlib.suppress(InstrumentFault):
            assert controller.result().state == "INDET"
    last = LedgerRecord.model_validate_json(list(read_journal(tmp_path / "specimen" / "ledger.sqlite"))[-1])
    assert (last.kind, last.key) == ("INDET", a_key("long"))


@pytest.mark.parametrize(
    ("table", "word"),
    [("lease_s = 0.1", "2 heartbeats"), ("lease_s = 1e300", "60"), ("deadline_s = 1e-9", "0.05"), ("away_s = 0", "0")],
)
def test_a_clockwork_that_cannot_work_is_refused_before_anything_starts(tmp_path, table, word):
    path = write_bridge(tmp_path)
    path.write_text(path.read_text().replace('keys = "keys"', f'keys = "keys"\n{table}'))
    with pytest.raises(BadInput, match=word):
        open_bridge(path)
    assert not (tmp_path / "specimen" / "column.log").exists()


def test_a_latch_is_not_cleared_without_a_reason_and_nothing_stays_behind(tmp_path):
    path = write_bridge(tmp_path)
    command = [sys.executable, "-c", f"from drivers.bridge import serve; from pathlib import Path; "
               f"serve(Path({str(path)!r}), 'because')"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        end(tmp_path)
    assert "says too little" in done.stderr
    word = BeatWord(tmp_path / "specimen")
    assert (word.armed, Path(f"/proc/{word.watchdog_pid}").exists()) == (0, False)
    word.close()


@pytest.mark.slow
def test_an_exposure_over_the_bridge_costs_little(tmp_path):
    """Half of the bar (p50 20 ms, p99 60 ms), plus what the pulse and its frame may take; the figures themselves come
    from ``python -m tests.benchmarks.exposure_overhead``."""
    times = []
    with running(tmp_path) as bridge:
        microscope = bridge.driver().build(tmp_path / "client", tmp_path, 0)
        for number in range(60):
            before = time.perf_counter()
            assert expose(microscope, str(number), a_region(1e-4, shape=(16, 16))).state == "POST"
            microscope.fetch(a_key(str(number)))
            microscope.acknowledge(a_key(str(number)))
            times.append(time.perf_counter() - before)
        microscope.close()
    assert np.median(times) < 0.04 + 0.03
