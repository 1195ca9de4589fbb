"""A plain pulse, for backends that have no type of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shot:
    """What one exposure delivered; see :class:`drivers.backend.Pulse` for every field."""

    channels: Mapping[str, NDArray[np.generic]]
    electrons: int | None
    pixels: int
    seconds: float
    started_s: float
    flags: tuple[str, ...] = ()
