"""Has a network that was taught on a session's own frames learnt to see, or only to believe itself?

Three examinations, none of which asks the network how sure it is. Where it finds atoms in one half of a frame's
electrons is judged by the other half (a model of spots at its finds must foretell them). Atoms taken out of a frame,
and put where none was, must be missed and found: a network that paints the perfect lattice fails. Simulated scenes must
be read as well as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from aecontrol.types import Model

from . import refine
from .finder import AtomFinder, Found
from .learn_atoms import RIM_NM, Scene, match

Floats = NDArray[np.float64]

GATE_NM = 0.05
"""A find this close to an atom is that atom."""
KNOT_NM = 0.8
"""Spacing of the knots of the background."""
CELL_NM = 1.0
"""Sides of the cells over which errors are taken to be independent: more than a lattice cell."""
LIKE_COUNTS = (0.6, 1.6)
"""Variance over mean of an image of whole numbers that is taken to hold counts."""
ALTERED = 0.1
"""Part of a frame's atoms that are taken out at once; as many are put in where there is room."""
ROOM_NM = 0.11
"""Least distance of a place for an added atom from all others."""
DRAWS = 3
"""Times that every frame is altered."""

F1_MAY_DROP = 0.005
"""On simulated scenes."""
SITES_MAY_DROP = 0.02
"""Part of the altered sites that were read rightly before."""
SURE = 5.0
"""Standard errors by which the misfit must fall: more than chance asks, for spots are not all of the truth."""
EXPLAINED = 1.1
"""Misfit of the joint fit itself beyond which spots do not explain the counts, nor tell whether finds are right."""


class Marks(Model):
    """What an ensemble of networks scores."""

    simulated_f1: float
    vacancies: float
    """Share of the sites emptied by us at which it finds nothing."""
    added: float
    """Share of the atoms added by us that it finds."""
    misfit: float
    """Mean squared error, in units of the variance, with which its finds foretell the other half of the electrons."""
    explained: float
    """The same of the joint fit in the whole frames, whatever the networks find: 1 where spots explain them."""
    finds: int
    """Atoms that it finds in the held-out frames."""


@dataclass(frozen=True)
class Result:
    """Marks, and the misfit of every cell, to compare one by one."""

    marks: Marks
    cells: Floats


class Spots:
    """Spots of unit sum at ``x``, ``y`` [n] px with a common blur, on a background of linear hats: an image linear in
    all that is free."""

    def __init__(
        self, x: Floats, y: Floats, blur_nm: float, shape: tuple[int, ...], pixel_nm: tuple[float, float]
    ) -> None:
        from scipy import sparse

        (rows, cols), self.number, self.shape = shape, len(x), shape
        along_y, along_x = (_bells(at, blur_nm / p, n) for at, p, n in ((y, pixel_nm[1], rows), (x, pixel_nm[0], cols)))
        spots = np.einsum("ni,nj->nij", along_y[1], along_x[1])
        place = along_y[0][:, :, None] * cols + along_x[0][:, None, :]
        who = np.broadcast_to(np.arange(len(x))[:, None, None], place.shape)
        spots = sparse.csr_matrix((spots.ravel(), (who.ravel(), place.ravel())), shape=(len(x), rows * cols))
        hats = [sparse.csr_matrix(_hats(n, p)) for n, p in ((rows, pixel_nm[1]), (cols, pixel_nm[0]))]
        self._spots, self._design = spots, sparse.vstack([spots, sparse.kron(*hats)], format="csr")

    def fit(self, image: Floats, variance: Floats) -> Floats:
        """Least squares with weights 1 / ``variance``: intensities (not negative), then knots."""
        weighted = self._design.multiply(1 / variance.ravel()).tocsr()
        normal = (weighted @ self._design.T).toarray()
        size = normal.diagonal()
        # two finds at one place share its intensity; one beyond the rim has none
        normal[np.diag_indices_from(normal)] += 1e-6 * size + 1e-9 * size.max()
        free = np.linalg.solve(normal, weighted @ image.ravel())
        free[: self.number] = np.maximum(free[: self.number], 0.0)
        return np.asarray(free)

    def image(self, free: Floats) -> Floats:
        """The image of what ``fit`` returns."""
        return np.asarray((self._design.T @ free).reshape(self.shape))

    def light(self, intensities: Floats) -> Floats:
        """The image of the spots alone."""
        return np.asarray((self._spots.T @ intensities).reshape(self.shape))


def _bells(at: Floats, blur: float, length: int) -> tuple[NDArray[np.int64], Floats]:
    """Pixels [n, k] along one axis around ``at`` and a Gaussian's weights there; 0 outside the image."""
    reach = int(np.ceil(4 * blur))
    pixel = np.floor(at).astype(np.int64)[:, None] + np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * ((pixel + 0.5 - at[:, None]) / blur) ** 2) / (np.sqrt(2 * np.pi) * blur)
    return np.clip(pixel, 0, length - 1), weight * ((pixel >= 0) & (pixel < length))


def _hats(length: int, pixel_nm: float) -> Floats:
    knots = max(2, round(length * pixel_nm / KNOT_NM) + 1)
    at = (np.arange(length) + 0.5) / length * (knots - 1)
    return np.asarray(np.maximum(0.0, 1 - abs(at - np.arange(knots)[:, None])))


@dataclass(frozen=True)
class Explained:
    """An image as spots explain it: their ``intensity`` [n], the ``expected`` image, the ``variance`` of its pixels,
    and whether it holds ``counts``."""

    intensity: Floats
    expected: Floats
    variance: Floats
    counts: bool


def explain(image: Floats, spots: Spots) -> Explained:
    """The least-squares fit of ``spots``; the variance is read off its residual, unless that of counts fits it."""
    import torch

    from .joint import variance

    free = spots.fit(image, np.ones(image.shape))
    expected = spots.image(free)
    # centred and scaled: single precision must hold an image on a large offset
    base, unit = float(expected.mean()), float(image.std()) or 1.0
    level, seen = (torch.as_tensor(((a - base) / unit).astype(np.float32)) for a in (expected, image))
    alike = torch.as_tensor(spots.image((np.arange(len(free)) < spots.number).astype(float)).astype(np.float32))
    v0, gain, least = variance(level, seen - level, alike)
    spread = unit**2 * np.maximum(v0 + gain * level.numpy().astype(np.float64), max(least, 1e-6))
    whole = bool((image >= 0).all() and (image == np.round(image)).all())
    counts = whole and LIKE_COUNTS[0] < spread.mean() / max(base, 1e-12) < LIKE_COUNTS[1]
    if counts:
        spread = np.maximum(expected, 0.05 * base)
    return Explained(free[: spots.number], expected, spread, counts)


@dataclass(frozen=True)
class HeldOut:
    """A piece of a frame that no network is trained on, with all columns of a joint fit, the ``certain`` atoms first.

    ``image`` [rows, cols]; ``x``, ``y`` [n] px; ``blur_nm`` of the spot; ``seed`` of all that is drawn here."""

    image: Floats
    pixel_nm: tuple[float, float]
    x: Floats
    y: Floats
    certain: int
    blur_nm: float
    seed: int

    @classmethod
    def read(cls, scene: Scene, seed: int) -> HeldOut:
        """A labelled piece; what its residual shows beside the wanted atoms is fitted too."""
        x, y = scene.positions_px[scene.wanted].T
        image = scene.image.astype(np.float64)
        fitted = refine.refine(image, x, y, scene.pixel_size_nm)
        return cls(image, scene.pixel_size_nm, fitted.x, fitted.y, len(x), fitted.blur_nm or 0.06, seed)

    def _spots(self, x: Floats, y: Floats) -> Spots:
        return Spots(x, y, self.blur_nm, self.image.shape, self.pixel_nm)

    @cached_property
    def _explained(self) -> Explained:
        return explain(self.image, self._spots(self.x, self.y))

    @cached_property
    def halves(self) -> tuple[Floats, Floats]:
        """Two images of half the electrons each, independent given the specimen: counts are dealt out one by one, to
        others noise of their own variance is added and subtracted."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(crc32(b"halves"),)))
        if self._explained.counts:
            first = rng.binomial(self.image.astype(np.int64), 0.5).astype(np.float64)
            return first, self.image - first
        noise = rng.normal(0, np.sqrt(self._explained.variance))
        return (self.image + noise) / 2, (self.image - noise) / 2

    @cached_property
    def explained(self) -> Floats:
        """[rows, cols] squared error of the joint fit over the variance."""
        of = self._explained
        return np.asarray((self.image - of.expected) ** 2 / of.variance)

    def misfit(self, finder: AtomFinder) -> Floats:
        """[cells] squared error, over the variance, of either half as foretold by the finds in the other."""
        spread = self._explained.variance / 2
        total = np.zeros(self.image.shape)
        for known, other in (self.halves, self.halves[::-1]):
            found = look(finder, known, self.pixel_nm)
            spots = self._spots(found.x_px, found.y_px)
            total += (other - spots.image(spots.fit(known, spread))) ** 2 / spread
        return _cell_sums(total, self.pixel_nm)

    @cached_property
    def altered(self) -> list[tuple[Floats, Floats, Floats]]:
        """Images in which atoms were taken out and put in: (image, places emptied, places filled [k, 2] (x, y) px)."""
        return [
            self._alter(np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(k,)))) for k in range(DRAWS)
        ]

    def _alter(self, rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
        of = self._explained
        at, pixel = np.stack([self.x, self.y], 1), np.array(self.pixel_nm)
        sure = at[: self.certain]
        number = max(1, round(ALTERED * len(sure)))
        out = rng.permutation(np.flatnonzero(_inner(sure, self.image.shape, pixel)))[:number]
        room = rng.uniform(0, self.image.shape[::-1], (40 * number, 2))
        far = np.hypot(*((room[:, None] - at) * pixel).transpose(2, 0, 1)).min(1)
        room = room[(far > ROOM_NM) & _inner(room, self.image.shape, pixel)]
        room = room[_apart(room * pixel, 4 * ROOM_NM)][:number]
        gone = self._spots(*at[out].T).light(of.intensity[out])
        extra = self._spots(*room.T).light(np.full(len(room), np.median(of.intensity[: self.certain])))
        if of.counts:
            left = np.clip(1 - gone / np.maximum(of.expected, 1e-12), 0, 1)
            image = rng.binomial(self.image.astype(np.int64), left) + rng.poisson(extra)
            return image.astype(np.float64), at[out], room
        return self.image - gone + extra, at[out], room


@dataclass(frozen=True)
class Exam:
    """What every ensemble is asked: held-out pieces of the session, and simulated scenes."""

    pieces: Sequence[HeldOut]
    scenes: Sequence[Scene]

    def sit(self, finder: AtomFinder) -> Result:
        """Read everything and mark it. Deterministic."""
        cells = np.concatenate([piece.misfit(finder) for piece in self.pieces])
        missed, seen = [], []
        for piece in self.pieces:
            for image, emptied, filled in piece.altered:
                found = look(finder, image, piece.pixel_nm)
                missed.append(~_near(emptied, found, piece.pixel_nm))
                seen.append(_near(filled, found, piece.pixel_nm))
        pixels = 2 * sum(piece.image.size for piece in self.pieces)
        marks = Marks(
            simulated_f1=f1(finder, self.scenes),
            vacancies=_share(missed),
            added=_share(seen),
            misfit=float(cells.sum() / pixels),
            explained=float(np.concatenate([piece.explained.ravel() for piece in self.pieces]).mean()),
            finds=sum(len(look(finder, piece.image, piece.pixel_nm)) for piece in self.pieces),
        )
        return Result(marks, cells)


def refusals(before: Result, after: Result) -> list[str]:
    """Why networks with the marks ``after`` must not take the place of those ``before``; empty when they may."""
    old, new = before.marks, after.marks
    gain = before.cells - after.cells
    error = float(np.sqrt(len(gain)) * gain.std()) + 1e-12
    reasons = []
    if old.explained > EXPLAINED:
        reasons.append(
            f"a model of spots leaves a misfit of {old.explained:.3f} in the held-out frames (limit {EXPLAINED:g}): "
            "it cannot tell whether finds are right"
        )
    if not gain.sum() > SURE * error:
        reasons.append(
            "finds in one half of the held-out electrons do not foretell the other half better: misfit "
            f"{old.misfit:.4f} before, {new.misfit:.4f} after "
            f"({gain.sum() / error:.1f} standard errors better, at least {SURE:g} asked)"
        )
    for what, was, now, drop in (
        ("F1 on simulated scenes", old.simulated_f1, new.simulated_f1, F1_MAY_DROP),
        ("share of emptied sites seen to be empty", old.vacancies, new.vacancies, SITES_MAY_DROP),
        ("share of added atoms found", old.added, new.added, SITES_MAY_DROP),
    ):
        if now < was - drop:
            reasons.append(f"{what} fell from {was:.3f} to {now:.3f}; it may fall by {drop:g}")
    return reasons


def look(finder: AtomFinder, image: NDArray[np.floating[Any]], pixel_nm: tuple[float, float]) -> Found:
    """What the networks alone say: the joint fit would mend their finds, and is not what was taught."""
    return finder.find(image, pixel_nm, refined=False)


def f1(finder: AtomFinder, scenes: Sequence[Scene]) -> float:
    """F1 on scenes with known atoms."""
    hits = judged = 0
    for scene in scenes:
        found, pixel = look(finder, scene.image, scene.pixel_size_nm), np.array(scene.pixel_size_nm)
        at = np.stack([found.x_px, found.y_px], 1) * pixel
        size = np.array(scene.image.shape[::-1]) * pixel
        right, finds, there, _ = match(at, scene.positions_px * pixel, size, GATE_NM, scene.wanted)
        hits, judged = hits + right, judged + finds + there
    return 2 * hits / max(judged, 1)


def _near(sites: Floats, found: Found, pixel_nm: tuple[float, float]) -> NDArray[np.bool_]:
    """Which of ``sites`` [k, 2] (x, y) px have a find within ``GATE_NM``."""
    apart = np.hypot(
        (sites[:, :1] - found.x_px) * pixel_nm[0],
        (sites[:, 1:] - found.y_px) * pixel_nm[1],
    )
    return np.asarray((apart < GATE_NM).any(1))


def _share(yes: Sequence[NDArray[np.bool_]]) -> float:
    all_of_them = np.concatenate(yes)
    return float(all_of_them.mean()) if len(all_of_them) else 1.0


def _inner(at: Floats, shape: tuple[int, ...], pixel: Floats) -> NDArray[np.bool_]:
    """Which positions [n, 2] (x, y) px are not on the rim."""
    size = np.array(shape[::-1]) * pixel
    return np.asarray(((at * pixel > RIM_NM) & (at * pixel < size - RIM_NM)).all(1))


def _apart(at_nm: Floats, least: float) -> NDArray[np.bool_]:
    """Which positions to keep so that no two are closer than ``least``, the first of two being kept."""
    keep = np.ones(len(at_nm), dtype=bool)
    for k in range(len(at_nm)):
        keep[k + 1 :] &= ~(keep[k] & (np.hypot(*(at_nm[k + 1 :] - at_nm[k]).T) < least))
    return keep


def _cell_sums(image: Floats, pixel_nm: tuple[float, float]) -> Floats:
    """Sums over cells of about ``CELL_NM`` that cover the image."""
    edges = [
        np.linspace(0, n, max(1, round(n * p / CELL_NM)), endpoint=False).astype(int)
        for n, p in zip(image.shape, pixel_nm[::-1], strict=True)
    ]
    return np.asarray(np.add.reduceat(np.add.reduceat(image, edges[0], 0), edges[1], 1).ravel())
