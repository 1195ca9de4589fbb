"""What the learned damage metric is taught: the damaged fraction of the patches of simulated pairs of frames."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.perception.train import Batch, Progress, Schedule, fit, forget_checkpoints, tables_of
from aecontrol.registry import build_part, validate
from aecontrol.types import PositiveInt

from .learned import LearnedDamage

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
    pairs: PositiveInt = Field(
        9000, description="different pairs to draw from; one that comes again has new noise (few are learnt by heart)"
    )
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

        estimate, log_sd, any_damage = logits[:, :1], logits[:, 1:2], logits[:, 2:]
        surprise = 0.5 * ((targets - estimate) / log_sd.exp()) ** 2 + log_sd
        entropy = functional.binary_cross_entropy_with_logits(any_damage, (targets > DAMAGED).float())
        likelihood = (weights * log_sd.exp().detach() * surprise).mean()
        total: Tensor = likelihood + entropy
        return total

    def _pair(self, index: int) -> Pair:
        if index not in self._drawn:
            self._drawn[index] = self.scenes.render(self.config.seed, index)
        return self._drawn[index]


def _turned(image: Image, turn: int, mirror: bool) -> Image:
    """The last two axes turned by quarters, then mirrored."""
    out = np.rot90(image, turn, (-2, -1))
    return np.ascontiguousarray(out[..., ::-1] if mirror else out)


def train_from_toml(
    config: Path, out_dir: Path, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Train as the TOML file ``config`` says ([train] and [scenes]); see :func:`train_damage`. Raises BadInput."""
    table = tables_of(config)
    settings = validate(DamageTraining, table.get("train", {}), "train")
    scenes = cast(Scenes, build_part("scenes", table.get("scenes"), "scenes"))
    command = f"aecontrol train damage {config} --out {out_dir}"
    return train_damage(settings, scenes, out_dir, device, progress, command)


def train_damage(
    config: DamageTraining,
    scenes: Scenes,
    out_dir: Path,
    device: str = "cpu",
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and write ``damage.safetensors`` and its card ``damage.json`` to ``out_dir``; goes on from checkpoints
    there. Returns the card. The same configuration gives the same weights on the same machine and library versions."""
    import torch

    from .siamese import Siamese, save

    lessons = DamageLessons(config, scenes)
    net = cast(Siamese, fit(config, lessons, out_dir, device, progress)[0].cpu())
    data = save(net)
    path = out_dir / "damage.safetensors"
    write_durable(path, data)
    card = {
        "model": f"aecontrol damage metric: siamese encoder of {config.size} channels, damaged fraction of patches",
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "command": command,
        "train": config.model_dump(mode="json"),
        "scenes": json.loads(lessons.fingerprint()),
        "libraries": {"torch": torch.__version__, "numpy": np.__version__},
        "metrics": evaluate(LearnedDamage(path, device), scenes, config.seed, config.held_out_scenes),
        "metrics_note": "patches of pairs not trained on, with all nuisances of training, by the counts of the "
        f"brightest pixels; auc, found: patches damaged by more than {DAMAGED:g} against undamaged ones",
    }
    write_durable(out_dir / "damage.json", (json.dumps(card, indent=1) + "\n").encode())
    forget_checkpoints(out_dir)
    return card


def evaluate(metric: LearnedDamage, scenes: Scenes, seed: int, count: int) -> dict[str, dict[str, float]]:
    """On ``count`` pairs of each held-out condition: area under the receiver operating characteristic, share of damaged
    patches beyond 99 % of the undamaged ones, root mean square error of the fraction, mean estimate of undamaged ones,
    and the spread of errors in units of the estimated standard deviation."""
    table = {}
    stream = crc32(HELD_OUT.encode()) + seed
    for name, condition in scenes.held_out().items():
        truth, found, spread = [], [], []
        for index in range(count):
            pair = condition.render(stream, index)
            frames = pair.exposed(np.random.default_rng([stream, index]))
            estimate, sd = metric.estimate(*(frame[None].astype(np.float64) for frame in frames))
            truth.append(pair.fraction.ravel())
            found.append(estimate.ravel())
            spread.append(sd.ravel())
        fraction, guess, sigma = (np.concatenate(parts).astype(np.float64) for parts in (truth, found, spread))
        quiet, hurt = guess[fraction == 0], guess[fraction > DAMAGED]
        table[name] = {
            "auc": round(_area(hurt, quiet), 4),
            "found": round(float((hurt > np.quantile(quiet, 0.99)).mean()), 4),
            "rms_error": round(float(np.sqrt(((guess - fraction) ** 2).mean())), 4),
            "undamaged": round(float(quiet.mean()), 4),
            "error_over_sd": round(float(np.sqrt((((guess - fraction) / sigma) ** 2).mean())), 3),
        }
    return table


def _area(higher: NDArray[np.float64], lower: NDArray[np.float64]) -> float:
    """Chance that one of ``higher`` exceeds one of ``lower``; ties count half."""
    lower = np.sort(lower)
    below = np.searchsorted(lower, higher, "left") + np.searchsorted(lower, higher, "right")
    return float(below.mean() / (2 * len(lower)))
