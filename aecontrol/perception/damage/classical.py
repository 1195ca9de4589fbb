"""Metrics without a network: how much two registered frames differ, patch by patch; larger is more different.

Each but the two plain ones compares the later frame with the first one as it would look at the later one's focus and
dose (``Pair.matched``). None knows a null: see :mod:`aecontrol.perception.damage.null`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .pair import Pair
from .reading import PATCH_PX, per_patch

Floats = NDArray[np.float64]
Metric = Callable[[Pair], Floats]
"""Scores [rows, cols] of a pair, larger where the frames differ more."""

SMOOTHING_PX = 2.0
"""Standard deviation of the Gaussian that frames are smoothed with; noise falls, an atom stays."""
RANGE = (0.5, 99.5)
"""Percentiles of the first frame that count as its darkest and brightest value, for the plain metrics."""


def likelihood_ratio(pair: Pair) -> Floats:
    """Logarithm of the likelihood ratio of two Poisson rates against one of smoothed counts, mean over the patch. The
    doses may differ."""
    ratio = max(float(pair.kernel.weights.sum()), 1e-6)
    a, b = np.maximum(_smooth(pair.matched / ratio), 0.0), np.maximum(_smooth(pair.later), 0.0)
    rate = np.maximum((a + b) / (1.0 + ratio), 1e-12)
    return _mean(_times_log(a, a / rate) + _times_log(b, b / (ratio * rate)))


def smoothed_error(pair: Pair) -> Floats:
    """Mean square of the difference of the smoothed frames."""
    return _mean(_smooth(pair.matched - pair.later) ** 2)


def smoothed_dissimilarity(pair: Pair) -> Floats:
    """1 - structural similarity of the smoothed frames in a Gaussian window 7 px wide."""
    from skimage.metrics import structural_similarity

    a, b = _smooth(pair.matched), _smooth(pair.later)
    span = float(np.ptp(a)) or 1.0
    settings = {"gaussian_weights": True, "sigma": 1.0, "win_size": 7, "data_range": span, "full": True}
    return _mean(1.0 - structural_similarity(a, b, **settings)[1])  # type: ignore[no-untyped-call]


def plain_dissimilarity(pair: Pair) -> Floats:
    """1 - structural similarity with scikit-image's defaults."""
    from skimage.metrics import structural_similarity

    a, b = _plain(pair)
    return _mean(1.0 - structural_similarity(a, b, data_range=1.0, full=True)[1])  # type: ignore[no-untyped-call]


def plain_noise_ratio(pair: Pair) -> Floats:
    """- peak signal-to-noise ratio of the patch, dB."""
    a, b = _plain(pair)
    return 10.0 * np.log10(np.maximum(_mean((a - b) ** 2), 1e-12))


def decorrelation(pair: Pair) -> Floats:
    """1 - Pearson's correlation of the patch."""
    a, b = (per_patch(frame).reshape(*pair.whole.shape, PATCH_PX**2) for frame in (pair.first, pair.later))
    a, b = a - a.mean(axis=-1, keepdims=True), b - b.mean(axis=-1, keepdims=True)
    spread = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.asarray(1.0 - (a * b).sum(axis=-1) / np.maximum(spread, 1e-300), dtype=np.float64)


def pooled(metric: Metric) -> Metric:
    """``metric`` averaged with its neighbours (binomial weights, 3 x 3): steadier at low dose, but damage spills by one
    patch and what is damaged in one patch alone is diluted."""
    from scipy.ndimage import correlate

    weights = np.outer((1.0, 2.0, 1.0), (1.0, 2.0, 1.0)) / 16.0

    def averaged(pair: Pair) -> Floats:
        return np.asarray(correlate(metric(pair), weights, mode="reflect"), dtype=np.float64)

    return averaged


def _smooth(frame: Floats) -> Floats:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(frame, SMOOTHING_PX), dtype=np.float64)


def _plain(pair: Pair) -> tuple[Floats, Floats]:
    """Both frames between 0 and 1, by the percentiles of the first."""
    low, high = np.percentile(pair.first, RANGE)
    scale = max(float(high - low), 1e-300)
    return np.clip((pair.first - low) / scale, 0.0, 1.0), np.clip((pair.later - low) / scale, 0.0, 1.0)


def _mean(image: Floats) -> Floats:
    return np.asarray(per_patch(image).mean(axis=(2, 3)), dtype=np.float64)


def _times_log(x: Floats, ratio: Floats) -> Floats:
    return x * np.log(np.where(x > 0.0, ratio, 1.0))
