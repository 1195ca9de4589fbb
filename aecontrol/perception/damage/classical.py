"""Metrics without a network: how much two registered frames differ, patch by patch; larger is more different."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .pair import Pair
from .reading import per_patch

Floats = NDArray[np.float64]
SMOOTHING_PX = 2.0


def likelihood_ratio(pair: Pair) -> Floats:
    """Logarithm of the likelihood ratio of two rates against one, of smoothed counts, mean over the patch."""
    from scipy.ndimage import gaussian_filter

    a, b = (np.maximum(gaussian_filter(f, SMOOTHING_PX), 0.0) for f in (pair.first, pair.later))
    rate = np.maximum((a + b) / (1.0 + pair.ratio), 1e-12)
    both = _times_log(a, a / rate) + _times_log(b, b / (pair.ratio * rate))
    return np.asarray(per_patch(both).mean(axis=(2, 3)), dtype=np.float64)


def _times_log(x: Floats, ratio: Floats) -> Floats:
    return x * np.log(np.where(x > 0, ratio, 1.0))
