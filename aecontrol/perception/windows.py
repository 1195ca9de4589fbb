"""A network's maps of an image of any size, window by window: exact, in bounded memory.

Every window has a halo as wide as the network sees around a pixel; what the window's cut may have changed is thrown
away, and between two halos the windows pass into each other along a Hann ramp. Where the network's answer depends on
what it sees only, the result is that of the whole image in one piece, at its rim too; where it does not quite
(normalisation over the window), no seam is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

WINDOW_PX = 512
"""Side of a window: the layers of a small network then fit the cache, and the halos are a modest part."""
BLEND_PX = 32
"""Length of the ramp between two windows."""

Progress = Callable[[int, int], None]
"""Called with the windows done and their number."""


class Net(Protocol):
    """What the windows need to know of a network."""

    multiple: int
    """Both sides of its input are multiples of this."""
    reach_px: int
    """How far from a pixel its input can lie that changes the output there."""

    def __call__(self, x: Tensor) -> Tensor:
        """[n, 1, h, w] -> logits [n, c, h, w]."""


@dataclass(frozen=True)
class Span:
    """A window along one axis: pixels ``start`` to ``stop`` and their ``weight`` [stop - start]. The weights of all
    spans of an axis sum to 1 at every pixel and are 0 in the halos."""

    start: int
    stop: int
    weight: NDArray[np.float32]


def spans(length: int, window_px: int, halo_px: int, multiple: int) -> list[Span]:
    """The fewest windows of about equal size that cover ``length`` pixels, starting at multiples of ``multiple`` (at
    most 16). They have at most ``window_px``, but at least three times what two neighbours share.
    """
    shared = 2 * halo_px + BLEND_PX + multiple
    window_px = max(window_px, 3 * shared)
    if length <= window_px:
        return [Span(0, length, np.ones(length, np.float32))]
    count = -(-(length - shared) // (window_px - shared))
    side = -(-(length + (count - 1) * shared) // count)
    starts = [round(k * (length - side) / (count - 1)) // multiple * multiple for k in range(count)]
    stops = [*(-(-(start + side) // multiple) * multiple for start in starts[:-1]), length]
    weights = [np.ones(stop - start, np.float32) for start, stop in zip(starts, stops, strict=True)]
    rise = np.sin(0.5 * np.pi * (np.arange(BLEND_PX) + 0.5) / BLEND_PX) ** 2
    for left, right, stop, start in zip(weights, weights[1:], stops, starts[1:], strict=False):
        before = (stop - start - BLEND_PX) // 2  # pixels of the shared part on either side of the ramp
        after = stop - start - BLEND_PX - before
        left[len(left) - after :] = 0.0
        left[len(left) - after - BLEND_PX : len(left) - after] = 1.0 - rise
        right[:before] = 0.0
        right[before : before + BLEND_PX] = rise
    return [Span(*span) for span in zip(starts, stops, weights, strict=True)]


def heat(
    net: Net,
    image: NDArray[np.float32],
    device: str = "cpu",
    window_px: int = WINDOW_PX,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Heat maps [c, h, w] in [0, 1] that ``net`` sees in the normalised ``image`` [h, w].

    Sides that are no multiple of the network's are padded with zeros (the local mean) at the far end.
    """
    whole = torch.from_numpy(image).to(device)
    places = list(product(*(spans(length, window_px, net.reach_px, net.multiple) for length in image.shape)))
    total: Tensor | None = None
    with torch.inference_mode():
        for done, (rows, cols) in enumerate(places, start=1):
            patch = whole[rows.start : rows.stop, cols.start : cols.stop]
            h, w = patch.shape
            padded = functional.pad(patch[None, None], (0, -w % net.multiple, 0, -h % net.multiple))
            seen = torch.sigmoid(net(padded))[0, :, :h, :w]
            if total is None:
                total = torch.zeros((len(seen), *image.shape), device=device)
            weight = torch.outer(torch.from_numpy(rows.weight), torch.from_numpy(cols.weight)).to(device)
            total[:, rows.start : rows.stop, cols.start : cols.stop].addcmul_(seen, weight[None])
            if progress:
                progress(done, len(places))
    assert total is not None
    return np.asarray(total.cpu().numpy())
