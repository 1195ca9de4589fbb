"""Random HAADF scenes of single atoms with known positions, to train and test atom finding; what scenes are made of.

Atoms are sums of two Gaussians (probe core and tail) evaluated exactly at the pixel centres, which is fast enough to
draw a new scene for every training patch; the probe-based renderer is kept for specimens and serves as the independent
test of what is learnt here. All ranges are choices, wide on purpose; the texture of the amorphous support was set by
eye and by power spectrum against two public images of Pt on N-doped carbon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, PositiveInt

from .streams import stream

Floats = NDArray[np.float64]

GATE_NM = 0.05
"""A find is right when this near to an atom: a third of the shortest distance of two (C-C, 0.142 nm)."""
MARGIN_NM = 0.4
"""Columns this far outside the frame still shine into it."""


@dataclass(frozen=True)
class Scene:
    """One image and what is in it.

    ``image`` [rows, cols] float32; ``pixel_size_nm`` (x, y); ``positions_px`` [n, 2] (x, y), the centre of pixel [0, 0]
    at (0.5, 0.5), columns just outside the frame included; ``counts`` [n] expected counts of each column; ``wanted``
    [n] False where finding and missing it are both right.
    """

    image: NDArray[np.float32]
    pixel_size_nm: tuple[float, float]
    positions_px: Floats
    counts: Floats
    wanted: NDArray[np.bool_]


class SingleAtomScenes(Model):
    """Isolated heavy atoms on an amorphous light support, in parts over vacuum."""

    kind: Literal["single_atoms"] = "single_atoms"
    gate_nm: ClassVar[float] = GATE_NM
    size_px: PositiveInt = Field(96, description="rows and columns of a scene (fewer when its pixels are coarse)")
    pixel_nm: tuple[float, float] = Field((0.02, 0.042), description="smallest and largest pixel, nm")
    coarse_fraction: float = Field(0.1, ge=0, le=1, description="fraction of scenes with pixels up to 0.1 nm")
    clean: bool = Field(False, description="without contamination, edges, scan jitter, read noise and probe tails")

    def render(self, seed: int, index: int) -> Scene:
        """Scene ``index`` of stream ``seed``; the same numbers give the same scene in any process. Cannot fail."""
        rng = stream(seed, "scene", index)
        pixel = log_uniform(rng, *self.pixel_nm)
        side = self.size_px * pixel
        if rng.random() < self.coarse_fraction:
            pixel = log_uniform(rng, self.pixel_nm[1], 0.1)
        return _single_atoms(rng, self, round(side / pixel), pixel)

    def held_out(self) -> dict[str, SingleAtomScenes]:
        """The one condition of the model card."""
        fixed: dict[str, object] = {"size_px": 128, "pixel_nm": (0.03, 0.03), "coarse_fraction": 0.0}
        return {"single atoms, any counts": self.model_copy(update=fixed)}


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between ``low`` and ``high``, uniform in its logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def cut_edge(rng: np.random.Generator, xy: Floats, side: float) -> NDArray[np.bool_] | None:
    """Now and then (else None) which of ``xy`` [n, 2] nm are left by a straight edge of the crystal or a round hole."""
    choice = rng.random()
    if choice > 0.3:
        return None
    from_center = xy - rng.uniform(0, side, 2)
    if choice < 0.15:
        angle = rng.uniform(0, 2 * np.pi)
        return np.asarray(from_center @ [np.cos(angle), np.sin(angle)] > 0)
    return np.asarray(np.hypot(*from_center.T) > rng.uniform(0.3, 1.0))


def _single_atoms(rng: np.random.Generator, of: SingleAtomScenes, n: int, pixel: float) -> Scene:
    """Isolated heavy atoms on a mottled light support, in parts over vacuum."""
    blur = log_uniform(rng, 0.045, 0.11)  # wider than in a sheet: a thick support is not in focus throughout
    side = n * pixel
    area = (side + 2 * MARGIN_NM) ** 2
    xy = rng.uniform(-MARGIN_NM, side + MARGIN_NM, (rng.poisson(log_uniform(rng, 0.05, 1.2) * area), 2))
    if len(xy) > 1 and rng.random() < 0.5:  # pairs and short rows
        mates = rng.random(len(xy)) < 0.2
        angle, apart = rng.uniform(0, 2 * np.pi, mates.sum()), rng.uniform(0.2, 0.45, mates.sum())
        xy = np.concatenate([xy, xy[mates] + np.stack([np.cos(angle), np.sin(angle)], 1) * apart[:, None]])
    apart = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)) + 9 * np.tri(len(xy)).T
    xy = xy[(apart > 0.18).all(1)]
    thickness = 1 + rng.uniform(0.0, 0.4) * blobs(rng, n, rng.uniform(0.6, 3.0) / pixel, sign=True)
    if rng.random() < 0.25:  # edge of the support
        angle, width = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.8) / pixel
        along = (np.arange(n) - rng.uniform(0, n)) * np.array([[np.cos(angle)], [np.sin(angle)]])
        thickness = thickness / (1 + np.exp(-np.clip((along[0] + along[1][:, None]) / width, -50, 50)))
        on_support = thickness[tuple(np.clip((xy[:, ::-1] / pixel).astype(int), 0, n - 1).T)] > 0.2
        xy = xy[on_support]
    thickness = np.maximum(thickness, 0.02)
    # contrast of one atom over the mean support, and noise: signal-to-noise of the matched filter, 4 to 60
    contrast = log_uniform(rng, 0.08, 4.0)
    ratio = log_uniform(rng, 4.0, 60.0)
    per_pixel = (ratio * pixel / (contrast * np.sqrt(np.pi) * blur)) ** 2
    support = thickness
    if not of.clean:
        grain = texture(rng, n, rng.uniform(0.6, 1.0) * blur / pixel, white=rng.uniform(0.2, 1.5))
        amount = min(0.3, contrast * rng.uniform(0.05, 0.45))
        support = np.maximum(thickness + amount * np.sqrt(thickness) * grain, 0.01)
    weight = np.exp(rng.normal(0, rng.uniform(0.05, 0.3), len(xy)))
    integral = contrast * 2 * np.pi * (blur / pixel) ** 2
    sigma = blur / pixel * np.exp(rng.normal(0, 0 if of.clean else rng.uniform(0, 0.2), len(xy)))
    expected = _gaussians(rng, xy / pixel, weight * integral, sigma, n, of.clean)
    image = detect(rng, per_pixel * (support + expected), of.clean)
    counts = weight * integral * per_pixel
    return Scene(image, (pixel, pixel), xy / pixel, counts, np.ones(len(xy), dtype=bool))


def _gaussians(rng: np.random.Generator, xy: Floats, counts: Floats, sigma: Floats, n: int, clean: bool) -> Floats:
    """Expected counts [n, n] of columns at ``xy`` of width ``sigma`` (pixels): probe core and tail, lines displaced."""
    core, wide = (1.0, 1.0) if clean else (rng.uniform(0.65, 1.0), rng.uniform(1.6, 3.0))
    jitter = np.zeros((2, n))
    if not clean and len(xy):
        jitter = rng.normal(0, sigma.min() * rng.uniform(0, 0.3), (2, n))
    tall = 1.0 if clean else np.exp(rng.normal(0, 0.06))  # mild astigmatism along the axes
    at = np.arange(n) + 0.5
    total = np.zeros((n, n))
    for share, width in ((core, sigma[:, None]), (1 - core, wide * sigma[:, None])):
        if share <= 0:
            continue
        sx, sy = width * tall, width / tall
        dx, dy = (at - xy[:, :1]) / sx, (at + jitter[1] - xy[:, 1:]) / sy
        gx = np.exp(-0.5 * dx**2) / (np.sqrt(2 * np.pi) * sx)
        gy = (counts * share)[:, None] * np.exp(-0.5 * dy**2) / (np.sqrt(2 * np.pi) * sy)
        # a line's own x displacement, to second order in jitter / sigma
        shift = jitter[0][:, None]
        total += gy.T @ gx - shift * (gy.T @ (gx * dx / sx)) + 0.5 * shift**2 * (gy.T @ (gx * (dx**2 - 1) / sx**2))
    return np.maximum(total, 0)


def ramp(rng: np.random.Generator, n: int) -> Floats:
    """A plane between 0 and 1."""
    slope = rng.uniform(-1, 1, 2)
    plane = slope[0] * np.linspace(0, 1, n)[:, None] + slope[1] * np.linspace(0, 1, n)
    return np.asarray((plane - plane.min()) / max(float(np.ptp(plane)), 1e-9))


def _filtered(rng: np.random.Generator, n: int, gain: Floats) -> Floats:
    """Gaussian random field [n, n] with the amplitude spectrum ``gain`` (over ``_frequencies``), expected spread 1.

    Cut from a field of twice the side, so that it is not periodic.
    """
    white = np.fft.rfft2(rng.normal(size=(2 * n, 2 * n)))
    gain[0, 0] = 0.0
    gain = gain / np.sqrt((gain[:, 1:-1] ** 2).sum() * 2 + (gain[:, [0, -1]] ** 2).sum()) * 2 * n
    return np.asarray(np.fft.irfft2(white * gain, s=(2 * n, 2 * n))[:n, :n])


def _frequencies(n: int) -> Floats:
    return np.asarray(np.hypot(np.fft.fftfreq(2 * n)[:, None], np.fft.rfftfreq(2 * n)) + 1e-6)


def blobs(rng: np.random.Generator, n: int, scale_px: float, sign: bool = False) -> Floats:
    """Smooth field with features of ``scale_px``: where it is positive, or with ``sign`` all of it."""
    field = _filtered(rng, n, np.exp(-2 * (np.pi * _frequencies(n) * scale_px / 2) ** 2))
    return field if sign else np.asarray(np.maximum(field, 0))


def texture(rng: np.random.Generator, n: int, sigma: float, white: float) -> Floats:
    """What unresolved light atoms look like through the probe, with a share of longer clumps."""
    k = _frequencies(n)
    probe = np.exp(-2 * (np.pi * k * sigma) ** 2)
    clumps = (k * sigma) ** -1.2 * np.exp(-2 * (np.pi * k * sigma) ** 2)
    return _filtered(rng, n, probe * white + 0.1 * clumps)


def detect(rng: np.random.Generator, expected: Floats, clean: bool) -> NDArray[np.float32]:
    """Poisson counts; unless ``clean``, with uneven lines and, for half of the scenes, gain, offset and read noise."""
    if clean:
        return rng.poisson(expected).astype(np.float32)
    lines = 1 + rng.normal(0, rng.uniform(0, 0.03), (len(expected), 1))
    counts = rng.poisson(expected * np.maximum(lines, 0)).astype(float)
    if rng.random() < 0.5:
        read = rng.uniform(0, 0.4) * np.sqrt(expected.mean())
        counts = log_uniform(rng, 1e-3, 1e3) * (counts + rng.normal(0, read, counts.shape) + rng.uniform(-1, 20))
    return counts.astype(np.float32)
