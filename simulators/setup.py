"""The settings of a simulated column, shared by the driver that serves it and the simulations that only render it."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field, field_validator

from aecontrol.registry import build_part
from aecontrol.types import Model

from .column import SimulatedColumn
from .column import SpecimenConfig as SpecimenConfig  # part of this module's interface
from .damage import Damage
from .detector import Detector, check_detectors
from .optics import Optics
from .scan import ScanModel
from .scattering import Contrast


class ColumnSetup(Model):
    """Specimen, optics, scan, detectors and damage of a simulated column."""

    specimen: dict[str, Any] = Field(description="a specimen's table; its kind names an installed specimen")
    optics: Optics = Optics()
    scan: ScanModel = ScanModel()
    detectors: dict[str, Detector] = Field(
        {"HAADF": Detector()}, description="detectors by name; the first is the one that perception reads"
    )
    contrast: Contrast = Contrast()
    damage: Damage = Damage()
    beam_current_pA: Annotated[float, Field(gt=0, le=1e6)] = Field(
        30.0, description="declared probe current, pA; the true one fluctuates by 1 %"
    )

    @field_validator("specimen")
    @classmethod
    def _known(cls, table: dict[str, Any]) -> dict[str, Any]:
        build_part("specimen", table, "specimen")  # raises BadInput, which names key, value and limit
        return table

    @field_validator("detectors")
    @classmethod
    def _apart(cls, detectors: dict[str, Detector]) -> dict[str, Detector]:
        check_detectors(detectors)
        return detectors

    def column(self, seed: int, device: str = "cpu") -> SimulatedColumn:
        """A fresh column; specimen and noise follow from ``seed``. Raises BadInput."""
        return SimulatedColumn(
            specimen=cast(SpecimenConfig, build_part("specimen", self.specimen, "specimen")),
            optics=self.optics,
            scan=self.scan,
            detectors=self.detectors,
            damage=self.damage,
            beam_current_pA=self.beam_current_pA,
            seed=seed,
            contrast=self.contrast,
            device=device,
        )
