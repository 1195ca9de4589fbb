"""What a specimen is: atoms that know what they are, and fields that know what is where.

Positions are angstrom inside this package; the field is [0, w] x [0, h] nm and the material goes on for a margin beyond
it, so that no artificial vacuum touches the field. Every lattice site is listed, occupied or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Positive
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from ..elements import SYMBOLS, check_numbers, thermal_rms_A

MARGIN_NM = 1.0
"""How far the material goes on beyond the field, nm."""
TARGET_KINDS = ("atom", "vacancy")
MAX_ATOMS = 20_000_000
SINGLE_LAYER_NM = 0.7
"""Up to this height a specimen is a sheet; see :meth:`Specimen.targets`."""

Fraction = Annotated[float, Field(ge=0, le=1)]
SizeNm = tuple[Positive, Positive]
Vectors = NDArray[np.float64]
FieldLabel = Callable[[Vectors], NDArray[np.generic]]


@dataclass(frozen=True)
class Specimen:
    """Lattice sites and what sits on them; all arrays share the first axis ``n``.

    ``positions_A`` [n, 3] float64 (x, y, z; z along the beam, which goes towards +z); ``atomic_numbers`` [n];
    ``alive`` [n] bool, False where the atom is missing; ``column_id`` [n], equal for atoms on one projected site;
    ``site`` [n] names the sublattice ('Mo', 'S', 'C', 'A', 'B', 'O'); ``rms_u_A`` [n] thermal displacement per axis;
    ``defect`` [n] names the defect a site belonged to when built ('' for none); ``defect_id`` [n] numbers it (-1 for
    none); ``unit`` [n], equal for the atoms that radiolysis breaks together. ``size_nm`` is the field.

    ``arrays``: further labels per atom, name -> [n, ...] (e.g. 'polarisation_nm' [n, 2], 'tilt_deg' [n, 3],
    'domain', 'phase', 'ring'); NaN or -1 where a label does not apply. ``fields``: labels of places, name -> function
    of positions [..., 2] nm. ``material`` names the class of material (for damage presets). ``zone_axis``: columns
    are seen end on. ``period_A`` [2, 2]: two perpendicular vectors in the plane with which the perfect lattice repeats
    (None: it does not). ``target_sites``: the sites whose columns are targets (empty: all).
    """

    positions_A: Vectors
    atomic_numbers: NDArray[np.int64]
    alive: NDArray[np.bool_]
    column_id: NDArray[np.int64]
    site: NDArray[np.str_]
    rms_u_A: Vectors
    defect: NDArray[np.str_]
    defect_id: NDArray[np.int64]
    unit: NDArray[np.int64]
    size_nm: tuple[float, float]
    arrays: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    fields: Mapping[str, FieldLabel] = field(default_factory=dict)
    material: str = ""
    zone_axis: bool = True
    period_A: Vectors | None = None
    target_sites: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.positions_A)

    @property
    def elements(self) -> tuple[str, ...]:
        """Symbols of the elements that it holds, lightest first."""
        return tuple(SYMBOLS[int(number)] for number in np.unique(self.atomic_numbers))

    @property
    def thickness_nm(self) -> float:
        """Height of the whole specimen along the beam, nm."""
        return angstrom_to_nm(float(np.ptp(self.positions_A[:, 2]))) if len(self) else 0.0

    def labels(self, positions_nm: Vectors) -> dict[str, NDArray[np.generic]]:
        """Every field label at ``positions_nm`` [..., 2]."""
        return {name: label(np.asarray(positions_nm, dtype=np.float64)) for name, label in self.fields.items()}

    def targets(self, kind: str) -> tuple[Vectors, tuple[str, ...]]:
        """Target objects inside the field: positions [n, 2] (x, y) in nm and their labels.

        'atom': every column with an atom left; 'vacancy': every column short of an atom. A column of several like
        atoms is labelled by its sublattice and what is left of it ('S2', 'S1', 'S0'), any other by its (heaviest)
        element ('Mo', 'C', 'Pt'); a vacant single site is 'V1', or (one of a divacancy) 'V2'. Raises BadInput for
        another kind.
        """
        if kind not in TARGET_KINDS:
            raise BadInput(f"this specimen has no target objects of kind {kind!r}", "ask for 'atom' or 'vacancy'")
        wanted = np.isin(self.site, self.target_sites) | (not self.target_sites)
        atoms = np.flatnonzero(np.isin(self.column_id, self.column_id[wanted]))
        order = atoms[np.lexsort((-self.atomic_numbers[atoms], self.column_id[atoms]))]  # a column's heaviest speaks
        _, start, inverse = np.unique(self.column_id[order], return_index=True, return_inverse=True)
        left = np.bincount(inverse, weights=self.alive[order]).astype(int)
        full = np.bincount(inverse)
        first = order[start]
        chosen = left < full if kind == "vacancy" else left > 0
        # a column is where its living atoms are on average, or its sites where none is left
        weight = np.where(self.alive[order] | (left == 0)[inverse], 1.0, 0.0)
        total = np.bincount(inverse, weights=weight)
        flat = self.positions_A[order, :2]
        where = np.stack([np.bincount(inverse, weights=weight * flat[:, axis]) / total for axis in (0, 1)], axis=1)
        where *= angstrom_to_nm(1.0)
        chosen &= np.all((where >= 0.0) & (where < np.asarray(self.size_nm)), axis=1)
        index = np.flatnonzero(chosen)
        sheet = self.thickness_nm <= SINGLE_LAYER_NM
        labels = tuple(self._column_label(first[i], int(left[i]), int(full[i]), sheet) for i in index)
        return where[index], labels

    def _column_label(self, atom: int, left: int, full: int, sheet: bool) -> str:
        if full > 1 and sheet:
            return f"{self.site[atom]}{left}"
        if left == 0:
            return "V2" if self.defect[atom] == "divacancy" else "V1"
        symbol = SYMBOLS[int(self.atomic_numbers[atom])]
        return symbol if left == full else f"{symbol}-{full - left}"

    def changed(self, alive: NDArray[np.bool_], positions_A: Vectors) -> Specimen:
        """The same specimen after damage."""
        return replace(self, alive=alive.copy(), positions_A=positions_A.copy())


def assemble(
    positions_A: Vectors,
    numbers: NDArray[np.int64],
    size_nm: SizeNm,
    *,
    column: NDArray[np.int64] | None = None,
    site: NDArray[np.str_] | None = None,
    defect: NDArray[np.str_] | None = None,
    defect_id: NDArray[np.int64] | None = None,
    unit: NDArray[np.int64] | None = None,
    missing: NDArray[np.bool_] | None = None,
    arrays: Mapping[str, NDArray[np.generic]] | None = None,
    fields: Mapping[str, FieldLabel] | None = None,
    material: str = "",
    zone_axis: bool = True,
    period_A: Vectors | None = None,
    target_sites: tuple[str, ...] = (),
) -> Specimen:
    """A specimen with defaults filled in: every atom its own column and bond unit, its symbol its site, no defects.

    ``missing`` marks the vacant sites; by default those whose ``defect`` is 'vacancy' or 'divacancy'. Raises BadInput
    for unknown elements, positions that are not finite, arrays of another length and more than MAX_ATOMS atoms.
    """
    positions_A = np.ascontiguousarray(positions_A, dtype=np.float64)
    numbers = np.asarray(numbers, dtype=np.int64)
    n = len(numbers)
    if positions_A.shape != (n, 3) or not np.isfinite(positions_A).all():
        raise BadInput(f"atom positions have the shape {positions_A.shape} or are not finite", f"give [{n}, 3] numbers")
    if n > MAX_ATOMS:
        raise BadInput(f"{n} atoms are more than {MAX_ATOMS}", "make the field or the thickness smaller")
    check_numbers(numbers)
    own = np.arange(n)
    if site is None:
        names = np.array([SYMBOLS.get(number, "") for number in range(int(numbers.max(initial=0)) + 1)])
        site = names[numbers]
    if defect is None:
        defect = np.full(n, "", dtype="<U10")
    specimen = Specimen(
        positions_A=positions_A,
        atomic_numbers=numbers,
        alive=~(np.isin(defect, ("vacancy", "divacancy")) if missing is None else missing),
        column_id=np.asarray(own if column is None else column, dtype=np.int64),
        site=np.asarray(site),
        rms_u_A=thermal_rms_A(numbers),
        defect=np.asarray(defect),
        defect_id=np.asarray(np.full(n, -1) if defect_id is None else defect_id, dtype=np.int64),
        unit=np.asarray(own if unit is None else unit, dtype=np.int64),
        size_nm=size_nm,
        arrays=dict(arrays or {}),
        fields=dict(fields or {}),
        material=material,
        zone_axis=zone_axis,
        period_A=period_A,
        target_sites=target_sites,
    )
    per_atom = ("alive", "column_id", "site", "defect", "defect_id", "unit")
    wrong = [name for name in per_atom if len(getattr(specimen, name)) != n]
    wrong += [name for name, values in specimen.arrays.items() if len(values) != n]
    if wrong:
        raise BadInput(f"{', '.join(wrong)}: not one entry for each of {n} atoms")
    return specimen


def in_plane_turn(rotation_deg: float) -> Vectors:
    """[2, 2] matrix that turns row vectors from +x towards +y: (x, y) @ turn."""
    c, s = math.cos(math.radians(rotation_deg)), math.sin(math.radians(rotation_deg))
    return np.array([[c, s], [-s, c]])


def tile(
    vectors: Vectors, basis: Vectors, column_of: NDArray[np.int64], size_nm: SizeNm, rotation_deg: float
) -> tuple[Vectors, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Repeat a cell over the field and its margin, one lattice point at the field's centre.

    ``vectors`` [2, 2] in-plane cell vectors and ``basis`` [m, 3], angstrom, turned by ``rotation_deg`` from +x towards
    +y; ``column_of`` [m] says which basis atoms share a column. Returns positions [n, 3] (heights from 0), basis index
    [n], column number [n] and in-plane cell number [n]. For a thick crystal stack the basis along z first. Raises
    BadInput when that is more than MAX_ATOMS.
    """
    expected = np.prod(np.asarray(size_nm) + 2 * MARGIN_NM) * 100.0 / abs(np.linalg.det(vectors)) * len(basis)
    if expected > 1.5 * MAX_ATOMS:
        raise BadInput(f"about {expected:.3g} atoms are more than {MAX_ATOMS}", "make the field or thickness smaller")
    turn = in_plane_turn(rotation_deg)
    turned = vectors @ turn
    half = nm_to_angstrom(1.0) * (0.5 * np.asarray(size_nm) + MARGIN_NM)
    corners = half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    reach = np.ceil(np.abs(corners @ np.linalg.inv(turned)).max(axis=0)).astype(int) + 1
    cells = np.mgrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1].reshape(2, -1).T
    flat = (cells @ turned)[:, None, :] + (basis[:, :2] @ turn)[None, :, :]
    inside = np.all(np.abs(flat) <= half, axis=2)
    cell, atom = np.nonzero(inside)
    center = nm_to_angstrom(0.5) * np.asarray(size_nm)
    heights = basis[atom, 2] - basis[:, 2].min()
    positions = np.column_stack([flat[inside] + center, heights])
    numbered = cell * (column_of.max() + 1) + column_of[atom]
    return positions, atom, np.unique(numbered, return_inverse=True)[1], cell
