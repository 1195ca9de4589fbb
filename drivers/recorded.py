"""A recorded image served as a microscope would: it reveals only what was scanned, and charges each pixel once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.exposure import InterlockLimits
from aecontrol.types import Capabilities, Model, Positive

from .instrument import Instrument


class RecordedDriver(Model):
    """[driver] kind = "recorded": one image file. Its dose is unknown, so budgets and charges are in pixels."""

    kind: Literal["recorded"] = "recorded"
    path: Path = Field(description="image file; a relative path starts at the configuration's folder")
    key: str | None = Field(None, description="which image of a file that holds several")
    pixel_size_nm: Positive | None = Field(None, description="pixel size, nm, where the file does not say")
    limits: InterlockLimits = Field(InterlockLimits(), description="the instrument's own limits")

    def build(self, folder: Path, base: Path, seed: int) -> Instrument:
        """The record with its ledger in ``folder``. Raises BadInput when the file cannot be read or has no scale."""
        from aecontrol.files import read_image

        from .record import RecordedColumn

        picture = read_image(base / self.path, self.key)
        pixel = self.pixel_size_nm or picture.pixel_size_nm
        if pixel is None:
            raise BadInput(f"{self.path} does not say its pixel size", "set driver.pixel_size_nm")
        column = RecordedColumn({"HAADF": picture.array}, pixel, picture.labels)
        capabilities = Capabilities(
            identity=f"record {self.path.name} {picture.array.shape[0]}x{picture.array.shape[1]} at {pixel:g} nm",
            simulated=False,
            unit="pixels",
            field_nm=column.field_nm,
            channels=column.channels,
            pixel_size_nm=pixel,
        )
        return Instrument(column, capabilities, self.limits, folder)
