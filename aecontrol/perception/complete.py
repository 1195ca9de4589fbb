"""Atoms that a crystal says must be looked for: sites that the network passed over, and finds that are none.

At a few counts per column no single column can be told from noise, but the lattice that all of them share can. Sites of
every grain are fitted to the image together with whatever else was found (:mod:`.missing`), and a site is an atom when
the posterior odds say so: its own counts decide, the lattice only says where to look. Grains grow over their gaps as
long as the image bears the sites out. Outside of grains nothing is changed. Lengths are nm unless named px.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .grains import SMALLEST, Grain, enlarged, find_grains, fitted
from .missing import AmplitudeFit, occupation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

FIRST_BLUR_NM = 0.045
"""Where the fit of the columns' common width starts."""
UNSURE_NM = 0.0205
"""Columns of a sublattice that their own counts place no better than this (median) are drawn to their sites: at 2.5
errors, 0.05 nm, a column counts as missed. From 30 counts on they are better known, even in
graphene."""
_GROWTH = 4
"""Cells by which a grain may grow in a round, and the rounds."""
_ROUNDS = 5
_GROWN = 1.02
_SAME = 0.45
"""A find is the atom of a site within this share of the shortest distance of two sites."""
_DRIFTS = 4
"""Times that sites are moved together with those around, as long as any move by a fifth of the shortest distance."""
_AROUND = 9
_HELD = 0.6
"""Share of the nearest sites that hold an atom inside of a crystal."""
_OFF = 0.1
"""Share of the shortest distance by which columns may scatter about their sites beyond their errors."""
_FAINTEST = 0.15
"""Share of the brightness of a sublattice's found columns below which nothing is added to it: in a hole the local
level of a full column sinks to that of what light leaks into it."""
_PHANTOM = 4.0
"""Standard errors below which a find between the sites of a crystal is noise."""


@dataclass(frozen=True)
class Candidates:
    """Atoms to refine, n of them, at ``xy`` [n, 2] with the probability ``confidence`` of being there; ``peak`` [n] is
    the find at the place (-1: none, the lattice ``completed`` it). ``sublattice`` [n] is its number (-1: of no
    crystal), ``site`` [n, 2] where the neighbours put it and ``scatter`` [n] by how much it may be off."""

    xy: Floats
    confidence: Floats
    peak: Ints
    sublattice: Ints
    site: Floats
    scatter: Floats

    @property
    def completed(self) -> Bools:
        """Which ones the network did not see."""
        return self.peak < 0

    def settled(self, xy: Floats, sigma: Floats) -> tuple[Floats, Floats]:
        """Positions and standard errors [n, 2] after refinement to these: posterior means and widths.

        Sublattices whose counts leave their columns worse than ``UNSURE_NM`` are weighed against their sites, as
        narrowly as they were measured to scatter; all others stay what the image says.
        """
        error = sigma.max(1)
        faint = [k for k in np.unique(self.sublattice) if np.median(error[self.sublattice == k]) > UNSURE_NM]
        unsure = np.isfinite(self.scatter) & np.isin(self.sublattice, faint)
        own, prior = sigma[unsure] ** -2.0, self.scatter[unsure, None] ** -2.0
        xy, sigma = xy.copy(), sigma.copy()
        xy[unsure] = (own * xy[unsure] + prior * self.site[unsure]) / (own + prior)
        sigma[unsure] = (own + prior) ** -0.5
        return xy, sigma


@dataclass(frozen=True)
class _Pool:
    """All sites of all grains, at their predicted places: grain number, cell, site of the cell, the find there (-1:
    none), and whether it is in the frame."""

    xy: Floats
    grain: Ints
    cell: Ints
    site: Ints
    peak: Ints
    framed: Bools


def complete(
    image: NDArray[np.generic], pixel_size_nm: tuple[float, float], xy: Floats, confidence: Floats, threshold: float
) -> Candidates:
    """Atoms of ``image`` [rows, cols] from finds at ``xy`` [n, 2] nm with ``confidence`` [n], faint ones included.

    On sites of a crystal the posterior decides, off them and without a crystal the finds with at least ``threshold``
    are kept, less the insignificant ones between sites.
    """
    data = np.asarray(image, dtype=np.float64)
    size = np.array(data.shape[::-1]) * pixel_size_nm
    grains = list(find_grains(xy, np.ones(len(xy)))) if len(xy) >= SMALLEST else []
    if not grains:
        return _as_found(xy, confidence, np.flatnonzero(confidence >= threshold))
    weights = [np.ones(len(g.atoms)) for g in grains]
    blur, held = FIRST_BLUR_NM, sum(len(g.atoms) for g in grains)
    for turn in range(_ROUNDS):
        pool = _pool(grains, weights, xy, size)
        view = _look(data, pixel_size_nm, pool, xy, blur)
        blur, before, held = view.blur, held, int((view.good & pool.framed).sum())
        if held < _GROWN * before:
            break
        grains, weights = _regrown(grains, pool, view, first=turn == 0)
        if not grains:
            return _as_found(xy, confidence, np.flatnonzero(confidence >= threshold))
    return _chosen(pool, view, xy, confidence, threshold)


def _as_found(xy: Floats, confidence: Floats, rows: Ints) -> Candidates:
    nowhere = np.full((len(rows), 2), np.nan)
    none = np.full(len(rows), -1)
    return Candidates(xy[rows], confidence[rows], rows, none, nowhere, np.full(len(rows), np.inf))


def _pool(grains: list[Grain], weights: list[Floats], xy: Floats, size: Floats) -> _Pool:
    """Sites of the grains and of the cells around, each in the grain whose atoms are nearest, no two on one place."""
    from scipy.spatial import cKDTree

    owner = np.repeat(np.arange(len(grains)), [len(g.atoms) for g in grains])
    tree = cKDTree(np.concatenate([g.ideal(g.cell, g.site) + g.departure for g in grains]))
    parts = []
    for number, (grain, weight) in enumerate(zip(grains, weights, strict=True)):
        cell, site, _ = grain.around(_GROWTH)
        # a predicted place is off the ideal one by no more than the atoms are
        rim = 0.5 * grain.spacing
        near = _within(grain.ideal(cell, site), size, rim + float(np.abs(grain.departure).max()))
        cell, site = cell[near], site[near]
        at = grain.predict(cell, site, weight)
        keep = _within(at, size, rim)
        keep &= owner[tree.query(at)[1]] == number
        parts.append((at[keep], np.full(keep.sum(), number), cell[keep], site[keep]))
    at, owned, cell, site = (np.concatenate(column) for column in zip(*parts, strict=True))
    spacing = min(g.spacing for g in grains)
    keep = np.ones(len(at), dtype=bool)
    for first, second in sorted(cKDTree(at).query_pairs(_SAME * spacing)):
        if keep[first]:
            keep[second] = False
    at = at[keep]
    off, nearest = cKDTree(xy).query(at)
    peak = np.where(off < _SAME * spacing, nearest, -1)
    # one find stands on one site, the nearer one
    order = np.lexsort([off, peak])
    again = np.concatenate([[False], peak[order][1:] == peak[order][:-1]])
    peak[order[again]] = -1
    framed = np.asarray(((at >= 0) & (at <= size)).all(1))
    return _Pool(at, owned[keep], cell[keep], site[keep], peak, framed)


def _within(at: Floats, size: Floats, rim: float) -> Bools:
    """Which places [n, 2] are in the frame or closer to it than ``rim``."""
    return np.asarray(((at > -rim) & (at < size + rim)).all(1))


@dataclass(frozen=True)
class _View:
    """What the image says of a pool: probability that each site holds an atom, whether the crystal is there (``good``:
    it holds one, and so do those around, where they should), amplitude, place ``xy`` and the column's own step [n, 2]
    from it with its error; ``other``: the finds on no site, with their ``significance``."""

    blur: float
    xy: Floats
    probability: Floats
    good: Bools
    inside: Bools
    amplitude: Floats
    step: Floats
    error: Floats
    other: Ints
    significance: Floats


def _look(data: Floats, pixel: tuple[float, float], pool: _Pool, xy: Floats, blur: float) -> _View:
    """Fit sites and the finds on none to the image."""
    from scipy.spatial import cKDTree

    n = len(pool.xy)
    tree = cKDTree(pool.xy)
    near = tree.query(pool.xy, k=min(_AROUND + 1, n))
    spacing = float(np.median(near[0][:, 1]))
    other = np.setdiff1d(np.arange(len(xy)), pool.peak)
    columns = np.concatenate([pool.xy, xy[other]])
    fit = AmplitudeFit(data, pixel, columns, np.zeros(len(columns)), blur, spacing)
    kind = pool.grain * (pool.site.max() + 1) + pool.site
    few = np.bincount(kind)[kind] <= _AROUND
    kind = np.concatenate([np.where(few, -1, kind), np.full(len(other), -1)])
    filled = occupation(fit, kind, kind >= 0)
    probability = 1 - filled.probability[:n, 0]
    probability[_faint(kind[:n], pool.peak >= 0, filled.amplitude[:n])] = 0.0
    level = np.concatenate([filled.level[:n], np.maximum(fit.amplitude[n:], 0.0)])
    around = near[1][:, 1:]
    for _ in range(_DRIFTS):
        step, error = (a[:n] for a in fit.moves(level))
        # what moves as one with those around is the lattice's own error where it was followed far
        weight = error[near[1], None] ** -2.0
        together = (weight * step[near[1]]).sum(1) / weight.sum(1)
        if not (np.hypot(*together.T) > 2 * _OFF * spacing).any():
            break
        fit.place(fit.xy + np.concatenate([together, np.zeros((len(other), 2))]))
    held = (probability[around] > 0.5).mean(1) > _HELD
    allowed = 4 * error[around] ** 2 + (_OFF * spacing) ** 2
    straight = np.mean((step[around] ** 2).sum(2) / allowed, axis=1) < 1
    inside = held & straight & ~few
    significance = filled.amplitude[n:] / filled.sigma[n:]
    return _View(
        fit.blur,
        fit.xy[:n],
        probability,
        inside & (probability > 0.5),
        inside,
        filled.amplitude[:n],
        step,
        error,
        other,
        significance,
    )


def _faint(kind: Ints, seen: Bools, amplitude: Floats) -> Bools:
    """Which of the sites [n] that no find stands on are too dim for columns of their class ``kind`` (-1: none)."""
    faint = np.zeros(len(kind), dtype=bool)
    for k in np.unique(kind[seen & (kind >= 0)]):
        mine = kind == k
        faint |= mine & ~seen & (amplitude < _FAINTEST * np.median(amplitude[mine & seen]))
    return faint


def _regrown(grains: list[Grain], pool: _Pool, view: _View, first: bool) -> tuple[list[Grain], list[Floats]]:
    """The grains as the good sites show them; with the cell that the amplitudes ask for, the ``first`` time."""
    regrown, weights = [], []
    for number, grain in enumerate(grains):
        mine = np.flatnonzero(view.good & (pool.grain == number))
        if len(mine) < SMALLEST:
            continue
        reach = _SAME * grain.spacing
        at = view.xy[mine] + np.clip(view.step[mine], -reach, reach)
        new = fitted(at, np.arange(len(mine)), pool.cell[mine], pool.site[mine], grain.basis)
        if new is None:
            continue
        regrown.append(enlarged(new, at, view.amplitude[mine]) if first else new)
        weights.append(view.error[mine] ** -2.0)
    return regrown, weights


def _chosen(pool: _Pool, view: _View, xy: Floats, confidence: Floats, threshold: float) -> Candidates:
    """Sites that hold an atom, and finds elsewhere."""
    from scipy.spatial import cKDTree

    said = np.where(pool.peak >= 0, confidence[pool.peak], 0.0)
    certain = np.where(view.inside, view.probability, said)
    keep = (certain >= threshold) & (pool.framed | (pool.peak >= 0))
    scatter = np.full(len(view.xy), np.inf)
    _, sublattice = np.unique(np.stack([pool.grain, pool.site], 1), axis=0, return_inverse=True)
    sublattice = sublattice.ravel()
    for kind in range(int(sublattice.max()) + 1):
        mine = view.good & (sublattice == kind)
        if mine.any():
            scatter[mine] = _scatter(view.step[mine], view.error[mine])
    spacing = float(np.median(cKDTree(view.xy).query(view.xy, k=2)[0][:, 1]))
    between = np.zeros(len(view.other), dtype=bool)
    if view.inside.any() and len(view.other):
        between = cKDTree(view.xy[view.inside]).query(xy[view.other])[0] < 1.5 * spacing
    real = view.other[(confidence[view.other] >= threshold) & (~between | (view.significance > _PHANTOM))]
    found = _as_found(xy, confidence, real)
    # what is seen well starts where it was seen, and nothing beyond the frame
    surely = (pool.peak >= 0) & ((view.error < UNSURE_NM) | ~view.inside | ~pool.framed)
    at = np.where(surely[:, None], xy[pool.peak], view.xy)
    return Candidates(
        np.concatenate([at[keep], found.xy]),
        np.concatenate([certain[keep], found.confidence]),
        np.concatenate([pool.peak[keep], found.peak]),
        np.concatenate([sublattice[keep], found.sublattice]),
        np.concatenate([view.xy[keep], found.site]),
        np.concatenate([scatter[keep], found.scatter]),
    )


def _scatter(step: Floats, error: Floats) -> float:
    """Standard deviation per axis of a sublattice about its predicted places, beyond what the errors explain.

    From the median, so that single displaced columns do not widen it; never narrower than a fifth of the errors, which
    is about what the prediction itself, a mean over some six neighbours, is uncertain by.
    """
    own = float(np.median(error**2))
    real = float(np.median((step**2).sum(1))) / (2 * np.log(2)) - own
    return float(np.sqrt(max(real, 0.0) + own / 5))
