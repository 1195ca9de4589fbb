"""The later frame laid over the first: one shift of the whole, and one of every row where the scan jitters.

The whole shift is that of :func:`aecontrol.drift.measure_shift`, which refuses what a lattice leaves open. Frames are
resampled by turning the phases of their Fourier components. That is unitary: white noise stays white and keeps its
variance, only where it is larger follows the image less closely (an interpolation would smooth it, by up to a half
between two pixels). The null of an undamaged repeat is drawn through the same resampling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from aecontrol.drift import measure_shift

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MOST_MISFIT = 1.0
"""Structure that only one frame shows over what both show. Damage makes it large; beyond this little is left to lay one
frame over the other by."""
RIM_PX = 2
"""Pixels at the border of the overlap that resampling leaves inexact."""
PAD_PX = 16
"""Mirrored pixels around a frame while it is resampled, so that its opposite edges do not meet."""
JITTER_PX = 0.2
"""Rows are laid on each other one by one from this standard deviation on; below it little is gained."""
LARGEST_JITTER_PX = 3.0
LEAST_SURE = 2.0
"""Standard errors from which rows are said to jitter at all."""
ROW_PARTS = 4
"""Parts of a row that tell its shift independently."""
ROWS_ALIKE = 3.0
"""Jitter changes from row to row; atoms reach over about this many."""
ROWS_LEFT = 0.91
"""Standard deviation of independent shifts that is left when what neighbours share is taken away."""
ROW_SMOOTHING_PX = 1.5
"""Smoothing of the slope that tells a row's shift."""


@dataclass(frozen=True)
class Registration:
    """How the later frame lies. ``shift_px`` (dx, dy): its content has moved by so much; ``sigma_px``: standard
    deviation of that per axis; ``rows_px`` [rows]: what was found of each row beyond it; ``jitter_px`` [rows]: standard
    deviation of what each may still be shifted by; ``jitters_px``: standard deviation of how they were; ``across_px``:
    that of how rows are shifted towards their neighbours, which is left as it is; ``reason``: why the frames cannot be
    laid over each other, or ''."""

    shift_px: tuple[float, float]
    sigma_px: float
    rows_px: Floats
    jitter_px: Floats
    jitters_px: float = 0.0
    across_px: float = 0.0
    reason: str = ""

    @classmethod
    def none(cls, reason: str) -> Registration:
        """That of frames that cannot be laid over each other."""
        return cls((0.0, 0.0), np.inf, np.zeros(0), np.zeros(0), reason=reason)

    @property
    def residual_px(self) -> float:
        """Standard deviation along a row of what registration may have left."""
        return float(np.hypot(self.sigma_px, np.median(self.jitter_px)))

    def apply(self, frame: Floats) -> Floats:
        """The later frame [rows, cols] resampled on the pixels of the first; wrapped where it has none to show."""
        dx, dy = self.shift_px
        whole = round(dx), round(dy)
        moved = np.roll(frame, (-whole[1], -whole[0]), axis=(0, 1))
        rows = self.rows_px + dx - whole[0]
        return _along_rows(_along_rows(moved, rows).T, np.full(frame.shape[1], dy - whole[1])).T

    def undo(self, frame: Floats) -> Floats:
        """A frame on the pixels of the first one as the later scan would have seen it; wrapped at its border."""
        dx, dy = self.shift_px
        whole = round(dx), round(dy)
        still = _along_rows(frame.T, np.full(frame.shape[1], whole[1] - dy)).T
        return np.roll(_along_rows(still, whole[0] - dx - self.rows_px), (whole[1], whole[0]), axis=(0, 1))

    def shaken(self, frame: Floats, random: np.random.Generator) -> Floats:
        """A frame whose rows see what lies towards their neighbours, each by a shift of its own, drawn."""
        if self.across_px == 0.0:
            return frame
        away = random.normal(0.0, self.across_px, len(frame))[:, None]
        slope = np.gradient(frame, axis=0)
        return np.asarray(frame + away * slope + 0.5 * away**2 * np.gradient(slope, axis=0))

    def with_rows(self, first: Floats, later: Floats) -> Registration:
        """The same whole shift, with what the rows of these two frames say."""
        still = replace(self, rows_px=np.zeros(len(first)))
        seen = self.valid(first.shape)
        rows, left, spread = _jitter(first, still.apply(later), seen)
        found = replace(self, rows_px=rows, jitter_px=left, jitters_px=spread)
        return replace(found, across_px=_across(first, found.apply(later), seen))

    def redrawn(self, random: np.random.Generator) -> Registration:
        """A registration like this one with all errors and jitter that it may have, drawn."""
        wrong = random.normal(0.0, self.sigma_px, 2)
        at = (self.shift_px[0] + float(wrong[0]), self.shift_px[1] + float(wrong[1]))
        return replace(self, shift_px=at, rows_px=random.normal(0.0, self.jitters_px, len(self.rows_px)))

    def valid(self, shape: tuple[int, ...]) -> Bools:
        """The pixels [rows, cols] of the first frame that the later one shows too."""
        seen = np.zeros(shape, dtype=bool)
        cut = []
        for shift, size in zip(self.shift_px[::-1], shape, strict=True):
            rim = RIM_PX if shift % 1.0 else 0
            cut.append(slice(max(0, int(np.ceil(-shift))) + rim, min(size, size - int(np.ceil(shift))) - rim))
        seen[tuple(cut)] = True
        return seen


def register(
    first: Floats,
    later: Floats,
    pixel_size_nm: tuple[float, float],
    limit_nm: float,
    expected_px: tuple[int, int] = (0, 0),
) -> Registration:
    """Lay ``later`` [rows, cols] over ``first``, both in counts, within ``limit_nm`` of ``expected_px`` (dx, dy)."""
    dx, dy = expected_px
    rows, cols = first.shape
    if abs(dy) >= rows or abs(dx) >= cols:
        return Registration.none(f"a shift of {expected_px} px leaves no overlap")
    ours = first[max(0, -dy) : rows - max(0, dy), max(0, -dx) : cols - max(0, dx)]
    theirs = later[max(0, dy) : rows + min(0, dy), max(0, dx) : cols + min(0, dx)]
    shift = measure_shift(ours, theirs, pixel_size_nm, limit_nm, MOST_MISFIT)
    if not shift.accepted:
        return Registration.none(shift.reason)
    at = (float(dx + shift.dx_nm / pixel_size_nm[0]), float(dy + shift.dy_nm / pixel_size_nm[1]))
    still = np.zeros(rows)
    whole = Registration(at, shift.sigma_nm / min(pixel_size_nm), still, still)
    return whole.with_rows(first, later)


def _jitter(first: Floats, later: Floats, valid: Bools) -> tuple[Floats, Floats, float]:
    """Shift [rows] of every row beyond that of its neighbours, the standard deviation [rows] of what is not known of
    it, and the standard deviation of all. No shift where the rows hardly jitter. What moves several rows alike may be
    atoms, and is left."""
    at, left, spread = np.zeros(len(first)), np.zeros(len(first)), 0.0
    for _ in range(3):  # a large shift is found in steps, for each is taken as small
        pulls = _Pulls.of(first, _along_rows(later, at), valid, axis=1)
        found, spread = pulls.own(at)
        if spread <= JITTER_PX:
            return np.zeros(len(first)), np.full(len(first), spread), spread
        sigma = pulls.sigma
        known = spread**2 / (spread**2 + sigma**2)  # of a normal prior and a normal error
        at, left = np.clip(known * found, -LARGEST_JITTER_PX, LARGEST_JITTER_PX), np.sqrt(known) * sigma
    return at, left, spread


def _across(first: Floats, later: Floats, valid: Bools) -> float:
    """Standard deviation of the shifts of rows towards their neighbours."""
    return _Pulls.of(first, later, valid, axis=0).own(np.zeros(len(first)))[1]


@dataclass(frozen=True)
class _Pulls:
    """Least squares for the shift of each row of a frame, part by part of the row: ``right`` sides and ``square`` terms
    [parts, rows], the standard error ``sigma`` [rows] of the whole row's shift by shot noise, and which rows both
    frames show, ``seen`` [rows]."""

    right: Floats
    square: Floats
    sigma: Floats
    seen: Bools

    @classmethod
    def of(cls, first: Floats, later: Floats, valid: Bools, axis: int) -> _Pulls:
        """For shifts of the rows of ``later``, taken as small, along ``axis``.

        The slope is that of both frames together, whose noise does not correlate with that of their difference; its
        square is taken as the product of either frame's slope, whose noises do not correlate with each other.
        """
        from scipy.ndimage import gaussian_filter, gaussian_filter1d

        ratio = float(later[valid].sum()) / max(float(first[valid].sum()), 1e-300)
        a, b = ratio * first, np.where(valid, later, ratio * first)
        order = (0, 1) if axis == 1 else (1, 0)
        slope_a, slope_b = (np.where(valid, gaussian_filter(f, ROW_SMOOTHING_PX, order=order), 0.0) for f in (a, b))
        raw_a, raw_b = (np.gradient(f, axis=axis) for f in (a, b))
        slope = 0.5 * (slope_a + slope_b)

        def parts(image: Floats) -> Floats:
            return np.stack([part.sum(axis=1) for part in np.array_split(image, ROW_PARTS, axis=1)])

        square = gaussian_filter1d(parts(0.5 * (slope_a * raw_b + slope_b * raw_a)), 2.0, axis=1)
        square = np.maximum(square, 0.05 * max(float(square.mean()), 1e-300))
        noise = gaussian_filter1d(((ratio * a + b).clip(0.0) * slope**2).sum(axis=1), 2.0)
        sigma = np.sqrt(np.maximum(noise, 1e-300)) / square.sum(axis=0)
        return cls(parts(_unfocused(a, b, valid) * slope), square, sigma, np.asarray(valid.any(axis=1)))

    def own(self, at: Floats) -> tuple[Floats, float]:
        """Shifts [rows] of a frame whose rows were moved back by ``at`` [rows] beyond what neighbours share, and their
        standard deviation; 0 where there may be none.

        All parts of a row share its shift, and nothing else: neither noise nor what damage does to single atoms. So the
        mean product of what two parts say is the variance.
        """
        from scipy.ndimage import gaussian_filter1d

        shift = at + self.right.sum(axis=0) / self.square.sum(axis=0)
        shared = gaussian_filter1d(shift, ROWS_ALIKE)
        own, square = ((self.right + self.square * (at - shared))[:, self.seen], self.square[:, self.seen])
        products = own.sum(axis=0) ** 2 - (own**2).sum(axis=0)
        if products.sum() <= LEAST_SURE * np.sqrt((products**2).sum()):
            return shift - shared, 0.0
        scale = (square.sum(axis=0) ** 2 - (square**2).sum(axis=0)).sum()
        spread = float(np.sqrt(products.sum() / scale)) / ROWS_LEFT
        return shift - shared, min(spread, LARGEST_JITTER_PX)


def _unfocused(a: Floats, b: Floats, valid: Bools) -> Floats:
    """``a - b`` [rows, cols] without what dose and focus explain of it: where columns of atoms lie along the rows, all
    of a row loses or gains by focus as if it were shifted."""
    from scipy.ndimage import gaussian_filter, gaussian_laplace

    mean, difference = 0.5 * (a + b), a - b
    fields = [filtered(mean, ROW_SMOOTHING_PX) for filtered in (gaussian_filter, gaussian_laplace)]
    design = np.stack([*(field[valid] for field in fields), np.ones(int(valid.sum()))], axis=-1)
    weights = np.linalg.lstsq(design.T @ design, design.T @ difference[valid], rcond=None)[0]
    return np.asarray(difference - weights[0] * fields[0] - weights[1] * fields[1] - weights[2])


def _along_rows(frame: Floats, shift: Floats) -> Floats:
    """Row r of ``frame`` moved back by ``shift`` [rows] pixels."""
    if not np.any(shift):
        return frame
    padded = np.pad(frame, ((0, 0), (PAD_PX, PAD_PX)), mode="reflect")
    turn = np.exp(2j * np.pi * np.fft.rfftfreq(padded.shape[1]) * shift[:, None])
    if padded.shape[1] % 2 == 0:
        turn[:, -1] = 1.0  # the highest frequency has no phase to turn
    moved = np.fft.irfft(np.fft.rfft(padded, axis=1) * turn, padded.shape[1], axis=1)
    return np.asarray(moved[:, PAD_PX:-PAD_PX])
