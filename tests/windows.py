"""Windows on a pixel grid, for tests that rank them: integer boxes [n, 4] (row, column, rows, columns)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aecontrol.errors import BadInput

Ints = NDArray[np.int64]


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
