"""What an undamaged repeat of this very place would score: mean, spread and tail, for any metric.

A repeat is drawn, not measured: the first frame without its noise, seen twice at the doses of the two frames; the
later time through the fitted kernel (focus, dose), off by what registration may have left, row by row too, resampled as
the later frame was, and with shot noise of its own. The metric then fits its own kernel anew, so what fitting leaves
over is part of the null. Mean and spread are smooth functions of what a patch shows, because a few draws say little of
one patch alone; the tail is that of all standardised scores together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .classical import Metric
from .pair import Pair
from .reading import per_patch
from .register import Registration

Floats = NDArray[np.float64]

TAIL = 0.03
"""Beyond the value that this share of the draws exceeds, the tail is taken as exponential."""
KEPT = 1.5
"""Fourier components of less power than this, over that of the noise, are taken as noise."""


@dataclass(frozen=True)
class Null:
    """Mean and standard deviation [rows, cols] of the scores of undamaged patches, and the tail of the standardised
    ones: ``drawn``, sorted."""

    mean: Floats
    sd: Floats
    drawn: Floats

    def p(self, score: Floats) -> Floats:
        """Chance that an undamaged patch scores at least ``score`` [rows, cols]."""
        z = (score - self.mean) / self.sd
        above = self.drawn.size - np.searchsorted(self.drawn, z, side="left")
        counted = (above + 1.0) / (self.drawn.size + 1.0)
        start = float(np.quantile(self.drawn, 1.0 - TAIL))
        beyond = self.drawn[self.drawn > start] - start
        scale = float(beyond.mean()) if beyond.size else 1e-12
        return np.asarray(np.where(z > start, TAIL * np.exp(-np.maximum(z - start, 0.0) / scale), counted))


def repeats_of(pair: Pair, registration: Registration, draws: int, seed: int = 0) -> list[Pair]:
    """``draws`` undamaged repeats of ``pair``. Deterministic."""
    random = np.random.default_rng(seed)
    truth = denoised(pair.first)
    return [_repeat(pair, registration, truth, random) for _ in range(draws)]


def null_of(pair: Pair, repeats: Sequence[Pair], metric: Metric) -> Null:
    """The null of ``metric`` for ``pair`` from undamaged ``repeats`` of it, drawn, or measured at the same place and
    doses (the two halves of one visit, say): mean and spread of the scores as functions of what patches show."""
    scores = np.stack([metric(repeat) for repeat in repeats])
    content = _content(pair)
    inside = pair.whole
    some, of = scores[:, inside], np.broadcast_to(content[inside], (len(scores), *content[inside].shape))
    basis = of.reshape(-1, content.shape[-1])
    weights = np.linalg.lstsq(basis, some.ravel(), rcond=None)[0]
    mean = content @ weights
    off = (some - mean[inside]) ** 2
    floor = 1e-3 * float(off.mean()) + 1e-300
    trend = np.linalg.lstsq(basis, np.log(off.ravel() + floor), rcond=None)[0]
    sd = np.exp(0.5 * np.clip(content @ trend, np.log(floor), None))
    sd *= np.sqrt(float((off / sd[inside] ** 2).mean()))
    return Null(mean, sd, np.sort(((some - mean[inside]) / sd[inside]).ravel()))


def denoised(frame: Floats) -> Floats:
    """``frame`` [rows, cols], counts, without most of its shot noise: Wiener's filter, whose signal is what the local
    power spectrum has beyond the white noise of counts."""
    from scipy.fft import fft2, ifft2
    from scipy.ndimage import uniform_filter

    spectrum = fft2(frame)
    power = uniform_filter(np.abs(spectrum) ** 2, 3, mode="wrap")
    noise = max(float(frame.sum()), 1e-300)
    keep = np.maximum(1.0 - KEPT * noise / np.maximum(power, 1e-300), 0.0)
    keep[0, 0] = 1.0
    return np.asarray(np.maximum(ifft2(spectrum * keep).real, 0.0), dtype=np.float64)


def _repeat(pair: Pair, registration: Registration, truth: Floats, random: np.random.Generator) -> Pair:
    """A pair as ``pair`` would be had nothing been damaged. Rows that jitter are found anew: what is found of them
    follows the noise, and brings frames nearer to each other than they are."""
    expected = registration.redrawn(random).undo(registration.shaken(pair.kernel.apply(truth), random))
    later = random.poisson(np.maximum(expected, 0.0)).astype(np.float64)
    first = random.poisson(truth).astype(np.float64)
    found = registration.with_rows(first, later) if registration.jitters_px > 0.0 else registration
    return Pair.of(first, found.apply(later), pair.valid)


def _content(pair: Pair) -> Floats:
    """What every patch shows [rows, cols, 6]: 1, brightness and structure, and their squares and product."""
    from scipy.ndimage import gaussian_filter, gaussian_gradient_magnitude

    both = pair.matched + pair.later
    level = per_patch(gaussian_filter(both, 2.0)).mean(axis=(2, 3))
    slope = per_patch(gaussian_gradient_magnitude(both, 2.0) ** 2).mean(axis=(2, 3))
    x, y = (_standardised(np.log(np.maximum(q, 1e-6 * q.max() + 1e-12)), pair) for q in (level, slope))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)


def _standardised(values: Floats, pair: Pair) -> Floats:
    inside = values[pair.whole]
    spread = float(inside.std()) if inside.size else 0.0
    return np.clip((values - (inside.mean() if inside.size else 0.0)) / max(spread, 1e-9), -3.0, 3.0)
