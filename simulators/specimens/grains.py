"""A tilt grain boundary in graphene, built from hexagon centres so that every atom keeps three bonds.

The centres of the rings form a triangular lattice whose triangles are the atoms. Two turned lattices of centres are
cut along the line, joined and evened out; the triangles of the joined net (Delaunay) are the atoms, and the number of
neighbours of a centre is the size of its ring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field

from aecontrol.types import Model
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from .base import MARGIN_NM, SizeNm, Vectors, tile
from .honeycomb import GRAPHENE_A, HEXAGONAL, HONEYCOMB, Indices, gather, relax

Distance = Callable[[Vectors], Vectors]
HEXAGON = 2 * HONEYCOMB[1:]
"""The centre of a hexagon: as far from the second site of the cell as that is from the first."""
MERGED_A = 0.66 * GRAPHENE_A
"""Ring centres of the two grains closer than this become one."""
EVENED_A, RELAXED_A, REBUILT_A, STRIP_A = 9.0, 10.0, 14.0, 22.0
"""Distances from the line within which ring centres move, atoms move, atoms come from triangles, centres are used."""
BEYOND_NM = 2.0
"""The strip is built this far beyond the field, so that its ragged ends are cut off."""


class Line(Model):
    """A straight line across the field."""

    direction_deg: float = Field(90.0, description="direction of the line, from +x towards +y, degrees")
    offset_nm: float = Field(0.0, description="distance of the line from the field's centre, to the right of it, nm")

    def distance_nm(self, positions_nm: Vectors, size_nm: SizeNm) -> Vectors:
        """Distance [...] of ``positions_nm`` [..., 2] from the line, nm; above 0 on its right.

        Right of someone who looks along the line on the screen, where +y is down: +y for a line along +x.
        """
        angle = math.radians(self.direction_deg)
        normal = np.array([-math.sin(angle), math.cos(angle)])
        return np.asarray((positions_nm - 0.5 * np.asarray(size_nm)) @ normal - self.offset_nm)


class TiltBoundary(Line):
    """Two grains that meet along a straight line, nearly always in rings of five and seven atoms."""

    misorientation_deg: Annotated[float, Field(gt=0, lt=60)] = Field(
        21.8, description="turn of the grain on the right of the line against the other, from +x towards +y, degrees"
    )


class Edge(Line):
    """A straight edge: vacuum on the right of the line."""


def two_grains(size_nm: SizeNm, rotations_deg: tuple[float, float], line: Line) -> Vectors:
    """Atoms [n, 2], angstrom, of two grains over the field and its margin, joined along ``line``, the second right."""
    from scipy.spatial import cKDTree

    def distance(flat_A: Vectors) -> Vectors:
        return nm_to_angstrom(1.0) * line.distance_nm(angstrom_to_nm(1.0) * flat_A, size_nm)

    wide_nm = (size_nm[0] + 2 * BEYOND_NM, size_nm[1] + 2 * BEYOND_NM)
    lattice = GRAPHENE_A * HEXAGONAL
    atoms, centres = [], []
    for grain, rotation_deg in enumerate(rotations_deg):
        flat = tile(lattice, GRAPHENE_A * HONEYCOMB, np.array([0, 1]), size_nm, rotation_deg)[0][:, :2]
        atoms.append(flat[(distance(flat) >= 0) == bool(grain)])
        centre = tile(lattice, GRAPHENE_A * HEXAGON, np.array([0]), wide_nm, rotation_deg)[0][:, :2] - nm_to_angstrom(
            BEYOND_NM
        )
        off = distance(centre)
        centres.append(centre[(np.abs(off) < STRIP_A) & ((off >= 0) == bool(grain))])
    perfect = np.concatenate(atoms)
    joined = np.concatenate(centres)
    if len(joined) < 3:
        return perfect  # the line passes the field by
    strip = _atoms_between(_evened(_merged(joined), distance), distance)
    half = nm_to_angstrom(0.5) * np.asarray(size_nm)
    inside = np.all(np.abs(strip - half) <= half + nm_to_angstrom(MARGIN_NM), axis=1)
    strip = strip[inside & (np.abs(distance(strip)) < REBUILT_A)]
    kept = np.abs(distance(perfect)) >= REBUILT_A - 0.5
    perfect = perfect[kept]
    if not len(strip):
        return perfect
    twice = cKDTree(strip).query(perfect, distance_upper_bound=0.5)[0] < 0.5  # the seam, where both are the lattice
    return np.concatenate([perfect[~twice], strip])


def _merged(centres: Vectors) -> Vectors:
    from scipy.spatial import cKDTree

    close = cKDTree(centres).query_pairs(MERGED_A, output_type="ndarray")
    centres[close[:, 0]] = 0.5 * (centres[close[:, 0]] + centres[close[:, 1]])
    return np.delete(centres, close[:, 1], axis=0)


def _evened(centres: Vectors, distance: Distance) -> Vectors:
    """Ring centres after springs of the lattice constant along the edges of their triangles evened them out."""
    from scipy.spatial import Delaunay

    near = np.abs(distance(centres)) < EVENED_A
    for _ in range(12):
        corners = Delaunay(centres).simplices
        ends = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
        step = centres[ends[:, 1]] - centres[ends[:, 0]]
        length = np.linalg.norm(step, axis=1)
        whole = length < 1.7 * GRAPHENE_A  # not along the ragged ends
        pull = np.where(whole, 0.075 * (1.0 - GRAPHENE_A / length), 0.0)[:, None] * step  # each edge counts twice
        force = gather(ends[:, 0], pull, len(centres)) - gather(ends[:, 1], pull, len(centres))
        centres = centres + near[:, None] * force
    return centres


def _atoms_between(centres: Vectors, distance: Distance) -> Vectors:
    """An atom in each triangle of ring centres, bonded to those in the three triangles that share an edge."""
    from scipy.spatial import Delaunay

    net = Delaunay(centres)
    atoms = centres[net.simplices].mean(axis=1)
    own, side = np.nonzero(net.neighbors > np.arange(len(atoms))[:, None])
    bonds: Indices = np.column_stack([own, net.neighbors[own, side]]).astype(np.int64)
    whole = (net.neighbors >= 0).all(axis=1)
    return relax(atoms, bonds, whole & (np.abs(distance(atoms)) < RELAXED_A))
