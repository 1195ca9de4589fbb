"""The bond network of a sheet in which an atom has at most three bonds: who is bonded, rings, a light relaxation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .base import Vectors

Indices = NDArray[np.int64]

HEXAGONAL = np.array([[1.0, 0.0], [-0.5, math.sqrt(3) / 2]])
HONEYCOMB = np.array([[0.0, 0.0, 0.0], [0.5, math.sqrt(3) / 6, 0.0]])
"""Cell vectors and the two sites of a honeycomb, in lattice constants."""
GRAPHENE_A = 2.46
"""Lattice constant of graphene, angstrom."""
BOND_A = GRAPHENE_A / math.sqrt(3)
BONDED_A = 1.85
"""Atoms closer than this are bonded, angstrom: above every relaxed bond, below every second neighbour."""
LARGEST_RING = 14
"""The ring around a bare divacancy; a longer way round is an edge, not a ring."""
BENDING = 0.2
"""Stiffness of the distance of second neighbours, that of a bond being 1. Assumed; it keeps angles near 120 degrees."""


def bonds_of(flat_A: Vectors) -> Indices:
    """Pairs [m, 2] of atoms at ``flat_A`` [n, 2] closer than BONDED_A."""
    from scipy.spatial import cKDTree

    pairs = cKDTree(flat_A).query_pairs(BONDED_A, output_type="ndarray")
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2)


def neighbours(bonds: Indices, n: int) -> Indices:
    """Table [n, 3] of the atoms that each atom is bonded to, in ascending order, -1 where there is none."""
    first, second = bonds.T
    start, end = np.divmod(np.sort(np.concatenate([first * n + second, second * n + first])), max(n, 1))
    count = np.bincount(start, minlength=n)
    slot = np.arange(len(start)) - (np.cumsum(count) - count)[start]
    table = np.full((n, 3), -1, dtype=np.int64)
    table[start, slot] = end
    return table


def rings(flat_A: Vectors, bonds: Indices) -> NDArray[np.int8]:
    """For each atom [n], of the sizes of the rings that it belongs to, the one furthest from six.

    The smaller of two equally far; -1 for an atom in no ring of up to LARGEST_RING atoms. Rings are the faces of the
    planar bond network: walk each bond and turn into the next bond round the atom that it leads to, until back.
    """
    n = len(flat_A)
    table = _by_angle(flat_A, neighbours(bonds, n))
    bonded = table >= 0
    degree = np.count_nonzero(bonded, axis=1)
    start, slot = np.nonzero(bonded)
    to = table[start, slot]
    back = np.argmax(table[to] == start[:, None], axis=1)
    numbered = np.full((n, 3), -1, dtype=np.int64)
    numbered[start, slot] = np.arange(len(start))
    after = numbered[to, (back + 1) % degree[to]]
    size = _cycle_lengths(after)
    strange = np.where(size > 0, 2 * np.abs(size - 6) + (size < 6), -1)
    strangest = np.full((n, 3), -1, dtype=np.int8)
    strangest[start, slot] = strange
    around = np.full((n, 3), -1, dtype=np.int8)
    around[start, slot] = np.where(size > 0, size, -1)
    return np.asarray(np.take_along_axis(around, strangest.argmax(axis=1)[:, None], axis=1)[:, 0])


def _by_angle(flat_A: Vectors, table: Indices) -> Indices:
    """``table`` with the neighbours of each atom in order of their direction, the missing ones last."""
    step = flat_A[table] - flat_A[:, None, :]
    angle = np.where(table >= 0, np.arctan2(step[..., 1], step[..., 0]), np.inf)
    return np.asarray(np.take_along_axis(table, angle.argsort(axis=1), axis=1))


def _cycle_lengths(after: Indices) -> NDArray[np.int8]:
    """Length of the cycle of the permutation ``after`` [m] that each entry is in; 0 beyond LARGEST_RING."""
    length = np.zeros(len(after), dtype=np.int8)
    open_ = np.arange(len(after))
    here = open_
    for size in range(1, LARGEST_RING + 1):
        here = after[here]
        closed = here == open_
        length[open_[closed]] = size
        open_, here = open_[~closed], here[~closed]
    return length


def cut(bonds: Indices, outside: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Atoms gone [n] when those ``outside`` [n] are cut away, and the rim [n] that is left without some of its bonds.

    An atom that would hang on by a single bond goes too.
    """
    gone = outside.copy()
    while True:
        crossing = bonds[gone[bonds[:, 0]] != gone[bonds[:, 1]]]
        rim = np.zeros(len(gone), dtype=bool)
        rim[crossing] = True
        rim &= ~gone
        left = np.bincount(bonds[~gone[bonds].any(axis=1)].ravel(), minlength=len(gone))
        hanging = rim & (left < 2)
        if not hanging.any():
            return gone, rim
        gone |= hanging


def closing(table: Indices, pairs: Indices) -> Indices:
    """Bonds [2k, 2] that close a divacancy to 5-8-5: for each atom of ``pairs`` [k, 2], its other two neighbours'."""
    return np.concatenate([_others(table, pairs[:, 0], pairs[:, 1]), _others(table, pairs[:, 1], pairs[:, 0])])


def turn(flat_A: Vectors, bonds: Indices, table: Indices, pairs: Indices) -> tuple[Vectors, Indices]:
    """Positions and bonds after each bond of ``pairs`` [k, 2] turned by 90 degrees (Stone and Wales): 5-7-7-5."""
    first, second = pairs.T
    along = flat_A[second] - flat_A[first]
    across = np.column_stack([-along[:, 1], along[:, 0]])
    ahead, behind = _others(table, first, second), _others(table, second, first)
    ahead = np.take_along_axis(ahead, _along(flat_A, ahead, first, across).argsort(axis=1), axis=1)
    behind = np.take_along_axis(behind, _along(flat_A, behind, second, across).argsort(axis=1), axis=1)
    turned = flat_A.copy()
    middle = 0.5 * (flat_A[first] + flat_A[second])
    turned[first], turned[second] = middle - 0.5 * across, middle + 0.5 * across
    n = len(flat_A)
    broken = np.concatenate([np.column_stack([first, ahead[:, 1]]), np.column_stack([second, behind[:, 0]])])
    made = np.concatenate([np.column_stack([first, behind[:, 0]]), np.column_stack([second, ahead[:, 1]])])
    kept = ~np.isin(_key(bonds, n), _key(broken, n))
    return turned, np.concatenate([bonds[kept], made])


def _others(table: Indices, atom: Indices, partner: Indices) -> Indices:
    """The two neighbours [k, 2] of each ``atom`` other than ``partner``."""
    rows = table[atom]
    return np.asarray(rows[rows != partner[:, None]].reshape(-1, 2))


def _along(flat_A: Vectors, ends: Indices, start: Indices, direction: Vectors) -> Vectors:
    """How far [k, 2] each of ``ends`` [k, 2] lies from ``start`` in ``direction`` [k, 2]."""
    return np.asarray(np.einsum("kei,ki->ke", flat_A[ends] - flat_A[start][:, None, :], direction))


def _key(pairs: Indices, n: int) -> Indices:
    return np.asarray(pairs.min(axis=1) * n + pairs.max(axis=1))


def within(flat_A: Vectors, centers_A: Vectors, reach_A: float) -> NDArray[np.bool_]:
    """Which atoms [n] at ``flat_A`` [n, 2] are within ``reach_A`` of any of ``centers_A`` [k, 2]."""
    from scipy.spatial import cKDTree

    near = np.zeros(len(flat_A), dtype=bool)
    for found in cKDTree(flat_A).query_ball_point(centers_A, reach_A) if len(centers_A) else ():
        near[found] = True
    return near


def relax(flat_A: Vectors, bonds: Indices, movable: NDArray[np.bool_], steps: int = 60) -> Vectors:
    """Positions [n, 2] after ``movable`` [n] atoms gave way to springs; the others stay.

    A spring of rest length BOND_A along each bond, a weak one of GRAPHENE_A between two neighbours of an atom;
    gradient descent with Nesterov momentum, no atom moving more than 0.2 angstrom a step.
    """
    flat = flat_A.copy()
    if not movable.any():
        return flat
    touching = bonds[movable[bonds].any(axis=1)]
    involved = np.zeros(len(flat), dtype=bool)
    involved[touching] = True  # second neighbours of a movable atom hang on one of these
    near = bonds[involved[bonds].any(axis=1)]
    used, near = np.unique(near, return_inverse=True)
    free = movable[used]
    pairs, rest, stiffness = _springs(near.reshape(-1, 2), free)
    at = before = flat[used]
    for _ in range(steps):
        ahead = at + 0.85 * (at - before)
        step = ahead[pairs[:, 1]] - ahead[pairs[:, 0]]
        distance = np.sqrt(step[:, 0] ** 2 + step[:, 1] ** 2)
        pull = (stiffness * (1.0 - rest / np.maximum(distance, 0.1)))[:, None] * step
        force = gather(pairs[:, 0], pull, len(used)) - gather(pairs[:, 1], pull, len(used))
        before, at = at, ahead + free[:, None] * np.clip(0.2 * force, -0.2, 0.2)
    flat[used] = at
    return flat


def _springs(bonds: Indices, movable: NDArray[np.bool_]) -> tuple[Indices, Vectors, Vectors]:
    """Pairs with a movable end, their rest lengths (angstrom) and stiffnesses."""
    table = neighbours(bonds, len(movable))
    second = np.concatenate([table[:, [0, 1]], table[:, [0, 2]], table[:, [1, 2]]])
    pairs = np.concatenate([bonds, second[(second >= 0).all(axis=1)]])
    kept = movable[pairs].any(axis=1)
    is_bond = (np.arange(len(pairs)) < len(bonds))[kept]
    return pairs[kept], np.where(is_bond, BOND_A, GRAPHENE_A), np.where(is_bond, 1.0, BENDING)


def gather(index: Indices, vectors: Vectors, n: int) -> Vectors:
    """Sum [n, 2] of ``vectors`` [m, 2] over equal ``index`` [m]."""
    return np.column_stack([np.bincount(index, weights=vectors[:, axis], minlength=n) for axis in (0, 1)])
