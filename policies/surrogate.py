"""The Gaussian process behind the learned policy: fitted by BoTorch, evaluated by one Cholesky factor.

Model, for standardised values y of windows at u (centre scaled to [0, 1]^2) with standardised overview evidence e [d]:

    y = a + b.e + f(u) + noise,   a ~ N(0, 1),  b ~ N(b0, s_b^2),  f ~ GP(0, s_f^2 Matern-5/2 ARD)

so that the relation of evidence and target (METHODS: overview as prior mean) is learned from the sub-scans with its
uncertainty, its sign free, and never needs a new fit; only length scales, s_f and the noise are fitted.

This module imports torch; import it inside functions only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import botorch
import numpy as np
import torch
from botorch.exceptions.warnings import OptimizationWarning
from botorch.models import SingleTaskGP
from botorch.optim.fit import fit_gpytorch_mll_scipy
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import ConstantKernel, Kernel, LinearKernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from gpytorch.utils.warnings import NumericalWarning
from linear_operator.utils.errors import NanError, NotPSDError

from .choosing import Floats

SLOPE = 0.5
"""Prior mean and standard deviation of the slope of the first evidence column, standardised (a choice: the evidence
is expected to be right, and may turn out to be worthless or wrong)."""

NOISE_FLOOR = 1e-4
"""Smallest variance of an observation, standardised; keeps repeated windows from making the matrix singular."""

MAX_ITERATIONS = 40


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
class Design:
    """What is known of n windows: places [n, 2] in units of the field, standardised evidence [n, d]."""

    places: Floats
    evidence: Floats

    def first(self, n: int) -> Design:
        """The first n windows."""
        return Design(self.places[:n], self.evidence[:n])


@dataclass(frozen=True)
class Targets:
    """Standardised values [n] and their variances [n]; ``mean`` and ``scale`` undo the standardisation."""

    values: Floats
    variances: Floats
    mean: float
    scale: float


def standardise(values: Floats, variances: Floats) -> Targets:
    """Subtract the mean, divide by the standard deviation (by 1 when constant). Raises FitFailed on overflow."""
    with np.errstate(all="ignore"):
        mean = float(values.mean())
        scale = float(values.std())
    constant = scale <= 1e-9 * max(1.0, abs(mean))
    return rescale(values, variances, mean, 1.0 if constant else scale)


def rescale(values: Floats, variances: Floats, mean: float, scale: float) -> Targets:
    """Targets by a given mean and scale. Raises FitFailed when that overflows."""
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


class _EvidenceMean(Mean):  # type: ignore[misc]  # gpytorch has no type stubs
    """Prior mean b0 e of the first evidence column (inputs [..., n, 2 + d], output [..., n])."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == 2:
            return torch.zeros_like(x[..., 0])
        return self.slope * x[..., 2]


def build_model(design: Design, targets: Targets, window: Floats) -> SingleTaskGP:
    """The BoTorch model at its prior medians, ready to be fitted."""
    start = default_hyperparameters(window)
    columns = np.hstack([design.places, design.evidence])
    width = torch.tensor(window, dtype=torch.float64)
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
    constant = ConstantKernel()
    kernel: Kernel = field_kernel + constant
    if design.evidence.shape[1]:
        linear = LinearKernel(active_dims=tuple(range(2, columns.shape[1])))
        kernel = kernel + linear
    likelihood = FixedNoiseGaussianLikelihood(
        torch.tensor(targets.variances),
        learn_additional_noise=True,
        noise_prior=LogNormalPrior(np.log(start.noise_variance), 1.5),
        noise_constraint=GreaterThan(1e-6),
    )
    model = SingleTaskGP(
        torch.tensor(columns),
        torch.tensor(targets.values)[:, None],
        likelihood=likelihood,
        covar_module=kernel,
        mean_module=_EvidenceMean(SLOPE),
        outcome_transform=None,
    ).double()
    matern.lengthscale = width
    field_kernel.outputscale = start.signal_variance
    likelihood.second_noise = start.noise_variance
    constant.constant = torch.ones(1, dtype=torch.float64)
    constant.raw_constant.requires_grad_(False)
    if design.evidence.shape[1]:
        linear.variance = SLOPE**2
        linear.raw_variance.requires_grad_(False)
    return model


def fit(design: Design, targets: Targets, window: Floats) -> Hyperparameters:
    """Most probable hyper-parameters by L-BFGS-B from the prior medians, a bounded number of iterations, no restarts:
    deterministic. Raises FitFailed."""
    try:
        with single_thread(), botorch.settings.validate_input_scaling(False), warnings.catch_warnings():
            # Jitter on the way and a spent iteration limit are part of the plan; the end point is checked below.
            warnings.simplefilter("ignore", NumericalWarning)
            warnings.simplefilter("ignore", OptimizationWarning)
            model = build_model(design, targets, window)
            mll = ExactMarginalLogLikelihood(model.likelihood, model)
            fit_gpytorch_mll_scipy(mll, options={"maxiter": MAX_ITERATIONS})
    except (NanError, NotPSDError, ValueError, RuntimeError) as error:
        raise FitFailed(f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}") from error
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


def _covariance(a: Design, b: Design, p: Hyperparameters) -> torch.Tensor:
    """Prior covariance [n, m] of a + b.e + f(u)."""
    lengths = torch.tensor([p.length_x, p.length_y], dtype=torch.float64)
    gap = (
        torch.cdist(
            torch.from_numpy(a.places) / lengths,
            torch.from_numpy(b.places) / lengths,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        * 5**0.5
    )
    matern = p.signal_variance * (1 + gap + gap**2 / 3) * torch.exp(-gap)
    return 1 + matern + SLOPE**2 * torch.from_numpy(a.evidence) @ torch.from_numpy(b.evidence).T


def _prior_mean(design: Design) -> torch.Tensor:
    if design.evidence.shape[1] == 0:
        return torch.zeros(len(design.places), dtype=torch.float64)
    return SLOPE * torch.from_numpy(design.evidence[:, 0])


def log_likelihood(train: Design, targets: Targets, p: Hyperparameters) -> float:
    """Log of the probability density of the standardised values [n], up to a constant. Raises FitFailed."""
    with single_thread():
        noise = torch.from_numpy(targets.variances) + p.noise_variance
        factor, info = torch.linalg.cholesky_ex(_covariance(train, train, p) + torch.diag(noise))
        residual = torch.from_numpy(targets.values) - _prior_mean(train)
        white = torch.linalg.solve_triangular(factor, residual[:, None], upper=False)[:, 0]
        result = float(-0.5 * (white**2).sum() - torch.log(torch.diagonal(factor)).sum())
    if int(info) != 0 or not np.isfinite(result):
        raise FitFailed("the covariance matrix is not positive definite")
    return result


def posterior(
    train: Design, targets: Targets, at: Design, p: Hyperparameters, jitter: float = 0.0
) -> tuple[Floats, Floats]:
    """Standardised posterior mean [m] and standard deviation [m] of the noise-free value at the windows ``at``.

    ``jitter`` is added to the diagonal of the covariance of the n observations. Raises FitFailed.
    """
    with single_thread():
        noise = torch.from_numpy(targets.variances) + p.noise_variance + jitter
        factor, info = torch.linalg.cholesky_ex(_covariance(train, train, p) + torch.diag(noise))
        if int(info) != 0:
            raise FitFailed("the covariance matrix is not positive definite")
        cross = torch.linalg.solve_triangular(factor, _covariance(train, at, p), upper=False)
        residual = torch.from_numpy(targets.values) - _prior_mean(train)
        white = torch.linalg.solve_triangular(factor, residual[:, None], upper=False)[:, 0]
        mean = (_prior_mean(at) + cross.T @ white).numpy()
        prior = 1 + p.signal_variance + SLOPE**2 * (at.evidence**2).sum(axis=1)
        variance = prior - (cross**2).sum(dim=0).numpy()
    sd = np.sqrt(np.maximum(variance, 0.0))
    if not (np.isfinite(mean).all() and np.isfinite(sd).all()):
        raise FitFailed("the posterior is not finite")
    return mean, sd
