"""How good was a session: finds against the truth, and recall against what was spent.

Positions are ``[n, 2]`` (x, y) in one length unit throughout (nm in the specimen frame when a session is scored, pixels
when a record is studied offline). Windows are integer boxes ``[n, 4]`` (row, column, rows, columns) on a pixel grid.
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


def window_boxes(shape: tuple[int, int], size: int, stride: int | None = None) -> Ints:
    """Square windows of ``size`` px on a grid over an image of ``shape`` (rows, columns): boxes [n, 4], raster order.

    ``stride`` defaults to ``size``. The last row and column are moved inwards so that every pixel is covered.
    """
    if size <= 0 or (stride is not None and stride <= 0) or size > min(shape):
        raise BadInput(
            f"windows of {size} px at a stride of {stride} px on an image of {shape[0]} x {shape[1]} px",
            "size and stride must be positive and the window no larger than the image",
        )
    starts = [sorted({*range(0, n - size + 1, stride or size), n - size}) for n in shape]
    return np.asarray([(r, c, size, size) for r in starts[0] for c in starts[1]], np.int64)


def pixels_spent(boxes: ArrayLike, order: ArrayLike, revealed: NDArray[np.bool_]) -> Ints:
    """Pixels paid [steps] after each window of ``order`` (indices into ``boxes`` [n, 4]); a seen pixel is free.

    ``revealed`` [rows, cols] is what had been scanned before (the overview); it counts as already paid and is left
    unchanged.
    """
    seen = np.array(revealed, bool)
    table = np.asarray(boxes, np.int64)
    paid = [int(seen.sum())]
    for index in np.asarray(order, np.int64):
        r, c, rows, cols = table[index]
        view = seen[r : r + rows, c : c + cols]
        paid.append(paid[-1] + int(view.size - view.sum()))
        view[...] = True
    return np.asarray(paid[1:], np.int64)


def inside_boxes(boxes: ArrayLike, positions_px: ArrayLike) -> NDArray[np.bool_]:
    """Which positions (x, y) in px lie in which box: [n boxes, m positions]. A border belongs to the later box."""
    table, xy = np.asarray(boxes, np.int64), np.asarray(positions_px, float).reshape(-1, 2)
    r, c, rows, cols = (table[:, k, None] for k in range(4))
    x, y = xy[None, :, 0], xy[None, :, 1]
    return (x >= c) & (x < c + cols) & (y >= r) & (y < r + rows)


def random_order(count: int, seed: int) -> Ints:
    """A random order of ``count`` windows, the same for the same seed."""
    return np.random.default_rng(np.random.SeedSequence(seed)).permutation(count)


def oracle_order(boxes: ArrayLike, positions_px: ArrayLike, revealed: NDArray[np.bool_]) -> Ints:
    """The order of one who knows the truth: at each step the most still unseen objects per still unpaid pixel.

    Greedy, so a bound in practice rather than a proven optimum; ties go to the lowest index. Windows without an unseen
    object come last, in raster order. ``boxes`` [n, 4], ``positions_px`` [m, 2] (x, y), ``revealed`` [rows, cols].
    """
    table = np.asarray(boxes, np.int64)
    inside = inside_boxes(table, positions_px)
    seen = np.array(revealed, bool)
    left = np.ones(inside.shape[1], bool)
    waiting = np.ones(len(table), bool)
    order: list[int] = []
    while waiting.any():
        gain = (inside & left).sum(1)
        useful = np.flatnonzero(waiting & (gain > 0))
        if not len(useful):
            break
        cost = [int((~seen[r : r + h, c : c + w]).sum()) for r, c, h, w in table[useful]]
        best = int(useful[np.argmax(gain[useful] / np.maximum(cost, 1))])
        order.append(best)
        r, c, h, w = table[best]
        seen[r : r + h, c : c + w] = True
        left &= ~inside[best]
        waiting[best] = False
    return np.asarray([*order, *np.flatnonzero(waiting)], np.int64)


def _positions(values: ArrayLike, gate: float) -> Floats:
    xy = np.asarray(values, float)
    if xy.size == 0:
        xy = xy.reshape(0, 2)
    if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
        raise BadInput(f"positions of shape {xy.shape}, or not finite", "give finite (x, y) pairs, shape [n, 2]")
    if not gate > 0:
        raise BadInput(f"gate {gate}", "the gate within which two positions are one object must be positive")
    return xy
