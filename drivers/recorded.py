"""A recorded image served as a microscope would: it reveals only what was scanned, and charges each pixel once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.exposure import InterlockLimits
from aecontrol.types import Capabilities, Model, Positive

from .instrument import Instrument
from .record import RecordedColumn


class RecordSetup(Model):
    """Which image file is served. Its dose is unknown, so budgets and charges are in pixels."""

    path: Path = Field(description="image file; a relative path starts at the configuration's folder")
    key: str | None = Field(None, description="which image of a file that holds several")
    pixel_size_nm: Positive | None = Field(None, description="pixel size, nm, where the file does not say")

    def column(self, base: Path) -> RecordedColumn:
        """The record. Raises BadInput when the file cannot be read or has no scale."""
        from aecontrol.files import read_image

        picture = read_image(base / self.path, self.key)
        pixel = self.pixel_size_nm or picture.pixel_size_nm
        if pixel is None:
            raise BadInput(f"{self.path} does not say its pixel size", "set driver.pixel_size_nm")
        return RecordedColumn({"HAADF": picture.array}, pixel, picture.labels)

    def capabilities(self, column: RecordedColumn) -> Capabilities:
        """What ``column``, built from these settings, is and can do."""
        rows, cols = column.shape
        return Capabilities(
            identity=f"record {self.path.name} {rows}x{cols} at {column.pixel_size_nm:g} nm",
            simulated=False,
            unit="pixels",
            field_nm=column.field_nm,
            channels=column.channels,
            pixel_size_nm=column.pixel_size_nm,
        )


class RecordedDriver(RecordSetup):
    """[driver] kind = "recorded": a record behind the instrument's half of the exposure protocol."""

    kind: Literal["recorded"] = "recorded"
    limits: InterlockLimits = Field(InterlockLimits(), description="the instrument's own limits")

    def build(self, folder: Path, base: Path, seed: int) -> Instrument:
        """The record with its ledger in ``folder``. Raises BadInput when the file cannot be read or has no scale."""
        column = self.column(base)
        return Instrument(column, self.capabilities(column), self.limits, folder)
