"""How good was a session: finds against the truth, and recall against what was spent.

Positions are ``[n, 2]`` (x, y) in one length unit throughout (nm in the specimen frame when a session is scored, pixels
when a record is studied offline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aecontrol.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """Finds against truth. ``precision`` and ``recall`` are None where nothing was reported or nothing was there."""

    found: int
    true: int
    matched: int

    @property
    def precision(self) -> float | None:
        """Matched finds over reported (merged) finds."""
        return self.matched / self.found if self.found else None

    @property
    def recall(self) -> float | None:
        """Matched objects over objects that were there."""
        return self.matched / self.true if self.true else None


def merge_duplicates(positions: ArrayLike, gate: float, confidence: ArrayLike | None = None) -> Ints:
    """Indices [k] of the finds to keep, so that finds closer than ``gate`` count as one object.

    Finds are taken in order of falling ``confidence`` [n] (default: as given; ties to the lowest index); one that lies
    closer than ``gate`` to a find already kept is dropped. Unlike merging chains of neighbours this never swallows a
    row of distinct objects. Raises BadInput for positions that are not finite [n, 2] or a gate that is not positive.
    """
    from scipy.spatial import cKDTree

    xy = _positions(positions, gate)
    rank = np.arange(len(xy)) if confidence is None else np.argsort(-np.asarray(confidence, float), kind="stable")
    dropped = np.zeros(len(xy), bool)
    neighbours = cKDTree(xy).query_ball_point(xy, np.nextafter(gate, 0.0)) if len(xy) else []
    kept = []
    for index in rank:
        if not dropped[index]:
            kept.append(index)
            dropped[neighbours[index]] = True
    return np.sort(np.asarray(kept, np.int64))


def match(found: ArrayLike, true: ArrayLike, gate: float) -> tuple[Ints, Ints]:
    """Optimal one-to-one matching of finds to objects within ``gate`` (inclusive): (indices of finds, of objects).

    As many pairs as possible first, then the smallest sum of distances (Hungarian method; H. W. Kuhn, Naval Res.
    Logist. Q. 2, 83 (1955)). Solved per connected group of points, which is exact and stays fast for many points.
    Raises BadInput as :func:`merge_duplicates`.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    a, b = _positions(found, gate), _positions(true, gate)
    if not len(a) or not len(b):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    near = cKDTree(b).query_ball_point(a, gate)
    rows = np.repeat(np.arange(len(a)), [len(n) for n in near])
    cols = np.concatenate([np.asarray(n, np.int64) for n in near])
    size = len(a) + len(b)
    graph = coo_array((np.ones(len(rows)), (rows, cols + len(a))), shape=(size, size))
    group = connected_components(graph, directed=False)[1]
    pairs: list[tuple[int, int]] = []
    for label in np.unique(group[rows]):
        i = np.flatnonzero(group[: len(a)] == label)
        j = np.flatnonzero(group[len(a) :] == label)
        distance = np.hypot(*(a[i, None] - b[None, j]).transpose(2, 0, 1))
        allowed = distance <= gate
        forbidden = gate * (min(distance.shape) + 1)  # one forbidden pair costs more than all allowed ones together
        m, n = linear_sum_assignment(np.where(allowed, distance, forbidden))
        pairs += [(i[p], j[q]) for p, q in zip(m, n, strict=True) if allowed[p, q]]
    table = np.asarray(sorted(pairs), np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def score(found: ArrayLike, truth: ArrayLike, gate: float, confidence: ArrayLike | None = None) -> Score:
    """Merge the finds of several regions, match them to the objects within ``gate``, and count.

    ``found`` and ``truth`` [n, 2]; ``confidence`` [n] says which of two duplicates is kept. Raises BadInput as
    :func:`merge_duplicates`.
    """
    xy = _positions(found, gate)
    kept = xy[merge_duplicates(xy, gate, confidence)]
    objects = _positions(truth, gate)
    return Score(found=len(kept), true=len(objects), matched=len(match(kept, objects, gate)[0]))


def recall_curve(found: Sequence[ArrayLike], truth: ArrayLike, gate: float) -> Floats:
    """Recall after each step [steps]: ``found[k]`` are the finds [n_k, 2] that step k reported.

    The finds of all steps so far are merged and matched as :func:`score` does. Raises BadInput for an empty truth.
    """
    objects = _positions(truth, gate)
    if not len(objects):
        raise BadInput("recall asked for, but there is no object to find", "give at least one true position")
    so_far = np.empty((0, 2))
    recall = []
    for finds in found:
        so_far = np.concatenate([so_far, _positions(finds, gate)])
        so_far = so_far[merge_duplicates(so_far, gate)]
        recall.append(len(match(so_far, objects, gate)[0]) / len(objects))
    return np.asarray(recall)


def spent_at_recall(spent: ArrayLike, recall: ArrayLike, level: float) -> float:
    """What had been spent when ``recall`` first reached ``level``; inf when it never did. Both arrays [steps]."""
    reached = np.flatnonzero(np.asarray(recall) >= level - 1e-12)
    return float(np.asarray(spent, float)[reached[0]]) if len(reached) else float("inf")


def _positions(values: ArrayLike, gate: float) -> Floats:
    xy = np.asarray(values, float)
    if xy.size == 0:
        xy = xy.reshape(0, 2)
    if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
        raise BadInput(f"positions of shape {xy.shape}, or not finite", "give finite (x, y) pairs, shape [n, 2]")
    if not gate > 0:
        raise BadInput(f"gate {gate}", "the gate within which two positions are one object must be positive")
    return xy
