"""The garnet Li7La3Zr2O12 (LLZO): an exact framework and lithium on part of its sites."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, Positive
from aecontrol.units import nm_to_angstrom

from ..streams import stream
from .base import SizeNm, Specimen, Vectors, assemble, in_plane_turn, tile

LLZO_A = 12.9682
FRAMEWORK = {"La": (1 / 8, 0.0, 1 / 4), "Zr": (0.0, 0.0, 0.0), "O": (0.2822, 0.1006, 0.1950)}
LITHIUM_4 = (3 / 8, 0.0, 1 / 4)
"""Four O neighbours; 24 sites in a cell."""
LITHIUM_6 = (0.0972, 0.6853, 0.5769)
"""Six O neighbours, off the centre; 96 sites in a cell, in pairs. Recalled, not checked against the refinement."""
FILLED_SHARE = 56 / 120
"""Share of the Li sites that hold Li."""
NEAREST_LITHIUM_A = 2.0
"""No two Li are closer than this. The two sites of a pair are 0.8 angstrom, the two kinds 1.6 angstrom apart."""
NEXT_FOURFOLD_A = 4.2
"""Just above the distance, 3.97 angstrom, between fourfold sites that share a pair of sixfold sites."""


class Llzo(Model):
    """Cubic LLZO (Ia-3d, a = 12.9682 angstrom) along [001]: 24 La, 16 Zr, 96 O and on average 56 Li in a cell.

    Li fills a random choice of sites such that no two are too close; sites left empty are not listed. A bond unit is
    one eighth of a cell, the volume of one formula unit.
    """

    kind: Literal["llzo"] = "llzo"
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    thickness_nm: Positive = Field(10.0, description="height along the beam, rounded to whole cells of 1.297 nm, nm")
    rotation_deg: float = Field(0.0, description="in-plane turn of the crystal from +x towards +y, degrees")

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms."""
        fractions, numbers = _cell()
        layers = max(1, round(nm_to_angstrom(self.thickness_nm) / LLZO_A))
        basis = (fractions[None] + np.arange(layers)[:, None, None] * (0.0, 0.0, 1.0)).reshape(-1, 3)
        octant = np.floor(2.0 * basis).astype(np.int64) @ (1, 2, 4)
        columns = np.unique(np.round(basis[:, :2], 4), axis=0, return_inverse=True)[1].reshape(-1)
        positions, atom, column, cell = tile(
            LLZO_A * np.eye(2), LLZO_A * basis, columns, self.size_nm, self.rotation_deg
        )
        kept = _occupied(positions, numbers[atom % len(numbers)], atom % len(numbers), seed)
        unit = (cell * (octant.max() + 1) + octant[atom])[kept]
        return assemble(
            positions[kept],
            numbers[atom[kept] % len(numbers)],
            self.size_nm,
            column=column[kept],
            unit=np.unique(unit, return_inverse=True)[1],
            fields={"grain": lambda where: np.zeros(np.shape(where)[:-1], dtype=np.int64)},
            material="llzo",
            period_A=LLZO_A * in_plane_turn(self.rotation_deg),
        )


@cache
def _cell() -> tuple[Vectors, NDArray[np.int64]]:
    """Fractional coordinates [256, 3] and atomic numbers [256]: 24 fourfold, 96 sixfold Li, framework."""
    from ase.spacegroup import crystal

    sites = [("Li", LITHIUM_4), ("Li", LITHIUM_6), *FRAMEWORK.items()]
    cells = [crystal([symbol], [site], spacegroup=230, cellpar=[LLZO_A] * 3 + [90] * 3) for symbol, site in sites]
    fractions = np.concatenate([cell.positions / LLZO_A for cell in cells]) % 1.0
    return fractions, np.concatenate([cell.numbers for cell in cells])


def _occupied(
    positions_A: Vectors, numbers: NDArray[np.int64], basis: NDArray[np.int64], seed: int
) -> NDArray[np.bool_]:
    """Which sites [n] hold an atom: the whole framework, and Li as :class:`Llzo` says.

    7 Li for 8 sites of either kind leave little choice: fourfold sites are filled in random order as long as none has
    a filled neighbour, then sixfold sites likewise, and what is too much is taken from the sixfold ones.
    """
    from scipy.spatial import cKDTree

    lithium = np.flatnonzero(numbers == 3)
    fourfold = basis[lithium] < 24
    tree = cKDTree(positions_A[lithium])
    close = tree.query_pairs(NEAREST_LITHIUM_A, output_type="ndarray")
    tree = cKDTree(positions_A[lithium[fourfold]])
    neighbours = np.flatnonzero(fourfold)[tree.query_pairs(NEXT_FOURFOLD_A, output_type="ndarray")]
    rank = stream(seed, "specimen").random(len(lithium)) + fourfold
    filled = _in_turn(rank, np.concatenate([close, neighbours]))
    wanted = round(FILLED_SHARE * len(lithium))
    spare = np.flatnonzero(filled)[np.argsort(-rank[filled])][wanted:]
    filled[spare] = False
    occupied = np.asarray(numbers != 3)
    occupied[lithium[filled]] = True
    return occupied


def _in_turn(rank: Vectors, pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Sites filled when each in turn, highest ``rank`` [n] first, is filled unless one it is paired with is.

    Luby's algorithm: every open site that outranks all its open partners is filled at once, until none is open.
    """
    both = np.concatenate([pairs, pairs[:, ::-1]])
    filled = np.zeros(len(rank), dtype=bool)
    open_ = np.ones(len(rank), dtype=bool)
    while open_.any():
        both = both[open_[both].all(axis=1)]
        best = np.full(len(rank), -1.0)
        np.maximum.at(best, both[:, 0], rank[both[:, 1]])
        won = open_ & (rank > best)
        filled |= won
        open_ &= ~won
        open_[both[won[both[:, 0]], 1]] = False
    return filled
