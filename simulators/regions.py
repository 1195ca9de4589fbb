"""Random HAADF scenes whose regions are known: particles on a film, grains that meet, ferroelectric domains, neither.

Each scene knows its regions as functions of place, so that they can be asked for on any grid. The scenes share no code
with the specimens and their renderer, which therefore are the independent test of what is learnt here. All ranges are
choices, wide on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, Positive

from .region_lattices import Columns, Floats, domains, grains, polar_crystal, single_crystal
from .streams import stream

Family = Literal["particles", "grains", "domains", "crystal"]
Region = Callable[[Floats], NDArray[np.bool_]]
"""Which of the places [..., 2] (x, y; nm from the frame's corner) are in a region."""

FCC_FACETS = np.array(
    [[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
    + [[3**0.5, 0, 0], [-(3**0.5), 0, 0], [0, 3**0.5, 0], [0, -(3**0.5), 0], [0, 0, 3**0.5], [0, 0, -(3**0.5)]]
) / np.sqrt(3)
"""Normals of {111} and {100}, unit length."""


@dataclass(frozen=True)
class RegionScene:
    """One image and the regions in it.

    ``image`` [rows, cols] float32; ``pixel_size_nm`` (x, y); ``regions``: class name -> where; of a class that is not
    named, the scene does not tell.
    """

    image: NDArray[np.float32]
    pixel_size_nm: tuple[float, float]
    regions: Mapping[str, Region]


@dataclass(frozen=True)
class ColumnScene:
    """The columns of a crystal as a finder reports them, with its errors, in place of an image.

    ``xy_nm`` [n, 2] from the corner of a frame of ``size_nm`` (width, height); ``intensity`` [n]; ``regions`` as in
    :class:`RegionScene`.
    """

    xy_nm: Floats
    intensity: Floats
    size_nm: tuple[float, float]
    regions: Mapping[str, Region]


class RegionScenes(Model):
    """Convex particles on a mottled film, grain boundaries of many lattices, walls in polar perovskites, and single
    crystals without any of them.

    Columns are exact Gaussian sums; a particle is its projected thickness, with lattice fringes where it is aligned.
    """

    kind: Literal["regions"] = "regions"
    families: tuple[Family, ...] = Field(
        ("particles", "grains", "grains", "domains", "crystal"),
        min_length=1,
        description="drawn with equal chance each",
    )
    particle_side_nm: Positive = Field(13.0, description="side of a scene of particles, nm")
    particle_pixel_nm: tuple[Positive, Positive] = Field((0.04, 0.2), description="its smallest and largest pixel, nm")
    lattice_side_nm: Positive = Field(6.5, description="side of a scene that shows a lattice, nm")
    lattice_pixel_nm: tuple[Positive, Positive] = Field((0.02, 0.08), description="its smallest and largest pixel, nm")
    counts: tuple[Positive, Positive] = Field((10.0, 1e4), description="range of the brightest column's counts")
    domain_side_nm: Positive = Field(20.0, description="largest side of a scene of polar domains, nm")
    error_nm: tuple[Positive, Positive] = Field((0.001, 0.04), description="range of its columns' position errors, nm")
    blur_nm: tuple[Positive, Positive] = Field((0.035, 0.07), description="range of the columns' standard deviation")
    boundary_nm: Positive = Field(0.35, description="a place this close to a grain boundary is in it, nm")
    wall_nm: Positive = Field(0.5, description="a place this close to a domain wall is in it, nm")

    def render(self, seed: int, index: int) -> RegionScene | ColumnScene:
        """Scene ``index`` of stream ``seed``; the same numbers give the same scene in any process. Cannot fail."""
        rng = stream(seed, "region-scene", index)
        family = self.families[rng.integers(len(self.families))]
        if family == "particles":
            return self._particles(rng)
        if family == "domains":
            return self._domains(rng)
        if family == "crystal" and rng.random() < 0.25:
            return self._crystal_seen_small(rng)
        side = self.lattice_side_nm
        if family == "grains":
            columns, distance = grains(rng, side)
            region = _near(distance, self.boundary_nm)
        else:
            columns, region = single_crystal(rng, side), _nowhere
        image, pixel = self._lattice_image(rng, columns, side)
        return RegionScene(image, (pixel, pixel), {"boundary": region})

    def held_out(self) -> dict[str, RegionScenes]:
        """Named conditions for a model card: each kind of region, grains and domains by dose."""
        conditions: dict[str, dict[str, object]] = {"particles": {"families": ("particles",)}}
        for counts in (30.0, 300.0):
            conditions[f"grains, {counts:g} counts"] = {"families": ("grains",), "counts": (counts, counts)}
        for error in (0.003, 0.01, 0.02):
            conditions[f"domains, errors {error:g} nm"] = {"families": ("domains",), "error_nm": (error, error)}
        conditions["crystal"] = {"families": ("crystal",)}
        return {name: self.model_copy(update=change) for name, change in conditions.items()}

    def _lattice_image(
        self, rng: np.random.Generator, columns: Columns, side: float
    ) -> tuple[NDArray[np.float32], float]:
        pixel = _log_uniform(rng, *self.lattice_pixel_nm)
        n = round(side / pixel)
        blur, counts = _log_uniform(rng, *self.blur_nm), _log_uniform(rng, *self.counts)
        expected = counts * _gaussians(rng, columns, n, pixel, blur)
        peak = counts * pixel**2 / (2 * np.pi * blur**2)
        background = peak * (rng.uniform(0.005, 0.1) + _log_uniform(rng, 0.01, 0.5) * _ramp(rng, n))
        if rng.random() < 0.4:
            background = background + peak * _log_uniform(rng, 0.03, 0.7) * np.maximum(_field(rng, n, 0.7 / pixel), 0)
        if rng.random() < 0.3:  # thickness varies
            expected *= np.maximum(1 + rng.uniform(0, 0.4) * _field(rng, n, 3.0 / pixel), 0.2)
        return _detect(rng, expected + background), pixel

    def _domains(self, rng: np.random.Generator) -> ColumnScene:
        """Polar domains or, in a third of the scenes, one crystal; some columns missed."""
        side = self.domain_side_nm * rng.uniform(0.3, 1.0)
        columns = polar_crystal(rng, side)
        region: Region = _nowhere
        if rng.random() < 0.67:
            columns, distance = domains(rng, side)
            region = _near(distance, self.wall_nm)
        inside = np.all((columns.xy > 0) & (columns.xy < side), axis=1)
        found = columns[inside & (rng.random(len(columns.xy)) > rng.choice([0.0, rng.uniform(0, 0.1)]))]
        error = _log_uniform(rng, *self.error_nm) / np.sqrt(found.weight)  # that of the brighter sublattice
        xy = found.xy + rng.normal(0, 1, found.xy.shape) * error[:, None]
        return ColumnScene(xy, found.weight, (side, side), {"wall": region})

    def _crystal_seen_small(self, rng: np.random.Generator) -> RegionScene:
        """A crystal that fills the frame, or its edge, as a search for particles sees it: there are none."""
        side = self.particle_side_nm
        n = round(side / _log_uniform(rng, 0.06, 0.2))
        pixel = side / n
        columns = single_crystal(rng, side)
        image = _gaussians(rng, columns, n, pixel, _log_uniform(rng, *self.blur_nm))
        image += image.mean() * (rng.uniform(0, 0.5) + rng.uniform(0, 0.5) * _ramp(rng, n))
        return RegionScene(_detect(rng, image * _log_uniform(rng, 1, 300) / image.mean()), (pixel, pixel), _NO_PARTICLE)

    def _particles(self, rng: np.random.Generator) -> RegionScene:
        """Up to nine particles, which may touch or leave the frame, on a film that may have an edge."""
        n = round(self.particle_side_nm / _log_uniform(rng, *self.particle_pixel_nm))
        pixel = self.particle_side_nm / n
        ticks = pixel * (np.arange(n) + 0.5)
        place: Floats = np.stack(np.meshgrid(ticks, ticks), axis=-1)
        largest = _log_uniform(rng, 1.5, 14)
        solids = [_Solid.random(rng, largest, self.particle_side_nm) for _ in range(rng.integers(10))]
        film = np.maximum(1 + rng.uniform(0, 0.3) * _field(rng, n, _log_uniform(rng, 0.4, 3) / pixel), 0.05)
        film += _log_uniform(rng, 0.01, 0.5) * _ramp(rng, n) + rng.uniform(0, 0.15) * _field(rng, n, 0.15 / pixel)
        if rng.random() < 0.25:  # the film ends
            across = (place - rng.uniform(0, self.particle_side_nm, 2)) @ _direction(rng)
            film /= 1 + np.exp(-np.clip(across / rng.uniform(0.1, 1.0), -50, 50))
        contrast = _log_uniform(rng, 0.15, 8.0)  # of 1 nm of the particle, in units of the film
        blur = rng.uniform(0.03, 0.25)
        expected = np.asarray(np.maximum(film, 0.02), dtype=np.float64)
        for solid in solids:
            expected = expected + contrast * solid.brightness(rng, place, blur)
        from scipy.ndimage import gaussian_filter

        expected = gaussian_filter(expected, 0.5 * blur / pixel)
        dose = _log_uniform(rng, 30, 3e5) * pixel**2  # counts a pixel from the film
        return RegionScene(
            _detect(rng, dose * expected),
            (pixel, pixel),
            {"particle": partial(_covered, solids=solids)},
        )


@dataclass(frozen=True)
class _Solid:
    """A convex particle: ``normals`` [m, 3] of its facets, their ``distance`` [m] nm from its centre (x, y)."""

    center: Floats
    normals: Floats
    distance: Floats
    fringes: Floats

    @classmethod
    def random(cls, rng: np.random.Generator, largest_nm: float, side_nm: float) -> _Solid:
        """One of up to ``largest_nm`` across, its centre in or just outside the frame; faceted, or nearly a ball."""
        radius = 0.5 * max(1.0, largest_nm * rng.uniform(0.4, 1.0))
        if rng.random() < 0.6:
            normals = FCC_FACETS @ _turn(rng)
            distance = radius * np.repeat([1.0, rng.uniform(0.9, 1.6)], [8, 6]) * rng.uniform(0.8, 1.1, 14)
        else:
            normals = rng.standard_normal((30, 3))
            normals /= np.linalg.norm(normals, axis=1)[:, None]
            distance = radius * rng.uniform(0.9, 1.05, 30)
        center = rng.uniform(-0.3 * radius, side_nm + 0.3 * radius, 2)
        aligned = rng.random() < 0.6
        waves = [_direction(rng) * 2 * np.pi / rng.uniform(0.14, 0.3) for _ in range(rng.integers(1, 3) * aligned)]
        return cls(center, normals, distance, np.array(waves).reshape(-1, 2))

    def thickness(self, place: Floats) -> Floats:
        """Height [...] of the particle along the beam at ``place`` [..., 2], nm; below 0 beside it."""
        upper, lower = np.full(place.shape[:-1], np.inf), np.full(place.shape[:-1], -np.inf)
        beside = np.full(place.shape[:-1], np.inf)
        for (nx, ny, nz), distance in zip(self.normals, self.distance, strict=True):
            left = distance - nx * (place[..., 0] - self.center[0]) - ny * (place[..., 1] - self.center[1])
            if nz > 1e-6:
                upper = np.minimum(upper, left / nz)
            elif nz < -1e-6:
                lower = np.maximum(lower, left / nz)
            else:
                beside = np.minimum(beside, left)
        return np.asarray(np.minimum(upper - lower, beside))

    def covers(self, place: Floats) -> NDArray[np.bool_]:
        """Which of ``place`` [..., 2] the particle is seen at: where it is at least an atom thick."""
        return np.asarray(self.thickness(place) > 0.2)

    def brightness(self, rng: np.random.Generator, place: Floats, blur_nm: float) -> Floats:
        """Its scattering [...], in nm of an unaligned crystal."""
        bright = np.zeros(place.shape[:-1])
        near = np.hypot(*np.moveaxis(place - self.center, -1, 0)) < 2 * self.distance.max()
        at = place[near]
        inside = np.maximum(self.thickness(at), 0) * np.exp(rng.normal(0, 0.2))
        for wave in self.fringes:  # the blur damps them
            depth = min(rng.uniform(0.2, 1.0), np.exp(-0.5 * (wave @ wave) * blur_nm**2))
            inside *= 1 + depth * np.cos(at @ wave + rng.uniform(0, 2 * np.pi))
        bright[near] = inside
        return bright


def _covered(at: Floats, solids: Sequence[_Solid]) -> NDArray[np.bool_]:
    covered = np.zeros(at.shape[:-1], dtype=bool)
    for solid in solids:
        covered |= solid.covers(at)
    return covered


def _near(distance: Callable[[Floats], Floats], reach_nm: float) -> Region:
    return lambda at: distance(at) < reach_nm


def _nowhere(at: Floats) -> NDArray[np.bool_]:
    return np.zeros(at.shape[:-1], dtype=bool)


_NO_PARTICLE: Mapping[str, Region] = {"particle": _nowhere}


def _gaussians(rng: np.random.Generator, columns: Columns, n: int, pixel: float, blur: float) -> Floats:
    """Expected image [n, n] of columns of unit counts times their weight: probe core and tail, lines displaced."""
    at = (pixel * (np.arange(n) + 0.5)).astype(np.float32)  # single precision suffices
    x, y = np.hsplit(columns.xy.astype(np.float32), 2)
    share, wide = rng.uniform(0.7, 1.0), rng.uniform(1.6, 3.0)
    lines = at + rng.normal(0, blur * rng.uniform(0, 0.15), n).astype(np.float32)
    tall = float(np.exp(rng.normal(0, 0.05)))  # mild astigmatism along the axes
    total = np.zeros((n, n))
    for part, width in ((share, blur), (1 - share, wide * blur)):
        gx = np.exp(-0.5 * ((at - x) / (width * tall)) ** 2)
        gy = np.exp(-0.5 * ((lines - y) / (width / tall)) ** 2) * columns.weight[:, None].astype(np.float32)
        total += part * pixel**2 / (2 * np.pi * width**2) * (gy.T @ gx)
    return total


def _detect(rng: np.random.Generator, expected: Floats) -> NDArray[np.float32]:
    """Poisson counts with uneven lines and, for half of the scenes, gain, offset and read noise."""
    uneven = 1 + rng.normal(0, rng.uniform(0, 0.02), (len(expected), 1))
    counts = rng.poisson(np.maximum(expected * uneven, 0)).astype(np.float64)
    if rng.random() < 0.5:
        read = rng.uniform(0, 0.3) * np.sqrt(expected.mean())
        counts = _log_uniform(rng, 1e-3, 1e3) * (counts + rng.normal(0, read, counts.shape) + rng.uniform(-1, 20))
    return counts.astype(np.float32)


def _ramp(rng: np.random.Generator, n: int) -> Floats:
    """A plane [n, n] between 0 and 1."""
    slope = rng.uniform(-1, 1, 2)
    plane = slope[0] * np.linspace(0, 1, n)[:, None] + slope[1] * np.linspace(0, 1, n)
    return np.asarray((plane - plane.min()) / max(float(np.ptp(plane)), 1e-9))


def _field(rng: np.random.Generator, n: int, scale_px: float) -> Floats:
    """Smooth random field [n, n] of mean 0 and spread 1 with features of ``scale_px``."""
    from scipy.ndimage import gaussian_filter, zoom

    step = max(1, int(scale_px / 3))  # drawn on a coarser grid where that loses nothing
    coarse = gaussian_filter(rng.standard_normal((-(-n // step) + 2,) * 2), scale_px / step, mode="wrap")
    field = zoom(coarse, step, order=1)[:n, :n] if step > 1 else coarse[:n, :n]
    return np.asarray((field - field.mean()) / max(float(field.std()), 1e-9))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _direction(rng: np.random.Generator) -> Floats:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def _turn(rng: np.random.Generator) -> Floats:
    """A random orthogonal matrix [3, 3]."""
    return np.asarray(np.linalg.qr(rng.standard_normal((3, 3)))[0])
