"""Pairs of frames of damaged specimens whose truth is known atom by atom, for the benchmark of damage metrics.

Specimens are built atom by atom and rendered with a probe by the simulated microscope's own renderer; nothing here is
shared with the scenes that metrics are trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from aecontrol.registry import build_part
from simulators.column import SpecimenConfig
from simulators.optics import Optics
from simulators.render import Renderer
from simulators.specimens import Specimen

PATCH = 20
PIXELS, PIXEL_NM = 400, 0.025
SCATTERING = 1.7
"""An atom of number Z weighs Z to this power."""
DISPLACED_NM = 0.05
"""Standard deviation per axis of a displaced atom."""
LINE_PX = 0.1
"""Standard deviation of the lines' displacement where rows are to jitter."""
SPECIMENS = {
    "llzo": {"kind": "llzo", "thickness_nm": 3.9},
    "srtio3": {"kind": "srtio3", "thickness_nm": 3.9},
    "mos2": {"kind": "mos2"},
}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Condition:
    """How two frames differ besides damage: ``counts`` expected in the brightest pixels; ``shift_px`` by which they
    are out of register (any direction); ``gain``: more or fewer counts by this share; ``defocus_nm``; ``lines_px``:
    standard deviation of what displaces each line of either frame; ``isolated``: damage in single spots, not discs."""

    counts: float
    shift_px: float = 0.0
    gain: float = 0.0
    defocus_nm: float = 0.0
    lines_px: float = 0.0
    isolated: bool = False


@dataclass(frozen=True)
class Frames:
    """``first`` and ``later`` [rows, cols] counts, a ``repeat`` of the first without damage but with all else that
    differs in the later one; ``fraction`` [rows, cols of patches] of the matter damaged; ``clear`` [rows, cols]: no
    atom of the patch, nor within ``HALO_NM`` of it, is damaged."""

    first: Floats
    later: Floats
    repeat: Floats
    fraction: Floats
    clear: NDArray[np.bool_]


HALO_NM = 0.1
"""An atom this near to a patch still shines into it."""


def frames(lattice: str, seed: int, condition: Condition) -> Frames:
    """The pair ``seed`` of a lattice; noise and directions follow the condition too."""
    random = np.random.default_rng([seed, *(round(1e3 * value) for value in vars(condition).values())])
    whole = _specimen(lattice, seed)
    hit, damaged = _damage(lattice, seed, condition.isolated)
    angle = random.uniform(0, 2 * np.pi)
    shift = condition.shift_px * np.array([np.cos(angle), np.sin(angle)])
    sign = random.choice([-1.0, 1.0])

    def lines() -> Floats:
        return random.normal(0, condition.lines_px, (PIXELS, 2)) if condition.lines_px else np.zeros((PIXELS, 2))

    still = np.zeros(2)
    first = _image(whole, 0.0, still, lines())
    repeat, later = (_image(s, condition.defocus_nm, shift, lines()) for s in (whole, damaged))
    scale = condition.counts / float(np.quantile(first, 0.999))
    a, b, c = (
        random.poisson(np.maximum(image, 0) * scale * gain).astype(float)
        for image, gain in ((first, 1.0), (later, 1 + sign * condition.gain), (repeat, 1 + sign * condition.gain))
    )
    fraction, near = damaged_fraction(whole, hit)
    return Frames(a, b, c, fraction, ~near)


def series(lattice: str, seed: int, counts: float, fractions: tuple[float, ...]) -> tuple[list[Floats], list[Floats]]:
    """Frames of a place that is damaged everywhere, more and more, and the damaged fraction of each one's patches."""
    random = np.random.default_rng([seed, 77])
    whole = _specimen(lattice, seed)
    order, leaves = random.random((2, len(whole)))
    step = random.normal(0, 10 * DISPLACED_NM, whole.positions_A.shape)
    images, truth = [], []
    scale = counts / float(np.quantile(_image(whole, 0.0, np.zeros(2), np.zeros((PIXELS, 2))), 0.999))
    for fraction in fractions:
        hit = whole.alive & (order < fraction)
        damaged = _hit(whole, hit, leaves < 0.5, step)
        images.append(random.poisson(scale * np.maximum(_image(damaged, 0.0, np.zeros(2), np.zeros((PIXELS, 2))), 0)))
        truth.append(damaged_fraction(whole, hit)[0])
    return [image.astype(float) for image in images], truth


def damaged_fraction(whole: Specimen, hit: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    """By patch: the share of the weight of its atoms that was hit, and whether any hit atom lies in it or near."""
    side = PATCH * PIXEL_NM
    patches = PIXELS // PATCH
    edges = np.arange(patches + 1) * side
    x, y = (whole.positions_A[:, :2] / 10).T
    weight = whole.atomic_numbers.astype(float) ** SCATTERING * whole.alive
    total, lost = (np.histogram2d(y, x, (edges, edges), weights=w)[0] for w in (weight, weight * hit))
    near = np.zeros((patches, patches), dtype=bool)
    for dx in (-HALO_NM, 0.0, HALO_NM):
        for dy in (-HALO_NM, 0.0, HALO_NM):
            near |= np.histogram2d(y + dy, x + dx, (edges, edges), weights=1.0 * hit)[0] > 0
    return lost / np.maximum(total, 1e-9), near


@lru_cache(maxsize=4)
def _specimen(lattice: str, seed: int) -> Specimen:
    size = PIXELS * PIXEL_NM
    table = {**SPECIMENS[lattice], "size_nm": [size, size]}
    turn = float(np.random.default_rng([seed, 5]).uniform(0, 90))
    return cast(SpecimenConfig, build_part("specimen", {**table, "rotation_deg": turn}, "specimen")).build(seed)


@lru_cache(maxsize=4)
def _damage(lattice: str, seed: int, isolated: bool) -> tuple[NDArray[np.bool_], Specimen]:
    """Which atoms are hit, and the specimen afterwards: discs in which each atom is hit with one chance of 0.3 to 1;
    half of the hit atoms leave, the others are displaced. Isolated: spots of 0.15 to 0.25 nm, every atom hit."""
    random = np.random.default_rng([seed, 11, isolated])
    whole = _specimen(lattice, seed)
    size = PIXELS * PIXEL_NM
    xy = whole.positions_A[:, :2] / 10
    chance = np.zeros(len(whole))
    for _ in range(14 if isolated else 5):
        at = random.uniform(0, size, 2)
        radius, share = (random.uniform(0.15, 0.25), 1.0) if isolated else random.uniform((0.4, 0.3), (1.0, 1.0))
        chance = np.where(np.hypot(*(xy - at).T) < radius, share, chance)
    hit = whole.alive & (random.random(len(whole)) < chance)
    leaves = random.random(len(whole)) < 0.5
    return hit, _hit(whole, hit, leaves, random.normal(0, 10 * DISPLACED_NM, whole.positions_A.shape))


def _hit(whole: Specimen, hit: NDArray[np.bool_], leaves: NDArray[np.bool_], step_A: Floats) -> Specimen:
    return whole.changed(whole.alive & ~(hit & leaves), whole.positions_A + step_A * hit[:, None])


def _image(specimen: Specimen, defocus_nm: float, shift_px: Floats, lines_px: Floats) -> Floats:
    """Noiseless image, fraction of the beam [rows, cols]."""
    at = np.arange(PIXELS) + 0.5
    places = np.stack(np.meshgrid(at, at), axis=-1) + shift_px + lines_px[:, None]
    rendered = _renderer(defocus_nm).render(specimen, places * PIXEL_NM)
    return rendered.channels["HAADF"].astype(np.float64)


@lru_cache(maxsize=2)
def _renderer(defocus_nm: float) -> Renderer:
    return Renderer(Optics(c1_nm=defocus_nm))
