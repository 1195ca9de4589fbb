"""Small cubic crystals: cut to a shape, turned at random or with a low-index axis along the beam."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..elements import NUMBERS
from .base import Vectors

Material = Literal["Au", "Pt", "CeO2"]
Shape = Literal["truncated_octahedron", "octahedron", "sphere"]
LATTICE_A = {"Au": 4.078, "Pt": 3.924, "CeO2": 5.411}
METAL = {"Au": "Au", "Pt": "Pt", "CeO2": "Ce"}
CUT_100 = {"truncated_octahedron": 1.15, "octahedron": math.sqrt(3.0)}
"""Distance of the {100} facets from the centre over that of the {111}; 1.15 (assumed) is near that of fcc metals."""
FCC = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]])
OXYGEN = np.array(list(itertools.product((-1, 1), repeat=3)))
"""Sites of a face-centred cell, and steps from a metal atom of fluorite to its O, in quarters of a lattice constant."""
AXES = np.array([axis for axis in itertools.product((-1, 0, 1), repeat=3) if any(axis)])
"""All directions <100>, <110> and <111>."""


def crystallite(
    material: Material, shape: Shape, diameter_A: float, random: np.random.Generator
) -> tuple[NDArray[np.int64], Vectors, NDArray[np.int64]]:
    """A crystal as large as a ball of ``diameter_A``, its centre at random in the cell, its axes along the cubic ones.

    Returns the sites [n, 3] in quarters of the lattice constant, positions [n, 3] from the centre (angstrom) and
    atomic numbers [n]. In CeO2 the shape is cut from the metal; an O stays that has three of its four Ce, so that
    {111} facets end with O.
    """
    reach = math.ceil(0.75 * diameter_A / LATTICE_A[material]) + 1  # the tip of an octahedron is at 0.73 diameters
    steps = 4 * np.arange(-reach, reach + 1)
    corners = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    metal = (corners + FCC).reshape(-1, 3)
    quarter_A, centre = 0.25 * LATTICE_A[material], 4.0 * random.random(3)
    metal = metal[_inside(quarter_A * (metal - centre), shape, diameter_A)]
    oxygen = metal[:0]
    if material == "CeO2":
        oxygen, bonded = np.unique((metal[:, None, :] + OXYGEN).reshape(-1, 3), axis=0, return_counts=True)
        oxygen = oxygen[bonded >= 3]
    sites = np.concatenate([metal, oxygen])
    numbers = np.repeat([NUMBERS[METAL[material]], NUMBERS["O"]], [len(metal), len(oxygen)])
    return sites, quarter_A * (sites - centre), numbers


def _inside(positions: Vectors, shape: Shape, diameter_A: float) -> NDArray[np.bool_]:
    if shape == "sphere":
        return np.asarray(np.linalg.norm(positions, axis=1) <= 0.5 * diameter_A)
    cut = CUT_100[shape]
    volume = 4.0 * math.sqrt(3.0) - 4.0 * (math.sqrt(3.0) - cut) ** 3  # for {111} facets at 1: octahedron less six tips
    facet = (math.pi / 6.0 * diameter_A**3 / volume) ** (1.0 / 3.0)
    far = np.abs(positions)
    return np.asarray((far.sum(axis=1) <= math.sqrt(3.0) * facet) & (far.max(axis=1) <= cut * facet))


def random_turn(random: np.random.Generator) -> Vectors:
    """A rotation matrix [3, 3], every orientation equally likely (a uniform unit quaternion)."""
    w, x, y, z = _unit(random.standard_normal(4))
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def zone_turn(mistilt_deg: float, random: np.random.Generator) -> Vectors:
    """A rotation matrix [3, 3] that brings <100>, <110> or <111> (equally likely) to ``mistilt_deg`` from the beam.

    The direction of the tilt and the turn about the axis are random.
    """
    axis = _unit([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]][random.integers(3)])
    side = _unit(np.cross([1.0, -1.0, 0.0], axis))
    upright = np.array([side, np.cross(axis, side), axis])
    about, towards = random.uniform(0.0, 2.0 * math.pi, size=2)
    tilt = _about_z(towards) @ _about_x(math.radians(mistilt_deg)) @ _about_z(-towards)
    return np.asarray(tilt @ _about_z(about) @ upright)


def nearest_axis(turn: Vectors) -> tuple[NDArray[np.int64], float]:
    """The low-index direction nearest to the beam in a crystal turned by ``turn`` [3, 3], and its angle, degrees."""
    cosines = (AXES / np.linalg.norm(AXES, axis=1)[:, None]) @ turn[2]
    best = int(np.argmax(cosines))
    return AXES[best], math.degrees(math.acos(min(1.0, float(cosines[best]))))


def columns(sites: NDArray[np.int64], axis: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number [n] of the column along ``axis`` [3] that each of ``sites`` [n, 3] is in: equal where the line is."""
    return np.asarray(np.unique(np.cross(sites, axis), axis=0, return_inverse=True)[1].reshape(-1))


def _unit(vector: object) -> Vectors:
    array = np.asarray(vector, dtype=np.float64)
    return np.asarray(array / np.linalg.norm(array))


def _about_x(angle: float) -> Vectors:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


def _about_z(angle: float) -> Vectors:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
