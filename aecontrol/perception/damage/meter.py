"""From two frames to a reading of damage: registration, metric, and the null of an undamaged repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

from . import classical
from .classical import Metric
from .null import null_of, repeats_of
from .pair import Pair, in_counts
from .reading import PATCH_PX, DamageReading, refused
from .register import Registration, register

Pixels = NDArray[np.generic]

GAIN_SD = 0.5
"""Of the learned metric, as ``tests/benchmarks/damage_gain.py`` finds it on lattices that training never saw."""
METRIC_SD = 0.05
"""Of the learned metric: how far a frame's mean score lies off its gain's line, from the same script."""
LEAST_COUNTS = 1.7
"""Of the learned metric, smoothed: the darkest frames of its training, 3 counts at their peaks, show so many. On darker
frames it sees nothing, whatever there is."""
BELOW_NOTHING = 3.0
"""Standard deviations below zero from which a mean damaged fraction is no error of measurement any more. It is seen
where most of the matter left before the first frame was taken."""
BRIGHT = 0.98
"""Quantile of the smoothed frame that counts as its brightest pixels."""
METRICS: dict[str, Metric] = {
    "glr": classical.likelihood_ratio,
    "glr-pooled": classical.pooled(classical.likelihood_ratio),
    "ssim": classical.smoothed_dissimilarity,
    "ssim-pooled": classical.pooled(classical.smoothed_dissimilarity),
    "mse": classical.smoothed_error,
    "mse-pooled": classical.pooled(classical.smoothed_error),
    "ssim-default": classical.plain_dissimilarity,
    "psnr": classical.plain_noise_ratio,
    "ncc": classical.decorrelation,
}
"""Metrics without a network, by name."""
LEARNED = ("learned", "learned-pooled")
VERSION = "2"
"""Of registration, kernel and null; changes whenever numbers may."""
REPEATS = 4000
"""Undamaged patches that a null rests on at least, where few draws show as many."""
FEWEST, MOST = 4, 12
"""Draws of the null, whatever the size of the frame."""
MOST_SIGMA_PX = 0.3
"""Frames whose shift is less sure than this are not compared."""


@dataclass(frozen=True)
class Meter:
    """A metric with all that makes its scores comparable. ``version`` changes whenever the numbers may. ``gain_sd``:
    standard deviation of the logarithm of score over damaged fraction; None for a metric that does not estimate it.
    ``metric_sd``: of what the score of a whole frame is off by beyond that. ``least_counts``:
    in the brightest pixels of either frame; with fewer it says nothing."""

    name: str
    metric: Metric
    version: str
    sha256: str = ""
    gain_sd: float | None = None
    metric_sd: float = 0.0
    least_counts: float = 0.0

    def read(
        self,
        first: Pixels,
        later: Pixels,
        pixel_size_nm: tuple[float, float],
        limit_nm: float,
        expected_px: tuple[int, int] = (0, 0),
    ) -> DamageReading:
        """Compare ``later`` with ``first`` [rows, cols], both with pixels of ``pixel_size_nm`` (fast, slow), shifted by
        at most ``limit_nm`` from ``expected_px`` (dx, dy). Frames that nothing may be concluded from give a reading
        that says why. Deterministic."""
        comparison = compare(first, later, pixel_size_nm, limit_nm, expected_px)
        return self.judge(comparison, drawn_repeats(comparison))

    def judge(self, comparison: Comparison, repeats: Sequence[Pair]) -> DamageReading:
        """The reading of registered frames against undamaged ``repeats`` of them, drawn or measured."""
        pair, found = comparison.pair, comparison.registration
        if pair is None:
            return refused(comparison.shape, self.name, self.sha256, found.reason)
        if reason := self._too_dark(pair):
            return refused(comparison.shape, self.name, self.sha256, reason)
        score, null = self.metric(pair), null_of(pair, repeats, self.metric)
        if reason := self._less_than_none((score - null.mean)[pair.whole], null.sd[pair.whole]):
            return refused(comparison.shape, self.name, self.sha256, reason)
        return DamageReading(
            score=np.where(pair.whole, score - null.mean, np.nan),
            sd=np.where(pair.whole, null.sd, np.nan),
            p=np.where(pair.whole, null.p(score), 1.0),
            valid=pair.whole,
            shift_px=found.shift_px,
            residual_px=found.residual_px,
            reason="",
            metric=self.name,
            sha256=self.sha256,
        )

    def _less_than_none(self, score: NDArray[np.float64], sd: NDArray[np.float64]) -> str:
        """Why an estimate of the damaged fraction in all patches [n] makes no sense; empty when it does."""
        if self.gain_sd is None:
            return ""
        mean, error = float(score.mean()), float(np.sqrt((sd**2).sum())) / len(sd)
        if mean > -BELOW_NOTHING * float(np.hypot(error, self.metric_sd)):
            return ""
        return f"a damaged fraction of {mean:.2g} makes no sense: the frames differ in what {self.name!r} does not know"

    def _too_dark(self, pair: Pair) -> str:
        """Why a pair has too few counts for this metric; empty when it has enough."""
        from scipy.ndimage import gaussian_filter

        if self.least_counts == 0.0:
            return ""
        counts = min(float(np.quantile(gaussian_filter(f, 1.0), BRIGHT)) for f in (pair.first, pair.later))
        if counts >= self.least_counts:
            return ""
        return (
            f"{counts:.2g} counts in the brightest pixels, the metric {self.name!r} needs {self.least_counts:g}: scan "
            "longer or with larger pixels, or bin the frames"
        )


@dataclass(frozen=True)
class Comparison:
    """Two frames of ``shape``, the later one laid over the first: ``pair`` is None where ``registration`` says why
    not."""

    shape: tuple[int, ...]
    registration: Registration
    pair: Pair | None = None


def compare(
    first: Pixels,
    later: Pixels,
    pixel_size_nm: tuple[float, float],
    limit_nm: float,
    expected_px: tuple[int, int] = (0, 0),
) -> Comparison:
    """Bring two frames [rows, cols] to counts and lay the later one over the first; see :meth:`Meter.read`."""
    if reason := _unusable(first, later):
        return Comparison(first.shape, Registration.none(reason))
    a, b = in_counts(first), in_counts(later)
    found = register(a, b, pixel_size_nm, limit_nm, expected_px)
    if not found.reason and found.sigma_px > MOST_SIGMA_PX:
        found = Registration.none(f"registration may be off by {found.sigma_px:.2f} px, more than {MOST_SIGMA_PX:g}")
    if found.reason:
        return Comparison(first.shape, found)
    pair = Pair.of(a, found.apply(b), found.valid(a.shape))
    if not pair.whole.any():
        return Comparison(first.shape, Registration.none("no patch lies in both frames"))
    return Comparison(first.shape, found, pair)


def drawn_repeats(comparison: Comparison) -> Sequence[Pair]:
    """Undamaged repeats of a comparison: as many as a null needs; none where there is nothing to repeat."""
    if comparison.pair is None:
        return ()
    draws = int(np.clip(np.ceil(REPEATS / comparison.pair.whole.sum()), FEWEST, MOST))
    return repeats_of(comparison.pair, comparison.registration, draws)


def build_meter(name: str, device: str, weights: Path | None = None) -> Meter:
    """The meter called ``name``, computing on ``device``; ``weights``: others than the shipped or installed ones.
    Raises BadInput for a metric that does not exist, or weights that are missing or not what they should be."""
    if name in METRICS:
        if weights is not None:
            raise BadInput(f"metric {name!r} has no weights", "leave the weights out")
        return Meter(name, METRICS[name], VERSION)
    if name == "learned":
        from .learned import LearnedDamage

        learned = LearnedDamage(weights, device)
        return Meter(
            name, learned, f"{VERSION} {learned.sha256[:16]}", learned.sha256, GAIN_SD, METRIC_SD, LEAST_COUNTS
        )
    from .features import NAMED, build_metric

    if name not in NAMED:
        known = ", ".join((*LEARNED, *METRICS, *NAMED))
        raise BadInput(f"metric {name!r} is not known", f"use one of {known}")
    features = build_metric(NAMED[name], device, weights)
    settings = features.settings

    def metric(pair: Pair) -> NDArray[np.float64]:
        return features(pair.first, pair.later)

    return Meter(name, metric, f"{VERSION} {settings.label}", settings.sha256)


def _unusable(first: Pixels, later: Pixels) -> str:
    """Why two frames cannot be compared at all; '' when they can."""
    if first.shape != later.shape or first.ndim != 2:
        return f"the frames differ in shape: {first.shape} and {later.shape}"
    if min(first.shape) < PATCH_PX:
        return f"{first.shape[0]} x {first.shape[1]} pixels hold no patch of {PATCH_PX}"
    if not (np.isfinite(first).all() and np.isfinite(later).all()):
        return "a frame has pixels that are not numbers"
    if any(float(np.ptp(frame.astype(np.float64))) == 0.0 for frame in (first, later)):
        return "a frame has no contrast"
    return ""
