"""Specimens with ground truth: monolayer MoS2 and graphene with seeded point defects.

Positions are angstrom inside this package; the field is [0, w] x [0, h] and the lattice goes on for a margin beyond it,
so that no artificial vacuum touches the field. Every lattice site is listed, occupied or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Count, Model, Positive
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from .streams import stream

MARGIN_NM = 1.0
"""How far the lattice goes on beyond the field, nm."""
THERMAL_RMS_A = {6: 0.06, 7: 0.06, 14: 0.07, 16: 0.07, 42: 0.06}
"""Root-mean-square thermal displacement per axis near 300 K by atomic number, angstrom (assumed, not measured)."""
TARGET_KINDS = ("atom", "vacancy")
SYMBOLS = {6: "C", 7: "N", 14: "Si", 16: "S", 42: "Mo"}

Fraction = Annotated[float, Field(ge=0, le=1)]
SizeNm = tuple[Positive, Positive]
Vectors = NDArray[np.float64]
Rotation = Field(7.0, description="in-plane turn of the lattice from +x towards +y, degrees")


@dataclass(frozen=True)
class Specimen:
    """Lattice sites and what sits on them; all arrays share the first axis ``n``.

    ``positions_A`` [n, 3] float64 (x, y, z; z along the beam); ``atomic_numbers`` [n]; ``alive`` [n] bool, False where
    the atom is missing; ``column_id`` [n], equal for atoms on one projected site; ``site`` [n] names the sublattice
    ('Mo', 'S', 'C'); ``rms_u_A`` [n] thermal displacement; ``defect`` [n] names the defect a site belonged to when
    built ('' for none); ``defect_id`` [n] numbers it (-1 for none). ``size_nm`` is the field.
    """

    positions_A: Vectors
    atomic_numbers: NDArray[np.int64]
    alive: NDArray[np.bool_]
    column_id: NDArray[np.int64]
    site: NDArray[np.str_]
    rms_u_A: Vectors
    defect: NDArray[np.str_]
    defect_id: NDArray[np.int64]
    size_nm: tuple[float, float]

    def __len__(self) -> int:
        return len(self.positions_A)

    def targets(self, kind: str) -> tuple[Vectors, tuple[str, ...]]:
        """Target objects inside the field: positions [n, 2] (x, y) in nm and their labels.

        'atom': every column with an atom left, labelled 'Mo', 'S2', 'S1', 'C' or the dopant's symbol. 'vacancy': every
        S column short of an S, labelled by what is left, 'S1' or 'S0', or every vacant C site, 'V1' or (one of a
        divacancy) 'V2'. Raises BadInput for another kind.
        """
        if kind not in TARGET_KINDS:
            raise BadInput(f"this specimen has no target objects of kind {kind!r}", "ask for 'atom' or 'vacancy'")
        _, first, inverse = np.unique(self.column_id, return_index=True, return_inverse=True)
        left = np.bincount(inverse, weights=self.alive).astype(int)
        full = np.bincount(inverse)
        chosen = left < full if kind == "vacancy" else left > 0
        where = angstrom_to_nm(1.0) * self.positions_A[first, :2]
        chosen &= np.all((where >= 0.0) & (where < np.asarray(self.size_nm)), axis=1)
        index = np.flatnonzero(chosen)
        labels = tuple(self._column_label(first[i], int(left[i]), int(full[i])) for i in index)
        return where[index], labels

    def _column_label(self, atom: int, left: int, full: int) -> str:
        if self.site[atom] == "S":
            return f"S{left}"
        if left < full:
            return "V2" if self.defect[atom] == "divacancy" else "V1"
        return SYMBOLS[int(self.atomic_numbers[atom])]

    def changed(self, alive: NDArray[np.bool_], positions_A: Vectors) -> Specimen:
        """The same specimen after damage."""
        return replace(self, alive=alive.copy(), positions_A=positions_A.copy())


class SulphurVacancies(Model):
    """Missing S atoms: a uniform background and Gaussian clusters; each S atom is drawn independently."""

    background_fraction: Fraction = Field(0.002, description="chance that an S atom is missing anywhere")
    n_clusters: Count = Field(8, description="number of clusters, placed uniformly over the field")
    cluster_sigma_nm: Positive = Field(2.0, description="standard deviation of a cluster, nm")
    peak_fraction: Fraction = Field(0.25, description="added chance at a cluster's centre (the sum is capped at 1)")


class Mos2(Model):
    """Monolayer 1H MoS2, a = 3.16 angstrom, S-S 3.13 angstrom, seen along its three-fold axis."""

    kind: Literal["mos2"] = "mos2"
    size_nm: SizeNm = Field((50.0, 50.0), description="field (width, height), nm")
    rotation_deg: float = Rotation
    vacancies: SulphurVacancies = SulphurVacancies()

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms."""
        from ase.build import mx2

        cell = mx2("MoS2", "2H", a=3.16, thickness=3.13)  # type: ignore[no-untyped-call]  # ASE is partly typed
        positions, basis, column = _tile(
            cell.cell.array[:2, :2], cell.positions, np.array([0, 1, 1]), self.size_nm, self.rotation_deg
        )
        numbers = cell.numbers[basis]
        is_sulphur = numbers == 16
        missing = is_sulphur & (stream(seed, "specimen").random(len(numbers)) < self._missing_chance(positions, seed))
        return _specimen(
            positions,
            numbers,
            column,
            np.where(is_sulphur, "S", "Mo"),
            np.where(missing, "vacancy", ""),
            np.where(missing, column, -1),
            self.size_nm,
        )

    def _missing_chance(self, positions: Vectors, seed: int) -> Vectors:
        clusters = stream(seed, "specimen", 1).random((self.vacancies.n_clusters, 2)) * self.size_nm
        where = angstrom_to_nm(1.0) * positions[:, :2]
        chance = np.full(len(positions), self.vacancies.background_fraction)
        for center in clusters:
            squared = np.sum((where - center) ** 2, axis=1) / self.vacancies.cluster_sigma_nm**2
            chance += self.vacancies.peak_fraction * np.exp(-0.5 * squared)
        return np.asarray(np.minimum(chance, 1.0))


class Graphene(Model):
    """Monolayer graphene, a = 2.46 angstrom, with vacancies and substituted atoms; the lattice is not relaxed."""

    kind: Literal["graphene"] = "graphene"
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    rotation_deg: float = Rotation
    monovacancy_fraction: Fraction = Field(0.001, description="monovacancies per C site")
    divacancy_fraction: Fraction = Field(0.0005, description="divacancies (two neighbours missing) per C site")
    nitrogen_fraction: Fraction = Field(0.002, description="share of C sites that hold N")
    silicon_fraction: Fraction = Field(0.0005, description="share of C sites that hold Si")

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms."""
        from ase.build import graphene

        cell = graphene("C2", a=2.46)  # type: ignore[no-untyped-call]  # ASE is partly typed
        positions, _, column = _tile(
            cell.cell.array[:2, :2], cell.positions, np.array([0, 1]), self.size_nm, self.rotation_deg
        )
        numbers = np.full(len(positions), 6)
        defect = np.full(len(positions), "", dtype="<U10")
        defect_id = np.full(len(positions), -1)
        for order, site in enumerate(self._seeds_of_defects(len(positions), seed)):
            kind, atom, choice = site
            taken = [atom, _neighbour(positions, atom, choice)] if kind == "divacancy" else [atom]
            if (defect_id[taken] >= 0).any():
                continue  # never two defects on one site
            defect[taken], defect_id[taken] = kind, order
            numbers[taken] = {"nitrogen": 7, "silicon": 14}.get(kind, 6)
        return _specimen(positions, numbers, column, np.full(len(positions), "C"), defect, defect_id, self.size_nm)

    def _seeds_of_defects(self, n: int, seed: int) -> list[tuple[str, int, float]]:
        """(kind, site, a uniform number that picks the neighbour), each kind drawn from its own stream."""
        fractions = {
            "divacancy": self.divacancy_fraction,
            "vacancy": self.monovacancy_fraction,
            "silicon": self.silicon_fraction,
            "nitrogen": self.nitrogen_fraction,
        }
        found: list[tuple[str, int, float]] = []
        for step, (kind, fraction) in enumerate(fractions.items()):
            draws = stream(seed, "specimen", step).random((n, 2))
            found += [(kind, int(i), float(draws[i, 1])) for i in np.flatnonzero(draws[:, 0] < fraction)]
        return found


def _tile(
    vectors: Vectors, basis: Vectors, column_of: NDArray[np.int64], size_nm: SizeNm, rotation_deg: float
) -> tuple[Vectors, NDArray[np.int64], NDArray[np.int64]]:
    """Repeat a cell over the field and its margin: positions [n, 3], basis index [n], column number [n].

    ``vectors`` [2, 2] in-plane cell vectors, ``basis`` [m, 3]; ``column_of`` [m] says which basis atoms share a column.
    """
    c, s = math.cos(math.radians(rotation_deg)), math.sin(math.radians(rotation_deg))
    turn = np.array([[c, s], [-s, c]])  # row vectors: (x, y) @ turn turns +x towards +y
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
    return positions, atom, np.unique(numbered, return_inverse=True)[1]


def _neighbour(positions: Vectors, atom: int, choice: float) -> int:
    """One of the three nearest sites of ``atom``, picked by ``choice`` in [0, 1)."""
    distance = np.sum((positions - positions[atom]) ** 2, axis=1)
    return int(np.argsort(distance, kind="stable")[1 + int(3 * choice)])


def _specimen(
    positions: Vectors,
    numbers: NDArray[np.int64],
    column: NDArray[np.int64],
    site: NDArray[np.str_],
    defect: NDArray[np.str_],
    defect_id: NDArray[np.int64],
    size_nm: SizeNm,
) -> Specimen:
    thermal = np.zeros(max(THERMAL_RMS_A) + 1)
    for number, rms in THERMAL_RMS_A.items():
        thermal[number] = rms
    return Specimen(
        positions_A=np.asarray(positions, dtype=np.float64),
        atomic_numbers=numbers.astype(np.int64),
        alive=~np.isin(defect, ("vacancy", "divacancy")),
        column_id=column.astype(np.int64),
        site=site,
        rms_u_A=thermal[numbers],
        defect=defect,
        defect_id=defect_id.astype(np.int64),
        size_nm=size_nm,
    )
