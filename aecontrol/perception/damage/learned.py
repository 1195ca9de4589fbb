"""The learned metric, ready for use: the network of a weights file, read on whole frames."""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

if TYPE_CHECKING:
    from .siamese import Siamese

Floats = NDArray[np.float64]


class Frames(Protocol):
    """Two registered frames: see ``pair.Pair``."""

    @property
    def first(self) -> Floats:
        """[rows, cols]."""

    @property
    def later(self) -> Floats:
        """[rows, cols]."""


class LearnedDamage:
    """Estimates the damaged fraction of every patch."""

    def __init__(self, weights: Path | None = None, device: str = "cpu") -> None:
        """``weights``: a file as ``aecontrol train damage`` writes; None: the shipped one. Raises BadInput when it
        cannot be read."""
        self._device = device
        self._source = str(weights) if weights else "the shipped weights"
        shipped = files("aecontrol.perception").joinpath("weights/damage.safetensors")
        try:
            self._data = weights.read_bytes() if weights else shipped.read_bytes()
        except OSError as error:
            raise BadInput(f"{self._source} cannot be read: {error}", "run `aecontrol train damage`") from error

    @property
    def sha256(self) -> str:
        """Of the weights file."""
        return hashlib.sha256(self._data).hexdigest()

    def __call__(self, pair: Frames) -> Floats:
        """Estimated damaged fraction [rows, cols] of the patches of a pair, which may be in any units."""
        return np.asarray(self.estimate(pair.first[None], pair.later[None])[0][0])

    def estimate(self, first: Floats, later: Floats) -> tuple[Floats, Floats]:
        """Damaged fraction of the patches of n pairs of frames [n, h, w], and its standard deviation, both
        [n, rows, cols]."""
        import torch

        from .siamese import PATCH_PX

        rows, cols = (side // PATCH_PX * PATCH_PX for side in first.shape[1:])
        pair = torch.stack([torch.from_numpy(f[:, :rows, :cols].astype(np.float32)) for f in (first, later)], 1)
        with torch.inference_mode(), torch.autocast(self._device, torch.bfloat16):
            out = np.asarray(self.network(pair.to(self._device)).cpu().numpy(), dtype=np.float64)
        return out[:, 0], np.asarray(np.exp(out[:, 1]), dtype=np.float64)

    @cached_property
    def network(self) -> Siamese:
        """The network, for inference. Raises BadInput when the file holds no such one."""
        from safetensors import SafetensorError

        from .siamese import load

        try:
            return load(self._data, self._device)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"{self._source}: not the weights of this network: {error}", "run `aecontrol train damage`"
            ) from error
