"""How many electrons went where: an exact, additive memory of every probe position, and the fluence that it implies.

Electrons are put on a fixed grid at the true probe positions (each shared linearly by the four nearest nodes); the
fluence at an atom is that map convolved with the probe, tails included, and interpolated linearly. The sharing and the
interpolation widen the probe by h^2/3 per axis, which is taken back from the source's Gaussian; what is left is an
error of at most 4 % of the peak under a single shot.

Electrons are counted in whole ticks, whose sums are exact in any order, and the fluence at a place is one fixed sum
over the nodes around it with weights >= 0. Rounding is monotone, so that fluence never falls as electrons are added,
and the point at which it reaches a threshold is, to the last bit, the same however a scan is cut into pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .optics import PROBE_EXTENT_A, Optics, probe_intensity

Array = NDArray[np.float64]
TICK = 2.0**-24
"""Electrons per tick; a node holds 2^53 ticks (5e8 electrons, some 9e9 e/A^2) before its sum needs rounding."""
MAX_GRID_STEP_A = 0.25
CELL_STEPS = 4
"""Grid steps per coarse cell; coarse cells carry the quick upper bound."""
FEW = 64
"""Up to this many atoms are summed one by one; more are read from one Fourier convolution."""
ROUNDING = 1e-12
"""Error of that convolution at most, relative to all electrons that it takes in under the peak of the probe."""


@dataclass(frozen=True)
class Packet:
    """Electrons at m points, in order, shared out to the nodes of a map: ``node`` [2, m] is the first (x, y) of the
    four nodes about each point and ``ticks`` [4, m] what they get: first, right, below, below right."""

    node: NDArray[np.int32]
    ticks: Array

    def __len__(self) -> int:
        return int(self.node.shape[1])

    def part(self, first: int, last: int) -> Packet:
        """The points from ``first`` to before ``last``."""
        return Packet(self.node[:, first:last], self.ticks[:, first:last])


class FluenceMap:
    """Electrons delivered to a rectangular world, and the fluence they make. Lengths angstrom, fluence e/A^2."""

    def __init__(self, optics: Optics, low_A: tuple[float, float], high_A: tuple[float, float]) -> None:
        """``low_A`` and ``high_A`` are opposite corners of the world. Electrons outside only count as ``lost``."""
        resolved = 1.0 / (2.0 * optics.band_limit_per_A)
        taps = 2 * math.ceil(0.5 * PROBE_EXTENT_A / min(MAX_GRID_STEP_A, resolved))
        self.step_A = PROBE_EXTENT_A / taps
        self._kernel = probe_intensity(optics, taps, extra_variance_A2=-(self.step_A**2) / 3.0)
        self._kernel *= TICK / self.step_A**2  # fluence per tick
        self._flipped = self._kernel[::-1, ::-1].copy()
        self._half = taps // 2
        self._low = np.asarray(low_A, dtype=np.float64)
        cells = np.ceil((np.asarray(high_A) - self._low) / (CELL_STEPS * self.step_A)).astype(int)[::-1]
        self._cells = np.zeros(cells)
        self._nodes = np.zeros(cells * CELL_STEPS + 1)
        self._ceiling = self._make_ceiling()
        self.lost = 0.0

    @property
    def electrons(self) -> float:
        """All electrons on the map (without the ``lost``)."""
        return float(self._nodes.sum()) * TICK

    @property
    def reach_A(self) -> float:
        """Along x or y, a probe further away than this adds nothing to the fluence at a point, angstrom."""
        return 0.5 * PROBE_EXTENT_A + 2.0 * self.step_A

    def packet(self, points_A: Array, electrons: ArrayLike) -> Packet:
        """Share out ``electrons`` (one number, or one for each point) at ``points_A`` [m, 2] (x, y). What falls outside
        the world is counted as lost; the rest is not on the map before :meth:`add`."""
        where = ((np.asarray(points_A).reshape(-1, 2) - self._low) / self.step_A).T
        limit = np.asarray(self._nodes.shape[::-1])[:, None] - 1
        inside = np.all((where >= 0.0) & (where < limit), axis=0)
        ticks = np.rint(np.broadcast_to(electrons, inside.shape) / TICK)
        self.lost += float(ticks[~inside].sum()) * TICK
        ticks[~inside] = 0.0
        where = np.where(inside, where, 0.0)
        node = where.astype(np.int32)
        x, y = where - node
        right = np.rint(ticks * x)  # halved and halved again, so that no share is negative and none is lost
        left = ticks - right
        below, below_right = np.rint(left * y), np.rint(right * y)
        return Packet(node, np.stack([left - below, right - below_right, below, below_right]))

    def bounds_A(self, packet: Packet) -> tuple[Array, Array]:
        """Corners (x, y) of a box outside which ``packet`` adds no fluence; an empty one if it brings nothing."""
        node = packet.node[:, packet.ticks.any(axis=0)]
        low, high = node.min(axis=1, initial=2**31 - 1), node.max(axis=1, initial=-(2**31)) + np.int64(1)
        return self._low + low * self.step_A - self.reach_A, self._low + high * self.step_A + self.reach_A

    def add(self, packet: Packet) -> None:
        """Put a packet on the map."""
        self._count(packet, packet.ticks)

    def remove(self, packet: Packet) -> None:
        """Take a packet off the map again; it is then to the last bit what it was before."""
        self._count(packet, -packet.ticks)

    def deposit(self, points_A: Array, electrons: ArrayLike) -> None:
        """Put ``electrons`` (one number, or one for each point) at ``points_A`` [m, 2] (x, y)."""
        self.add(self.packet(points_A, electrons))

    def first_reaching(self, site_A: Array, threshold: float, packet: Packet) -> int | None:
        """Index of the point of ``packet``, on the map already, at which the fluence at ``site_A`` (x, y) reaches
        ``threshold``, e/A^2; None if it is still below."""
        start, weights = self._receptor(site_A)
        frame = self._frame(start, weights)
        if float((frame * weights).sum()) < threshold:
            return None
        near, index = self._touching(packet, start, weights)
        ticks = packet.ticks[:, near]
        gains = (weights.ravel()[index] * ticks).sum(axis=0)
        given = gains > 0.0
        near, index, ticks, gains = near[given], index[:, given], ticks[:, given], gains[given]
        np.subtract.at(frame.reshape(-1), index.ravel(), ticks.ravel())

        def reached(points: int) -> bool:
            then = frame.copy()
            np.add.at(then.reshape(-1), index[:, :points].ravel(), ticks[:, :points].ravel())
            return float((then * weights).sum()) >= threshold

        # The running sum is right but for rounding, so that the guess is seldom moved.
        lacking = threshold - float((frame * weights).sum())
        points = min(int(np.searchsorted(np.cumsum(gains), lacking)) + 1, len(near))
        while points < len(near) and not reached(points):
            points += 1
        while points > 1 and reached(points - 1):
            points -= 1
        return int(near[points - 1]) if points else 0

    def before(self, site_A: Array, packet: Packet | None, point: int) -> float:
        """Fluence at ``site_A`` (x, y) before point ``point`` of ``packet``, all of which is on the map, e/A^2."""
        if packet is None:
            return self._one(site_A)
        start, weights = self._receptor(site_A)
        frame = self._frame(start, weights)
        later = packet.part(point, len(packet))
        near, index = self._touching(later, start, weights)
        np.subtract.at(frame.reshape(-1), index.ravel(), later.ticks[:, near].ravel())
        return float((frame * weights).sum())

    def may_reach(self, positions_A: Array, thresholds: Array) -> NDArray[np.bool_]:
        """False where the fluence at ``positions_A`` [n, 2] is surely below ``thresholds`` [n]; quick, for many."""
        maybe = self.ceiling_at(positions_A) >= thresholds
        if np.count_nonzero(maybe) > FEW:
            values, error = self._convolved(positions_A[maybe])
            maybe[maybe] = values + error >= thresholds[maybe]
        return maybe

    def at(self, positions_A: Array) -> Array:
        """Fluence [n] at ``positions_A`` [n, 2] inside the world, e/A^2."""
        positions = np.asarray(positions_A, dtype=np.float64).reshape(-1, 2)
        if len(positions) <= FEW:
            return np.array([self._one(position) for position in positions])
        values, error = self._convolved(positions)
        return np.where(values > error, values, 0.0)

    def ceiling_at(self, positions_A: Array) -> Array:
        """An upper bound of :meth:`at`, quick and coarse (a few times too high), [n], e/A^2."""
        from scipy import fft

        if not len(positions_A):
            return np.zeros(0)
        cell = np.floor((positions_A - self._low) / (CELL_STEPS * self.step_A)).astype(np.int64)
        reach = self._ceiling.shape[0] // 2
        low, high = cell.min(axis=0), cell.max(axis=0)
        source = _window(self._cells, low - reach, high + reach + 1)
        shape = [fft.next_fast_len(n, real=True) for n in source.shape]
        spectrum = fft.rfft2(source, shape, workers=1) * fft.rfft2(self._ceiling, shape, workers=1)
        # Index (i + reach, j + reach) of the convolution belongs to cell (i, j); rounding must not lower a bound.
        full = fft.irfft2(spectrum, shape, workers=1)
        local = cell - low + 2 * reach
        return np.asarray(full[local[:, 1], local[:, 0]] * (1 + 1e-9) + 1e-9 * source.sum() * self._ceiling.max())

    def _make_ceiling(self) -> Array:
        """Highest fluence per electron between any two points of two cells, by the cells' offset, [k, k]."""
        from scipy import ndimage

        # Points of two cells differ by less than one cell more than the offset; both interpolations add one step each.
        slack = CELL_STEPS + 2
        reach = math.ceil((self._half + slack) / CELL_STEPS)
        room = reach * CELL_STEPS - self._half
        padded = np.pad(self._kernel, ((room, room + 1), (room, room + 1)))
        highest = ndimage.maximum_filter(padded, size=2 * slack + 1, mode="constant")
        return np.asarray(highest[::CELL_STEPS, ::CELL_STEPS])

    def _count(self, packet: Packet, ticks: Array) -> None:
        x, y = packet.node
        wide = self._nodes.shape[1]
        first = y * np.int64(wide) + x
        nodes = self._nodes.reshape(-1)
        for share, offset in zip(ticks, (0, 1, wide, wide + 1), strict=True):
            np.add.at(nodes, first + offset, share)
        cell = y // CELL_STEPS * np.int64(self._cells.shape[1]) + x // CELL_STEPS
        np.add.at(self._cells.reshape(-1), cell, ticks.sum(axis=0))

    def _one(self, position_A: Array) -> float:
        start, weights = self._receptor(position_A)
        return float((self._frame(start, weights) * weights).sum())

    def _receptor(self, position_A: Array) -> tuple[NDArray[np.int64], Array]:
        """First node (x, y) and weights [k, k]: fluence at a position per tick at each node. The outermost are 0."""
        where = (np.asarray(position_A) - self._low) / self.step_A
        base = np.floor(where).astype(np.int64)
        tx, ty = where - base
        m = self._half
        rows = np.zeros((2 * m, 2 * m + 3))
        rows[:, 1:-2] = (1 - tx) * self._flipped
        rows[:, 2:-1] += tx * self._flipped
        weights = np.zeros((2 * m + 3, 2 * m + 3))
        weights[1:-2] = (1 - ty) * rows
        weights[2:-1] += ty * rows
        return base - m, weights

    def _frame(self, start: NDArray[np.int64], weights: Array) -> Array:
        """A copy of the nodes under ``weights``."""
        return np.array(_window(self._nodes, start, start + weights.shape[0]))

    def _touching(
        self, packet: Packet, start: NDArray[np.int64], weights: Array
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The points [p] of ``packet`` that count under ``weights``, and the flat indices of their nodes [4, p]."""
        k = weights.shape[0]
        x, y = packet.node[0] - start[0], packet.node[1] - start[1]
        near = np.flatnonzero((x >= 0) & (x < k - 1) & (y >= 0) & (y < k - 1))
        return near, y[near] * k + x[near] + np.array([[0], [1], [k], [k + 1]])

    def _convolved(self, positions_A: Array) -> tuple[Array, float]:
        """Fluence [n] at many places by one Fourier convolution, and the bound of its rounding error."""
        where = (positions_A - self._low) / self.step_A
        base = np.floor(where).astype(np.int64)
        (tx, ty), (x, y) = (where - base).T, (base - base.min(axis=0)).T
        nodes, error = self._node_fluence(base.min(axis=0), base.max(axis=0) + 1)
        top = nodes[y, x] * (1 - tx) + nodes[y, x + 1] * tx
        bottom = nodes[y + 1, x] * (1 - tx) + nodes[y + 1, x + 1] * tx
        return np.asarray(top * (1 - ty) + bottom * ty), error

    def _node_fluence(self, low: NDArray[np.int64], high: NDArray[np.int64]) -> tuple[Array, float]:
        """Fluence at the nodes from ``low`` to ``high`` (x, y), both included, and the bound of its error."""
        from scipy import fft

        m = self._half
        source = _window(self._nodes, low - m + 1, high + m + 1)
        shape = [fft.next_fast_len(n, real=True) for n in source.shape]
        spectrum = fft.rfft2(source, shape, workers=1)
        spectrum *= fft.rfft2(self._kernel, shape, workers=1)
        full = fft.irfft2(spectrum, shape, workers=1)
        first, (width, height) = 2 * m - 1, high - low + 1
        error = ROUNDING * float(source.sum() * self._kernel.max())
        return np.asarray(full[first : first + height, first : first + width]), error


def _window(array: Array, low: NDArray[np.int64], high: NDArray[np.int64]) -> Array:
    """``array[low_y:high_y, low_x:high_x]`` with zeros beyond the array; ``low`` and ``high`` are (x, y)."""
    limit = np.asarray(array.shape[::-1])
    inside_low, inside_high = np.clip(low, 0, limit), np.clip(high, 0, limit)
    cut = array[inside_low[1] : inside_high[1], inside_low[0] : inside_high[0]]
    before = np.clip(inside_low - low, 0, high - low)
    after = high - low - before - (inside_high - inside_low)
    if not (before.any() or after.any()):
        return cut
    return np.pad(cut, ((before[1], after[1]), (before[0], after[0])))
