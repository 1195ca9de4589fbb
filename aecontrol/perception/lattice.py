"""The crystal lattice of a frame: seeded by its Fourier peaks, refined on atom positions, followed locally.

Positions are nm in the frame's own coordinates: x along the fast axis, y along the slow axis, from the corner of
pixel [0, 0], whose centre is at half a pixel. A pixel size is (fast, slow), nm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aecontrol.errors import BadInput
from aecontrol.types import ATOM_LABELS, Model, Positive

Array = NDArray[np.float64]

_FOLD_BINS = 32
_KERNEL_NM = 0.45
"""Atoms within about this distance share a local distortion: some 50 of them in MoS2 (a choice)."""
_PHASE_TILE_NM = 2.0
_MATCH_NM = 0.07
"""An atom belongs to a site when nearer than this: under half of the shortest Mo-S distance, 0.182 nm (a choice)."""


class LatticeHint(Model):
    """The two-dimensional lattice to expect: a bright reference column and one monitored column in each cell."""

    a_nm: Positive = Field(0.316, description="length of the first lattice vector, nm (MoS2: 0.316)")
    b_nm: Positive = Field(0.316, description="length of the second lattice vector, nm")
    gamma_deg: Annotated[float, Field(gt=20, lt=160)] = Field(120.0, description="angle between the two, degrees")
    tolerance: Annotated[float, Field(gt=0, le=0.15)] = Field(0.08, description="largest relative error of the scale")
    offset: tuple[float, float] = Field(
        (1 / 3, 2 / 3), description="monitored column relative to the reference, in lattice vectors; the sign is found"
    )
    reference: str = Field("Mo", description="label of the reference column, the brighter of the two")
    columns: tuple[str, str, str] = Field(
        ("S0", "S1", "S2"), description="labels of a monitored column that holds 0, 1 and 2 atoms"
    )

    monitored_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.28, description="share of a cell's integrated intensity in its monitored column (Z^1.7: 2 S of MoS2, 0.28)"
    )

    @model_validator(mode="after")
    def _known_labels(self) -> LatticeHint:
        for label in (self.reference, *self.columns):
            if label not in ATOM_LABELS:
                raise ValueError(f"label {label!r} is not one of {', '.join(ATOM_LABELS)}; use one of these")
        return self

    @property
    def threefold(self) -> bool:
        """True when a turn by 120 degrees maps the lattice onto itself."""
        return math.isclose(self.a_nm, self.b_nm) and math.isclose(self.gamma_deg, 120.0)


@dataclass(frozen=True)
class Sites:
    """Predicted columns inside (or just outside) a frame: ``xy_nm`` [n, 2], ``monitored`` [n] (False: reference)."""

    xy_nm: Array
    monitored: NDArray[np.bool_]


@dataclass(frozen=True)
class Lattice:
    """A fitted lattice. ``vectors_nm`` rows are a1, a2; ``offset`` the monitored column in units of these.

    ``snr`` is the mean power of the Fourier peaks over the noise, ``matched`` the fraction of reference sites that
    have an atom, ``residual_nm`` the rms distance (per axis) of these atoms from their sites. ``anchors_nm`` [m, 2] and
    ``shifts_nm`` [m, 2] carry the slowly varying distortion: what atoms (or image tiles) there say about the departure
    from the ideal lattice, averaged over ``kernel_nm``.
    """

    origin_nm: Array
    vectors_nm: Array
    offset: Array
    snr: float
    matched: float = 1.0
    residual_nm: float = 0.0
    anchors_nm: Array | None = None
    shifts_nm: Array | None = None
    kernel_nm: float = _KERNEL_NM

    @property
    def angle_rad(self) -> float:
        """Direction of a1 from +x towards +y, rad."""
        return math.atan2(self.vectors_nm[0, 1], self.vectors_nm[0, 0])

    @property
    def cell_area_nm2(self) -> float:
        """Area of one unit cell, nm^2."""
        return abs(float(np.linalg.det(self.vectors_nm)))

    @property
    def site_sigma_nm(self) -> float:
        """Standard error per axis of a predicted site: the atoms' residual over the root of those averaged locally."""
        averaged = 4 * math.pi * self.kernel_nm**2 * 2 / self.cell_area_nm2
        return self.residual_nm / math.sqrt(max(averaged, 1.0))

    def fractional(self, xy_nm: Array) -> Array:
        """Positions [n, 2] nm as multiples of the lattice vectors [n, 2], the local distortion taken out."""
        return (xy_nm - self.origin_nm - self.displacement(xy_nm)) @ np.linalg.inv(self.vectors_nm)

    def displacement(self, xy_nm: Array) -> Array:
        """Local departure [n, 2] nm from the ideal lattice: kernel mean of the anchors, shrunk to 0 far from all."""
        if self.anchors_nm is None or self.shifts_nm is None:
            return np.zeros_like(xy_nm)
        from scipy.spatial import cKDTree

        count = min(24, len(self.anchors_nm))
        distance, near = cKDTree(self.anchors_nm).query(xy_nm, k=count)
        weight = np.exp(-0.5 * (distance.reshape(len(xy_nm), count) / self.kernel_nm) ** 2)
        shift = self.shifts_nm[near.reshape(len(xy_nm), count)]
        # One anchor's worth of prior weight on "no distortion" keeps empty corners on the affine lattice.
        return np.asarray((weight[..., None] * shift).sum(1) / (weight.sum(1)[:, None] + 1.0))

    def sites(self, fov_nm: tuple[float, float], margin_nm: float = 0.0) -> Sites:
        """All predicted columns within ``margin_nm`` outside the field (negative: inside of it)."""
        corners = np.array([[x, y] for x in (0.0, fov_nm[0]) for y in (0.0, fov_nm[1])])
        index = (corners - self.origin_nm) @ np.linalg.inv(self.vectors_nm)
        low, high = np.floor(index.min(0)) - 3, np.ceil(index.max(0)) + 3
        n, m = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]), indexing="ij")
        cells = np.stack([n.ravel(), m.ravel()], 1)
        ideal = np.concatenate([cells, cells + self.offset]) @ self.vectors_nm + self.origin_nm
        monitored = np.repeat([False, True], len(cells))
        reach = margin_nm + 0.2
        near = ((ideal > -reach) & (ideal < np.asarray(fov_nm) + reach)).all(1)
        ideal, monitored = ideal[near], monitored[near]
        xy = ideal + self.displacement(ideal)
        inside = ((xy > -margin_nm) & (xy < np.asarray(fov_nm) + margin_nm)).all(1)
        return Sites(xy[inside], monitored[inside])


def find_lattice(
    image: Array, pixel_size_nm: tuple[float, float], hint: LatticeHint, positions_nm: Array | None = None
) -> Lattice | None:
    """The lattice of a frame, or None where the frame shows none.

    Fourier peaks near the hint give the vectors, the folded unit cell the origin and which sublattice is brighter,
    local phases a first map of the distortion; then atom positions [n, 2] nm, where given, refine all of it.
    """
    seed = seed_lattice(image, pixel_size_nm, hint)
    if seed is None or positions_nm is None:
        return seed
    start = follow_phases(seed, image, pixel_size_nm, _PHASE_TILE_NM)
    return refine_on_atoms(start, positions_nm, (image.shape[1] * pixel_size_nm[0], image.shape[0] * pixel_size_nm[1]))


def pixel_centres(shape: tuple[int, int], pixel_size_nm: tuple[float, float]) -> tuple[Array, Array]:
    """x of every column and y of every row, nm."""
    x, y = ((np.arange(n) + 0.5) * size for n, size in zip(shape[::-1], pixel_size_nm, strict=True))
    return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)


def _reciprocal(hint: LatticeHint, sense: float) -> Array:
    """Three shortest reciprocal vectors (rows, 1/nm) of the hinted lattice with a1 along +x; the third is g1 - g2 or
    g1 + g2, whichever is shorter."""
    gamma = sense * math.radians(hint.gamma_deg)
    real = np.array([[hint.a_nm, 0.0], [hint.b_nm * math.cos(gamma), hint.b_nm * math.sin(gamma)]])
    g = np.linalg.inv(real).T
    third = min((g[0] - g[1], g[0] + g[1]), key=lambda v: float(v @ v))
    return np.stack([g[0], g[1], third])


def seed_lattice(image: Array, pixel_size_nm: tuple[float, float], hint: LatticeHint) -> Lattice | None:
    """Lattice from the image alone; None when its Fourier peaks do not stand out of the noise or alias."""
    rows, cols = image.shape
    nyquist = 0.5 / max(pixel_size_nm)
    longest = max(float(np.linalg.norm(g)) for g in _reciprocal(hint, 1.0)) * (1 + hint.tolerance)
    extent = min(rows * pixel_size_nm[1], cols * pixel_size_nm[0])
    if longest > 0.95 * nyquist or extent < 4 * max(hint.a_nm, hint.b_nm):
        return None
    windowed = (image - image.mean()) * np.outer(np.hanning(rows + 2)[1:-1], np.hanning(cols + 2)[1:-1])
    power = np.abs(np.fft.fft2(windowed)) ** 2
    best: tuple[float, Array] | None = None
    for sense in (1.0,) if hint.threefold or math.isclose(hint.gamma_deg, 90.0) else (1.0, -1.0):
        found = _search(power, pixel_size_nm, hint, sense)
        if best is None or found[0] > best[0]:
            best = found
    assert best is not None
    peaks = np.array([_climb(windowed, pixel_size_nm, g) for g in best[1]])
    strength = np.array([_spot_power(windowed, pixel_size_nm, g) for g in peaks])
    snr = strength / _noise_power(power, pixel_size_nm, float(np.linalg.norm(best[1], axis=1).mean()))
    # The largest of ~1e5 exponential noise powers is ~12; three independent peaks of that size never come by chance.
    if snr.mean() < 20.0 or np.sort(snr)[1] < 10.0:
        return None
    sign = 1.0 if np.allclose(best[1][2], best[1][0] + best[1][1]) else -1.0
    design = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, sign]])
    weight = np.sqrt(snr)[:, None]
    g = np.linalg.lstsq(design * weight, peaks * weight, rcond=None)[0]
    return _place(image, pixel_size_nm, hint, np.linalg.inv(g).T, float(snr.mean()))


def _search(power: Array, pixel_size_nm: tuple[float, float], hint: LatticeHint, sense: float) -> tuple[float, Array]:
    """Best score and reciprocal vectors over all directions and scales within the tolerance, on its raster."""
    rows, cols = power.shape
    size = np.array([cols * pixel_size_nm[0], rows * pixel_size_nm[1]])
    start = _reciprocal(hint, sense)
    length = float(np.linalg.norm(start, axis=1).max())
    step = 0.4 / (length * float(size.max()))
    angles = np.arange(0.0, 2 * math.pi / 3 if hint.threefold else math.pi, step)
    scales = np.arange(1 - hint.tolerance, 1 + hint.tolerance + step, step)
    from scipy.ndimage import maximum_filter

    local = np.log1p(maximum_filter(power, size=2, mode="wrap") / np.median(power))
    c, s = np.cos(angles), np.sin(angles)
    score = np.zeros((len(angles), len(scales)))
    for g in start:
        kx = np.outer(c * g[0] - s * g[1], scales) * size[0]
        ky = np.outer(s * g[0] + c * g[1], scales) * size[1]
        score += local[np.round(ky).astype(int) % rows, np.round(kx).astype(int) % cols]
    i, j = np.unravel_index(int(np.argmax(score)), score.shape)
    turn = np.array([[c[i], s[i]], [-s[i], c[i]]])
    return float(score[i, j]), (start @ turn) * scales[j]


def _noise_power(power: Array, pixel_size_nm: tuple[float, float], k: float) -> float:
    """Mean noise power in the annulus 0.8 k to 1.25 k (median / ln 2 for exponentially distributed power)."""
    rows, cols = power.shape
    radius = np.hypot(np.fft.fftfreq(cols, pixel_size_nm[0])[None, :], np.fft.fftfreq(rows, pixel_size_nm[1])[:, None])
    ring = power[(radius > 0.8 * k) & (radius < 1.25 * k)]
    return max(float(np.median(ring)) / math.log(2), 1e-300)


def _spectrum(image: Array, pixel_size_nm: tuple[float, float], kx: Array, ky: Array) -> NDArray[np.complex128]:
    """Fourier sums of the image at all (ky, kx), 1/nm: [len(ky), len(kx)]."""
    x, y = pixel_centres(image.shape, pixel_size_nm)
    return np.asarray(np.exp(-2j * np.pi * np.outer(ky, y)) @ image @ np.exp(-2j * np.pi * np.outer(x, kx)))


def _spot_power(image: Array, pixel_size_nm: tuple[float, float], g: Array) -> float:
    return float(np.abs(_spectrum(image, pixel_size_nm, g[:1], g[1:])[0, 0]) ** 2)


def _climb(windowed: Array, pixel_size_nm: tuple[float, float], g: Array) -> Array:
    """The maximum of the power near ``g``, to a small fraction of a Fourier pixel: coarse grid, then parabolas."""
    rows, cols = windowed.shape
    unit = np.array([1 / (cols * pixel_size_nm[0]), 1 / (rows * pixel_size_nm[1])])
    at = g.copy()
    for spacing, half in ((0.5, 4), (0.25, 1), (0.25, 1), (0.1, 1)):
        offsets = np.arange(-half, half + 1) * spacing
        power = np.abs(_spectrum(windowed, pixel_size_nm, at[0] + offsets * unit[0], at[1] + offsets * unit[1])) ** 2
        r, c = np.unravel_index(int(np.argmax(power)), power.shape)
        if half > 1:
            at = at + np.array([offsets[c], offsets[r]]) * unit
            continue
        log = np.log(power + 1e-300)
        at = at + spacing * np.array([_vertex(log[1]), _vertex(log[:, 1])]) * unit
    return at


def _vertex(three: Array) -> float:
    """Position of the maximum of the parabola through values at -1, 0, 1, held within this range."""
    curvature = float(three[0] - 2 * three[1] + three[2])
    return 0.0 if curvature >= 0 else float(np.clip(0.5 * (three[0] - three[2]) / curvature, -1, 1))


def fold(
    image: Array, pixel_size_nm: tuple[float, float], lattice: Lattice, bins: int = _FOLD_BINS
) -> tuple[Array, Array]:
    """The mean unit cell [bins, bins] over fractional coordinates (first axis a1), and the pixels per bin."""
    fractional = pixel_fractions(image.shape, pixel_size_nm, lattice)
    i, j = np.floor((fractional % 1.0) * bins).astype(np.int64) % bins
    flat = (i * bins + j).ravel()
    number = np.bincount(flat, minlength=bins * bins).reshape(bins, bins)
    total = np.bincount(flat, weights=image.ravel(), minlength=bins * bins).reshape(bins, bins)
    fallback = image.mean()
    return np.where(number > 0, total / np.maximum(number, 1), fallback), number.astype(float)


def pixel_fractions(shape: tuple[int, int], pixel_size_nm: tuple[float, float], lattice: Lattice) -> Array:
    """Fractional lattice coordinates [2, rows, cols] of every pixel centre, distortion included."""
    x, y = pixel_centres(shape, pixel_size_nm)
    dx, dy = _displacement_map(shape, pixel_size_nm, lattice)
    inverse = np.linalg.inv(lattice.vectors_nm)
    px = x[None, :] - lattice.origin_nm[0] - dx
    py = y[:, None] - lattice.origin_nm[1] - dy
    return np.stack([px * inverse[0, 0] + py * inverse[1, 0], px * inverse[0, 1] + py * inverse[1, 1]])


def _displacement_map(
    shape: tuple[int, int], pixel_size_nm: tuple[float, float], lattice: Lattice
) -> tuple[Array, Array]:
    """x and y displacement of every pixel: evaluated on a coarse raster (it varies slowly) and interpolated."""
    if lattice.anchors_nm is None:
        return np.zeros((1, 1)), np.zeros((1, 1))
    from scipy.ndimage import zoom

    coarse = (min(shape[0], 33), min(shape[1], 33))
    x = np.linspace(0.5, shape[1] - 0.5, coarse[1]) * pixel_size_nm[0]
    y = np.linspace(0.5, shape[0] - 0.5, coarse[0]) * pixel_size_nm[1]
    points = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    field = lattice.displacement(points).reshape(*coarse, 2)
    factors = (shape[0] / coarse[0], shape[1] / coarse[1])
    return zoom(field[..., 0], factors, order=1), zoom(field[..., 1], factors, order=1)


def _place(image: Array, pixel_size_nm: tuple[float, float], hint: LatticeHint, vectors: Array, snr: float) -> Lattice:
    """Origin on the brightest column of the mean cell; a1, a2 turned so that the monitored column is the brighter of
    the two at +offset and -offset."""
    from scipy.ndimage import gaussian_filter

    draft = Lattice(np.zeros(2), vectors, np.asarray(hint.offset), snr)
    cell, number = fold(image, pixel_size_nm, draft)
    blur = 0.035 / np.linalg.norm(vectors, axis=1) * _FOLD_BINS
    smooth = gaussian_filter(cell * number, blur, mode="wrap") / gaussian_filter(number, blur, mode="wrap")
    peak = np.array(np.unravel_index(int(np.argmax(smooth)), smooth.shape))
    around = [[smooth[tuple((peak + d * axis) % _FOLD_BINS)] for d in (-1, 0, 1)] for axis in np.eye(2, dtype=int)]
    origin = (peak + 0.5 + np.array([_vertex(np.array(a)) for a in around])) / _FOLD_BINS

    def at(fraction: Array) -> float:
        return float(smooth[tuple(np.floor(((origin + fraction) % 1.0) * _FOLD_BINS).astype(int))])

    flipped = at(-draft.offset) > at(draft.offset)
    real = -vectors if flipped else vectors
    if hint.threefold:
        real = min(_turned(real), key=lambda v: abs(math.atan2(v[0, 1], v[0, 0])))
    return replace(draft, origin_nm=origin @ vectors, vectors_nm=real)


def _turned(vectors: Array) -> Iterator[Array]:
    """The three descriptions of one threefold lattice that keep the offset (1/3, 2/3): a1 -> a2 -> -a1 - a2."""
    a1, a2 = vectors
    for pair in ((a1, a2), (a2, -a1 - a2), (-a1 - a2, a1)):
        yield np.stack(pair)


def _assign(lattice: Lattice, positions_nm: Array) -> tuple[Array, NDArray[np.bool_], Array]:
    """Nearest site of every atom: its lattice index (offset included) [n, 2], whether it is monitored [n], and the
    departure of the atom from it [n, 2] nm."""
    fraction = lattice.fractional(positions_nm)
    candidates = []
    for offset in (np.zeros(2), lattice.offset):
        index = np.round(fraction - offset) + offset
        candidates.append((index, (fraction - index) @ lattice.vectors_nm))
    far = [np.hypot(*departure.T) for _, departure in candidates]
    monitored = far[1] < far[0]
    index = np.where(monitored[:, None], candidates[1][0], candidates[0][0])
    return index, monitored, np.where(monitored[:, None], candidates[1][1], candidates[0][1])


def refine_on_atoms(start: Lattice, positions_nm: Array, fov_nm: tuple[float, float]) -> Lattice:
    """The lattice that atom positions [n, 2] nm give: atoms are assigned to the sites of ``start`` (its distortion
    included), vectors and origin follow by Tukey-weighted least squares, the local distortion from what is left.

    Returns ``start`` with ``matched`` = 0 when too few atoms (under 12) lie on it.
    """
    lattice = start
    for _ in range(3):
        index, _, departure = _assign(lattice, positions_nm)
        distance = np.hypot(*departure.T)
        used = distance < _MATCH_NM
        if used.sum() < 12:
            return replace(start, matched=0.0)
        scale = max(1.4826 * float(np.median(distance[used])), 1e-3)
        weight = np.clip(1 - (distance / (4.0 * scale)) ** 2, 0, None) ** 2 * used
        design = np.column_stack([np.ones(len(index)), index])
        root = np.sqrt(weight)[:, None]
        fit = np.linalg.lstsq(design * root, positions_nm * root, rcond=None)[0]
        lattice = replace(
            lattice,
            origin_nm=fit[0],
            vectors_nm=fit[1:],
            anchors_nm=positions_nm[used],
            shifts_nm=(positions_nm - design @ fit)[used],
            kernel_nm=_KERNEL_NM,
        )
    _, monitored, departure = _assign(lattice, positions_nm)
    used = np.hypot(*departure.T) < _MATCH_NM
    expected = ~lattice.sites(fov_nm, -0.1).monitored
    hits = used & ~monitored & (positions_nm > 0.1).all(1) & (positions_nm < np.asarray(fov_nm) - 0.1).all(1)
    return replace(
        lattice,
        matched=min(1.0, float(hits.sum()) / max(int(expected.sum()), 1)),
        residual_nm=float(np.sqrt((departure[used] ** 2).mean())),
    )


def follow_phases(lattice: Lattice, image: Array, pixel_size_nm: tuple[float, float], tile_nm: float) -> Lattice:
    """Local distortion from the phases of the first Fourier peaks in Hann-weighted, half-overlapping tiles.

    Geometric phase analysis (Hytch, Snoeck, Kilaas, Ultramicroscopy 74 (1998) 131): a peak g of a crystal displaced by
    u changes its phase by -2 pi g.u. For images whose pixels are too coarse to locate single atoms.
    """
    rows, cols = image.shape
    g = np.linalg.inv(lattice.vectors_nm).T
    x, y = pixel_centres(image.shape, pixel_size_nm)
    size = (max(8, round(tile_nm / pixel_size_nm[1])), max(8, round(tile_nm / pixel_size_nm[0])))
    if rows < size[0] or cols < size[1]:
        return lattice
    taper = np.outer(np.hanning(size[0] + 2)[1:-1], np.hanning(size[1] + 2)[1:-1])
    starts = [
        np.unique(np.linspace(0, n - s, max(1, 2 * (n // s) - 1)).round().astype(int))
        for n, s in zip(image.shape, size, strict=True)
    ]
    sums = []
    for k in g:
        carrier = np.exp(
            -2j * np.pi * (k[0] * (x[None, :] - lattice.origin_nm[0]) + k[1] * (y[:, None] - lattice.origin_nm[1]))
        )
        wave = (image - image.mean()) * carrier
        sums.append([[(wave[r : r + size[0], c : c + size[1]] * taper).sum() for c in starts[1]] for r in starts[0]])
    values = np.asarray(sums)
    phase = np.angle(values / np.exp(1j * np.angle(values.sum((1, 2), keepdims=True))))
    shifts = -(phase.reshape(2, -1).T / (2 * np.pi)) @ lattice.vectors_nm
    centres = np.stack(
        np.meshgrid((starts[1] + size[1] / 2) * pixel_size_nm[0], (starts[0] + size[0] / 2) * pixel_size_nm[1]), -1
    ).reshape(-1, 2)
    return replace(lattice, anchors_nm=centres, shifts_nm=shifts, kernel_nm=tile_nm / 2)


def require_image(image: NDArray[np.generic]) -> Array:
    """The image as float64 [rows, cols]. Raises BadInput when it is not two-dimensional and real."""
    if image.ndim != 2 or np.iscomplexobj(image):
        raise BadInput(f"image of shape {image.shape}, type {image.dtype}", "give one real [rows, cols] channel")
    return np.asarray(image, dtype=np.float64)
