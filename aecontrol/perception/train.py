"""Training of the atom-finding network on simulated scenes, and the model card that goes with the weights."""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.registry import build_part, validate
from aecontrol.types import Count, Model, Positive, PositiveInt

from . import sampling
from .finder import HEAT_SIGMA_NM, AtomFinder

if TYPE_CHECKING:
    from .unet import UNet

Floats = NDArray[np.float64]
Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the recent loss."""

RIM_NM = 0.2
"""Held-out atoms this close to the frame's rim are not judged."""
SPARSE = 0.05
"""Mean heat below which patches are no longer weighted up (a choice)."""
HELD_OUT = "held-out"


class Scene(Protocol):
    """One simulated image and what is in it: see ``Scenes.render``."""

    @property
    def image(self) -> NDArray[np.float32]:
        """[rows, cols]."""

    @property
    def pixel_size_nm(self) -> tuple[float, float]:
        """(x, y), nm."""

    @property
    def positions_px(self) -> Floats:
        """[n, 2] (x, y) of all atoms, centre of pixel [0, 0] at (0.5, 0.5); those just outside the frame too."""


class Scenes(Protocol):
    """Where training images come from (entry-point group ``aecontrol.scenes``)."""

    def render(self, seed: int, index: int) -> Scene:
        """Scene ``index`` of stream ``seed``: pure, the same in any process. Does not block for long."""

    def held_out(self) -> Mapping[str, Scenes]:
        """Named scenes for the model card's metrics."""

    def model_dump(self, *, mode: Literal["json"]) -> dict[str, Any]:
        """The settings, for the model card."""


class TrainAtoms(Model):
    """[train]: how the network is trained."""

    seed: Count = Field(0, description="of weights, scenes and crops")
    steps: PositiveInt = Field(2000, description="optimiser steps")
    batch: PositiveInt = Field(16, description="patches a step")
    patch_px: PositiveInt = Field(96, multiple_of=4, description="side of a patch")
    width: PositiveInt = Field(16, description="channels at full resolution")
    learning_rate: Positive = Field(4e-3, description="highest learning rate (AdamW, one cycle)")
    held_out_scenes: PositiveInt = Field(12, description="scenes per held-out condition in the model card")


def train_from_toml(config: Path, out_dir: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train as the TOML file ``config`` says ([train] and [scenes]); see :func:`train_atoms`. Raises BadInput."""
    try:
        table = tomllib.loads(config.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{config}: {error}", "give a TOML file with [train] and [scenes]") from error
    if unknown := set(table) - {"train", "scenes"}:
        raise BadInput(f"{config}: unknown table {sorted(unknown)}", "only [train] and [scenes] are read")
    settings = validate(TrainAtoms, table.get("train", {}), "train")
    scenes = cast(Scenes, build_part("scenes", table.get("scenes"), "scenes"))
    return train_atoms(settings, scenes, out_dir, progress, command=f"aecontrol train atoms {config} --out {out_dir}")


def train_atoms(
    config: TrainAtoms, scenes: Scenes, out_dir: Path, progress: Progress | None = None, command: str = ""
) -> dict[str, Any]:
    """Train on one CPU thread and write ``atoms.safetensors`` and its card ``atoms.json`` to ``out_dir``.

    Returns the card. The same configuration gives the same weights on the same machine and library versions.
    """
    import torch
    from safetensors.torch import save

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in a fixed order, hence repeatable
    started = time.perf_counter()
    try:
        net = _fit(config, scenes, progress)
    finally:
        torch.set_num_threads(threads)
    data = save({name: tensor.contiguous() for name, tensor in net.state_dict().items()})
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "atoms.safetensors"
    write_durable(path, data)
    card = {
        "model": "aecontrol atom finder, U-Net heat map of atom centres",
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "command": command,
        "train": config.model_dump(mode="json"),
        "scenes": scenes.model_dump(mode="json"),
        "training_seconds": round(time.perf_counter() - started, 1),
        "libraries": {"torch": torch.__version__, "numpy": np.__version__},
        "metrics": evaluate(AtomFinder(path), scenes, config.seed, config.held_out_scenes),
        "metrics_note": f"threshold 0.5, gate 0.05 nm, rim of {RIM_NM} nm left out, scenes unseen in training",
    }
    write_durable(out_dir / "atoms.json", (json.dumps(card, indent=1) + "\n").encode())
    return card


def _fit(config: TrainAtoms, scenes: Scenes, progress: Progress | None) -> UNet:
    import torch
    from torch.nn import functional

    from .unet import UNet, place

    torch.manual_seed(config.seed)
    net = place(UNet(config.width), "cpu")
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, config.steps, pct_start=0.1)
    recent = 0.0
    net.train()
    for step in range(config.steps):
        inputs, targets = _batch(config, scenes, step)
        logits = net(torch.from_numpy(inputs).to(memory_format=torch.channels_last))
        heat = torch.from_numpy(targets)
        # sparse patches weigh more: else the dense lattices' unavoidable loss drowns the isolated atoms
        weight = 1 / (heat.mean((1, 2, 3), keepdim=True) + SPARSE)
        loss = functional.binary_cross_entropy_with_logits(logits, heat, weight / weight.mean())
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if progress:
            progress(step + 1, config.steps, recent)
    net.eval()
    return net


def _batch(config: TrainAtoms, scenes: Scenes, step: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inputs and heat maps [n, 1, side, side] of a step. Every fourth step has many small patches: small sub-scans,
    whose normalisation and rims differ, must be read as well as large ones."""
    side, parts = (config.patch_px // 8 * 4, 4) if step % 4 == 3 else (config.patch_px, 1)
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(crc32(b"crop"), step)))
    inputs, targets = [], []
    for k in range(config.batch):
        scene = scenes.render(config.seed, step * config.batch + k)
        whole = sampling.resample(scene.image, scene.pixel_size_nm)
        for _ in range(parts):
            x, y = _crop(scene, whole, side, rng, own_statistics=parts > 1)
            inputs.append(x)
            targets.append(y)
    return np.stack(inputs)[:, None], np.stack(targets)[:, None]


def _crop(
    scene: Scene, whole: sampling.Resampled, side: int, rng: np.random.Generator, own_statistics: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A random patch and its heat map, padded with zeros (the local mean) where the scene is smaller.

    ``own_statistics``: normalised by the patch alone, as a sub-scan of that size would be.
    """
    rows, cols = whole.image.shape
    top, left = (int(rng.integers(max(1, length - side + 1))) for length in (rows, cols))
    patch = whole.image[top : top + side, left : left + side]
    pixel = (scene.pixel_size_nm[1] * whole.scale[0], scene.pixel_size_nm[0] * whole.scale[1])
    if own_statistics:
        patch = sampling.normalise(patch.astype(np.float64), pixel)
    at = scene.positions_px / [whole.scale[1], whole.scale[0]] - [left, top]
    heat = _heat(at, patch.shape, pixel)
    pad = [(0, side - length) for length in patch.shape]
    return np.pad(patch, pad), np.pad(heat, pad)


def _heat(at: Floats, shape: tuple[int, ...], pixel_yx_nm: tuple[float, float]) -> NDArray[np.float32]:
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
            result = match(np.stack([got.x_px, got.y_px], 1) * pixel, scene.positions_px * pixel, size, gate_nm=0.05)
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


def match(found: Floats, truth: Floats, size_nm: Floats, gate_nm: float) -> tuple[int, int, int, float]:
    """Matches, judged finds, judged truths and summed squared distance, positions (x, y) in nm.

    One-to-one assignment within ``gate_nm`` (Hungarian). A pair or a single is judged when its truth, or else its
    find, is further than ``RIM_NM`` from the rim.
    """
    from scipy.optimize import linear_sum_assignment

    def inner(p: Floats) -> NDArray[np.bool_]:
        return np.asarray(np.all((p > RIM_NM) & (p < size_nm - RIM_NM), axis=1))

    distance = np.hypot(*(found[:, None] - truth[None]).transpose(2, 0, 1))
    i, j = linear_sum_assignment(np.minimum(distance, 2 * gate_nm))
    close = distance[i, j] <= gate_nm
    i, j = i[close], j[close]
    judged = inner(truth[j])
    alone = np.setdiff1d(np.arange(len(found)), i)
    hits = int(judged.sum())
    squares = float((distance[i, j][judged] ** 2).sum())
    return hits, hits + int(inner(found[alone]).sum()), int(inner(truth).sum()), squares
