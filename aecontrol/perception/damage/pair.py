"""Two frames of one place, registered and in counts: what every metric compares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from aecontrol.perception.quality import noise_gain

from .reading import PATCH_PX, per_patch

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

WHOLE = 0.85
"""Share of a patch's pixels that both frames must show; the others count as undamaged."""
KERNEL_PX = 7
WIDTH_PX = 1.2
"""Width of the Gaussian whose derivatives the kernel is made of."""
ORDERS = ((0, 0), (0, 1), (1, 0), (0, 2), (2, 0), (1, 1))
"""Order of the derivative along rows and columns."""
CORE = 0.2
"""Share of the patches, those that fit best, that the kernel is first fitted to: the others may be damaged."""
STARTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Quantiles of the patches' dose ratios from which the search for them begins."""
ALIKE = 4.0
"""Patches with a misfit of less than this are then taken in; without damage it has mean 0 and variance 2."""
ROUNDS = 4
PLAUSIBLE, UNLIKELY = 0.2, 0.05
"""Between fits that patches agree on about as well, a dose that differs less from that of the whole frames is chosen,
and a smaller constant: both in units of a fifth of the level, their squares counting this much."""
PRIOR_SD = 0.5
"""Standard deviation that every part of the kernel is expected to have about a mere change of dose."""
REGULAR_PATCHES = 8
"""With fewer whole patches than this only the dose is compared."""


@dataclass(frozen=True)
class Kernel:
    """What turns the first frame into the later one where nothing is damaged: ``weights`` [7, 7] (a correlation) and a
    constant ``offset``, counts."""

    weights: Floats
    offset: float

    def apply(self, frame: Floats) -> Floats:
        """``frame`` [rows, cols] as the later exposure would show it."""
        from scipy.ndimage import correlate

        return np.asarray(correlate(frame, self.weights, mode="mirror") + self.offset)


@dataclass(frozen=True)
class Pair:
    """Two registered frames [rows, cols] in counts. ``valid`` [rows, cols]: pixels that both frames show; in the others
    the later one is the first times ``ratio``, the counts that it has elsewhere for one of the first."""

    first: Floats
    later: Floats
    valid: Bools
    ratio: float

    @classmethod
    def of(cls, first: Floats, later: Floats, valid: Bools) -> Pair:
        """The pair of two frames that are registered; what ``later`` holds outside ``valid`` does not matter."""
        ratio = float(later[valid].sum() / max(float(first[valid].sum()), 1e-300))
        return cls(first, np.where(valid, later, ratio * first), valid, ratio)

    @cached_property
    def whole(self) -> Bools:
        """The patches [rows, cols] that both frames show, but for a narrow rim."""
        return np.asarray(per_patch(self.valid).mean(axis=(2, 3)) >= WHOLE)

    @cached_property
    def kernel(self) -> Kernel:
        """Focus, dose and what is left of the shift, as one kernel."""
        return _fit_kernel(self.first, self.later, self.whole, self.ratio)

    @cached_property
    def matched(self) -> Floats:
        """The first frame [rows, cols] as the later exposure would have shown it without damage, in its counts."""
        return self.kernel.apply(self.first)


def in_counts(image: NDArray[np.generic]) -> Floats:
    """``image`` scaled and shifted so that the variance of its noise is its level.

    Where the noise does not grow with the signal, so that it cannot tell the gain, its mean variance is taken for that
    of the mean level.
    """
    data = np.asarray(image, dtype=np.float64)
    gain, basis = noise_gain(data)
    if basis == "the image holds counts":
        return data
    noise = float(((np.diff(np.diff(data, 2, axis=0), 2, axis=1) / 6.0) ** 2).mean())
    if gain is None:
        gain = noise / max(abs(float(data.mean())), 1e-6 * float(np.ptp(data)), 1e-300)
    if not gain > 0.0:
        return data
    return np.asarray(data / gain + (noise / gain**2 - data.mean() / gain))


def _fit_kernel(first: Floats, later: Floats, whole: Bools, ratio: float) -> Kernel:
    """Least squares of ``later`` on ``first``, its Gaussian derivatives and a constant, without the patches that fit
    worst, about the prior of a mere change of dose.

    A kernel of 49 free elements follows the noise wherever atoms are wide in pixels; one of smooth parts is as good (C.
    Alard, R. H. Lupton, Astrophys. J. 503, 325 (1998)). ``first`` has noise of its own, which would shrink the kernel:
    its expected share (white, of variance equal to the level) is taken off the matrix of moments (W. A. Fuller,
    Measurement Error Models, Wiley 1987, section 2.2).
    """
    parts = _parts()
    if int(whole.sum()) < REGULAR_PATCHES:
        return Kernel(ratio * parts[0], 0.0)
    solution = _Fit.of(first, later, whole, parts, ratio).solve()
    return Kernel(np.tensordot(np.append(ratio, solution[:-1]), parts, 1), float(solution[-1]))


@dataclass(frozen=True)
class _Fit:
    """Linear least squares patch by patch, of what the point leaves over on the other parts and 1. ``matrix`` [p, n, n]
    and ``right`` [p, n]: the normal equations without the part of the noise; ``energy`` [p]: what is left over without
    its noise; ``noise`` [p, n, n]: covariance of the right side; ``spread`` [p]: variance of a pixel's difference."""

    matrix: Floats
    right: Floats
    energy: Floats
    noise: Floats
    spread: Floats
    ratio: float

    @classmethod
    def of(cls, first: Floats, later: Floats, whole: Bools, parts: Floats, ratio: float) -> _Fit:
        """Set up for the patches that are ``whole``."""
        from scipy.ndimage import correlate

        filtered = [correlate(first, part, mode="mirror") for part in parts[1:]]
        design = np.stack([per_patch(image)[whole] for image in (*filtered, np.ones_like(first))], axis=-1)
        design = design.reshape(len(design), PATCH_PX**2, len(parts)).astype(np.float64)
        rest = per_patch(later - ratio * first)[whole].reshape(len(design), -1).astype(np.float64)
        counts = np.maximum(per_patch(first)[whole].sum(axis=(1, 2)), 1.0)
        spread = ratio * (1.0 + ratio) * counts / PATCH_PX**2
        raw = design.transpose(0, 2, 1) @ design
        own = np.zeros((len(parts), len(parts)))
        own[:-1, :-1] = np.tensordot(parts[1:], parts[1:], ((1, 2), (1, 2)))
        middle = np.append(np.tensordot(parts[1:], parts[0], ((1, 2), (0, 1))), 0.0)
        right = np.einsum("pni,pn->pi", design, rest) + ratio * counts[:, None] * middle
        energy = (rest**2).sum(axis=1) - spread * PATCH_PX**2
        matrix = raw - counts[:, None, None] * own
        return cls(matrix, right, energy, spread[:, None, None] * raw, spread, ratio)

    def solve(self) -> Floats:
        """The coefficients that patches agree on best, one that disagrees counting no more than ``ALIKE``. The search
        begins with all patches, and with the few that fit best at several doses."""
        level = self.right[:, -1] * self.ratio * (1.0 + self.ratio) / (PATCH_PX**2 * self.spread)
        starts = [self.among(np.ones(len(level), dtype=bool))]
        for dose in np.quantile(level, STARTS):
            start = np.zeros(self.right.shape[1])
            start[0] = dose
            for _ in range(ROUNDS):
                misfit = self.misfit(start)
                start = self.among(misfit <= np.quantile(misfit, CORE))
            starts.append(start)
        return min((self._extended(start) for start in starts), key=lambda found: found[0])[1]

    def _extended(self, solution: Floats) -> tuple[float, Floats]:
        """The coefficients of all patches that agree with ``solution``, and their loss."""
        for _ in range(2):
            misfit = self.misfit(solution)
            solution = self.among(misfit <= max(float(np.quantile(misfit, CORE)), ALIKE))
        level = float(self.spread.mean()) / (1.0 + self.ratio)
        odd = (solution[0] / (PLAUSIBLE * self.ratio)) ** 2 + (solution[-1] / (PLAUSIBLE * level)) ** 2
        return float(np.minimum(self.misfit(solution), ALIKE).mean() + UNLIKELY * odd), solution

    def among(self, keep: Bools) -> Floats:
        """The coefficients that fit the patches ``keep`` best, about the prior that all are 0."""
        stiff = np.full(self.right.shape[1], self.spread.mean() / (PRIOR_SD * self.ratio) ** 2)
        stiff[-1] = 0.0
        return np.asarray(np.linalg.solve(self.matrix[keep].sum(axis=0) + np.diag(stiff), self.right[keep].sum(axis=0)))

    def misfit(self, solution: Floats) -> Floats:
        """How badly every patch fits: what it would change of the coefficients, and what is left over at all, either
        in standard deviations of noise."""
        slope = self.right - self.matrix @ solution
        ridge = 1e-6 * np.trace(self.noise, axis1=1, axis2=2)[:, None, None] * np.eye(slope.shape[1])
        pull = np.einsum("pi,pi->p", slope, np.linalg.solve(self.noise + ridge, slope[..., None])[..., 0])
        left = self.energy - 2.0 * self.right @ solution + np.einsum("i,pij,j->p", solution, self.matrix, solution)
        freedom = slope.shape[1]
        total = (pull - freedom) / np.sqrt(2.0 * freedom) + left / (np.sqrt(2.0) * PATCH_PX * self.spread)
        return np.asarray(total, dtype=np.float64)


def _parts() -> Floats:
    """The parts of a kernel [n, 7, 7], each of absolute sum 1: a point first, then the Gaussian and its derivatives."""
    from scipy.ndimage import gaussian_filter

    point = np.zeros((KERNEL_PX, KERNEL_PX))
    point[KERNEL_PX // 2, KERNEL_PX // 2] = 1.0
    smooth = [gaussian_filter(point, WIDTH_PX, order=order, mode="constant", truncate=3.0) for order in ORDERS]
    return np.stack([point, *(part / np.abs(part).sum() for part in smooth)])
