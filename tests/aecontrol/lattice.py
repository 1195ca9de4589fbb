"""A small scripted session with everything that a report can show: a drawn lattice with vacancies, a perceiver that
reads it, an embedding, a policy with posterior maps. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aecontrol.config import SessionConfig, SessionTable, Tables
from aecontrol.exposure import InterlockLimits
from aecontrol.protocols import History, Reading
from aecontrol.types import (
    ATOM_LABELS,
    Budget,
    Capabilities,
    Explanation,
    OverviewPlan,
    Scan,
    ScanPlan,
    ScanRegion,
    StopRules,
)
from drivers.instrument import Instrument

from .parts import Pulse

FIELD_NM = (12.0, 9.0)
PATCH = 9


@dataclass
class Sheet:
    """Atoms [n, 2] and vacant sites [m, 2] of a square lattice, nm."""

    atoms: np.ndarray
    vacancies: np.ndarray

    @classmethod
    def draw(cls, seed: int = 0, pitch_nm: float = 0.3) -> Sheet:
        rng = np.random.default_rng(seed)
        x, y = np.meshgrid(np.arange(0.15, FIELD_NM[0], pitch_nm), np.arange(0.15, FIELD_NM[1], pitch_nm))
        sites = np.stack([x.ravel(), y.ravel()], axis=1)
        missing = rng.random(len(sites)) < 0.25 * np.exp(-((sites - (8.5, 3.0)) ** 2).sum(axis=1) / 4)
        return cls(sites[~missing], sites[missing])

    def image(self, region: ScanRegion) -> np.ndarray:
        rows, cols = region.shape
        px, py = region.pixel_size_nm
        left, top = region.center_nm[0] - region.fov_nm[0] / 2, region.center_nm[1] - region.fov_nm[1] / 2
        gx = np.exp(-(((np.arange(cols)[:, None] + 0.5) * px + left - self.atoms[:, 0]) ** 2) / (2 * 0.06**2))
        gy = np.exp(-(((np.arange(rows)[:, None] + 0.5) * py + top - self.atoms[:, 1]) ** 2) / (2 * 0.06**2))
        return gy @ gx.T


@dataclass
class LatticeColumn:
    """Exposes the sheet; counts what it delivers."""

    sheet: Sheet
    meter: int | None = 0

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        rng = np.random.default_rng(ordinal)
        image = rng.poisson(20 * self.sheet.image(region) + 2).astype(np.float32)
        if self.meter is None:
            return Pulse({"HAADF": image}, None, region.pixels, 0.0)
        electrons = int(region.pixels * region.dwell_time_s * 6.2e7)
        self.meter += electrons
        return Pulse({"HAADF": image}, electrons, region.pixels, region.pixels * region.dwell_time_s)

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """The sheet does not change."""

    def targets(self, kind: str) -> tuple[np.ndarray, tuple[str, ...]]:
        return self.sheet.vacancies, ("S1",) * len(self.sheet.vacancies)


@dataclass
class LatticeDriver:
    column: LatticeColumn

    def build(self, folder: Path, base: Path, seed: int) -> Instrument:
        record = self.column.meter is None
        capabilities = Capabilities(
            identity="drawn lattice",
            simulated=True,
            unit="pixels" if record else "electrons",
            field_nm=FIELD_NM,
            channels=("HAADF",),
            beam_current_pA=None if record else 10.0,
        )
        return Instrument(self.column, capabilities, InterlockLimits(), folder)


@dataclass
class PlaneEmbedding:
    """Mean and contrast of a patch."""

    version: str = "plane"

    def encode(self, patches: np.ndarray) -> np.ndarray:
        return np.stack([patches.mean(axis=(1, 2)), patches.std(axis=(1, 2))], axis=1).astype(np.float64)

    def save(self) -> bytes:
        return b"plane"


@dataclass
class LatticePerceiver:
    """Knows the sheet, and reports every ninth vacancy a little off."""

    sheet: Sheet
    note: str = ""
    version: str = "lattice"
    target_kind: str = "vacancy"

    def build(self, device: str) -> LatticePerceiver:
        return self

    def read_overview(self, image: Any, region: ScanRegion, windows: Sequence[ScanRegion], e: Any) -> list[Reading]:
        return [Reading(value=float(len(self._inside(self.sheet.vacancies, w)) ** 0.5), variance=0.3) for w in windows]

    def read_scan(self, image: Any, region: ScanRegion, electrons_per_pixel: float | None) -> Reading:
        vacant = self._inside(self.sheet.vacancies, region)
        vacant[8::9] += 0.15
        atoms = self._inside(self.sheet.atoms, region)
        xy = np.concatenate([vacant, atoms])
        table = np.zeros((len(xy), 8))
        table[:, :2] = xy
        table[: len(vacant), 2] = ATOM_LABELS.index("S1")
        table[len(vacant) :, 2] = ATOM_LABELS.index("Mo")
        table[:, 3] = 0.9
        table[:, 7] = np.where(np.arange(len(xy)) < len(vacant), 0.8, 0.1)
        px, py = region.pixel_size_nm
        col = np.floor((xy[:, 0] - region.center_nm[0] + region.fov_nm[0] / 2) / px).astype(int)
        row = np.floor((xy[:, 1] - region.center_nm[1] + region.fov_nm[1] / 2) / py).astype(int)
        h = PATCH // 2
        keep = np.flatnonzero((col >= h) & (row >= h) & (col < region.shape[1] - h) & (row < region.shape[0] - h))
        patches = [image[row[k] - h : row[k] + h + 1, col[k] - h : col[k] + h + 1] for k in keep]
        return Reading(
            value=float(len(vacant)),
            variance=1.0,
            atoms=table,
            found=tuple(range(len(vacant))),
            patches=np.asarray(patches, np.float32).reshape(-1, PATCH, PATCH),
            patch_atoms=keep.astype(np.int64),
            note=self.note,
        )

    def fit_embedding(self, patches: np.ndarray, seed: int) -> PlaneEmbedding:
        return PlaneEmbedding()

    def load_embedding(self, data: bytes) -> PlaneEmbedding:
        return PlaneEmbedding()

    def value_from_latents(self, *_: Any) -> tuple[None, None]:
        return None, None

    @staticmethod
    def _inside(xy: np.ndarray, region: ScanRegion) -> np.ndarray:
        half = np.array(region.fov_nm) / 2
        return xy[(np.abs(xy - region.center_nm) < half).all(axis=1)].copy()


@dataclass(frozen=True)
class NearBest:
    """Goes next to the best window so far, and draws a posterior."""

    why: str = "next to the best so far"

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Scan:
        centres = np.array([c.center_nm for c in candidates])
        mean = np.array([o.value for o in history.overview]) if history.overview else np.zeros(len(candidates))
        sd = np.full(len(candidates), 1.0)
        for index, scan in zip(history.scanned, history.scans, strict=True):
            near = np.exp(-((centres - centres[index]) ** 2).sum(axis=1) / 8)
            mean = mean + near * (scan.value or 0.0) / 5
            sd = sd * (1 - 0.8 * near)
        pick = int(np.argmax(np.where(history.feasible, mean, -np.inf)))
        explanation = Explanation(
            policy="near_best",
            why=self.why,
            candidate=pick,
            acquisition=float(mean[pick]),
            mean_map=tuple(mean.tolist()),
            sd_map=tuple(sd.tolist()),
        )
        return Scan(regions=(candidates[pick],), explanation=explanation)


def lattice_session(
    *,
    electrons: int | None = 16_000_000,
    pixels: int | None = None,
    column: Any = None,
    why: str = NearBest.why,
    note: str = "",
    learn: int = 100,
    raw: dict[str, Any] | None = None,
    policy: Any = None,
    overview: bool = True,
    **stop: int,
) -> SessionConfig:
    """A session of 3 x 3 nm windows on the drawn lattice; ``column`` may be wrapped to misbehave."""
    sheet = Sheet.draw()
    column = column(LatticeColumn(sheet)) if column else LatticeColumn(sheet, None if electrons is None else 0)
    tables = Tables(
        session=SessionTable(name="lattice", match_nm=0.1, learn_patches=learn),
        overview=OverviewPlan(shape=(90, 120), dwell_time_s=2e-6) if overview else None,
        scan=ScanPlan(fov_nm=(3.0, 3.0), shape=(64, 64), dwell_time_s=8e-6),
        budget=Budget(electrons=electrons, pixels=pixels),
        stop=StopRules(**stop),
    )
    table = (
        {"session": {"name": "lattice"}, "budget": {"electrons": electrons, "pixels": pixels}} if raw is None else raw
    )
    return SessionConfig(
        tables, LatticeDriver(column), LatticePerceiver(sheet, note), policy or NearBest(why), table, Path(".")
    )
