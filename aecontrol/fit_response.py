"""How damage follows fluence, fitted: a hierarchical Bayesian model in Pyro.

Score of a patch between two exposures, with A the metric's gain and F_p the critical fluence of the patch's phase p:

    score = A (exp(-(F_first / F_p)^k) - exp(-(F_later / F_p)^k)) + error shared by the pair of frames + own error

    log F ~ Normal(log reference, 2), log F_p ~ Normal(log F, 1.5); A ~ LogNormal(0, gain_sd) where the metric is
    calibrated, else HalfNormal(1); s.d. of the shared errors ~ HalfNormal(0.3 median null s.d. and metric_sd together).

The s.d. of a patch's own error is that of an undamaged patch or, where the patches of a pair scatter more than that
about each other, what they scatter: damage comes in whole bond units. Patches of a pair whose fluences agree within 2 %
enter as their weighted mean, which loses nothing; comparisons with the same first frame have errors in common
(``evidence_table``).

The posterior is sampled by sequential Monte Carlo under that Pyro model: populations of points go from the prior to
the posterior as the evidence is given more and more weight, resampled and moved by Metropolis steps on the way (Del
Moral, Doucet and Jasra 2006, 10.1111/j.1467-9868.2006.00553.x). It needs no start, no gradient and no tuning, follows
the long ridge that a critical fluence far beyond the data leaves, and takes a tenth of the time of Pyro's NUTS, which
the tests hold it against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from aecontrol.errors import BadInput

from .evidence_table import check_evidence, means_of
from .response import Evidence, Response

BETWEEN_SPECIMENS, BETWEEN_PHASES = 2.0, 1.5
"""Prior s.d. of log F, and of log F_p about it."""
FIRST_SD = 0.3
"""How far below the fluence of a first frame a critical fluence may lie, in the logarithm: whoever chose the ladder saw
a specimen in it. Else a robust phase can pass for one that the first frame has already destroyed (a choice)."""
SHARED = 0.3
"""Prior scale of the error that the patches of a pair of frames share, in null s.d. of one patch."""
_NUDGE = 1.0 + 1e-4  # of a parameter, for a difference quotient
_POPULATIONS, _POINTS = 4, 256
_ALIKE, _MORE = 1.05, 16  # r_hat from which on so many times the points are taken
_MOVES, _LAST_MOVES = 6, 24
_KEPT = 0.5  # share of the points that a step towards the posterior leaves effective


def fit_response(
    evidence: Sequence[Evidence],
    phases: Sequence[str],
    reference_e_per_A2: float,
    exponent: float = 1.0,
    gain_sd: float | None = None,
    metric_sd: float = 0.0,
    seed: int = 0,
    draws: int = 128,
) -> Response:
    """The posterior of the critical fluences of ``phases`` and of the metric's gain, given one :class:`Evidence` for
    each phase in each pair of frames; without patches, the prior. ``gain_sd``: s.d. of the logarithm of the gain of a
    metric calibrated to damaged fraction, from its model card; None: not calibrated. ``metric_sd``: s.d. of what the
    metric is off by for a whole pair of frames, beyond noise and gain. Repeatable: depends on ``seed``.

    Diagnostics: ``r_hat`` between independent populations (trust below 1.05), ``effective_draws``, ``acceptance``,
    ``log_evidence``, ``shared_sd`` of the error of a pair. Raises BadInput for input that no fit can use.
    """
    _check(phases, reference_e_per_A2, exponent, gain_sd, draws)
    check_evidence(evidence, len(phases))
    table = _table(evidence, len(phases), math.log(reference_e_per_A2), exponent, gain_sd, metric_sd)
    if len(table.mean):
        points, diagnostics = _climb(table, seed, _POINTS)
        if diagnostics["r_hat"] > _ALIKE:  # several explanations: more points weigh them against each other
            points, diagnostics = _climb(table, seed, _MORE * _POINTS)
        points = points[torch.linspace(0, len(points) - 1, draws, dtype=torch.float64).round().long()]
    else:
        points, diagnostics = _sobol(draws, table.unknowns, seed), {}
    latent = _Latent.of(table, points)
    return Response(
        phases=tuple(phases),
        critical_fluence_e_per_A2=tuple(tuple(column.tolist()) for column in latent.critical.T),
        amplitude=tuple(latent.amplitude.tolist()),
        exponent=exponent,
        tested_e_per_A2=tuple(_tested(evidence, phase) for phase in range(len(phases))),
        patches=sum(len(part.score) for part in evidence),
        method="sequential Monte Carlo" if diagnostics else "prior",
        diagnostics=diagnostics and diagnostics | _told(gain_sd, metric_sd),
    )


def _told(gain_sd: float | None, metric_sd: float) -> dict[str, float]:
    """What the fit was told of the metric, as :func:`criticise` needs it."""
    return {"metric_sd": metric_sd} | ({} if gain_sd is None else {"gain_sd": gain_sd})


def criticise(response: Response, evidence: Sequence[Evidence]) -> float:
    """Posterior predictive p-value of the response's law, given the evidence that it was fitted to.

    The mean scores are held against the law, at every draw, leaving out what another critical fluence or gain would
    explain and with errors of whole frames as large as the prior takes them to be: all that is left (chi-squared),
    and what another exponent would explain of it (one degree of freedom); the smaller p-value, doubled. Below 0.01
    the law does not describe the data: another exponent, a response that changed during the session, or patches that
    are not of one phase. 1 where there are too few comparisons to tell.
    """
    from scipy.stats import chi2

    gain_sd = response.diagnostics.get("gain_sd")
    metric_sd = response.diagnostics.get("metric_sd", 0.0)
    table = _table(evidence, len(response.phases), 0.0, response.exponent, gain_sd, metric_sd)
    if not len(table.mean):
        return 1.0
    critical = torch.tensor(response.critical_fluence_e_per_A2, dtype=torch.float64).T
    amplitude = torch.tensor(response.amplitude, dtype=torch.float64)
    shared = table.shared_scale * _half_normal(_sobol(len(amplitude), 1, 0))[:, None]
    unit = torch.sqrt(1.0 + shared**2 * table.spread)

    def in_units(rows: Tensor, prior: float | Tensor = 0.0) -> Tensor:
        last = torch.as_tensor(prior).expand(len(rows))[:, None] / (gain_sd or math.inf)
        return torch.cat([rows @ table.whiten / unit, last], -1)

    expected = table.expected(critical, amplitude)
    away = in_units(table.mean - expected, -amplitude.log())
    free = [in_units(rows) for rows in _slopes(table, critical, amplitude)] + [in_units(expected, 1.0)]
    shape = in_units(replace(table, exponent=table.exponent * _NUDGE).expected(critical, amplitude) - expected)
    basis, size, _ = torch.linalg.svd(torch.stack(free, -1), full_matrices=False)
    basis = basis * (size > 1e-6 * size[..., :1])[..., None, :]
    away, shape = (part - (basis @ (basis.mT @ part[..., None])).squeeze(-1) for part in (away, shape))
    freedom = len(table.mean) + (gain_sd is not None) - basis.square().sum((-1, -2)).round()
    along = (away * shape).sum(-1) ** 2 / shape.square().sum(-1).clamp(min=1e-300)
    every, one = chi2.sf(away.square().sum(-1).numpy(), freedom.clamp(min=1e-9)), chi2.sf(along.numpy(), 1)
    return float(min(1.0, 2.0 * min(every.mean(), one.mean()))) if freedom.min() >= 1 else 1.0


def _slopes(table: _Table, critical: Tensor, amplitude: Tensor) -> Iterator[Tensor]:
    """How the means change with every critical fluence, up to a factor."""
    for phase in range(table.phases):
        nudged = critical.clone()
        nudged[:, phase] *= _NUDGE
        yield (table.expected(nudged, amplitude) - table.expected(critical, amplitude)) / (_NUDGE - 1.0)


# ------------------------------------------------------------ the model


@dataclass(frozen=True)
class _Table:
    """Evidence as means [r]; ``whiten`` [r, r] takes them to coordinates in which their errors are independent, of
    variance 1 + ``spread`` [r] times the variance of the errors of whole frames. ``looked`` [p]: fluence of each phase
    in the middle of its earliest first frame; 0 where there is none."""

    phase: Tensor
    first: Tensor
    later: Tensor
    mean: Tensor
    whiten: Tensor
    spread: Tensor
    phases: int
    log_reference: float
    exponent: float
    gain_sd: float | None
    shared_scale: float
    looked: Tensor

    @property
    def unknowns(self) -> int:
        return self.phases + 3

    def expected(self, critical: Tensor, amplitude: Tensor) -> Tensor:
        """Means without error [..., r], for critical fluences [..., p] and gains [...]."""
        scale = critical[..., self.phase]
        whole = torch.exp(-((self.first / scale) ** self.exponent)), torch.exp(-((self.later / scale) ** self.exponent))
        return amplitude[..., None] * (whole[0] - whole[1])


@dataclass(frozen=True)
class _Latent:
    """What is not known: critical fluences [..., p], gain [...], s.d. of shared errors [...]."""

    critical: Tensor
    amplitude: Tensor
    shared: Tensor

    @classmethod
    def of(cls, table: _Table, point: Tensor) -> _Latent:
        """From coordinates [..., p + 3] that are standard normal under the prior: those of the phases, of their common
        place, of the gain and of the shared error."""
        own, common, gain, shared = point[..., :-3], point[..., -3], point[..., -2], point[..., -1]
        spread = BETWEEN_SPECIMENS * common[..., None] + BETWEEN_PHASES * own
        amplitude = _half_normal(gain) if table.gain_sd is None else torch.exp(table.gain_sd * gain)
        return cls(torch.exp(table.log_reference + spread), amplitude, table.shared_scale * _half_normal(shared))


def model(table: _Table, shape: tuple[int, ...] = ()) -> None:
    """The Pyro model of ``table``, for as many points at once as ``shape`` says."""
    zero = torch.zeros((*shape, table.unknowns), dtype=torch.float64)
    point = pyro.sample("point", dist.Normal(zero, 1.0).to_event(1))  # type: ignore[no-untyped-call]
    pyro.factor("scores", _log_likelihood(table, _Latent.of(table, point)))


def _log_likelihood(table: _Table, latent: _Latent) -> Tensor:
    """Of the means, which are normal; and of the first frames, which showed a specimen more whole than not."""
    away = (table.mean - table.expected(latent.critical, latent.amplitude)) @ table.whiten
    variance = 1.0 + latent.shared[..., None] ** 2 * table.spread
    gone = torch.log(table.looked / latent.critical).clamp(min=0.0) / FIRST_SD
    return -0.5 * ((away.square() / variance + variance.log()).sum(-1) + gone.square().sum(-1))


def _half_normal(point: Tensor) -> Tensor:
    """The half normal quantile of a standard normal coordinate: smooth and monotone up to 8 s.d., constant beyond."""
    quantile: Tensor = torch.special.ndtri(0.5 * torch.special.ndtr(-point.clamp(max=8.0)))
    return -quantile


# ------------------------------------------------------------ the evidence


def _check(phases: Sequence[str], reference: float, exponent: float, gain_sd: float | None, draws: int) -> None:
    """Raises BadInput for a question that has no answer."""
    if not phases:
        raise BadInput("a response was asked for without phases", "name at least one phase of the specimen")
    numbers = {"reference fluence": reference, "exponent": exponent, "draws": draws}
    numbers |= {} if gain_sd is None else {"gain_sd": gain_sd}
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0.0):
            raise BadInput(f"the {name} of a response is {value}; it must be above 0", "give a positive number")


def _tested(evidence: Sequence[Evidence], phase: int) -> float:
    """Highest fluence at which a phase was seen, e/A^2."""
    return max((float(np.max(part.later)) for part in evidence if part.phase == phase and len(part.later)), default=0.0)


def _table(
    evidence: Sequence[Evidence],
    phases: int,
    log_reference: float,
    exponent: float,
    gain_sd: float | None,
    metric_sd: float,
) -> _Table:
    """Evidence as means, and the coordinates in which their errors are independent."""
    means = means_of(evidence, gain_sd is not None)
    own = np.linalg.inv(np.linalg.cholesky(means.error)) if len(means.mean) else means.error
    spread, axes = np.linalg.eigh(own @ means.shared @ own.T)

    def tensor(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    return _Table(
        tensor(means.phase),
        tensor(means.first),
        tensor(means.later),
        tensor(means.mean),
        tensor(own.T @ axes),
        tensor(np.maximum(spread, 0.0)),
        phases,
        log_reference,
        exponent,
        gain_sd,
        math.hypot(SHARED * means.null_sd, metric_sd),
        tensor(np.array([_looked(evidence, phase) for phase in range(phases)])),
    )


def _looked(evidence: Sequence[Evidence], phase: int) -> float:
    """Lowest fluence at which a first frame of a phase was taken, e/A^2."""
    return min((float(np.min(part.first)) for part in evidence if part.phase == phase and len(part.first)), default=0.0)


# ------------------------------------------------------------ the sampler


def _sobol(count: int, dimensions: int, seed: int) -> Tensor:
    """Standard normal points that fill their space evenly [count, dimensions]; [count] for one dimension."""
    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    points: Tensor = torch.special.ndtri(engine.draw(count, dtype=torch.float64).clamp(1e-9, 1.0 - 1e-9))
    return points.squeeze(-1)


def _scores(table: _Table, points: Tensor) -> tuple[Tensor, Tensor]:
    """Log prior and log likelihood of points under the Pyro model."""
    conditioned = poutine.condition(model, data={"point": points})
    sites = poutine.trace(conditioned).get_trace(table, tuple(points.shape[:-1]))
    sites.compute_log_prob()
    return sites.nodes["point"]["log_prob"], sites.nodes["scores"]["log_prob"]


def _climb(table: _Table, seed: int, size: int) -> tuple[Tensor, dict[str, float]]:
    """Populations of ``size`` points from the prior to the posterior: their points [n, d], interleaved, and
    diagnostics."""
    generator = torch.Generator().manual_seed(seed)
    points = _sobol(_POPULATIONS * size, table.unknowns, seed).reshape(_POPULATIONS, size, -1)
    _, likelihood = _scores(table, points)
    weight, evidence = 0.0, 0.0
    while weight < 1.0:
        step = _step(likelihood, 1.0 - weight)
        weight = 1.0 if step == 1.0 - weight else weight + step
        evidence += float(torch.logsumexp(step * likelihood.flatten(), 0)) - math.log(likelihood.numel())
        chosen = _resample(torch.softmax(step * likelihood, -1), generator)
        points = torch.gather(points, 1, chosen[..., None].expand_as(points))
        start = points
        points, likelihood, accepted = _move(table, points, weight, generator)
    last = 1.0 - float(_correlation(start, points).max()) ** 2
    mean, variance = points.mean(1), points.var(1).mean(0)
    r_hat = torch.sqrt(1.0 - 1.0 / size + mean.var(0) / variance).max()
    return points.transpose(0, 1).flatten(0, 1), {
        "r_hat": float(r_hat),
        "effective_draws": last * likelihood.numel(),
        "acceptance": accepted,
        "log_evidence": evidence,
        "shared_sd": float(_Latent.of(table, points).shared.median()),
    }


def _step(likelihood: Tensor, most: float) -> float:
    """How much more weight the evidence can be given: bisection of the effective share of every population."""

    def kept(step: float) -> float:
        shares = torch.softmax(step * likelihood, -1)
        return float(shares.square().sum(-1).reciprocal().min()) / likelihood.shape[-1]

    if kept(most) >= _KEPT:
        return most
    low, high = 0.0, most
    while low == 0.0 or high > 1.01 * low:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kept(middle) >= _KEPT else (low, middle)
    return low


def _resample(shares: Tensor, generator: torch.Generator) -> Tensor:
    """Systematic resampling: indices of points [4, n]."""
    count = shares.shape[-1]
    start = torch.rand((len(shares), 1), generator=generator, dtype=torch.float64)
    places = (torch.arange(count, dtype=torch.float64) + start) / count
    return torch.searchsorted(shares.cumsum(-1), places).clamp(max=count - 1)


def _move(table: _Table, points: Tensor, weight: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Metropolis steps along the populations' own covariance, which leave the present posterior as it is: points, their
    log likelihood, share of steps taken."""
    size, accepted = points.shape[-1], 0.0
    moves = _LAST_MOVES if weight >= 1.0 else _MOVES
    spread = torch.linalg.cholesky(_covariance(points) + 1e-9 * torch.eye(size, dtype=torch.float64))
    prior, likelihood = _scores(table, points)
    for number in range(moves):
        scale = 2.38 / math.sqrt(size) * (1.0 if number % 2 == 0 else 0.4)
        stride = torch.randn(points.shape, generator=generator, dtype=torch.float64) @ spread.mT
        tried = points + scale * stride
        new_prior, new_likelihood = _scores(table, tried)
        gain = new_prior - prior + weight * (new_likelihood - likelihood)
        taken = torch.rand(gain.shape, generator=generator, dtype=torch.float64).log() < gain
        points = torch.where(taken[..., None], tried, points)
        prior, likelihood = torch.where(taken, new_prior, prior), torch.where(taken, new_likelihood, likelihood)
        accepted += float(taken.double().mean()) / moves
    return points, likelihood, accepted


def _covariance(points: Tensor) -> Tensor:
    """Of every population [4, d, d]."""
    centred = points - points.mean(1, keepdim=True)
    return centred.mT @ centred / points.shape[1]


def _correlation(before: Tensor, after: Tensor) -> Tensor:
    """Of every coordinate [d], between points and what became of them."""
    first, second = ((points - points.mean((0, 1))) / points.std((0, 1)).clamp(min=1e-12) for points in (before, after))
    return (first * second).mean((0, 1)).abs()
