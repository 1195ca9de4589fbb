"""Any crystal that ASE can read from a file, laid over the field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Model
from aecontrol.units import nm_to_angstrom

from ..elements import check_numbers
from .base import SizeNm, Specimen, Vectors, assemble, tile

if TYPE_CHECKING:
    from ase import Atoms

ONE_COLUMN_A = 0.3
"""Atoms closer than this, seen along the beam, share a column."""
UPRIGHT_DEG = 1.0
LEAST_VOLUME_A3 = 1e-3


class Structure(Model):
    """A crystal from a file: its cell vectors a and b in the plane, a along +x before the turn, c along the beam."""

    kind: Literal["structure"] = "structure"
    path: str = Field(description="file in any format that ASE reads (CIF, POSCAR, extended XYZ, ...)")
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    rotation_deg: float = Field(0.0, description="in-plane turn of the lattice from +x towards +y, degrees")
    thickness_nm: Annotated[float, Field(gt=0, le=200)] | None = Field(
        None, description="the cell is repeated along the beam until at least this thick, nm; null: one cell"
    )

    def build(self, seed: int) -> Specimen:
        """The crystal; it holds nothing random, so every ``seed`` gives the same atoms.

        Raises BadInput for a file that is missing, that ASE cannot read or that holds no atoms, no cell, an element
        without data, a position that is not finite or a c axis more than UPRIGHT_DEG from the normal of a and b.
        """
        atoms = self._read()
        cell, basis = _upright(atoms.cell.array, atoms.positions, self.path)
        basis, column = _columns(basis, cell)
        layers = (
            1 if self.thickness_nm is None else math.ceil(nm_to_angstrom(self.thickness_nm) / abs(cell[2, 2]) - 1e-6)
        )
        stack = (basis + np.arange(layers)[:, None, None] * cell[2]).reshape(-1, 3)
        positions, index, column, _ = tile(
            cell[:2, :2], stack, np.tile(column, layers), self.size_nm, self.rotation_deg
        )
        return assemble(
            positions,
            atoms.numbers[index % len(atoms)],
            self.size_nm,
            column=column,
            material="structure",
        )

    def _read(self) -> Atoms:
        from ase.io import read

        if not Path(self.path).is_file():
            raise BadInput(f"structure file {self.path} is not there", "give a path from the current folder")
        try:
            atoms = cast("Atoms", read(self.path, index=-1))
        except Exception as error:  # each format of ASE fails in its own way
            raise BadInput(f"ASE cannot read {self.path}: {error!r}", "give a crystal structure") from error
        if not len(atoms):
            raise BadInput(f"{self.path} holds no atoms", "give a crystal structure")
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
            raise BadInput(f"{self.path} holds a position or a cell that is not finite", "correct the file")
        if abs(atoms.cell.volume) < LEAST_VOLUME_A3:
            raise BadInput(f"{self.path} has no cell, or one of no volume", "add three cell vectors to the file")
        check_numbers(atoms.numbers)
        return atoms


def _upright(cell: Vectors, positions: Vectors, path: str) -> tuple[Vectors, Vectors]:
    """Cell vectors and positions turned so that a is along x and b in the plane. Raises BadInput if c leans."""
    normal = np.cross(cell[0], cell[1])
    x, z = cell[0] / np.linalg.norm(cell[0]), normal / np.linalg.norm(normal)
    turn = np.array([x, np.cross(z, x), z]).T
    turned = cell @ turn
    leaning_deg = math.degrees(math.acos(min(1.0, abs(turned[2, 2]) / float(np.linalg.norm(turned[2])))))
    if leaning_deg > UPRIGHT_DEG:
        raise BadInput(
            f"the c axis of {path} leans {leaning_deg:.3g} degrees from the normal of a and b, over {UPRIGHT_DEG:g}",
            "give a cell whose c axis is normal to the other two, for instance a supercell along a zone axis",
        )
    return turned, positions @ turn


def _columns(basis: Vectors, cell: Vectors) -> tuple[Vectors, NDArray[np.int64]]:
    """The column [m] of each atom of a cell, and the atoms moved by a and b so that no column is torn apart."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    n, plane = len(basis), cell[:2, :2]
    parts = basis[:, :2] @ np.linalg.inv(plane)
    parts -= np.floor(parts)
    cells = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 1, 2)
    images = ((parts + cells) @ plane).reshape(-1, 2)
    close = cKDTree(images).query_pairs(ONE_COLUMN_A, output_type="ndarray") % n
    links = coo_array((np.ones(len(close)), close.T), shape=(n, n))
    column = connected_components(links, directed=False)[1].astype(np.int64)
    first = np.unique(column, return_index=True)[1]
    parts -= np.round(parts - parts[first[column]])
    return np.column_stack([parts @ plane, basis[:, 2]]), column
