"""A series of frames of one place, and what a metric of damage says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from aecontrol.perception.damage.reading import DamageReading
    from aecontrol.response import Response

Pixels = NDArray[np.generic]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Frames [n, rows, cols] of one place. ``pixel_nm`` is None where nobody says; ``dose``: fluence of a frame, e/A^2,
    None where nobody says."""

    name: str
    frames: Pixels
    pixel_nm: float | None
    dose: float | None
    limit_nm: float

    @property
    def pixel_size_nm(self) -> tuple[float, float]:
        """(fast, slow); 1 nm where it is not known, for nothing but the limit is measured with it."""
        return (self.pixel_nm or 1.0,) * 2


@dataclass(frozen=True)
class Judged:
    """A series as one metric sees it: ``readings`` of frames 1, 2, ... against frame 0; ``fluence`` [frames] in the
    middle of every frame, e/A^2, or in frames where no dose is known; ``response`` where it could be fitted, and
    ``plausible``, the p-value of its law."""

    series: Series
    readings: tuple[DamageReading, ...]
    fluence: Floats
    response: Response | None = None
    plausible: float = 1.0
