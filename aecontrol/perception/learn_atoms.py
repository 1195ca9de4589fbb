"""What the atom finder learns: heat maps of the atoms of scenes, simulated or labelled; and the card of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.registry import build_part, validate
from aecontrol.types import PositiveInt

from . import sampling
from .finder import HEAT_SIGMA_NM, AtomFinder
from .train import Batch, Progress, Training, fit, forget_checkpoints, tables_of

if TYPE_CHECKING:
    from torch import Tensor, nn

Floats = NDArray[np.float64]

RIM_NM = 0.2
"""Held-out atoms this close to the frame's rim are not judged."""
SPARSE = 0.05
"""Mean heat below which patches are no longer weighted up (a choice)."""
HELD_OUT = "held-out"


class Scene(Protocol):
    """One image and what is in it: see ``Scenes.render``."""

    @property
    def image(self) -> NDArray[np.float32]:
        """[rows, cols]."""

    @property
    def pixel_size_nm(self) -> tuple[float, float]:
        """(x, y), nm."""

    @property
    def positions_px(self) -> Floats:
        """[n, 2] (x, y) of all atoms, centre of pixel [0, 0] at (0.5, 0.5); those just outside the frame too."""

    @property
    def wanted(self) -> NDArray[np.bool_]:
        """[n] True for an atom that is to be found; False where finding and missing it are both right (too faint)."""


class Scenes(Protocol):
    """Where training images come from (entry-point group ``aecontrol.scenes``)."""

    @property
    def gate_nm(self) -> float:
        """A find this near to an atom is right."""

    def render(self, seed: int, index: int) -> Scene:
        """Scene ``index`` of stream ``seed``: pure, the same in any process. Does not block for long."""

    def held_out(self) -> Mapping[str, Scenes]:
        """Named scenes for the model card's metrics."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The settings, for the model card."""


class AtomTraining(Training):
    """[train] of ``aecontrol train atoms``."""

    held_out_scenes: PositiveInt = Field(12, description="scenes per held-out condition in the model card")


@dataclass(frozen=True)
class Source:
    """Scenes, their share of the patches, and the part of the training after which they take part: scenes that are few
    (labelled by hand) come late, when the network knows what an atom is, and cannot be learnt by heart."""

    scenes: Scenes
    share: float = 1.0
    after: float = 0.0


@dataclass(frozen=True)
class AtomLessons:
    """Heat maps of the atoms in random patches of scenes, each source with its share of them."""

    config: Training
    sources: tuple[Source, ...]
    outputs: Sequence[str] = ("atom",)

    def fingerprint(self) -> str:
        """The settings of all sources."""
        return json.dumps([(s.share, s.after, s.scenes.model_dump(mode="json")) for s in self.sources], sort_keys=True)

    def network(self) -> nn.Module:
        """A new network with torch's present random state."""
        from . import nets

        return nets.create(self.config.network, self.config.size, len(self.outputs))

    def batch(self, seed: int, step: int) -> Batch:
        """Inputs, heat maps and weights of a step. Every fourth step has many small patches: small sub-scans, whose
        normalisation and rims differ, must be read as well as large ones."""
        config = self.config
        side, parts = (config.patch_px // 8 * 4, 4) if step % 4 == 3 else (config.patch_px, 1)
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(b"crop"), step)))
        shares = np.cumsum([s.share if step >= s.after * config.steps else 0.0 for s in self.sources])
        examples = []
        for k in range(config.batch):
            source = self.sources[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
            scene = source.scenes.render(seed, step * config.batch + k)
            whole = sampling.resample(scene.image, scene.pixel_size_nm)
            examples += [crop(scene, whole, side, rng, own_statistics=parts > 1) for _ in range(parts)]
        inputs, heats, weights = (np.stack(arrays)[:, None] for arrays in zip(*examples, strict=True))
        return inputs, heats, weights

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy with the heat; sparse patches weigh more: else the dense lattices' unavoidable loss drowns the
        isolated atoms."""
        from torch.nn import functional

        rarity = weights / (targets.mean((1, 2, 3), keepdim=True) + SPARSE)
        return functional.binary_cross_entropy_with_logits(logits, targets, rarity / rarity.mean())


def train_from_toml(
    config: Path, out_dir: Path, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Train as the TOML file ``config`` says ([train] and one or more [[scenes]] with their share of the patches);
    see :func:`train_atoms`. Raises BadInput."""
    table = tables_of(config)
    settings = validate(AtomTraining, table.get("train", {}), "train")
    tables = table.get("scenes")
    if not isinstance(tables, list) or not tables:
        raise BadInput(f"{config}: no [[scenes]]", "add [[scenes]] with kind and share")
    sources = tuple(_source(entry, f"scenes.{k}") for k, entry in enumerate(tables))
    command = f"aecontrol train atoms {config} --out {out_dir}"
    return train_atoms(settings, sources, out_dir, device, progress, command=command)


def _source(table: Any, where: str) -> Source:
    numbers = {"share": 1.0, "after": 0.0}
    if isinstance(table, dict):
        numbers = {key: table.pop(key, value) for key, value in numbers.items()}
    for key, value in numbers.items():
        if not isinstance(value, int | float) or not (value > 0 if key == "share" else 0 <= value < 1):
            raise BadInput(f"{where}.{key} = {value!r}", "share is positive; after is from 0 to below 1")
    return Source(cast(Scenes, build_part("scenes", table, where)), **numbers)


def train_atoms(
    config: AtomTraining,
    sources: Sequence[Source],
    out_dir: Path,
    device: str = "cpu",
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and write ``atoms.safetensors`` and its card ``atoms.json`` to ``out_dir``; goes on from checkpoints there.

    Returns the card. The same configuration gives the same weights on the same machine and library versions.
    """
    import torch

    from . import nets

    lessons = AtomLessons(config, tuple(sources))
    members = fit(config, lessons, out_dir, device, progress)
    data = nets.save([m.cpu() for m in members], config.network, config.size, lessons.outputs)
    path = out_dir / "atoms.safetensors"
    write_durable(path, data)
    finder = AtomFinder(path, device)
    card = {
        "model": f"aecontrol atom finder: heat maps of atom centres, {config.network}, {config.members} members",
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": sum(p.numel() for p in members[0].parameters()),
        "command": command,
        "train": config.model_dump(mode="json"),
        "scenes": json.loads(lessons.fingerprint()),
        "libraries": {"torch": torch.__version__, "numpy": np.__version__},
        "metrics": {
            name: metrics
            for source in sources
            for name, metrics in evaluate(finder, source.scenes, config.seed, config.held_out_scenes).items()
        },
        "metrics_note": f"threshold 0.5, gate 0.05 nm (hand labels: 0.2 nm), rim of {RIM_NM} nm left out, scenes not "
        "trained on",
    }
    write_durable(out_dir / "atoms.json", (json.dumps(card, indent=1) + "\n").encode())
    forget_checkpoints(out_dir)
    return card


def crop(
    scene: Scene, whole: sampling.Resampled, side: int, rng: np.random.Generator, own_statistics: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """A random patch, its heat map and weights [side, side], padded with zeros (the local mean; no weight) where the
    scene is smaller.

    ``own_statistics``: normalised by the patch alone, as a sub-scan of that size would be.
    """
    rows, cols = whole.image.shape
    top, left = (int(rng.integers(max(1, length - side + 1))) for length in (rows, cols))
    patch = whole.image[top : top + side, left : left + side]
    pixel = (scene.pixel_size_nm[1] * whole.scale[0], scene.pixel_size_nm[0] * whole.scale[1])
    if own_statistics:
        patch = sampling.normalise(patch.astype(np.float64), pixel)
    at = scene.positions_px / [whole.scale[1], whole.scale[0]] - [left, top]
    heat = heat_map(at[scene.wanted], patch.shape, pixel)
    weight = 1 - heat_map(at[~scene.wanted], patch.shape, pixel) * (1 - heat)
    pad = [(0, side - length) for length in patch.shape]
    return np.pad(patch, pad), np.pad(heat, pad), np.pad(weight, pad)


def heat_map(at: Floats, shape: tuple[int, ...], pixel_yx_nm: tuple[float, float]) -> NDArray[np.float32]:
    """Gaussians of unit height and width ``HEAT_SIGMA_NM`` at ``at`` [n, 2] (x, y) pixels, at most 1."""

    def profile(positions: Floats, length: int, pixel: float) -> Floats:
        distance = (np.arange(length) + 0.5 - positions[:, None]) * (pixel / HEAT_SIGMA_NM)
        return np.asarray(np.exp(-0.5 * distance**2))

    heat = profile(at[:, 1], shape[0], pixel_yx_nm[0]).T @ profile(at[:, 0], shape[1], pixel_yx_nm[1])
    return np.minimum(heat, 1.0).astype(np.float32)


def evaluate(finder: AtomFinder, scenes: Scenes, seed: int, count: int) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and position RMS (nm, per axis) on ``count`` scenes of each held-out condition."""
    table = {}
    stream = crc32(HELD_OUT.encode()) + seed  # training draws from stream ``seed`` itself
    for name, condition in scenes.held_out().items():
        hits, found, there, squares = 0, 0, 0, 0.0
        for index in range(count):
            scene = condition.render(stream, index)
            pixel = np.array(scene.pixel_size_nm)
            size = np.array(scene.image.shape[::-1]) * pixel
            got = finder.find(scene.image, scene.pixel_size_nm)
            at = np.stack([got.x_px, got.y_px], 1) * pixel
            result = match(at, scene.positions_px * pixel, size, condition.gate_nm, scene.wanted)
            hits, found, there = hits + result[0], found + result[1], there + result[2]
            squares += result[3]
        precision, recall = hits / max(found, 1), hits / max(there, 1)
        table[name] = {
            "precision": round(precision, 4),
            "recall": round(recall, 4),
            "f1": round(2 * hits / max(found + there, 1), 4),
            "rms_nm": round(float(np.sqrt(squares / max(2 * hits, 1))), 5),
        }
    return table


def match(
    found: Floats, truth: Floats, size_nm: Floats, gate_nm: float, wanted: NDArray[np.bool_] | None = None
) -> tuple[int, int, int, float]:
    """Matches, judged finds, judged truths and summed squared distance, positions (x, y) in nm.

    One-to-one assignment within ``gate_nm`` (Hungarian). A pair or a single is judged when its truth, or else its
    find, is further than ``RIM_NM`` from the rim; a pair with a truth that is not ``wanted`` [n] is not judged.
    """
    from scipy.optimize import linear_sum_assignment

    def inner(p: Floats) -> NDArray[np.bool_]:
        return np.asarray(np.all((p > RIM_NM) & (p < size_nm - RIM_NM), axis=1))

    asked = inner(truth) if wanted is None else inner(truth) & wanted
    distance = np.hypot(*(found[:, None] - truth[None]).transpose(2, 0, 1))
    i, j = linear_sum_assignment(np.minimum(distance, 2 * gate_nm))
    close = distance[i, j] <= gate_nm
    i, j = i[close], j[close]
    judged = asked[j]
    alone = np.setdiff1d(np.arange(len(found)), i)
    hits = int(judged.sum())
    squares = float((distance[i, j][judged] ** 2).sum())
    return hits, hits + int(inner(found[alone]).sum()), int(asked.sum()), squares
