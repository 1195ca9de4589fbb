"""Small real parts for tests of the core: a column that counts electrons by itself, a perceiver, a reckless policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aecontrol.config import SessionConfig, SessionTable, Tables
from aecontrol.exposure import InterlockLimits
from aecontrol.protocols import History, Reading
from aecontrol.types import (
    Budget,
    Capabilities,
    DriftPlan,
    Explanation,
    OverviewPlan,
    Scan,
    ScanPlan,
    ScanRegion,
    Stop,
    StopRules,
)
from aecontrol.units import electrons_per_second
from drivers.instrument import Instrument

FIELD_NM = (6.0, 4.0)
CAPABILITIES = Capabilities(
    identity="counting column",
    simulated=True,
    unit="electrons",
    field_nm=FIELD_NM,
    channels=("HAADF",),
    beam_current_pA=10.0,
    flyback_s=1e-5,
    beam_on_in_flyback=True,
    blanker_latency_s=1e-6,
    dwell_time_range_s=(1e-7, 1e-3),
    max_pixels=14400,
)


@dataclass(frozen=True)
class Pulse:
    channels: dict
    electrons: int | None
    pixels: int
    seconds: float
    started_s: float = 0.0
    flags: tuple[str, ...] = ()


@dataclass
class CountingColumn:
    """The physical column: it outlives every process, counts what it delivers line by line, and asks nobody.

    ``on_line`` is called between lines and may end the process (raise Crash) with the pulse half delivered.
    """

    on_line: Callable[[], None] = lambda: None
    meter: int = 0
    shots: list[int] = field(default_factory=list)
    tiles: dict[tuple[int, int], float] = field(default_factory=dict)

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        self.shots.append(ordinal)
        rng = np.random.default_rng(ordinal)
        current = CAPABILITIES.beam_current_pA * (1 + rng.uniform(-0.04, 0.04))
        rows, cols = region.shape
        delivered = 0
        for row in range(rows):
            self.on_line()
            line = math.floor(electrons_per_second(current) * (cols * region.dwell_time_s + CAPABILITIES.flyback_s))
            self._deposit(region, row, line)
            delivered += line
        self.on_line()
        image = rng.poisson(5.0, region.shape).astype(np.float32)
        return Pulse(
            {"HAADF": image}, delivered, region.pixels, rows * (cols * region.dwell_time_s + CAPABILITIES.flyback_s)
        )

    def _deposit(self, region: ScanRegion, row: int, electrons: int) -> None:
        self.meter += electrons
        px, py = region.pixel_size_nm
        u = (np.arange(region.shape[1]) + 0.5) * px - region.fov_nm[0] / 2
        v = (row + 0.5) * py - region.fov_nm[1] / 2
        c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
        x, y = region.center_nm[0] + c * u - s * v, region.center_nm[1] + s * u + c * v
        for tile in zip(np.floor(x).astype(int), np.floor(y).astype(int), strict=True):
            self.tiles[tile] = self.tiles.get(tile, 0.0) + electrons / len(u) / 100.0

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """A new process only looks; the column was there all along."""

    def targets(self, kind: str):
        return None


BLOBS = np.random.default_rng(5).uniform((-2, -2), (8, 6), (200, 2))
REFERENCE = DriftPlan(
    center_nm=(3.0, 2.0), fov_nm=(2.0, 2.0), shape=(48, 48), dwell_time_s=1e-7, limit_nm=0.15, margin_nm=0.5
)


@dataclass
class DriftingColumn(CountingColumn):
    """A specimen with blobs at random places that moves between any two shots; meter and tiles move with it."""

    step_nm: tuple[float, float] = (0.012, -0.009)
    jump_nm: tuple[float, float] = (0.0, 0.0)
    blind: tuple[int, ...] = ()  # shots whose frame shows nothing but noise

    def moved_nm(self, ordinal: int) -> np.ndarray:
        return np.array(self.jump_nm) + ordinal * np.array(self.step_nm)

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        center = np.array(region.center_nm) - self.moved_nm(ordinal)
        here = region.model_copy(update={"center_nm": tuple(center.tolist())})
        pulse = super().fire(ordinal, here)
        if ordinal in self.blind:
            return pulse
        axes = [
            center[k] + ((np.arange(n) + 0.5) / n - 0.5) * here.fov_nm[k]
            for k, n in ((0, here.shape[1]), (1, here.shape[0]))
        ]
        gx, gy = (np.exp(-((axis[:, None] - BLOBS[:, k]) ** 2) / (2 * 0.08**2)) for k, axis in enumerate(axes))
        image = np.random.default_rng((ordinal, 1)).poisson(40.0 * (gy @ gx.T) + 1.0).astype(np.float32)
        return Pulse({"HAADF": image}, pulse.electrons, pulse.pixels, pulse.seconds, float(ordinal))


@dataclass
class Driver:
    """Builds the instrument's process around a column that survives it."""

    column: object
    limits: InterlockLimits = InterlockLimits()

    def build(self, folder: Path, base: Path, seed: int) -> Instrument:
        drifts = isinstance(self.column, DriftingColumn)
        return Instrument(self.column, CAPABILITIES.model_copy(update={"drifts": drifts}), self.limits, folder)


class MeanPerceiver:
    """Reads the mean of a frame."""

    version = "mean"
    target_kind = "none"

    def build(self, device: str) -> MeanPerceiver:
        return self

    def read_overview(self, image, region, windows, electrons_per_pixel):
        return [Reading(value=float(image.mean()), variance=0.1) for _ in windows]

    def read_scan(self, image, region, electrons_per_pixel):
        assert np.isfinite(image).all()
        assert image.min() < image.max()
        return Reading(value=float(image.mean()), variance=0.1)


@dataclass(frozen=True)
class Reckless:
    """Decides at random, mostly against the rules: infeasible, outside, too slow, too large, twice, turned."""

    seed: int
    recklessness: float = 0.6

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int):
        rng = np.random.default_rng((self.seed, history.step))
        region = candidates[int(rng.integers(len(candidates)))]
        if rng.random() < self.recklessness:
            region = region.model_copy(update=self._twist(rng, region))
        elif any(history.feasible):
            region = candidates[int(rng.choice(np.flatnonzero(history.feasible)))]
        explanation = Explanation(policy="reckless", why="because")
        if rng.random() < 0.02:
            return Stop(reason="bored", explanation=explanation)
        return Scan(regions=(region,), explanation=explanation)

    @staticmethod
    def _twist(rng: np.random.Generator, region: ScanRegion) -> dict:
        choice = int(rng.integers(5))
        if choice == 0:
            return {"center_nm": tuple(rng.uniform(-2, 8, 2))}
        if choice == 1:
            return {"dwell_time_s": float(10 ** rng.uniform(-8, -2))}
        if choice == 2:
            return {"shape": tuple(int(n) for n in rng.integers(1, 120, 2))}
        if choice == 3:
            return {"rotation_rad": float(rng.uniform(-4, 4)), "center_nm": (3.0, 2.0)}
        return {"fov_nm": tuple(rng.uniform(0.05, 7, 2)), "center_nm": (3.0, 2.0)}


def configuration(
    policy,
    column,
    budget: Budget,
    *,
    overview: bool = True,
    limits=None,
    perceiver=None,
    drift=None,
    damage=None,
    areas=(),
    **stop,
) -> SessionConfig:
    """A session of the counting column: six candidates of 2 x 2 nm."""
    tables = Tables(
        session=SessionTable(name="test", match_nm=0.1),
        overview=OverviewPlan(shape=(8, 12), dwell_time_s=1e-6) if overview else None,
        scan=ScanPlan(fov_nm=(2.0, 2.0), shape=(8, 8), dwell_time_s=1e-5),
        drift=drift,
        damage=damage,
        areas=areas,
        budget=budget,
        stop=StopRules(**stop),
    )
    driver = Driver(column, limits or InterlockLimits())
    return SessionConfig(tables, driver, perceiver or MeanPerceiver(), policy, {}, Path("."))
