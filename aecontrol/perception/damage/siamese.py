"""The learned damage metric: one small encoder sees both frames densely, a head compares what it made of them, patch by
patch, and estimates the share of the matter in the patch that was removed or displaced.

The encoder works at a quarter of the resolution, so that a patch of 20 pixels is 5 x 5 of its cells, and a whole frame
takes one pass. What it made of a patch is pooled inside the patch. The head then also sees the eight patches around it
(damage seldom comes alone; at low dose they decide), the mean over all patches (a change of focus or a shift looks the
same everywhere) and the level of shot noise. For inference, normalisations are folded into the
convolutions, and these are computed in bfloat16: twice as fast on processors and GPUs that multiply such numbers.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aecontrol.perception.nets import place, settings_of

PATCH_PX = 20
CELLS = 5
"""Cells of the encoder along a patch's side."""
BRIGHT = 0.2
"""Patches below this part of the mean brightness do not tell of gain or noise."""
LIMIT = 12.0
"""Pixels are clipped to this many times the image's contrast."""
LEAST_CONTRAST = 0.1


def standardised(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Frames [n, 2, h, w] in any units, as both look on one scale [n, 2, 2, h, w] (frame; counts, root of counts), and
    their shot noise [n, 2] on that scale.

    The unit of a count follows from the noise of the difference, which holds no structure: in 2 x 2 pixels the
    difference of the diagonals, squared, is on average the mean counts of both. The ratio of gains is that of most
    patches. The scale is the contrast of the first frame without its noise.
    """
    pair = pair.float()
    first, later = pair[:, :1], pair[:, 1:]
    mean, mean_later = (functional.avg_pool2d(f, PATCH_PX).flatten(1) for f in (first, later))
    level = mean.mean(1, keepdim=True).clamp(min=1e-9)
    bright = (mean > BRIGHT * level) & (mean_later > 0)
    ratio = _median(mean / mean_later.clamp(min=1e-9 * level), bright)
    change = first - ratio[:, :, None, None] * later
    corner = change[:, :, ::2, ::2] - change[:, :, ::2, 1::2] - change[:, :, 1::2, ::2] + change[:, :, 1::2, 1::2]
    noise = functional.avg_pool2d((0.5 * corner) ** 2, PATCH_PX // 2).flatten(1)
    unit = _median(noise / (mean * (1 + ratio)).clamp(min=1e-9 * level), bright).clamp(min=1e-6 * level)
    counts = level / unit * torch.cat([torch.ones_like(ratio), 1 / ratio], 1)  # [n, 2] mean counts of a pixel
    scaled = pair * torch.cat([1 / level, ratio / level], 1)[:, :, None, None]
    contrast = (scaled[:, 0].flatten(1).var(1, keepdim=True) - 1 / counts[:, :1]).clamp(min=LEAST_CONTRAST**2).sqrt()
    per = contrast[:, :, None, None]
    root = 2 * ((scaled + 0.375 / counts[:, :, None, None]).clamp(min=0).sqrt() - 1)
    seen = torch.stack([(scaled - 1) / per, root / per], 2).clamp(-LIMIT, LIMIT)
    return seen, counts.rsqrt() / contrast


def _median(values: Tensor, where: Tensor) -> Tensor:
    """Median [n, 1] of those of ``values`` [n, m] that are told by ``where``; 1 where none is."""
    return values.masked_fill(~where, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num(1.0)


class _Block(nn.Module):
    """Convolution and normalisation; ``fuse`` folds one into the other for inference."""

    def __init__(self, inputs: int, outputs: int, side: int = 3, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = (dilation * (side - 1) + 1 - stride) // 2
        self.conv = nn.Conv2d(inputs, outputs, side, stride, padding, dilation, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out

    def fuse(self) -> None:
        """For inference only."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class Siamese(nn.Module):
    """``size``: channels of an embedding. Input [n, 2, h, w]: pairs of registered frames in any units. Output
    [n, 3, rows, cols] of patches: estimated damaged fraction, logarithm of its standard deviation, and the logit of any
    damage at all."""

    half_precision = True

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.size = size
        self.stem = _Block(2, size // 2, 6, 2)
        self.by_noise = nn.Linear(2, size)  # how the stem's features are scaled and shifted at this level of noise
        self.down = _Block(size // 2, size, 4, 2)
        self.blocks = nn.ModuleList(_Block(size, size, dilation=d) for d in (1, 2, 4, 1))
        wide = 3 * size // 2
        self.meet = _Block(3 * size, wide, 1)
        self.compare = _Block(wide, wide)
        self.patch = nn.Conv2d(2 * wide + 2, wide, 1)
        self.around = nn.Conv2d(wide, wide, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(3 * wide, wide, 1), nn.ReLU(), nn.Conv2d(wide, 3, 1))
        nn.init.zeros_(self.by_noise.weight)
        nn.init.zeros_(self.by_noise.bias)

    def forward(self, pair: Tensor) -> Tensor:
        """See the class."""
        seen, noise = standardised(pair)
        return self.judged(self.compared(seen, noise), noise)

    def compared(self, seen: Tensor, noise: Tensor) -> Tensor:
        """What differs in each patch [n, features, rows, cols] between standardised frames [n, 2, 2, h, w] of ``noise``
        [n, 2]."""
        embedded = self.embedded(seen.flatten(0, 1), noise.flatten().log())
        a, b = embedded[::2], embedded[1::2]
        both = functional.relu(self.meet(torch.cat([a - b, (a - b).abs(), a + b], 1)), inplace=True)
        both = functional.relu(both + self.compare(both), inplace=True)
        return torch.cat([functional.avg_pool2d(both, CELLS), functional.max_pool2d(both, CELLS)], 1)

    def judged(self, compared: Tensor, noise: Tensor) -> Tensor:
        """The output from what was compared, in full precision."""
        known = noise.log()[:, :, None, None].expand(-1, -1, *compared.shape[2:])
        with torch.autocast(compared.device.type, enabled=False):
            own = functional.relu(self.patch(torch.cat([compared.float(), known], 1)))
            near = functional.relu(self.around(own))
            overall = own.mean((2, 3), keepdim=True).expand_as(own)
            out = self.head(torch.cat([own, near, overall], 1))
        return torch.cat([out[:, :1].sigmoid(), out[:, 1:2].clamp(-6, 1), out[:, 2:]], 1)

    def embedded(self, seen: Tensor, log_noise: Tensor) -> Tensor:
        """Embeddings [m, size, h/4, w/4] of frames [m, 2, h, w] with the logarithm of their noise [m]."""
        told = torch.stack([log_noise, log_noise**2], 1).to(seen.dtype)
        scale, shift = self.by_noise(told)[:, :, None, None].chunk(2, 1)
        x = self.stem(seen.contiguous(memory_format=torch.channels_last))
        x = functional.relu(x * (1 + scale) + shift, inplace=True)
        x = self.down(x)
        for block in self.blocks:
            x = x + functional.relu(block(x), inplace=True)
        out: Tensor = x
        return out


def for_inference(net: Siamese) -> Siamese:
    """Itself with every normalisation folded away (not trainable afterwards)."""
    net.eval()
    for module in net.modules():
        if isinstance(module, _Block):
            module.fuse()
    return net.requires_grad_(False)


def save(net: Siamese) -> bytes:
    """A network as safetensors."""
    from safetensors.torch import save as save_tensors

    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    return bytes(save_tensors(tensors, {"aecontrol": json.dumps({"network": "siamese", "size": net.size})}))


def load(data: bytes, device: str = "cpu") -> Siamese:
    """The network that ``save`` wrote, for inference. Raises KeyError, ValueError, RuntimeError or SafetensorError on
    foreign or damaged bytes."""
    from safetensors.torch import load as load_tensors

    tensors = load_tensors(data)
    settings = settings_of(data)
    if settings["network"] != "siamese":
        raise ValueError(f"it holds a network of kind {settings['network']}")
    net = Siamese(settings["size"])
    net.load_state_dict(tensors)
    place(for_inference(net), device)
    return net
