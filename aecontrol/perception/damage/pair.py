"""Two frames of one place, registered and in counts: what every metric compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecontrol.perception.quality import noise_gain

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Pair:
    """Two registered frames [rows, cols] in counts. ``ratio``: counts that the later frame has for one of the first
    where nothing has changed. ``valid`` [rows, cols]: pixels that both frames show."""

    first: Floats
    later: Floats
    ratio: float
    valid: Bools


def in_counts(image: NDArray[np.generic]) -> Floats:
    """``image`` scaled and shifted so that the variance of its noise is its level."""
    from scipy.ndimage import uniform_filter

    data = np.asarray(image, dtype=np.float64)
    gain, basis = noise_gain(data)
    if basis == "the image holds counts":
        return data
    noise = float(((np.diff(np.diff(data, 2, axis=0), 2, axis=1) / 6.0) ** 2).mean())
    if gain is None:
        level = max(float(uniform_filter(data, 3).mean()), np.sqrt(noise))
        gain = noise / level
    return np.asarray(data / gain + (noise / gain**2 - data.mean() / gain))
