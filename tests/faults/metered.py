"""An instrument for campaigns with real processes: its beam has a meter and a log that ask nobody.

``meter.log`` beside the configuration holds one line when the beam goes on and one when it goes off; times are
CLOCK_MONOTONIC. Nobody but the column writes there, and the column outlives everything that is killed.
"""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from aecontrol.types import Capabilities, InstrumentState, Model, ScanRegion
from aecontrol.units import electrons_per_second
from drivers.backends.base import Shot
from tests.aecontrol.parts import MeanPerceiver

LOG = "meter.log"
CAPABILITIES = Capabilities(
    identity="metered column",
    simulated=True,
    unit="electrons",
    field_nm=(20.0, 20.0),
    channels=("HAADF",),
    beam_current_pA=10.0,
    blanker_latency_s=1e-6,
    dwell_time_range_s=(1e-7, 10.0),
    max_pixels=4096,
)
ENTRY_POINTS = """\
[aecontrol.backends]
metered = tests.faults.metered:MeteredBackend

[aecontrol.perceivers]
mean = tests.faults.metered:MeanReader
"""


class MeteredBackend(Model):
    """[backend] kind = "metered"."""

    kind: Literal["metered"] = "metered"

    def open(self, base: Path, seed: int) -> MeteredColumn:
        return MeteredColumn(base / LOG)

    def open_blanker(self, base: Path) -> None:
        """Through the column's process only, as with most vendors."""


class MeanReader(Model):
    """[perceiver] kind = "mean": reads the mean of a frame."""

    kind: Literal["mean"] = "mean"
    target_kind: Literal["none"] = "none"

    def build(self, device: str) -> MeanPerceiver:
        return MeanPerceiver()


class MeteredColumn:
    """A :class:`~drivers.backend.Backend` whose pulses take their time and end by the hardware's clock."""

    def __init__(self, log: Path) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._on_ns = self._off_ns = 0
        self._meter = 0

    def describe(self) -> Capabilities:
        return CAPABILITIES

    def fire(self, ordinal: int, region: ScanRegion) -> Shot:
        whole_ns = round(1e9 * region.pixels * region.dwell_time_s)
        self._stop.clear()
        with self._lock:
            self._on_ns = time.monotonic_ns()
            self._off_ns = self._on_ns + whole_ns
        self._write(f"on {ordinal} {self._on_ns}")
        self._stop.wait(1e-9 * whole_ns)
        with self._lock:
            on_ns, off_ns = self._on_ns, self._off_ns
            electrons = self._electrons(off_ns)
            self._meter += electrons
            self._on_ns = 0
        self._write(f"off {ordinal} {off_ns} {electrons}")
        share = (off_ns - on_ns) / whole_ns
        image = np.random.default_rng(ordinal).poisson(5.0, region.shape).astype(np.float32)
        lines = math.floor(share * region.shape[0])
        image[lines:] = 0.0
        return Shot(
            channels={"HAADF": image},
            electrons=electrons,
            pixels=lines * region.shape[1],
            seconds=1e-9 * (off_ns - on_ns),
            started_s=1e-9 * on_ns,
            flags=("partial",) if share < 1.0 else (),
        )

    def blank(self) -> None:
        with self._lock:
            self._off_ns = min(self._off_ns, time.monotonic_ns())
        self._stop.set()

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        raise AssertionError("this column has outlived every server")

    def state(self) -> InstrumentState:
        now_ns = time.monotonic_ns()
        with self._lock:
            beam_on = bool(self._on_ns) and now_ns < self._off_ns
            running = self._electrons(min(now_ns, self._off_ns)) if self._on_ns else 0
            return InstrumentState(beam_on=beam_on, clock_s=1e-9 * now_ns, electrons=self._meter + running)

    def close(self) -> None:
        self.blank()

    def _electrons(self, until_ns: int) -> int:
        assert CAPABILITIES.beam_current_pA is not None
        return math.ceil(electrons_per_second(CAPABILITIES.beam_current_pA) * 1e-9 * (until_ns - self._on_ns))

    def _write(self, line: str) -> None:
        os.write(self._log, f"{line}\n".encode())


@dataclass(frozen=True)
class Metered:
    """One pulse in the column's log; ``electrons`` None while it runs."""

    ordinal: int
    on_ns: int
    off_ns: int | None = None
    electrons: int | None = None


def read_meter(folder: Path) -> list[Metered]:
    """Every pulse that the column has begun, in order."""
    path = folder / LOG
    pulses: list[Metered] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        word, *numbers = line.split()
        ordinal, at_ns, *electrons = map(int, numbers)
        if word == "on":
            pulses.append(Metered(ordinal, at_ns))
        else:
            assert pulses[-1].ordinal == ordinal
            pulses[-1] = Metered(ordinal, pulses[-1].on_ns, at_ns, *electrons)
    return pulses


def install(folder: Path) -> None:
    """Make ``folder``, when it is on PYTHONPATH, announce these parts by entry point, as a package of a laboratory
    would."""
    package = folder / "metered-0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: metered\nVersion: 0\n")
    (package / "entry_points.txt").write_text(ENTRY_POINTS)
