"""What an undamaged repeat of this very place would score: mean, spread and tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .pair import Pair

Floats = NDArray[np.float64]
Metric = Callable[[Pair], Floats]
DRAWS = 8


@dataclass(frozen=True)
class Null:
    """Mean and standard deviation [rows, cols] of undamaged scores, and their standardised draws, sorted."""

    mean: Floats
    sd: Floats
    drawn: Floats

    def p(self, score: Floats) -> Floats:
        """Chance that an undamaged patch scores at least ``score`` [rows, cols]."""
        z = (score - self.mean) / self.sd
        above = self.drawn.size - np.searchsorted(self.drawn, z, side="left")
        return np.asarray((above + 1.0) / (self.drawn.size + 1.0))


def undamaged(pair: Pair, metric: Metric, seed: int = 0) -> Null:
    """The null of ``metric`` for ``pair``, by drawing repeats of its denoised first frame."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(seed)
    truth = np.maximum(gaussian_filter(pair.first + pair.later, 1.0), 0.0) / (1.0 + pair.ratio)
    scores = []
    for _ in range(DRAWS):
        first, later = random.poisson(truth).astype(float), random.poisson(pair.ratio * truth).astype(float)
        scores.append(metric(Pair(first, later, pair.ratio, pair.valid)))
    drawn = np.stack(scores)
    mean, sd = drawn.mean(axis=0), np.full(drawn.shape[1:], drawn.std(axis=0, ddof=1).mean() + 1e-12)
    return Null(mean, sd, np.sort(((drawn - mean) / sd).ravel()))
