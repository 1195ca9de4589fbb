"""Ferroelectric perovskites along [001] with domains: stripes between walls, or one polar vortex."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aecontrol.types import Model, Positive
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from .base import SizeNm, Specimen, Vectors, assemble
from .perovskites import Rotation, Thickness
from .sites import atomic_numbers, perovskite_sites


@dataclass(frozen=True)
class _Polar:
    """A polar crystal: ``cell_A`` pc edges; ``variant`` the direction of the B shift in one domain, a unit vector with
    the beam along z; ``b_shift_A`` and, per B shift, ``o_shift`` of the O whose axis is (x, y, z), all against A."""

    elements: Mapping[str, Mapping[str, float]]
    cell_A: tuple[float, float, float]
    variant: Vectors
    b_shift_A: float
    o_shift: tuple[float, float, float]


CRYSTALS: Mapping[str, _Polar] = {
    # P4mm with z(Ti) = 0.5377, z(O1) = 0.1118, z(O2) = 0.6174 along the polar axis, here y
    "PbTiO3": _Polar(
        {"A": {"Pb": 1.0}, "B": {"Ti": 1.0}, "O": {"O": 1.0}},
        (3.904, 4.152, 3.904),
        np.array([0.0, 1.0, 0.0]),
        0.0377 * 4.152,
        (0.1174 / 0.0377, 0.1118 / 0.0377, 0.1174 / 0.0377),
    ),
    "BiFeO3": _Polar(
        {"A": {"Bi": 1.0}, "B": {"Fe": 1.0}, "O": {"O": 1.0}},
        (3.96, 3.96, 3.96),
        np.ones(3) / np.sqrt(3),
        0.25,
        (0.0, 0.0, 0.0),
    ),
}


@dataclass(frozen=True)
class _Walls:
    """Parallel neutral walls: the ``flipped`` components change sign across them; unit ``normal``."""

    flipped: NDArray[np.bool_]
    normal: Vectors


WALLS: Mapping[tuple[str, str], _Walls] = {
    ("PbTiO3", "stripes_180"): _Walls(np.array([False, True, False]), np.array([1.0, 0.0, 0.0])),
    ("BiFeO3", "stripes_180"): _Walls(np.array([True, True, True]), np.array([1.0, -1.0, 0.0]) / np.sqrt(2)),
    ("BiFeO3", "stripes_109"): _Walls(np.array([False, True, True]), np.array([1.0, 0.0, 0.0])),
    ("BiFeO3", "stripes_71"): _Walls(np.array([False, True, False]), np.array([1.0, 0.0, 1.0]) / np.sqrt(2)),
}
"""71 degree walls lie on {101}, 45 degrees from the beam, so that they look as wide as the crystal is thick."""


class Ferroelectric(Model):
    """PbTiO3 (P4mm, c along y) or BiFeO3 (pc cell, B shift along <111>, no octahedral tilts), along [001].

    ``polarisation_nm`` is the shift of B from the centre of its A sites, as HAADF shows it, in the image plane. (In
    PbTiO3 the O atoms shift further the same way, so that the dipole points against it.) Stripes: the components that
    differ between the domains follow tanh(distance / w) through every wall, one of which crosses the field's centre.
    Vortex: the in-plane shift turns once round the field's centre and falls to zero there as tanh(r / w). The lattice
    stays that of one domain: strain is not relaxed.
    """

    kind: Literal["ferroelectric"] = "ferroelectric"
    crystal: Literal["PbTiO3", "BiFeO3"] = Field("BiFeO3", description="which crystal")
    pattern: Literal["stripes_180", "stripes_109", "stripes_71", "vortex"] = Field(
        "stripes_109", description="angle between the shifts of neighbouring domains, or one vortex"
    )
    size_nm: SizeNm = Field((30.0, 30.0), description="field (width, height), nm")
    thickness_nm: Positive = Thickness
    rotation_deg: float = Rotation
    domain_width_nm: Positive = Field(10.0, description="distance between neighbouring walls, nm")
    wall_width_cells: Positive = Field(3.0, description="w of the wall or of the vortex core, pc cells")
    b_shift_nm: Annotated[float, Field(ge=0.005, le=0.04)] | None = Field(
        None, description="B shift of BiFeO3 from the centre of its A sites, nm; null: 0.025"
    )

    @model_validator(mode="after")
    def _possible(self) -> Ferroelectric:
        if self.pattern != "vortex" and (self.crystal, self.pattern) not in WALLS:
            raise ValueError(f"{self.crystal} has no {self.pattern}: use stripes_180 or vortex, or crystal BiFeO3")
        if self.crystal == "PbTiO3" and self.b_shift_nm is not None:
            raise ValueError("b_shift_nm is for BiFeO3 only: the shifts of PbTiO3 are those of its structure")
        if self.pattern != "vortex" and nm_to_angstrom(self.domain_width_nm) < 4 * self._wall_A:
            raise ValueError(
                f"domain_width_nm = {self.domain_width_nm} is less than four times the wall's w, "
                f"{angstrom_to_nm(self._wall_A):.3g} nm: make the domains wider or the walls thinner"
            )
        return self

    @property
    def _wall_A(self) -> float:
        return self.wall_width_cells * CRYSTALS[self.crystal].cell_A[0]

    @property
    def _shift_A(self) -> float:
        return CRYSTALS[self.crystal].b_shift_A if self.b_shift_nm is None else nm_to_angstrom(self.b_shift_nm)

    def build(self, seed: int) -> Specimen:
        """The specimen, the same for every seed: nothing in it is random."""
        polar = CRYSTALS[self.crystal]
        sites = perovskite_sites(np.diag(polar.cell_A), self.size_nm, self.thickness_nm, self.rotation_deg)
        names = sites.names
        straight = 0.5 * sites.half * polar.cell_A
        middle = 0.5 * (straight[:, 2].min() + straight[:, 2].max())
        from_middle = straight - (0.0, 0.0, middle)  # the fields' labels are those at half height, z = 0
        direction = self._direction(from_middle)
        share = np.where(names == "B", 1.0, 0.0)
        share[names == "O"] = (sites.half[names == "O"] % 2) @ np.array(polar.o_shift)
        shown = self._shift_A * (direction @ sites.turn)[:, :2]
        return assemble(
            sites.at(straight + self._shift_A * share[:, None] * direction),
            atomic_numbers(names, polar.elements, np.zeros(len(names))),
            self.size_nm,
            column=sites.column,
            site=names,
            unit=sites.unit,
            arrays={
                "polarisation_nm": angstrom_to_nm(1.0) * np.where((names == "B")[:, None], shown, np.nan),
                "domain": self._domain(from_middle),
            },
            fields={
                "polarisation_nm": lambda where: (
                    angstrom_to_nm(self._shift_A) * (self._direction(sites.pc(where)) @ sites.turn)[..., :2]
                ),
                "domain": lambda where: self._domain(sites.pc(where)),
                "distance_to_wall_nm": lambda where: angstrom_to_nm(1.0) * np.abs(self._from_wall(sites.pc(where))),
            },
            material="perovskite",
        )

    def _direction(self, place_A: Vectors) -> Vectors:
        """Shift of B [..., 3] in units of the full one at pc places [..., 3] from the field's centre."""
        variant = CRYSTALS[self.crystal].variant
        order = np.tanh(self._from_wall(place_A) / self._wall_A)
        if self.pattern != "vortex":
            walls = WALLS[self.crystal, self.pattern]
            side = (1.0 - 2.0 * (self._nearest_wall(place_A) % 2)) * order
            return np.asarray(variant * np.where(walls.flipped, side[..., None], 1.0))
        round_ = np.arctan2(place_A[..., 1], place_A[..., 0])
        flat = order * np.hypot(variant[0], variant[1])
        return np.stack([-flat * np.sin(round_), flat * np.cos(round_), np.full_like(flat, variant[2])], axis=-1)

    def _from_wall(self, place_A: Vectors) -> Vectors:
        """Signed distance from the nearest wall, or distance from the vortex core [...], angstrom."""
        if self.pattern == "vortex":
            return np.hypot(place_A[..., 0], place_A[..., 1])
        along = place_A @ WALLS[self.crystal, self.pattern].normal
        return np.asarray(along - nm_to_angstrom(self.domain_width_nm) * self._nearest_wall(place_A))

    def _nearest_wall(self, place_A: Vectors) -> Vectors:
        along = place_A @ WALLS[self.crystal, self.pattern].normal
        return np.asarray(np.rint(along / nm_to_angstrom(self.domain_width_nm)))

    def _domain(self, place_A: Vectors) -> NDArray[np.int64]:
        """Which of the two variants (stripes), or of the four in the plane (vortex), is nearest [...]."""
        if self.pattern != "vortex":
            along = place_A @ WALLS[self.crystal, self.pattern].normal
            return np.asarray(np.floor(along / nm_to_angstrom(self.domain_width_nm)) % 2, dtype=np.int64)
        direction, variant = self._direction(place_A), CRYSTALS[self.crystal].variant
        turned = np.arctan2(direction[..., 1], direction[..., 0]) - np.arctan2(variant[1], variant[0])
        return np.asarray(np.rint(2.0 * turned / np.pi) % 4, dtype=np.int64)
