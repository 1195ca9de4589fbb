"""What a session's own frames teach: atoms on which networks and the fit of the counts agree; the rest is open."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from . import refine
from .finder import GATHER_NM, HEAT_SIGMA_NM, AtomFinder
from .guards import Explained, Spots, explain
from .learn_atoms import Scene, Scenes

Floats = NDArray[np.float64]

BLOCK_NM = 5.0
"""Largest sides of the blocks that frames are cut into."""
CANDIDATE = 0.15
"""Confidence from which on a place is looked at."""
AGREED, DISPUTED = 0.8, 0.1
"""Least confidence of the teachers and largest mutual information (nat) between them for an atom."""
SIGNIFICANT = 5.0
"""Least intensity over its standard error of a confirmed atom."""
MOVED_NM = 0.03
"""Farthest that the fit may lie from where the teachers see the atom."""
LEAST = 0.15
"""Share of the median intensity that an atom has at least: where the residual excludes so much, nothing is."""
GRID_NM = 0.06
"""Spacing of the places that are left open: their heat overlaps."""
USUAL_BLUR_NM = 0.06
"""Blur where none could be fitted."""
ODD = 6.0
"""Spreads above the median from which on the misfit of an atom's window is odd."""


@dataclass(frozen=True)
class Frame:
    """One image [rows, cols] of the session, pixels (x, y) nm."""

    name: str
    image: NDArray[np.generic]
    pixel_size_nm: tuple[float, float]


@dataclass(frozen=True)
class Block:
    """A piece of a frame with what is held to be there; see ``learn_atoms.Scene``: no atom but those listed, those not
    ``wanted`` doubtful."""

    image: NDArray[np.float32]
    pixel_size_nm: tuple[float, float]
    positions_px: Floats
    wanted: NDArray[np.bool_]


@dataclass(frozen=True)
class OwnScenes:
    """Blocks of the session as a source of training patches, drawn with equal chance."""

    blocks: Sequence[Block]

    def render(self, seed: int, index: int) -> Scene:
        """Example ``index`` of stream ``seed``: one of the blocks."""
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(b"own"), index)))
        return self.blocks[int(rng.integers(len(self.blocks)))]

    def held_out(self) -> Mapping[str, Scenes]:
        """None: what is held out is examined otherwise."""
        return {}

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """What the blocks hold, as a digest."""
        digest = hashlib.sha256()
        for block in self.blocks:
            for array in (block.image, block.positions_px, block.wanted):
                digest.update(np.ascontiguousarray(array).tobytes())
        return {"kind": "own frames", "blocks": len(self.blocks), "sha256": digest.hexdigest()}


def label(frame: Frame, teachers: AtomFinder) -> Block:
    """What ``teachers`` and the joint fit together hold to be in an image.

    Wanted are atoms on which the teachers agree and that the fit confirms (significant, at the same place, and its
    window is explained as well as others). Nothing is where no teacher sees
    anything and the residual, or the fit where they are unsure, excludes an atom. The rest is left open.
    """
    image, pixel_size_nm = np.asarray(frame.image, dtype=np.float32), frame.pixel_size_nm
    found = teachers.find(image, pixel_size_nm, CANDIDATE, refined=False)
    if not len(found):
        return Block(image, pixel_size_nm, np.zeros((0, 2)), np.zeros(0, dtype=bool))
    fitted = refine.refine(image, found.x_px, found.y_px, pixel_size_nm)
    told = np.pad(found.confidence, (0, fitted.added))  # places that only the residual shows: confidence 0
    agreed = (told >= AGREED) & (np.pad(found.disagreement, (0, fitted.added)) <= DISPUTED)
    blur = fitted.blur_nm or USUAL_BLUR_NM
    spots = Spots(fitted.x, fitted.y, blur, image.shape, pixel_size_nm)
    seen = explain(image.astype(np.float64), spots)
    sane = ~_odd(image, seen, fitted, pixel_size_nm)
    start = np.stack([found.x_px, found.y_px], 1)
    moved = np.hypot(*((np.stack([fitted.x, fitted.y], 1)[: len(start)] - start) * pixel_size_nm).T)
    near = np.pad(moved <= MOVED_NM, (0, fitted.added))
    sure = agreed & near & sane & (fitted.significance >= SIGNIFICANT)
    usual = float(np.median(fitted.intensity[sure])) if sure.any() else np.inf
    absent = ~agreed & (fitted.intensity + 3 * fitted.sigma_intensity < LEAST * usual) & np.isfinite(usual)
    at = np.stack([fitted.x, fitted.y], 1)
    at = at[~absent]
    unseen = _open_places(image, seen, at, LEAST * usual, blur, pixel_size_nm)
    return Block(image, pixel_size_nm, np.concatenate([at, unseen]), np.pad(sure[~absent], (0, len(unseen))))


def _odd(
    image: NDArray[np.float32], seen: Explained, fitted: refine.Fit, pixel_nm: tuple[float, float]
) -> NDArray[np.bool_]:
    """Columns whose windows are explained worse than most: their mean squared residual over the variance."""
    from scipy.ndimage import convolve

    reach = [int(np.ceil(GATHER_NM / p)) for p in pixel_nm[::-1]]
    dy, dx = np.mgrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    disc = (np.hypot(dy * pixel_nm[1], dx * pixel_nm[0]) <= GATHER_NM).astype(np.float64)
    misfit = convolve((image - seen.expected) ** 2 / seen.variance, disc / disc.sum(), mode="nearest")
    rows, cols = (np.clip(a.astype(int), 0, n - 1) for a, n in zip((fitted.y, fitted.x), image.shape, strict=True))
    each = misfit[rows, cols]
    middle = np.median(each)
    return np.asarray(each > middle + ODD * 1.4826 * np.median(abs(each - middle)))


def _open_places(
    image: NDArray[np.float32], seen: Explained, at: Floats, least: float, blur_nm: float, pixel_nm: tuple[float, float]
) -> Floats:
    """Places [k, 2] (x, y) px of a grid, not near those ``at``, where the residual does not exclude (3 standard
    errors) a spot of intensity ``least``: no evidence of an atom is no evidence of its absence."""
    from scipy.ndimage import gaussian_filter
    from scipy.spatial import cKDTree

    width = np.array([blur_nm / p for p in pixel_nm[::-1]])
    # matched filter: intensity that a spot would be fitted with at every pixel, and its information
    force = gaussian_filter((image - seen.expected) / seen.variance, width)
    known = gaussian_filter(1 / seen.variance, width / np.sqrt(2)) / (4 * np.pi * width.prod())
    spread = max(1.0, 1.4826 * float(np.median(abs(force) / np.sqrt(known))))
    rows, cols = np.nonzero(force / known + 3 * spread / np.sqrt(known) > least)
    step = [max(1, round(GRID_NM / p)) for p in pixel_nm]
    grid = (cols % step[0] == 0) & (rows % step[1] == 0)
    places = np.stack([cols[grid] + 0.5, rows[grid] + 0.5], 1)
    far = cKDTree(at * pixel_nm).query(places * pixel_nm)[0] > HEAT_SIGMA_NM
    return np.asarray(places[far])


def blocks_of(frame: Frame) -> list[Frame]:
    """Equal pieces of at most ``BLOCK_NM``; named after the frame and the piece's first row and column."""
    parts = [
        max(1, int(np.ceil(n * p / BLOCK_NM)))
        for n, p in zip(frame.image.shape, frame.pixel_size_nm[::-1], strict=True)
    ]
    edges = [
        [round(n * k / count) for k in range(count + 1)] for n, count in zip(frame.image.shape, parts, strict=True)
    ]
    return [
        Frame(f"{frame.name}[{top}, {left}]", frame.image[top:bottom, left:right], frame.pixel_size_nm)
        for top, bottom in zip(edges[0], edges[0][1:], strict=False)
        for left, right in zip(edges[1], edges[1][1:], strict=False)
    ]
