"""Two-dimensional crystals with seeded defects: monolayer MoS2, WS2, hexagonal BN and graphene."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Count, Model, Positive
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from ..elements import NUMBERS
from ..streams import stream
from .base import FieldLabel, Fraction, SizeNm, Specimen, Vectors, assemble, tile
from .grains import Edge, TiltBoundary, two_grains
from .honeycomb import (
    GRAPHENE_A,
    HEXAGONAL,
    HONEYCOMB,
    Indices,
    bonds_of,
    closing,
    cut,
    neighbours,
    relax,
    rings,
    turn,
    within,
)

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

Rotation = Field(7.0, description="in-plane turn of the lattice from +x towards +y, degrees")
SULPHUR = NUMBERS["S"]
HBN_A = 2.504
SUBSTITUTES = {"nitrogen": NUMBERS["N"], "silicon": NUMBERS["Si"]}
ATOMS_OF_FOUR_HEXAGONS = 16
"""The rings that a divacancy or a turned bond changes are the four that its two atoms belong to."""
HEXAGONS_A = 2.9
"""Reach from an atom of graphene that takes in the three hexagons it belongs to, angstrom."""
GIVES_WAY_A = 8.0
"""Atoms this close to a reconstructed defect relax, angstrom."""


class SulphurVacancies(Model):
    """Missing S atoms: a uniform background and Gaussian clusters, each S atom drawn independently, and lines."""

    background_fraction: Fraction = Field(0.002, description="chance that an S atom is missing anywhere")
    n_clusters: Count = Field(8, description="number of clusters, placed uniformly over the field")
    cluster_sigma_nm: Positive = Field(2.0, description="standard deviation of a cluster, nm")
    peak_fraction: Fraction = Field(0.25, description="added chance at a cluster's centre (the sum is capped at 1)")
    n_lines: Count = Field(0, description="lines of missing S atoms of one layer, each along a zigzag direction")
    line_length_nm: Positive = Field(3.0, description="length of a line, nm")
    layer: Literal["both", "top", "bottom"] = Field(
        "both", description="which S of a column goes first: either, the one where the beam enters, the one below"
    )


class Antisites(Model):
    """Atoms in each other's place."""

    metal_on_s2_fraction: Fraction = Field(0.0, description="chance that a metal atom replaces both S of a full column")
    s2_on_metal_fraction: Fraction = Field(0.0, description="chance that two S atoms replace a metal atom")


class _Dichalcogenide(Model):
    """A 1H monolayer of a metal and S, seen along its three-fold axis.

    Its defects: 'vacancy', 'line' (a vacancy on a line) and, e.g., 'Mo_S2' and 'S2_Mo' (Mo in the place of two S and
    the reverse).
    """

    metal: ClassVar[str]
    lattice_A: ClassVar[float]
    height_A: ClassVar[float]

    kind: str
    size_nm: SizeNm = Field((50.0, 50.0), description="field (width, height), nm")
    rotation_deg: float = Rotation
    vacancies: SulphurVacancies = SulphurVacancies()
    antisites: Antisites = Antisites()

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms."""
        from ase.build import mx2

        cell = mx2(f"{self.metal}S2", "2H", a=self.lattice_A, thickness=self.height_A)  # type: ignore[no-untyped-call]
        positions, basis, column, _ = tile(
            cell.cell.array[:2, :2], cell.positions, np.array([0, 1, 1]), self.size_nm, self.rotation_deg
        )
        numbers = cell.numbers[basis]
        layers = _layers(positions, numbers, column)
        missing = stream(seed, "specimen").random(len(numbers)) < self._missing_chance(positions, seed)
        missing &= numbers == SULPHUR
        line, gone = self._lines(positions, layers, seed)
        missing[gone] = True
        if self.vacancies.layer != "both":
            first, second = layers if self.vacancies.layer == "top" else layers[::-1]
            other = (first >= 0) & missing[second] & ~missing[first]
            missing[first[other]], missing[second[other]] = True, False
        of_line = missing & (line[column] >= 0)
        perfect = assemble(
            positions,
            numbers,
            self.size_nm,
            column=column,
            defect=np.where(of_line, "line", np.where(missing, "vacancy", "")),
            defect_id=np.where(of_line, len(line) + line[column], np.where(missing, column, -1)),
            missing=missing,
            material=f"{self.metal.lower()}s2",
        )
        return perfect if self.antisites == Antisites() else self._with_antisites(perfect, layers, seed)

    def _missing_chance(self, positions: Vectors, seed: int) -> Vectors:
        clusters = stream(seed, "specimen", 1).random((self.vacancies.n_clusters, 2)) * self.size_nm
        where = angstrom_to_nm(1.0) * positions[:, :2]
        chance = np.full(len(positions), self.vacancies.background_fraction)
        for center in clusters:
            squared = np.sum((where - center) ** 2, axis=1) / self.vacancies.cluster_sigma_nm**2
            chance += self.vacancies.peak_fraction * np.exp(-0.5 * squared)
        return np.asarray(np.minimum(chance, 1.0))

    def _lines(self, positions: Vectors, layers: Indices, seed: int) -> tuple[Indices, Indices]:
        """Which line each column [n_columns] is on (-1: none), and the S atoms that the lines lack."""
        from scipy.spatial import cKDTree

        random, n = stream(seed, "specimen", 2), self.vacancies.n_lines
        start = nm_to_angstrom(1.0) * random.random((n, 2)) * self.size_nm
        angle = np.radians(self.rotation_deg + 60.0 * random.integers(6, size=n))
        side = random.integers(2, size=n)
        if self.vacancies.layer != "both":
            side[:] = self.vacancies.layer == "bottom"
        columns = np.flatnonzero(layers[0] >= 0)
        sulphur = cKDTree(positions[layers[0, columns], :2])
        steps = np.arange(1 + int(nm_to_angstrom(self.vacancies.line_length_nm) / self.lattice_A))
        along = self.lattice_A * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        sites = sulphur.data[sulphur.query(start)[1]][:, None, :] + steps[:, None] * along[:, None, :]
        off, nearest = sulphur.query(sites.reshape(-1, 2))
        on = off < 0.1  # lines may run out of the sheet
        which = np.repeat(np.arange(n), len(steps))[on]
        line = np.full(layers.shape[1], -1)
        line[columns[nearest[on]]] = which
        return line, layers[side[which], columns[nearest[on]]]

    def _with_antisites(self, perfect: Specimen, layers: Indices, seed: int) -> Specimen:
        draws = stream(seed, "specimen", 3).random(len(perfect))
        metal = np.flatnonzero((perfect.site == self.metal) & (draws < self.antisites.s2_on_metal_fraction))
        top, bottom = layers[:, layers[0] >= 0]
        full = perfect.alive[top] & perfect.alive[bottom] & (draws[top] < self.antisites.metal_on_s2_fraction)
        top, bottom = top[full], bottom[full]
        positions, numbers = perfect.positions_A.copy(), perfect.atomic_numbers.copy()
        defect, defect_id = perfect.defect.astype("<U8"), perfect.defect_id.copy()
        numbers[top], positions[top, 2], defect[top] = NUMBERS[self.metal], 0.5 * self.height_A, f"{self.metal}_S2"
        numbers[metal], positions[metal, 2], defect[metal] = SULPHUR, 0.0, f"S2_{self.metal}"
        changed = np.concatenate([top, metal])
        defect_id[changed] = perfect.column_id[changed]
        rows = np.concatenate([np.delete(np.arange(len(perfect)), bottom), metal])  # a metal's second S comes last
        positions = positions[rows]
        positions[len(rows) - len(metal) :, 2] = self.height_A
        return assemble(
            positions,
            numbers[rows],
            self.size_nm,
            column=perfect.column_id[rows],
            defect=defect[rows],
            defect_id=defect_id[rows],
            missing=~perfect.alive[rows],
            material=perfect.material,
        )


def _layers(positions: Vectors, numbers: Indices, column: Indices) -> Indices:
    """The S atom [2, n_columns] of each column where the beam enters, and the other; -1 for a column of metal."""
    sulphur = np.flatnonzero(numbers == SULPHUR)
    lower = (positions[sulphur, 2] > 1.0).astype(int)
    layers = np.full((2, int(column.max()) + 1), -1)
    layers[lower, column[sulphur]] = sulphur
    return layers


class Mos2(_Dichalcogenide):
    """Monolayer 1H MoS2, a = 3.16 angstrom, S-S 3.13 angstrom, seen along its three-fold axis."""

    metal: ClassVar[str] = "Mo"
    lattice_A: ClassVar[float] = 3.16
    height_A: ClassVar[float] = 3.13

    kind: Literal["mos2"] = "mos2"


class Ws2(_Dichalcogenide):
    """Monolayer 1H WS2, a = 3.153 angstrom, S-S 3.14 angstrom, seen along its three-fold axis."""

    metal: ClassVar[str] = "W"
    lattice_A: ClassVar[float] = 3.153
    height_A: ClassVar[float] = 3.14

    kind: Literal["ws2"] = "ws2"


class Hbn(Model):
    """Monolayer hexagonal BN, a = 2.504 angstrom, with missing atoms; the lattice is not relaxed."""

    kind: Literal["hbn"] = "hbn"
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    rotation_deg: float = Rotation
    boron_vacancy_fraction: Fraction = Field(0.001, description="chance that a B atom is missing")
    nitrogen_vacancy_fraction: Fraction = Field(0.0005, description="chance that an N atom is missing")

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms."""
        positions, basis, column, _ = tile(
            HBN_A * HEXAGONAL, HBN_A * HONEYCOMB, np.array([0, 1]), self.size_nm, self.rotation_deg
        )
        chance = np.array([self.boron_vacancy_fraction, self.nitrogen_vacancy_fraction])[basis]
        missing = stream(seed, "specimen").random(len(basis)) < chance
        return assemble(
            positions,
            np.array([NUMBERS["B"], NUMBERS["N"]])[basis],
            self.size_nm,
            column=column,
            defect=np.where(missing, "vacancy", ""),
            defect_id=np.where(missing, column, -1),
            material="hbn",
        )


class Hole(Model):
    """A round hole."""

    radius_nm: Positive = Field(description="radius, nm")
    center_nm: tuple[float, float] | None = Field(None, description="centre (x, y), nm; default: the field's centre")


class Graphene(Model):
    """Monolayer graphene, a = 2.46 angstrom, with point defects, and, on demand, a grain boundary, a hole or an edge.

    Defects: 'vacancy', 'divacancy', 'nitrogen', 'silicon' and 'stone-wales' as drawn; '5-8-5' (atoms round a closed
    divacancy), 'boundary' (rings other than hexagons) and 'edge' (atoms short of a bond to a vacuum). No two on one
    atom. Only Stone-Wales defects, closed divacancies and boundaries are relaxed, and only in the plane. ``arrays``:
    'ring', see :func:`.honeycomb.rings`.
    """

    kind: Literal["graphene"] = "graphene"
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    rotation_deg: float = Rotation
    monovacancy_fraction: Fraction = Field(0.001, description="monovacancies per C site")
    divacancy_fraction: Fraction = Field(0.0005, description="divacancies (two neighbours missing) per C site")
    nitrogen_fraction: Fraction = Field(0.002, description="share of C sites that hold N")
    silicon_fraction: Fraction = Field(0.0005, description="share of C sites that hold Si")
    stone_wales_fraction: Fraction = Field(0.0, description="Stone-Wales defects (a bond turned by 90 deg) per C site")
    reconstruct: bool = Field(False, description="true: divacancies close to rings of 5, 8 and 5 atoms")
    boundary: TiltBoundary | None = Field(None, description="a tilt grain boundary")
    hole: Hole | None = Field(None, description="a round hole")
    edge: Edge | None = Field(None, description="a straight edge with vacuum beyond")

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms. Raises BadInput if none is left."""
        flat, bonds, defect = self._sheet()
        drawn = self._seeds_of_defects(len(flat), seed)
        defect_id = np.select([defect == "boundary", defect == "edge"], [len(drawn), len(drawn) + 1], -1)
        closed, turned = self._place(flat, drawn, defect, defect_id)
        gone = np.isin(defect, ("vacancy", "divacancy"))
        table = neighbours(bonds, len(flat))
        middles = flat[np.concatenate([closed, turned])].mean(axis=1)
        flat, bonds = turn(flat, bonds, table, turned)
        bonds = np.concatenate([bonds[~gone[bonds].any(axis=1)], closing(table, closed)])
        flat = relax(flat, bonds, ~gone & within(flat, middles, GIVES_WAY_A))
        numbers = np.full(len(flat), NUMBERS["C"])
        for kind, number in SUBSTITUTES.items():
            numbers[defect == kind] = number
        return assemble(
            np.column_stack([flat, np.zeros(len(flat))]),
            numbers,
            self.size_nm,
            site=np.full(len(flat), "C"),
            defect=defect,
            defect_id=defect_id,
            arrays={"ring": rings(flat, bonds)},
            fields=self._fields(),
            material="graphene",
        )

    def _sheet(self) -> tuple[Vectors, Indices, NDArray[np.str_]]:
        """Positions, bonds and defect names of the sheet before point defects, its vacuum cut away."""
        if self.boundary is None:
            lattice, sites = GRAPHENE_A * HEXAGONAL, GRAPHENE_A * HONEYCOMB
            flat = tile(lattice, sites, np.array([0, 1]), self.size_nm, self.rotation_deg)[0][:, :2]
        else:
            second_deg = self.rotation_deg + self.boundary.misorientation_deg
            flat = two_grains(self.size_nm, (self.rotation_deg, second_deg), self.boundary)
        bonds = bonds_of(flat)
        defect = np.full(len(flat), "", dtype="<U11")
        if self.boundary is not None:
            off = np.abs(self.boundary.distance_nm(angstrom_to_nm(1.0) * flat, self.size_nm))
            near = np.flatnonzero(off < 2.0)  # the boundary's rings are all closer
            ring = rings(flat[near], bonds_of(flat[near]))
            defect[near[(ring > 0) & (ring != 6)]] = "boundary"
        gone, rim = cut(bonds, self._vacuum(angstrom_to_nm(1.0) * flat))
        defect[rim] = "edge"
        if gone.all():
            raise BadInput("the hole or the edge leaves no atom of graphene", "make the hole smaller or move the edge")
        renumbered = np.cumsum(~gone) - 1
        return flat[~gone], renumbered[bonds[~gone[bonds].any(axis=1)]], defect[~gone]

    def _vacuum(self, flat_nm: Vectors) -> NDArray[np.bool_]:
        outside = np.zeros(len(flat_nm), dtype=bool)
        if self.edge is not None:
            outside |= self.edge.distance_nm(flat_nm, self.size_nm) > 0
        if self.hole is not None:
            center = 0.5 * np.asarray(self.size_nm) if self.hole.center_nm is None else self.hole.center_nm
            outside |= np.sum((flat_nm - center) ** 2, axis=1) < self.hole.radius_nm**2
        return outside

    def _fields(self) -> dict[str, FieldLabel]:
        if self.boundary is None:
            return {}
        distance = partial(self.boundary.distance_nm, size_nm=self.size_nm)
        return {
            "grain": lambda at: (distance(at) >= 0).astype(np.int64),
            "distance_to_boundary_nm": lambda at: np.abs(distance(at)),
        }

    def _seeds_of_defects(self, n: int, seed: int) -> list[tuple[str, int, float]]:
        """(kind, site, a uniform number that picks the neighbour), each kind drawn from its own stream."""
        fractions = {
            "divacancy": self.divacancy_fraction,
            "vacancy": self.monovacancy_fraction,
            "silicon": self.silicon_fraction,
            "nitrogen": self.nitrogen_fraction,
            "stone-wales": self.stone_wales_fraction,
        }
        found: list[tuple[str, int, float]] = []
        for step, (kind, fraction) in enumerate(fractions.items()):
            draws = stream(seed, "specimen", step).random((n, 2))
            found += [(kind, int(i), float(draws[i, 1])) for i in np.flatnonzero(draws[:, 0] < fraction)]
        return found

    def _place(
        self, flat: Vectors, drawn: list[tuple[str, int, float]], defect: NDArray[np.str_], defect_id: Indices
    ) -> tuple[Indices, Indices]:
        """Name and number the atoms of each defect in place; the pairs [k, 2] to close up and [l, 2] to turn."""
        from scipy.spatial import cKDTree

        tree = cKDTree(flat)
        closed, turned = [], []
        for order, (kind, atom, choice) in enumerate(drawn):
            pair = [atom, _neighbour(tree, atom, choice)] if kind in ("divacancy", "stone-wales") else [atom]
            rebuilt = kind == "stone-wales" or (kind == "divacancy" and self.reconstruct)
            taken = sorted(set().union(*tree.query_ball_point(flat[pair], HEXAGONS_A))) if rebuilt else pair
            if (defect_id[taken] >= 0).any() or (rebuilt and len(taken) != ATOMS_OF_FOUR_HEXAGONS):
                continue  # never two defects on one site, and nothing rebuilt at the margin's end
            defect[taken], defect_id[taken] = "stone-wales" if kind == "stone-wales" else "5-8-5", order
            if kind == "stone-wales":
                turned.append(pair)
                continue
            defect[pair] = kind
            if rebuilt:
                closed.append(pair)
        return np.array(closed, dtype=np.int64).reshape(-1, 2), np.array(turned, dtype=np.int64).reshape(-1, 2)


def _neighbour(tree: cKDTree, atom: int, choice: float) -> int:
    """One of the three nearest sites of ``atom``, picked by ``choice`` in [0, 1)."""
    near = np.sort(tree.query(tree.data[atom], k=min(12, tree.n))[1])
    distance = np.sum((tree.data[near] - tree.data[atom]) ** 2, axis=1)
    return int(near[np.argsort(distance, kind="stable")[1 + int(3 * choice)]])
