"""The sites of a perovskite seen along a zone axis, shared by every crystal built on them.

Every site is named by its *half index*: coordinates in half pseudo-cubic (pc) cells, all even for B, all odd for A, one
odd for O. A crystal is then one function from half index to place, and its labels are read off that same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aecontrol.units import nm_to_angstrom

from ..elements import number_of
from .base import SizeNm, Vectors, tile
from .tilts import ARMS, Steps, apply_glazer, fit_tilts

Place = Callable[[Steps], Vectors]
"""From half indices [n, 3] to positions [n, 3] in the pc frame, angstrom, (0, 0, 0) at the origin."""
Zone = Literal["001", "110"]


@dataclass(frozen=True)
class _View:
    """How a zone axis looks, all in half indices: ``across`` two in-plane repeats, ``along`` one repeat down the beam,
    ``cells`` the formula units between two repeats; ``frame`` rows are the directions of +x, +y and the beam."""

    across: Steps
    along: Steps
    cells: Steps
    frame: Vectors

    @property
    def projection(self) -> Steps:
        """[3, 2] integer map that is equal for sites of one column."""
        steps = self.frame[:2] / np.abs(self.frame[:2]).max(axis=1, keepdims=True)
        return np.asarray(np.rint(steps).astype(np.int64).T)


VIEWS: Mapping[str, _View] = {
    "001": _View(np.array([[2, 0, 0], [0, 2, 0]]), np.array([0, 0, 2]), np.array([[0, 0, 0]]), np.eye(3)),
    # x along [1-10], y along [001]: the third axis of a right-handed frame is then -[110]
    "110": _View(
        np.array([[2, -2, 0], [0, 0, 2]]),
        np.array([-2, -2, 0]),
        np.array([[0, 0, 0], [0, -2, 0]]),
        np.array([[1, -1, 0], [0, 0, np.sqrt(2)], [-1, -1, 0]]) / np.sqrt(2),
    ),
}
FORMULA_UNIT: Steps = np.array([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


@dataclass(frozen=True)
class Sites:
    """The sites of a tiled perovskite: ``half`` index [n, 3], ``column`` and formula ``unit`` number [n]; a pc position
    p lies at ``p @ turn + origin`` in the specimen, angstrom."""

    half: Steps
    column: NDArray[np.int64]
    unit: NDArray[np.int64]
    turn: Vectors
    origin: Vectors

    @property
    def names(self) -> NDArray[np.str_]:
        """Sublattice of each site, 'A', 'B' or 'O' [n]."""
        return np.asarray(np.array(["B", "O", "", "A"])[(self.half % 2).sum(axis=1)])

    def at(self, place_A: Vectors) -> Vectors:
        """Specimen positions of pc positions [n, 3], angstrom."""
        return np.asarray(place_A @ self.turn + self.origin)

    def pc(self, positions_nm: Vectors) -> Vectors:
        """Pc positions [..., 3], angstrom, of places [..., 2] nm of the field, at the height of the origin."""
        flat = nm_to_angstrom(1.0) * positions_nm - self.origin[:2]
        return np.asarray(flat @ self.turn[:, :2].T)

    def only(self, keep: NDArray[np.bool_]) -> Sites:
        """The sites for which ``keep`` [n] is True."""
        return replace(self, half=self.half[keep], column=self.column[keep], unit=self.unit[keep])


def perovskite_sites(
    axes_A: Vectors, size_nm: SizeNm, thickness_nm: float, rotation_deg: float, zone: Zone = "001"
) -> Sites:
    """Sites of a perovskite with the pc lattice vectors ``axes_A`` [3, 3] (rows, pc frame), seen along ``zone``.

    Whole formula units are stacked along the beam, at least one repeat; the origin, a B site, is at the field's
    centre. Raises BadInput when that is more than MAX_ATOMS.
    """
    view = VIEWS[zone]
    flat = 0.5 * axes_A @ view.frame.T  # half index -> unturned specimen axes
    repeat = view.along @ flat
    layers = max(1, round(nm_to_angstrom(thickness_nm) / float(repeat[2])))
    stack = np.arange(layers)[:, None] * view.along
    half = (view.cells[:, None, :] + FORMULA_UNIT).reshape(-1, 3)
    half = (half[:, None, :] + stack).reshape(-1, 3)
    positions, _, _, _ = tile((view.across @ flat)[:, :2], half @ flat, np.zeros(len(half), int), size_nm, rotation_deg)
    c, s = np.cos(np.radians(rotation_deg)), np.sin(np.radians(rotation_deg))
    turn = view.frame.T @ np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])
    origin = np.append(nm_to_angstrom(0.5) * np.asarray(size_nm), -(half @ flat)[:, 2].min())
    found = np.rint(2.0 * (positions - origin) @ turn.T @ np.linalg.inv(axes_A)).astype(np.int64)
    return Sites(found, _numbered(found @ view.projection), _numbered(found >> 1), turn, origin)


def _numbered(rows: Steps) -> NDArray[np.int64]:
    """Number the different rows of small integers from 0 [n]."""
    low = rows.min(axis=0)
    key = np.ravel_multi_index(tuple((rows - low).T), tuple(rows.max(axis=0) - low + 1))
    seen = np.zeros(key.max() + 1, dtype=bool)
    seen[key] = True
    return np.asarray((np.cumsum(seen) - 1)[key])


def atomic_numbers(
    names: NDArray[np.str_], elements: Mapping[str, Mapping[str, float]], draw: Vectors
) -> NDArray[np.int64]:
    """Atomic numbers [n]: each sublattice of ``elements`` is filled with the given shares, decided by ``draw`` [n] in
    [0, 1)."""
    numbers = np.zeros(len(names), dtype=np.int64)
    for site, shares in elements.items():
        here = names == site
        chosen = np.searchsorted(np.cumsum(list(shares.values()))[:-1], draw[here], side="right")
        numbers[here] = np.array([number_of(symbol) for symbol in shares])[chosen]
    return numbers


def tilt_labels(half: Steps, names: NDArray[np.str_], place: Place) -> Vectors:
    """Tilts [n, 3], degrees about the pc axes, of the octahedron round each B atom; NaN for other sites.

    Complete octahedra are fitted, also where the specimen's edge or a vacancy has taken an O.
    """
    labels = np.full((len(half), 3), np.nan)
    centre = half[names == "B"]
    oxygen = place((centre[:, None, :] + ARMS).reshape(-1, 3)).reshape(-1, 6, 3)
    labels[names == "B"] = fit_tilts(oxygen - place(centre)[:, None, :])
    return labels


@dataclass(frozen=True)
class Tilted:
    """A :data:`Place` by Glazer's rule: ``straight`` places the untilted crystal, ``rotations`` gives the rotation
    vectors [n, 3], rad, of the octahedra at the half indices of B sites [n, 3]. Only O atoms move."""

    straight: Place
    rotations: Callable[[Steps], Vectors]

    def __call__(self, half: Steps) -> Vectors:
        """Positions [n, 3]."""
        positions = self.straight(half)
        oxygen = (half % 2).sum(axis=1) == 1
        positions[oxygen] += self._moved(half[oxygen])[0]
        return positions

    def mismatch_A(self, half: Steps) -> Vectors:
        """How far the two octahedra disagree about each O [n], angstrom; NaN for other sites."""
        oxygen = (half % 2).sum(axis=1) == 1
        mismatch = np.full(len(half), np.nan)
        mismatch[oxygen] = self._moved(half[oxygen])[1]
        return mismatch

    def _moved(self, oxygen: Steps) -> tuple[Vectors, Vectors]:
        towards = oxygen % 2  # the odd coordinate leads to the two B atoms
        sides = (oxygen - towards, oxygen + towards)
        here = self.straight(oxygen)
        arms = np.stack([here - self.straight(side) for side in sides], axis=1)
        return apply_glazer(arms, np.stack([self.rotations(side) for side in sides], axis=1))
