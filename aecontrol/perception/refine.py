"""Sub-pixel positions: one joint fit of all columns, their common blur and a smooth background.

Model: image = sum_j A_j G_s(r - r_j) + b(r), G_s a Gaussian of unit sum, b piecewise bilinear. Fisher scoring on the
Poisson-like likelihood with variance v(model) = v0 + g model, whose two constants are read off the residuals, so that
counts and images of unknown gain are treated alike; the normal equations of all parameters are solved by
preconditioned conjugate gradients and never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLUR_RANGE_NM = (0.025, 0.13)
"""Blur outside this is no atomic column."""
KNOT_NM = 0.6
"""Spacing of the background's knots: wide enough not to imitate a column, narrow enough for contamination."""
TRUST_NM = 0.06
"""A column that leaves this radius around the network's position is put back: the fit has lost it."""
STEPS = 6
SOLVER_STEPS = 20
WINDOW = 3.2
"""Half width of a column's window in blurs; the Gaussian there is 0.6 % of its peak."""


@dataclass(frozen=True)
class Fit:
    """Fitted columns, n of them; positions and standard errors in pixels, intensities in image units."""

    x: Floats
    y: Floats
    sigma_x: Floats
    sigma_y: Floats
    intensity: Floats
    sigma_intensity: Floats
    background: float
    blur_nm: float | None


class _Columns:
    """Windows, shapes and derivatives of all columns at their present positions and blur."""

    def __init__(self, shape: tuple[int, int], x: Floats, y: Floats, sx: float, sy: float) -> None:
        self.shape = shape
        reach_x, reach_y = int(np.ceil(WINDOW * sx)), int(np.ceil(WINDOW * sy))
        col, gx, dgx, ggx = _profile(x, sx, reach_x, shape[1])
        row, gy, dgy, ggy = _profile(y, sy, reach_y, shape[0])
        n = len(x)
        self.index = (row[:, :, None] * shape[1] + col[:, None, :]).reshape(n, -1)
        self.g = (gy[:, :, None] * gx[:, None, :]).reshape(n, -1)
        self.gx = (gy[:, :, None] * dgx[:, None, :]).reshape(n, -1)
        self.gy = (dgy[:, :, None] * gx[:, None, :]).reshape(n, -1)
        # derivative for the logarithm of the blur: both axes scale together
        self.gs = (gy[:, :, None] * ggx[:, None, :] + ggy[:, :, None] * gx[:, None, :]).reshape(n, -1)

    def splat(self, windows: Floats) -> Floats:
        """Sum of the columns' windows [n, p] as an image."""
        total = np.bincount(self.index.ravel(), windows.ravel(), minlength=self.shape[0] * self.shape[1])
        return np.asarray(total.reshape(self.shape), dtype=np.float64)

    def gather(self, image: Floats) -> Floats:
        """Windows [n, p] of an image."""
        return np.asarray(image.ravel()[self.index])


def _profile(at: Floats, sigma: float, reach: int, length: int) -> tuple[NDArray[np.int64], Floats, Floats, Floats]:
    """Pixel numbers [n, w] about ``at`` and there the unit-sum Gaussian, its derivative by position and by log sigma.

    Pixels off the image are clipped to its rim with zero weight.
    """
    pixel = np.floor(at).astype(np.int64)[:, None] + np.arange(-reach, reach + 1)
    d = (pixel + 0.5 - at[:, None]) / sigma
    g = np.exp(-0.5 * d**2) / (np.sqrt(2 * np.pi) * sigma) * ((pixel >= 0) & (pixel < length))
    return np.clip(pixel, 0, length - 1), g, g * d / sigma, g * (d**2 - 1)


def _hats(length: int, pixel_nm: float) -> Floats:
    """[length, knots] linear interpolation weights of the background's knots along one axis."""
    knots = max(2, round(length * pixel_nm / KNOT_NM) + 1)
    at = (np.arange(length) + 0.5) / length * (knots - 1)
    return np.asarray(np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(knots))))


@dataclass
class _State:
    a: Floats
    x: Floats
    y: Floats
    knots: Floats
    log_blur: float


class _Problem:
    """The image, its background basis and pixel sizes: what stays fixed during a fit."""

    def __init__(self, image: Floats, pixel_size_nm: tuple[float, float]) -> None:
        self.image = image
        self.pixel = pixel_size_nm
        self.hat_y, self.hat_x = _hats(image.shape[0], pixel_size_nm[1]), _hats(image.shape[1], pixel_size_nm[0])

    def columns(self, s: _State) -> _Columns:
        blur = float(np.exp(s.log_blur))
        return _Columns(_shape(self.image), s.x, s.y, blur / self.pixel[0], blur / self.pixel[1])

    def background(self, knots: Floats) -> Floats:
        return np.asarray(self.hat_y @ knots @ self.hat_x.T)

    def model(self, s: _State, c: _Columns) -> Floats:
        return c.splat(c.g * s.a[:, None]) + self.background(s.knots)

    def step(self, s: _State, c: _Columns, weight: Floats, residual: Floats, linear: bool) -> _State:
        """One Fisher-scoring step; ``linear``: amplitudes and background only, which is exact least squares."""
        n, k = len(s.a), s.knots.size
        moving = 0.0 if linear else 1.0
        gx, gy = c.gx * (moving * s.a[:, None]), c.gy * (moving * s.a[:, None])
        gs = moving * c.splat(c.gs * s.a[:, None])

        def forward(v: Floats) -> Floats:
            da, dx, dy = v[:n, None], v[n : 2 * n, None], v[2 * n : 3 * n, None]
            atoms = c.splat(c.g * da + gx * dx + gy * dy)
            background = self.background(v[3 * n : 3 * n + k].reshape(s.knots.shape))
            return np.asarray(atoms + background + gs * v[-1])

        def backward(image: Floats) -> Floats:
            w = c.gather(image)
            knots = self.hat_y.T @ image @ self.hat_x
            rows = [np.einsum("np,np->n", j, w) for j in (c.g, gx, gy)]
            return np.concatenate([*rows, knots.ravel(), [float((gs * image).sum())]])

        local = c.gather(weight)
        diagonal = np.concatenate(
            [
                *(np.einsum("np,np,np->n", j, j, local) for j in (c.g, gx, gy)),
                (self.hat_y.T**2 @ weight @ self.hat_x**2).ravel(),
                [float((gs**2 * weight).sum())],
            ]
        )
        v = _conjugate_gradients(lambda u: backward(weight * forward(u)), backward(weight * residual), diagonal)
        limit = 0.5  # pixels: a larger step leaves the region in which the linearised model is true
        return _State(
            s.a + v[:n],
            s.x + np.clip(v[n : 2 * n], -limit, limit),
            s.y + np.clip(v[2 * n : 3 * n], -limit, limit),
            s.knots + v[3 * n : 3 * n + k].reshape(s.knots.shape),
            float(np.clip(s.log_blur + np.clip(v[-1], -0.2, 0.2), *np.log(BLUR_RANGE_NM))),
        )


def refine(image: Floats, x: Floats, y: Floats, pixel_size_nm: tuple[float, float]) -> Fit:
    """Fit columns that start at ``x``, ``y`` (pixels, centre of pixel [0, 0] at (0.5, 0.5)) to ``image`` [rows, cols].

    Positions converge to the Cramer-Rao bound for Gaussian columns in counts. A column that the fit drives further
    than ``TRUST_NM`` from its start is returned at its start with that radius as its standard error.
    """
    if len(x) == 0:
        none = np.zeros(0)
        return Fit(none, none, none, none, none, none, float(image.mean()), None)
    problem = _Problem(image, pixel_size_nm)
    state, residual = _start(problem, x, y)
    columns = problem.columns(state)
    for _ in range(STEPS):
        weight = 1 / _variance(problem.model(state, columns), residual)
        state = problem.step(state, columns, weight, residual, linear=False)
        columns = problem.columns(state)
        residual = image - problem.model(state, columns)
    return _finish(problem, state, columns, residual, x, y)


def _start(problem: _Problem, x: Floats, y: Floats) -> tuple[_State, Floats]:
    """The best of three blurs with positions held: amplitudes, background and residual."""
    best: tuple[float, _State, Floats] | None = None
    knots = np.full((problem.hat_y.shape[1], problem.hat_x.shape[1]), float(np.median(problem.image)))
    for blur in (0.04, 0.06, 0.09):
        state = _State(np.zeros(len(x)), x.astype(float), y.astype(float), knots, float(np.log(blur)))
        columns = problem.columns(state)
        residual = problem.image - problem.model(state, columns)
        state = problem.step(state, columns, np.ones_like(problem.image), residual, linear=True)
        residual = problem.image - problem.model(state, columns)
        misfit = float((residual**2).sum())
        if best is None or misfit < best[0]:
            best = misfit, state, residual
    assert best is not None
    return best[1], best[2]


def _variance(model: Floats, residual: Floats) -> Floats:
    """Variance of every pixel, v0 + g model with v0, g >= 0 fitted to squared residuals in 16 classes of the model."""
    from scipy.optimize import nnls

    order = np.argsort(model, axis=None)
    groups = np.array_split(order, min(16, max(2, order.size // 16)))
    level = np.array([model.ravel()[g].mean() for g in groups])
    square = np.array([(residual.ravel()[g] ** 2).mean() for g in groups])
    # the solver's tolerance is absolute: keep its numbers near 1
    base, span, unit = level.min(), np.ptp(level) + 1e-300, square.max() + 1e-300
    relative = 1 / np.maximum(square / unit, 1e-3)  # variances err in proportion to themselves
    basis = np.stack([np.ones_like(level), (level - base) / span], 1) * relative[:, None]
    v0, gain = nnls(basis, square / unit * relative)[0]
    variance = unit * (v0 + gain * (model - base) / span)
    # where the model itself is wrong, its squared error poses as gain: never let dark pixels rule the fit altogether
    return np.asarray(np.maximum(variance, 0.01 * variance.max() + 1e-300))


def _finish(problem: _Problem, s: _State, c: _Columns, residual: Floats, x0: Floats, y0: Floats) -> Fit:
    weight = c.gather(1 / _variance(problem.model(s, c), residual))
    j = np.stack([c.g, c.gx * s.a[:, None], c.gy * s.a[:, None]], 1)
    fisher = np.einsum("nip,njp,np->nij", j, j, weight)
    scale = np.sqrt(np.maximum(np.einsum("nii->ni", fisher), 1e-300))
    correlation = fisher / (scale[:, :, None] * scale[:, None, :]) + 1e-9 * np.eye(3)
    error = np.sqrt(np.maximum(np.einsum("nii->ni", np.linalg.inv(correlation)), 0)) / scale
    trust = np.array([TRUST_NM / p for p in problem.pixel])
    lost = np.hypot((s.x - x0) / trust[0], (s.y - y0) / trust[1]) > 1
    return Fit(
        x=np.where(lost, x0, s.x),
        y=np.where(lost, y0, s.y),
        sigma_x=np.where(lost, trust[0], np.minimum(error[:, 1], trust[0])),
        sigma_y=np.where(lost, trust[1], np.minimum(error[:, 2], trust[1])),
        intensity=s.a,
        sigma_intensity=error[:, 0],
        background=float(problem.background(s.knots).mean()),
        blur_nm=float(np.exp(s.log_blur)),
    )


def _conjugate_gradients(apply: Callable[[Floats], Floats], right: Floats, diagonal: Floats) -> Floats:
    """Solve ``apply(v) = right`` for a symmetric positive ``apply``, diagonally preconditioned."""
    inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
    v = np.zeros_like(right)
    r = right.copy()
    z = inverse * r
    p = z
    rz = float(r @ z)
    end = 1e-4 * rz  # one per cent: the next step repairs the rest
    for _ in range(SOLVER_STEPS):
        if rz <= end:
            break
        q = apply(p)
        alpha = rz / float(p @ q)
        v, r = v + alpha * p, r - alpha * q
        z = inverse * r
        rz, before = float(r @ z), rz
        p = z + rz / before * p
    return v


def _shape(image: Floats) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
