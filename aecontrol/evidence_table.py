"""Evidence of damage as means of patches of equal fluence, with the errors that they have and that they share.

Comparisons with one first frame share half of the variance of the null, that frame's noise. They also look at the same
bond units, finite in number: of those broken by the earlier of two looks none is whole in the later. If p and q > p are
the shares broken since the first frame, sampling N units gives Cov = p (1 - q) / N, which is the variance p (1 - p) / N
of the earlier look times (1 - q) / (1 - p). That variance is at least what the scatter of the patches shows; units that
reach over several patches show less there than they add to the mean, so their number counts where it is known. Errors
of a whole frame (registration, contrast), unlike those of patches, do not average out: half of their variance is the
first frame's, half the later's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

from .response import Evidence, Floats

SAME_FLUENCE = 0.02
"""Patches whose logarithms of fluence differ by less enter as one mean."""
_POOLED = 10.0  # degrees of freedom that the scatter of all pairs counts against the scatter of one
_MOST_BROKEN = 0.95
_LEAST_EIGENVALUE = 1e-2  # of a correlation matrix that is an estimate


@dataclass(frozen=True)
class Means:
    """Mean scores [r] with the ``phase`` [r] and the fluences ``first`` and ``later`` [r], e/A^2; ``error`` [r, r]:
    covariance of the means; ``shared`` [r, r]: correlation of the errors of whole frames; ``null_sd`` of one patch."""

    phase: NDArray[np.int64]
    first: Floats
    later: Floats
    mean: Floats
    error: Floats
    shared: Floats
    null_sd: float


@dataclass(frozen=True)
class _Row:
    """One mean: the number of its comparison, what it was compared with, its variances by null and by what the patches
    scatter beyond it, bond units in it."""

    pair: int
    phase: int
    group: tuple[str, int, int]
    first: float
    later: float
    mean: float
    null: float
    excess: float
    units: float


def check_evidence(evidence: Sequence[Evidence], phases: int) -> None:
    """Raises BadInput for what no fit can use."""
    for part in evidence:
        sizes = {np.shape(values) for values in (part.first, part.later, part.score, part.sd)}
        if len(sizes) != 1 or len(next(iter(sizes))) != 1:
            raise BadInput(f"evidence comes as arrays of {sorted(sizes)}", "give one row of equal length each")
        if not 0 <= part.phase < phases:
            raise BadInput(f"evidence is of phase {part.phase} of {phases}", "give the index of a phase")
        if not all(np.isfinite(values).all() for values in (part.first, part.later, part.score, part.sd)):
            raise BadInput("evidence holds numbers that are not finite", "leave patches out that are not valid")
        if (np.asarray(part.first) < 0.0).any() or (np.asarray(part.later) < part.first).any():
            raise BadInput("fluence of evidence is negative or falls", "give 0 <= first <= later, e/A^2")
        if not part.units > 0.0:
            raise BadInput(f"evidence has {part.units} bond units in a patch", "give a number above 0, or inf")
        if (np.asarray(part.sd) <= 0.0).any():
            raise BadInput("the null of evidence has a standard deviation of 0", "give that of an undamaged patch")


def means_of(evidence: Sequence[Evidence], calibrated: bool) -> Means:
    """``evidence`` as means; ``calibrated``: scores are damaged fractions, else those of the highest mean."""
    pairs = [part for part in evidence if len(part.score)]
    rows = [
        row for number, excess in enumerate(_excess_variance(pairs)) for row in _rows(pairs[number], number, excess)
    ]
    mean = np.array([row.mean for row in rows])
    top = 1.0 if calibrated else max(mean.max(initial=0.0), 1e-9) / _MOST_BROKEN
    broken = np.clip(mean / top, 0.0, _MOST_BROKEN)
    units = np.array([row.units for row in rows])
    chance = np.maximum([row.excess for row in rows], broken * (1.0 - broken) / units)
    error, shared = np.zeros((2, len(rows), len(rows)))
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            same_frame = bool(row.group[0]) and row.group[0] == other.group[0]
            shared[i, j] = 0.5 * (row.pair == other.pair) + 0.5 * (row.pair == other.pair or same_frame)
            if i == j:
                error[i, j] = row.null + chance[i]
            elif same_frame and row.pair != other.pair and row.group == other.group:
                early, late = (i, j) if broken[i] <= broken[j] else (j, i)
                error[i, j] = 0.5 * min(row.null, other.null)
                error[i, j] += chance[early] * (1.0 - broken[late]) / (1.0 - broken[early])
    return Means(
        np.array([row.phase for row in rows], dtype=np.int64),
        np.array([row.first for row in rows]),
        np.array([row.later for row in rows]),
        mean,
        _positive(error),
        shared,
        float(np.median(np.concatenate([part.sd for part in pairs]))) if pairs else 1.0,
    )


def _positive(covariance: Floats) -> Floats:
    """The nearest thing to a covariance that is one: eigenvalues of its correlations are kept off 0."""
    scale = np.sqrt(np.diag(covariance))
    value, vector = np.linalg.eigh(covariance / np.outer(scale, scale))
    return np.asarray((vector * np.maximum(value, _LEAST_EIGENVALUE)) @ vector.T * np.outer(scale, scale))


def _groups(part: Evidence) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Patches of a comparison whose fluences agree, with a number that tells first fluences apart."""
    keys = np.round(np.log1p(np.stack([part.first, part.later])) / SAME_FLUENCE).astype(np.int64)
    different, group = np.unique(keys, axis=1, return_inverse=True)
    for number, key in enumerate(different[0]):
        yield int(key), np.flatnonzero(group == number)


def _rows(part: Evidence, pair: int, excess: float) -> Iterator[_Row]:
    """Means weighted by the inverse of the variances."""
    weight = 1.0 / (part.sd**2 + excess)
    for key, group in _groups(part):
        share = weight[group] / weight[group].sum()
        first, later, mean = (float(share @ values[group]) for values in (part.first, part.later, part.score))
        null, scatter = float(share**2 @ part.sd[group] ** 2), float(excess * (share @ share))
        yield _Row(
            pair, part.phase, (part.frame, part.phase, key), first, later, mean, null, scatter, len(group) * part.units
        )


def _excess_variance(pairs: Sequence[Evidence]) -> list[float]:
    """By pair: how much more the patches of equal fluence scatter than the null lets them, drawn towards the mean of
    all pairs where there are few."""
    excess, freedom = np.zeros(len(pairs)), np.zeros(len(pairs))
    for number, part in enumerate(pairs):
        for _, group in _groups(part):
            deviation = part.score[group] - part.score[group].mean()
            excess[number] += np.sum(deviation**2) - np.mean(part.sd[group] ** 2) * (len(group) - 1)
            freedom[number] += len(group) - 1
    pooled = excess.sum() / max(freedom.sum(), 1.0)
    return [float(value) for value in np.maximum((excess + _POOLED * pooled) / (freedom + _POOLED), 0.0)]
