"""What every found atom is to its crystal: sublattice, grain, or neither; and which atoms are missing."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.types import ATOM_LABELS

from .finder import Found
from .grains import Grain, find_grains
from .lattice import LatticeHint, require_image
from .missing import AmplitudeFit, occupation
from .targets import FALSE_DISCOVERY, read_crystal, report

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

OTHER = "other"
"""Label of an atom on no site: interstitials, adatoms, atoms of no crystal."""
_SURROUNDED = 9
"""Nearest sites that say whether a site lies inside of the crystal."""
_WIDEST_GAP_DEG = 150.0
"""A site inside has no wider angle free of columns: two neighbours may be missing side by side, not three."""
_LEAST_THERE = 0.55
"""Least share of the nearest sites that hold a column."""
_TOGETHER = 0.5
"""Correlation of the dim columns with their neighbours beyond which they are regions; damage clusters reach 0.3."""


@dataclass(frozen=True)
class Sublattice:
    """Columns of one class. ``spacing`` median distance to the next of the class, ``rms`` per axis of the columns from
    where their neighbours put them ("lattice consistency"), both nm (px without a scale); ``intensity`` mean and
    ``spread`` standard deviation of the columns' integrated intensity, image units; ``vacant`` and ``depleted`` as
    reported in ``Missing``."""

    label: str
    count: int
    vacant: int
    depleted: int
    spacing: float
    rms: float
    intensity: float
    spread: float


@dataclass(frozen=True)
class GrainShape:
    """One grain: ``count`` of its columns, ``vectors`` rows a1, a2 (x, y), nm (px without a scale), ``angle_deg`` of a1
    from +x towards +y, and the ``basis`` [k, 2] in units of the vectors with its ``labels``."""

    count: int
    vectors: Floats
    angle_deg: float
    basis: Floats
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Missing:
    """Sites [n] at which something is missing, most certain first: position px, ``label`` ("A vacant", "B depleted"),
    ``confidence`` that not all is there, ``intensity`` with ``sigma`` and what is ``expected``, image units, and
    ``atom``, the index of the atom found there (-1: none)."""

    x_px: Floats
    y_px: Floats
    label: NDArray[np.str_]
    confidence: Floats
    intensity: Floats
    sigma: Floats
    expected: Floats
    atom: Ints

    def __len__(self) -> int:
        return len(self.x_px)

    def where(self, keep: Bools) -> Missing:
        """Those that ``keep`` [n] names."""
        return Missing(**{name: value[keep] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Sites:
    """``label`` [n] and ``grain`` [n] (-1: none) of every found atom, the missing ones, and the crystal's summary.

    ``note`` says why there is no lattice, or why nothing depleted is told; ``unit`` is that of lengths."""

    label: NDArray[np.str_]
    grain: Ints
    missing: Missing
    sublattices: tuple[Sublattice, ...]
    grains: tuple[GrainShape, ...]
    unit: str
    note: str | None = None


@dataclass(frozen=True)
class _Table:
    """All sites of all grains, then the atoms on none: position, grain, site of its cell (-1), atom (-1), whether in
    the frame, the departure [n, 2] of its atom from the lattice."""

    xy: Floats
    grain: Ints
    site: Ints
    atom: Ints
    framed: Bools
    departure: Floats


def name_sites(
    found: Found,
    image: NDArray[np.generic],
    pixel_size_nm: tuple[float, float] | None,
    hint: LatticeHint | None = None,
    false_discovery: float = FALSE_DISCOVERY,
) -> Sites:
    """Sublattices and missing atoms of the crystals in ``image`` [rows, cols] from the atoms found in it.

    Pixels are (x, y) nm; without a scale lengths are in px. Nothing is assumed of the material; ``hint`` names one
    whose columns are then judged as known ones (Mo, S2, S1, S0). The missing ones are the longest list of which a share
    of ``false_discovery`` is expected to be wrong. Raises BadInput for an image that is not finite and 2-D, and for a
    hint without a pixel size.
    """
    data = require_image(np.asarray(image))
    if not np.isfinite(data).all():
        raise BadInput("the image holds NaN or infinity", "give one finite 2-D channel")
    if hint is not None and pixel_size_nm is None:
        raise BadInput("a known lattice needs the pixel size, which is not known", "give the pixel size, nm")
    pixel = pixel_size_nm or (1.0, 1.0)
    unit = "nm" if pixel_size_nm else "px"
    xy = np.stack([found.x_px, found.y_px], 1) * pixel
    if hint is not None:
        return _known(data, pixel, xy, hint, false_discovery)
    grains = find_grains(xy, found.intensity)
    if not grains:
        return _none(len(xy), f"no lattice: the {len(xy)} atoms do not repeat", unit)
    return _judge(found, data, pixel, xy, grains, unit, false_discovery)


def _none(n: int, note: str, unit: str) -> Sites:
    empty = np.zeros(0)
    missing = Missing(empty, empty, np.zeros(0, "U9"), empty, empty, empty, empty, np.zeros(0, dtype=np.int64))
    return Sites(np.full(n, OTHER), np.full(n, -1), missing, (), (), unit, note)


def _judge(
    found: Found,
    image: Floats,
    pixel: tuple[float, float],
    xy: Floats,
    grains: tuple[Grain, ...],
    unit: str,
    false_discovery: float,
) -> Sites:
    sigma = np.hypot(found.sigma_x * pixel[0], found.sigma_y * pixel[1]) / np.sqrt(2)
    spacing = min(g.spacing for g in grains)
    table = _tabulate(xy, sigma, grains, (image.shape[1] * pixel[0], image.shape[0] * pixel[1]))
    blur = found.blur_nm if found.blur_nm is not None and unit == "nm" else 0.25 * spacing
    start = np.where(table.atom >= 0, found.intensity[table.atom], 0.0)
    fit = AmplitudeFit(image, pixel, table.xy, start, blur, spacing)
    kind, names = _classes(table, grains, fit.amplitude)
    usual = np.array([np.median(fit.amplitude[(kind == k) & (table.atom >= 0)]) for k in range(len(names))])
    there = (table.atom >= 0) | (fit.amplitude > 0.4 * usual[kind])
    within = ((table.xy >= blur) & (table.xy < np.array(image.shape[::-1]) * pixel - blur)).all(1)
    judged = _inside(table, there) & within & (kind >= 0)
    full = occupation(fit, kind, judged)
    there = np.where(judged, full.probability[:, 0] < 0.5, there)
    lacking = np.where(judged & _inside(table, there), 1 - full.probability[:, 2], 0.0)
    lacking = _without_regions(table.xy, np.where(judged, kind, -1), lacking)
    rows = np.array(report(lacking, false_discovery), dtype=np.int64)
    rows = rows[np.argsort(-lacking[rows], kind="stable")]
    vacant = full.probability[:, 0] >= full.probability[:, 1]
    state = np.where(vacant, "vacant", "depleted")
    missing = Missing(
        table.xy[rows, 0] / pixel[0],
        table.xy[rows, 1] / pixel[1],
        np.array([f"{names[kind[r]]} {state[r]}" for r in rows], dtype="U16"),
        lacking[rows],
        full.amplitude[rows],
        full.sigma[rows],
        full.level[rows],
        table.atom[rows],
    )
    label, grain = np.full(len(xy), OTHER, dtype="U8"), np.full(len(xy), -1)
    on = (table.atom >= 0) & (kind >= 0)
    label[table.atom[on]] = np.array(names)[kind[on]]
    grain[table.atom[on]] = table.grain[on]
    sublattices = tuple(
        _summary(name, xy, table, on & (kind == k), full.amplitude, missing) for k, name in enumerate(names)
    )
    unlike = ", ".join(names[k] for k in full.unlike)
    note = f"the columns {unlike} differ too much in brightness to tell half-empty ones" if unlike else None
    return Sites(label, grain, missing, sublattices, tuple(_shapes(grains, table, kind, names)), unit, note)


def _tabulate(xy: Floats, sigma: Floats, grains: tuple[Grain, ...], size: tuple[float, float]) -> _Table:
    """The sites of all grains and around them, at their most probable positions, and the atoms on no site."""
    from scipy.spatial import cKDTree

    atoms = cKDTree(xy)
    parts = []
    for number, grain in enumerate(grains):
        cell, site, atom = grain.around(1)
        on = atom >= 0
        error = sigma[grain.atoms]
        floor = float(np.median(error)) ** 2 + 1e-300
        at = grain.predict(cell, site, 1 / (error**2 + floor))
        departure = np.zeros_like(at)
        departure[on] = xy[grain.atoms[atom[on]]] - at[on]
        # An atom lies where it was measured as far as its sublattice scatters by more than its error.
        for k in range(len(grain.basis)):
            mine = on & (site == k)
            own = error[atom[mine]] ** 2
            real = max(float(np.median((departure[mine] ** 2).sum(1)) / (2 * np.log(2)) - np.median(own)), 0.0)
            at[mine] += departure[mine] * (real / (real + own + 1e-300))[:, None]
        near, nearest = atoms.query(at)
        taken = np.isin(nearest, grain.atoms) | (near > 0.5 * grain.spacing)
        within = ((at > -0.5 * grain.spacing) & (at < np.asarray(size) + 0.5 * grain.spacing)).all(1)
        keep = on | (taken & within)
        index = np.where(on, grain.atoms[np.maximum(atom, 0)], -1)
        parts.append((at[keep], np.full(keep.sum(), number), site[keep], index[keep], departure[keep]))
    used = np.concatenate([g.atoms for g in grains])
    rest = np.setdiff1d(np.arange(len(xy)), used)
    parts.append((xy[rest], np.full(len(rest), -1), np.full(len(rest), -1), rest, np.zeros((len(rest), 2))))
    at, of, site, index, departure = (np.concatenate(column) for column in zip(*parts, strict=True))
    framed = np.asarray(((at >= 0) & (at < size)).all(1))
    return _Table(at, of, site, index, framed, departure)


def _classes(table: _Table, grains: tuple[Grain, ...], amplitude: Floats) -> tuple[Ints, tuple[str, ...]]:
    """Class of every site (-1: atom on none) and the classes' names: A, B, C by falling brightness in the first kind
    of crystal, on through the alphabet in the next. Grains whose cells agree are one kind."""
    kind = np.full(len(table.xy), -1)
    kinds: list[tuple[Grain, int]] = []
    total = 0
    for number, grain in enumerate(grains):
        mine = table.grain == number
        occupied = mine & (table.atom >= 0)
        bright = [float(np.median(amplitude[occupied & (table.site == k)])) for k in range(len(grain.basis))]
        rank = np.argsort(np.argsort(-np.array(bright), kind="stable"), kind="stable")
        first = next((start for known, start in kinds if _same_crystal(known, grain)), None)
        if first is None:
            first, total = total, total + len(grain.basis)
            kinds.append((grain, first))
        kind[mine] = first + rank[table.site[mine]]
    return kind, tuple(_letters(k) for k in range(total))


def _letters(k: int) -> str:
    return ascii_uppercase[k] if k < 26 else _letters(k // 26 - 1) + ascii_uppercase[k % 26]


def _same_crystal(one: Grain, other: Grain) -> bool:
    """True when both cells have as many sites, and the same metric within five per cent."""
    if len(one.basis) != len(other.basis):
        return False
    a, b = one.vectors @ one.vectors.T, other.vectors @ other.vectors.T
    return bool(np.abs(a - b).max() < 0.1 * np.abs(a).max())


def _inside(table: _Table, there: Bools) -> Bools:
    """True for sites that columns surround: most of the nearest sites are there, none of the angles between them is
    wide. Off the frame the crystal goes on as it is beside it, in most of the three nearest sites."""
    from scipy.spatial import cKDTree

    inside = np.zeros(len(table.xy), dtype=bool)
    for number in range(int(table.grain.max()) + 1):
        mine = np.flatnonzero(table.grain == number)
        xy = table.xy[mine]
        count = min(_SURROUNDED + 1, len(mine))
        near = cKDTree(xy).query(xy, k=count)[1]
        framed = table.framed[mine]
        goes_on = there[mine].copy()
        if not framed.all() and framed.sum() >= 3:
            beside = cKDTree(xy[framed]).query(xy[~framed], k=3)[1]
            goes_on[~framed] = there[mine][framed][beside].sum(1) >= 2
        there_too = goes_on[near[:, 1:]]
        off = xy[near[:, 1:]] - xy[:, None]
        angle = np.where(there_too, np.arctan2(off[..., 1], off[..., 0]), np.nan)
        angle = np.sort(angle, axis=1)
        number_there = there_too.sum(1)
        gaps = np.diff(angle, axis=1)
        first, last = angle[:, 0], angle[np.arange(len(mine)), np.maximum(number_there - 1, 0)]
        around = 2 * np.pi - (last - first)
        widest = np.fmax(np.where(np.isnan(gaps), 0.0, gaps).max(1), around)
        enough = number_there >= _LEAST_THERE * (count - 1)
        inside[mine] = enough & (widest < np.radians(_WIDEST_GAP_DEG))
    return inside


def _without_regions(xy: Floats, kind: Ints, lacking: Floats) -> Floats:
    """``lacking`` with whole regions set to 0: where the dim columns of a class lie together, half of their neighbours
    as dim, they are another material (a layer), not many vacancies."""
    from scipy.spatial import cKDTree

    lacking = lacking.copy()
    for k in np.unique(kind[kind >= 0]):
        mine = np.flatnonzero(kind == k)
        if len(mine) < 3 * _SURROUNDED:
            continue
        near = cKDTree(xy[mine]).query(xy[mine], k=_SURROUNDED)[1][:, 1:]
        own = lacking[mine]
        around = own[near].mean(1)
        off = own - own.mean()
        if float(off @ (around - own.mean())) > _TOGETHER * float(off @ off):
            lacking[mine] = np.where(around > 0.4, 0.0, own)
    return lacking


def _summary(name: str, xy: Floats, table: _Table, mine: Bools, amplitude: Floats, missing: Missing) -> Sublattice:
    from scipy.spatial import cKDTree

    at = xy[table.atom[mine]]
    spacing = float(np.median(cKDTree(at).query(at, k=2)[0][:, 1])) if len(at) > 1 else float("nan")
    square = (table.departure[mine] ** 2).mean() if mine.any() else np.nan
    return Sublattice(
        label=name,
        count=int(mine.sum()),
        vacant=int((missing.label == f"{name} vacant").sum()),
        depleted=int((missing.label == f"{name} depleted").sum()),
        spacing=spacing,
        rms=float(np.sqrt(square)),
        intensity=float(amplitude[mine].mean()) if mine.any() else float("nan"),
        spread=float(amplitude[mine].std()) if mine.any() else float("nan"),
    )


def _shapes(grains: tuple[Grain, ...], table: _Table, kind: Ints, names: tuple[str, ...]) -> list[GrainShape]:
    shapes = []
    for number, grain in enumerate(grains):
        labels = [names[kind[(table.grain == number) & (table.site == k)][0]] for k in range(len(grain.basis))]
        angle = float(np.degrees(np.arctan2(grain.vectors[0, 1], grain.vectors[0, 0])))
        shapes.append(GrainShape(len(grain.atoms), grain.vectors, angle, grain.basis % 1.0, tuple(labels)))
    return shapes


def _known(image: Floats, pixel: tuple[float, float], xy: Floats, hint: LatticeHint, false_discovery: float) -> Sites:
    """The same from a known lattice: its own names, judged by the session's machinery."""
    from scipy.spatial import cKDTree

    reading = read_crystal(image, pixel, xy, hint, 0.0)
    if isinstance(reading, str):
        return _none(len(xy), reading, "nm")
    table = reading.table
    names = np.array(ATOM_LABELS)[table[:, 2].astype(int)]
    off, nearest = cKDTree(table[:, :2]).query(xy)
    on = off < 0.07
    label = np.where(on, names[nearest], OTHER)
    rows = np.array(report(table[:, 7], false_discovery), dtype=np.int64)
    rows = rows[np.argsort(-table[rows, 7], kind="stable")]
    back, atom = cKDTree(xy).query(table[rows, :2])
    full = float(reading.features["level_full"])
    missing = Missing(
        table[rows, 0] / pixel[0],
        table[rows, 1] / pixel[1],
        names[rows],
        table[rows, 7],
        table[rows, 6],
        np.full(len(rows), np.nan),
        np.full(len(rows), full),
        np.where(back < 0.07, atom, -1),
    )
    sublattices = []
    departure = xy - table[nearest, :2]
    for group in ((hint.reference,), hint.columns):
        mine = on & np.isin(label, group)
        at = xy[mine]
        sublattices.append(
            Sublattice(
                label=group[-1],
                count=int(mine.sum()),
                vacant=int((missing.label == hint.columns[0]).sum()) if len(group) > 1 else 0,
                depleted=int((missing.label == hint.columns[1]).sum()) if len(group) > 1 else 0,
                spacing=float(np.median(cKDTree(at).query(at, k=2)[0][:, 1])),
                rms=float(np.sqrt((departure[mine] ** 2).mean())),
                intensity=float(table[nearest[mine], 6].mean()),
                spread=float(table[nearest[mine], 6].std()),
            )
        )
    lattice = reading.lattice
    basis = np.stack([np.zeros(2), lattice.offset])
    names_of_basis = (hint.reference, hint.columns[2])
    shape = GrainShape(int(on.sum()), lattice.vectors_nm, float(np.degrees(lattice.angle_rad)), basis, names_of_basis)
    return Sites(label, np.where(on, 0, -1), missing, tuple(sublattices), (shape,), "nm")
