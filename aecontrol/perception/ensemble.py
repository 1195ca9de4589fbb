"""The networks of a weights file, shipped or a user's own, loaded when they are first needed."""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aecontrol.errors import BadInput

from .views import CLASSES

if TYPE_CHECKING:
    from torch import nn

OUTPUTS = {"atoms": ("atom",), "regions": tuple(CLASSES)}
"""What each kind of network tells, in the order of its channels."""


class Ensemble:
    """Networks of one kind, ready for inference."""

    def __init__(self, kind: Literal["atoms", "regions"], weights: Path | None, device: str) -> None:
        """``weights``: a safetensors file as ``aecontrol train`` writes; None: the shipped one. Raises BadInput when
        the file cannot be read."""
        self._kind, self._device = kind, device
        self._source = str(weights) if weights else "the shipped weights"
        shipped = files(__package__).joinpath(f"weights/{kind}.safetensors")
        try:
            self.data = weights.read_bytes() if weights else shipped.read_bytes()
        except OSError as error:
            raise BadInput(f"{self._source} cannot be read: {error}", f"run `aecontrol train {kind}`") from error

    @property
    def version(self) -> str:
        """Hash of the weights."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def members(self) -> list[nn.Module]:
        """The networks. Raises BadInput when the file holds no such ones."""
        from safetensors import SafetensorError

        from . import nets

        try:
            members, outputs = nets.load(self.data, self._device)
            if outputs != OUTPUTS[self._kind]:
                raise ValueError(f"its outputs are {', '.join(outputs)}")
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"{self._source}: not the weights of this network: {error}", f"run `aecontrol train {self._kind}`"
            ) from error
        return members
