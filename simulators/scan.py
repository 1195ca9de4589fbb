"""Where the probe really goes, when, and what the detector reads. Lengths are nm: this module meets ScanRegion."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, NonNegative, Positive, ScanRegion

from .streams import stream

Array = NDArray[np.float64]
DRIFT_MODES = 64
"""Harmonics that make up the wandering part of the drift velocity."""


class ScanModel(Model):
    """How far the scan coils and the stage are from ideal. The defaults are assumptions, not measurements."""

    flyback_s: NonNegative = Field(200e-6, description="time from the end of a line to the start of the next, s")
    line_jitter_nm: NonNegative = Field(0.005, description="standard deviation of a line's displacement per axis, nm")
    line_jitter_correlation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="correlation of the displacement between neighbouring lines"
    )
    swing_nm: float = Field(0.0, description="displacement along the line left over at its start by the flyback, nm")
    swing_decay_s: Positive = Field(10e-6, description="time in which the leftover of the flyback falls to 1/e, s")
    rotation_error_deg: float = Field(0.0, description="turn of the true scan against the commanded one, degrees")
    shear: Annotated[float, Field(gt=-0.5, lt=0.5)] = Field(
        0.0, description="displacement along the line per distance across the lines"
    )
    drift_nm_per_s: tuple[float, float] = Field((0.0, 0.0), description="steady drift of the probe over the specimen")
    drift_wander_nm_per_s: NonNegative = Field(0.0, description="standard deviation of the drift's wandering part")
    drift_wander_s: Positive = Field(60.0, description="correlation time of the wandering part, s")

    def frame_s(self, region: ScanRegion) -> float:
        """Time from the first pixel to the end of the last line, flybacks between lines included, s."""
        rows, cols = region.shape
        return rows * cols * region.dwell_time_s + (rows - 1) * self.flyback_s

    def line_starts_s(self, region: ScanRegion) -> Array:
        """Start of each line after the first pixel, [rows], s."""
        rows, cols = region.shape
        return np.arange(rows, dtype=np.float64) * (cols * region.dwell_time_s + self.flyback_s)

    def drift_nm(self, clock_s: Array, seed: int) -> Array:
        """Displacement [..., 2] of the probe over the specimen at ``clock_s`` [...] since the column started, nm.

        A pure function of time, so that skipped frames change nothing: the wandering velocity is a sum of harmonics
        whose frequencies are Cauchy distributed, which gives the Ornstein-Uhlenbeck covariance exp(-|t| / tau).
        """
        time = np.asarray(clock_s)[..., None]
        drift = time * np.asarray(self.drift_nm_per_s)
        if self.drift_wander_nm_per_s > 0.0:
            draws = stream(seed, "drift").random((2, 2, DRIFT_MODES))
            omega = np.tan(math.pi * (draws[0] - 0.5)) / self.drift_wander_s
            phase = 2.0 * math.pi * draws[1]
            angle = time[..., None] * omega + phase
            amplitude = self.drift_wander_nm_per_s * math.sqrt(2.0 / DRIFT_MODES)
            drift = drift + amplitude * np.sum((np.sin(angle) - np.sin(phase)) / omega, axis=-1)
        return np.asarray(drift)

    def positions_nm(self, region: ScanRegion, started_s: float, seed: int, ordinal: int) -> Array:
        """True probe positions [rows, cols, 2] (x, y) of exposure ``ordinal`` begun at clock ``started_s``, nm."""
        rows, cols = region.shape
        fast, slow = _pixel_offsets(region)
        swing = self.swing_nm * np.exp(-np.arange(cols) * region.dwell_time_s / self.swing_decay_s)
        turn = region.rotation_rad + math.radians(self.rotation_error_deg)
        c, s = math.cos(turn), math.sin(turn)
        starts = started_s + self.line_starts_s(region)
        drift = self.drift_nm(starts, seed)
        # Drift is smooth over a line, so it is evaluated at the line's ends and runs straight in between.
        gain = self.drift_nm(starts + cols * region.dwell_time_s, seed) - drift
        offset = drift + self._line_jitter(rows, seed, ordinal)
        progress = np.arange(cols) / cols
        positions = np.empty((rows, cols, 2))
        for axis, (along, across) in enumerate(((c, -s), (s, c))):
            line = region.center_nm[axis] + (along * self.shear + across) * slow + offset[:, axis]
            np.add(line[:, None], along * (fast + swing), out=positions[..., axis])
            if gain.any():
                positions[..., axis] += gain[:, axis, None] * progress
        return positions

    def _line_jitter(self, rows: int, seed: int, ordinal: int) -> Array:
        """Stationary AR(1) displacement of each line, [rows, 2], nm."""
        normal = stream(seed, "scan-jitter", ordinal).standard_normal((rows, 2))
        if self.line_jitter_nm == 0.0:
            return np.zeros((rows, 2))
        rho = self.line_jitter_correlation
        jitter = normal * math.sqrt(1.0 - rho**2)
        jitter[0] = normal[0]
        for row in range(1, rows):
            jitter[row] += rho * jitter[row - 1]
        return self.line_jitter_nm * jitter


class Detector(Model):
    """How electrons become numbers: gain (Poisson(n I efficiency) + Poisson(dark)) + offset + N(0, read_noise^2)."""

    efficiency: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of scattered electrons detected")
    dark_counts: NonNegative = Field(0.01, description="mean dark counts per pixel")
    gain: Positive = Field(1.0, description="output per detected electron")
    offset: float = Field(0.0, description="output without signal")
    read_noise: NonNegative = Field(0.0, description="standard deviation of the read-out noise, output units")
    saturation: Positive | None = Field(None, description="output at which the detector saturates; null: never")

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


def nominal_positions_nm(region: ScanRegion) -> Array:
    """Commanded pixel centres [rows, cols, 2] (x, y), nm."""
    fast, slow = _pixel_offsets(region)
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    x = region.center_nm[0] + c * fast - s * slow[:, None]
    y = region.center_nm[1] + s * fast + c * slow[:, None]
    return np.stack([x, y], axis=-1)


def _pixel_offsets(region: ScanRegion) -> tuple[Array, Array]:
    """Pixel centres from the region's centre along the fast [cols] and the slow [rows] axis, nm."""
    rows, cols = region.shape
    width, height = region.pixel_size_nm
    fast = np.arange(cols, dtype=np.float64) + 0.5 - cols / 2
    slow = np.arange(rows, dtype=np.float64) + 0.5 - rows / 2
    return fast * width, slow * height
