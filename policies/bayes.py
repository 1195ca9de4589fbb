"""Bayesian optimisation: a Gaussian process over place and overview evidence chooses the next window."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, NamedTuple

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
    from .surrogate import Design, Hyperparameters, Targets

Acquisition = Literal["logei", "ucb", "max_variance"]

_FITS: OrderedDict[bytes, Hyperparameters | str] = OrderedDict()
"""Fits (or why they failed) of this process, keyed by a digest of everything that they were computed from: forgetting
one changes the time of a decision, never the decision."""

FITS_KEPT = 64
REFIT_EVERY_STEP_UNTIL = 16
LARGEST_FIT = 256
JITTER = 1e-2


class _Problem(NamedTuple):
    """One decision, as numbers: all windows, and the sub-scans whose value is known."""

    windows: Design
    window_size: Floats
    scanned: Design
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
    """Gaussian process over window centres, with a prior mean learned from the overview's evidence.

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

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """The feasible window with the highest acquisition; the lowest index wins a tie."""
        allowed = feasible_indices(history, candidates)
        cheap = evidence(history, candidates)
        known = sum(o.value is not None for o in history.scans)
        if known < self.n_initial:
            reason = f"{known} of {self.n_initial} sub-scans before the surrogate is asked"
            return self._without_surrogate(history, candidates, allowed, cheap, seed, reason, None)
        belief, fallback = self._believe(_problem(history, candidates, cheap, self.overview_features))
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

        n = len(problem.values)
        try:
            prefix = _fit_size(n)
            targets = surrogate.standardise(problem.values[:prefix], problem.variances[:prefix])
            every = surrogate.rescale(problem.values, problem.variances, targets.mean, targets.scale)
        except surrogate.FitFailed as error:
            return None, f"overview evidence: {error}"
        fitted = _fitted(problem.scanned.first(prefix), targets, problem.window_size)
        fallback = None
        rungs: list[tuple[Hyperparameters, float]] = []
        if isinstance(fitted, str):
            fallback = fitted
        else:
            rungs.append((fitted, 0.0))
        rungs.append((surrogate.default_hyperparameters(problem.window_size), JITTER))
        for hyperparameters, jitter in rungs:
            try:
                mean, sd = surrogate.posterior(problem.scanned, every, problem.windows, hyperparameters, jitter)
                at_scans, _ = surrogate.posterior(problem.scanned, every, problem.scanned, hyperparameters, jitter)
                belief = _Belief(
                    targets.mean + targets.scale * mean,
                    targets.scale * sd,
                    float(targets.mean + targets.scale * at_scans.max()),
                    targets.scale,
                    hyperparameters,
                )
                if not (np.isfinite(belief.mean).all() and np.isfinite(belief.sd).all()):
                    raise surrogate.FitFailed("the posterior is not finite in the units of the value")
            except surrogate.FitFailed as error:
                fallback = str(error)
            else:
                return belief, None if fallback is None else f"default hyper-parameters with jitter: {fallback}"
        return None, f"overview evidence: {fallback}"

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
    return min(1 << (n.bit_length() - 1), LARGEST_FIT)


def _fitted(design: Design, targets: Targets, window: Floats) -> Hyperparameters | str:
    """The fit to these observations, remembered; as text why there is none."""
    from . import surrogate

    digest = hashlib.sha256(repr((design.evidence.shape, window.tolist())).encode())
    for array in (design.places, design.evidence, targets.values, targets.variances):
        digest.update(np.ascontiguousarray(array).tobytes())
    key = digest.digest()
    if key not in _FITS:
        try:
            _FITS[key] = surrogate.fit(design, targets, window)
        except surrogate.FitFailed as error:
            _FITS[key] = str(error)
        if len(_FITS) > FITS_KEPT:
            _FITS.popitem(last=False)
    return _FITS[key]


def _problem(history: History, candidates: Sequence[ScanRegion], cheap: Floats, features: tuple[str, ...]) -> _Problem:
    from .surrogate import Design

    low, size = extent_nm(candidates)
    columns = [cheap] if history.overview else []
    columns += [np.array([o.features.get(name, np.nan) for o in history.overview]) for name in features]
    of_windows = np.stack([_standard(column) for column in columns], axis=1) if columns and history.overview else None
    if of_windows is None:
        of_windows = np.zeros((len(candidates), 0))
    rows = [(o, i) for o, i in zip(history.scans, history.scanned, strict=True) if o.value is not None]
    of_scans = np.zeros((len(rows), of_windows.shape[1]))
    for row, (_, index) in enumerate(rows):
        if index >= 0:
            of_scans[row] = of_windows[index]
    return _Problem(
        windows=Design((centres_nm(candidates) - low) / size, of_windows),
        window_size=np.array(candidates[0].fov_nm) / size,
        scanned=Design((centres_nm([o.region for o, _ in rows]) - low) / size, of_scans),
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
