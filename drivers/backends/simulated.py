"""A simulated column as a backend, at once or in real time, with a beam that can be blanked in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.protocols import Truth
from aecontrol.types import Capabilities, InstrumentState, ScanRegion
from drivers.backend import Pulse
from drivers.simulated import DescribedColumn
from simulators.column import BeamStopped, SimulatedColumn, block_lines
from simulators.scan import ScanModel

WARM_UP_PIXELS = 8


class SimulatedBackend(DescribedColumn):
    """[backend] kind = "simulated": a simulated column, for tests and for trying things out."""

    kind: Literal["simulated"] = "simulated"
    real_time: bool = Field(False, description="true: a pulse takes the time that its scan takes; false: none")

    def open(self, base: Path, seed: int) -> SimulatedHardware:
        """A fresh column; specimen and noise follow from ``seed``. Loads all that a pulse needs. Raises BadInput."""
        column = self.column(seed)
        return SimulatedHardware(column, self.capabilities(column, seed), self.scan, self.real_time)

    def open_blanker(self, base: Path) -> None:
        """A simulated beam exists in one process only: there is no second path to it."""


class SimulatedHardware:
    """A :class:`~drivers.backend.Backend` around a simulated column.

    The beam advances by line blocks (a 64th of a frame). A block is on the meter before its time passes, so that the
    meter is never behind the beam; a beam that is blanked within a block counts it in full, and the specimen suffers
    it. Lines that were not scanned are 0. In real time the frame is computed after the beam is off.
    """

    def __init__(self, column: SimulatedColumn, capabilities: Capabilities, scan: ScanModel, real_time: bool) -> None:
        self._column, self._capabilities = column, capabilities
        self._scan, self._real_time = scan, real_time
        self._stop = threading.Event()
        self._beam_on = False
        self._ends_s: list[float] = []  # monotonic time at which each line block yet to come ends
        column.on_line_block = self._line_block
        self._warm_up()

    def describe(self) -> Capabilities:
        """What the simulated instrument is, with the assumptions of its models."""
        return self._capabilities

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Expose ``region``; in real time this takes the scan's duration and then the frame's computation."""
        self._ends_s = self._block_ends_s(region)
        self._stop.clear()
        self._beam_on = True
        try:
            return self._column.fire(ordinal, region)
        finally:
            self._beam_on = False

    def blank(self) -> None:
        """End the running pulse with the present line block."""
        self._beam_on = False
        self._stop.set()

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """Bring specimen, clock and meter to where firing ``region`` in full would have left them."""
        self._column.absorb(ordinal, region)

    def state(self) -> InstrumentState:
        """Beam, clock and the column's own count of electrons."""
        return InstrumentState(beam_on=self._beam_on, clock_s=self._column.clock_s, electrons=self._column.meter)

    def close(self) -> None:
        """Blank."""
        self.blank()

    # ------------------------------------------------------------ aecontrol.protocols.HasTruth

    def truth(self, target: str) -> Truth | None:
        """True objects, for the scorer only."""
        found = self._column.targets(target)
        if found is None:
            return None
        return Truth(
            targets=found[0],
            labels=tuple(found[1]),
            electrons_delivered=self._column.meter,
            atoms=self._column.atoms_nm(),
            changes=self._column.changes(),
            sites=self._column.sites(),
        )

    def noiseless(self, region: ScanRegion) -> Mapping[str, NDArray[np.generic]] | None:
        """The ideal image of ``region``, for the scorer only."""
        return self._column.noiseless(region)

    # ------------------------------------------------------------ inside

    def _block_ends_s(self, region: ScanRegion) -> list[float]:
        """When each line block of a pulse that begins now ends, monotonic clock, s."""
        rows = region.shape[0]
        block = block_lines(rows)
        line_ends = np.append(self._scan.line_starts_s(region)[1:], self._scan.frame_s(region))
        ends = np.append(line_ends[block - 1 : rows - 1 : block], line_ends[-1])
        return list(time.monotonic() + (ends if self._real_time else 0.0 * ends))

    def _line_block(self, ordinal: int, electrons: int) -> None:
        """Let the time of a block pass that is already on the meter; the last one ends the beam."""
        end_s = self._ends_s.pop(0)
        stopped = self._stop.wait(max(0.0, end_s - time.monotonic()))
        if stopped or not self._ends_s:
            self._beam_on = False
        if stopped:
            raise BeamStopped

    def _warm_up(self) -> None:
        """Import and allocate now what the first pulse would otherwise wait for; nothing is exposed."""
        width, height = self._column.field_nm
        side = min(1.0, width, height)
        self._column.noiseless(
            ScanRegion(
                center_nm=(width / 2, height / 2),
                fov_nm=(side, side),
                shape=(WARM_UP_PIXELS, WARM_UP_PIXELS),
                dwell_time_s=1e-6,
            )
        )
