"""The Gaussian process behind the learned policy: fitted by BoTorch, evaluated by one Cholesky factor.

Two stages, each exact given its hyper-parameters (autoregressive co-kriging, Kennedy & O'Hagan 2000,
doi 10.1093/biomet/87.1.1, eq. 1), with u the window's centre scaled to [0, 1]^2:

1. the overview's evidence of all windows is e = f + noise, f = constant + Matern-5/2(u) + white, the noise's variance
   known. It gives every window the mean m and the covariance C of f: evidence whose noise is averaged out between
   neighbours, as far as neighbours agree.
2. the sub-scans' standardised values are y = a + r (m - m0) + r0 (f - m) + b.x + g + noise, where a ~ N(0, 1), the
   slope r ~ N(r0, (r0 / 2)^2), the weights of further features x b ~ N(0, 1/4), and g = Matern-5/2(u).

So the relation of evidence and target is learned from the sub-scans with its uncertainty, its sign free, without a new
fit; only length scales, the variance of g and the noise are fitted.

This module imports torch; import it inside functions only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import botorch
import numpy as np
import torch
from botorch.exceptions.warnings import OptimizationWarning
from botorch.models import SingleTaskGP
from botorch.optim.fit import fit_gpytorch_mll_scipy
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from gpytorch.utils.warnings import NumericalWarning
from linear_operator.utils.errors import NanError, NotPSDError

from .choosing import Floats, Indices

NOISE_FLOOR = 1e-4
"""Smallest variance of an observation, standardised; keeps repeated windows from making the matrix singular."""

MAX_ITERATIONS = 40
LARGEST_FIT = 256
"""Hyper-parameters come from at most this many of the first observations: more cost time and change little."""

Tensor = torch.Tensor


class FitFailed(Exception):
    """The surrogate gave no finite answer; the policy takes the next rung of its ladder."""


@dataclass(frozen=True)
class Hyperparameters:
    """What a fit decides: length scales in units of the field, variances in standardised units."""

    length_x: float
    length_y: float
    signal_variance: float
    noise_variance: float


@dataclass(frozen=True)
class Targets:
    """Standardised values [n] and their variances [n]; ``mean`` and ``scale`` undo the standardisation."""

    values: Floats
    variances: Floats
    mean: float
    scale: float


@dataclass(frozen=True)
class Prior:
    """What is believed of M windows before anything is seen at n of them, numbered ``which`` [n]: ``places`` [M, 2] in
    units of the field; in standardised units the ``mean`` [M], and of all but the fitted field g the ``covariance``
    [n, M] between the n and all, and the ``variance`` [M]."""

    places: Floats
    which: Indices
    mean: Floats
    covariance: Floats
    variance: Floats

    def first(self, n: int) -> Prior:
        """The same for the first n of ``which``."""
        return replace(self, which=self.which[:n], covariance=self.covariance[:n])


def standardise(values: Floats, variances: Floats) -> Targets:
    """Subtract the mean, divide by the standard deviation (by 1 when constant). Raises FitFailed on overflow."""
    with np.errstate(all="ignore"):
        mean = float(values.mean())
        scale = float(values.std())
    constant = scale <= 1e-9 * max(1.0, abs(mean))
    return rescale(values, variances, mean, 1.0 if constant else scale)


def rescale(values: Floats, variances: Floats, mean: float, scale: float) -> Targets:
    """Targets by a given mean and scale. Raises FitFailed on overflow."""
    with np.errstate(all="ignore"):
        targets = Targets((values - mean) / scale, np.maximum(variances / scale**2, NOISE_FLOOR), mean, scale)
    if not (np.isfinite(targets.values).all() and np.isfinite(targets.variances).all()):
        raise FitFailed("the values cannot be standardised in float64")
    return targets


@contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread, so that sums are taken in one order whatever the machine; restored on leaving."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_hyperparameters(window: Floats) -> Hyperparameters:
    """Used without a fit: the prior medians, for windows of size ``window`` (x, y) in units of the field."""
    return Hyperparameters(float(window[0]), float(window[1]), 0.3, 0.1)


class _KnownMean(Mean):  # type: ignore[misc]  # gpytorch has no type stubs
    """Prior mean looked up by the third input column (inputs [..., n, 3], output [..., n])."""

    def __init__(self, mean: Floats) -> None:
        super().__init__()
        self.register_buffer("known", torch.from_numpy(mean))

    def forward(self, x: Tensor) -> Any:
        return self.known[x[..., 2].long()]


class _KnownKernel(Kernel):  # type: ignore[misc]  # gpytorch has no type stubs
    """Covariance looked up by the third input column (inputs [..., n, 3] and [..., m, 3], output [..., n, m])."""

    def __init__(self, covariance: Floats) -> None:
        super().__init__()
        self.register_buffer("known", torch.from_numpy(covariance))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: object) -> Any:
        rows, columns = x1[..., 2].long(), x2[..., 2].long()
        return self.known[rows, columns] if diag else self.known[rows[..., :, None], columns[..., None, :]]


def build_model(prior: Prior, targets: Targets, window: Floats) -> SingleTaskGP:
    """The BoTorch model of ``targets`` seen at the n windows of ``prior``, at its prior medians, ready to be fitted.

    Inputs [n, 3]: x, y in units of the field, and 0 ... n - 1, by which mean and covariance are looked up.
    """
    start = default_hyperparameters(window)
    width = torch.from_numpy(window)
    matern = MaternKernel(
        nu=2.5,
        ard_num_dims=2,
        active_dims=(0, 1),
        lengthscale_prior=LogNormalPrior(torch.log(width), torch.full_like(width, 0.5)),
        lengthscale_constraint=GreaterThan(1e-3),
    )
    field_kernel = ScaleKernel(
        matern,
        outputscale_prior=LogNormalPrior(np.log(start.signal_variance), 1.0),
        outputscale_constraint=GreaterThan(1e-6),
    )
    likelihood = FixedNoiseGaussianLikelihood(
        torch.from_numpy(targets.variances),
        learn_additional_noise=True,
        noise_prior=LogNormalPrior(np.log(start.noise_variance), 1.5),
        noise_constraint=GreaterThan(1e-6),
    )
    model = SingleTaskGP(
        torch.from_numpy(np.column_stack([prior.places[prior.which], np.arange(len(prior.which), dtype=np.float64)])),
        torch.from_numpy(targets.values)[:, None],
        likelihood=likelihood,
        covar_module=field_kernel + _KnownKernel(prior.covariance[:, prior.which]),
        mean_module=_KnownMean(prior.mean[prior.which]),
        outcome_transform=None,
    ).double()
    set_hyperparameters(model, start)
    return model


def set_hyperparameters(model: SingleTaskGP, p: Hyperparameters) -> None:
    """Put ``p`` into a model of ``build_model``."""
    field_kernel = model.covar_module.kernels[0]
    field_kernel.base_kernel.lengthscale = torch.tensor([p.length_x, p.length_y], dtype=torch.float64)
    field_kernel.outputscale = torch.tensor(p.signal_variance, dtype=torch.float64)
    model.likelihood.second_noise = torch.tensor(p.noise_variance, dtype=torch.float64)


def fit(prior: Prior, targets: Targets, window: Floats) -> Hyperparameters:
    """Most probable hyper-parameters by L-BFGS-B from the prior medians, a bounded number of iterations, no restarts:
    deterministic. Raises FitFailed."""
    try:
        with single_thread(), botorch.settings.validate_input_scaling(False), warnings.catch_warnings():
            # Jitter on the way and a spent iteration limit are part of the plan; the end point is checked below.
            warnings.simplefilter("ignore", NumericalWarning)
            warnings.simplefilter("ignore", OptimizationWarning)
            model = build_model(prior, targets, window)
            mll = ExactMarginalLogLikelihood(model.likelihood, model)
            fit_gpytorch_mll_scipy(mll, options={"maxiter": MAX_ITERATIONS})
    except (NanError, NotPSDError, ValueError, RuntimeError) as error:
        raise FitFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    field_kernel = model.covar_module.kernels[0]
    lengths = field_kernel.base_kernel.lengthscale.detach().reshape(-1)
    found = Hyperparameters(
        length_x=lengths[0].item(),
        length_y=lengths[1].item(),
        signal_variance=field_kernel.outputscale.item(),
        noise_variance=model.likelihood.second_noise.item(),
    )
    if not np.isfinite([found.length_x, found.length_y, found.signal_variance, found.noise_variance]).all():
        raise FitFailed("the fit ended at a value that is not finite")
    return found


def matern(a: Floats, b: Floats, p: Hyperparameters) -> Tensor:
    """Covariance [n, m] of the fitted field between places [n, 2] and [m, 2] (Matern, smoothness 5/2)."""
    lengths = torch.tensor([p.length_x, p.length_y], dtype=torch.float64)
    gap = 5**0.5 * torch.cdist(
        torch.from_numpy(a) / lengths, torch.from_numpy(b) / lengths, compute_mode="donot_use_mm_for_euclid_dist"
    )
    return p.signal_variance * (1 + gap + gap**2 / 3) * torch.exp(-gap)


def posterior(prior: Prior, targets: Targets, p: Hyperparameters, jitter: float = 0.0) -> tuple[Floats, Floats]:
    """Standardised posterior mean [M] and standard deviation [M] of the noise-free value of every window, given the
    ``targets`` [n]; ``jitter`` is added to the diagonal of their covariance. Raises FitFailed."""
    with single_thread():
        cross = matern(prior.places[prior.which], prior.places, p) + torch.from_numpy(prior.covariance)
        noise = torch.from_numpy(targets.variances) + p.noise_variance + jitter
        residual = torch.from_numpy(targets.values - prior.mean[prior.which])
        white = _whitened(cross[:, prior.which] + torch.diag(noise), cross, residual)
        mean = prior.mean + (white[:, :-1].T @ white[:, -1]).numpy()
        variance = prior.variance + p.signal_variance - (white[:, :-1] ** 2).sum(dim=0).numpy()
    sd = np.sqrt(np.maximum(variance, 0.0))
    if not (np.isfinite(mean).all() and np.isfinite(sd).all()):
        raise FitFailed("the posterior is not finite")
    return mean, sd


def _whitened(between: Tensor, cross: Tensor, residual: Tensor) -> Any:
    """L^-1 [cross, residual] [n, M + 1], L the Cholesky factor of ``between`` [n, n]. Raises FitFailed."""
    factor, info = torch.linalg.cholesky_ex(between)
    if int(info) != 0:
        raise FitFailed("the covariance matrix is not positive definite")
    return torch.linalg.solve_triangular(factor, torch.cat([cross, residual[:, None]], dim=1), upper=False)


@dataclass(frozen=True)
class Evidence:
    """What the overview says of f in M windows, in its own units: ``mean`` [M] and ``covariance`` [M, M]."""

    mean: Floats
    covariance: Floats


def denoise(places: Floats, values: Floats, variances: Floats, window: Floats) -> Evidence:
    """Stage 1: f given its ``values`` [M] read with ``variances`` [M], NaN where there is none. Raises FitFailed."""
    known = np.flatnonzero(np.isfinite(values))
    targets = standardise(values[known], variances[known])
    m = len(places)
    first = known[:LARGEST_FIT]
    flat = Prior(places, first, np.zeros(m), np.ones((len(first), m)), np.ones(m))
    p = fit(flat, rescale(values[first], variances[first], targets.mean, targets.scale), window)
    with single_thread():
        content = matern(places, places, p) + 1 + p.noise_variance * torch.eye(m, dtype=torch.float64)
        between = content[known][:, known] + torch.diag(torch.from_numpy(targets.variances))
        white = _whitened(between, content[known], torch.from_numpy(targets.values))
        mean = (white[:, :-1].T @ white[:, -1]).numpy()
        covariance = (content - white[:, :-1].T @ white[:, :-1]).numpy()
    return Evidence(targets.mean + targets.scale * mean, targets.scale**2 * covariance)
