"""A recorded image as a backend: the smallest complete one. Nothing moves, nothing glows, every pixel counts once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aecontrol.protocols import Truth
from aecontrol.types import Capabilities, InstrumentState, ScanRegion
from drivers.backend import Pulse
from drivers.record import RecordedColumn
from drivers.recorded import RecordSetup


class RecordedBackend(RecordSetup):
    """[backend] kind = "recorded": one image file. Its dose is unknown, so budgets and charges are in pixels."""

    kind: Literal["recorded"] = "recorded"

    def open(self, base: Path, seed: int) -> RecordedHardware:
        """The record, read from ``base``; ``seed`` changes nothing. Raises BadInput for a file that cannot be read."""
        column = self.column(base)
        return RecordedHardware(column, self.capabilities(column))

    def open_blanker(self, base: Path) -> None:
        """A record has no beam and no second path to it."""


class RecordedHardware:
    """A :class:`~drivers.backend.Backend` around a record, of which every frame is there at once: there is never a
    beam to blank."""

    def __init__(self, column: RecordedColumn, capabilities: Capabilities) -> None:
        self._column, self._capabilities = column, capabilities

    def describe(self) -> Capabilities:
        """What the record is."""
        return self._capabilities

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Read ``region``. Raises RecordCannotAnswer for what the record does not hold."""
        return self._column.fire(ordinal, region)

    def blank(self) -> None:
        """Nothing to do."""

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """Count ``region`` as revealed."""
        self._column.absorb(ordinal, region)

    def state(self) -> InstrumentState:
        """Never a beam."""
        return InstrumentState(beam_on=False, clock_s=self._column.clock_s)

    def close(self) -> None:
        """Nothing to release."""

    # ------------------------------------------------------------ aecontrol.protocols.HasTruth

    def truth(self, target: str) -> Truth | None:
        """Labelled objects, for the scorer only."""
        found = self._column.targets(target)
        return None if found is None else Truth(targets=found[0], labels=found[1])

    def noiseless(self, region: ScanRegion) -> Mapping[str, NDArray[np.generic]] | None:
        """A record knows no ideal image."""
        return None
