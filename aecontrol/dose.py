"""What an exposure may cost, what has been charged, and whether the next one fits: pure arithmetic, the guard's rules.

Upper bounds (*bound*) come from the declared current and the commanded region; measured charges come from the
instrument. Electrons are whole numbers. The areal bound is kept per 1 nm tile of the specimen frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.types import INT64_MAX, Budget, Capabilities, Charge, ScanRegion
from aecontrol.units import electrons_per_second, fluence_e_per_A2

TILE_NM = 1.0
_DILATION_NM = 1.0  # probe tails and small drift: tiles this far outside the region are charged too
_MARGIN = 2  # tiles of a map beyond every side of the field
_GRID_TOLERANCE = 1e-4  # of a record pixel
_LEAST_NM = 1e-6  # of a region: far below any beam; a line of it is still a number
_EDGE_NM = 1e-6  # rounding of a region that was computed to end exactly at the field's edge


def bound_charge(region: ScanRegion, capabilities: Capabilities) -> Charge:
    """The most that exposing ``region`` can cost on this instrument (current x time x (1 + tolerance),
    flyback where the beam is not blanked, blanker latency; rounded up to whole electrons). Raises BadInput for more
    than 64 bits can count."""
    dwell_s = region.pixels * region.dwell_time_s
    flyback_s = region.shape[0] * capabilities.flyback_s
    back_s = flyback_s if capabilities.beam_on_in_flyback else 0.0
    seconds = dwell_s + flyback_s + capabilities.blanker_latency_s
    if capabilities.beam_current_pA is None:
        return Charge(electrons=None, pixels=region.pixels, seconds=seconds)
    rate = electrons_per_second(capabilities.beam_current_pA) * (1 + capabilities.current_tolerance)
    parked = rate * capabilities.blanker_latency_s
    peak = None
    if (error_nm := capabilities.beam_error_nm) is not None:
        back = rate * back_s * _way_back_share(region, error_nm)
        peak = tile_fluence(region, math.ceil(rate * dwell_s), error_nm) + fluence_e_per_A2(back + parked, TILE_NM**2)
    electrons = math.ceil(rate * (dwell_s + back_s) + parked)
    if max(electrons, region.pixels) > INT64_MAX:
        raise BadInput(
            f"an exposure of {region.pixels:.3g} pixels and {electrons:.3g} electrons; {INT64_MAX:.3g} can be counted",
            "use fewer pixels or a shorter dwell time",
        )
    return Charge(
        electrons=electrons,
        pixels=region.pixels,
        peak_fluence_e_per_A2=peak,
        seconds=seconds,
    )


def dwell_share(region: ScanRegion, capabilities: Capabilities) -> float:
    """The part of an exposure's electrons that falls on one pixel while it is read."""
    beam_on_s = region.pixels * region.dwell_time_s + capabilities.blanker_latency_s
    if capabilities.beam_on_in_flyback:
        beam_on_s += (region.shape[0] - 1) * capabilities.flyback_s
    return region.dwell_time_s / beam_on_s


def _way_back_share(region: ScanRegion, error_nm: float) -> float:
    """Largest share of the electrons of all ways back (straight and steady, one a line) that one tile can get: that
    many ways can cross it, each over no more than its diagonal."""
    diagonal = math.sqrt(2.0) * TILE_NM
    crossing = min(region.shape[0], math.floor((diagonal + 2.0 * error_nm) / region.pixel_size_nm[1]) + 2)
    way = region.fov_nm[0] - region.pixel_size_nm[0] - 2.0 * error_nm
    each = 1.0 if way <= diagonal else diagonal / way
    return crossing * each / region.shape[0]


def tile_fluence(region: ScanRegion, electrons: int, error_nm: float = 0.0) -> float:
    """Upper bound of the mean fluence (e/A^2) that ``electrons`` spread evenly over the pixels of ``region`` can put
    into any square tile of ``TILE_NM``, wherever the tile lies, with every point up to ``error_nm`` off its place.

    What falls into a tile was meant for the tile widened by the error on every side, T below. The number of scan points
    in it is at most (floor(T/px) + 1)(floor(T/py) + 1) when the scan is along the tile's sides, and at most
    (T + hypot(px, py))^2 / (px py) at any angle, because the cells of those points lie inside the tile widened by one
    cell diagonal.
    """
    px, py = region.pixel_size_nm
    side = TILE_NM + 2.0 * error_nm
    quarter_turns = region.rotation_rad / (math.pi / 2)
    if abs(quarter_turns - round(quarter_turns)) < 1e-9:
        points: float = (math.floor(side / px + 1e-9) + 1) * (math.floor(side / py + 1e-9) + 1)
    else:
        points = (side + math.hypot(px, py)) ** 2 / (px * py)
    points = min(points, region.pixels)
    return fluence_e_per_A2(electrons * points / region.pixels, TILE_NM**2)


@dataclass(frozen=True)
class Totals:
    """Sum of charges so far; ``electrons`` counts only where they are known."""

    electrons: int = 0
    pixels: int = 0
    damage: float = 0.0
    seconds: float = 0.0

    def plus(self, charge: Charge, extra_seconds: float = 0.0) -> Totals:
        """These totals with one more charge."""
        return Totals(
            electrons=self.electrons + (charge.electrons or 0),
            pixels=self.pixels + charge.pixels,
            damage=self.damage + charge.damage,
            seconds=self.seconds + charge.seconds + extra_seconds,
        )


def total(charges: Iterable[Charge]) -> Totals:
    """Sum of charges."""
    result = Totals()
    for charge in charges:
        result = result.plus(charge)
    return result


class TileMap:
    """Bound of the fluence (e/A^2) put into every 1 nm tile of the specimen so far. A value: ``add`` returns a new map.

    ``fluence`` [ny, nx]; its first tile begins at ``origin`` (x, y) tiles, 2 nm outside the field. A map grows when the
    stage or drift has brought another part of the specimen into the field.
    """

    def __init__(
        self,
        field_nm: tuple[float, float],
        fluence: NDArray[np.float64] | None = None,
        error_nm: float = 0.0,
        origin: tuple[int, int] = (-_MARGIN, -_MARGIN),
    ) -> None:
        """``error_nm``: how far the beam can be from where it was told to go."""
        self.field_nm, self.error_nm, self.origin = field_nm, error_nm, origin
        nx, ny = (math.ceil(side / TILE_NM) + 2 * _MARGIN for side in field_nm)
        self.fluence: NDArray[np.float64] = np.zeros((ny, nx)) if fluence is None else fluence

    @classmethod
    def of(cls, capabilities: Capabilities) -> TileMap:
        """An empty map of an instrument's field."""
        return cls(capabilities.field_nm, error_nm=capabilities.beam_error_nm or 0.0)

    def touched(self, region: ScanRegion) -> NDArray[np.bool_]:
        """Mask of the map's tiles that meet ``region`` dilated by 1 nm and the position error (a superset: exact at any
        rotation)."""
        ny, nx = self.fluence.shape
        x = (np.arange(nx) + self.origin[0] + 0.5) * TILE_NM - region.center_nm[0]
        y = (np.arange(ny) + self.origin[1] + 0.5)[:, None] * TILE_NM - region.center_nm[1]
        c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
        reach = self._reach(c, s)
        u, v = c * x + s * y, -s * x + c * y
        inside: NDArray[np.bool_] = (np.abs(u) <= region.fov_nm[0] / 2 + reach) & (
            np.abs(v) <= region.fov_nm[1] / 2 + reach
        )
        return inside

    def peak_after(self, region: ScanRegion, added_e_per_A2: float) -> float:
        """Highest bound among the tiles that ``region`` would touch, once it has been added."""
        return float(self.fluence[self.touched(region)].max(initial=0.0)) + added_e_per_A2

    def add(self, region: ScanRegion, added_e_per_A2: float) -> TileMap:
        """The map with ``added_e_per_A2`` in every tile that ``region`` touches, grown to hold them all."""
        grown = self._grown(region)
        return TileMap(
            self.field_nm, grown.fluence + added_e_per_A2 * grown.touched(region), self.error_nm, grown.origin
        )

    def _reach(self, c: float, s: float) -> float:
        """How far outside a region, along its own axes, a touched tile's centre can lie: with half a tile, seen along
        these axes."""
        return _DILATION_NM + self.error_nm + TILE_NM / 2 * (abs(c) + abs(s))

    def _grown(self, region: ScanRegion) -> TileMap:
        """This map with room for ``region``; the same one for a region of the field."""
        if outside_field(region, self.field_nm) is None:
            return self
        ny, nx = self.fluence.shape
        start, end = np.array(self.origin), np.add(self.origin, (nx, ny))
        corners, reach = np.array(region.corners_nm()) / TILE_NM, math.sqrt(2.0) * self._reach(1.0, 1.0) / TILE_NM
        low = np.minimum(np.floor(corners.min(axis=0) - reach).astype(int), start)
        high = np.maximum(np.ceil(corners.max(axis=0) + reach).astype(int), end)
        (left, top), (right, bottom) = start - low, high - end
        fluence = np.pad(self.fluence, ((top, bottom), (left, right)))
        return TileMap(self.field_nm, fluence, self.error_nm, (int(low[0]), int(low[1])))


def outside_field(region: ScanRegion, field_nm: tuple[float, float]) -> str | None:
    """Why ``region`` is not inside the field, or None. Pixels are half-open cells, so a region may touch the edge."""
    for x, y in region.corners_nm():
        if x < -_EDGE_NM or y < -_EDGE_NM or x > field_nm[0] + _EDGE_NM or y > field_nm[1] + _EDGE_NM:
            return (
                f"the region's corner ({x:.4g}, {y:.4g}) nm lies outside the field "
                f"0..{field_nm[0]:g} x 0..{field_nm[1]:g} nm"
            )
    return None


def off_grid(region: ScanRegion, pixel_nm: float) -> str | None:
    """Why a record with pixels of ``pixel_nm`` cannot answer for ``region``, or None: it holds no other rotation, no
    finer pixels, and nothing between its own."""
    if region.rotation_rad != 0.0:
        return f"a record cannot be turned by {region.rotation_rad:g} rad; use rotation_rad = 0"
    for side, name in ((0, "x"), (1, "y")):
        step = region.pixel_size_nm[side] / pixel_nm
        start = (region.center_nm[side] - region.fov_nm[side] / 2) / pixel_nm
        if round(step) < 1 or abs(step - round(step)) > _GRID_TOLERANCE:
            return f"pixels of {step:g} record pixels along {name}; a record has whole multiples of {pixel_nm:g} nm"
        if abs(start - round(start)) > _GRID_TOLERANCE:
            return f"the region starts at {start:g} record pixels along {name}, between two of them"
    return None


def over_limits(region: ScanRegion, capabilities: Capabilities) -> str | None:
    """Why the instrument cannot scan ``region`` (field, dwell time, frame size, a record's pixel grid), or None."""
    low, high = capabilities.dwell_time_range_s
    if not low <= region.dwell_time_s <= high:
        return f"dwell time {region.dwell_time_s:g} s is outside {low:g}..{high:g} s"
    if region.pixels > capabilities.max_pixels:
        return f"{region.pixels} pixels are more than the largest frame, {capabilities.max_pixels}"
    if region.signal == "spectra" and capabilities.spectra is None:
        return "this instrument records no spectra"
    if min(region.fov_nm) < _LEAST_NM:
        return f"a region of {region.fov_nm[0]:g} x {region.fov_nm[1]:g} nm; the smallest side is {_LEAST_NM:g} nm"
    if reason := outside_field(region.sent, capabilities.field_nm):
        return reason
    return None if capabilities.pixel_size_nm is None else off_grid(region.sent, capabilities.pixel_size_nm)


def over_budget(
    region: ScanRegion, bound: Charge, budget: Budget, charged: Totals, tiles: TileMap, extra_seconds: float = 0.0
) -> str | None:
    """Why ``bound`` on top of what is ``charged`` does not fit ``budget``, or None.

    A budget in a currency that the instrument does not meter (electrons on a record of unknown dose) refuses
    everything: what cannot be counted cannot be kept.
    """
    checks: Sequence[tuple[str, float | None, float | None]] = (
        ("electrons", budget.electrons, None if bound.electrons is None else charged.electrons + bound.electrons),
        ("pixels", budget.pixels, charged.pixels + bound.pixels),
        ("damage", budget.damage, charged.damage + bound.damage),
        ("seconds", budget.seconds, charged.seconds + bound.seconds + extra_seconds),
        (
            "e/A^2 in one 1 nm tile",
            budget.peak_fluence_e_per_A2,
            None
            if bound.peak_fluence_e_per_A2 is None
            else tiles.peak_after(region, bound.peak_fluence_e_per_A2)
            if budget.peak_fluence_e_per_A2 is not None
            else 0.0,
        ),
    )
    for name, limit, after in checks:
        if limit is None:
            continue
        if after is None:
            why = "the instrument does not meter them, or the beam drifts without a bound ([drift] would give it one)"
            return f"a budget of {limit:g} {name} cannot be kept: {why}"
        if after > limit:
            return f"it would bring the charge to {after:.6g} {name}; the budget is {limit:.6g}"
    return None
