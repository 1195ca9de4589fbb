"""Limits of single areas of the specimen: how much of an exposure falls into each, and whether that still fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from aecontrol.dose import TILE_NM, TileMap
from aecontrol.types import AreaPlan, Capabilities, Charge, ScanRegion
from aecontrol.units import electrons_per_second

REACH_NM = 1.0
"""What falls this near an area counts as falling into it: tails of the probe."""


@dataclass(frozen=True)
class AreaCharge:
    """What has been charged to one area: electrons and time."""

    electrons: int = 0
    seconds: float = 0.0

    def plus(self, other: AreaCharge) -> AreaCharge:
        """Both together."""
        return AreaCharge(self.electrons + other.electrons, self.seconds + other.seconds)

    def minus(self, other: AreaCharge) -> AreaCharge:
        """This without the other."""
        return AreaCharge(self.electrons - other.electrons, max(self.seconds - other.seconds, 0.0))


@lru_cache(maxsize=65536)
def share_within(region: ScanRegion, area: AreaPlan, error_nm: float) -> float:
    """Upper bound of the share of an exposure's pixels that fall into an area, each up to ``error_nm`` off its place;
    0 when none can."""
    px, py = region.pixel_size_nm
    u = (np.arange(region.shape[1]) + 0.5) * px - region.fov_nm[0] / 2
    v = ((np.arange(region.shape[0]) + 0.5) * py - region.fov_nm[1] / 2)[:, None]
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    reach = REACH_NM + error_nm + math.hypot(px, py)  # a pixel more: ways back and the edges of pixels
    across = np.abs(region.center_nm[0] - area.center_nm[0] + c * u - s * v) <= area.fov_nm[0] / 2 + reach
    down = np.abs(region.center_nm[1] - area.center_nm[1] + s * u + c * v) <= area.fov_nm[1] / 2 + reach
    return float((across & down).mean())


def charge_within(region: ScanRegion, charge: Charge, area: AreaPlan, instrument: Capabilities) -> AreaCharge:
    """The part of a charge, damage aside, that is put down to an area: never less than what can have fallen there."""
    error_nm = instrument.beam_error_nm
    there = region.model_copy(
        update={"shift_nm": (0.0, 0.0)}
    )  # of the specimen, and remembered wherever it has drifted
    share = 1.0 if error_nm is None else share_within(there, area, error_nm)  # without a bound it can be anywhere
    if share == 0.0 or not (charge.seconds or charge.electrons):
        return AreaCharge()
    parked = 0.0
    if instrument.beam_current_pA is not None:
        current = electrons_per_second(instrument.beam_current_pA) * (1.0 + instrument.current_tolerance)
        parked = current * instrument.blanker_latency_s
    electrons = min(math.ceil(share * (charge.electrons or 0) + parked), charge.electrons or 0)
    return AreaCharge(electrons, share * charge.seconds + instrument.blanker_latency_s)


def over_areas(
    region: ScanRegion,
    bound: Charge,
    areas: Sequence[AreaPlan],
    charged: Sequence[AreaCharge],
    damage: Sequence[tuple[float, float]],
    tiles: TileMap,
    instrument: Capabilities,
) -> str | None:
    """Why ``bound`` on top of what is ``charged`` to each area does not fit its limits, or None. ``damage``: what
    each area has been charged, and what it would be, nm^2."""
    for area, spent, (harm, harmed) in zip(areas, charged, damage, strict=True):
        within = charge_within(region, bound, area, instrument)
        after = spent.plus(within)
        uncounted = bound.electrons is None and within != AreaCharge()  # what cannot be counted cannot be kept
        limits: list[tuple[str, float | None, float, float]] = [
            ("electrons", area.electrons, math.inf if uncounted else after.electrons, spent.electrons),
            ("seconds", area.seconds, after.seconds, spent.seconds),
            ("nm^2 of damage", area.damage, math.inf if instrument.beam_error_nm is None else harmed, harm),
        ]
        if area.peak_fluence_e_per_A2 is not None:
            before, peak = _peak(area, region, bound, tiles)
            peak = math.inf if instrument.beam_error_nm is None else peak
            limits.append(("e/A^2 in one 1 nm tile", area.peak_fluence_e_per_A2, peak, before))
        for name, limit, then, now in limits:
            if limit is not None and then > limit and then > now:
                return f"it would bring the area {area.name!r} to {then:.6g} {name}; its limit is {limit:.6g}"
    return None


def _peak(area: AreaPlan, region: ScanRegion, bound: Charge, tiles: TileMap) -> tuple[float, float]:
    """Highest bound of the fluence in a tile of an area now, and after an exposure."""
    rows, cols = tiles.fluence.shape
    x = (np.arange(cols) + tiles.origin[0] + 0.5) * TILE_NM - area.center_nm[0]
    y = (np.arange(rows) + tiles.origin[1] + 0.5)[:, None] * TILE_NM - area.center_nm[1]
    inside = (np.abs(x) < (area.fov_nm[0] + TILE_NM) / 2) & (np.abs(y) < (area.fov_nm[1] + TILE_NM) / 2)
    before = float(tiles.fluence[inside].max(initial=0.0))
    touched = inside & tiles.touched(region)
    if not touched.any():
        return before, before
    added = math.inf if bound.peak_fluence_e_per_A2 is None else bound.peak_fluence_e_per_A2
    return before, max(before, float(tiles.fluence[touched].max()) + added)


def same_names(areas: Sequence[AreaPlan]) -> Iterator[str]:
    """Names that more than one area has."""
    names = [area.name for area in areas]
    yield from sorted({name for name in names if names.count(name) > 1})
