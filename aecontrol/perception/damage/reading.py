"""What two frames of one place say about damage, patch by patch, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PATCH_PX = 20
"""Side of a patch. Patches do not overlap; the first begins at the frame's first corner, partial ones are dropped."""
FALSE_FLAGS = 0.01
"""Share of false ones among the flagged patches that is accepted."""


@dataclass(frozen=True)
class DamageReading:
    """A later frame compared with a first one.

    ``score`` [rows, cols]: excess over what an undamaged patch shows on average (0 on average without damage), in the
    metric's own unit (damaged fraction for the learned one); NaN where not valid. ``sd`` [rows, cols]: standard
    deviation of the score of an undamaged patch. ``p`` [rows, cols]: chance that an undamaged patch scores as high;
    1 where not valid. ``valid`` [rows, cols]: the patch lies wholly in both frames. ``shift_px`` (dx, dy): how far the
    later frame's content has moved; ``residual_px``: standard deviation per axis of what registration may have left.
    ``reason``: why nothing may be concluded; empty when it may. ``metric``: its name; ``sha256``: of its weights, ''
    where it has none.
    """

    score: Floats
    sd: Floats
    p: Floats
    valid: Bools
    shift_px: tuple[float, float]
    residual_px: float
    reason: str
    metric: str
    sha256: str = ""

    @property
    def flagged(self) -> Bools:
        """Patches [rows, cols] that are damaged, at most ``FALSE_FLAGS`` of them falsely on average."""
        return benjamini_hochberg(self.p, self.valid, FALSE_FLAGS)

    @property
    def mean_score(self) -> float:
        """Mean over the valid patches; NaN where there is none."""
        return float(self.score[self.valid].mean()) if self.valid.any() else float("nan")


def patch_grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many patches (rows, columns) a frame of ``shape`` has."""
    return shape[0] // PATCH_PX, shape[1] // PATCH_PX


def per_patch(image: NDArray[np.generic]) -> NDArray[np.generic]:
    """``image`` [h, w] cut into its patches: a view [rows, cols, 20, 20]."""
    rows, cols = patch_grid(image.shape)
    whole = image[: rows * PATCH_PX, : cols * PATCH_PX]
    return whole.reshape(rows, PATCH_PX, cols, PATCH_PX).swapaxes(1, 2)


def refused(shape: tuple[int, ...], metric: str, sha256: str, reason: str) -> DamageReading:
    """The reading of frames of ``shape`` that nothing may be concluded from."""
    grid = patch_grid(shape)
    unknown = np.full(grid, np.nan)
    none = np.zeros(grid, dtype=bool)
    return DamageReading(unknown, unknown, np.ones(grid), none, (0.0, 0.0), float("nan"), reason, metric, sha256)


def benjamini_hochberg(p: Floats, among: Bools, rate: float) -> Bools:
    """Which of the hypotheses ``among`` all are rejected when ``rate`` of the rejected ones may be true on average.

    The largest k with p_(k) <= k rate / n (Y. Benjamini, Y. Hochberg, J. R. Stat. Soc. B 57, 289 (1995)).
    """
    tested = np.sort(p[among])
    below = np.flatnonzero(tested <= rate * np.arange(1, tested.size + 1) / max(tested.size, 1))
    limit = tested[below[-1]] if below.size else -1.0
    return np.asarray(among & (p <= limit))
