"""Where the probe really goes, when, and with the beam on or off. Lengths are nm: this module meets ScanRegion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, NonNegative, Positive, ScanRegion

from .streams import stream

Array = NDArray[np.float64]
DRIFT_MODES = 64
"""Harmonics that make up the wandering part of the drift velocity."""
RETURN_POINTS, RETURN_STEP_NM = 32, 0.1
"""Points that stand for the straight way back from a line: this many, or one each step where that is more."""
JITTER_LIMIT = 6.0
"""Standard deviations beyond which a line's displacement is cut off: the beam's place has a bound."""


class Charging(Model):
    """A specimen that charges under the beam: a charge between 0 and 1 grows towards 1 while the beam is on and decays
    while it is off, both with ``decay_s``; it displaces the probe and changes the signal. Off by default; the form is
    an assumption."""

    offset_nm: tuple[float, float] = Field((0.0, 0.0), description="displacement of the probe at full charge, nm")
    gain: Annotated[float, Field(gt=-1, lt=10)] = Field(0.0, description="relative change of the signal at full charge")
    decay_s: Positive = Field(10.0, description="time constant, s")

    def after(self, charge: float, seconds: Array | float, beam_on: bool) -> Array:
        """The charge ``seconds`` after it was ``charge``, shaped like ``seconds``."""
        target = 1.0 if beam_on else 0.0
        return np.asarray(target + (charge - target) * np.exp(-np.asarray(seconds) / self.decay_s))


class ScanModel(Model):
    """How far the scan coils and the stage are from ideal. The defaults are assumptions, not measurements."""

    flyback_s: NonNegative = Field(200e-6, description="time from the end of a line to the start of the next, s")
    flyback_blanked: bool = Field(True, description="False: the beam is on on its way back, and the specimen pays")
    blanker_latency_s: NonNegative = Field(
        0.0, description="time for which the beam stays parked on the last pixel until the blanker acts, s"
    )
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
    pause_s: NonNegative = Field(
        0.0, description="time after each exposure (deciding, moving, settling) in which the beam is blanked, s"
    )
    charging: Charging = Charging()

    @property
    def drifts(self) -> bool:
        """True when the probe moves over the specimen in time, without bound."""
        return any(self.drift_nm_per_s) or self.drift_wander_nm_per_s > 0.0

    def position_error_nm(self, field_nm: tuple[float, float]) -> float:
        """Farthest that the beam can be from where it was told to go anywhere in a field, drift aside, nm (jitter: 6
        standard deviations)."""
        turned = 0.5 * math.hypot(*field_nm) * (abs(math.radians(self.rotation_error_deg)) + abs(self.shear))
        jitter = JITTER_LIMIT * self.line_jitter_nm
        return turned + jitter + abs(self.swing_nm) + math.hypot(*self.charging.offset_nm)

    def frame_s(self, region: ScanRegion) -> float:
        """Time from the first pixel until the beam is blanked, flybacks between lines included, s."""
        rows, cols = region.shape
        return rows * cols * region.dwell_time_s + (rows - 1) * self.flyback_s + self.blanker_latency_s

    def beam_on_s(self, region: ScanRegion) -> float:
        """Time in which electrons reach the specimen, s."""
        blanked = (region.shape[0] - 1) * self.flyback_s if self.flyback_blanked else 0.0
        return self.frame_s(region) - blanked

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

    def positions_nm(self, region: ScanRegion, started_s: float, seed: int, ordinal: int, charge: float = 0.0) -> Array:
        """True probe positions [rows, cols, 2] (x, y) of exposure ``ordinal`` begun at clock ``started_s`` with the
        specimen charged to ``charge``, nm."""
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
        if any(self.charging.offset_nm):
            charged = self.charging.after(charge, starts - started_s, beam_on=True)
            offset = offset + charged[:, None] * np.asarray(self.charging.offset_nm)
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
        length = np.linalg.norm(jitter, axis=1, keepdims=True)
        return np.asarray(self.line_jitter_nm * jitter * np.minimum(1.0, JITTER_LIMIT / np.maximum(length, 1e-12)))

    def points_per_line(self, region: ScanRegion) -> int:
        """Points of the beam's path per line: its pixels, and its way back where that is not blanked."""
        if self.flyback_blanked or self.flyback_s == 0.0:
            return region.shape[1]
        return region.shape[1] + max(RETURN_POINTS, math.ceil(math.hypot(*region.fov_nm) / RETURN_STEP_NM))

    def beam_path(self, region: ScanRegion, positions_nm: Array, started_s: float, electrons_per_s: float) -> BeamPath:
        """Everywhere the beam goes on ``positions_nm`` [rows, cols, 2]: pixels, the way back where it is not blanked,
        the last pixel until the blanker acts; in order of time."""
        rows, cols = region.shape
        back = self.points_per_line(region) - cols
        points = np.empty((rows, cols + back, 2))
        seconds = np.empty(cols + back)
        points[:, :cols], seconds[:cols] = positions_nm, region.dwell_time_s
        starts = self.line_starts_s(region)[:, None]
        times = started_s + starts + np.arange(cols + back) * region.dwell_time_s
        if back:
            share = (np.arange(back) + 0.5) / back
            following = np.concatenate([positions_nm[1:, 0], positions_nm[-1:, -1]])  # no way back from the last line
            way = following - positions_nm[:, -1]
            points[:, cols:] = positions_nm[:, -1, None] + share[:, None] * way[:, None]
            seconds[cols:] = self.flyback_s / back
            times[:, cols:] = started_s + starts + cols * region.dwell_time_s + share * self.flyback_s
        electrons = np.tile(electrons_per_s * seconds, rows)
        if back:
            electrons[-back:] = 0.0
        electrons[(rows - 1) * (cols + back) + cols - 1] += electrons_per_s * self.blanker_latency_s
        return BeamPath(points.reshape(-1, 2), electrons, times.reshape(-1), cols + back)


@dataclass(frozen=True)
class BeamPath:
    """Where electrons went: ``points_nm`` [m, 2], ``electrons`` [m] at each, ``times_s`` [m] clock; ``per_line`` points
    belong to each line and the way back from it."""

    points_nm: Array
    electrons: Array
    times_s: Array
    per_line: int

    def electrons_by_line(self, whole: int) -> list[int]:
        """Whole electrons delivered before each line [lines + 1]; the last entry is ``whole``."""
        lines = self.electrons.reshape(-1, self.per_line).sum(axis=1)
        so_far = np.rint(np.concatenate([[0.0], np.cumsum(lines)])).astype(np.int64)
        return [*so_far[:-1].tolist(), whole]

    def lines(self, count: int) -> BeamPath:
        """The path until the end of line ``count`` - 1, its way back included."""
        last = count * self.per_line
        return BeamPath(self.points_nm[:last], self.electrons[:last], self.times_s[:last], self.per_line)


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
