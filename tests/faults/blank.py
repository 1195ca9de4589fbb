"""How long the beam stays on after a fault: ``python -m tests.faults.blank --trials 100``.

The whole stack in real processes, CURVE, H = 100 ms: in the middle of a long pulse the controller or the server is
stopped or killed, or the link is cut or goes dead. The column itself notes when its beam went off; that is held against
the last valid heartbeat that the server stamped into the shared word, and against the fault.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.drivers.proxy import TcpProxy

from .metered import Metered, read_meter
from .plant import Plant, hit, plant

H_NS = 100_000_000
PULSE_S = 8.0
LOOK_S = 1e-3
FAULTS = ("controller stopped", "controller killed", "server stopped", "server killed", "link cut", "link dead")


@dataclass(frozen=True)
class Trial:
    """In heartbeats: how long the beam was on after the last beat and after the fault, and by how much a sleeping
    process overslept meanwhile, at most. ``false_alarms``: pulses before it that were blanked without a fault."""

    fault: str
    since_beat: float
    since_fault: float
    overslept: float
    false_alarms: int


class Rig:
    """A plant whose controller reaches it through a proxy."""

    def __init__(self, it: Plant, proxy: TcpProxy) -> None:
        self._it, self._proxy = it, proxy

    def trial(self, fault: str, after_s: float) -> Trial:
        """One fault, ``after_s`` after a pulse has begun; afterwards all is well again."""
        it, false_alarms = self._it, -1
        while false_alarms < 0 or self._pulse().off_ns is not None:
            false_alarms += 1
            earlier = len(read_meter(it.folder))
            begun = it.until(lambda n=earlier: len(read_meter(it.folder)) > n, 40.0)
            assert begun, it.log("controller") + it.log("server")
            it.until(lambda: False, after_s)
        fault_ns = time.monotonic_ns()
        mend = self._cause(fault)
        off_ns, overslept_s = self._await_dark(fault_ns)
        beat_ns = it.word.stamp_ns
        mend()
        h = 1.0 / H_NS
        return Trial(fault, h * (off_ns - beat_ns), h * (off_ns - fault_ns), 1e9 * h * overslept_s, false_alarms)

    def _cause(self, fault: str) -> Callable[[], object]:
        """Do it; what mends it."""
        who, what = fault.split()
        if who == "link":
            if what == "cut":
                self._proxy.accepting = False
                self._proxy.cut()
            else:
                self._proxy.fault = "half-open"
            return self._mend_link
        pid = self._it.pid("controller" if who == "controller" else "server")
        hit(pid, signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
        return lambda: hit(pid, signal.SIGCONT) if what == "stopped" else None

    def _mend_link(self) -> None:
        self._proxy.accepting, self._proxy.fault = True, ""

    def _await_dark(self, from_ns: int) -> tuple[int, float]:
        """When the beam went off, ns, and the longest that this process overslept while it waited, s."""
        overslept_s = 0.0
        while (pulse := self._pulse()).off_ns is None:
            assert time.monotonic_ns() - from_ns < 0.5e9 * PULSE_S, "the beam stays on"
            before_s = time.monotonic()
            time.sleep(LOOK_S)
            overslept_s = max(overslept_s, time.monotonic() - before_s - LOOK_S)
        return pulse.off_ns, overslept_s

    def _pulse(self) -> Metered:
        return read_meter(self._it.folder)[-1]


def campaign(folder: Path, trials: int, seed: int) -> Iterator[Trial]:
    """One fault after another, each kind equally often, at random times within heartbeats."""
    draw = random.Random(seed)
    with ExitStack() as stack:
        it = stack.enter_context(plant(folder, steps=10 * trials, pulse_s=PULSE_S))
        proxy = stack.enter_context(TcpProxy(("127.0.0.1", it.port)))
        it.connect(int(proxy.address.rsplit(":", 1)[1]))
        rig = Rig(it, proxy)
        for number in range(trials):
            yield rig.trial(FAULTS[number % len(FAULTS)], draw.uniform(0.2, 0.5))


def table(trials: list[Trial]) -> Iterator[str]:
    """Median and maximum for each fault, in H."""
    for fault in FAULTS:
        of_it = [trial for trial in trials if trial.fault == fault]
        if not of_it:
            continue
        beat, since = np.array([t.since_beat for t in of_it]), np.array([t.since_fault for t in of_it])
        yield (
            f"{fault:18} {len(of_it):3} times: after the last heartbeat median {np.median(beat):.2f} H, max "
            f"{beat.max():.2f} H; after the fault median {np.median(since):.2f} H, max {since.max():.2f} H"
        )
    late = np.array([trial.overslept for trial in trials])
    yield f"pulses that were blanked without a fault: {sum(trial.false_alarms for trial in trials)}"
    yield f"another process overslept meanwhile by median {np.median(late):.2f} H, max {late.max():.2f} H"
    yield f"{len(trials)} trials, max {max(t.since_beat for t in trials):.2f} H after the last heartbeat; bar 2 H"


def main() -> None:
    """The campaign, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    done = []
    with tempfile.TemporaryDirectory(prefix="blank") as folder:
        for trial in campaign(Path(folder), options.trials, options.seed):
            done.append(trial)
            if trial.since_beat > 2.0 or trial.false_alarms:
                print(trial, flush=True)
    print("\n".join(table(done)))


if __name__ == "__main__":
    main()
