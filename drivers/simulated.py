"""A simulated microscope: a specimen that remembers every electron, behind the same protocol as a real one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from aecontrol.exposure import InterlockLimits
from aecontrol.registry import build_part
from aecontrol.types import Capabilities
from simulators.column import SimulatedColumn
from simulators.materials import assumptions
from simulators.setup import ColumnSetup

from .instrument import Instrument


class DescribedColumn(ColumnSetup):
    """The settings of a simulated column that can say what it is."""

    def capabilities(self, column: SimulatedColumn, seed: int) -> Capabilities:
        """What ``column``, built from these settings and ``seed``, is and can do."""
        assumed = assumptions(self.damage, column.snapshot().elements)
        limits = [f"{name} images: {found.note}" for name, found in column.validity().items() if found.note]
        return Capabilities(
            identity=f"simulated {self.specimen['kind']}, seed {seed}, settings {self._digest()}",
            simulated=True,
            unit="electrons",
            field_nm=column.field_nm,
            channels=column.channels,
            beam_current_pA=self.beam_current_pA,
            flyback_s=self.scan.flyback_s,
            beam_on_in_flyback=not self.scan.flyback_blanked,
            blanker_latency_s=self.scan.blanker_latency_s,
            # where electrons can land: the scan's error, and the blur of aberrations beyond a focused probe's
            position_error_nm=self.scan.position_error_nm(column.field_nm) + self.optics.blur_nm,
            drifts=self.scan.drifts,
            notes=(*limits, *(f"damage model ([L] quoted, [A] assumed): {line}" for line in assumed)),
        )

    def _digest(self) -> str:
        """Short hash of what was set, however it was written: a ledger belongs to one column only."""
        told = self.model_dump(mode="json", exclude_defaults=True, exclude={"limits", "specimen", "real_time"})
        specimen = build_part("specimen", self.specimen, "specimen").model_dump(mode="json", exclude_defaults=True)
        text = json.dumps([told, specimen, self.specimen["kind"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class SimulatedDriver(DescribedColumn):
    """[driver] kind = "simulated": a simulated column behind the instrument's half of the exposure protocol."""

    kind: Literal["simulated"] = "simulated"
    limits: InterlockLimits = Field(InterlockLimits(), description="the instrument's own limits")

    def build(self, folder: Path, base: Path, seed: int) -> Instrument:
        """The instrument with its ledger in ``folder``; specimen and noise follow from ``seed``."""
        column = self.column(seed)
        return Instrument(column, self.capabilities(column, seed), self.limits, folder)
