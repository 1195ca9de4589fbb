"""How full every site of a crystal is, from the image: amplitudes of all columns at once, and what levels they take.

Each class of sites has a level of its own, a share of empty sites and a share of about half-filled ones; levels,
shares and spread follow from the image itself. A site's posterior weighs the Poisson likelihood of its own pixels, its
neighbours as they most probably are. Lengths are in the unit of the pixel sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .columns import local_shares, normalised
from .drawn import Drawn
from .normal_blocks import System

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_FINEST = 1.0
"""Pixels are summed as long as a column's standard deviation spans this many: a Gaussian sampled so coarsely is still
told from its sums to a per cent of its width, which is fitted anyway."""
_SHAPES = 2
"""Rounds of fitting the spot; more change nothing in the benchmarks, even where columns overlap as in graphene."""
_SAMPLE = 1e4
"""Pixels that the noise's law is read from."""
_KNOTS = 12.0
"""Spacing of the background's knots in the columns' spacing: closer knots cost certainty (vacancy benchmark: 3 % of
recall at 4, 1 % at 12)."""
_ROUNDS = 4
"""Of levels and amplitudes: at 10 counts, half as many lose a tenth of the empty sites that an oracle tells."""
_SETTLED = 0.1
"""Root mean square move of the amplitudes, in their standard errors, after which no further round is needed."""
_HALF = (0.5, 0.05)
"""Level of a half-filled column over that of a full one: 0.41 to 0.55 for one S of two in multislice calculations."""
_EMPTY = (0.0, 0.03)
_UNLIKE = 0.15
"""Columns of a class that differ by more of their brightness than this are of several materials or thicknesses: a
half-empty one cannot be told from them."""
_SPREAD = (0.02**2, 0.2**2)
"""Variance of the full columns over their level squared: the fit must not take many vacancies for a wide spread."""
_HERMITE = ((0.0, 8 / 15), (-1.3556, 0.2221), (1.3556, 0.2221), (-2.857, 0.01126), (2.857, 0.01126))
"""Places and weights of the mean over a normal distribution by five-point Gauss-Hermite quadrature."""
_NO_DOUBT = 1e-3
_CHUNK = 256
"""Columns whose likelihoods are worked out at once."""
_SHARES = np.array([1.0, 1.0, 8.0])
"""Prior observations of empty, half-filled and full sites."""


@dataclass(frozen=True)
class Occupation:
    """n sites: ``probability`` [n, 3] of empty, partly filled and full (certainly full where not judged),
    ``amplitude`` and ``sigma`` [n] image units summed over pixels, ``level`` [n] the amplitude if full; ``unlike``:
    classes whose columns differ too much for partly filled ones to be told."""

    probability: Floats
    amplitude: Floats
    sigma: Floats
    level: Floats
    unlike: tuple[int, ...]


@dataclass(frozen=True)
class _Scene:
    """The image as counts, with what is fixed: spots, background, and the class of every site (-1: of its own)."""

    counts: Floats
    spots: Drawn
    background: Floats
    kind: Ints
    judged: Bools
    near: dict[int, tuple[Ints, Floats]]


@dataclass(frozen=True)
class _Levels:
    """Of one class: the three levels over the full one, their common spread, and the shares."""

    level: Floats
    spread: float
    share: Floats


class AmplitudeFit:
    """Columns at ``xy`` [n, 2] drawn into ``image``: their common shape, a smooth background, and the noise's law."""

    def __init__(
        self, image: Floats, pixel: tuple[float, float], xy: Floats, amplitude: Floats, blur: float, spacing: float
    ) -> None:
        """``amplitude`` [n] to start from (0: not known to be there), ``blur`` a first standard deviation; ``spacing``:
        shortest distance of two columns. Fine pixels are summed, positions keep their unit."""
        bins = [max(1, int(blur / (_FINEST * p))) for p in pixel]
        self.image = _binned(image, bins)
        self.pixel = (pixel[0] * bins[0], pixel[1] * bins[1])
        self.xy, self.blur, self.tail = xy, blur, 0.1
        self.shape = (self.image.shape[0], self.image.shape[1])
        hats = [_hats(n, p, _KNOTS * spacing) for n, p in zip(self.shape, self.pixel[::-1], strict=True)]
        self._hats = (hats[0], hats[1])
        self.amplitude = amplitude
        self.background = np.full(self.shape, float(np.quantile(self.image, 0.05)))
        self.gain, self.base = 1.0, 0.0
        weight = np.ones(self.shape)
        for _ in range(_SHAPES):
            self.spots = Drawn(xy, self.shape, self.pixel, self.blur, self.tail)
            self._adjust(weight)
            self._reshape(weight)
            weight = self._weigh()
        self.spots = Drawn(xy, self.shape, self.pixel, self.blur, self.tail)

    def _adjust(self, weight: Floats) -> None:
        """Amplitudes towards their least squares, each against its neighbours as they are."""
        square = self.spots.squares(weight)
        inverse = np.divide(0.8, square, out=np.zeros_like(square), where=square > 1e-6 * np.median(square))
        for _ in range(2):
            residual = weight * (self.image - self.spots.draw(self.amplitude) - self.background)
            self.amplitude = self.amplitude + self.spots.project(residual) * inverse

    def _reshape(self, weight: Floats) -> None:
        """Width and tail of the spot, with a smooth background and a smooth scale of the amplitudes free: one
        Gauss-Newton step, its normal equations solved by conjugate gradients.

        A Gaussian widens as heat spreads, dG/d ln s = s^2 laplace G, and one twice as wide is G blurred by sqrt(3) s.
        """
        from scipy.ndimage import gaussian_filter

        hat_y, hat_x = self._hats
        knots = (hat_y.shape[1], hat_x.shape[1])
        n = knots[0] * knots[1]
        core = self.spots.draw(self.amplitude)
        at = [self.blur / p for p in self.pixel[::-1]]
        curved = sum(at[a] ** 2 * _second_difference(core, a) for a in (0, 1))
        wide = gaussian_filter(core, [math.sqrt(3) * a for a in at], mode="constant", truncate=3.0) - core
        unit = float(np.sqrt((weight * core**2).sum() / weight.sum())) + 1e-300
        core, curved, wide = core / unit, np.asarray(curved) / unit, wide / unit
        residual = self.image - core * unit - self.background
        system = System.of(weight, residual, [core, curved, wide], self._hats)
        v = system.solve()
        tail = float(np.clip(self.tail + v[-1] / unit, 0.0, 0.4))
        allowed = (tail - self.tail) * unit
        if allowed != v[-1]:
            # what a tail beyond its bounds would explain must not be left to the background it trades with
            v = system.without_last(allowed).solve()
        smooth = [hat_y @ v[i * n : (i + 1) * n].reshape(knots) @ hat_x.T for i in (0, 1)]
        self.background = self.background + smooth[0]
        col, row = np.clip((self.xy / self.pixel).astype(np.int64), 0, np.array(self.shape[::-1]) - 1).T
        grown = np.clip(1 + smooth[1][row, col] / unit, 0.3, 3.0)
        self.amplitude = self.amplitude * grown
        self.blur *= math.exp(float(np.clip(v[-2] / unit, -0.3, 0.3)))
        self.tail = tail

    def _weigh(self) -> Floats:
        """One over the variance of every pixel, v0 + gain model, both constants from the residuals."""
        from scipy.optimize import nnls

        model = self.spots.draw(self.amplitude) + self.background
        step = max(1, round(math.sqrt(model.size / _SAMPLE)))
        seen = model[::step, ::step].ravel()
        square = ((self.image - model)[::step, ::step] ** 2).ravel()
        groups = np.array_split(np.argsort(seen), 16)
        level = np.array([seen[g].mean() for g in groups])
        variance = np.array([square[g].mean() for g in groups])
        low, span, unit = level.min(), np.ptp(level) + 1e-300, variance.max() + 1e-300
        relative = 1 / np.maximum(variance / unit, 1e-3)
        terms = np.stack([np.ones_like(level), (level - low) / span], 1) * relative[:, None]
        v0, slope = nnls(terms, variance / unit * relative)[0]
        self.gain = unit * max(slope, 1e-3 * v0 + 1e-12) / span
        self.base = unit * v0 - self.gain * low
        return np.asarray(1 / np.maximum(self.base + self.gain * model, 0.02 * unit))

    def moves(self, amplitude: Floats) -> tuple[Floats, Floats]:
        """One Newton step [n, 2] of the positions of columns of ``amplitude`` [n], all else held, and its standard
        error per axis [n]; none where a column is dark."""
        model = self.spots.draw(amplitude) + self.background
        variance = self.base + self.gain * model
        weight = 1 / np.maximum(variance, 0.02 * float(variance.mean()))
        force, known = self.spots.pulls(weight * (self.image - model), weight)
        force, known = amplitude[:, None] * force, amplitude[:, None] ** 2 * known
        known = np.maximum(known, 1e-9 * float(known.max()) + 1e-300)
        return force / known, np.asarray(known.mean(1) ** -0.5)

    def place(self, xy: Floats) -> None:
        """Put the columns at other places [n, 2], all else as it is."""
        self.xy = xy
        self.spots = Drawn(xy, self.shape, self.pixel, self.blur, self.tail)

    def as_counts(self) -> tuple[Floats, Floats]:
        """Image and background in units in which the variance equals the mean, as for counts."""
        shift = self.base / self.gain**2
        return self.image / self.gain + shift, self.background / self.gain + shift


def _binned(image: Floats, bins: list[int]) -> Floats:
    """Sums over ``bins`` (x, y) pixels; a last incomplete bin is dropped."""
    if bins == [1, 1]:
        return image
    rows, cols = image.shape[0] // bins[1], image.shape[1] // bins[0]
    cut = image[: rows * bins[1], : cols * bins[0]]
    return np.asarray(cut.reshape(rows, bins[1], cols, bins[0]).sum((1, 3)))


def _second_difference(image: Floats, axis: int) -> Floats:
    from scipy.ndimage import correlate1d

    return np.asarray(correlate1d(image, [1.0, -2.0, 1.0], axis=axis, mode="nearest"))


def _hats(length: int, pixel: float, spacing: float) -> Floats:
    """[length, knots] linear interpolation weights along one axis."""
    knots = max(2, round(length * pixel / spacing) + 1)
    at = (np.arange(length) + 0.5) / length * (knots - 1)
    return np.asarray(np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(knots))))


def occupation(fit: AmplitudeFit, kind: Ints, judged: Bools) -> Occupation:
    """Posteriors of the ``judged`` sites; ``kind`` [n] is their class, -1 for columns of no class."""
    counts, background = fit.as_counts()
    classes = [int(k) for k in np.unique(kind[judged])]
    near = {k: _neighbours(fit.xy[judged & (kind == k)]) for k in classes}
    scene = _Scene(counts, fit.spots, background, kind, judged, near)
    amplitude = fit.amplitude / fit.gain
    probability = np.tile([0.0, 0.0, 1.0], (len(kind), 1))
    level = np.zeros(len(kind))
    levels: dict[int, _Levels] = {}
    for _ in range(_ROUNDS):
        free, sigma = _conditional(scene, amplitude)
        aim = free.copy()
        for k in classes:
            mine = judged & (kind == k)
            level[mine] = _local_level(free[mine], sigma[mine], near[k])
            a, s = free[mine] / level[mine], sigma[mine] / level[mine]
            levels[k], p, v = _mixture(a, amplitude[mine] / level[mine], s, levels.get(k))
            prior = np.log(local_shares(p, levels[k].share, near[k]))
            probability[mine] = normalised(_log_gauss(a, v, levels[k]) + prior)
            aim[mine] = _expected(a, v, levels[k], probability[mine]) * level[mine]
        moved = float(np.mean(((aim - amplitude) / sigma) ** 2))
        amplitude = amplitude + 0.8 * (aim - amplitude)
        if moved < _SETTLED**2:
            break
    for k in classes:
        probability[judged & (kind == k)] = _by_counts(scene, amplitude, level, k, levels[k], probability)
    unlike = tuple(k for k in classes if levels[k].spread > _UNLIKE)
    vague = judged & np.isin(kind, unlike)
    probability[vague, 2] += probability[vague, 1]
    probability[vague, 1] = 0.0
    return Occupation(probability, free * fit.gain, sigma * fit.gain, level * fit.gain, unlike)


def _conditional(scene: _Scene, amplitude: Floats) -> tuple[Floats, Floats]:
    """Amplitude and standard error of every column, all others as given."""
    model = scene.spots.draw(amplitude) + scene.background
    weight = 1 / np.maximum(model, 0.02 * float(model.mean()) + 1e-12)
    square, gradient = scene.spots.squares(weight), scene.spots.project(weight * (scene.counts - model))
    known = square > 1e-6 * np.median(square)
    step = np.divide(gradient, square, out=np.zeros_like(square), where=known)
    return amplitude + step, 1 / np.sqrt(np.where(known, square, 1e-12))


def _local_level(a: Floats, s: Floats, near: tuple[Ints, Floats]) -> Floats:
    """Amplitude of a full column around every site of a class: its 70 % quantile, local as far as it varies by more
    than noise would make it (thickness, layers), since a third of the sites may be empty."""
    whole = float(np.quantile(a, 0.7))
    whole = max(whole, 1e-6 * float(np.abs(a).max()) + 1e-300)
    if near[0].shape[1] < 18:
        return np.full(len(a), whole)
    rank = round(0.7 * (near[0].shape[1] - 1))
    local = np.partition(a[near[0]], rank, axis=1)[:, rank]
    seen = float(np.mean((local - whole) ** 2))
    scatter = 1.7 * float(np.median((a - np.median(a)) ** 2) / 0.455) / near[0].shape[1]
    trust = max(0.0, 1 - 2 * scatter / max(seen, 1e-300))
    return np.asarray(np.maximum(whole + trust * (local - whole), 0.05 * whole))


def _log_gauss(a: Floats, v: Floats, of: _Levels) -> Floats:
    variance = v + (of.spread * of.level) ** 2
    return np.asarray(-0.5 * (a[:, None] - of.level) ** 2 / variance - 0.5 * np.log(variance))


def _variances(a: Floats, s: Floats, at: Floats) -> Floats:
    """Variance [n, 3] of a column's amplitude in each state: ``s`` is that at ``a``; counts make it a line in it."""
    off = a - a.mean()
    slope = max(float(off @ s**2) / max(float(off @ off), 1e-30), 0.0)
    zero = max(float(np.mean(s**2) - slope * a.mean()), 0.1 * float(np.mean(s**2)))
    line = np.maximum(zero + slope * np.append(at, 0.0), 0.1 * zero)
    return np.asarray(s[:, None] ** 2 * line[:3] / np.maximum(zero + slope * a, 0.1 * zero)[:, None])


def _mixture(a: Floats, now: Floats, s: Floats, start: _Levels | None) -> tuple[_Levels, Floats, Floats]:
    """Levels, spread and shares by maximum a posteriori EM, memberships and variances [n, 3]; ``s`` [n] are the
    standard errors at the amplitudes ``now``."""
    of = start or _Levels(np.array([0.0, _HALF[0], 1.0]), 0.05, np.array([0.03, 0.07, 0.9]))
    v = _variances(now, s, of.level)
    p = np.zeros((len(a), 3))
    for _ in range(40 if start is None else 15):
        p = normalised(_log_gauss(a, v, of) + np.log(of.share))
        weight = p / (v + (of.spread * of.level) ** 2)
        total, first = weight.sum(0), (weight * a[:, None]).sum(0)
        full = float(first[2] + 1 / 0.2**2) / float(total[2] + 1 / 0.2**2)
        half = float((first[1] / full + _HALF[0] / _HALF[1] ** 2) / (total[1] + 1 / _HALF[1] ** 2))
        empty = float((first[0] / full) / (total[0] + 1 / _EMPTY[1] ** 2))
        level = full * np.array([np.clip(empty, -0.1, 0.15), np.clip(half, 0.35, 0.65), 1.0])
        core = p[:, 2] > 0.5
        excess = np.sum(p[core, 2] * ((a[core] - full) ** 2 - v[core, 2])) / max(float(p[core, 2].sum()), 1.0)
        share = (p.sum(0) + _SHARES) / (len(a) + _SHARES.sum())
        before, of = of, _Levels(level, math.sqrt(np.clip(excess, *_SPREAD)), share)
        if np.abs(before.level - of.level).max() + np.abs(before.share - of.share).max() < 1e-4:
            break
    return of, p, v


def _expected(a: Floats, v: Floats, of: _Levels, p: Floats) -> Floats:
    """Posterior mean amplitude: in each state between its level and the column's own."""
    own, prior = 1 / v, 1 / np.maximum((of.spread * of.level) ** 2, 1e-6)
    return np.asarray((p * (a[:, None] * own + of.level * prior) / (own + prior)).sum(1))


def _by_counts(scene: _Scene, amplitude: Floats, level: Floats, kind: int, of: _Levels, probability: Floats) -> Floats:
    """Posterior [m, 3] of one class's judged sites by the Poisson likelihood of their pixels, where there is any doubt.

    Columns of one class differ by its spread: the likelihood is the mean over it.
    """
    mine = np.flatnonzero(scene.judged & (scene.kind == kind))
    p = probability[mine]
    doubtful = p[:, 2] < 1 - _NO_DOUBT
    some = mine[doubtful]
    total = scene.spots.draw(amplitude) + scene.background
    floor = 0.02 * float(total.mean()) + 1e-12
    log = np.empty((len(some), 3))
    for start in range(0, len(some), _CHUNK):
        rows = slice(start, start + _CHUNK)
        index, share = scene.spots.windows(some[rows])
        others = total.ravel()[index] - amplitude[some[rows], None] * share
        log[rows] = _log_likelihood(scene.counts.ravel()[index], others, share, level[some[rows]], of, floor)
    for _ in range(3):
        p[doubtful] = normalised(log + np.log(local_shares(p, of.share, scene.near[kind])[doubtful]))
        of = replace(of, share=(p.sum(0) + _SHARES / 5) / (len(p) + _SHARES.sum() / 5))
    return p


def _log_likelihood(counts: Floats, others: Floats, share: Floats, level: Floats, of: _Levels, floor: float) -> Floats:
    """Poisson log likelihood [m, 3] of the windows [m, k] of columns in each state, ``others`` what else shines there;
    the mean over the states' spread."""
    log = np.empty((len(level), 3))
    for state, relative in enumerate(of.level):
        parts = []
        for off, weight in _HERMITE if relative > 0.2 else ((0.0, 1.0),):
            mean = relative * (1 + off * of.spread) * level
            model = np.maximum(others + mean[:, None] * share, floor)
            parts.append(np.where(share > 0, counts * np.log(model) - model, 0.0).sum(1) + math.log(weight))
        log[:, state] = np.logaddexp.reduce(parts, axis=0)
    return log


def _neighbours(xy: Floats) -> tuple[Ints, Floats]:
    """The 24 nearest other sites of a class and their weights, falling over one and a half times its spacing."""
    from scipy.spatial import cKDTree

    distance, index = cKDTree(xy).query(xy, k=np.arange(1, min(25, len(xy)) + 1))
    width = 1.5 * float(np.median(distance[:, min(1, distance.shape[1] - 1)])) + 1e-300
    return index[:, 1:], np.exp(-0.5 * (distance[:, 1:] / width) ** 2)
