"""Two-dimensional crystals: monolayer MoS2 and graphene with seeded point defects."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from aecontrol.types import Count, Model, Positive
from aecontrol.units import angstrom_to_nm

from ..streams import stream
from .base import Fraction, SizeNm, Specimen, Vectors, assemble, tile

Rotation = Field(7.0, description="in-plane turn of the lattice from +x towards +y, degrees")


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
        positions, basis, column, _ = tile(
            cell.cell.array[:2, :2], cell.positions, np.array([0, 1, 1]), self.size_nm, self.rotation_deg
        )
        numbers = cell.numbers[basis]
        is_sulphur = numbers == 16
        missing = is_sulphur & (stream(seed, "specimen").random(len(numbers)) < self._missing_chance(positions, seed))
        return assemble(
            positions,
            numbers,
            self.size_nm,
            column=column,
            defect=np.where(missing, "vacancy", ""),
            defect_id=np.where(missing, column, -1),
            material="mos2",
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
        positions, _, column, _ = tile(
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
        return assemble(
            positions,
            numbers,
            self.size_nm,
            column=column,
            site=np.full(len(positions), "C"),
            defect=defect,
            defect_id=defect_id,
            material="graphene",
        )

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


def _neighbour(positions: Vectors, atom: int, choice: float) -> int:
    """One of the three nearest sites of ``atom``, picked by ``choice`` in [0, 1)."""
    distance = np.sum((positions - positions[atom]) ** 2, axis=1)
    return int(np.argsort(distance, kind="stable")[1 + int(3 * choice)])
