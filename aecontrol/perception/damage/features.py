"""The published damage metric and its relatives: features of patches by a network, compared between two frames.

As published (settings as they come): both frames are scaled by percentiles of the first, cut into patches of 20 x 20
px, normalised as the network was trained, averaged over the patch in its last layer; the metric is 1 - cosine. What the
publication leaves open is a setting, and is reported with every number. ``dense`` reads the frame in one pass and
averages the features patch by patch, which is another function (fields reach across the edges of patches) and faster by
orders of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from aecontrol.errors import BadInput
from aecontrol.perception.device import resolve
from aecontrol.types import Model

from . import efficientnet, resnet
from .backbone import Backbone, stride_px
from .reading import PATCH_PX

Floats = NDArray[np.float64]

PERCENTILES = (0.5, 99.5)
"""Of the first frame: what becomes 0 and 1 in both."""
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet, by which its networks have their input normalised."""
PIXELS = 2**19
"""Of both frames' patches in one pass: bounds memory."""
COARSEST_PX = 32
"""A frame for the dense pass is padded to a multiple of this, so that all layers have whole numbers of features."""
LOADERS = {"resnet18": resnet.load, "efficientnet_lite0": efficientnet.load}


class FeatureSettings(Model):
    """Everything that decides what the metric is."""

    backbone: Literal["resnet18", "efficientnet_lite0"] = Field("resnet18", description="the network")
    weights: Literal["imagenet", "random-control"] = Field(
        "imagenet", description="published ones, or a control that has learnt nothing"
    )
    sha256: str = Field("", description="of the weights, filled in when they are loaded")
    layer: Literal[0, 1, 2, 3, 4] = Field(4, description="features of layer k lie 2^(k+1) px of the input apart")
    input_size: Literal[20, 40, 64, 224] = Field(20, description="side that a patch is enlarged to, px; 20: as it is")
    centred: bool = Field(False, description="subtract the mean feature of the first frame before the cosine")
    distance: Literal["cosine", "whitened", "pointwise"] = Field(
        "cosine",
        description="of the averages over patches: 1 - cosine, or Euclidean by the covariance they have in the first "
        "frame; or of every feature from its counterpart, 1 - cosine, averaged afterwards",
    )
    dense: bool = Field(False, description="one pass over the whole frame in place of one for each patch")
    bfloat16: bool = Field(False, description="compute in bfloat16")

    @model_validator(mode="after")
    def _of_use(self) -> FeatureSettings:
        if self.centred and self.distance != "cosine":
            raise ValueError(f"centred: has no meaning for the distance {self.distance!r}")
        return self

    @property
    def label(self) -> str:
        """One line for tables, hash included."""
        size = f"{self.input_size} px, " + ("dense" if self.dense else "by patch")
        how = "centred cosine" if self.centred else self.distance
        kind = "ImageNet" if self.weights == "imagenet" else "random control"
        digits = ", bf16" if self.bfloat16 else ""
        return f"{self.backbone} {kind} {self.sha256[:8]}, layer {self.layer}, {size}, {how}{digits}"


_TUNED = {
    "backbone": "efficientnet_lite0",
    "layer": 3,
    "input_size": 40,
    "distance": "pointwise",
    "dense": True,
    "bfloat16": True,
}
NAMED = {
    "resnet18": FeatureSettings(),
    "resnet18-random-control": FeatureSettings(weights="random-control"),
    "efficientnet_lite0": FeatureSettings(**_TUNED),
    "efficientnet_lite0-random-control": FeatureSettings(**_TUNED, weights="random-control"),
}
"""Metrics that can be asked for by name: the published one, the best that was found with ImageNet weights that can be
installed, and what either is worth when nothing was learnt."""


@dataclass(frozen=True)
class FeatureMetric:
    """A metric of two registered frames; ``settings`` are complete, hash of the weights included."""

    settings: FeatureSettings
    backbone: Backbone
    device: str

    def __call__(self, first: NDArray[np.generic], later: NDArray[np.generic]) -> Floats:
        """Dissimilarity [rows, cols] of the patches of two frames [rows, cols] of one shape, 0 for equal ones;
        partial patches are dropped. Raises BadInput for frames that cannot be compared."""
        frames = normalised(first, later)
        rows, cols = frames.shape[1] // PATCH_PX, frames.shape[2] // PATCH_PX
        frames = frames[:, : rows * PATCH_PX, : cols * PATCH_PX]
        found = self.averages(frames)
        if self.settings.distance == "pointwise":
            return found.reshape(rows, cols)
        a, b = found
        if self.settings.centred:
            mean = a.mean(axis=0)
            a, b = a - mean, b - mean
        distance = whitened if self.settings.distance == "whitened" else cosine
        return np.maximum(distance(a, b), 0.0).reshape(rows, cols)

    def averages(self, frames: NDArray[np.float32], batch: int = 0) -> Floats:
        """Of normalised frames [2, rows, cols] of whole patches: features averaged over patches [2, patches,
        channels], or ('pointwise') their distances [1, patches, 1]; ``batch``: patches a pass, 0: as memory bears."""
        images = torch.from_numpy(frames)[:, None].to(self.device)
        with torch.inference_mode():
            found = self._dense(images) if self.settings.dense else self._by_patch(images, batch)
            return np.asarray(found.double().cpu())

    def _by_patch(self, images: Tensor, batch: int) -> Tensor:
        patches = functional.unfold(images, PATCH_PX, stride=PATCH_PX).transpose(1, 2)
        side, found = self.settings.input_size, []
        batch = batch or max(1, PIXELS // (2 * side**2))
        for part in torch.split(patches, batch, dim=1):
            enlarged = _enlarged(part.reshape(-1, 1, PATCH_PX, PATCH_PX), side, side)
            maps = self._layer(enlarged)
            found.append(self._seen(maps.reshape(2, -1, *maps.shape[1:])).mean((3, 4)))
        return torch.cat(found, 1)

    def _dense(self, images: Tensor) -> Tensor:
        side = self.settings.input_size
        rows, cols = (n // PATCH_PX for n in images.shape[2:])
        images = _enlarged(images, rows * side, cols * side)
        below, right = (-n % COARSEST_PX for n in images.shape[2:])
        images = functional.pad(images, (0, right, 0, below), mode="replicate")
        maps = self._seen(torch.cat([self._layer(image[None]) for image in images]))  # one at a time fits into caches
        by_row, by_col = (self.shares(n, maps.shape[axis]).to(maps) for n, axis in ((rows, 2), (cols, 3)))
        return torch.einsum("rh,nchw,sw->nrsc", by_row, maps, by_col).flatten(1, 2)

    def _seen(self, maps: Tensor) -> Tensor:
        """What is averaged over a patch: the features [2, ..., channels, h, w] of both frames or, pointwise, half the
        squared distance of their directions [1, ..., 1, h, w], which is 1 - cosine and 0 for equal ones exactly."""
        maps = maps.float()
        if self.settings.distance != "pointwise":
            return maps
        a, b = functional.normalize(maps, dim=-3)
        distance: Tensor = 0.5 * (a - b).square().sum(-3, keepdim=True)[None]
        return distance

    def shares(self, patches: int, features: int) -> Tensor:
        """[patches, features]: share of each feature in each patch along one axis, by the pixels around the feature's
        centre; rows sum to 1."""
        side, stride = float(self.settings.input_size), stride_px(self.settings.layer)
        left = stride * np.arange(features) + self.backbone.centres_px[self.settings.layer] - stride / 2
        start = side * np.arange(patches)[:, None]
        overlap = np.minimum(start + side, left + stride) - np.maximum(start, left)
        shares = np.maximum(overlap, 0.0)
        return torch.from_numpy(shares / shares.sum(axis=1, keepdims=True))

    def _layer(self, images: Tensor) -> Tensor:
        """Features [n, channels, h, w] of grey images [n, 1, h, w] in 0 to 1."""
        like = images.new_tensor
        x = (images - like(MEAN)[:, None, None]) / like(SD)[:, None, None]
        dtype = torch.bfloat16 if self.settings.bfloat16 else torch.float32
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.backbone.stages[: self.settings.layer + 1](x)
        return features


def build_metric(settings: FeatureSettings, device: str = "cpu", path: Path | None = None) -> FeatureMetric:
    """The metric of ``settings`` with its network on ``device``; ``path``: of the weights, where they are not in their
    usual place. Raises BadInput when they are not to be had or not those that ``settings.sha256`` names."""
    if path and settings.weights == "random-control":
        raise BadInput(f"a random control reads no weights, such as {path}", "leave the weights out")
    backbone = LOADERS[settings.backbone](settings.weights, path)
    if settings.sha256 not in ("", backbone.sha256):
        raise BadInput(
            f"{settings.backbone}: sha256 of the weights is {backbone.sha256}, not {settings.sha256} as asked for",
            "leave the hash out, or get the weights that it names",
        )
    dtype = torch.bfloat16 if settings.bfloat16 else torch.float32
    where = resolve(device)
    backbone.stages.to(device=where, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FeatureMetric(settings.model_copy(update={"sha256": backbone.sha256}), backbone, where)


def normalised(first: NDArray[np.generic], later: NDArray[np.generic]) -> NDArray[np.float32]:
    """Both frames [2, rows, cols], scaled alike so that percentiles of the first become 0 and 1, and clipped there."""
    if first.shape != later.shape or first.ndim != 2 or min(first.shape) < PATCH_PX:
        raise BadInput(
            f"frames of shapes {first.shape} and {later.shape} px cannot be compared by patches of {PATCH_PX} px",
            "give two registered frames of one shape that hold a patch",
        )
    frames = np.stack([first, later]).astype(np.float64)
    low, high = np.percentile(frames[0], PERCENTILES)
    if not (np.isfinite(frames).all() and high > low):
        raise BadInput(
            "a frame holds pixels that are no finite numbers, or the first shows nothing (one value in 99 % of it)",
            "give whole frames that show the specimen",
        )
    scaled: NDArray[np.float32] = np.clip((frames - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return scaled


def cosine(a: Floats, b: Floats) -> Floats:
    """1 - cosine [n] of vectors [n, channels]; two zeros are alike, a zero and another are not."""
    product = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    likeness = np.einsum("nc,nc->n", a, b) / np.where(product > 0, product, 1.0)
    return np.asarray(np.where(product > 0, 1.0 - likeness, (a != b).any(axis=1)), dtype=np.float64)


def whitened(a: Floats, b: Floats) -> Floats:
    """Euclidean distance [n] of vectors [n, channels] in units of how the first ones scatter: of their covariance,
    shrunk towards a multiple of the identity (O. Ledoit and M. Wolf, J. Multivar. Anal. 88, 365 (2004),
    doi:10.1016/S0047-259X(03)00096-4), so that few patches suffice."""
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf(a)
    root = np.linalg.cholesky(covariance + 1e-12 * np.trace(covariance) * np.eye(a.shape[1]))
    distance: Floats = np.linalg.norm(np.linalg.solve(root, (a - b).T), axis=0)
    return distance


def _enlarged(images: Tensor, rows: int, cols: int) -> Tensor:
    if images.shape[2:] == (rows, cols):
        return images
    return functional.interpolate(images, (rows, cols), mode="bilinear", align_corners=False)
