"""The round probe by another road: a Hankel integral of the analytic aperture autocorrelation."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import j0


def round_kernel(radius_A: np.ndarray, cutoff_per_A: float, variance_A2: float) -> np.ndarray:
    """Aberration-free probe of aperture radius ``cutoff_per_A`` (alpha / lambda) widened by a Gaussian, 1/A^2."""
    k = (np.arange(1500) + 0.5) * (2 * cutoff_per_A / 1500)
    u = k / (2 * cutoff_per_A)
    transfer = 2 / math.pi * (np.arccos(u) - u * np.sqrt(1 - u**2)) * np.exp(-2 * math.pi**2 * variance_A2 * k**2)
    r = np.linspace(0.0, float(np.max(radius_A)) + 1e-9, 1500)
    table = np.array([np.sum(transfer * j0(2 * math.pi * k * at) * k) for at in r]) * 2 * math.pi * (k[1] - k[0])
    return np.interp(radius_A, r, table)
