"""What the learned damage metric is taught: the damaged fraction of the patches of simulated pairs of frames."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.perception.train import Batch, Progress, Schedule, fit, forget_checkpoints
from aecontrol.registry import build_part, validate
from aecontrol.types import PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn

DAMAGED = 0.02
"""Patches of which more than this fraction is damaged count as damaged where the question is yes or no."""
HELD_OUT = "held-out"

Image = NDArray[np.float32]


class Pair(Protocol):
    """Two frames of one place before noise: see ``simulators.damage_scenes.DamagePair``."""

    @property
    def fraction(self) -> Image:
        """Damaged fraction [rows, cols] of the patches."""

    def exposed(self, rng: np.random.Generator) -> tuple[Image, Image]:
        """Both frames [h, w] with noise."""


class Scenes(Protocol):
    """Where pairs come from (entry-point group ``aecontrol.scenes``)."""

    def render(self, seed: int, index: int) -> Pair:
        """Pair ``index`` of stream ``seed``: pure, the same in any process."""

    def held_out(self) -> Mapping[str, Scenes]:
        """Named scenes for the model card's metrics."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The settings, for the model card."""


class DamageTraining(Schedule):
    """[train] of ``aecontrol train damage``."""

    size: PositiveInt = Field(32, multiple_of=32, description="channels of an embedding")
    pairs: PositiveInt = Field(4096, description="different pairs; each is shown again and again, with new noise")
    held_out_scenes: PositiveInt = Field(40, description="pairs per held-out condition in the model card")


@dataclass(frozen=True)
class DamageLessons:
    """Noisy pairs, turned and mirrored, and the damaged fraction of their patches."""

    config: DamageTraining
    scenes: Scenes
    _drawn: dict[int, Pair] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """The settings of the scenes."""
        return json.dumps(self.scenes.model_dump(mode="json"), sort_keys=True)

    def network(self) -> nn.Module:
        """A new network with torch's present random state."""
        from .siamese import Siamese

        return Siamese(self.config.size)

    def batch(self, seed: int, step: int) -> Batch:
        """Pairs [n, 2, h, w], fractions and weights [n, 1, rows, cols] of a step."""
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(b"damage batch"), step)))
        inputs, targets = [], []
        for index in rng.integers(self.config.pairs, size=self.config.batch):
            pair = self._pair(int(index))
            turn, mirror = int(rng.integers(4)), bool(rng.integers(2))
            frames = np.stack(pair.exposed(rng))
            inputs.append(_turned(frames, turn, mirror))
            targets.append(_turned(pair.fraction[None], turn, mirror))
        fractions = np.stack(targets)
        return np.stack(inputs), fractions, np.ones_like(fractions)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Gaussian likelihood of the fraction, weighted by the estimated standard deviation so that hard patches are
        not given up (M. Seitzer et al., ICLR 2022), and the cross-entropy of damage at all."""
        from torch.nn import functional

        estimate, log_sd, any_damage = logits.split(1, 1)
        surprise = 0.5 * ((targets - estimate) / log_sd.exp()) ** 2 + log_sd
        entropy = functional.binary_cross_entropy_with_logits(any_damage, (targets > DAMAGED).float())
        return (weights * log_sd.exp().detach() * surprise).mean() + entropy

    def _pair(self, index: int) -> Pair:
        if index not in self._drawn:
            self._drawn[index] = self.scenes.render(self.config.seed, index)
        return self._drawn[index]


def _turned(image: Image, turn: int, mirror: bool) -> Image:
    """The last two axes turned by quarters, then mirrored."""
    out = np.rot90(image, turn, (-2, -1))
    return np.ascontiguousarray(out[..., ::-1] if mirror else out)
