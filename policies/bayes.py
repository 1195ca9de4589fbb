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
from aecontrol.types import Decision, Explanation, Model, NonNegative, PositiveInt, ScanRegion, Stop

from .choosing import (
    MAP_LIMIT,
    Floats,
    Indices,
    best_index,
    centres_nm,
    evidence,
    extent_nm,
    feasible_indices,
    first_kind,
    place,
    scan,
    significant,
    sobol_choice,
)
from .improvement import log_expected_improvement
from .worth import Cost, Looks, charged, learn_threshold, log_legible, log_price, per_window, unseen

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
    """One decision, as numbers: all windows, and the sub-scans whose value is known. Values and variances are those of
    windows of the first kind; ``gain`` and ``scanned_gain`` are what each window and sub-scan shows relative to one."""

    windows: Design
    window_size: Floats
    scanned: Design
    values: Floats
    variances: Floats
    gain: Floats
    scanned_gain: Floats
    threshold: float


class _Terms(NamedTuple):
    """What is weighed beside expected values: how closely windows look, the logarithm of legibility over price [n], and
    whether all that is the same for all windows."""

    looks: Looks
    factor: Floats
    plain: bool


class _Belief(NamedTuple):
    """What the surrogate says of every window [n], in the units of the value."""

    mean: Floats
    sd: Floats
    incumbent: float
    scale: float
    hyperparameters: Hyperparameters


class Bayes(Model):
    """Gaussian process over window centres, with a prior mean learned from the overview's evidence.

    With a ``cost``, windows of several kinds or known damage, an acquisition is of what a window is still worth: what
    it would show that no sub-scan has shown and that can still be told for damage, per unit charge.
    'ucb' is then the expected number of targets above 0, with the UCB as mean, over the charge: what collects the most
    from a budget. 'logei' cools: the less of the budget is left, the less the charge counts, for it is the best one
    that is wanted in the end. Where no window is worth anything any more it ends the session. Several kinds of windows
    need a target that is counted ('vacancy', 'atom_count').

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
    cost: Cost = Field(
        "none", description="the charge that an acquisition is divided by: 'electrons', 'damage', 'seconds', or 'none'"
    )
    n_initial: PositiveInt = Field(3, description="sub-scans with a value before the surrogate is asked")
    overview_features: tuple[str, ...] = Field(
        (), description="names of overview features used as evidence beside the overview's value"
    )

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """The feasible window with the highest acquisition; the lowest index wins a tie."""
        allowed = feasible_indices(history, candidates)
        cheap = evidence(history, candidates)
        terms = self._terms(history, candidates)
        known = sum(o.value is not None for o in history.scans)
        if known < self.n_initial:
            reason = f"{known} of {self.n_initial} sub-scans before the surrogate is asked"
            return self._without_surrogate(history, candidates, allowed, terms, seed, reason, None)
        problem = _problem(history, candidates, cheap / terms.looks.area, terms.looks, self.overview_features)
        belief, fallback = self._believe(problem)
        if belief is None:
            return self._without_surrogate(history, candidates, allowed, terms, seed, "no surrogate", fallback)
        scores = self._scores(belief, terms)
        if not terms.plain and not np.isfinite(scores[allowed]).any():
            return _nothing_left(self.kind, allowed.size, known)
        absolute = terms.plain and self.acquisition != "logei"
        index = best_index(scores, allowed, belief.scale if absolute else 0.0)
        mean, sd = float(belief.mean[index]), float(belief.sd[index])
        name = _NAMES[self.acquisition] if terms.plain else f"log {_NAMES[self.acquisition].removeprefix('log ')}"
        why = (
            f"{place(candidates, index)}: {name}{self._per(terms)} {scores[index]:.4g} is the highest of "
            f"{allowed.size} feasible windows, expected value {mean:.4g} ± {sd:.2g} after {known} sub-scans"
        )
        if np.isfinite(cheap[index]):
            why += f", overview evidence {cheap[index]:.4g}"
        why += self._circumstances(history, candidates, index)
        maps = len(candidates) <= MAP_LIMIT
        learned = asdict(belief.hyperparameters)
        if not terms.looks.alike:
            learned["threshold_exposure"] = problem.threshold
        explanation = Explanation(
            policy=self.kind,
            why=why,
            candidate=index,
            acquisition=significant(float(scores[index])),
            mean=significant(mean),
            sd=significant(sd),
            fallback=fallback,
            hyperparameters={k: significant(v) for k, v in learned.items()},
            mean_map=tuple(significant(v) for v in belief.mean.tolist()) if maps else (),
            sd_map=tuple(significant(v) for v in belief.sd.tolist()) if maps else (),
        )
        return scan(candidates, explanation)

    def _terms(self, history: History, candidates: Sequence[ScanRegion]) -> _Terms:
        """What this decision weighs beside expected values."""
        looks = Looks.of(candidates, candidates[0])
        price = log_price(history, self.cost, cools=self.acquisition == "logei")
        plain = self.cost == "none" and looks.alike and not history.validity
        return _Terms(looks, log_legible(history, candidates) - price, plain)

    def _scores(self, belief: _Belief, terms: _Terms) -> Floats:
        """Acquisition of every window [n], larger is better; its logarithm where more than expected values count."""
        if self.acquisition == "max_variance":
            return belief.sd if terms.plain else _log(belief.sd) + terms.factor
        if self.acquisition == "ucb":
            ucb = np.asarray(belief.mean + self.beta**0.5 * belief.sd)
            return ucb if terms.plain else log_expected_improvement(ucb, belief.sd, 0.0) + terms.factor
        return log_expected_improvement(belief.mean, belief.sd, belief.incumbent) + terms.factor

    def _per(self, terms: _Terms) -> str:
        """What the acquisition is divided by, in words."""
        if self.cost == "none":
            return "" if terms.plain else " of what is left to see"
        return f" of what is left to see per {_CURRENCIES[self.cost]} charged"

    def _circumstances(self, history: History, candidates: Sequence[ScanRegion], index: int) -> str:
        """Kind, state and charge of the chosen window, in words; empty where all that is alike or unknown."""
        words = ""
        if not Looks.of(candidates, candidates[0]).alike:
            region = candidates[index]
            words += f"; {region.fov_nm[0]:.4g} x {region.fov_nm[1]:.4g} nm, {1e6 * region.dwell_time_s:.4g} us a pixel"
        if history.validity:
            words += f"; {100 * history.validity[index]:.3g} % of its matter still whole"
        if self.cost != "none":
            words += f"; charge {charged(history, self.cost)[index]:.4g} {_CURRENCIES[self.cost]}"
        return words

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
                    problem.gain * (targets.mean + targets.scale * mean),
                    problem.gain * (targets.scale * sd),
                    float((problem.scanned_gain * (targets.mean + targets.scale * at_scans)).max()),
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
        terms: _Terms,
        seed: int,
        reason: str,
        fallback: str | None,
    ) -> Decision:
        """The lower rungs: the highest overview evidence, or without any the Sobol sequence; the end where nothing is
        left to see."""
        cheap = evidence(history, candidates)
        scores = np.where(np.isfinite(cheap), cheap, -np.inf)
        if not terms.plain:
            worth = terms.factor + _log(terms.looks.gain(1.0) * unseen(candidates, terms.looks, history, 1.0))
            if not np.isfinite(worth[allowed]).any():
                return _nothing_left(self.kind, allowed.size, len(history.scans))
            allowed = allowed[np.isfinite(worth[allowed])]
            if np.isfinite(cheap).any():
                scores = _log_evidence(cheap / terms.looks.area) + worth
        if np.isfinite(scores[allowed]).any():
            index = best_index(scores, allowed)
            why = (
                f"{place(candidates, index)}: highest overview evidence{self._per(terms)}, {cheap[index]:.4g}, of "
                f"{allowed.size} feasible windows ({reason})"
            )
            why += self._circumstances(history, candidates, index)
            return scan(candidates, Explanation(policy=self.kind, why=why, candidate=index, fallback=fallback))
        allowed = allowed[first_kind(candidates, allowed)[allowed]]
        index = sobol_choice(history, candidates, allowed, seed)
        why = (
            f"{place(candidates, index)}: nearest of {allowed.size} feasible windows to Sobol point {history.step} "
            f"({reason}, and no overview evidence)"
        )
        if fallback is not None:
            fallback = fallback.replace("overview evidence", "space filling (no overview evidence)", 1)
        return scan(candidates, Explanation(policy=self.kind, why=why, candidate=index, fallback=fallback))


_NAMES: dict[str, str] = {"logei": "log expected improvement", "ucb": "UCB", "max_variance": "standard deviation"}
_CURRENCIES: dict[str, str] = {"electrons": "electrons", "damage": "nm^2 of damage", "seconds": "seconds"}


def _log(values: Floats) -> Floats:
    """Logarithm [n]; -inf of 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values))


def _log_evidence(cheap: Floats) -> Floats:
    """Logarithm of the evidence [n], of what is not positive as of one millionth of the largest; -inf of NaN."""
    known = np.isfinite(cheap)
    least = 1e-6 * max(float(np.abs(cheap[known]).max()), np.finfo(np.float64).tiny)
    return np.where(known, _log(np.maximum(np.where(known, cheap, 0.0), least)), -np.inf)


def _nothing_left(kind: str, feasible: int, known: int) -> Stop:
    """The decision to end, where every feasible window would only show what is known, or matter that is dead."""
    why = f"{feasible} feasible windows, but none would show anything that {known} sub-scans have not"
    return Stop(reason=why, explanation=Explanation(policy=kind, why=why))


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


def _problem(
    history: History, candidates: Sequence[ScanRegion], cheap: Floats, looks: Looks, features: tuple[str, ...]
) -> _Problem:
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
    scanned = Design((centres_nm([o.region for o, _ in rows]) - low) / size, of_scans)
    window = np.array(candidates[0].fov_nm) / size
    values = np.array([o.value for o, _ in rows], dtype=np.float64)
    variances = np.array([o.variance or 0.0 for o, _ in rows], dtype=np.float64)
    gain, scanned_gain, threshold = np.ones(len(candidates)), np.ones(len(rows)), 1.0
    if not looks.alike:
        told = Looks.of([o.region for o, _ in rows], candidates[0])
        prefix = _fit_size(len(rows))
        threshold = learn_threshold(
            scanned.first(prefix), values[:prefix], variances[:prefix], told.first(prefix), window
        )
        values, variances = per_window(values, variances, told, threshold)
        gain, scanned_gain = looks.gain(threshold) * unseen(candidates, looks, history, threshold), told.gain(threshold)
    windows = Design((centres_nm(candidates) - low) / size, of_windows)
    return _Problem(windows, window, scanned, values, variances, gain, scanned_gain, threshold)


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
