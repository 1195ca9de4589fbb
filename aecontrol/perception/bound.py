"""The Cramer-Rao bound: how well columns can be placed with the counts at hand, by any unbiased method.

Poisson counts with mean lambda_i = sum_j N_j S(r_i - r_j) + b hold the Fisher information
F_ab = sum_i d_a lambda_i d_b lambda_i / lambda_i about the parameters (N_j, x_j, y_j of every column within a radius,
and b); the bound on their standard errors is the root of the diagonal of its inverse. (H. Cramer, Mathematical
Methods of Statistics, 1946, section 32.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Profile = Callable[[Floats, Floats], Floats]
"""Density of a spot at distances x, y (nm) from its centre, 1/nm^2, with integral 1."""
STEP = 1e-4
"""Displacement for a spot's derivatives, nm: errs by 1e-6 of a spot of 0.04 nm."""


def gaussian(blur_nm: float) -> Profile:
    """A Gaussian spot of standard deviation ``blur_nm``."""
    norm = 2 * np.pi * blur_nm**2
    return lambda x, y: np.asarray(np.exp(-0.5 * (x**2 + y**2) / blur_nm**2) / norm)


def joint(
    at_nm: Floats,
    counts: Floats,
    background: float,
    profile: Profile,
    pixel_nm: float,
    centre_nm: tuple[float, float],
    radius_nm: float = 0.6,
    margin_nm: float = 0.2,
) -> tuple[NDArray[np.int64], Floats]:
    """Bounds of the columns within ``radius_nm`` of ``centre_nm``, all of them and the background unknown.

    ``at_nm`` [n, 2] (x, y) and ``counts`` [n] of all columns, ``background`` counts a pixel. Pixels [k, l] have their
    centres at ((l + 1/2), (k + 1/2)) ``pixel_nm``; those within ``radius_nm + margin_nm`` are used. Returns the numbers
    of the columns and [m, 3] standard errors of (x, y) in nm and of the counts. Trust those well inside the radius.
    """
    near = np.flatnonzero(np.hypot(*(at_nm - np.asarray(centre_nm)).T) < radius_nm)
    reach = radius_nm + margin_nm
    low, high = (np.floor((np.asarray(centre_nm) + side * reach) / pixel_nm) for side in (-1, 1))
    x, y = np.meshgrid(*((np.arange(a, b) + 0.5) * pixel_nm for a, b in zip(low, high, strict=True)))
    columns = [derivatives(x.ravel() - at_nm[j, 0], y.ravel() - at_nm[j, 1], profile) for j in near]
    jacobian = np.stack(columns, 1) * pixel_nm**2  # [3, m, pixels]: of a column of one count
    far = [j for j in np.flatnonzero(np.hypot(*(at_nm - np.asarray(centre_nm)).T) < 2 * reach) if j not in set(near)]
    expected = background + np.einsum("m,mp->p", counts[near], jacobian[0])
    for j in far:
        expected += counts[j] * pixel_nm**2 * profile(x.ravel() - at_nm[j, 0], y.ravel() - at_nm[j, 1])
    jacobian[1:] *= counts[near][:, None]
    rows = np.concatenate([jacobian.reshape(3 * len(near), -1), np.ones((1, x.size))])
    error = standard_errors(rows, expected)
    return near, np.stack([error[len(near) : 2 * len(near)], error[2 * len(near) : -1], error[: len(near)]], 1)


def derivatives(x: Floats, y: Floats, profile: Profile) -> Floats:
    """[3, ...] the spot and its derivatives by its own position along x and y."""
    by_x = (profile(x - STEP, y) - profile(x + STEP, y)) / (2 * STEP)
    by_y = (profile(x, y - STEP) - profile(x, y + STEP)) / (2 * STEP)
    return np.stack([profile(x, y), by_x, by_y])


def standard_errors(jacobian: Floats, expected: Floats) -> Floats:
    """[m] bounds on parameters with derivatives [m, pixels] of Poisson means ``expected`` [pixels]."""
    scale = np.sqrt((jacobian**2 / expected).sum(1))
    scaled = jacobian / scale[:, None]
    return np.asarray(np.sqrt(np.diag(np.linalg.inv((scaled / expected) @ scaled.T))) / scale)


def expected_error_nm(
    counts: Floats, background_per_nm2: float, blur_nm: float, pixel_nm: float, apart_nm: float | None = None
) -> Floats:
    """[n] expected standard error (nm, per axis) of columns of ``counts`` on a background, quickly.

    Of a column with four like neighbours at ``apart_nm`` (None: alone), interpolated between seven intensities; good to
    a few per cent on square and hexagonal lattices.
    """
    levels = np.geomspace(max(counts.min(), 1e-3), max(counts.max(), 2e-3), 7)
    around = np.zeros((1, 2))
    if apart_nm is not None:
        around = np.concatenate([around, apart_nm * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])])
    # at most eight pixels a blur: finer ones change nothing but the time
    pixel = max(pixel_nm, blur_nm / 8)
    spread = 5 * blur_nm
    errors = []
    for level in levels:
        both = np.full(len(around), level)
        _, error = joint(
            around,
            both,
            max(background_per_nm2, 1e-6) * pixel**2,
            gaussian(blur_nm),
            pixel,
            (0.0, 0.0),
            radius_nm=(apart_nm or 0.0) + 1e-6,
            margin_nm=spread,
        )
        errors.append(error[0, :2].mean())
    return np.asarray(np.exp(np.interp(np.log(np.maximum(counts, levels[0])), np.log(levels), np.log(errors))))
