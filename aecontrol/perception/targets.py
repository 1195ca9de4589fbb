"""What a session looks for: target kinds, the reading of missing atoms, and the overview's evidence for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.perception import columns
from aecontrol.perception.lattice import Lattice, LatticeHint, find_lattice, follow_phases, pixel_centres, seed_lattice
from aecontrol.types import ATOM_LABELS, Count, Model, NonNegative, ScanRegion

Array = NDArray[np.float64]
Evidence = tuple[float | None, float | None, dict[str, float]]

FALSE_DISCOVERY = 0.04
"""Expected share of wrong finds among the reported vacancies; leaves room below the 5 % that is promised."""
MIN_COVERAGE = 0.5
"""A window of which less than this lies in the overview gets no evidence (a choice)."""
_WORST_RESIDUAL_NM = 0.025
"""Atoms scattered at random would lie 0.035 nm (rms per axis) from the sites that they are assigned to."""
_TILE_NM = 4.0
_PHASE_TILE_NM = 6.0
_STRIPE_NM = 0.7


class VacancyTarget(Model):
    """Missing atoms in the monitored columns of a known crystal (S in MoS2). Value: expected number missing."""

    kind: Literal["vacancy"] = "vacancy"
    lattice: LatticeHint = LatticeHint()
    border_nm: NonNegative = Field(
        0.0,
        description="columns nearer than this to the frame's edge are not judged, nm; their posteriors know the edge",
    )


class AtomCountTarget(Model):
    """Atoms, as many as possible. Value: expected number of atoms in the frame."""

    kind: Literal["atom_count"] = "atom_count"
    label: Literal["atom", "Pt", "C"] = Field("atom", description="what a found atom is called")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="least confidence of a reported atom")


class LatentComponentTarget(Model):
    """One coordinate of the patches' latent vectors. Value: its mean over the frame, in standard deviations of the
    training patches; the side of the longer tail counts as positive."""

    kind: Literal["latent_component"] = "latent_component"
    component: Count | None = Field(None, description="which coordinate; default: the one of largest variance")
    lattice: LatticeHint | None = Field(None, description="crystal to expect; default: patches around atoms, unturned")


class NoveltyTarget(Model):
    """Patches unlike those that the embedding was trained on. Value: mean log distance to the eighth nearest of these,
    relative to the median among themselves."""

    kind: Literal["novelty"] = "novelty"
    lattice: LatticeHint | None = Field(None, description="crystal to expect; default: patches around atoms, unturned")


Target = Annotated[VacancyTarget | AtomCountTarget | LatentComponentTarget | NoveltyTarget, Field(discriminator="kind")]


@dataclass(frozen=True)
class CrystalReading:
    """Every column of a frame: ``table`` [n, 8] (types.ATOM_COLUMNS, positions nm from the frame's corner), ``judged``
    [n] (monitored columns that were judged), ``missing`` [n] expected number of missing atoms and its ``variance``,
    ``found`` rows reported as vacancies, and what patches are scaled by."""

    table: Array
    judged: NDArray[np.bool_]
    missing: Array
    variance: Array
    found: tuple[int, ...]
    lattice: Lattice
    background: float
    peak: float
    features: dict[str, float]

    @property
    def value_variance(self) -> float:
        """Variance of the total number missing. Levels and shares are estimated from the same frame: on simulated
        frames (80 kV, 30 to 130 counts a column, 2 to 25 % missing) the error of the total was 1.4 times what the
        columns' own posteriors say, and 2 % of the total besides; both are allowed for."""
        return 2.0 * float(self.variance.sum()) + (0.02 * float(self.missing.sum())) ** 2


def read_crystal(
    image: Array, pixel_size_nm: tuple[float, float], positions_nm: Array, hint: LatticeHint, border_nm: float
) -> CrystalReading | str:
    """Judge every column of a frame of counts, given atom positions [m, 2] nm; or say why that is not possible."""
    lattice = find_lattice(image, pixel_size_nm, hint, positions_nm)
    if lattice is None:
        return "no lattice: its Fourier peaks do not stand out of the noise"
    if lattice.matched < 0.6:
        return f"poor lattice: only {lattice.matched:.0%} of the {hint.reference} sites have an atom"
    if lattice.residual_nm > _WORST_RESIDUAL_NM:
        return f"poor lattice: the atoms lie {lattice.residual_nm:.3f} nm (rms) from its sites"
    cell = columns.fit_mean_cell(image, pixel_size_nm, lattice)
    if not 0.1 * cell.reference < cell.monitored < 0.95 * cell.reference or cell.explained < 0.7:
        return "poor lattice: the mean cell does not show a bright and a dim column"
    fit = columns.fit_columns(image, pixel_size_nm, lattice, cell)
    states = columns.occupancy(fit, image)
    fov = np.array([image.shape[1] * pixel_size_nm[0], image.shape[0] * pixel_size_nm[1]])
    return _tabulate(fit, states, lattice, cell, hint, fov, border_nm, pixel_size_nm)


def _tabulate(
    fit: columns.ColumnFit,
    states: columns.Occupancy,
    lattice: Lattice,
    cell: columns.MeanCell,
    hint: LatticeHint,
    fov_nm: Array,
    border_nm: float,
    pixel_size_nm: tuple[float, float],
) -> CrystalReading:
    sites = fit.sites
    inside = ((sites.xy_nm >= 0) & (sites.xy_nm < fov_nm)).all(1)
    probability = np.tile([0.0, 0.0, 1.0], (len(sites.xy_nm), 1))
    probability[sites.monitored] = states.probability
    vacant = probability[:, 0] + probability[:, 1]
    label = np.full(len(vacant), ATOM_LABELS.index(hint.reference))
    kinds = np.array([ATOM_LABELS.index(c) for c in hint.columns])
    label[sites.monitored] = np.where(
        vacant < 0.5, kinds[2], np.where(probability[:, 0] > probability[:, 1], kinds[0], kinds[1])
    )[sites.monitored]
    reference = float(np.median(fit.amplitude[~sites.monitored]))
    present = _normal_cdf((fit.amplitude - 0.5 * reference) / fit.sigma)
    confidence = np.where(sites.monitored, np.maximum(vacant, 1 - vacant), present)
    judged = sites.monitored & _in_crystal(fit, reference)
    judged &= ((sites.xy_nm >= border_nm) & (sites.xy_nm < fov_nm - border_nm)).all(1)
    sigma = np.full(len(vacant), lattice.site_sigma_nm)
    target = np.where(judged, vacant, 0.0)
    table = np.column_stack([sites.xy_nm, label, confidence, sigma, sigma, fit.amplitude, target])[inside]
    counts = np.array([2.0, 1.0, 0.0])
    missing = np.where(judged, probability @ counts, 0.0)
    variance = np.where(judged, probability @ counts**2 - (probability @ counts) ** 2, 0.0)
    pixel_area = pixel_size_nm[0] * pixel_size_nm[1]
    spot = columns.spot_height(cell.sigma_nm, cell.tail) * pixel_area
    return CrystalReading(
        table=table,
        judged=judged[inside],
        missing=missing[inside],
        variance=variance[inside],
        found=report(target[inside]),
        lattice=lattice,
        background=cell.background,
        peak=cell.background + cell.reference * spot,
        features={
            "judged_sites": float(judged.sum()),
            "level_full": float(states.levels[2]),
            "level_half": float(states.levels[1]),
            "blur_nm": cell.sigma_nm,
            "lattice_residual_nm": lattice.residual_nm,
            "lattice_angle_rad": lattice.angle_rad,
            "dispersion": fit.dispersion,
        },
    )


def _normal_cdf(x: Array) -> Array:
    from scipy.special import ndtr

    return np.asarray(ndtr(x), dtype=np.float64)


def _in_crystal(fit: columns.ColumnFit, reference: float) -> NDArray[np.bool_]:
    """True where two of the three nearest reference columns are there: at holes and edges of the sheet a missing
    monitored column is not a vacancy."""
    from scipy.spatial import cKDTree

    other = ~fit.sites.monitored
    _, near = cKDTree(fit.sites.xy_nm[other]).query(fit.sites.xy_nm, k=3)
    return np.asarray((fit.amplitude[other][near] > 0.5 * reference).sum(1) >= 2)


def report(probability: Array, false_discovery: float = FALSE_DISCOVERY) -> tuple[int, ...]:
    """The longest list of columns, most probable first, whose expected share of wrong ones stays within
    ``false_discovery``, each more probable than not (Bayesian false discovery rate; Mueller et al.,
    J. Am. Stat. Assoc. 99 (2004) 990). Calibrated posteriors make it a threshold on precision; rows ascend."""
    order = np.argsort(-probability, kind="stable")
    wrong = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    accepted = (wrong <= false_discovery) & (probability[order] > 0.5)
    return tuple(int(i) for i in np.sort(order[: int(accepted.sum())]))


# ---------------------------------------------------------------- evidence in the overview


def missing_atom_evidence(
    image: Array,
    region: ScanRegion,
    windows: Sequence[ScanRegion],
    hint: LatticeHint,
) -> list[Evidence]:
    """For every window the expected number of missing monitored atoms with its variance, from a coarse, low-dose frame.

    Unit: atoms missing per window, as in a sub-scan, counted from the full level of this same overview: a deficit that
    is everywhere the same cannot be seen. Where the frame resolves the lattice (pixels up to about 0.13 nm), the
    monitored columns' mean amplitude in the window is the signal and the reference columns the yardstick. Elsewhere it
    is the integrated intensity, of which the monitored atoms make up ``hint.monitored_share``. Noise is measured in the
    frame, so that ``image`` may hold counts of any gain. Windows less than half inside the overview get (None, None).
    """
    resolved = _resolved_signal(image, region, hint)
    signal = resolved or _integrated_signal(image, region, hint)
    tiles = _tiles(region)
    sums = [_window_sums(signal, region, tile) for tile in tiles]
    known = [(a, v) for a, v, coverage in sums if coverage > 0.9]
    if len(known) < 6:
        return [(None, None, {})] * len(windows)
    values, variances = np.array(known).T
    full, full_variance = _full_level(values, variances)
    evidence: list[Evidence] = []
    for window in windows:
        amplitude, variance, coverage = _window_sums(signal, region, window)
        if coverage < MIN_COVERAGE or full <= 0:
            evidence.append((None, None, {}))
            continue
        atoms = 2 * window.area_nm2 / signal.cell_area_nm2
        value = atoms * (1 - amplitude / full) / signal.share
        spread = (atoms / (full * signal.share)) ** 2 * (variance + full_variance)
        features = {"z": value / math.sqrt(spread), "coverage": coverage, "resolved": float(resolved is not None)}
        evidence.append((value, spread, features))
    return evidence


@dataclass(frozen=True)
class _Signal:
    """Per pixel the numerator and the weight [rows, cols] of an amplitude estimate sum(numerator) / sum(weight), whose
    variance is dispersion / sum(weight); ``share``: by how much the amplitude falls when all monitored atoms go."""

    numerator: Array
    weight: Array
    dispersion: float
    share: float
    cell_area_nm2: float


def _resolved_signal(image: Array, region: ScanRegion, hint: LatticeHint) -> _Signal | None:
    """Matched filter for the monitored sublattice, background and reference columns (planes over the field) fitted."""
    pixel = region.pixel_size_nm
    lattice = seed_lattice(image, pixel, hint)
    if lattice is None:
        return None
    lattice = follow_phases(lattice, image, pixel, _PHASE_TILE_NM)
    cell = columns.fit_mean_cell(image, pixel, lattice)
    if not 0.1 * cell.reference < cell.monitored < 0.95 * cell.reference or cell.explained < 0.5:
        return None
    reference, monitored = columns.sublattice_images(image.shape, pixel, lattice, cell)
    variance = columns.mean_image(image.shape, pixel, lattice, cell)
    plane = columns.plane_terms(image.shape).reshape(*image.shape, 3)
    shared = np.concatenate([plane, plane * reference[..., None]], -1).reshape(-1, 6)
    label = _tile_labels(region, lattice)
    tiles = int(label.max()) + 1
    # Every tile has its own monitored amplitude (eliminated one by one, Schur): clusters do not bend the planes.
    weight = 1 / variance.ravel()
    filtered = monitored.ravel() * weight
    own = np.bincount(label, filtered * monitored.ravel(), tiles)
    cross = np.stack([np.bincount(label, filtered * column, tiles) for column in shared.T], 1)
    right = np.bincount(label, filtered * image.ravel(), tiles)
    inner = shared.T @ (shared * weight[:, None]) - cross.T @ (cross / own[:, None])
    level = np.linalg.solve(inner, shared.T @ (image.ravel() * weight) - cross.T @ (right / own))
    rest = (shared @ level).reshape(image.shape)
    # Amplitudes are read relative to the reference columns around, which takes out a slope of the gain.
    yardstick = np.maximum((plane @ level[3:]), 0.1 * cell.reference)
    template = monitored * yardstick
    residual = image - rest - cell.monitored * monitored
    dispersion = float((residual**2).sum() / variance.sum())
    return _Signal(template * (image - rest) / variance, template**2 / variance, dispersion, 1.0, lattice.cell_area_nm2)


def _integrated_signal(image: Array, region: ScanRegion, hint: LatticeHint) -> _Signal:
    """Mean intensity relative to a plane through the full level of the field (linear incoherent imaging: the integrated
    intensity is proportional to the sum of the cross-sections)."""
    from scipy.ndimage import gaussian_filter

    # A lattice sampled more coarsely than it repeats leaves slow stripes, which windows would cut at any phase.
    smooth = gaussian_filter(image, [_STRIPE_NM / size for size in reversed(region.pixel_size_nm)])
    terms = columns.plane_terms(image.shape)
    coarse = _blocks(smooth)
    design = columns.plane_terms(coarse.shape)
    keep = np.ones(coarse.size)
    level: Array = np.zeros(3)
    for _ in range(8):
        level = np.asarray(np.linalg.lstsq(design * keep[:, None], coarse.ravel() * keep, rcond=None)[0])
        rest = coarse.ravel() - design @ level
        scale = max(1.4826 * float(np.median(np.abs(rest - np.median(rest)))), 1e-12)
        # Missing atoms only ever darken: pixels far below the plane lose their weight, bright ones much later.
        keep = np.where(rest < 0, 1 / (1 + (rest / scale) ** 2), 1 / (1 + (rest / (3 * scale)) ** 2)) ** 0.5
    plane = np.maximum((terms @ level).reshape(image.shape), 1e-3 * abs(float(image.mean())) + 1e-12)
    variance = _white_noise(image) * plane / float(plane.mean())
    weight = plane**2 / variance
    gamma = math.radians(hint.gamma_deg)
    return _Signal(
        smooth * plane / variance, weight, 1.0, hint.monitored_share, hint.a_nm * hint.b_nm * math.sin(gamma)
    )


def _blocks(image: Array, across: int = 16) -> Array:
    """Means over about ``across`` x ``across`` blocks."""
    size = [max(1, n // across) for n in image.shape]
    rows, cols = (n // s for n, s in zip(image.shape, size, strict=True))
    cut = image[: rows * size[0], : cols * size[1]]
    return np.asarray(cut.reshape(rows, size[0], cols, size[1]).mean((1, 3)))


def _white_noise(image: Array) -> float:
    """Variance per pixel of the uncorrelated noise: the median of the Fourier power over ln 2, as the power of noise is
    exponentially distributed and a lattice fills few Fourier pixels."""
    power = np.abs(np.fft.rfft2(image - image.mean())) ** 2 / image.size
    return max(float(np.median(power)) / math.log(2), 1e-300)


def _tile_labels(region: ScanRegion, lattice: Lattice) -> NDArray[np.int64]:
    """Flat tile number of every pixel of the overview, tiles of about ``_TILE_NM``."""
    x, y = pixel_centres(region.shape, region.pixel_size_nm)
    counts = [max(1, round(extent / _TILE_NM)) for extent in region.fov_nm]
    i = np.minimum((x / region.fov_nm[0] * counts[0]).astype(np.int64), counts[0] - 1)
    j = np.minimum((y / region.fov_nm[1] * counts[1]).astype(np.int64), counts[1] - 1)
    return np.asarray((j[:, None] * counts[0] + i[None, :]).ravel())


def _tiles(region: ScanRegion) -> list[ScanRegion]:
    """The overview cut into tiles of about ``_TILE_NM``, as regions."""
    counts = [max(1, round(extent / _TILE_NM)) for extent in region.fov_nm]
    fov = (region.fov_nm[0] / counts[0], region.fov_nm[1] / counts[1])
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    tiles = []
    for j in range(counts[1]):
        for i in range(counts[0]):
            dx, dy = (i + 0.5) * fov[0] - region.fov_nm[0] / 2, (j + 0.5) * fov[1] - region.fov_nm[1] / 2
            center = (region.center_nm[0] + c * dx - s * dy, region.center_nm[1] + s * dx + c * dy)
            tiles.append(region.model_copy(update={"center_nm": center, "fov_nm": fov}))
    return tiles


def _window_sums(signal: _Signal, region: ScanRegion, window: ScanRegion) -> tuple[float, float, float]:
    """Amplitude, its variance, and the part of the window that the overview covers."""
    corners = to_frame(np.array(window.corners_nm()), region)
    pixel = np.array(region.pixel_size_nm)
    low = np.maximum(np.floor(corners.min(0) / pixel).astype(int), 0)
    high = np.minimum(np.ceil(corners.max(0) / pixel).astype(int), [region.shape[1], region.shape[0]])
    if (high <= low).any():
        return 0.0, math.inf, 0.0
    x, y = (np.arange(low[axis], high[axis]) + 0.5 for axis in (0, 1))
    grid = np.stack(np.meshgrid(x * pixel[0], y * pixel[1]), -1).reshape(-1, 2)
    local = to_frame(to_specimen(grid, region), window)
    mask = ((local >= 0) & (local < np.array(window.fov_nm))).all(1).reshape(len(y), len(x))
    part = (slice(low[1], high[1]), slice(low[0], high[0]))
    weight = float(signal.weight[part][mask].sum())
    coverage = float(mask.sum() * pixel[0] * pixel[1] / window.area_nm2)
    if weight <= 0:
        return 0.0, math.inf, 0.0
    return float(signal.numerator[part][mask].sum()) / weight, signal.dispersion / weight, min(coverage, 1.0)


def to_specimen(xy_nm: Array, region: ScanRegion) -> Array:
    """Positions [n, 2] from the frame's corner, nm, as positions in the specimen frame."""
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    offset = xy_nm - np.array(region.fov_nm) / 2
    return np.asarray(offset @ np.array([[c, s], [-s, c]]) + np.array(region.center_nm))


def to_frame(xy_nm: Array, region: ScanRegion) -> Array:
    """Positions [n, 2] in the specimen frame as positions from the frame's corner, nm: undoes ``to_specimen``."""
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    return np.asarray((xy_nm - np.array(region.center_nm)) @ np.array([[c, -s], [s, c]]) + np.array(region.fov_nm) / 2)


def _full_level(values: Array, variances: Array) -> tuple[float, float]:
    """The level of undamaged tiles and its variance.

    Tiles scatter about the full level with their known noise; a part q of them lies lower by exponentially distributed
    amounts. Maximum likelihood over (level, q, mean deficit), from a grid of starts around the upper half.
    """
    from scipy.optimize import minimize
    from scipy.special import log_ndtr

    sigma = np.sqrt(variances)
    unit = float(np.median(sigma))

    def cost(p: Array) -> float:
        level, share, scale = p[0], 1 / (1 + math.exp(-p[1])), math.exp(p[2])
        t = (values - level) / sigma
        core = -0.5 * t**2 - np.log(sigma * math.sqrt(2 * math.pi))
        r = sigma / scale
        tail = math.log(1 / scale) + t * r + 0.5 * r**2 + log_ndtr(-(t + r))
        total = np.logaddexp(math.log1p(-share) + core, math.log(share) + tail)
        # Weak priors: about a quarter of the tiles damaged, by about three times their noise.
        return float(-total.sum() + 0.5 * ((p[1] + 1.0) / 1.5) ** 2 + 0.5 * ((p[2] - math.log(3 * unit)) / 1.5) ** 2)

    starts = [np.array([q, -1.0, math.log(3 * unit)]) for q in np.quantile(values, (0.5, 0.8))]
    steps = np.vstack([np.zeros(3), np.diag([unit, 0.7, 0.7])])
    fits = [
        minimize(
            cost, s, method="Nelder-Mead", options={"initial_simplex": s + steps, "xatol": 1e-3 * unit, "fatol": 1e-4}
        )
        for s in starts
    ]
    best = min(fits, key=lambda f: float(f.fun))
    undamaged = len(values) / (1 + math.exp(float(best.x[1])))
    return float(best.x[0]), unit**2 / max(undamaged, 1.0)
