"""Column intensities on a known lattice, and how many atoms each monitored column has lost.

The image of a thin crystal in HAADF is close to a sum of one blurred spot per column (linear incoherent imaging). With
the sites known, all amplitudes follow from one weighted linear fit, neighbour overlap included; the levels of columns
that hold 2, 1 and 0 atoms follow from the frame itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.perception.lattice import Lattice, Sites, fold, pixel_fractions

Array = NDArray[np.float64]

TAIL_RATIO = 2.0
"""Width of the second Gaussian of the spot over that of the first. A choice: wider ones look like background at the
spacing of a crystal, and this one also follows a probe 4 nm out of focus."""
_REACH_NM = 0.26
"""Half width of the window in which a spot is drawn, nm; beyond it the spot is background."""
SITE_MARGIN_NM = 0.12
"""Columns this far outside the frame still shine into it."""


@dataclass(frozen=True)
class MeanCell:
    """The mean unit cell of a frame as ``background + reference * spot + monitored * spot``.

    Amplitudes are integrals over one spot in counts (intensity times pixels), ``background`` counts per pixel,
    ``sigma_nm`` and ``tail`` the width of the core and the weight of the wide Gaussian. ``explained`` is the part of
    the mean cell's variance (noise taken off) that this reproduces, ``gain`` the pixels' variance over their mean.
    """

    background: float
    reference: float
    monitored: float
    sigma_nm: float
    tail: float
    explained: float
    gain: float


def fit_mean_cell(image: Array, pixel_size_nm: tuple[float, float], lattice: Lattice) -> MeanCell:
    """Fit spot width and mean amplitudes to the folded cell (least squares; linear parameters solved inside)."""
    from scipy.optimize import minimize

    cell, number = fold(image, pixel_size_nm, lattice)
    weight = np.sqrt(number / number.mean())
    # Scatter within the bins, so that an unknown gain does not matter.
    square, _ = fold(image**2, pixel_size_nm, lattice)
    noise = max(float((square - cell**2).mean() / max(number.mean() - 1, 1.0)), 1e-300)

    def solve(parameters: Array) -> tuple[float, Array]:
        sigma, tail = math.exp(parameters[0]), 0.5 / (1 + math.exp(-parameters[1]))
        spots = [cell_spot(lattice, offset, sigma, tail, cell.shape[0]) for offset in (np.zeros(2), lattice.offset)]
        design = np.column_stack([(weight * column).ravel() for column in (np.ones_like(cell), *spots)])
        target = (weight * cell).ravel()
        linear = np.linalg.lstsq(design, target, rcond=None)[0]
        # A weak prior on the spot (core 0.045 nm within a factor 1.6, tail near 0.1) holds it where counts are few.
        prior = ((parameters[0] - math.log(0.045)) / 0.5) ** 2 + ((parameters[1] + 1.4) / 1.0) ** 2
        return float(((design @ linear - target) ** 2).sum()) / noise + prior, linear

    start = np.array([math.log(0.045), -1.4])
    simplex = start + np.array([[0.0, 0.0], [0.25, 0.0], [0.0, 0.8]])
    best = minimize(
        lambda p: solve(p)[0],
        start,
        method="Nelder-Mead",
        options={"initial_simplex": simplex, "xatol": 3e-3, "fatol": 1e-2, "maxfev": 120},
    ).x
    misfit, linear = solve(best)
    pixel_area = pixel_size_nm[0] * pixel_size_nm[1]
    spread = float((weight**2 * (cell - np.average(cell, weights=number)) ** 2).sum()) / noise
    signal = max(spread - cell.size, 1e-9)
    return MeanCell(
        background=float(linear[0]),
        reference=float(linear[1]) / pixel_area,
        monitored=float(linear[2]) / pixel_area,
        sigma_nm=math.exp(best[0]),
        tail=0.5 / (1 + math.exp(-best[1])),
        explained=1 - max(misfit - cell.size, 0.0) / signal,
        gain=noise * float(number.mean()) / max(float(image.mean()), 1e-300),
    )


def cell_spot(lattice: Lattice, offset: Array, sigma_nm: float, tail: float, bins: int) -> Array:
    """One spot of integral 1 nm^2 per cell, repeated over the lattice, at the bin centres of the folded cell, 1/nm^2.

    Poisson summation: sum_T G(r - T) = (1/area) sum_g exp(-2 pi^2 sigma^2 g^2) exp(2 pi i g.r).
    """
    order = np.fft.fftfreq(bins, 1 / bins)
    h, k = np.meshgrid(order, order, indexing="ij")
    g = np.stack([h, k], -1) @ np.linalg.inv(lattice.vectors_nm).T
    square = (g**2).sum(-1)
    envelope = (1 - tail) * np.exp(-2 * np.pi**2 * sigma_nm**2 * square)
    envelope += tail * np.exp(-2 * np.pi**2 * (TAIL_RATIO * sigma_nm) ** 2 * square)
    shift = 0.5 / bins - np.asarray(offset)
    phase = np.exp(2j * np.pi * (h * shift[0] + k * shift[1]))
    return np.asarray(np.fft.ifft2(envelope * phase).real * bins * bins / lattice.cell_area_nm2)


def spot_height(sigma_nm: float, tail: float) -> float:
    """Peak of one spot of integral 1 nm^2, 1/nm^2."""
    return ((1 - tail) + tail / TAIL_RATIO**2) / (2 * math.pi * sigma_nm**2)


@dataclass(frozen=True)
class Spots:
    """Drawn spots of n sites: for every site the flat pixel indices [n, k] and the share of its integral that falls
    into each [n, k] (0 outside the frame)."""

    index: NDArray[np.int64]
    share: Array
    shape: tuple[int, int]

    def draw(self, amplitude: Array) -> Array:
        """The image [rows, cols] of the spots with these integrals."""
        pixels = np.bincount(
            self.index.ravel(), (self.share * amplitude[:, None]).ravel(), self.shape[0] * self.shape[1]
        )
        return np.asarray(pixels.reshape(self.shape), dtype=np.float64)

    def gather(self, image: Array) -> Array:
        """The pixels [n, k] under each spot."""
        return np.asarray(image.ravel()[self.index])


def draw_spots(
    xy_nm: Array,
    shape: tuple[int, int],
    pixel_size_nm: tuple[float, float],
    sigma_nm: float,
    tail: float,
) -> Spots:
    """Spots (core and tail Gaussian, sampled at pixel centres within ``_REACH_NM``) around every position [n, 2] nm."""
    offsets: list[NDArray[np.int64]] = []
    axes: list[list[Array]] = []
    for axis, (size, count) in enumerate(zip(pixel_size_nm, (shape[1], shape[0]), strict=True)):
        half = math.ceil(_REACH_NM / size)
        pixel = np.floor(xy_nm[:, axis] / size).astype(np.int64)[:, None] + np.arange(-half, half + 1)
        distance = (pixel + 0.5) * size - xy_nm[:, axis, None]
        inside = (pixel >= 0) & (pixel < count)
        profile = [
            np.exp(-0.5 * (distance / width) ** 2) * (size / (math.sqrt(2 * np.pi) * width)) * inside
            for width in (sigma_nm, TAIL_RATIO * sigma_nm)
        ]
        axes.append(profile)
        offsets.append(np.where(inside, pixel, 0))
    share = (1 - tail) * axes[1][0][:, :, None] * axes[0][0][:, None, :]
    share += tail * axes[1][1][:, :, None] * axes[0][1][:, None, :]
    index = offsets[1][:, :, None] * shape[1] + offsets[0][:, None, :]
    n = len(xy_nm)
    return Spots(index.reshape(n, -1), share.reshape(n, -1), shape)


@dataclass(frozen=True)
class ColumnFit:
    """Joint fit of all columns. ``amplitude``, ``sigma`` [n] in counts; ``background`` [rows, cols] counts per pixel;
    ``dispersion`` residual variance over the Poisson variance (the gain, for an image that is not in counts)."""

    sites: Sites
    spots: Spots
    amplitude: Array
    sigma: Array
    background: Array
    dispersion: float


def fit_columns(image: Array, pixel_size_nm: tuple[float, float], lattice: Lattice, cell: MeanCell) -> ColumnFit:
    """All column amplitudes and a plane of background at once, weighted by the variance of the mean cell.

    The reference columns share one level up to their own spread: each is drawn towards it by what the frame shows of
    that spread, which takes their noise out of the monitored columns beside them.
    """
    from scipy.sparse import csr_matrix, diags
    from scipy.sparse.linalg import splu

    fov = (image.shape[1] * pixel_size_nm[0], image.shape[0] * pixel_size_nm[1])
    sites = lattice.sites(fov, SITE_MARGIN_NM)
    spots = draw_spots(sites.xy_nm, image.shape, pixel_size_nm, cell.sigma_nm, cell.tail)
    variance = cell.gain * mean_image(image.shape, pixel_size_nm, lattice, cell).ravel()
    n, k = spots.index.shape
    design = csr_matrix((spots.share.ravel(), spots.index.ravel(), np.arange(0, n * k + 1, k)), (n, image.size))
    weighted = design @ diags(1 / variance)
    plane = plane_terms(image.shape)
    # Weak priors (the mean cell, 100 %) keep columns determinate that lie mostly outside of the frame.
    mean = np.where(sites.monitored, cell.monitored, cell.reference)
    spread = np.maximum(mean, 1e-9)
    amplitude, sigma = np.zeros(n), np.zeros(n)
    normal = (weighted @ design.T).tocsc()
    cross = weighted @ plane
    inner = plane.T @ (plane / variance[:, None])
    right, right_plane = weighted @ image.ravel(), plane.T @ (image.ravel() / variance)
    for _ in range(2):
        ridge = 1 / spread**2
        solver = splu((normal + diags(ridge)).tocsc())
        solved = solver.solve(np.column_stack([right + ridge * mean, cross]))
        level = np.linalg.solve(inner - cross.T @ solved[:, 1:], right_plane - cross.T @ solved[:, 0])
        amplitude = solved[:, 0] - solved[:, 1:] @ level
        sigma = _marginal_sigma(normal, ridge)
        reference = ~sites.monitored & (sigma < 0.5 * np.abs(mean))
        if reference.sum() < 8:
            break
        mean = np.where(sites.monitored, mean, np.median(amplitude[reference]))
        scatter = float(np.var(amplitude[reference]) - np.mean(sigma[reference] ** 2))
        spread = np.where(sites.monitored, spread, math.sqrt(max(scatter, (0.02 * mean[reference][0]) ** 2)))
    background = (plane @ level).reshape(image.shape)
    model = np.maximum(spots.draw(amplitude) + background, 1e-3 * image.mean())
    dispersion = float(((image - model) ** 2).sum() / model.sum() * image.size / max(image.size - n, 1))
    return ColumnFit(sites, spots, amplitude, sigma * math.sqrt(dispersion / cell.gain), background, dispersion)


def mean_image(
    shape: tuple[int, int], pixel_size_nm: tuple[float, float], lattice: Lattice, cell: MeanCell, bins: int = 48
) -> Array:
    """The mean cell drawn over the whole frame, counts per pixel, kept above a thousandth of its mean."""
    reference, monitored = sublattice_images(shape, pixel_size_nm, lattice, cell, bins)
    image = cell.background + cell.reference * reference + cell.monitored * monitored
    return np.asarray(np.maximum(image, max(1e-3 * image.mean(), 1e-12)))


def sublattice_images(
    shape: tuple[int, int], pixel_size_nm: tuple[float, float], lattice: Lattice, cell: MeanCell, bins: int = 48
) -> tuple[Array, Array]:
    """Full lattices of reference and of monitored columns, each spot of integral 1, over the whole frame."""
    fraction = pixel_fractions(shape, pixel_size_nm, lattice) % 1.0 * bins
    i, j = fraction.astype(np.int64) % bins
    area = pixel_size_nm[0] * pixel_size_nm[1]
    drawn = [cell_spot(lattice, o, cell.sigma_nm, cell.tail, bins) * area for o in (np.zeros(2), lattice.offset)]
    return drawn[0][i, j], drawn[1][i, j]


def plane_terms(shape: tuple[int, int]) -> Array:
    """Constant, x and y slope over the frame, each of order one: [pixels, 3]."""
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    return np.column_stack([np.ones(x.size), x.ravel(), y.ravel()])


def _marginal_sigma(normal: Any, ridge: Array) -> Array:
    """Standard deviation of each amplitude from its row of the normal matrix, neighbours eliminated to first order."""
    from scipy.sparse import diags

    matrix = normal + diags(ridge)
    diagonal = matrix.diagonal()
    off = matrix - diags(diagonal)
    coupling = np.asarray(off.multiply(off) @ (1 / diagonal)).ravel()
    return np.asarray(1 / np.sqrt(np.maximum(diagonal - coupling, 0.05 * diagonal)))


@dataclass(frozen=True)
class Occupancy:
    """For each monitored site the probability [n, 3] of 0, 1 and 2 atoms; ``levels`` the three amplitudes, counts;
    ``fractions`` the share of columns in each state."""

    probability: Array
    levels: Array
    fractions: Array


def occupancy(fit: ColumnFit, image: Array) -> Occupancy:
    """Posterior of every monitored column over 0, 1 and 2 atoms.

    Levels and shares come from a three-level mixture of the fitted amplitudes; then every column is judged by the
    Poisson likelihood of its own pixels with all others as they are, under shares that follow the local density of
    missing atoms.
    """
    monitored = fit.sites.monitored
    levels, fractions, probability = _mixture(fit.amplitude[monitored], fit.sigma[monitored], _full_guess(fit))
    spots = Spots(fit.spots.index[monitored], fit.spots.share[monitored], fit.spots.shape)
    rest = fit.background + fit.spots.draw(np.where(monitored, 0.0, fit.amplitude))
    floor = 1e-3 * float(image.mean())
    near = _neighbours(fit.sites.xy_nm[monitored])
    pixels = spots.gather(image)
    # Columns of one kind differ by a few percent (tilt, scan noise): the likelihood is tempered by that spread.
    spread = 0.03 * levels[2]
    temper = fit.dispersion * (1 + (spread / fit.sigma[monitored]) ** 2)
    for _ in range(4):
        expected = probability @ levels
        others = spots.gather(rest + spots.draw(expected)) - expected[:, None] * spots.share
        log = np.empty_like(probability)
        for state, level in enumerate(levels):
            model = np.maximum(others + level * spots.share, floor)
            log[:, state] = np.where(spots.share > 0, pixels * np.log(model) - model, 0.0).sum(1) / temper
        prior = local_shares(probability, fractions, near)
        probability = normalised(log + np.log(prior))
        fractions = (probability.sum(0) + np.array([0.2, 0.5, 1.0])) / (len(probability) + 1.7)
    return Occupancy(probability, levels, fractions)


def normalised(log: Array) -> Array:
    """Probabilities [n, k] from log weights [n, k]."""
    weight = np.exp(log - log.max(1, keepdims=True))
    return np.asarray(weight / weight.sum(1, keepdims=True))


def _full_guess(fit: ColumnFit) -> float:
    """Amplitude of a reference column: the yardstick for the level of a full monitored one."""
    return float(np.median(fit.amplitude[~fit.sites.monitored]))


def _mixture(amplitude: Array, sigma: Array, reference: float) -> tuple[Array, Array, Array]:
    """Levels (0, 1, 2 atoms), shares and memberships by maximum a posteriori EM over a grid of starts.

    The level of one atom is 0.41 to 0.55 of two (2S/1S = 1.8 to 2.4 in multislice calculations, because the two S
    atoms interfere along the beam), of none about 0. Full columns are expected to be the commonest state.
    """
    usable = sigma < 2.0 * max(float(np.median(sigma)), 1e-12)
    a, s = amplitude[usable], sigma[usable]
    best: tuple[float, Array, Array] | None = None
    for start in np.quantile(a, (0.5, 0.75, 0.9)):
        if start <= 0:
            continue
        score, levels, shares = _climb_mixture(a, s, float(start))
        if best is None or score > best[0]:
            best = (score, levels, shares)
    if best is None:
        levels, shares = np.array([0.0, 0.25, 0.5]) * reference, np.array([0.02, 0.08, 0.9])
    else:
        levels, shares = best[1], best[2]
    return levels, shares, normalised(_log_components(amplitude, sigma, levels) + np.log(shares))


def _log_components(amplitude: Array, sigma: Array, levels: Array) -> Array:
    variance = sigma[:, None] ** 2 + (0.03 * levels) ** 2
    return np.asarray(-0.5 * (amplitude[:, None] - levels) ** 2 / variance - 0.5 * np.log(variance))


def _climb_mixture(a: Array, s: Array, full: float) -> tuple[float, Array, Array]:
    """EM from one start: (log posterior, levels, shares)."""
    half, zero = 0.5, 0.0
    concentration = np.array([1.0, 2.0, 8.0])
    shares = np.array([0.03, 0.12, 0.85])
    score = -np.inf
    for _ in range(60):
        levels = np.array([zero, half, 1.0]) * full
        log = _log_components(a, s, levels) + np.log(shares)
        top = log.max(1, keepdims=True)
        evidence = top[:, 0] + np.log(np.exp(log - top).sum(1))
        prior = (
            float((concentration * np.log(shares)).sum()) - 0.5 * ((half - 0.5) / 0.04) ** 2 - 0.5 * (zero / 0.05) ** 2
        )
        improved = float(evidence.sum()) + prior - score
        score += improved if np.isfinite(score) else 0.0
        score = float(evidence.sum()) + prior
        member = np.exp(log - evidence[:, None])
        weight = member / (s[:, None] ** 2 + (0.03 * levels) ** 2)
        total, first = weight.sum(0), (weight * a[:, None]).sum(0)
        full = float(first[2] + half * first[1]) / max(float(total[2] + half**2 * total[1]), 1e-300)
        half = float((first[1] * full + 0.5 / 0.04**2) / (total[1] * full**2 + 1 / 0.04**2))
        zero = float(first[0] * full / (total[0] * full**2 + 1 / 0.05**2))
        half, zero = float(np.clip(half, 0.40, 0.58)), float(np.clip(zero, -0.1, 0.15))
        shares = (member.sum(0) + concentration) / (len(a) + concentration.sum())
        if abs(improved) < 1e-4:
            break
    return score, np.array([zero, half, 1.0]) * full, shares


def _neighbours(xy_nm: Array) -> tuple[NDArray[np.int64], Array]:
    """The 18 nearest other columns of every column and their weights (0.5 nm Gaussian)."""
    from scipy.spatial import cKDTree

    count = min(19, len(xy_nm))
    distance, index = cKDTree(xy_nm).query(xy_nm, k=count)
    return index[:, 1:], np.exp(-0.5 * (distance[:, 1:] / 0.5) ** 2)


def local_shares(probability: Array, fractions: Array, near: tuple[NDArray[np.int64], Array]) -> Array:
    """Shares of the states around every column, itself left out, shrunk to the frame's mean by its ``_strength``."""
    index, weight = near
    strength = _strength(probability, near)
    local = np.einsum("nk,nkc->nc", weight, probability[index])
    return np.asarray((local + strength * fractions) / (weight.sum(1)[:, None] + strength))


def _strength(probability: Array, near: tuple[NDArray[np.int64], Array]) -> float:
    """Columns' worth of the frame's mean in the local share of full ones, 4 to 100: few where missing atoms cluster.

    Neighbours' covariance, one standard error taken off, is the variance of the local share, which for m prior columns
    is q (1 - q) / (m + 1).
    """
    index, weight = near
    full = probability[:, -1]
    off = full - full.mean()
    total = np.maximum(weight.sum(1), 1e-12)
    covariance = float(np.mean(off * np.einsum("nk,nk->n", weight, off[index]) / total))
    spread = float(full.mean() * (1 - full.mean())) + 1e-12
    # n columns with the kernel's number of neighbours each, every pair met twice
    doubt = spread / math.sqrt(max(len(full) * float(total.mean()) * 0.7, 1.0))
    return float(np.clip(spread / max(covariance - doubt, 1e-3 * spread) - 1, 4.0, 100.0))
