"""Where the atoms are: network heat map, decoded to centres, refined by a joint fit on the counts themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from . import complete, refine, sampling
from .ensemble import Ensemble

if TYPE_CHECKING:
    from .windows import Progress

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

HEAT_SIGMA_NM = 0.035
"""Width of the Gaussian that the network is trained to put on each centre."""
MERGE_NM = 0.06
"""Two peaks closer than this are one atom seen twice."""
RIM_NM, CLEAR_AT_RIM = 0.05, 2.5
"""An atom this close to the rim may as well be a brighter one outside, unless it stands out by so many errors."""
GATHER_NM = 0.075
"""Heat within this radius of a peak belongs to its atom: about half the closest spacing known here (C-C, 0.142 nm)."""


@dataclass(frozen=True)
class Found:
    """Atoms (columns) of one image, n of them, most certain first.

    Positions are fractional pixels of the given image: the centre of pixel [0, 0] is (0.5, 0.5). Image units are those
    of the image: counts, if it holds counts.
    """

    x_px: Floats
    y_px: Floats
    confidence: Floats
    """[n] expected number of atoms near the peak according to the networks, at most 1; on a site of a crystal the
    posterior probability that it holds one."""
    sigma_x: Floats
    """[n] standard error of x, px (inverse Fisher information, all neighbours and the background free)."""
    sigma_y: Floats
    """[n] standard error of y, px."""
    intensity: Floats
    """[n] background-subtracted integral of the fitted Gaussian: image units summed over pixels."""
    sigma_intensity: Floats
    """[n] standard error of ``intensity``."""
    disagreement: Floats
    """[n] mutual information of the ensemble about the atom's existence, nat: 0 where the networks agree."""
    spread_nm: Floats
    """[n] root mean square distance of the networks' own positions from their mean, nm."""
    completed: Bools
    """[n] True for atoms that the network did not see: the image bears them out where a crystal pointed to."""
    background: float
    """Mean fitted background per pixel, image units."""
    blur_nm: float | None
    """Standard deviation of the Gaussian common to all columns, nm; None when nothing was found."""

    def __len__(self) -> int:
        return len(self.x_px)

    def where(self, keep: Bools) -> Found:
        """Those of the atoms that ``keep`` [n] names."""
        kept: dict[str, Any] = {
            name: value[keep] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **kept)


class AtomFinder:
    """Finds atoms and atomic columns in HAADF-like images (bright on dark) of any gain and offset."""

    def __init__(self, weights: Path | None = None, device: str = "cpu") -> None:
        """``weights``: a safetensors file as ``train_atoms`` writes; None: the shipped ones. Raises BadInput when the
        file cannot be read as such."""
        self._networks = Ensemble("atoms", weights, device)
        self._device = device

    @property
    def version(self) -> str:
        """Hash of the weights."""
        return self._networks.version

    def find(
        self,
        image: NDArray[np.generic],
        pixel_size_nm: tuple[float, float],
        threshold: float = 0.5,
        refined: bool = True,
        progress: Progress | None = None,
    ) -> Found:
        """Atoms of ``image`` [rows, cols], pixels ``pixel_size_nm`` (x, y), with at least ``threshold`` confidence.

        In crystals every site is judged by its counts (:mod:`.complete`). Not ``refined``: positions are the network's
        own, and intensities and all standard errors NaN. ``progress`` is told of the windows that the network has read.
        Deterministic; does not depend on the image's gain and offset.
        Raises BadInput for an image that is not 2-D, not finite, too coarse (0.13 nm) or too small (0.24 nm).
        """
        resampled = sampling.resample(image, pixel_size_nm)
        heats = self._heats(resampled, progress)
        scale_y, scale_x = resampled.scale
        pixel_yx = (pixel_size_nm[1] * scale_y, pixel_size_nm[0] * scale_x)
        if not refined:
            return _unrefined(decode(heats, pixel_yx, threshold), resampled)
        # a crystal may bear out what the network alone would not
        peaks = decode(heats, pixel_yx, 0.5 * threshold)
        starts = _starts(peaks, resampled, pixel_size_nm, threshold)
        x, y = (starts.xy / pixel_size_nm).T
        fit = refine.refine(np.asarray(image), x, y, pixel_size_nm, self._device)
        return _refined(peaks, starts, fit, np.shape(image), pixel_size_nm)

    def _heats(self, resampled: sampling.Resampled, progress: Progress | None) -> NDArray[np.float32]:
        from . import windows

        maps = []
        members = self._networks.members
        for k, net in enumerate(members):
            step = _share(progress, k, len(members))
            maps.append(windows.heat(cast(windows.Net, net), resampled.image, self._device, progress=step)[0])
        return np.stack(maps)


def _share(progress: Progress | None, k: int, members: int) -> Progress | None:
    """Progress of member ``k`` as that of all."""
    if progress is None:
        return None
    return lambda done, total: progress(k * total + done, members * total)


def _starts(
    peaks: Peaks, resampled: sampling.Resampled, pixel_nm: tuple[float, float], threshold: float
) -> complete.Candidates:
    """Peaks, and the sites of the crystals that they form, as the counts show them."""
    bin_y, bin_x = resampled.bins
    at = np.stack([peaks.cols, peaks.rows], 1) * resampled.scale[::-1] * pixel_nm
    coarse = (pixel_nm[0] * bin_x, pixel_nm[1] * bin_y)
    return complete.complete(resampled.binned, coarse, at, peaks.confidence, threshold)


def _refined(
    peaks: Peaks,
    starts: complete.Candidates,
    fit: refine.Fit,
    shape: tuple[int, ...],
    pixel_nm: tuple[float, float],
) -> Found:
    """The fitted columns inside the frame: an atom outside may shine into it and help the fit, but is not in the image.
    So do those that only the residual shows: neither the network nor a crystal says that they are atoms."""
    n = len(starts.xy)
    xy, sigma = np.stack([fit.x, fit.y], 1)[:n] * pixel_nm, np.stack([fit.sigma_x, fit.sigma_y], 1)[:n] * pixel_nm
    xy, sigma = starts.settled(xy, sigma)
    depth = np.minimum(xy, np.array(shape[::-1]) * pixel_nm - xy).min(1)
    clear = fit.significance[:n] > np.where(depth < RIM_NM, CLEAR_AT_RIM, 0.0)
    inside = (depth >= 0) & clear
    rows = np.flatnonzero(inside)[np.argsort(-starts.confidence[inside], kind="stable")]
    peak = starts.peak[rows]  # row -1, of what the network did not see, is the zero appended
    (x, y), (sigma_x, sigma_y) = (xy / pixel_nm)[rows].T, (sigma / pixel_nm)[rows].T
    return Found(
        x_px=x,
        y_px=y,
        confidence=starts.confidence[rows],
        sigma_x=sigma_x,
        sigma_y=sigma_y,
        intensity=fit.intensity[rows],
        sigma_intensity=fit.sigma_intensity[rows],
        disagreement=np.append(peaks.disagreement, 0.0)[peak],
        spread_nm=np.append(peaks.spread_nm, 0.0)[peak],
        completed=starts.completed[rows],
        background=fit.background,
        blur_nm=fit.blur_nm,
    )


def _unrefined(peaks: Peaks, resampled: sampling.Resampled) -> Found:
    """What the network alone says."""
    unknown = np.full(len(peaks.rows), np.nan)
    background = float(np.median(resampled.binned)) / (resampled.bins[0] * resampled.bins[1])
    scale_y, scale_x = resampled.scale
    return Found(
        x_px=peaks.cols * scale_x,
        y_px=peaks.rows * scale_y,
        confidence=peaks.confidence,
        sigma_x=unknown,
        sigma_y=unknown,
        intensity=unknown,
        sigma_intensity=unknown,
        disagreement=peaks.disagreement,
        spread_nm=peaks.spread_nm,
        completed=np.zeros(len(peaks.rows), dtype=bool),
        background=background,
        blur_nm=None,
    )


@dataclass(frozen=True)
class Peaks:
    """Peaks of the members' heat maps, n of them, brightest first; pixel centres at +1/2. See :class:`Found`."""

    rows: Floats
    cols: Floats
    confidence: Floats
    disagreement: Floats
    spread_nm: Floats


def decode(heats: NDArray[np.float32], pixel_yx_nm: tuple[float, float], threshold: float) -> Peaks:
    """Peaks of the mean of heat maps [members, h, w] with at least ``threshold`` confidence.

    A peak is the largest value of the slightly smoothed heat within ``GATHER_NM``/2. Its confidence is the heat within
    ``GATHER_NM`` over what one certain atom puts there: because the network regresses the heat, that is the expected
    number of atoms there even where their position is uncertain. Its position is the heat's centroid there.
    """
    from scipy.ndimage import convolve, gaussian_filter, maximum_filter

    reach = [int(np.ceil(GATHER_NM / p)) for p in pixel_yx_nm]
    dy, dx = np.mgrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    distance = np.hypot(dy * pixel_yx_nm[0], dx * pixel_yx_nm[1])
    disc = (distance <= GATHER_NM).astype(np.float32)
    bell = np.exp(-0.5 * (distance / HEAT_SIGMA_NM) ** 2) * disc
    certain = bell.sum()
    heat = heats.mean(0)
    # an atom on the rim has only part of its disc inside: compare with the part of a certain atom that is inside
    inside = convolve(np.ones_like(heat), (bell / certain).astype(np.float32), mode="constant")
    score = convolve(heat, disc / certain, mode="constant") / inside
    smooth = gaussian_filter(heat, [0.02 / p for p in pixel_yx_nm], mode="constant")
    near = (distance <= 0.5 * GATHER_NM) | (np.maximum(abs(dy), abs(dx)) <= 1)
    peaks = (smooth == maximum_filter(smooth, footprint=near, mode="constant")) & (score >= threshold) & (smooth > 0.02)
    rows, cols = np.nonzero(peaks)
    order = np.argsort(-smooth[rows, cols], kind="stable")
    rows, cols = rows[order], cols[order]
    padded = np.pad(heats.astype(np.float64), ((0, 0), (reach[0],) * 2, (reach[1],) * 2))
    windows = padded[:, (rows + reach[0])[:, None, None] + dy, (cols + reach[1])[:, None, None] + dx] * disc
    mass = windows.sum((2, 3))
    moments = np.stack([(windows * dy).sum((2, 3)), (windows * dx).sum((2, 3))], -1)  # [members, n, 2]
    at = np.stack([rows, cols], 1) + 0.5 + moments.sum(0) / (mass.sum(0)[:, None] + 1e-12)
    single = _without_doubles(at * pixel_yx_nm)
    part = mass / (certain * inside[rows, cols])
    return Peaks(
        rows=at[single, 0],
        cols=at[single, 1],
        confidence=np.clip(score[rows, cols], 0.0, 1.0).astype(np.float64)[single],
        disagreement=_mutual_information(np.clip(part, 0.0, 1.0))[single],
        spread_nm=_spread(moments / (mass[..., None] + 1e-12) * pixel_yx_nm, mass)[single],
    )


def _mutual_information(p: Floats) -> Floats:
    """Entropy of the members' mean less the mean of their entropies, nat: [members, n] -> [n] (A. Malinin and M. Gales,
    NeurIPS 2018)."""

    def entropy(q: Floats) -> Floats:
        q = np.clip(q, 1e-9, 1 - 1e-9)
        return np.asarray(-q * np.log(q) - (1 - q) * np.log1p(-q))

    return np.asarray(np.maximum(entropy(p.mean(0)) - entropy(p).mean(0), 0.0))


def _spread(at_nm: Floats, mass: Floats) -> Floats:
    """Root mean square distance of the members' positions [members, n, 2] from their mean, weighted by ``mass``."""
    weight = mass / (mass.sum(0) + 1e-12)
    centre = (weight[..., None] * at_nm).sum(0)
    return np.asarray(np.sqrt((weight * ((at_nm - centre) ** 2).sum(-1)).sum(0)))


def _without_doubles(at_nm: Floats) -> NDArray[np.bool_]:
    """Which of the peaks, brightest first, to keep so that no two are closer than ``MERGE_NM``."""
    from scipy.spatial import cKDTree

    keep = np.ones(len(at_nm), dtype=bool)
    for first, second in sorted(cKDTree(at_nm).query_pairs(MERGE_NM)) if len(at_nm) else ():
        if keep[first]:
            keep[second] = False
    return keep
