"""What the region network learns: where the particles, grain boundaries and domain walls of scenes are."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.registry import build_part, validate
from aecontrol.types import PositiveInt

from .learn_atoms import HELD_OUT
from .regions import RegionFinder
from .train import Batch, Progress, Training, fit, forget_checkpoints, tables_of
from .views import CLASSES, PIXEL_NM, View, grid, of_columns, view

if TYPE_CHECKING:
    from torch import Tensor, nn

Mask = NDArray[np.bool_]
RARE_WEIGHT = 2.0
"""Weight of places in a region over those outside: they are fewer."""
UNTOLD = -1.0
"""Target where a scene does not tell."""


class Scene(Protocol):
    """One image and where its regions are: see ``RegionScenes.render``."""

    @property
    def image(self) -> NDArray[np.float32]:
        """[rows, cols]."""

    @property
    def pixel_size_nm(self) -> tuple[float, float]:
        """(x, y), nm."""

    @property
    def regions(self) -> Mapping[str, Callable[[NDArray[np.float64]], Mask]]:
        """Class -> which of the places [..., 2] (x, y; nm from the frame's corner) are in it. All of one view."""


@runtime_checkable
class ColumnScene(Protocol):
    """Found columns and where their regions are: see ``simulators.regions.ColumnScene``."""

    @property
    def xy_nm(self) -> NDArray[np.float64]:
        """[n, 2] from the frame's corner."""

    @property
    def intensity(self) -> NDArray[np.float64]:
        """[n]."""

    @property
    def size_nm(self) -> tuple[float, float]:
        """(width, height) of the frame."""

    @property
    def regions(self) -> Mapping[str, Callable[[NDArray[np.float64]], Mask]]:
        """As of a scene."""


class Scenes(Protocol):
    """Where training images come from (entry-point group ``aecontrol.scenes``)."""

    def render(self, seed: int, index: int) -> Scene | ColumnScene:
        """Scene ``index`` of stream ``seed``: pure, the same in any process."""

    def held_out(self) -> Mapping[str, Scenes]:
        """Named scenes for the model card's metrics."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The settings, for the model card."""


class RegionTraining(Training):
    """[train] of ``aecontrol train regions``."""

    held_out_scenes: PositiveInt = Field(24, description="scenes per held-out condition in the model card")


@dataclass(frozen=True)
class RegionLessons:
    """Region maps of random patches of scenes, each in the view in which its regions are seen."""

    config: Training
    scenes: Scenes
    outputs: Sequence[str] = tuple(CLASSES)

    def fingerprint(self) -> str:
        """The settings of the scenes."""
        return json.dumps(self.scenes.model_dump(mode="json"), sort_keys=True)

    def network(self) -> nn.Module:
        """A new network with torch's present random state."""
        from . import nets

        return nets.create(self.config.network, self.config.size, len(self.outputs))

    def batch(self, seed: int, step: int) -> Batch:
        """Inputs, region maps (UNTOLD where the scene does not tell) and weights of a step."""
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(b"crop"), step)))
        examples = []
        for k in range(self.config.batch):
            seen, targets = lesson(self.scenes.render(seed, step * self.config.batch + k))
            examples.append(_patch(seen.image, targets, self.config.patch_px, rng))
        inputs, maps, weights = (np.stack(arrays) for arrays in zip(*examples, strict=True))
        return inputs[:, None], maps, weights[:, None]

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted cross-entropy and, for each class over the whole batch, the soft Dice loss (1 - overlap)."""
        from torch.nn import functional

        told = weights * (targets != UNTOLD)
        truth = targets.clamp(min=0)
        weight = told * (1 + (RARE_WEIGHT - 1) * truth)
        entropy = functional.binary_cross_entropy_with_logits(logits, truth, weight, reduction="sum") / weight.sum()
        p = logits.sigmoid() * told
        both, either = (p * truth).sum((0, 2, 3)), (p + told * truth).sum((0, 2, 3))
        return entropy + 0.5 * (1 - (2 * both + 1) / (either + 1)).mean()


def lesson(scene: Scene | ColumnScene) -> tuple[View, NDArray[np.float32]]:
    """A scene in the view in which its regions are seen, and the map [classes, h, w] of them.

    Of columns, the view is the one in which their off-centring varies most.
    """
    if isinstance(scene, ColumnScene):
        shape, pixel = grid(scene.size_nm, "columns")
        nothing = View(np.zeros(shape, dtype=np.float32), pixel)
        seen = [*of_columns(scene.xy_nm, scene.intensity, scene.size_nm), nothing][0]
    else:
        scale = next(CLASSES[name] for name in scene.regions)
        seen = view(scene.image.astype(np.float64), scene.pixel_size_nm, scale)
    rows, cols = ((np.arange(n) + 0.5) * p for n, p in zip(seen.image.shape, seen.pixel_yx_nm, strict=True))
    places = np.stack(np.meshgrid(cols, rows), axis=-1)
    maps = np.full((len(CLASSES), *seen.image.shape), UNTOLD, dtype=np.float32)
    for channel, name in enumerate(CLASSES):
        if name in scene.regions:
            maps[channel] = scene.regions[name](places)
    return seen, maps


def _patch(
    image: NDArray[np.float32], maps: NDArray[np.float32], side: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """A random patch of ``side`` px, its maps and weights, padded with zeros (without weight) where the scene ends."""
    top, left = (int(rng.integers(max(1, n - side + 1))) for n in image.shape)
    image, maps = image[top : top + side, left : left + side], maps[:, top : top + side, left : left + side]
    pad = [(0, side - n) for n in image.shape]
    weight = np.pad(np.ones(image.shape, dtype=np.float32), pad)
    return np.pad(image, pad), np.pad(maps, [(0, 0), *pad]), weight


def train_from_toml(
    config: Path, out_dir: Path, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Train as the TOML file ``config`` says ([train] and [scenes]); see :func:`train_regions`. Raises BadInput."""
    table = tables_of(config)
    settings = validate(RegionTraining, table.get("train", {}), "train")
    scenes = cast(Scenes, build_part("scenes", table.get("scenes"), "scenes"))
    return train_regions(
        settings, scenes, out_dir, device, progress, f"aecontrol train regions {config} --out {out_dir}"
    )


def train_regions(
    config: RegionTraining,
    scenes: Scenes,
    out_dir: Path,
    device: str = "cpu",
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and write ``regions.safetensors`` and its card ``regions.json`` to ``out_dir``; goes on from checkpoints
    there. Returns the card."""
    import torch

    from . import nets

    started = time.perf_counter()
    lessons = RegionLessons(config, scenes)
    members = fit(config, lessons, out_dir, device, progress)
    data = nets.save([m.cpu() for m in members], config.network, config.size, lessons.outputs)
    path = out_dir / "regions.safetensors"
    write_durable(path, data)
    card = {
        "model": f"aecontrol region finder: {', '.join(CLASSES)}; {config.network}, {config.members} members",
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": sum(p.numel() for p in members[0].parameters()),
        "pixel_nm": dict(PIXEL_NM),
        "command": command,
        "train": config.model_dump(mode="json"),
        "scenes": json.loads(lessons.fingerprint()),
        "training_seconds": round(time.perf_counter() - started, 1),
        "libraries": {"torch": torch.__version__, "numpy": np.__version__},
        "metrics": evaluate(RegionFinder(path, device), scenes, config.seed, config.held_out_scenes),
        "metrics_note": "pixels of the views; all regions found, of any size; scenes unseen in training",
    }
    write_durable(out_dir / "regions.json", (json.dumps(card, indent=1) + "\n").encode())
    forget_checkpoints(out_dir)
    return card


def evaluate(finder: RegionFinder, scenes: Scenes, seed: int, count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Precision, recall and IoU by pixels of each class that ``count`` scenes of each held-out condition tell of."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    stream = crc32(HELD_OUT.encode()) + seed
    for name, condition in scenes.held_out().items():
        counts = {kind: np.zeros(3) for kind in CLASSES}
        for index in range(count):
            scene = condition.render(stream, index)
            seen, truth = lesson(scene)
            for channel, kind in enumerate(CLASSES):
                if kind in scene.regions:
                    found = finder.outlined(kind, [seen], (1.0, 1.0))[0].labels > 0
                    there = truth[channel] > 0
                    counts[kind] += [(found & there).sum(), found.sum(), there.sum()]
        table[name] = {kind: _rates(*values) for kind, values in counts.items() if values.any()}
    return table


def _rates(both: float, found: float, there: float) -> dict[str, float]:
    """Of counts of pixels; 0 where nothing is found or there."""
    return {
        "precision": round(float(both / max(found, 1)), 4),
        "recall": round(float(both / max(there, 1)), 4),
        "iou": round(float(both / max(found + there - both, 1)), 4),
    }
