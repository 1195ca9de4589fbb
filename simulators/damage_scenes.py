"""Random pairs of frames of one place, the later one perhaps damaged, to learn what damage looks like and what only
looks like it.

Lattices are invented, or are those of metal and oxide particles: no garnet, perovskite or dichalcogenide, so that
these remain unseen. Matter is cut into pieces, a few to a column; each piece that is hit either leaves or is displaced.
Frames also differ by what is no damage: dose, gain, defocus, register, drift, lines displaced. Ranges are choices, wide
on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, PositiveInt

from .column_sets import FIELD_NM, Columns, of_material
from .crystal_scenes import SPECIMENS, lens, paint, sampled
from .scenes import MARGIN_NM, blobs, cut_edge, log_uniform, ramp
from .streams import stream

Floats = NDArray[np.float64]
PATCH_PX = 20
"""Side of the patches whose damage is told."""
CRYSTALS, LENSES, REFOCUSED = 800, 32, 3
"""Different invented crystals, probes, and changes of focus of each probe."""
PARTICLES = 0.15
"""Share of the scenes that show nanoparticles."""


@dataclass(frozen=True)
class DamagePair:
    """Two frames of one place before noise: ``first``, ``later`` [rows, cols] expected counts; ``fraction`` [rows, cols
    of patches]: share of the matter (weighted by scattering power) that was removed or displaced in between."""

    first: NDArray[np.float32]
    later: NDArray[np.float32]
    fraction: NDArray[np.float32]

    def exposed(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Both frames with shot noise; now and then in other units, with read noise and an offset."""
        frames = [rng.poisson(image).astype(np.float32) for image in (self.first, self.later)]
        if rng.random() < 0.3:
            level = float(self.first.mean())
            read, unit = rng.uniform(0, 0.3) * np.sqrt(level), log_uniform(rng, 1e-2, 1e2)
            for frame in frames:
                frame += (rng.normal(0, read, frame.shape) + rng.uniform(-0.03, 0.1) * level).astype(np.float32)
                frame *= unit
        return frames[0], frames[1]


class DamageScenes(Model):
    """Pairs of frames of invented crystals and particles; the later frame is damaged here and there, or not."""

    kind: Literal["damage"] = "damage"
    size_px: PositiveInt = Field(160, multiple_of=PATCH_PX, description="rows and columns of a frame")
    pixel_nm: tuple[float, float] = Field((0.013, 0.045), description="smallest and largest pixel, nm")
    counts: tuple[float, float] = Field((3.0, 300.0), description="range of the brightest pixels' expected counts")
    clean: bool = Field(False, description="damage is all that differs between the frames")

    def render(self, seed: int, index: int) -> DamagePair:
        """Pair ``index`` of stream ``seed``; the same numbers give the same pair in any process. Cannot fail."""
        rng = stream(seed, "damage scene", index)
        pixel = log_uniform(rng, *self.pixel_nm)
        side = self.size_px * pixel
        pieces = _pieces(rng, _crystal(rng, side))
        hit = (rng.random(len(pieces.weight)) < _chance(rng, pieces, side)) & pieces.listed  # films stay as they are
        first, later = self._images(rng, pieces, _afterwards(rng, pieces, hit), pixel)
        return DamagePair(first, later, damaged_fraction(pieces, hit, self.size_px, pixel))

    def held_out(self) -> dict[str, DamageScenes]:
        """Named conditions for a model card, by the counts of the brightest pixels."""
        return {f"{n} counts": self.model_copy(update={"counts": (n, n)}) for n in (5, 20, 100)}

    def _images(
        self, rng: np.random.Generator, before: Columns, after: Columns, pixel: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Expected counts of both frames, with all that differs between them besides damage."""
        n, variant = self.size_px, int(rng.integers(LENSES))
        if self.clean:
            still = np.zeros((2, n))
            same = [paint(_together(c), 1.0, *_probe(variant, 0), n, pixel, still)[0] for c in (before, after)]
            dose = self.counts[1] / max(float(np.quantile(same[0], 0.999)), 1e-9)
            return (dose * same[0]).astype(np.float32), (dose * same[1]).astype(np.float32)
        focus = int(rng.integers(1, REFOCUSED + 1)) if rng.random() < 0.7 else 0
        probes = [_probe(variant, 0), _probe(variant, focus)]
        if rng.random() < 0.5:
            probes.reverse()
        bend, shift = _misfit(rng, n)
        side = n * pixel
        moved = (after.xy - side / 2) @ bend.T + side / 2 + shift * pixel
        lines = rng.choice([0.0, rng.uniform(0, 0.2)])
        images = [
            paint(_together(columns), 1.0, *probe, n, pixel, rng.normal(0, lines, (2, n)))[0]
            for columns, probe in zip((before, replace(after, xy=moved)), probes, strict=True)
        ]
        peak = max(float(np.quantile(images[0], 0.999)), 1e-9)
        film = _film(rng, n, pixel)
        dose = log_uniform(rng, *self.counts)
        gain = rng.uniform(0.85, 1.15) * (log_uniform(rng, 0.5, 2.0) if rng.random() < 0.4 else 1.0)
        first, later = (np.asarray(dose * (image / peak + film), dtype=np.float32) for image in images)
        return first, later * np.float32(gain if rng.random() < 0.8 else 1.0)


def damaged_fraction(pieces: Columns, hit: NDArray[np.bool_], size_px: int, pixel: float) -> NDArray[np.float32]:
    """Share of each patch's weight that was hit [rows, cols]; 0 where there is no matter."""
    edges = np.arange(0, size_px + 1, PATCH_PX) * pixel
    x, y = pieces.xy.T
    total, lost = (np.histogram2d(y, x, (edges, edges), weights=w)[0] for w in (pieces.weight, pieces.weight * hit))
    return np.asarray(lost / np.maximum(total, 1e-9), dtype=np.float32)


@lru_cache(maxsize=LENSES * (REFOCUSED + 1))
def _probe(variant: int, focus: int) -> tuple[NDArray[np.complex64], float]:
    """A probe, or (``focus`` > 0) the same after its defocus has changed by up to 3 nm."""
    optics = lens(variant)
    change = stream(variant, "focus of a pair", focus).uniform(-3.0, 3.0) if focus else 0.0
    return sampled(optics.model_copy(update={"c1_nm": optics.c1_nm + change}))


@lru_cache(maxsize=256)
def _invented(variant: int) -> Columns:
    """A crystal of any cell, also a large one with many columns, of any brightness; perhaps with some disorder."""
    rng = stream(variant, "crystal of a pair")
    a, b = np.exp(rng.uniform(np.log(0.22), np.log(1.4), 2))
    gamma = np.radians(rng.choice([90.0, rng.uniform(60, 120)]))
    cell = np.array([[a, 0.0], [b * np.cos(gamma), b * np.sin(gamma)]])
    apart, basis = log_uniform(rng, 0.08, 0.25), rng.random((1, 2))
    for new in rng.random((int(min(40, 4 + 3 * rng.uniform(2, 20) * a * b)), 2)):
        off = (new - basis + 0.5) % 1 - 0.5
        if np.hypot(*(off @ cell).T).min() > apart:
            basis = np.vstack([basis, new])
    reach = int(np.ceil(1.5 * FIELD_NM / min(a, b * np.sin(gamma))))
    i, j = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    xy = ((np.stack([i, j], 1)[:, None] + basis) @ cell).reshape(-1, 2) + FIELD_NM / 2
    bright = np.tile(np.exp(rng.uniform(np.log(0.04), 0, len(basis))), len(i))
    kept = ((xy > 0) & (xy < FIELD_NM)).all(1) & (rng.random(len(xy)) > rng.choice([0.0, rng.uniform(0, 0.1)]))
    xy, bright = xy[kept], bright[kept]
    xy = xy + rng.normal(0, rng.choice([0.0, rng.uniform(0, 0.03)]), xy.shape)
    spread = np.full_like(xy, rng.uniform(0.004, 0.02))
    return Columns(xy, bright, spread, np.ones(len(xy), dtype=bool))


def _crystal(rng: np.random.Generator, side: float) -> Columns:
    """Columns in and around a frame of ``side`` nm, from its corner: anywhere in a specimen, turned, maybe cut off."""
    if rng.random() < PARTICLES:
        columns = of_particle(int(rng.integers(SPECIMENS)))
    else:
        columns = _invented(int(rng.integers(CRYSTALS)))
    room = max(FIELD_NM / 2 - side / 2 - MARGIN_NM, 0.0)
    angle, middle = rng.uniform(0, 2 * np.pi), FIELD_NM / 2 + rng.uniform(-room, room, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    xy = (columns.xy - middle) @ turn.T + side / 2
    near = ((xy > -MARGIN_NM) & (xy < side + MARGIN_NM)).all(1)
    placed = replace(columns, xy=xy)[near]
    kept = cut_edge(rng, placed.xy, side) if rng.random() < 0.4 else None
    return placed if kept is None or not kept.any() else placed[kept]


@lru_cache(maxsize=SPECIMENS)
def of_particle(variant: int) -> Columns:
    """Columns of nanoparticles on carbon."""
    return of_material("nanoparticle", variant)


def _pieces(rng: np.random.Generator, columns: Columns) -> Columns:
    """Every column as one to eight equal pieces on top of each other."""
    each = int(rng.integers(1, 9))
    return Columns(
        np.repeat(columns.xy, each, axis=0),
        np.repeat(columns.weight / each, each),
        np.repeat(columns.spread, each, axis=0),
        np.repeat(columns.listed, each),
    )


def _together(pieces: Columns) -> Columns:
    """Pieces that lie on top of each other as one, which is quicker to paint."""
    new = np.r_[True, (np.diff(pieces.xy, axis=0) != 0).any(1)][: len(pieces.weight)]
    weight = np.bincount(np.cumsum(new) - 1, pieces.weight).astype(np.float64)
    return replace(pieces[new], weight=weight)


def _chance(rng: np.random.Generator, pieces: Columns, side: float) -> Floats:
    """The chance of each piece to be hit: none at all, discs, spots, a gradient, everywhere, or some of these."""
    xy, chance = pieces.xy, np.zeros(len(pieces.weight))
    kind = rng.random()
    if kind < 0.1:
        return chance
    if kind < 0.75:
        spots = kind < 0.3
        area = side**2
        for _ in range(1 + rng.poisson(0.6 * area / 4 if spots else 0.12 * area)):
            radius = rng.uniform(0.1, 0.3) if spots else log_uniform(rng, 0.2, 1.2)
            share = 1.0 if spots and rng.random() < 0.5 else rng.uniform(0.15, 1.0)
            inside = np.hypot(*(xy - rng.uniform(0, side, 2)).T) < radius
            chance[inside] = np.maximum(chance[inside], share)
    if kind > 0.68:  # for a part of the frames with discs, too
        level = rng.choice([rng.uniform(0, 1.0), rng.uniform(0, 0.2)])
        angle = rng.uniform(0, 2 * np.pi)
        along = (xy / side - rng.random(2)) @ [np.cos(angle), np.sin(angle)]
        steep = rng.choice([0.0, log_uniform(rng, 1.0, 20.0)])
        chance = np.maximum(chance, level / (1 + np.exp(-np.clip(steep * along, -30, 30))) * (2 if not steep else 1))
    if rng.random() < 0.1 and len(chance):  # one sublattice alone
        chance = chance * (pieces.weight < rng.choice(pieces.weight))
    return np.minimum(chance, 1.0)


def _afterwards(rng: np.random.Generator, pieces: Columns, hit: NDArray[np.bool_]) -> Columns:
    """What is left: pieces that were hit have gone, or lie elsewhere."""
    leaves = hit & (rng.random(len(hit)) < rng.choice([0.0, 0.5, 1.0, rng.random()]))
    step = rng.normal(0, log_uniform(rng, 0.025, 0.08), pieces.xy.shape)
    return replace(pieces, xy=pieces.xy + step * hit[:, None])[~leaves]


def _misfit(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """What registration leaves: a matrix about the frame's middle that moves its rim by up to 0.3 px, and a shift of up
    to 0.5 px."""
    bend = np.eye(2) + rng.choice([0.0, rng.uniform(0, 0.3)]) * rng.uniform(-1, 1, (2, 2)) * 2 / n
    angle = rng.uniform(0, 2 * np.pi)
    return bend, rng.choice([0.0, rng.uniform(0, 0.5)]) * np.array([np.cos(angle), np.sin(angle)])


def _film(rng: np.random.Generator, n: int, pixel: float) -> Floats:
    """What lies on, under and around the crystal and stays as it is, in units of the crystal's peak [n, n]."""
    film = np.full((n, n), rng.uniform(0.0, 0.1))
    if rng.random() < 0.5:
        film += log_uniform(rng, 0.01, 0.5) * ramp(rng, n)
    if rng.random() < 0.3:
        film += log_uniform(rng, 0.05, 0.6) * blobs(rng, n, 0.6 / pixel)
    return film
