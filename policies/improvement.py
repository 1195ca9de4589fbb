"""Expected improvement: by how much a window is expected to exceed what there is already."""

from __future__ import annotations

import numpy as np

from .choosing import Floats


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
