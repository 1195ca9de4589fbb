"""Ensembles that go on learning on a session's own frames, round by round, and are refused when they learnt wrongly.

After A. Ghosh et al., npj Comput. Mater. 7, 100 (2021), doi:10.1038/s41524-021-00569-7, with two differences: each
network is taught by the others and by the joint fit of the counts, never by itself; and what is learnt is examined
(:mod:`.guards`) before anybody may use it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.registry import build_part
from aecontrol.types import Count, Model, Positive, PositiveInt

from . import refine
from .finder import GATHER_NM, AtomFinder
from .guards import Exam, HeldOut, Spots, explain, look, refusals
from .learn_atoms import AtomLessons, Scene, Scenes, Source
from .train import Progress, Training, fit

Floats = NDArray[np.float64]

BLOCK_NM = 5.0
"""Largest sides of the blocks that frames are cut into."""
HELD_OUT = 4
"""Every so many-th block is held out."""
CANDIDATE = 0.15
"""Confidence from which on a place is looked at."""
AGREED, DISPUTED = 0.5, 0.1
"""Least confidence of the teachers and largest mutual information (nat) between them for an atom."""
SIGNIFICANT = 5.0
"""Least intensity over its standard error of a confirmed atom."""
STRONG, LIKE_OTHERS = 10.0, (0.3, 3.0)
"""The same for a place of which the teachers are not sure, and its intensity over the median of those agreed upon."""
ABSENT = 0.25
"""Share of the median intensity that the fit must exclude (3 standard errors) to refute an unsure place."""
ODD = 6.0
"""Spreads above the median from which on the misfit of an atom's window is odd."""


class Adaptation(Model):
    """How an ensemble is adapted."""

    seed: Count = Field(0, description="of crops, of the frames that each network sees, and of the examination")
    rounds: PositiveInt = Field(2, description="times that frames are labelled anew and learnt")
    steps: PositiveInt = Field(150, description="optimiser steps a network and round")
    batch: PositiveInt = Field(8, description="patches a step, half of them simulated")
    patch_px: PositiveInt = Field(96, multiple_of=8, description="side of a patch")
    learning_rate: Positive = Field(1e-3, description="highest learning rate")
    exam_scenes: PositiveInt = Field(40, description="simulated scenes of the examination")


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
        """Block ``index`` of stream ``seed``, turned or mirrored."""
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(b"own"), index)))
        return self.blocks[rng.integers(len(self.blocks))]

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


def label(image: NDArray[np.float32], pixel_size_nm: tuple[float, float], teachers: AtomFinder) -> Block:
    """What ``teachers`` and the joint fit together hold to be in an image.

    Wanted are atoms on which the teachers agree and that the fit confirms (significant, and its window is explained as
    well as others), or that the fit shows beyond doubt where the teachers are unsure. Nothing is where no teacher sees
    and no residual shows anything, or where the fit excludes an atom of which they are unsure. The rest is doubtful.
    """
    found = teachers.find(image, pixel_size_nm, CANDIDATE, refined=False)
    if not len(found):
        return Block(image, pixel_size_nm, np.zeros((0, 2)), np.zeros(0, dtype=bool))
    fitted = refine.refine(image, found.x_px, found.y_px, pixel_size_nm)
    told = np.pad(found.confidence, (0, fitted.added))  # places that only the residual shows: confidence 0
    agreed = (told >= AGREED) & (np.pad(found.disagreement, (0, fitted.added)) <= DISPUTED)
    sane = ~_odd(image.astype(np.float64), fitted, pixel_size_nm)
    confirmed = (fitted.significance >= SIGNIFICANT) & sane
    sure = agreed & confirmed
    usual = float(np.median(fitted.intensity[sure])) if sure.any() else np.inf
    likely = (fitted.intensity > LIKE_OTHERS[0] * usual) & (fitted.intensity < LIKE_OTHERS[1] * usual)
    sure |= (told > 0) & likely & sane & (fitted.significance >= STRONG)
    absent = ~agreed & (fitted.intensity + 3 * fitted.sigma_intensity < ABSENT * usual) & np.isfinite(usual)
    at = np.stack([fitted.x, fitted.y], 1)
    return Block(image, pixel_size_nm, at[~absent], sure[~absent])


def _odd(image: Floats, fitted: refine.Fit, pixel_nm: tuple[float, float]) -> NDArray[np.bool_]:
    """Columns whose windows are explained worse than most: their mean squared residual over the variance."""
    from scipy.ndimage import convolve

    of = explain(image, Spots(fitted.x, fitted.y, fitted.blur_nm or 0.06, image.shape, pixel_nm))
    reach = [int(np.ceil(GATHER_NM / p)) for p in pixel_nm[::-1]]
    dy, dx = np.mgrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    disc = (np.hypot(dy * pixel_nm[1], dx * pixel_nm[0]) <= GATHER_NM).astype(np.float64)
    misfit = convolve((image - of.expected) ** 2 / of.variance, disc / disc.sum(), mode="nearest")
    rows, cols = (np.clip(a.astype(int), 0, n - 1) for a, n in zip((fitted.y, fitted.x), image.shape, strict=True))
    each = misfit[rows, cols]
    middle = np.median(each)
    return np.asarray(each > middle + ODD * 1.4826 * np.median(abs(each - middle)))
