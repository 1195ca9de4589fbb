"""Points that keep their distance: random sequential addition in a box, in two or three dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

from .base import MAX_ATOMS, Vectors

CARBON_PER_A3 = 2.0 / 12.011 * 0.602214076
"""Atoms of C per cubic angstrom at 2.0 g/cm^3."""
CARBON_APART_A = 1.3
JAMMED = {2: 0.547, 3: 0.384}
"""Share of an area, and of a volume, at which random sequential addition of discs and of balls jams."""
ROUNDS = 400
"""Rounds of drawing before the points are taken not to fit."""

Draw = Callable[[int], Vectors]


def amorphous_carbon(box_A: Vectors, random: np.random.Generator) -> Vectors:
    """Atoms [n, 3] of amorphous carbon in the box [0, box_A], 2.0 g/cm^3, no two closer than CARBON_APART_A.

    A random film of the right density and hard cores, not of the right bonds. Raises BadInput beyond MAX_ATOMS atoms.
    """
    n = round(CARBON_PER_A3 * float(np.prod(box_A)))
    if n > MAX_ATOMS:
        raise BadInput(f"{n} atoms of carbon are more than {MAX_ATOMS}", "make the field or the film smaller")
    return scatter(n, box_A, CARBON_APART_A, lambda count: random.random((count, len(box_A))) * box_A)


def scatter(n: int, box: Vectors, apart: float, draw: Draw) -> Vectors:
    """``n`` points [n, d] from ``draw(count)`` -> [count, d] in the box [0, ``box``], no two closer than ``apart``.

    A grid whose cells hold one point at most finds the neighbours. Each round draws what is still missing and drops
    every new point in the cell of another or too close to an older one or to a new one in a lower cell. Raises
    BadInput when ``n`` points do not fit.
    """
    ball = np.pi * apart ** len(box) / (4.0 if len(box) == 2 else 6.0)
    if n * ball > JAMMED[len(box)] * np.prod(box):
        raise BadInput(f"{n} points do not fit {apart:g} apart", "ask for fewer or for a smaller distance")
    edge = apart / np.sqrt(len(box))
    shape = np.ceil(np.asarray(box) / edge).astype(np.int64) + 1
    around = _neighbour_cells(shape)
    holder = np.full(int(np.prod(shape + 4)), -1, dtype=np.int32)  # two empty cells all round
    points = np.empty((n, len(box)))
    done = 0
    for _ in range(ROUNDS):
        if done == n:
            return points
        new = draw(n - done)
        new = new[np.all((new >= 0) & (new <= box), axis=1)]
        cell = np.ravel_multi_index(tuple((new // edge).astype(np.int64).T + 2), tuple(shape + 4))
        cell, first = np.unique(cell, return_index=True)
        empty = holder[cell] < 0
        cell, new = cell[empty], new[first[empty]]
        points[done : done + len(new)] = new
        number = np.arange(done, done + len(new), dtype=np.int32)
        holder[cell] = number
        kept = ~_clashes(points, number, cell, holder, around, apart)
        last = done + int(np.count_nonzero(kept))
        holder[cell[~kept]] = -1
        holder[cell[kept]] = np.arange(done, last, dtype=np.int32)
        points[done:last] = new[kept]
        done = last
    raise BadInput(f"only {done} of {n} points fit {apart:g} apart", "ask for fewer or for a smaller distance")


def _neighbour_cells(shape: NDArray[np.int64]) -> NDArray[np.int64]:
    """How far apart in the padded grid the cells are that can hold a point closer than the distance."""
    strides = np.array([int(np.prod(shape[axis + 1 :] + 4)) for axis in range(len(shape))])
    reach = np.array([step for step in itertools.product(range(-2, 3), repeat=len(shape)) if any(step)])
    gap = np.sum(np.maximum(np.abs(reach) - 1, 0) ** 2, axis=1)
    return np.asarray(reach[gap < len(shape)] @ strides)  # in cell edges; the distance is sqrt(d) of them


def _clashes(
    points: Vectors,
    number: NDArray[np.int32],
    cell: NDArray[np.int64],
    holder: NDArray[np.int32],
    around: NDArray[np.int64],
    apart: float,
) -> NDArray[np.bool_]:
    """Which of the new points are closer than ``apart`` to an older one."""
    clash = np.zeros(len(number), dtype=bool)
    for step in around:
        other = holder[cell + step]
        at = np.flatnonzero((other >= 0) & (other < number))
        separation = points[other[at]] - points[number[at]]
        clash[at[np.einsum("ij,ij->i", separation, separation) < apart**2]] = True
    return clash
