"""Which points lie near a place: a grid of cells over fixed points, so that a query costs what lies near, not all."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class CellIndex:
    """Points that never move, sorted into square cells. Lengths angstrom."""

    def __init__(self, positions_A: Array, cell_A: float) -> None:
        """Index ``positions_A`` [n, 2] (x, y; finite) by cells of side ``cell_A``. Keeps no reference to them."""
        positions = np.asarray(positions_A, dtype=np.float64).reshape(-1, 2)
        self._cell_A = cell_A
        self._origin = positions.min(axis=0) if len(positions) else np.zeros(2)
        cell = ((positions - self._origin) / cell_A).astype(np.int64)
        self._shape = cell.max(axis=0) + 1 if len(positions) else np.zeros(2, dtype=np.int64)
        columns, rows = self._shape
        flat = cell[:, 1] * columns + cell[:, 0]
        self._order = np.argsort(flat, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=columns * rows))])

    def box(self, low_A: ArrayLike, high_A: ArrayLike) -> NDArray[np.int64]:
        """Indices, ascending, of the points in every cell that meets the box from ``low_A`` to ``high_A`` (x, y, both
        included): all points in the box, and some up to one cell outside it."""
        corners = (np.stack([low_A, high_A]) - self._origin) / self._cell_A
        low, high = np.floor(np.clip(corners, -1.0, self._shape)).astype(np.int64)
        low, high = np.maximum(low, 0), np.minimum(high, self._shape - 1)
        if np.any(high < low):
            return np.zeros(0, dtype=np.int64)
        rows = np.arange(low[1], high[1] + 1) * self._shape[0]
        first, last = self._starts[rows + low[0]], self._starts[rows + high[0] + 1]
        return np.sort(np.concatenate([self._order[a:b] for a, b in zip(first, last, strict=True)]))
