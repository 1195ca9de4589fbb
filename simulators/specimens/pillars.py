"""NiO pillars standing in (La0.7Sr0.3)MnO3: two phases that separate into columns along the beam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aecontrol.errors import BadInput
from aecontrol.types import Count, Model, NonNegative, Positive
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from ..streams import stream
from .base import SizeNm, Specimen, Vectors, assemble, tile
from .perovskites import Rotation, Thickness
from .sites import Sites, atomic_numbers, perovskite_sites
from .tilts import Steps

LSMO_A = 3.88
NIO_A = 4.177
LSMO_SITES = {"A": {"La": 0.7, "Sr": 0.3}, "B": {"Mn": 1.0}, "O": {"O": 1.0}}
NEAREST_A, NEAREST_ALIKE_A = 1.8, 2.4
"""An atom of a pillar is no closer to an atom of the matrix than this, the second where both are metal or both O. All
distances inside either phase are longer."""
ATTEMPTS = 2000
"""Random places tried for each pillar."""


class Pillars(Model):
    """Round pillars of rock-salt NiO (a = 4.177) through a film of LSMO (pc a = 3.88 angstrom), both along [001], cube
    on cube; neither is strained. ``phase`` is 1 in NiO and 0 in LSMO.

    Each in-plane cell of LSMO is NiO with the chance (1 - tanh(2 d / interface width)) / 2 at the distance d outside
    the nearest pillar's circle; NiO atoms that would touch LSMO are left out.
    """

    kind: Literal["pillars"] = "pillars"
    size_nm: SizeNm = Field((40.0, 40.0), description="field (width, height), nm")
    thickness_nm: Positive = Thickness
    rotation_deg: float = Rotation
    n_pillars: Count = Field(12, description="number of pillars, placed at random with their centres in the field")
    diameter_nm: tuple[Positive, Positive] = Field((2.0, 10.0), description="smallest and largest diameter, nm")
    gap_nm: NonNegative = Field(1.0, description="smallest distance between two pillars, nm")
    interface_width_nm: Positive = Field(0.8, description="width over which one phase gives way to the other, nm")

    @model_validator(mode="after")
    def _diameters_in_order(self) -> Pillars:
        if self.diameter_nm[0] > self.diameter_nm[1]:
            raise ValueError(f"diameter_nm = {self.diameter_nm}: give the smallest first, then the largest")
        return self

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms. Raises BadInput when the pillars
        do not fit into the field."""
        pillars = self._placed(seed)
        matrix = perovskite_sites(LSMO_A * np.eye(3), self.size_nm, self.thickness_nm, self.rotation_deg)
        oxide, oxide_numbers, oxide_column, oxide_unit = self._nio()
        is_pillar = self._cells_of_pillars(matrix, pillars, seed)
        matrix = matrix.only(~is_pillar(matrix.half // 2))
        matrix_A = matrix.at(np.asarray(0.5 * LSMO_A * matrix.half))
        flat = matrix.pc(angstrom_to_nm(1.0) * oxide[:, :2]) / LSMO_A
        kept = is_pillar(np.floor(flat + 0.25).astype(np.int64))  # a cell's sites lie at 0 and 1/2
        names = matrix.names
        kept[kept] = _clear_of(matrix_A, names == "O", oxide[kept], oxide_numbers[kept] == 8)
        draw = stream(seed, "specimen", 2).random(len(names))
        numbers = np.concatenate([atomic_numbers(names, LSMO_SITES, draw), oxide_numbers[kept]])
        return assemble(
            np.concatenate([matrix_A, oxide[kept]]),
            numbers,
            self.size_nm,
            column=np.concatenate([matrix.column, matrix.column.max(initial=-1) + 1 + oxide_column[kept]]),
            site=np.concatenate([names, np.where(oxide_numbers[kept] == 28, "Ni", "O")]),
            unit=np.concatenate([matrix.unit, matrix.unit.max(initial=-1) + 1 + oxide_unit[kept]]),
            arrays={"phase": (np.arange(len(numbers)) >= len(names)).astype(np.int64)},
            fields={
                "phase": lambda where: (_outside_nm(where, pillars) < 0.0).astype(np.int64),
                "distance_to_interface_nm": lambda where: np.abs(_outside_nm(where, pillars)),
            },
            material="oxide",
        )

    def _placed(self, seed: int) -> Vectors:
        """Centre and radius (x, y, r) of each pillar [n, 3], nm."""
        draws = stream(seed, "specimen")
        radii = 0.5 * draws.uniform(*self.diameter_nm, size=self.n_pillars)
        placed = np.empty((0, 3))
        for radius in np.sort(radii)[::-1]:  # the largest first: small ones fit between
            centers = draws.random((ATTEMPTS, 2)) * self.size_nm
            apart = np.linalg.norm(centers[:, None] - placed[:, :2], axis=2) - placed[:, 2] - radius
            free = np.flatnonzero((apart >= self.gap_nm).all(axis=1))
            if not len(free):
                raise BadInput(
                    f"{self.n_pillars} pillars of {self.diameter_nm} nm do not fit into {self.size_nm} nm: "
                    f"no room after {len(placed)}",
                    "ask for fewer or thinner pillars, a smaller gap_nm or a larger size_nm",
                )
            placed = np.vstack([placed, [*centers[free[0]], radius]])
        return placed

    def _cells_of_pillars(self, matrix: Sites, pillars: Vectors, seed: int) -> Callable[[Steps], NDArray[np.bool_]]:
        """Decides once for every in-plane cell of the matrix, and tells of cells [n, >= 2] whether they are pillar."""
        cells = matrix.half[:, :2] // 2
        low, shape = cells.min(axis=0) - 2, tuple(np.ptp(cells, axis=0) + 5)
        middle = LSMO_A * (np.moveaxis(np.indices(shape), 0, -1) + low + 0.25)
        lab = np.concatenate([middle, np.zeros((*shape, 1))], axis=-1) @ matrix.turn[:, :2] + matrix.origin[:2]
        outside = _outside_nm(angstrom_to_nm(1.0) * lab, pillars)
        chance = 0.5 * (1.0 - np.tanh(2.0 * outside / self.interface_width_nm))
        pillar = stream(seed, "specimen", 1).random(shape) < chance
        return lambda cells: pillar[tuple((cells[:, :2] - low).T)]

    def _nio(self) -> tuple[Vectors, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """NiO over the whole field: positions, atomic numbers, columns and formula units (an Ni and an O of one
        column)."""
        layers = max(1, round(nm_to_angstrom(self.thickness_nm) / NIO_A))
        x, y, z = np.indices((2, 2, 2 * layers)).reshape(3, -1)
        half = np.column_stack([x, y, z])
        positions, atom, column, _ = tile(
            NIO_A * np.eye(2), np.asarray(0.5 * NIO_A * half), 2 * x + y, self.size_nm, self.rotation_deg
        )
        numbers = np.where(half.sum(axis=1) % 2 == 0, 28, 8)
        return positions, numbers[atom], column, column * layers + z[atom] // 2


def _outside_nm(where_nm: Vectors, pillars: Vectors) -> Vectors:
    """Distance outside the nearest pillar's circle [...], negative inside, nm; without pillars a large number."""
    outside = np.full(np.shape(where_nm)[:-1], 1e6)
    for x, y, radius in pillars:
        outside = np.minimum(outside, np.hypot(where_nm[..., 0] - x, where_nm[..., 1] - y) - radius)
    return outside


def _clear_of(
    matrix_A: Vectors, matrix_is_o: NDArray[np.bool_], oxide_A: Vectors, oxide_is_o: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which NiO atoms [n] keep their distance from every atom of the matrix."""
    from scipy.spatial import cKDTree

    clear = np.ones(len(oxide_A), dtype=bool)
    for is_o in (False, True):
        distance, _ = cKDTree(matrix_A[matrix_is_o == is_o]).query(oxide_A, distance_upper_bound=NEAREST_ALIKE_A)
        clear &= distance >= np.where(oxide_is_o == is_o, NEAREST_ALIKE_A, NEAREST_A)
    return clear
