"""Patches around atoms, and maps from patches to a few latent numbers: PCA and a small variational autoencoder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Model, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = NDArray[np.float64]
Patches = NDArray[np.float32]

ACTIVE_NATS = 0.05
"""A latent coordinate carries something when its mean KL divergence from the prior exceeds this."""
SMOOTH_NM = 0.035
"""Patches are smoothed by a Gaussian of about a probe's width: finer detail is shot noise, which embeddings fit."""
_MIN_PATCHES = 16
_ENTRY = "aecontrol"


class PcaEmbedding(Model):
    """Principal components of the patches."""

    kind: Literal["pca"] = "pca"
    components: PositiveInt = Field(2, description="number of latent coordinates")

    def fit(self, patches: Patches, seed: int) -> LinearEmbedding:
        """Fit on [n, size, size]. Raises BadInput for fewer than 16 patches or a wrong shape."""
        from sklearn.decomposition import PCA

        flat = _flat(patches)
        model = PCA(self.components, svd_solver="full" if flat.shape[1] <= 1024 else "randomized", random_state=seed)
        model.fit(flat)
        report = {f"explained_{i}": float(v) for i, v in enumerate(model.explained_variance_ratio_)}
        return LinearEmbedding({"mean": model.mean_, "components": model.components_}, patches.shape[1], report)


class VaeEmbedding(Model):
    """A variational autoencoder with two fully connected hidden layers each way, trained once with Pyro.

    The number of optimiser steps is fixed, not the time, so that training is repeatable; 600 steps take about 5 s on
    one core.
    """

    kind: Literal["vae"] = "vae"
    latent_dim: PositiveInt = Field(2, description="number of latent coordinates")
    hidden: PositiveInt = Field(96, description="width of the hidden layers")
    steps: PositiveInt = Field(600, description="optimiser steps")
    batch: PositiveInt = Field(128, description="patches per step")
    learning_rate: Annotated[float, Field(gt=0, le=0.1)] = Field(2e-3, description="of Adam")

    def fit(self, patches: Patches, seed: int) -> AutoEncoder:
        """Train on [n, size, size]. Raises BadInput for fewer than 16 patches or a wrong shape."""
        return _train_vae(self, _flat(patches), patches.shape[1], seed)


EmbeddingConfig = Annotated[PcaEmbedding | VaeEmbedding, Field(discriminator="kind")]


@dataclass(frozen=True)
class _Stored:
    """A map made of named arrays; what both embeddings share."""

    tensors: Mapping[str, NDArray[Any]]
    size: int
    report: Mapping[str, float] = field(default_factory=dict)
    """What training said of itself: explained variance, or KL per latent coordinate, active ones, noise, loss."""

    kind = ""

    @property
    def version(self) -> str:
        """Hash of method and weights."""
        return hashlib.sha256(self.save()).hexdigest()

    def save(self) -> bytes:
        """The model as safetensors bytes, from which :func:`load` rebuilds it exactly."""
        from safetensors.numpy import save

        # One metadata entry only: the file format does not fix the order of several.
        header = {"kind": self.kind, "size": self.size, "report": dict(self.report)}
        tensors = {name: np.ascontiguousarray(array) for name, array in self.tensors.items()}
        return save(tensors, {_ENTRY: json.dumps(header, sort_keys=True)})

    def _input(self, patches: Patches) -> Array:
        if patches.ndim != 3 or patches.shape[1:] != (self.size, self.size):
            raise BadInput(
                f"patches of shape {patches.shape}, this embedding takes [n, {self.size}, {self.size}]",
                "use the patch settings that it was trained with",
            )
        return patches.reshape(len(patches), -1).astype(np.float64)


class LinearEmbedding(_Stored):
    """Projection on principal components."""

    kind = "pca"

    def encode(self, patches: Patches) -> Array:
        """[n, size, size] -> [n, d]."""
        centred = self._input(patches) - self.tensors["mean"]
        return np.asarray(centred @ np.asarray(self.tensors["components"], dtype=np.float64).T)


class AutoEncoder(_Stored):
    """Encoder of a trained variational autoencoder: the posterior mean of the latent vector.

    Evaluated in float64 by NumPy, so that encoding needs no torch and does not depend on its threads.
    """

    kind = "vae"

    def encode(self, patches: Patches) -> Array:
        """[n, size, size] -> [n, d]."""
        hidden = self._input(patches)
        for layer in ("first", "second"):
            hidden = np.tanh(hidden @ self._weight(layer).T + self.tensors[f"{layer}.bias"])
        return np.asarray(hidden @ self._weight("mean").T + self.tensors["mean.bias"])

    def _weight(self, layer: str) -> Array:
        return np.asarray(self.tensors[f"{layer}.weight"], dtype=np.float64)


def load(data: bytes) -> LinearEmbedding | AutoEncoder:
    """Rebuild an embedding that ``save`` wrote. Raises BadInput on foreign or damaged bytes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_tensors

    mend = "train the embedding again, or restore the file from a copy"
    kinds: dict[str, tuple[type[LinearEmbedding] | type[AutoEncoder], set[str]]] = {
        "pca": (LinearEmbedding, {"mean", "components"}),
        "vae": (AutoEncoder, {f"{n}.{p}" for n in ("first", "second", "mean") for p in ("weight", "bias")}),
    }
    try:
        tensors = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_ENTRY])
        made, names = kinds[header["kind"]]
        size, report = int(header["size"]), {str(k): float(v) for k, v in header["report"].items()}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"these {len(data)} bytes are not a saved embedding: {error}", mend) from error
    if set(tensors) != names:
        raise BadInput(f"the saved embedding holds {sorted(tensors)}, not {sorted(names)}", mend)
    return made(tensors, size, report)


def _flat(patches: Patches) -> Patches:
    if patches.ndim != 3 or patches.shape[1] != patches.shape[2] or len(patches) < _MIN_PATCHES:
        raise BadInput(
            f"cannot train on patches of shape {patches.shape}",
            f"give at least {_MIN_PATCHES} square patches (raise session.learn_patches)",
        )
    if not np.isfinite(patches).all():
        raise BadInput("patches hold NaN or infinity", "leave out the frames they come from")
    return np.ascontiguousarray(patches.reshape(len(patches), -1), dtype=np.float32)


# ---------------------------------------------------------------- patches


def cut_patches(
    image: Array,
    pixel_size_nm: tuple[float, float],
    centres_nm: Array,
    angle_rad: float,
    patch_nm: float,
    size: int,
    levels: tuple[float, float],
) -> Patches:
    """Square patches [n, size, size] of side ``patch_nm`` around ``centres_nm`` [n, 2] (from the frame's corner).

    A patch's x axis points along ``angle_rad`` (from +x towards +y). The image is smoothed by ``SMOOTH_NM``, values are
    interpolated linearly, scaled so that ``levels`` (background, bright column) become (0, 1), and faded to 0 at the
    inscribed circle, so that corners carry no angle.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    offset = ((np.arange(size) + 0.5) / size - 0.5) * patch_nm
    u, v = np.meshgrid(offset, offset)
    c, s = math.cos(angle_rad), math.sin(angle_rad)
    x = centres_nm[:, 0, None, None] + c * u - s * v
    y = centres_nm[:, 1, None, None] + s * u + c * v
    where = np.stack([y / pixel_size_nm[1] - 0.5, x / pixel_size_nm[0] - 0.5])
    smooth = gaussian_filter(image, [SMOOTH_NM / p for p in reversed(pixel_size_nm)])
    values = map_coordinates(smooth, where.reshape(2, -1), order=1, mode="nearest").reshape(-1, size, size)
    low, high = levels
    scaled = (values - low) / max(high - low, 1e-12)
    fade = np.clip((patch_nm / 2 - np.hypot(u, v)) / (0.15 * patch_nm), 0, 1)
    return np.asarray(scaled * fade, dtype=np.float32)


# ---------------------------------------------------------------- the autoencoder


def _networks(config: VaeEmbedding, pixels: int) -> nn.ModuleDict:
    from torch import nn

    width, latent = config.hidden, config.latent_dim
    return nn.ModuleDict(
        {
            "first": nn.Linear(pixels, width),
            "second": nn.Linear(width, width),
            "mean": nn.Linear(width, latent),
            "log_scale": nn.Linear(width, latent),
            "decoder": nn.Sequential(
                nn.Linear(latent, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, pixels)
            ),
        }
    )


def _encode(net: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of the latent vector."""
    hidden = net["second"](net["first"](x).tanh()).tanh()
    return net["mean"](hidden), net["log_scale"](hidden).clamp(-6, 2).exp()


def _train_vae(config: VaeEmbedding, flat: Patches, size: int, seed: int) -> AutoEncoder:
    """Stochastic variational inference of z ~ N(0, 1), x ~ N(decoder(z), sigma) with an amortised Gaussian guide.

    sigma is learned; the KL term is weighted from 0.01 up to 1 over the first 30 % of the steps. Single-threaded, own
    parameter store and random state: training neither depends on nor disturbs anything else.
    """
    import pyro
    import torch
    from pyro.infer import SVI as UntypedSVI
    from pyro.infer import TraceMeanField_ELBO as UntypedELBO
    from pyro.optim import Adam  # type: ignore[attr-defined]  # made at import time

    # Pyro annotates only parts of itself.
    dist: Any = pyro.distributions
    svi_class: Any = UntypedSVI
    elbo_class: Any = UntypedELBO
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
            torch.manual_seed(seed)
            net = _networks(config, flat.shape[1])
            data = torch.from_numpy(flat)
            with torch.no_grad():
                net["decoder"][-1].bias.copy_(data.mean(0))  # type: ignore[index]
            spread = float(data.std())

            def model(x: Tensor, beta: float) -> None:
                pyro.module("vae", net)
                sigma = pyro.param("sigma", torch.tensor(0.2 * spread), constraint=dist.constraints.positive)
                with pyro.plate("patches", len(x)):
                    with pyro.poutine.scale(scale=beta):
                        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), config.latent_dim), 1.0).to_event(1))
                    pyro.sample("x", dist.Normal(net["decoder"](z), sigma).to_event(1), obs=x)

            def guide(x: Tensor, beta: float) -> None:
                pyro.module("vae", net)
                with pyro.plate("patches", len(x)), pyro.poutine.scale(scale=beta):
                    pyro.sample("z", dist.Normal(*_encode(net, x)).to_event(1))

            # The one noise parameter must keep up with the networks, or latents are kept that explain nothing.
            rates = {"sigma": {"lr": 10 * config.learning_rate}}
            optimiser = Adam(lambda name: rates.get(name, {"lr": config.learning_rate}))
            svi = svi_class(model, guide, optimiser, elbo_class())
            order = np.random.default_rng(seed)
            loss = math.nan
            for step in range(config.steps):
                rows = torch.from_numpy(order.integers(0, len(flat), min(config.batch, len(flat))))
                loss = float(svi.step(data[rows], min(1.0, 0.01 + 0.99 * step / (0.3 * config.steps)))) / len(rows)
            with torch.no_grad():
                mean, scale = _encode(net, data)
                kl = (0.5 * (mean**2 + scale**2 - 1) - scale.log()).mean(0).numpy()
            report = {f"kl_{i}": float(v) for i, v in enumerate(kl)}
            report |= {
                "active": float((kl > ACTIVE_NATS).sum()),
                "loss": loss,
                "sigma": float(pyro.param("sigma").detach()),
            }
            tensors = {
                f"{name}.{part}": getattr(net[name], part).detach().numpy().copy()
                for name in ("first", "second", "mean")
                for part in ("weight", "bias")
            }
    finally:
        torch.set_num_threads(threads)
    return AutoEncoder(tensors, size, report)
