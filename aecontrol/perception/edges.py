"""Edges of flakes and particles, training-free: where the smoothed image is steeper than its noise can be.

The image is differentiated by a Gaussian of ``blur_nm`` along x and y, each derivative in units of what white noise
makes of it at that place (more at the frame's border). Under noise alone the length of that gradient has Rayleigh's
distribution, whose scale the frame itself tells (its median, as long as edges fill less than half of it), and its peaks
above z number at most area / (2 pi blur^2) z^2 exp(-z^2 / 2) (expected Euler characteristic of a chi field; K. J.
Worsley, Adv. Appl. Prob. 26, 13 (1994)). An edge point is a crest steeper than noise would make any in the whole frame.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.perception.targets import to_frame, to_specimen
from aecontrol.protocols import Embedding, Reading
from aecontrol.scoring import merge_duplicates
from aecontrol.types import ATOM_LABELS, Model, Positive, ScanRegion

Array = NDArray[np.float64]

REVISION = "1"
"""Raised when the reading of a frame changes with the same settings; part of ``version``."""
_COVERED = 0.5  # share of a window that the overview must have seen
_LEAST_PX = 8  # rows and columns of a frame


class EdgePerceiver(Model):
    """Perception of edges, whatever the material: each find is a point on an edge, ``value`` their expected number."""

    kind: Literal["edges"] = "edges"
    blur_nm: Positive = Field(0.5, description="standard deviation of the smoothing, nm; at least one pixel is taken")
    spacing_nm: Positive = Field(1.0, description="least distance between two points on an edge, nm")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.99,
        description="probability from which on a point is listed: 1 less that of noise alone anywhere in the frame",
    )

    @property
    def target_kind(self) -> str:
        """Kind of object that the scorer asks the instrument for."""
        return "edge"

    def build(self, device: str = "cpu") -> EdgeReader:
        """Nothing to load."""
        return EdgeReader(self)


@dataclass(frozen=True)
class _Points:
    """Edge points: positions [n, 2] from the frame's corner, nm; confidence and height of the gradient over its
    noise [n]; and the blur that was taken, nm."""

    xy_nm: Array
    confidence: Array
    z: Array
    blur_nm: float


class EdgeReader:
    """The perceiver that ``EdgePerceiver`` builds; see ``aecontrol.protocols.Perceiver``. It has no embedding."""

    def __init__(self, config: EdgePerceiver) -> None:
        self._config = config

    @property
    def version(self) -> str:
        """Hash of settings and this code's revision."""
        return hashlib.sha256(f"edges|{REVISION}|{self._config.model_dump_json()}".encode()).hexdigest()

    def read_overview(
        self,
        image: NDArray[np.generic],
        region: ScanRegion,
        windows: Sequence[ScanRegion],
        electrons_per_pixel: float | None,
    ) -> list[Reading]:
        """The edge points that the overview itself shows in each window, as a cheap estimate of what a sub-scan will
        find; ``variance`` is theirs as a count. Abstains for windows of which it saw less than half."""
        points = find_edges(image, region.pixel_size_nm, self._config)
        if isinstance(points, str):
            return [Reading(None, None, note=points)] * len(windows)
        at = to_specimen(points.xy_nm, region)
        readings = []
        for window in windows:
            if _seen(window, region) < _COVERED:
                readings.append(Reading(None, None, note="the overview saw less than half of this window"))
                continue
            local = to_frame(at, window)
            inside = ((local >= 0) & (local < np.array(window.fov_nm))).all(axis=1)
            value = float(points.confidence[inside].sum())
            readings.append(Reading(value, max(value, 1.0), {"steepest": float(points.z[inside].max(initial=0.0))}))
        return readings

    def read_scan(self, image: NDArray[np.generic], region: ScanRegion, electrons_per_pixel: float | None) -> Reading:
        """Edge points of one sub-scan. Abstains from an image that is too small, flat or not finite."""
        points = find_edges(image, region.pixel_size_nm, self._config)
        if isinstance(points, str):
            return Reading(None, None, note=points)
        number, p = len(points.z), points.confidence
        sigma = points.blur_nm / np.maximum(points.z, 1.0)
        label = np.full(number, ATOM_LABELS.index("edge"))
        xy = to_specimen(points.xy_nm, region)
        return Reading(
            value=float(p.sum()),
            variance=float((p * (1 - p)).sum()),
            features={"points": float(number), "steepest": float(points.z.max(initial=0.0))},
            atoms=np.column_stack([xy, label, p, sigma, sigma, points.z, p]),
            found=tuple(range(number)),
        )

    def fit_embedding(self, patches: NDArray[np.float32], seed: int) -> Embedding:
        """Edges have no patches: raises BadInput."""
        raise BadInput("the perceiver 'edges' cuts no patches to learn from", "set session.learn_patches = 0")

    def load_embedding(self, data: bytes) -> Embedding:
        """Edges have no patches: raises BadInput."""
        raise BadInput("the perceiver 'edges' has no embedding", "use the perceiver that the session began with")

    def value_from_latents(
        self, patches: NDArray[np.float32], latents: Array, reference: Array
    ) -> tuple[float | None, float | None]:
        """Edges need no embedding: (None, None)."""
        return None, None


def find_edges(image: NDArray[np.generic], pixel_nm: tuple[float, float], config: EdgePerceiver) -> _Points | str:
    """The edge points of ``image`` [rows, cols] with pixels (x, y) of ``pixel_nm``; or why there is nothing to read."""
    data = np.asarray(image, dtype=np.float64)
    if data.ndim != 2 or min(data.shape) < _LEAST_PX or not np.isfinite(data).all():
        return f"not a finite image of at least {_LEAST_PX} x {_LEAST_PX} pixels"
    blur = max(config.blur_nm, *pixel_nm)
    sigma = (blur / pixel_nm[1], blur / pixel_nm[0])
    dy, dx = (_derivative(data, sigma, order) for order in ((1, 0), (0, 1)))
    length = np.hypot(dx, dy)
    noise = float(np.median(length)) / math.sqrt(2.0 * math.log(2.0))
    if noise <= 1e-12 * float(np.abs(data).max(initial=0.0)):
        return "an image without noise or contrast"
    z = length / noise
    squared = np.maximum(z**2, 2.0)  # below, the formula for peaks does not hold, and there is no confidence anyway
    peaks = data.size * pixel_nm[0] * pixel_nm[1] / (2.0 * math.pi * blur**2) * squared * np.exp(-0.5 * squared)
    confidence = np.clip(1.0 - peaks, 0.0, 1.0)
    row, col, offset = _crests(z, dx, dy, pixel_nm, confidence >= config.confidence)
    normal = np.column_stack([dx[row, col], dy[row, col]]) / length[row, col, None]
    xy = (np.column_stack([col, row]) + 0.5) * np.array(pixel_nm) + normal * offset[:, None]
    kept = merge_duplicates(xy, config.spacing_nm, z[row, col])
    row, col = row[kept], col[kept]
    return _Points(xy[kept], confidence[row, col], z[row, col], blur)


def _derivative(image: Array, sigma: tuple[float, float], order: tuple[int, int]) -> Array:
    """Gaussian derivative of ``order`` along (rows, columns), in units of what white noise makes of it."""
    from scipy.ndimage import gaussian_filter

    scale = [_noise(n, s, o) for n, s, o in zip(image.shape, sigma, order, strict=True)]
    return np.asarray(gaussian_filter(image, sigma, order=order, mode="nearest") / np.outer(*scale))


def _noise(size: int, sigma: float, order: int) -> Array:
    """Standard deviation [size] that a Gaussian filter along one axis leaves of white noise; more at borders."""
    from scipy.ndimage import gaussian_filter1d

    reach = math.ceil(4.0 * sigma) + 1
    few = min(size, 2 * reach + 1)
    left = np.sqrt((gaussian_filter1d(np.eye(few), sigma, axis=0, order=order, mode="nearest") ** 2).sum(axis=1))
    return (
        left if few == size else np.concatenate([left[:reach], np.full(size - 2 * reach, left[reach]), left[-reach:]])
    )


def _crests(
    z: Array, dx: Array, dy: Array, pixel_nm: tuple[float, float], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Row and column of pixels of ``mask`` that are steeper than their neighbours one pixel up and down the slope, and
    how far up the slope the crest of the parabola through the three lies, nm. The frame's outermost pixels are none."""
    from scipy.ndimage import map_coordinates

    inner = np.zeros_like(mask)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1]
    row, col = np.nonzero(inner)
    step = min(pixel_nm)
    length = np.maximum(np.hypot(dx[row, col], dy[row, col]), 1e-300)
    down = step * dy[row, col] / length / pixel_nm[1]
    right = step * dx[row, col] / length / pixel_nm[0]
    here = z[row, col]
    up_z, down_z = (map_coordinates(z, [row + s * down, col + s * right], order=1, mode="nearest") for s in (1, -1))
    top = (here >= up_z) & (here > down_z)
    row, col, here, up_z, down_z = row[top], col[top], here[top], up_z[top], down_z[top]
    return row, col, 0.5 * step * (up_z - down_z) / np.maximum(2.0 * here - up_z - down_z, 1e-300)


def _seen(window: ScanRegion, region: ScanRegion) -> float:
    """Which share of a window, probed at 16 x 16 points, lies inside the overview's region."""
    at = (np.arange(16) + 0.5) / 16
    grid = np.stack(np.meshgrid(at * window.fov_nm[0], at * window.fov_nm[1]), axis=-1).reshape(-1, 2)
    local = to_frame(to_specimen(grid, window), region)
    return float(((local >= 0) & (local <= np.array(region.fov_nm))).all(axis=1).mean())
