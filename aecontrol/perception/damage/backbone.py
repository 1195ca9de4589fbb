"""What the feature metrics need of a network: its features at five scales, where they lie, and which weights it has.

Layer k has one feature vector for 2^(k+1) px of the image in either direction: ``layer 4`` of ResNet-18 is the one that
the published metric pools, the early ones see columns rather than things.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aecontrol.errors import BadInput

RANDOM_CONTROL_SEED = 20


@dataclass(frozen=True)
class Backbone:
    """A network cut at its scales. ``stages``: layer k is what stages 0 to k give, one after the other;
    ``centres_px``: where in the image, in px from its edge, the field of the first feature of layer k is centred;
    ``sha256`` of the weights."""

    stages: nn.Sequential
    centres_px: tuple[float, ...]
    sha256: str


def stride_px(layer: int) -> int:
    """Distance of two features of ``layer``."""
    return int(2 ** (layer + 1))


def read_trained(path: Path, sha256: str, net: nn.Module, name: str) -> str:
    """Load the published weights of ``net`` from ``path`` and tell their whole sha256. ``sha256``: what it must begin
    with. Raises BadInput for a file that cannot be read or is another one, and tells what it is as far as that shows
    (random weights pass for trained ones on more than one package index)."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"{name}: the weights {path} cannot be read: {error}", "check the path") from error
    if not found.startswith(sha256):
        raise BadInput(
            f"{name}: {path} is {_what_it_is(path, net)}; its sha256 is {found[:16]}..., not {sha256[:16]}...",
            "get the published file again, or ask for weights = 'random-control' if a control is wanted",
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    # files that are older than the counters of batches lack these, which inference does not use
    missing, foreign = net.load_state_dict(state, strict=False)
    if foreign or any(not key.endswith("num_batches_tracked") for key in missing):
        raise BadInput(f"{name}: {path} holds other tensors: {(*missing, *foreign)[:3]}", "get the published file")
    return found


def _what_it_is(path: Path, net: nn.Module) -> str:
    """A file with a wrong hash, in words."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    except Exception:  # whatever a foreign file makes the reader raise, it is not this
        return "no file of weights"
    wanted = {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    if shapes != wanted:
        return "of another network"
    return "not trained (all statistics of its normalisations are 0 and 1)" if untrained(state) else "trained otherwise"


def untrained(state: dict[str, Tensor]) -> bool:
    """Whether all running means are 0 and all variances 1, exactly: no image ever went through this network."""
    means = [value for key, value in state.items() if key.endswith("running_mean")]
    variances = [value for key, value in state.items() if key.endswith("running_var")]
    return not any(bool(m.any()) for m in means) and all(bool((v == 1).all()) for v in variances)


def randomise(net: nn.Module) -> str:
    """Give ``net`` the weights of the random control and tell their sha256: convolutions uniform with the variance
    2 / fan-in (K. He et al., ICCV 2015, doi:10.1109/ICCV.2015.123), normalisations the identity, biases 0.

    The same on every machine: uniform draws need no functions whose last digit libraries differ in.
    """
    rng = np.random.default_rng(RANDOM_CONTROL_SEED)
    digest = hashlib.sha256()
    state = net.state_dict()
    for key, value in state.items():
        if value.ndim >= 2:
            bound = np.sqrt(6.0 / np.prod(value.shape[1:]))
            value.copy_(torch.from_numpy(rng.uniform(-bound, bound, tuple(value.shape)).astype(np.float32)))
        else:
            value.fill_(1 if key.endswith(("running_var", "weight")) else 0)
        digest.update(key.encode() + value.numpy().tobytes())
    net.load_state_dict(state)
    return digest.hexdigest()


def fold(parent: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold normalisations of ``parent`` into the convolutions before them (inference only); both by name."""
    for conv, norm in pairs:
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, nn.Identity())
