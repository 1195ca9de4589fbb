"""The networks, small enough for one CPU thread: a three-level U-Net and a mixed-scale dense network; one interface.

Images come in normalised (see ``sampling``), [n, 1, h, w]; logits [n, outputs, h, w] go out, one channel a class, each
to be read through a sigmoid. ``multiple``: both sides must be multiples of it; ``reach_px``: a logit depends on the
image no farther than this from its pixel.

Batch normalisation, not group normalisation: at inference it is a fixed affine map that is folded into the
convolutions, so the output at a pixel depends on its receptive field only (a window and the same place in a large frame
give the same answer) and costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

NetworkKind = Literal["unet", "msdnet"]
BASE_RATE_LOGIT = -3.0
"""First output of a new network: what is looked for is rare."""


class Network(Protocol):
    """What the callers need of a network beyond being a module."""

    multiple: int
    reach_px: int
    half_precision: bool
    """Whether it can be trained in bfloat16."""

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [n, outputs, h, w] of images [n, 1, h, w]."""


class _Block(nn.Module):
    """3x3 convolution, normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)), inplace=True)

    def fuse(self) -> None:
        """Fold the normalisation into the convolution (inference only)."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class _FixedNorm(nn.BatchNorm2d):
    """Normalisation that keeps the statistics it has: a few hundred patches of one session must not replace them."""

    def train(self, mode: bool = True) -> _FixedNorm:
        """Stay as in inference."""
        super().train(False)
        return self


class UNet(nn.Module):
    """Three levels with additive skips (after O. Ronneberger et al., MICCAI 2015, doi:10.1007/978-3-319-24574-4_28);
    ``size``: channels at full resolution."""

    multiple = 4
    reach_px = 52
    half_precision = True

    def __init__(self, size: int = 16, outputs: int = 1) -> None:
        super().__init__()
        a, b, c = size, 2 * size, 4 * size
        self.down1 = nn.Sequential(_Block(1, a), _Block(a, a))
        self.down2 = nn.Sequential(_Block(a, b, stride=2), _Block(b, b))
        wide = [_Block(c, c, dilation=d) for d in (2, 4, 2, 1)]  # reach enough to see a lattice through the noise
        self.bottom = nn.Sequential(_Block(b, c, stride=2), *wide)
        self.from3 = nn.Conv2d(c, b, 1)
        self.up2 = nn.Sequential(_Block(b, b), _Block(b, b))
        self.from2 = nn.Conv2d(b, a, 1)
        self.up1 = _Block(a, a)
        self.head = nn.Conv2d(a, outputs, 1)
        _start_rare(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; see the module."""
        fine = self.down1(x)
        half = self.down2(fine)
        quarter = self.bottom(half)
        half = self.up2(half + _double(self.from3(quarter)))
        fine = self.up1(fine + _double(self.from2(half)))
        logits: Tensor = self.head(fine)
        return logits


class MSDNet(nn.Module):
    """Mixed-scale dense network (D. M. Pelt and J. A. Sethian, PNAS 115, 254 (2018), doi:10.1073/pnas.1715832114):
    every layer adds one channel, made by a dilated 3x3 convolution of all channels before it; no normalisation.
    ``size``: number of layers; their dilations run through 1 to 10."""

    multiple = 1
    half_precision = False  # gradients of dilated convolutions to one channel come out NaN on CPUs (torch 2.13)

    def __init__(self, size: int = 30, outputs: int = 1) -> None:
        super().__init__()
        dilations = [k % 10 + 1 for k in range(size)]
        self.reach_px = sum(dilations)
        self.layers = nn.ModuleList(nn.Conv2d(k + 1, 1, 3, padding=d, dilation=d) for k, d in enumerate(dilations))
        for k, layer in enumerate(self.layers):  # the paper's start: variance kept by the widest layer
            nn.init.normal_(layer.get_parameter("weight"), std=(2 / (9 * (k + 1) + outputs)) ** 0.5)
            nn.init.zeros_(layer.get_parameter("bias"))
        self.head = nn.Conv2d(size + 1, outputs, 1)
        _start_rare(self.head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; see the module."""
        for layer in self.layers:
            x = torch.cat([x, functional.relu(layer(x))], 1)
        logits: Tensor = self.head(x)
        return logits


def _start_rare(head: nn.Conv2d) -> None:
    with torch.no_grad():
        head.weight.mul_(0.1)
        head.get_parameter("bias").fill_(BASE_RATE_LOGIT)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def create(kind: NetworkKind, size: int, outputs: int) -> nn.Module:
    """A new network with torch's present random state."""
    return {"unet": UNet, "msdnet": MSDNet}[kind](size, outputs)


def place(net: nn.Module, device: str) -> nn.Module:
    """The network on ``device``, channels last in memory, which is the faster layout on CPUs and tensor cores."""
    net.to(torch.device(device))
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return net


def for_inference(net: nn.Module) -> nn.Module:
    """Itself with every normalisation folded away (not trainable afterwards)."""
    net.eval()
    for module in net.modules():
        if isinstance(module, _Block):
            module.fuse()
    return net.requires_grad_(False)


def for_adaptation(net: nn.Module) -> nn.Module:
    """Itself, to be trained further with all normalisations fixed."""
    for module in net.modules():
        if isinstance(module, _Block):
            fixed = _FixedNorm(module.conv.out_channels).eval()
            fixed.load_state_dict(module.norm.state_dict())
            module.norm = fixed
    return net


def save(members: Sequence[nn.Module], kind: NetworkKind, size: int, outputs: Sequence[str]) -> bytes:
    """An ensemble of like networks as safetensors; ``outputs`` names the channels."""
    from safetensors.torch import save as save_tensors

    tensors = {f"{m}.{name}": t.contiguous() for m, net in enumerate(members) for name, t in net.state_dict().items()}
    settings = {"network": kind, "size": size, "outputs": list(outputs), "members": len(members)}
    return bytes(save_tensors(tensors, {"aecontrol": json.dumps(settings, sort_keys=True)}))


def load(data: bytes, device: str = "cpu", trainable: bool = False) -> tuple[list[nn.Module], tuple[str, ...]]:
    """The ensemble that ``save`` wrote, ready for inference on ``device`` (``trainable``: for adaptation), and
    the names of its outputs.

    Raises KeyError, ValueError, RuntimeError or SafetensorError on foreign or damaged bytes."""
    from safetensors.torch import load as load_tensors

    tensors: dict[str, Tensor] = load_tensors(data)
    settings = settings_of(data)
    members = []
    for m in range(settings["members"]):
        net = create(settings["network"], settings["size"], len(settings["outputs"]))
        prefix = f"{m}."
        net.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        members.append(place(for_adaptation(net) if trainable else for_inference(net), device))
    return members, tuple(settings["outputs"])


def settings_of(data: bytes) -> dict[str, Any]:
    """What ``save`` noted: network, size, outputs, members (safetensors: 8 bytes of length, then JSON)."""
    length = int.from_bytes(data[:8], "little")
    settings: dict[str, Any] = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["aecontrol"])
    return settings
