"""The atom-finding network: a three-level U-Net with additive skips, small enough for one CPU thread.

Batch normalisation, not group normalisation: at inference it is a fixed affine map that is folded into the
convolutions, so the output at a pixel depends on its receptive field only (a sub-scan and the same place in a large
frame give the same answer) and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

MULTIPLE = 4
"""Both image sides must be a multiple of this (two halvings)."""
REACH_PX = 27
"""How far from a pixel the image can lie that changes the output there."""


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


class UNet(nn.Module):
    """[n, 1, h, w] normalised images -> [n, 1, h, w] logits of the heat map; h and w multiples of ``MULTIPLE``."""

    multiple = MULTIPLE
    reach_px = REACH_PX

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.down1 = nn.Sequential(_Block(1, a), _Block(a, a))
        self.down2 = nn.Sequential(_Block(a, b, stride=2), _Block(b, b))
        self.bottom = nn.Sequential(_Block(b, c, stride=2), _Block(c, c, dilation=2), _Block(c, c))
        self.from3 = nn.Conv2d(c, b, 1)
        self.up2 = nn.Sequential(_Block(b, b), _Block(b, b))
        self.from2 = nn.Conv2d(b, a, 1)
        self.up1 = _Block(a, a)
        self.head = nn.Conv2d(a, 1, 1)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.get_parameter("bias").fill_(-3.0)  # centres are rare: start near the base rate

    def forward(self, x: Tensor) -> Tensor:
        """Logits; see the class."""
        fine = self.down1(x)
        half = self.down2(fine)
        quarter = self.bottom(half)
        half = self.up2(half + _double(self.from3(quarter)))
        fine = self.up1(fine + _double(self.from2(half)))
        logits: Tensor = self.head(fine)
        return logits

    def fused(self) -> UNet:
        """Itself, in inference mode with every normalisation folded away (not trainable afterwards)."""
        self.eval()
        for module in self.modules():
            if isinstance(module, _Block):
                module.fuse()
        return self.requires_grad_(False)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def place(net: UNet, device: str) -> UNet:
    """The network on ``device``, channels last in memory, which is the faster layout for it on CPUs."""
    net.to(torch.device(device))
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return net


def load(data: bytes) -> UNet:
    """The network stored as safetensors ``data``, fused for inference. Raises on foreign or damaged bytes."""
    from safetensors.torch import load as load_tensors

    tensors: dict[str, Tensor] = load_tensors(data)
    net = UNet(tensors["down1.0.conv.weight"].shape[0])
    net.load_state_dict(tensors)
    return net.fused()
