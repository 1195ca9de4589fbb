"""What an exposure would harm: its electrons tile by tile, and what the response of the specimen makes of them.

Damage is counted in nm^2 of wholly damaged specimen: the sum over 1 nm tiles of weight x area x share damaged. Unlike
the areal bound of ``dose``, which nothing may exceed, these are expectations with their uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from aecontrol.dose import TILE_NM
from aecontrol.response import Response
from aecontrol.types import AreaPlan, DamagePlan, ScanRegion
from aecontrol.units import nm_to_angstrom

Floats = NDArray[np.float64]
MARGIN = 4
"""Tiles of the ground beyond every side of the field: the reach of tails."""
TAIL_SHARE, TAIL_FROM_NM, TAIL_TILES = 0.028, 0.5, 3
"""Share of a focused probe that falls farther than this from its middle, as r^-3 (the limit of the diffraction pattern
of an aperture; the share was computed for 80 kV, 30 mrad), and how far it is followed."""
POINTS_PER_NM = 16
"""Fineness at which a turned region is laid over the tiles."""
TILES_AT_ONCE = 4096
"""Tiles whose damage is computed together: each takes a number a draw, and an overview may have a million."""
CHANCES = tuple(NormalDist().inv_cdf((k + 0.5) / 16) for k in range(16))
"""Equally likely deviates of what chance adds."""


@dataclass(frozen=True)
class Ground:
    """The specimen tile by tile, row by row: ``shape`` (rows, columns), index of the ``phase`` [n], ``weight`` [n] with
    which damage there counts."""

    shape: tuple[int, int]
    phase: NDArray[np.int64]
    weight: Floats

    @property
    def fresh(self) -> Floats:
        """The fluence [n] before the first electron."""
        return np.zeros(len(self.phase))


@dataclass(frozen=True)
class Footprint:
    """Where the electrons of an exposure fall: ``tiles`` [n] and the ``share`` [n] of all electrons that each gets."""

    tiles: NDArray[np.int64]
    share: Floats

    def among(self, tiles: NDArray[np.bool_]) -> Footprint:
        """The part of it in the ``tiles`` [of the ground] that are marked."""
        kept = tiles[self.tiles]
        return Footprint(self.tiles[kept], self.share[kept])

    def added(self, electrons: float) -> Floats:
        """Fluence [n] that so many electrons add, e/A^2."""
        return electrons * self.share / nm_to_angstrom(TILE_NM) ** 2


@dataclass(frozen=True)
class Forecast:
    """Damage of an exposure, nm^2: its ``mean`` in each draw of the response [draws] and the standard deviation
    ``chance`` [draws] that the finite number of atoms adds."""

    mean: Floats
    chance: Floats

    def blurred(self, relative: float) -> Forecast:
        """The same where the electrons are uncertain by the relative standard deviation ``relative``."""
        return Forecast(self.mean, np.hypot(self.chance, relative * self.mean))

    @property
    def expected(self) -> float:
        """Its mean."""
        return float(self.mean.mean())

    def quantile(self, q: float) -> float:
        """What it does not exceed with the chance ``q``."""
        every = self.mean[:, None] + self.chance[:, None] * np.array(CHANCES)
        return max(float(np.quantile(every, q)), 0.0)

    def exceeds(self, limit: float) -> float:
        """Chance that it is more than ``limit``."""
        every = self.mean[:, None] + self.chance[:, None] * np.array(CHANCES)
        return float((every > limit).mean())


def phases_of(plan: DamagePlan, areas: Sequence[AreaPlan]) -> tuple[str, ...]:
    """Names of the phases, that of the specimen where nothing else is said first."""
    named = [reference.phase for reference in plan.references] or ["specimen"]
    return tuple(dict.fromkeys((*named, *(area.phase for area in areas if area.phase is not None))))


@lru_cache(maxsize=8)
def ground(plan: DamagePlan, areas: tuple[AreaPlan, ...], field_nm: tuple[float, float]) -> Ground:
    """The specimen as the plan describes it. Damage to a sacrificed place does not count."""
    phases, shape = phases_of(plan, areas), _shape(field_nm)
    phase, weight = np.zeros(shape, dtype=np.int64), np.ones(shape)
    for area in areas:
        inside = _tiles_in(field_nm, area.center_nm, area.fov_nm, 0.0)
        weight[inside] = area.weight
        phase[inside] = 0 if area.phase is None else phases.index(area.phase)
    for reference in plan.references:
        inside = _tiles_in(field_nm, reference.center_nm, plan.fov_nm, 0.5 * TILE_NM)
        weight[inside], phase[inside] = 0.0, phases.index(reference.phase)
    return Ground(shape, phase.ravel(), weight.ravel())


@lru_cache(maxsize=64)
def area_tiles(area: AreaPlan, field_nm: tuple[float, float]) -> NDArray[np.bool_]:
    """Mask [n] of the ground's tiles that meet an area."""
    return _tiles_in(field_nm, area.center_nm, area.fov_nm, 0.5 * TILE_NM).ravel()


def _shape(field_nm: tuple[float, float]) -> tuple[int, int]:
    """Rows and columns of the ground of a field."""
    width, height = (math.ceil(side / TILE_NM) + 2 * MARGIN for side in field_nm)
    return height, width


def _tiles_in(
    field_nm: tuple[float, float], center_nm: tuple[float, float], fov_nm: tuple[float, float], grown_nm: float
) -> NDArray[np.bool_]:
    """The tiles [rows, cols] whose middle lies in a rectangle grown by so much on every side."""
    rows, cols = _shape(field_nm)
    x, y = TILE_NM * (np.arange(cols) - MARGIN + 0.5), TILE_NM * (np.arange(rows) - MARGIN + 0.5)
    across = np.abs(x - center_nm[0]) < fov_nm[0] / 2 + grown_nm
    down = np.abs(y - center_nm[1]) < fov_nm[1] / 2 + grown_nm
    return np.asarray(down[:, None] & across)


@lru_cache(maxsize=16384)
def footprint(region: ScanRegion, field_nm: tuple[float, float]) -> Footprint:
    """Where the electrons of scanning ``region`` fall, on the ground of a field, tails included. Ways back between the
    lines cross the region evenly; what falls beyond the ground's margin is left out."""
    fast, slow = (max(1, math.ceil(side * POINTS_PER_NM)) for side in region.fov_nm)
    u = region.fov_nm[0] * ((np.arange(fast) + 0.5) / fast - 0.5)
    v = region.fov_nm[1] * ((np.arange(slow) + 0.5) / slow - 0.5)[:, None]
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    across, down = (c * u, c * v) if s == 0.0 else (c * u - s * v, s * u + c * v)
    x = np.floor((region.center_nm[0] + across) / TILE_NM).astype(np.int64)
    y = np.floor((region.center_nm[1] + down) / TILE_NM).astype(np.int64)
    left, top = int(x.min()) - TAIL_TILES, int(y.min()) - TAIL_TILES
    wide, high = int(x.max()) + TAIL_TILES + 1 - left, int(y.max()) + TAIL_TILES + 1 - top
    if s == 0.0:  # an overview may be large
        counted = np.outer(np.bincount(y.ravel() - top, minlength=high), np.bincount(x.ravel() - left, minlength=wide))
    else:
        counted = np.bincount(((y - top) * wide + x - left).ravel(), minlength=wide * high).reshape(high, wide)
    spread = _with_tails(counted / (fast * slow))
    rows, cols = _shape(field_nm)
    row, col = np.nonzero(spread > 0.0)
    y_at, x_at = row + top + MARGIN, col + left + MARGIN
    there = (x_at >= 0) & (x_at < cols) & (y_at >= 0) & (y_at < rows)
    return Footprint((y_at * cols + x_at)[there], spread[row, col][there])


def _with_tails(share: Floats) -> Floats:
    """``share`` [rows, cols] with the tails of the probe spread over the neighbours."""
    from scipy.ndimage import convolve

    reach = np.arange(-TAIL_TILES, TAIL_TILES + 1) * TILE_NM
    r = np.hypot(reach[:, None], reach)
    kernel = np.zeros_like(r)
    away = r > 0.0
    kernel[away] = TAIL_SHARE * TAIL_FROM_NM * TILE_NM**2 / (2.0 * math.pi * r[away] ** 3)
    kernel[~away] = 1.0 - kernel.sum()
    return np.asarray(convolve(share, kernel, mode="constant"))


def forecast(
    plan: DamagePlan,
    response: Response,
    on: Ground,
    fluence: Floats,
    where: Footprint,
    electrons: float,
) -> Forecast:
    """Damage that ``electrons`` more would do where the ground has received ``fluence`` [n] e/A^2.

    In a tile of area a with N = a x sites bond units, chance adds the variance of a binomial number of them,
    (a w)^2 p (1 - p) / N with p the share that breaks.
    """
    before = fluence[where.tiles]
    after = before + where.added(electrons)
    mean, variance = np.zeros((2, len(response.amplitude)))
    for start in range(0, len(where.tiles), TILES_AT_ONCE):
        some = slice(start, start + TILES_AT_ONCE)
        phase, weight = on.phase[where.tiles[some]], on.weight[where.tiles[some]] * TILE_NM**2
        broken = response.damaged(phase, after[some]) - response.damaged(phase, before[some])
        mean += (weight * broken).sum(axis=1)
        variance += (weight**2 * broken * (1.0 - broken)).sum(axis=1) / (plan.sites_per_nm2 * TILE_NM**2)
    return Forecast(mean, np.sqrt(np.maximum(variance, 0.0)))


def total(plan: DamagePlan, response: Response, on: Ground, fluence: Floats) -> Forecast:
    """Damage of the whole ground by the ``fluence`` [n] e/A^2 that it has received."""
    tiles = np.flatnonzero(fluence > 0.0)
    everything = Footprint(tiles, fluence[tiles] * nm_to_angstrom(TILE_NM) ** 2)
    return forecast(plan, response, on, on.fresh, everything, 1.0)


def intact(response: Response, on: Ground, fluence: Floats, where: Footprint) -> float:
    """Expected share of the matter under a footprint that is still undamaged."""
    left = 1.0 - response.damaged(on.phase[where.tiles], fluence[where.tiles]).mean(axis=0)
    return float((left * where.share).sum() / where.share.sum())


def local_fluence(points_nm: Floats, region: ScanRegion, electrons: float) -> Floats:
    """Fluence [n] that an exposure puts at points [n, 2] of the specimen, e/A^2: its mean inside, nothing outside."""
    offset = points_nm - np.array(region.center_nm)
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    u, v = c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0]
    inside = (np.abs(u) <= region.fov_nm[0] / 2) & (np.abs(v) <= region.fov_nm[1] / 2)
    return np.asarray(inside * (electrons / (nm_to_angstrom(1.0) ** 2 * region.area_nm2)))
