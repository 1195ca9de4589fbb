"""What `aecontrol find` is asked for, and the scale that it works at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from aecontrol.types import Model, Positive


class Request(Model):
    """What is to be found, and where."""

    what: Literal["atoms", "regions"] = Field("atoms", description="regions: particles, grain boundaries, domain walls")
    pixel_size_nm: Positive | None = Field(None, description="side of a pixel, nm; None: what the file says")
    channel: str | None = Field(None, description="which image of a file that holds several")
    frame: int | None = Field(None, description="which frame of a stack, from 0")
    threshold: float = Field(0.5, gt=0, le=1, description="least confidence of an atom")
    refine: bool = Field(True, description="fit positions and intensities, not only the network's centres")
    weights: Path | None = Field(None, description="safetensors file; None: the shipped ones")


@dataclass(frozen=True)
class Scale:
    """Side of a pixel, nm, and where it is from: 'given', 'file' or 'estimated', and then ``how``."""

    pixel_nm: float
    source: str
    how: str | None = None

    @property
    def unit(self) -> str:
        """Unit of the results: an estimated scale finds atoms, but measures nothing."""
        return "px" if self.source == "estimated" else "nm"

    @property
    def unit_px(self) -> float:
        """What a pixel is in ``unit``."""
        return 1.0 if self.source == "estimated" else self.pixel_nm
