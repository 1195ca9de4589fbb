"""Heavy things on a film of amorphous carbon: crystalline nanoparticles and single Pt atoms.

The film is on the side where the beam leaves. The columns of a crystal on a zone axis, and the Pt atoms, are targets;
the carbon is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from aecontrol.errors import BadInput
from aecontrol.types import Model, NonNegative, Positive, PositiveInt
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from ..elements import NUMBERS, SYMBOLS
from ..streams import stream
from .base import MARGIN_NM, Fraction, SizeNm, Specimen, Vectors, assemble
from .crystallites import METAL, Material, Shape, columns, crystallite, nearest_axis, random_turn, zone_turn
from .scatter import amorphous_carbon, scatter

ON_AXIS_DEG = 1.0
"""A crystal with a low-index axis this close to the beam shows columns."""
CONTACT_A = 2.0
"""Height of the lowest atom above the film."""
GAP_NM = 0.3
"""Least distance of two particles, each taken for the ball round it."""
RIM_NM = 0.1
"""A particle's mask goes this far beyond the centres of its outermost atoms."""
OFF_AXIS = "off-axis"
"""The site of the atoms of a crystal that shows no columns."""
PLACES_TRIED = 2000

FilmNm = Annotated[float, Field(gt=0, le=100)]
DiameterNm = Annotated[float, Field(ge=1, le=20)]
ApartNm = Annotated[float, Field(ge=0.1)]


class Nanoparticle(Model):
    """Crystals of Au, Pt or CeO2 on amorphous carbon, whole and clear of one another in the field.

    Targets are the metal columns of the crystals on a zone axis. ``arrays``: 'particle' (its number, -1 in the film)
    and 'zone_axis' (1 in a crystal with a low-index axis within ON_AXIS_DEG of the beam, else 0; -1 in the film).
    ``fields``: 'particle', the number of the particle seen at a place, -1 beside them.
    """

    kind: Literal["nanoparticle"] = "nanoparticle"
    size_nm: SizeNm = Field((40.0, 40.0), description="field (width, height), nm")
    crystal: Material = Field("Au", description="what the particles are made of")
    shape: Shape = Field("truncated_octahedron", description="{111} and {100} facets, {111} facets alone, or a ball")
    n_particles: PositiveInt = Field(8, description="number of particles")
    diameter_nm: tuple[DiameterNm, DiameterNm] = Field(
        (2.0, 8.0), description="smallest and largest diameter of a ball of the same volume, uniform between, nm"
    )
    zone_axis_fraction: Fraction = Field(
        0.5, description="chance that a particle is set on <100>, <110> or <111>; the others turn at random"
    )
    mistilt_deg: tuple[NonNegative, NonNegative] = Field(
        (0.0, 0.5), description="smallest and largest angle of such an axis from the beam, uniform between, degrees"
    )
    film_nm: FilmNm = Field(3.0, description="thickness of the carbon film, nm")

    @field_validator("diameter_nm", "mistilt_deg")
    @classmethod
    def _in_order(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if pair[0] > pair[1]:
            raise ValueError(f"the smaller number comes first, got {pair[0]:g}, {pair[1]:g}")
        return pair

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: same seed and settings, same atoms. Raises BadInput if the particles do not fit."""
        crystals = [self._crystal(seed, number) for number in range(self.n_particles)]
        places = self._places([crystal.radius_nm for crystal in crystals], seed)
        film = _film(self.size_nm, self.film_nm, seed)
        counts = [len(crystal.numbers) for crystal in crystals] + [len(film)]
        shifted = [
            crystal.positions_A + np.append(nm_to_angstrom(1.0) * place, -crystal.positions_A[:, 2].max() - CONTACT_A)
            for crystal, place in zip(crystals, places, strict=True)
        ]
        positions = np.concatenate([*shifted, film])
        positions[:, 2] -= positions[:, 2].min()
        numbers = np.concatenate([*[crystal.numbers for crystal in crystals], np.full(len(film), NUMBERS["C"])])
        within = [*[crystal.column for crystal in crystals], np.arange(len(film))]
        before = np.cumsum([0] + [int(column.max()) + 1 for column in within[:-1]])
        on_axis = np.repeat([*[int(crystal.on_axis) for crystal in crystals], -1], counts)
        symbols = np.array([SYMBOLS.get(number, "") for number in range(numbers.max() + 1)])[numbers]
        outlines = [_outline(at) for at in shifted]
        return assemble(
            positions,
            numbers,
            self.size_nm,
            column=np.concatenate(within) + np.repeat(before, counts),
            site=np.where(on_axis == 0, OFF_AXIS, symbols),
            arrays={"particle": np.repeat([*range(self.n_particles), -1], counts), "zone_axis": on_axis},
            fields={"particle": partial(_particle_at, outlines=outlines)},
            material=self.crystal.lower(),
            zone_axis=any(crystal.on_axis for crystal in crystals),
            target_sites=(METAL[self.crystal],),
        )

    def _crystal(self, seed: int, number: int) -> _Crystal:
        random = stream(seed, "particle", number)
        diameter_nm, mistilt_deg = random.uniform(*self.diameter_nm), random.uniform(*self.mistilt_deg)
        on_zone = random.random() < self.zone_axis_fraction
        turn = zone_turn(mistilt_deg, random) if on_zone else random_turn(random)
        sites, positions, numbers = crystallite(self.crystal, self.shape, nm_to_angstrom(diameter_nm), random)
        axis, angle_deg = nearest_axis(turn)
        on_axis = angle_deg <= ON_AXIS_DEG
        column = columns(sites, axis) if on_axis else np.arange(len(sites))
        return _Crystal(positions @ turn.T, numbers, column, on_axis)

    def _places(self, radii_nm: Sequence[float], seed: int) -> Vectors:
        """Centres [n, 2] of the particles in the field, nm, the largest placed first."""
        size, radii = np.asarray(self.size_nm), np.asarray(radii_nm)
        if 2 * radii.max() > size.min():
            raise BadInput(
                f"a particle {2 * radii.max():.3g} nm across does not fit in a field of {size[0]:g} x {size[1]:g} nm",
                "make diameter_nm smaller or the field larger",
            )
        centers = np.full((len(radii), 2), np.inf)
        for number in np.argsort(-radii, kind="stable"):
            tried = stream(seed, "particle-place", int(number)).random((PLACES_TRIED, 2))
            tried = radii[number] + tried * (size - 2 * radii[number])
            apart = np.linalg.norm(tried[:, None, :] - centers, axis=2) - radii - radii[number]
            free = np.flatnonzero((apart >= GAP_NM).all(axis=1))
            if not len(free):
                raise BadInput(
                    f"{len(radii)} particles of up to {2 * radii.max():.3g} nm do not fit side by side in the field",
                    "ask for fewer or smaller particles, or a larger field",
                )
            centers[number] = tried[free[0]]
        return centers


class SingleAtoms(Model):
    """Isolated Pt atoms on amorphous carbon; they alone are targets."""

    kind: Literal["single_atoms"] = "single_atoms"
    size_nm: SizeNm = Field((20.0, 20.0), description="field (width, height), nm")
    density_per_nm2: Positive = Field(0.3, description="Pt atoms per area, 1/nm^2")
    min_distance_nm: ApartNm = Field(0.3, description="least distance of two Pt atoms, nm")
    cluster_fraction: Fraction = Field(0.0, description="chance that a Pt atom is drawn from a cluster")
    n_clusters: PositiveInt = Field(8, description="number of clusters, placed uniformly")
    cluster_sigma_nm: Positive = Field(1.5, description="standard deviation of a cluster, nm")
    film_nm: FilmNm = Field(3.0, description="thickness of the carbon film, nm")

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``: same seed and settings, same atoms. Raises BadInput if the Pt does not fit."""
        flat = nm_to_angstrom(1.0) * (self._places(seed) - MARGIN_NM)
        film = _film(self.size_nm, self.film_nm, seed)
        film[:, 2] += CONTACT_A
        platinum = np.column_stack([flat, np.zeros(len(flat))])
        return assemble(
            np.concatenate([platinum, film]),
            np.repeat([NUMBERS["Pt"], NUMBERS["C"]], [len(platinum), len(film)]),
            self.size_nm,
            material="single_atoms",
            zone_axis=False,
            target_sites=("Pt",),
        )

    def _places(self, seed: int) -> Vectors:
        """Pt atoms [n, 2] over the field and its margin, nm from the margin's corner."""
        box = np.asarray(self.size_nm) + 2 * MARGIN_NM
        random = stream(seed, "specimen", 1)
        clusters = box * stream(seed, "specimen", 2).random((self.n_clusters, 2))

        def draw(count: int) -> Vectors:
            anywhere = box * random.random((count, 2))
            chosen = clusters[random.integers(self.n_clusters, size=count)]
            gathered = chosen + self.cluster_sigma_nm * random.standard_normal((count, 2))
            return np.where(random.random((count, 1)) < self.cluster_fraction, gathered, anywhere)

        return scatter(round(self.density_per_nm2 * float(np.prod(box))), box, self.min_distance_nm, draw)


@dataclass(frozen=True)
class _Crystal:
    """Positions [n, 3] from its centre, angstrom, numbers [n] and column numbers [n] of one turned crystal."""

    positions_A: Vectors
    numbers: NDArray[np.int64]
    column: NDArray[np.int64]
    on_axis: bool

    @property
    def radius_nm(self) -> float:
        """Radius of the circle round it, seen along the beam."""
        return angstrom_to_nm(float(np.linalg.norm(self.positions_A[:, :2], axis=1).max()))


def _film(size_nm: SizeNm, film_nm: float, seed: int) -> Vectors:
    """Carbon [n, 3] under the field and its margin, angstrom, its upper face at height 0."""
    box = nm_to_angstrom(1.0) * np.array([size_nm[0] + 2 * MARGIN_NM, size_nm[1] + 2 * MARGIN_NM, film_nm])
    film = amorphous_carbon(box, stream(seed, "specimen"))
    film[:, :2] -= nm_to_angstrom(MARGIN_NM)
    return film


def _outline(positions_A: Vectors) -> Vectors:
    """Lines [m, 3] round the atoms seen along the beam: (nx, ny, c), where n . (x, y) + c <= 0 nm within."""
    from scipy.spatial import ConvexHull

    return np.asarray(ConvexHull(angstrom_to_nm(1.0) * positions_A[:, :2]).equations)


def _particle_at(positions_nm: Vectors, outlines: Sequence[Vectors]) -> NDArray[np.int64]:
    """Number of the particle seen at each of ``positions_nm`` [..., 2], -1 beside them."""
    found = np.full(positions_nm.shape[:-1], -1)
    for number, lines in enumerate(outlines):
        within = np.ones(found.shape, dtype=bool)
        for nx, ny, c in lines:
            within &= nx * positions_nm[..., 0] + ny * positions_nm[..., 1] + c <= RIM_NM
        found[within] = number
    return found
