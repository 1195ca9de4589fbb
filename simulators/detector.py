"""What a detector makes of the electrons that reach it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aecontrol.types import Model, NonNegative, Positive


class Detector(Model):
    """Which electrons are taken, and how they become numbers.

    Signal = gain (Poisson(n I efficiency) + Poisson(dark)) + offset + N(0, read_noise^2), cut at ``saturation``.
    """

    inner_mrad: NonNegative = Field(86.0, description="inner angle, mrad; 0 for a bright-field disc")
    outer_mrad: Positive = Field(200.0, description="outer angle, mrad")
    efficiency: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of scattered electrons detected")
    dark_counts: NonNegative = Field(0.01, description="mean dark counts per pixel")
    gain: Positive = Field(1.0, description="output per detected electron")
    offset: float = Field(0.0, description="output without signal")
    read_noise: NonNegative = Field(0.0, description="standard deviation of the read-out noise, output units")
    saturation: Positive | None = Field(None, description="output at which the detector saturates; null: never")

    @model_validator(mode="after")
    def _angles_in_order(self) -> Detector:
        if not self.inner_mrad < self.outer_mrad:
            raise ValueError(f"inner_mrad must be less than outer_mrad, got {self.inner_mrad} and {self.outer_mrad}")
        return self

    @property
    def annulus(self) -> tuple[float, float]:
        """(inner, outer) angle, mrad."""
        return self.inner_mrad, self.outer_mrad

    def read(
        self, fraction: NDArray[np.floating], electrons_per_pixel: float, random: np.random.Generator
    ) -> tuple[NDArray[np.float32], float]:
        """The signal float32 and the share of saturated pixels, for the ``fraction`` of the beam that is scattered."""
        mean = np.maximum(fraction, 0.0) * (electrons_per_pixel * self.efficiency) + self.dark_counts
        # Read-out noise is drawn first: the number of draws behind a Poisson number depends on the image.
        noise = random.normal(0.0, self.read_noise, mean.shape) if self.read_noise > 0.0 else 0.0
        signal = self.gain * random.poisson(mean) + self.offset + noise
        saturated = 0.0
        if self.saturation is not None:
            saturated = float(np.mean(signal >= self.saturation))
            signal = np.minimum(signal, self.saturation)
        return signal.astype(np.float32), saturated


def check_detectors(detectors: Mapping[str, Detector]) -> None:
    """Several detectors share one exposure, each electron going to one of them. Raises ValueError when there is none,
    when one is called what a file calls something else, or when two overlap."""
    if not detectors:
        raise ValueError("there is no detector; name at least one, e.g. [driver.detectors.HAADF]")
    for name in detectors:
        if not re.fullmatch(r"[A-Z][A-Za-z0-9-]{0,15}", name):
            raise ValueError(
                f"detector {name!r}: a name is a capital and up to 15 letters, digits or '-', e.g. 'MAADF'"
            )
    by_angle = sorted(detectors.items(), key=lambda item: item[1].inner_mrad)
    for (first, a), (second, b) in pairwise(by_angle):
        if b.inner_mrad < a.outer_mrad:
            raise ValueError(
                f"detectors {first} (to {a.outer_mrad} mrad) and {second} (from {b.inner_mrad} mrad) overlap: "
                "an electron can reach one of them only"
            )
