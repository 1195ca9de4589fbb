"""Simulated TEM focal series with their truth: exit wave by multislice, then lens and camera (:mod:`.hrtem`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field, field_validator

from aecontrol.errors import BadInput
from aecontrol.image_sets import ImageSet, Progress
from aecontrol.registry import build_part
from aecontrol.types import Count, Model, NonNegative, Positive, ScanRegion
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from .hrtem import HrtemOptics, Mtf, focal_series
from .multislice import cut_out, exit_wave
from .setup import SpecimenConfig
from .simulation import View, atoms_in, labels_of_places

GRID_PER_ANGLE = 3.15
"""Multislice keeps beams up to wavelength / (this times its pixel)."""


class TemSimulation(Model):
    """kind = "tem": a focal series of a place, channels in increasing C1."""

    kind: Literal["tem"] = "tem"
    specimen: dict[str, Any] = Field(description="a specimen's table; its kind names an installed specimen")
    seed: Count = Field(0, description="of specimen, thermal motion, defocus jitter and camera")
    optics: HrtemOptics = HrtemOptics()
    mtf: Mtf = Mtf()
    center_nm: tuple[float, float] | None = Field(None, description="centre (x, y), nm; null: the middle of the field")
    fov_nm: tuple[Positive, Positive] = Field((4.0, 4.0), description="width and height, nm")
    pixel_nm: Positive = Field(0.01, description="largest camera pixel at the specimen, nm; the file has the true one")
    electrons_per_A2: Positive = Field(1000.0, description="fluence of each frame, e/A^2")
    focal_steps_nm: tuple[float, ...] = Field((-10.0, 0.0, 10.0), min_length=1, description="C1 about Scherzer, nm")
    focal_jitter_nm: NonNegative = Field(1.0, description="standard deviation of each C1 (assumed), nm")

    @field_validator("specimen")
    @classmethod
    def _known(cls, table: dict[str, Any]) -> dict[str, Any]:
        build_part("specimen", table, "specimen")  # raises BadInput, which names key, value and limit
        return table

    def produce(self, device: str, workers: int, progress: Progress) -> Iterator[ImageSet]:
        """The series. Raises BadInput without abTEM, or when the field or the pixels do not suit."""
        if workers > 1:
            raise BadInput(f"--workers {workers}: a focal series cannot be shared", "leave --workers out")
        specimen = cast(SpecimenConfig, build_part("specimen", self.specimen, "specimen")).build(self.seed)
        region = View(center_nm=self.center_nm, fov_nm=self.fov_nm).region(specimen.size_nm)
        corners_A = nm_to_angstrom(1.0) * np.asarray(region.corners_nm())
        block, corner_A = cut_out(specimen, corners_A, self.optics.aperture_mrad)
        largest_mrad = 1e3 * self.optics.wavelength_A / (GRID_PER_ANGLE * nm_to_angstrom(self.pixel_nm))
        wave, (dx, dy) = exit_wave(block, self.optics.voltage_kV, largest_mrad, self.seed)
        progress(1, 2)
        frames, c1_nm = focal_series(
            wave, (dx, dy), self.optics, self.electrons_per_A2 * dx * dy, self.mtf, self.seed, self.focal_steps_nm,
            self.focal_jitter_nm,
        )  # fmt: skip
        first = np.ceil((corners_A.min(axis=0) - corner_A) / (dx, dy)).astype(int)
        cols, rows = np.floor(nm_to_angstrom(1.0) * np.asarray(self.fov_nm) / (dx, dy)).astype(int)
        frames = frames[:, first[1] : first[1] + rows, first[0] : first[0] + cols]
        # a frame's corner lies half a pixel before its first pixel's centre, which is a point of the wave's grid
        low_nm = angstrom_to_nm(1.0) * (corner_A + (first - 0.5) * (dx, dy))
        fov_nm = angstrom_to_nm(1.0) * np.array([cols * dx, rows * dy])
        center = low_nm + fov_nm / 2
        seen = ScanRegion(
            center_nm=(float(center[0]), float(center[1])),
            fov_nm=(float(fov_nm[0]), float(fov_nm[1])),
            shape=(int(rows), int(cols)),
            dwell_time_s=1.0,
        )
        progress(2, 2)
        yield ImageSet(
            channels={"TEM": frames},
            pixel_size_nm=seen.pixel_size_nm,
            arrays={
                **atoms_in(specimen, seen, None),
                **labels_of_places(specimen, seen),
                "c1_nm": c1_nm,
                "electrons_per_pixel": np.array(self.electrons_per_A2 * dx * dy),
            },
            metadata={
                "title": f"simulated TEM of {self.specimen['kind']}, seed {self.seed}",
                "settings": self.model_dump(mode="json"),
                "region": seen.model_dump(mode="json", exclude={"dwell_time_s"}),
                "assumptions": ["defocus jitter and steps about Scherzer focus [A]", "thermal displacements [A]"],
                "units": "positions nm; camera counts",
            },
            stack="focus",
        )
