"""Bayesian optimisation: a Gaussian process over place and overview evidence chooses the next window."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import Field

from aecontrol.protocols import History
from aecontrol.types import Decision, Explanation, Model, NonNegative, PositiveInt, ScanRegion

from .choosing import (
    MAP_LIMIT,
    Floats,
    Indices,
    best_index,
    centres_nm,
    evidence,
    extent_nm,
    feasible_indices,
    place,
    scan,
    significant,
    sobol_choice,
)

if TYPE_CHECKING:
    from .surrogate import Evidence, Hyperparameters, Prior, Targets

Result = TypeVar("Result")
Acquisition = Literal["logei", "ucb", "max_variance"]

_FITS: OrderedDict[bytes, Hyperparameters | str] = OrderedDict()
_EVIDENCE: OrderedDict[bytes, Evidence | str] = OrderedDict()
"""Fits (or why they failed) of this process, keyed by a digest of everything that they were computed from: forgetting
one changes the time of a decision, never the decision."""

FITS_KEPT = 16
REFIT_EVERY_STEP_UNTIL = 16
JITTER = 1e-2
STEEPEST = 3.0
"""Largest prior slope, in standard deviations of value per standard deviation of evidence (a choice)."""


class _Problem(NamedTuple):
    """One decision, as numbers: M windows at ``places`` [M, 2] in units of the field, of size ``window`` (x, y); their
    evidence [M] with its variance, NaN where there is none; further standardised features [M, d]; and the numbers
    ``which`` [n], values and variances of the sub-scans whose value is known."""

    places: Floats
    window: Floats
    evidence: Floats
    evidence_variances: Floats
    features: Floats
    which: Indices
    values: Floats
    variances: Floats


class _Belief(NamedTuple):
    """What the surrogate says of every window [n], in the units of the value."""

    mean: Floats
    sd: Floats
    incumbent: float
    scale: float
    hyperparameters: Hyperparameters


class Bayes(Model):
    """Gaussian process over window centres with the overview's evidence as its prior mean, whose slope is learned
    (the model: :mod:`policies.surrogate`).

    Until ``n_initial`` sub-scans have a value it ranks by overview evidence (without one: scrambled Sobol). When the
    surrogate fails it takes the next rung, and says so in ``fallback``: default hyper-parameters with jitter, ranking
    by evidence, space filling.
    """

    kind: Literal["bayes"] = "bayes"
    acquisition: Acquisition = Field(
        "ucb",
        description="'ucb' collects the most over all windows; 'logei' seeks the single best one; 'max_variance' maps",
    )
    beta: NonNegative = Field(0.1, description="UCB = mean + sqrt(beta) sd; 0: the posterior mean alone")
    n_initial: PositiveInt = Field(3, description="sub-scans with a value before the surrogate is asked")
    overview_features: tuple[str, ...] = Field(
        (), description="names of overview features used as evidence beside the overview's value"
    )
    denoise_overview: bool = Field(
        True,
        description="average the evidence's stated noise out between neighbouring windows; false where neighbours "
        "have nothing to do with each other (single atoms) or the stated variance is not the noise",
    )

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """The feasible window with the highest acquisition; the lowest index wins a tie."""
        allowed = feasible_indices(history, candidates)
        cheap = evidence(history, candidates)
        problem = _problem(history, candidates, cheap, self.overview_features)
        known = len(problem.values)
        if known < self.n_initial:
            reason = f"{known} of {self.n_initial} sub-scans before the surrogate is asked"
            return self._without_surrogate(history, candidates, allowed, cheap, seed, reason, None)
        belief, fallback = self._believe(problem)
        if belief is None:
            return self._without_surrogate(history, candidates, allowed, cheap, seed, "no surrogate", fallback)
        scores = self._scores(belief)
        index = best_index(scores, allowed, 0.0 if self.acquisition == "logei" else belief.scale)
        mean, sd = float(belief.mean[index]), float(belief.sd[index])
        why = (
            f"{place(candidates, index)}: {_NAMES[self.acquisition]} {scores[index]:.4g} is the highest of "
            f"{allowed.size} feasible windows, expected value {mean:.4g} ± {sd:.2g} after {known} sub-scans"
        )
        if np.isfinite(cheap[index]):
            why += f", overview evidence {cheap[index]:.4g}"
        maps = len(candidates) <= MAP_LIMIT
        explanation = Explanation(
            policy=self.kind,
            why=why,
            candidate=index,
            acquisition=significant(float(scores[index])),
            mean=significant(mean),
            sd=significant(sd),
            fallback=fallback,
            hyperparameters={k: significant(v) for k, v in asdict(belief.hyperparameters).items()},
            mean_map=tuple(significant(v) for v in belief.mean.tolist()) if maps else (),
            sd_map=tuple(significant(v) for v in belief.sd.tolist()) if maps else (),
        )
        return scan(candidates, explanation)

    def _scores(self, belief: _Belief) -> Floats:
        """Acquisition of every window [n], larger is better."""
        if self.acquisition == "max_variance":
            return belief.sd
        if self.acquisition == "ucb":
            return np.asarray(belief.mean + self.beta**0.5 * belief.sd)
        return log_expected_improvement(belief.mean, belief.sd, belief.incumbent)

    def _believe(self, problem: _Problem) -> tuple[_Belief | None, str | None]:
        """The surrogate's belief, or None; and which rung of the ladder gave it."""
        from . import surrogate

        prefix = _fit_size(len(problem.values))
        try:
            targets = surrogate.standardise(problem.values[:prefix], problem.variances[:prefix])
            every = surrogate.rescale(problem.values, problem.variances, targets.mean, targets.scale)
        except surrogate.FitFailed as error:
            return None, f"overview evidence: {error}"
        prior, note = self._prior(problem, targets, prefix)
        fitted = _fitted(prior.first(prefix), targets, problem.window)
        failed = None
        rungs: list[tuple[Hyperparameters, float]] = []
        if isinstance(fitted, str):
            failed = fitted
        else:
            rungs.append((fitted, 0.0))
        rungs.append((surrogate.default_hyperparameters(problem.window), JITTER))
        for hyperparameters, jitter in rungs:
            try:
                mean, sd = surrogate.posterior(prior, every, hyperparameters, jitter)
            except surrogate.FitFailed as error:
                failed = str(error)
                continue
            mean, sd = targets.mean + targets.scale * mean, targets.scale * sd
            if np.isfinite(mean).all() and np.isfinite(sd).all():
                notes = [note, failed and f"default hyper-parameters with jitter: {failed}"]
                belief = _Belief(mean, sd, float(mean[problem.which].max()), targets.scale, hyperparameters)
                return belief, "; ".join(n for n in notes if n) or None
            failed = "the posterior is not finite in the units of the value"
        return None, f"overview evidence: {failed}"

    def _prior(self, problem: _Problem, targets: Targets, prefix: int) -> tuple[Prior, str | None]:
        """Stage 2's prior over the windows, and what was given up to make it.

        The expected slope r0 is such that windows of typical evidence would hold nothing: mean value over mean
        evidence above the median, of the first ``prefix`` sub-scans, so that it changes only when the fit does.
        """
        from .surrogate import Prior

        n, m = len(problem.which), len(problem.places)
        mean, covariance, variance = np.zeros(m), np.ones((n, m)), np.ones(m)
        content, note = self._content(problem)
        spread = float(content.mean.std())
        if spread > 1e-9 * float(np.abs(content.mean).max()):
            seen = content.mean[problem.which[:prefix]]
            above = float(seen.mean() - np.median(content.mean))
            slope = 0.5 / spread
            if above > 0 and targets.mean > 0:
                steepest = STEEPEST / max(float(seen.std()), 1e-9 * spread)
                slope = min(targets.mean / targets.scale / above, steepest)
            mean = slope * (content.mean - seen.mean())
            covariance += slope**2 * content.covariance[problem.which]
            variance += slope**2 * content.covariance.diagonal()
            covariance += np.outer(mean[problem.which], mean / 4)
            variance += mean**2 / 4
        for feature in problem.features.T:
            covariance += np.outer(feature[problem.which], feature / 4)
            variance += feature**2 / 4
        return Prior(problem.places, problem.which, mean, covariance, variance), note

    def _content(self, problem: _Problem) -> tuple[Evidence, str | None]:
        """Stage 1, or the evidence as it is: not asked for, too little of it, too many windows, or the fit failed."""
        from . import surrogate

        known = np.isfinite(problem.evidence)
        note = None
        m = len(problem.places)
        if self.denoise_overview and known.sum() >= self.n_initial and m <= MAP_LIMIT:
            p = problem
            arrays = (p.places, p.evidence, p.evidence_variances, p.window)
            content = _remembered(_EVIDENCE, arrays, lambda: surrogate.denoise(*arrays))
            if not isinstance(content, str):
                return content, None
            note = f"overview evidence as it is: {content}"
        plain = np.where(known, problem.evidence, problem.evidence[known].mean() if known.any() else 0.0)
        return surrogate.Evidence(plain, np.broadcast_to(0.0, (m, m))), note

    def _without_surrogate(
        self,
        history: History,
        candidates: Sequence[ScanRegion],
        allowed: Indices,
        cheap: Floats,
        seed: int,
        reason: str,
        fallback: str | None,
    ) -> Decision:
        """The lower rungs: the highest overview evidence, or without any the Sobol sequence."""
        if np.isfinite(cheap[allowed]).any():
            index = best_index(np.where(np.isfinite(cheap), cheap, -np.inf), allowed)
            why = (
                f"{place(candidates, index)}: highest overview evidence, {cheap[index]:.4g}, of {allowed.size} "
                f"feasible windows ({reason})"
            )
            return scan(candidates, Explanation(policy=self.kind, why=why, candidate=index, fallback=fallback))
        index = sobol_choice(history, candidates, allowed, seed)
        why = (
            f"{place(candidates, index)}: nearest of {allowed.size} feasible windows to Sobol point {history.step} "
            f"({reason}, and no overview evidence)"
        )
        if fallback is not None:
            fallback = fallback.replace("overview evidence", "space filling (no overview evidence)", 1)
        return scan(candidates, Explanation(policy=self.kind, why=why, candidate=index, fallback=fallback))


_NAMES: dict[str, str] = {"logei": "log expected improvement", "ucb": "UCB", "max_variance": "standard deviation"}


def log_expected_improvement(mean: Floats, sd: Floats, incumbent: float) -> Floats:
    """log EI [n] = log s + log(phi(z) + z Phi(z)), z = (mean - incumbent) / s, accurate for any z (Ament et al. 2023,
    arXiv 2310.20708, eq. 9). A window without uncertainty improves by max(mean - incumbent, 0)."""
    from scipy.special import erfcx, ndtr

    result = np.full(mean.shape, -np.inf)
    gain = mean - incumbent
    sure = (sd <= 0) & (gain > 0)
    result[sure] = np.log(gain[sure])
    live = sd > 0
    z = gain[live] / sd[live]
    log_h = np.empty_like(z)
    near, far = z > -1, z < -200
    middle = ~near & ~far
    log_h[near] = np.log(np.exp(-(z[near] ** 2) / 2) / np.sqrt(2 * np.pi) + z[near] * ndtr(z[near]))
    # Below, phi(z) is taken out; what is left is 1 - |z| Mills(|z|), and far out its asymptotic series.
    t = -z[middle]
    log_h[middle] = np.log1p(-t * np.sqrt(np.pi / 2) * erfcx(t / np.sqrt(2))) - t**2 / 2 - np.log(2 * np.pi) / 2
    t = -z[far]
    log_h[far] = -2 * np.log(t) + np.log1p(-3 / t**2 + 15 / t**4) - t**2 / 2 - np.log(2 * np.pi) / 2
    result[live] = np.log(sd[live]) + log_h
    return result


def _fit_size(n: int) -> int:
    """How many of the first n sub-scans the hyper-parameters come from: all while they are few, then the largest power
    of two, at most LARGEST_FIT. A function of n alone, so that a resumed session refits at the same steps."""
    if n <= REFIT_EVERY_STEP_UNTIL:
        return n
    from .surrogate import LARGEST_FIT

    return min(1 << (n.bit_length() - 1), LARGEST_FIT)


def _remembered(
    store: OrderedDict[bytes, Result | str], arrays: tuple[Floats, ...], make: Callable[[], Result]
) -> Result | str:
    """What ``make`` gives for these arrays, computed once; as text why it failed."""
    from .surrogate import FitFailed

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    key = digest.digest()
    if key not in store:
        try:
            store[key] = make()
        except FitFailed as error:
            store[key] = str(error)
        if len(store) > FITS_KEPT:
            store.popitem(last=False)
    return store[key]


def _fitted(prior: Prior, targets: Targets, window: Floats) -> Hyperparameters | str:
    """The fit to these observations, computed once; as text why it failed."""
    from . import surrogate

    seen = prior.which
    arrays = (
        prior.places[seen],
        prior.mean[seen],
        prior.covariance[:, seen],
        targets.values,
        targets.variances,
        window,
    )
    return _remembered(_FITS, arrays, lambda: surrogate.fit(prior, targets, window))


def _problem(history: History, candidates: Sequence[ScanRegion], cheap: Floats, features: tuple[str, ...]) -> _Problem:
    """The history as arrays. Sub-scans off the grid are left out: the overview has no evidence for them."""
    low, size = extent_nm(candidates)
    columns = [
        _standard(np.array([o.features.get(name, np.nan) for o in history.overview]))
        for name in features
        if history.overview
    ]
    rows = [(o, i) for o, i in zip(history.scans, history.scanned, strict=True) if o.value is not None and i >= 0]
    return _Problem(
        places=(centres_nm(candidates) - low) / size,
        window=np.array(candidates[0].fov_nm) / size,
        evidence=cheap,
        evidence_variances=np.array([o.variance or 0.0 for o in history.overview], dtype=np.float64),
        features=np.array(columns).reshape(len(columns), len(candidates)).T,
        which=np.array([i for _, i in rows], dtype=np.intp),
        values=np.array([o.value for o, _ in rows], dtype=np.float64),
        variances=np.array([o.variance or 0.0 for o, _ in rows], dtype=np.float64),
    )


def _standard(column: Floats) -> Floats:
    """A column of evidence with mean 0 and standard deviation 1 over the windows; unknown entries become the mean."""
    known = np.isfinite(column)
    result = np.zeros_like(column)
    if known.any():
        centred = column[known] - column[known].mean()
        spread = centred.std()
        if spread > 1e-9 * max(1.0, float(np.abs(column[known]).max())):
            result[known] = centred / spread
    return result
