"""Columns of random two-dimensional lattices: single crystals, grains that meet, polar domains that meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Distance = Callable[[Floats], Floats]
"""How far [...] places [..., 2] (nm) are from the nearest border, nm."""

MARGIN_NM = 0.4
"""Columns this far outside the frame still shine into it."""
LEAST_TURN_DEG = 6.0
"""Grains that differ by less are not told apart: their boundary is a row of dislocations far apart."""


@dataclass(frozen=True)
class Columns:
    """``xy`` [n, 2] nm from the frame's corner and ``weight`` [n], the brightest 1."""

    xy: Floats
    weight: Floats

    def __getitem__(self, keep: NDArray[np.bool_]) -> Columns:
        return Columns(self.xy[keep], self.weight[keep])


@dataclass(frozen=True)
class _Lattice:
    """``cell`` [2, 2] (rows, nm), ``basis`` [m, 2] in cells, ``weight`` [m]; ``period_deg`` turns it into itself."""

    cell: Floats
    basis: Floats
    weight: Floats
    period_deg: float

    def columns(self, side: float, turn_deg: float, origin: Floats) -> Columns:
        """All columns over a frame of ``side`` nm, the lattice turned about and shifted to ``origin``."""
        turn = _turn(turn_deg)
        cell = self.cell @ turn
        half = side / 2 + MARGIN_NM
        corners = (np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half + side / 2 - origin) @ np.linalg.inv(cell)
        low, high = np.floor(corners.min(0)).astype(int) - 1, np.ceil(corners.max(0)).astype(int) + 1
        steps = np.stack(np.meshgrid(*map(np.arange, low, high + 1), indexing="ij"), -1).reshape(-1, 1, 2)
        xy = ((steps + self.basis) @ cell).reshape(-1, 2) + origin
        weight = np.tile(self.weight, len(steps))
        return Columns(xy, weight)[np.all((xy > -MARGIN_NM) & (xy < side + MARGIN_NM), axis=1)]

    @property
    def spacing(self) -> float:
        """Least distance of two columns, nm."""
        near = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(-1, 1, 2)
        apart = ((near + self.basis)[None] - self.basis[:, None, None]).reshape(-1, 2) @ self.cell
        lengths = np.linalg.norm(apart, axis=1)
        return float(lengths[lengths > 1e-6].min())


def single_crystal(rng: np.random.Generator, side: float) -> Columns:
    """One crystal, polar or not, with vacancies, strain and sometimes an edge: nothing in it is a boundary or wall."""
    if rng.random() < 0.35:
        return polar_crystal(rng, side)
    lattice = _random_lattice(rng)
    return _worn(rng, lattice.columns(side, rng.uniform(0, 360), rng.uniform(0, side, 2)), side)


def polar_crystal(rng: np.random.Generator, side: float) -> Columns:
    """A perovskite of one domain."""
    return _polar(rng, side, lambda at: np.ones(at.shape[:-1]), rng.uniform(0, 360))


def grains(rng: np.random.Generator, side: float) -> tuple[Columns, Distance]:
    """Two or three grains of one lattice, and the distance from their boundaries.

    Where two grains overlap within two thirds of the spacing, one column of the pair is left out.
    """
    from scipy.spatial import cKDTree

    lattice = _random_lattice(rng)
    centers = rng.uniform(-0.2, 1.2, (int(rng.choice([2, 2, 3])), 2)) * side
    first = rng.uniform(0, lattice.period_deg)
    room = lattice.period_deg - 2 * LEAST_TURN_DEG
    turns = first + np.concatenate([[0.0], LEAST_TURN_DEG + room * rng.random(len(centers) - 1)])
    bend = _bend(rng, side)
    parts = []
    for grain, turn in enumerate(turns):
        columns = lattice.columns(side, float(turn), rng.uniform(0, side, 2))
        parts.append(columns[_nearest(bend(columns.xy), centers) == grain])
    xy, weight = np.concatenate([p.xy for p in parts]), np.concatenate([p.weight for p in parts])
    gone = np.zeros(len(xy), dtype=bool)
    for a, b in cKDTree(xy).query_pairs(0.67 * lattice.spacing, output_type="ndarray"):
        gone[b] |= not gone[a]
    columns = Columns(xy, weight)[~gone]

    def distance(at: Floats) -> Floats:
        return _from_borders(bend(at), centers, turns, lattice.period_deg)

    loose = rng.normal(0, rng.uniform(0.0, 0.03), columns.xy.shape) * (distance(columns.xy) < 0.3)[:, None]
    return _worn(rng, Columns(columns.xy + loose, columns.weight), side, edge=False), distance


def domains(rng: np.random.Generator, side: float) -> tuple[Columns, Distance]:
    """A polar perovskite whose off-centring changes across parallel walls, and the distance from them."""
    turn = rng.uniform(0, 360)
    normal = _turn(turn)[0] if rng.random() < 0.6 else _turn(turn + 45.0)[0]
    apart, offset = rng.uniform(2.5, 14.0), rng.uniform(0.1, 0.9) * side
    width, bend = rng.uniform(0.2, 1.0), _bend(rng, side)

    def along(at: Floats) -> Floats:
        return np.asarray((bend(at) - side / 2) @ normal + side / 2 - offset)

    def side_of(at: Floats) -> Floats:
        nearest = np.rint(along(at) / apart)
        return np.asarray((1 - 2 * (nearest % 2)) * np.tanh((along(at) - apart * nearest) / width))

    def distance(at: Floats) -> Floats:
        return np.abs(along(at) - apart * np.rint(along(at) / apart))

    return _polar(rng, side, side_of, turn), distance


def _polar(rng: np.random.Generator, side: float, side_of: Distance, turn_deg: float) -> Columns:
    """A perovskite along [001]: bright A, dimmer B off the middle of its A by a vector that changes with ``side_of``
    (-1 to 1): turned round, one component turned round, or the two exchanged."""
    a = rng.uniform(0.38, 0.42)
    cell = np.diag([a, a * rng.choice([1.0, rng.uniform(1.0, 1.07)])])
    lattice = _Lattice(cell, np.array([[0.0, 0.0], [0.5, 0.5]]), np.array([1.0, rng.uniform(0.12, 0.6)]), 90.0)
    columns = lattice.columns(side, turn_deg, rng.uniform(0, side, 2))
    is_b = columns.weight < 1
    angle = rng.choice([0.0, 45.0, 90.0, rng.uniform(0, 360)])
    one = rng.uniform(0.012, 0.035) * _turn(float(angle))[0]
    other = [-one, one * [1, -1], one * [-1, 1], one[::-1]][rng.integers(4)]
    if np.hypot(*(one - other)) < 0.012:  # the walls would not be seen
        other = -one
    share = 0.5 * (1 + side_of(columns.xy))[:, None]
    shift = (share * one + (1 - share) * other) @ _turn(turn_deg)
    xy = columns.xy + is_b[:, None] * shift + rng.normal(0, rng.uniform(0, 0.005), columns.xy.shape)
    weight = columns.weight * np.exp(rng.normal(0, rng.uniform(0, 0.08), len(xy)))
    return Columns(xy, weight)


def _random_lattice(rng: np.random.Generator) -> _Lattice:
    """Honeycombs, perovskites, face-centred metals along [100] and [110], or any lattice of up to three sites."""
    kind = rng.integers(6)
    hexagonal = np.array([[1.0, 0.0], [0.5, 0.75**0.5]])
    honeycomb = np.array([[0.0, 0.0], [1 / 3, 1 / 3]])
    middle = np.array([[0.0, 0.0], [0.5, 0.5]])
    if kind == 0:  # graphene, BN
        return _Lattice(
            0.246 * rng.uniform(0.96, 1.06) * hexagonal, honeycomb, np.array([1.0, rng.choice([1, 0.6])]), 60
        )
    if kind == 1:  # dichalcogenides
        other = rng.uniform(0.12, 0.6)
        return _Lattice(rng.uniform(0.31, 0.36) * hexagonal, honeycomb, np.array([1.0, other]), 120)
    if kind == 2:
        return _Lattice(rng.uniform(0.37, 0.42) * np.eye(2), middle, np.array([1.0, rng.uniform(0.1, 0.7)]), 90)
    if kind == 3:
        return _Lattice(rng.uniform(0.18, 0.29) * np.eye(2), middle[:1], np.ones(1), 90)
    if kind == 4:
        return _Lattice(rng.uniform(0.35, 0.42) * np.diag([1.0, 0.5**0.5]), middle, np.ones(2), 180)
    lengths, angle = rng.uniform(0.22, 0.55, 2), np.radians(rng.uniform(60, 90))
    cell = lengths[:, None] * np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    for sites in range(rng.integers(1, 4), 1, -1):
        found = _Lattice(cell, rng.random((sites, 2)), np.append(1.0, rng.uniform(0.15, 1.0, sites - 1)), 180)
        if found.spacing > 0.13:
            return found
    return _Lattice(cell, np.zeros((1, 2)), np.ones(1), 180)


def _worn(rng: np.random.Generator, columns: Columns, side: float, edge: bool = True) -> Columns:
    """Vacancies, disorder, a smooth strain and, now and then, an edge or a hole."""
    keep = rng.random(len(columns.xy)) > rng.choice([0.0, rng.uniform(0, 0.08)])
    if edge and rng.random() < 0.35:
        away = columns.xy - rng.uniform(0, side, 2)
        straight = away @ _turn(rng.uniform(0, 360))[0] > 0
        keep &= straight if rng.random() < 0.5 else np.hypot(*away.T) > rng.uniform(0.3, 1.5)
    kept = columns[keep]
    xy = _bend(rng, side, 0.04)(kept.xy) + rng.normal(0, rng.uniform(0, 0.012), kept.xy.shape)
    return Columns(xy, kept.weight * np.exp(rng.normal(0, rng.uniform(0, 0.1), len(xy))))


def _bend(rng: np.random.Generator, side: float, depth_nm: float = 0.35) -> Callable[[Floats], Floats]:
    """A smooth map of the plane that moves places by up to about ``depth_nm``, for lines that are not straight."""
    waves = _turn(rng.uniform(0, 360)) * 2 * np.pi / (side * rng.uniform(0.6, 2.0))
    depth, phase = rng.uniform(0, depth_nm), rng.uniform(0, 2 * np.pi, 2)
    return lambda at: at + depth * np.sin(at @ waves + phase)


def _nearest(at: Floats, centers: Floats) -> NDArray[np.int64]:
    return np.asarray(np.linalg.norm(at[..., None, :] - centers, axis=-1).argmin(-1))


def _from_borders(at: Floats, centers: Floats, turns_deg: Floats, period_deg: float) -> Floats:
    """Distance [...] from the lines of equal distance to the nearest two of ``centers`` [k, 2] (Voronoi), those between
    grains of nearly the same turn left out."""
    squares = ((at[..., None, :] - centers) ** 2).sum(-1)
    own = squares.argmin(-1)
    least = np.full(own.shape, np.inf)
    for other, center in enumerate(centers):
        gap = 2 * np.linalg.norm(centers - center, axis=1)[own]
        off = np.abs((turns_deg[own] - turns_deg[other] + period_deg / 2) % period_deg - period_deg / 2)
        differs = (own != other) & (off >= LEAST_TURN_DEG)
        border = (squares[..., other] - squares.min(-1)) / np.where(gap > 0, gap, 1.0)
        least = np.where(differs, np.minimum(least, border), least)
    return least


def _turn(angle_deg: float) -> Floats:
    """[2, 2] matrix that turns row vectors; its first row is the direction at ``angle_deg``."""
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return np.array([[c, s], [-s, c]])
