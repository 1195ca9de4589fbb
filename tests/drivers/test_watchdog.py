"""The watchdog: real processes are stopped and killed, and the beam goes off all the same."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from aecontrol.errors import InstrumentFault
from drivers.beat_word import BeatWord
from drivers.column_link import column_lives
from drivers.column_messages import State
from drivers.watchdog import OwnPath, Watchdog, start_watchdog

from .bridge_parts import a_region, column, end, fire, outcome, server, until

H_S = 0.1


@pytest.fixture
def word(tmp_path):
    word = BeatWord(tmp_path)
    yield word
    word.remove()


@pytest.fixture
def watch(tmp_path, word):
    """Starts watchdogs, waits until they watch, and ends them all."""
    started = []

    def start(watching=True):
        process = start_watchdog(tmp_path / "bridge.toml", tmp_path)
        started.append(process)
        until(lambda: not watching or (word.watchdog_pid == process.pid and word.watched(H_S)))
        return process

    yield start
    for process in started:
        end(process.pid)
        process.wait()


def beam_on(link):
    return link.ask(State(), 5.0).message.state.beam_on


def blanking_times(link, folder, word, watch, signals):
    """In heartbeats, from the last stamp until the beam of a running pulse was blanked, for each of ``signals`` that
    befalls the process that stamps."""
    times = []
    for number, what in enumerate(signals):
        with server(folder) as process:
            until(lambda pid=process.pid: word.server_pid == pid)
            watchdog = watch()
            link.ask(fire(number, a_region(10.0)), 5.0)
            until(lambda: beam_on(link))
            time.sleep(0.01 * (number % 7))  # at any moment between two stamps
            asleep, trips = word.blanked_ns, word.trips
            os.kill(process.pid, what)
            assert outcome(link).flags == ("partial",)
            until(lambda before=asleep: word.blanked_ns != before)
            times.append((word.blanked_ns - word.stamp_ns) / (1e9 * H_S))
            assert word.trips == trips + 1
            end(process.pid)
            process.wait()
            assert watchdog.wait(timeout=5.0) == 0
    return np.array(times)


def campaign(tmp_path, word, watch, trials):
    stop_and_kill = [signal.SIGSTOP, signal.SIGKILL] * (trials // 2)
    with column(tmp_path) as (link, _):
        times = blanking_times(link, tmp_path, word, watch, stop_and_kill)
    for name, of_it in (("SIGSTOP", times[::2]), ("SIGKILL", times[1::2])):
        print(f"blanked after {name}, {len(of_it)} times: median {np.median(of_it):.2f} H, max {of_it.max():.2f} H")
    return times


def test_the_beam_goes_off_within_two_heartbeats_of_the_last_one(tmp_path, word, watch):
    times = campaign(tmp_path, word, watch, 6)
    assert times.max() <= 2.0
    assert times[::2].min() > 1.4  # a late heartbeat is given its time


@pytest.mark.slow
def test_blanking_campaign(tmp_path, word, watch):
    assert campaign(tmp_path, word, watch, 100).max() <= 2.0


def test_a_server_that_wakes_up_and_fires_is_blanked_again(tmp_path, word, watch):
    with column(tmp_path) as (link, _), server(tmp_path) as process:
        until(lambda: word.server_pid == process.pid)
        watchdog = watch()
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: word.trips == 1)
        time.sleep(3 * H_S)
        began_s = time.monotonic()
        link.ask(fire(0, a_region(10.0)), 5.0)
        assert outcome(link).flags == ("partial",)
        assert time.monotonic() - began_s < 2 * H_S + 0.2  # half a heartbeat, and the frame
        assert word.trips == 1
        os.kill(process.pid, signal.SIGCONT)
        until(lambda: time.monotonic_ns() - word.stamp_ns < 5e7)
        time.sleep(H_S)
        link.ask(fire(1, a_region(0.3)), 5.0)
        assert outcome(link).flags == ()  # all is well again
        assert watchdog.poll() is None


def test_a_beat_that_comes_keeps_the_beam_on_and_ctrl_c_does_not_stop_the_watch(tmp_path, word, watch):
    with column(tmp_path) as (link, _), server(tmp_path) as process:
        until(lambda: word.server_pid == process.pid)
        watchdog = watch()
        os.kill(watchdog.pid, signal.SIGINT)
        assert os.getsid(watchdog.pid) == watchdog.pid
        link.ask(fire(0, a_region(1.0)), 5.0)
        assert outcome(link).flags == ()
        assert (word.trips, word.watchdog_pid) == (0, watchdog.pid)
        assert word.watched(H_S)
        watchdog.kill()
        until(lambda: not word.watched(H_S), timeout_s=2 * H_S)


def test_an_unarmed_beam_is_left_alone_until_the_server_is_gone(tmp_path, word, watch):
    with column(tmp_path) as (link, _), server(tmp_path, armed=False) as process:
        until(lambda: word.server_pid == process.pid)
        watchdog = watch()
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(3 * H_S)
        assert beam_on(link) is False
        assert word.trips == 0
        blanked_ns = word.blanked_ns
        process.kill()
        assert watchdog.wait(timeout=5.0) == 0
        assert (word.trips, word.blanked_ns > blanked_ns) == (0, True)


def test_a_column_that_hangs_is_asked_until_it_answers(tmp_path, word, watch):
    with column(tmp_path) as (link, ready), server(tmp_path) as process:
        until(lambda: word.server_pid == process.pid)
        watchdog = watch()
        os.kill(ready.pid, signal.SIGSTOP)
        process.kill()
        time.sleep(2.0)
        blanked_ns = word.blanked_ns
        assert word.trips == 1
        assert watchdog.poll() is None
        assert "not confirmed" in (tmp_path / "watchdog.log").read_text()
        os.kill(ready.pid, signal.SIGCONT)
        assert watchdog.wait(timeout=5.0) == 0
        assert word.blanked_ns > blanked_ns
        assert link.ask(State(), 5.0).message.state.beam_on is False


def test_without_a_column_it_never_says_that_it_watches(tmp_path, word, watch):
    with column(tmp_path) as (_, ready):
        end(ready.pid)
        until(lambda: not column_lives(tmp_path))
    with server(tmp_path, armed=False) as process:
        until(lambda: word.server_pid == process.pid)
        watchdog = watch(watching=False)
        time.sleep(1.0)
        assert (watchdog.poll(), word.poll_ns) == (None, 0)
    assert watchdog.wait(timeout=5.0) == 0  # nothing left to watch, nobody to watch for


class Stubborn:
    """A blanker that fails some times."""

    def __init__(self, failures):
        self.failures, self.calls = failures, 0

    def blank(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise InstrumentFault("the relay does not answer")

    def close(self):
        pass


def test_a_path_of_its_own_is_tried_until_it_works(word):
    word.claim()
    blanker = Stubborn(failures=3)
    watchdog = Watchdog(word, OwnPath(blanker), H_S)
    now_ns = time.monotonic_ns()
    for look in range(40):  # 5 ms apart: asked every 50 ms
        assert watchdog.look(now_ns + look * 5_000_000) is False
        word.stamp_ns = now_ns + look * 5_000_000
        assert bool(word.poll_ns) == (blanker.calls == 4)
    assert blanker.calls == 4
    word.armed = 1
    late_ns = word.stamp_ns + 149_000_000
    watchdog.look(late_ns)
    assert (blanker.calls, word.trips) == (4, 0)
    watchdog.look(late_ns + 2_000_000)
    assert (blanker.calls, word.trips) == (5, 1)
