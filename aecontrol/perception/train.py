"""Training of a network: seeded, resumable, one member of an ensemble after the other, whatever it is to learn."""

from __future__ import annotations

import hashlib
import io
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.types import Count, Model, NonNegative, Positive, PositiveInt

from .nets import NetworkKind

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""Inputs [n, channels, side, side], targets [n, outputs, rows, cols] and weights [n, 1, rows, cols]."""
Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps (of all members) and the recent loss."""


class Lessons(Protocol):
    """What is to be learnt."""

    def network(self) -> nn.Module:
        """A new network with torch's present random state."""

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of one step: pure, the same in any process."""

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """What is minimised, a scalar."""

    def fingerprint(self) -> str:
        """Everything that decides what the batches are, as text."""


class Schedule(Model):
    """How networks are trained, whatever they are."""

    seed: Count = Field(0, description="of weights, scenes and crops; member k of an ensemble takes seed + 1000 k")
    members: PositiveInt = Field(1, description="networks of the ensemble, trained one after the other")
    steps: PositiveInt = Field(2000, description="optimiser steps a member")
    batch: PositiveInt = Field(16, description="patches a step")
    learning_rate: Positive = Field(4e-3, description="highest learning rate (AdamW, one cycle)")
    weight_decay: NonNegative = Field(1e-4, description="of AdamW")
    bfloat16: bool = Field(
        True, description="forward passes in bfloat16 where the network bears it (twice as fast where CPU or GPU do)"
    )
    checkpoint_steps: PositiveInt = Field(250, description="steps between two checkpoints, from which training resumes")


class Training(Schedule):
    """How networks that map an image to an image are trained."""

    network: NetworkKind = Field("unet", description="'unet' or 'msdnet'")
    size: PositiveInt = Field(16, description="U-Net: channels at full resolution; MSD-net: layers")
    patch_px: PositiveInt = Field(96, multiple_of=8, description="side of a patch")


def fit(
    config: Schedule,
    lessons: Lessons,
    folder: Path,
    device: str = "cpu",
    progress: Progress | None = None,
    start: Sequence[nn.Module] = (),
) -> list[nn.Module]:
    """Train ``config.members`` networks; ``start``: networks to go on from, in place of new ones.

    Checkpoints go to ``folder``; a training that was interrupted goes on from the last one, with the same result as if
    it had not been (on a CPU: sums run on one thread). Raises BadInput when the checkpoints there are of another
    training.
    """
    import torch

    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)  # sums in a fixed order, hence repeatable
    try:
        return [
            _Member(config, lessons, folder, device, k, start[k] if start else None).run(progress)
            for k in range(config.members)
        ]
    finally:
        torch.set_num_threads(threads)


def forget_checkpoints(folder: Path) -> None:
    """Remove what ``fit`` left in ``folder``; call it once the networks are safely stored."""
    for path in folder.glob("checkpoint-*.pt"):
        path.unlink()


class _Member:
    """One network in training."""

    def __init__(
        self, config: Schedule, lessons: Lessons, folder: Path, device: str, index: int, start: nn.Module | None
    ) -> None:
        import torch

        from . import nets

        self.config, self.lessons, self.device, self.index = config, lessons, device, index
        self.seed = config.seed + 1000 * index
        self.path = folder / f"checkpoint-{index}.pt"
        torch.manual_seed(self.seed)
        self.net = nets.place(start or lessons.network(), device)
        self.mark = hashlib.sha256(
            "|".join((config.model_dump_json(), lessons.fingerprint(), str(index), _digest(self.net))).encode()
        ).hexdigest()
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, config.learning_rate, config.steps, pct_start=0.1
        )

    def run(self, progress: Progress | None) -> nn.Module:
        recent, first = self._resume()
        self.net.train()
        for step in range(first, self.config.steps):
            loss = self._step(step)
            recent = loss if step == 0 else 0.98 * recent + 0.02 * loss
            done = step + 1
            if done % self.config.checkpoint_steps == 0 or done == self.config.steps:
                self._checkpoint(done, recent)
            if progress:
                progress(self.index * self.config.steps + done, self.config.members * self.config.steps, recent)
        return self.net.eval()

    def _step(self, step: int) -> float:
        import torch

        inputs, targets, weights = (torch.from_numpy(a).to(self.device) for a in self.lessons.batch(self.seed, step))
        half = self.config.bfloat16 and bool(self.net.half_precision)
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            logits = self.net(inputs.to(memory_format=torch.channels_last))
        loss = self.lessons.loss(logits.float(), targets, weights)
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        return loss.item()

    def _checkpoint(self, done: int, recent: float) -> None:
        import torch

        state = {
            "mark": self.mark,
            "done": done,
            "recent": recent,
            "net": self.net.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        data = io.BytesIO()
        torch.save(state, data)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_durable(self.path, data.getvalue())

    def _resume(self) -> tuple[float, int]:
        """The recent loss and the next step."""
        import torch

        if not self.path.exists():
            return 0.0, 0
        try:
            state = torch.load(self.path, map_location=self.device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise BadInput(f"{self.path} cannot be read: {error}", "remove it; training starts anew") from error
        if state["mark"] != self.mark:
            raise BadInput(f"{self.path} is of another training", "remove it, or choose another --out")
        self.net.load_state_dict(state["net"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        return float(state["recent"]), int(state["done"])


def _digest(net: nn.Module) -> str:
    """Hash of a network's weights: what training starts from."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tables_of(config: Path) -> dict[str, Any]:
    """The tables [train] and [scenes] of a training's TOML file. Raises BadInput."""
    try:
        table = tomllib.loads(config.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{config}: {error}", "give a TOML file with [train] and [scenes]") from error
    if unknown := set(table) - {"train", "scenes"}:
        raise BadInput(f"{config}: unknown table {sorted(unknown)}", "only [train] and [scenes] are read")
    return table
