"""A simulated microscope: a specimen that remembers every electron, behind the same protocol as a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, field_validator

from aecontrol.exposure import InterlockLimits
from aecontrol.registry import build_part
from aecontrol.types import Capabilities, Model, Positive
from simulators.damage import Damage
from simulators.optics import Optics
from simulators.scan import Detector, ScanModel

from .instrument import Instrument


class SimulatedDriver(Model):
    """[driver] kind = "simulated": specimen, optics, scan, detector and damage of the simulated column."""

    kind: Literal["simulated"] = "simulated"
    specimen: dict[str, Any] = Field(description="a specimen's table; its kind names an installed specimen")
    optics: Optics = Optics()
    scan: ScanModel = ScanModel()
    detector: Detector = Detector()
    damage: Damage = Damage()
    beam_current_pA: Positive = Field(30.0, description="declared probe current, pA; the true one fluctuates by 1 %")
    limits: InterlockLimits = Field(InterlockLimits(), description="the instrument's own limits")

    @field_validator("specimen")
    @classmethod
    def _known(cls, table: dict[str, Any]) -> dict[str, Any]:
        build_part("specimen", table, "driver.specimen")  # raises BadInput, which names key, value and limit
        return table

    def build(self, folder: Path, base: Path, seed: int) -> Instrument:
        """The instrument with its ledger in ``folder``; specimen and noise follow from ``seed``."""
        from simulators.column import SimulatedColumn, SpecimenConfig

        column = SimulatedColumn(
            specimen=cast(SpecimenConfig, build_part("specimen", self.specimen, "driver.specimen")),
            optics=self.optics,
            scan=self.scan,
            detector=self.detector,
            damage=self.damage,
            beam_current_pA=self.beam_current_pA,
            seed=seed,
        )
        capabilities = Capabilities(
            identity=f"simulated {self.specimen['kind']}, seed {seed}",
            simulated=True,
            unit="electrons",
            field_nm=column.field_nm,
            channels=column.channels,
            beam_current_pA=self.beam_current_pA,
            flyback_s=self.scan.flyback_s,
        )
        return Instrument(column, capabilities, self.limits, folder)
