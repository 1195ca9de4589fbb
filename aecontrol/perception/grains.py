"""Crystal lattices from atom positions alone: a cell seen in one patch, followed from atom to atom to where it ends.

Nothing is assumed of the material. Following the lattice through neighbours, and letting its vectors turn and stretch
on the way, keeps the count of cells right under strain that a single global lattice would lose. Lengths are in the unit
of the positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SMALLEST = 16
"""Fewest atoms of a grain, a choice: four cells by four of one column, below which rows of chance atoms occur."""
_PATCH = 150
"""Atoms of the patch in which a cell is sought."""
_WIDEST = 2.0
"""Half width of a patch in nearest-neighbour distances times the root of its atoms: crystals hold at least an eighth of
the atoms that close packing would."""
_TRIED = 500
"""Free atoms among which the patches' centres are sought."""
_NEIGHBOURS = 12
_REACH = 0.2
"""Two positions are the same site when closer than this share of the nearest-neighbour distance (a choice: a
honeycomb's sites stay apart, atoms may scatter by a tenth and vectors err by another)."""
_SEEDS = 8
_REPEATS = 0.5
"""Least share of atoms that have a partner one lattice vector away; scattered atoms reach 0.15."""
_EXPLAINED = 0.6
"""Least share of the patch's atoms on the sites of its cell."""
_MODULATED = 0.1
"""Least share of the intensities' variance that a larger cell must predict to be taken."""


@dataclass(frozen=True)
class Grain:
    """One crystal: atom ``atoms[m]`` sits on site ``site[m]`` of cell ``cell[m]`` [m, 2].

    Ideal positions are ``(cell + basis[site]) @ vectors + origin``, ``vectors`` rows a1 and a2, ``basis`` [k, 2] in
    units of these; ``departure`` [m, 2] is what the atoms lie off them (strain included).
    """

    vectors: Floats
    origin: Floats
    basis: Floats
    atoms: Ints
    cell: Ints
    site: Ints
    departure: Floats

    def ideal(self, cell: Ints, site: Ints) -> Floats:
        """Positions [n, 2] of sites on the undistorted lattice."""
        return np.asarray((cell + self.basis[site]) @ self.vectors + self.origin)

    @property
    def spacing(self) -> float:
        """Shortest distance between two sites."""
        return _spacing(self.vectors, self.basis)

    def around(self, reach: int) -> tuple[Ints, Ints, Ints]:
        """Cell [n, 2], site [n] and atom [n] (row of the grain's; -1: none) of all sites of the grain's cells and those
        up to ``reach`` cells away."""
        from scipy.ndimage import binary_dilation

        low = self.cell.min(0) - reach - 1
        shape = tuple(self.cell.max(0) - low + reach + 2)
        held = np.full((*shape, len(self.basis)), -1)
        i, j = (self.cell - low).T
        held[i, j, self.site] = np.arange(len(self.atoms))
        close = binary_dilation((held >= 0).any(2), np.ones((2 * reach + 1, 2 * reach + 1)))
        i, j = np.nonzero(close)
        cell = np.repeat(np.stack([i, j], 1) + low, len(self.basis), axis=0)
        return cell, np.tile(np.arange(len(self.basis)), len(i)), held[i, j].ravel()

    def predict(self, cell: Ints, site: Ints, weight: Floats) -> Floats:
        """Where sites [n] are expected: ideal plus the mean departure of the atoms around, the site's own left out.

        ``weight`` [m] per atom of the grain (its precision).
        """
        from scipy.spatial import cKDTree

        own = self.ideal(self.cell, self.site)
        at = self.ideal(cell, site)
        count = min(19, len(own))
        distance, near = cKDTree(own).query(at, k=count)
        width = 0.5 * float(np.sqrt(4 * np.abs(np.linalg.det(self.vectors)) / len(self.basis)))
        share = np.exp(-0.5 * (distance / width) ** 2) * weight[near] * (distance > 1e-6 * width) + 1e-300
        return np.asarray(at + (share[..., None] * self.departure[near]).sum(1) / share.sum(1)[:, None])


def find_grains(xy: Floats, intensity: Floats) -> tuple[Grain, ...]:
    """The crystals that atoms at ``xy`` [n, 2] of ``intensity`` [n] form, the first seen first; () where there is none.

    Each grain's cell is the smallest one that explains positions and intensities. Deterministic.
    """
    if len(xy) < SMALLEST:
        return ()
    from scipy.spatial import cKDTree

    distance, near = cKDTree(xy).query(xy, k=min(_NEIGHBOURS + 1, len(xy)))
    free = np.ones(len(xy), dtype=bool)
    grains = []
    while free.sum() >= SMALLEST:
        cell = _best_cell(xy, np.flatnonzero(free), float(np.median(distance[free, 1])))
        if cell is None:
            break
        grain = _grow(xy, near[:, 1:], free, cell)
        free[cell.patch] = False
        if grain is not None:
            free[grain.atoms] = False
            grains.append(enlarged(grain, xy[grain.atoms], intensity[grain.atoms]))
    return tuple(grains)


# ---------------------------------------------------------------- the cell of one patch


@dataclass(frozen=True)
class _Cell:
    """A cell and the atoms of the patch on it."""

    vectors: Floats
    basis: Floats
    explained: float
    patch: Ints
    cell: Ints
    site: Ints


def _best_cell(xy: Floats, free: Ints, apart: float) -> _Cell | None:
    """The first convincing cell, or the best one, of patches around some of the free atoms, closest packed first."""
    from scipy.spatial import cKDTree

    tree = cKDTree(xy[free])
    count = min(_PATCH, len(free))
    tried = np.arange(0, len(free), -(-len(free) // _TRIED))
    packed = tree.query(xy[free[tried]], k=[min(30, count)])[0][:, 0]
    open_ = np.ones(len(tried), dtype=bool)
    best: _Cell | None = None
    for _ in range(_SEEDS):
        if not open_.any():
            break
        seed = tried[np.flatnonzero(open_)[np.argmin(packed[open_])]]
        distance, patch = tree.query(xy[free[seed]], k=count)
        open_ &= np.hypot(*(xy[free[tried]] - xy[free[seed]]).T) > 0.5 * distance[-1]
        # strays all over the frame are no patch
        patch = patch[distance < _WIDEST * math.sqrt(_PATCH) * apart]
        if len(patch) < SMALLEST:
            continue
        found = _patch_cell(xy, free[patch], apart)
        if found is not None and (best is None or found.explained > best.explained):
            best = found
        if best is not None and best.explained > 0.9:
            break
    return best


def _patch_cell(xy: Floats, patch: Ints, apart: float) -> _Cell | None:
    """The primitive cell of the atoms ``patch``, nearest to its centre first, and its sites; None without a lattice."""
    points = xy[patch] - xy[patch[0]]
    vectors = _translations(points, apart)
    if vectors is None:
        return None
    basis = _basis(points, vectors, apart)
    if not len(basis):
        return None
    cell, site, off = _nearest_site(points @ np.linalg.inv(vectors), vectors, basis)
    on = off < 1.5 * _REACH * apart
    if on.mean() < _EXPLAINED or on.sum() < SMALLEST:
        return None
    return _Cell(vectors, basis, float(on.mean()), patch[on], cell[on], site[on])


def _translations(points: Floats, apart: float) -> Floats | None:
    """Two shortest vectors (rows) that carry most atoms of a round patch onto others, from the differences' histogram.

    A difference between two sites of one cell carries only one site's atoms onto others, a lattice vector all of them.
    """
    from scipy.ndimage import maximum_filter, uniform_filter

    radius = math.sqrt(float((points**2).sum(1).max()))
    bin_ = _REACH * apart
    half = math.ceil(0.9 * radius / bin_)
    first, second = np.triu_indices(len(points), 1)
    difference = points[second] - points[first]
    length = np.einsum("ni,ni->n", difference, difference)
    difference = difference[(length > (0.7 * apart) ** 2) & (length < ((half - 1) * bin_) ** 2)]
    difference = np.concatenate([difference, -difference])
    side = 2 * half + 1
    flat = np.floor(difference / bin_ + half + 0.5).astype(np.int64) @ np.array([side, 1])
    sums = [np.bincount(flat, w, side**2).reshape(side, side) for w in (None, *difference.T)]
    number, dx, dy = (9 * uniform_filter(s.astype(float), 3, mode="constant") for s in sums)
    peak = (number == maximum_filter(number, 3)) & (number > 0.2 * number.max())
    v = np.stack([dx[peak], dy[peak]], 1) / number[peak][:, None]
    moved = (points**2).sum(1)[:, None] + 2 * points @ v.T + (v**2).sum(1)
    reached = (moved < radius**2).sum(0)
    share = number[peak] / np.maximum(reached, 1)
    usable = reached >= 0.25 * len(points)
    if not usable.any() or share[usable].max() < _REPEATS:
        return None
    usable &= share > 0.75 * min(share[usable].max(), 1.0)
    return _shortest(v[usable])


def _shortest(v: Floats) -> Floats | None:
    """The two shortest independent of the vectors ``v`` [n, 2], right-handed, at 90 to 120 degrees, refined on all
    others that are sums of them; None when all are parallel."""
    v = v[np.argsort(np.hypot(*v.T), kind="stable")]
    first = v[0]
    cross = np.abs(first[0] * v[:, 1] - first[1] * v[:, 0]) / (np.hypot(*first) * np.hypot(*v.T))
    if not (cross > 0.3).any():
        return None
    vectors = _standard(np.stack([first, v[int(np.argmax(cross > 0.3))]]))
    sums = v @ np.linalg.inv(vectors)
    whole = np.round(sums)
    whole = whole * (np.abs(sums - whole).max(1) < 0.2)[:, None]
    return np.asarray(np.linalg.lstsq(whole, v * (whole != 0).any(1)[:, None], rcond=None)[0])


def _standard(vectors: Floats) -> Floats:
    """The reduced cell: a1 the shortest, pointing to +x, a2 at 90 to 120 degrees to it in the positive sense."""
    a, b = sorted(vectors, key=lambda v: float(v @ v))
    while True:
        b = b - round(float(a @ b) / float(a @ a)) * a
        if float(b @ b) >= float(a @ a) * (1 - 1e-9):
            break
        a, b = b, a
    a = a if (a[0], a[1]) > (0, 0) else -a
    b = b if a[0] * b[1] - a[1] * b[0] > 0 else -b
    return np.stack([a, b if float(a @ b) <= 1e-3 * float(a @ a) else b - a])


def _basis(points: Floats, vectors: Floats, apart: float) -> Floats:
    """Sites of the cell [k, 2]: where folded atoms crowd, most crowded first; at least three cells in ten hold one."""
    fraction = points @ np.linalg.inv(vectors)
    cells = max(np.pi * float((points**2).sum(1).max()) / abs(float(np.linalg.det(vectors))), 1.0)
    left = np.ones(len(points), dtype=bool)
    difference = fraction[None] - fraction[:, None]
    difference -= np.round(difference)
    square = ((difference @ vectors) ** 2).sum(2)
    near = square < (1.5 * _REACH * apart) ** 2
    sites = []
    while left.any():
        crowd = (near & left[None] & left[:, None]).sum(1)
        top = int(np.argmax(crowd))
        members = near[top] & left
        if crowd[top] < 0.3 * cells:
            break
        sites.append(fraction[top] + difference[top, members].mean(0))
        # what is a little further belongs to nobody rather than to a site of its own
        left &= square[top] > (3 * _REACH * apart) ** 2
    return np.asarray(sites).reshape(-1, 2) % 1.0


def _nearest_site(fraction: Floats, vectors: Floats, basis: Floats) -> tuple[Ints, Ints, Floats]:
    """Cell [n, 2], site [n] and distance [n] of the site nearest to positions in units of the vectors."""
    cells = np.round(fraction[:, None] - basis)
    distance = np.hypot(*((fraction[:, None] - basis - cells) @ vectors).transpose(2, 0, 1))
    site = distance.argmin(1)
    rows = np.arange(len(fraction))
    return cells[rows, site].astype(np.int64), site, distance[rows, site]


def _spacing(vectors: Floats, basis: Floats) -> float:
    steps = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], dtype=float)
    difference = (basis[:, None, None] - basis[None, :, None] + steps) @ vectors
    length = np.hypot(*difference.transpose(3, 0, 1, 2))
    return float(length[length > 1e-9].min())


# ---------------------------------------------------------------- from the patch to the grain


def _grow(xy: Floats, near: Ints, free: Bools, start: _Cell) -> Grain | None:
    """Follow the cell from its patch over the free atoms: each front is placed by its placed neighbours' vectors."""
    n, reach = len(xy), 1.5 * _REACH * _spacing(start.vectors, start.basis)
    placed = np.zeros(n, dtype=bool)
    cell, site = np.zeros((n, 2), dtype=np.int64), np.zeros(n, dtype=np.int64)
    local = np.tile(start.vectors, (n, 1, 1))
    placed[start.patch], cell[start.patch], site[start.patch] = True, start.cell, start.site
    new = start.patch
    while len(new):
        local[new] = _local_vectors(xy, near, placed, cell + start.basis[site], new, start.vectors)
        front = np.unique(near[new])
        front = front[free[front] & ~placed[front]]
        front = front[placed[near[front]].sum(1) >= 2]
        if not len(front):
            break
        known = placed[near[front]][..., None]
        around = near[front]
        vectors = (local[around] * known[..., None]).sum(1) / known.sum(1)[..., None]
        step = np.einsum("fkc,fcd->fkd", xy[front][:, None] - xy[around], np.linalg.inv(vectors))
        fraction = ((cell[around] + start.basis[site[around]] + step) * known).sum(1) / known.sum(1)
        cells, sites, off = _nearest_site(fraction, start.vectors, start.basis)
        new, cells, sites = front[off < reach], cells[off < reach], sites[off < reach]
        placed[new], cell[new], site[new] = True, cells, sites
    atoms = np.flatnonzero(placed)
    return fitted(xy, atoms, cell[atoms], site[atoms], start.basis) if len(atoms) >= SMALLEST else None


def _local_vectors(xy: Floats, near: Ints, placed: Bools, at: Floats, atoms: Ints, vectors: Floats) -> Floats:
    """Vectors [n, 2, 2] around ``atoms`` from their placed neighbours and a prior of four of these at ``vectors``."""
    around = near[atoms]
    known = placed[around][..., None]
    index = (at[around] - at[atoms][:, None]) * known
    off = (xy[around] - xy[atoms][:, None]) * known - index @ vectors
    square = 4 * float(np.abs(np.linalg.det(vectors))) * np.linalg.inv(vectors @ vectors.T) / len(vectors)
    normal = np.einsum("nkc,nkd->ncd", index, index) + square
    return np.asarray(vectors + np.linalg.solve(normal, np.einsum("nkc,nkd->ncd", index, off)))


def fitted(xy: Floats, atoms: Ints, cell: Ints, site: Ints, basis: Floats) -> Grain | None:
    """Vectors, origin and basis by least squares; of two atoms on one site the one further off is dropped."""
    for _ in range(2):
        used, site = np.unique(site, return_inverse=True)
        design = np.column_stack([site[:, None] == np.arange(len(used)), cell]).astype(float)
        fit = np.linalg.lstsq(design.T @ design, design.T @ xy[atoms], rcond=None)[0]
        vectors, origin = fit[-2:], fit[0]
        if abs(np.linalg.det(vectors)) < 1e-3 * abs(float(np.prod(np.hypot(*vectors.T)))):
            return None
        shift = (fit[: len(used)] - origin) @ np.linalg.inv(vectors)
        grain = Grain(vectors, origin, shift, atoms, cell, site, xy[atoms] - design @ fit)
        order = np.argsort(np.hypot(*grain.departure.T), kind="stable")
        _, first = np.unique(np.column_stack([cell, site])[order], axis=0, return_index=True)
        if len(first) == len(atoms):
            break
        keep = np.sort(order[first])
        atoms, cell, site = atoms[keep], cell[keep], site[keep]
    return grain


# ---------------------------------------------------------------- a larger cell, where the intensities ask for it


def _supercells() -> Iterator[Ints]:
    """All lattices of two to four cells, as integer rows (Hermite normal forms)."""
    for index in (2, 3, 4):
        for high in (d for d in range(1, index + 1) if index % d == 0):
            for shift in range(high):
                yield np.array([[index // high, shift], [0, high]], dtype=np.int64)


def enlarged(grain: Grain, xy: Floats, intensity: Floats) -> Grain:
    """The grain with the cell that predicts the intensities best, up to four times as large: perovskite A and B columns
    share one square lattice and differ in brightness only.

    Each quarter of the grain is predicted by the mean intensities of the other three, so that a modulation has to go
    through all of it.
    """
    from scipy.spatial import cKDTree

    if np.ptp(intensity) == 0:
        return grain
    # against the atoms around: thickness and layers of another brightness are no modulation
    around = cKDTree(xy).query(xy, k=min(_NEIGHBOURS + 1, len(xy)))[1]
    y = intensity - intensity[around].mean(1)
    y = y - np.array([np.median(y[grain.site == k]) for k in range(len(grain.basis))])[grain.site]
    spread = 1.4826 * float(np.median(np.abs(y))) + 1e-12 * float(np.abs(intensity).max()) + 1e-300
    y = np.clip(y, -4 * spread, 4 * spread)
    quarter = (xy > np.median(xy, axis=0)) @ np.array([2, 1])

    def misfit(larger: Grain) -> float:
        classes = len(larger.basis)
        label = 4 * larger.site + quarter
        number, total = (np.bincount(label, w, 4 * classes).reshape(classes, 4) for w in (None, y))
        others = (total.sum(1)[:, None] - total) / np.maximum(number.sum(1)[:, None] - number, 1)
        return float(((y - others.ravel()[label]) ** 2).sum())

    rest, chosen = misfit(grain), grain
    for rows in _supercells():
        larger = _with_cell(grain, rows)
        less = misfit(larger)
        if less < (1 - _MODULATED) * rest:
            rest, chosen = less, larger
    return chosen


def _with_cell(grain: Grain, rows: Ints) -> Grain:
    """The same grain on the larger cell whose vectors are ``rows @ grain.vectors``, reduced."""
    vectors = _standard(rows @ grain.vectors)
    rows = np.round(vectors @ np.linalg.inv(grain.vectors)).astype(np.int64)
    det = round(float(np.linalg.det(rows)))
    turn = np.array([[rows[1, 1], -rows[0, 1]], [-rows[1, 0], rows[0, 0]]])  # inverse of the rows times det
    # cells of the old lattice in one of the new: their coordinates times det are whole
    scaled = grain.cell @ turn * int(np.sign(det))
    size = abs(det)
    rest = scaled % size
    number = rest @ np.array([size, 1])
    cosets = np.flatnonzero(np.bincount(number, minlength=size**2))
    coset = np.searchsorted(cosets, number)
    part = np.stack([cosets // size, cosets % size], 1) / size
    new = ((scaled - rest) // size).astype(np.int64)
    inner = grain.basis @ grain.vectors @ np.linalg.inv(vectors)
    basis = (part[:, None] + inner).reshape(-1, 2)
    return replace(grain, vectors=vectors, basis=basis, cell=new, site=coset * len(grain.basis) + grain.site)
