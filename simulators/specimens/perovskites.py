"""Perovskite crystals seen along a zone axis: SrTiO3, CaTiO3 and the interface of CaTiO3 with LSAT."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from aecontrol.types import Model, Positive
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from ..streams import stream
from .base import MARGIN_NM, Fraction, SizeNm, Specimen, Vectors, assemble
from .sites import Sites, Tilted, Zone, atomic_numbers, perovskite_sites, tilt_labels
from .tilts import Steps, glazer_rotations

Angle = Annotated[float, Field(ge=0, le=15)]
Angles = tuple[Angle, Angle, Angle]
Signs = Annotated[str, Field(pattern=r"^[-+0]{3}$")]

SRTIO3_A = 3.905
LSAT_A = 3.868
CATIO3_CELL_A = (5.3796, 5.4423, 7.6401)
"""Pbnm cell edges; its axes a, b, c lie along [110], [-110], [001] of the pc frame."""
SRTIO3_SITES = {"A": {"Sr": 1.0}, "B": {"Ti": 1.0}, "O": {"O": 1.0}}
CATIO3_SITES = {"A": {"Ca": 1.0}, "B": {"Ti": 1.0}, "O": {"O": 1.0}}
LSAT_SITES = {"A": {"La": 0.18, "Sr": 0.82}, "B": {"Al": 0.59, "Ta": 0.41}, "O": {"O": 1.0}}
INTERFACE = 1
"""Half index along [001] of the AO plane that LSAT and film share."""

Rotation = Field(0.0, description="in-plane turn of the crystal from +x towards +y, degrees")
Thickness = Field(10.0, description="height along the beam, rounded to whole repeats of the lattice, nm")


class SrTiO3(Model):
    """Cubic SrTiO3 along [001], a = 3.905 angstrom, with vacancies and an optional uniform Glazer tilt."""

    kind: Literal["srtio3"] = "srtio3"
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    thickness_nm: Positive = Thickness
    rotation_deg: float = Rotation
    oxygen_vacancy_fraction: Fraction = Field(0.0, description="chance that an O atom is missing")
    strontium_vacancy_fraction: Fraction = Field(0.0, description="chance that a Sr atom is missing")
    tilt_deg: Angles = Field((0.0, 0.0, 0.0), description="rotation put in about the three pc axes, degrees")
    tilt_signs: Signs = Field("---", description="Glazer's sign about each pc axis: '+', '-' or '0'")

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms."""
        sites = perovskite_sites(SRTIO3_A * np.eye(3), self.size_nm, self.thickness_nm, self.rotation_deg)
        names = sites.names
        missing = np.zeros(len(names), dtype=bool)
        for step, (site, fraction) in enumerate(
            (("O", self.oxygen_vacancy_fraction), ("A", self.strontium_vacancy_fraction))
        ):
            missing |= (names == site) & (stream(seed, "specimen", step).random(len(names)) < fraction)
        place = Tilted(
            lambda half: np.asarray(0.5 * SRTIO3_A * half),
            lambda half: glazer_rotations(half // 2, np.asarray(self.tilt_deg), self.tilt_signs),
        )
        return assemble(
            sites.at(place(sites.half)),
            atomic_numbers(names, SRTIO3_SITES, np.zeros(len(names))),
            self.size_nm,
            column=sites.column,
            site=names,
            defect=np.where(missing, "vacancy", ""),
            defect_id=np.where(missing, np.arange(len(names)), -1),
            unit=sites.unit,
            arrays={
                "tilt_deg": tilt_labels(sites.half, names, place),
                "mismatch_nm": angstrom_to_nm(1.0) * place.mismatch_A(sites.half),
            },
            material="perovskite",
            period_A=(2.0 if any(self.tilt_deg) else 1.0) * SRTIO3_A * sites.turn[:2, :2],
        )


class CaTiO3(Model):
    """Orthorhombic CaTiO3 (Pbnm, tilts a-a-c+ along the pc axes) with measured, not ideal, atom positions.

    Zone '110' has x along [1-10], y along [001] of the pc frame and the beam along its [110] axis; zone '001' has x and
    y along [100] and [010].
    """

    kind: Literal["catio3"] = "catio3"
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    thickness_nm: Positive = Thickness
    rotation_deg: float = Rotation
    zone: Zone = Field("110", description="pc direction along the beam")

    def build(self, seed: int) -> Specimen:
        """The specimen, the same for every seed: nothing in it is random."""
        axes, shifts = _catio3()

        def place(half: Steps) -> Vectors:
            return np.asarray(0.5 * half @ axes + shifts[tuple((half % 4).T)])

        sites = perovskite_sites(axes, self.size_nm, self.thickness_nm, self.rotation_deg, self.zone)
        names = sites.names
        return assemble(
            sites.at(place(sites.half)),
            atomic_numbers(names, CATIO3_SITES, np.zeros(len(names))),
            self.size_nm,
            column=sites.column,
            site=names,
            unit=sites.unit,
            arrays={"tilt_deg": tilt_labels(sites.half, names, place)},
            material="perovskite",
        )


@cache
def _catio3() -> tuple[Vectors, Vectors]:
    """Pc lattice vectors [3, 3] and shifts from the ideal site [4, 4, 4, 3] by half index modulo 4, angstrom."""
    from ase.spacegroup import crystal

    a, b, c = CATIO3_CELL_A
    inequivalent = [(-0.00676, 0.03602, 0.25), (0.0, 0.5, 0.0), (0.0714, 0.4838, 0.25), (0.7108, 0.2888, 0.0371)]
    # ASE knows the group as Pnma, whose axes are b, c, a of Pbnm
    cell = crystal(
        ["Ca", "Ti", "O", "O"],
        [(y, z, x) for x, y, z in inequivalent],
        spacegroup=62,
        cellpar=[b, c, a, 90, 90, 90],
    )
    pbnm = (cell.positions / (b, c, a))[:, [2, 0, 1]] - (0.0, 0.5, 0.0)  # B on the origin
    in_pc = np.array([[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])  # Pbnm axes in pc steps
    half = np.rint(2.0 * pbnm @ in_pc).astype(np.int64)
    edges = np.array([[a, a, 0.0], [-b, b, 0.0], [0.0, 0.0, np.sqrt(2) * c]]) / np.sqrt(2)
    axes = np.linalg.inv(in_pc) @ edges
    shifts = np.full((4, 4, 4, 3), np.nan)
    for step in ((0, 0, 0), (2, 2, 0), (-2, 2, 0), (4, 0, 0)):  # lattice points of the cell, modulo 4
        shifts[tuple(((half + step) % 4).T)] = pbnm @ edges - 0.5 * half @ axes
    return axes, shifts


class CaTiO3OnLsat(Model):
    """A CaTiO3 film on LSAT, (La0.18Sr0.82)(Al0.59Ta0.41)O3, in the (110)pc projection: x along [1-10], y along the
    growth direction [001], the film at larger y, the interface across the middle of the field.

    The film is strained to LSAT's pc lattice in the plane. Tilts follow Glazer's rule for rigid octahedra and fall to
    zero at the interface on both sides, tilt(z) = tilt_inf (1 - exp(-z / xi)); A and B stay on the lattice.
    """

    kind: Literal["catio3_lsat"] = "catio3_lsat"
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    thickness_nm: Positive = Thickness
    rotation_deg: float = Rotation
    film_spacing_nm: float = Field(0.379, ge=0.36, le=0.41, description="pc spacing of the film along growth, nm")
    tilt_deg: Angles = Field((8.2, 8.2, 8.9), description="rotation put in deep in the film, pc axes, degrees")
    tilt_signs: Signs = Field("--+", description="Glazer's sign about each pc axis: '+', '-' or '0'")
    substrate_tilt_deg: Angles = Field((0.0, 0.0, 0.0), description="the same deep in LSAT, degrees")
    substrate_tilt_signs: Signs = Field("---", description="Glazer's sign about each pc axis in LSAT")
    decay_nm: Positive = Field(2.0, description="xi of the tilt profile, nm")

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: the same seed and settings give the same atoms."""
        sites = self._sites()
        names = sites.names
        film = sites.half[:, 2] >= INTERFACE  # the shared AO plane is the film's
        draw = stream(seed, "specimen").random(len(names))
        numbers = np.where(film, atomic_numbers(names, CATIO3_SITES, draw), atomic_numbers(names, LSAT_SITES, draw))
        place = Tilted(self._straight, self._rotations)
        return assemble(
            sites.at(place(sites.half)),
            numbers,
            self.size_nm,
            column=sites.column,
            site=names,
            unit=sites.unit,
            arrays={
                "tilt_deg": tilt_labels(sites.half, names, place),
                "mismatch_nm": angstrom_to_nm(1.0) * place.mismatch_A(sites.half),
                "phase": film.astype(np.int64),
            },
            fields={
                "phase": lambda where: (self._height_A(sites, where) >= 0.0).astype(np.int64),
                "distance_to_interface_nm": lambda where: angstrom_to_nm(1.0) * np.abs(self._height_A(sites, where)),
            },
            material="perovskite",
        )

    def _sites(self) -> Sites:
        """LSAT's lattice over a field so much larger that the film, which is squeezed, still fills the real one."""
        squeeze = max(0.0, LSAT_A / nm_to_angstrom(self.film_spacing_nm) - 1.0)
        pad = squeeze * float(np.hypot(*(np.asarray(self.size_nm) + 2.0 * MARGIN_NM)))
        wide = (self.size_nm[0] + 2.0 * pad, self.size_nm[1] + 2.0 * pad)
        sites = perovskite_sites(LSAT_A * np.eye(3), wide, self.thickness_nm, self.rotation_deg, "110")
        sites = replace(sites, origin=sites.origin - nm_to_angstrom(pad) * np.array([1.0, 1.0, 0.0]))
        flat = angstrom_to_nm(1.0) * sites.at(self._straight(sites.half))[:, :2]
        return sites.only(np.all((flat >= -MARGIN_NM) & (flat <= np.asarray(self.size_nm) + MARGIN_NM), axis=1))

    def _straight(self, half: Steps) -> Vectors:
        positions = np.array(half, dtype=np.float64) * (0.5 * LSAT_A)
        squeezed = 0.5 * (nm_to_angstrom(self.film_spacing_nm) - LSAT_A)
        positions[:, 2] += squeezed * np.maximum(half[:, 2] - INTERFACE, 0)
        return positions

    def _rotations(self, half: Steps) -> Vectors:
        from_interface = self._straight(half)[:, 2:] - 0.5 * LSAT_A * INTERFACE
        share = 1.0 - np.exp(-np.abs(from_interface) / nm_to_angstrom(self.decay_nm))
        film = glazer_rotations(half // 2, share * self.tilt_deg, self.tilt_signs)
        below = glazer_rotations(half // 2, share * self.substrate_tilt_deg, self.substrate_tilt_signs)
        return np.where(half[:, 2:] > INTERFACE, film, below)

    @staticmethod
    def _height_A(sites: Sites, where_nm: Vectors) -> Vectors:
        """Height above the interface along the growth direction [...], angstrom."""
        return np.asarray(sites.pc(where_nm)[..., 2] - 0.5 * LSAT_A * INTERFACE)
