"""From two frames to a reading of damage: registration, metric, and the null of an undamaged repeat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aecontrol.drift import measure_shift
from aecontrol.errors import BadInput

from . import classical
from .null import Metric, undamaged
from .pair import Pair, in_counts
from .reading import DamageReading, per_patch, refused

METRICS: dict[str, Metric] = {"glr": classical.likelihood_ratio}


@dataclass(frozen=True)
class Meter:
    """A metric with all that makes it comparable. ``version``: changes whenever the numbers may."""

    name: str
    metric: Metric
    version: str
    sha256: str = ""

    def read(
        self,
        first: NDArray[np.generic],
        later: NDArray[np.generic],
        pixel_size_nm: tuple[float, float],
        limit_nm: float,
    ) -> DamageReading:
        """Compare ``later`` with ``first`` [rows, cols], both with pixels of ``pixel_size_nm`` (fast, slow), shifted by
        at most ``limit_nm``. Frames that nothing may be concluded from give a reading that says why. Deterministic."""
        from scipy.ndimage import shift as moved

        shift = measure_shift(first, later, pixel_size_nm, limit_nm)
        if not shift.accepted:
            return refused(first.shape, self.name, self.sha256, shift.reason)
        dx, dy = shift.dx_nm / pixel_size_nm[0], shift.dy_nm / pixel_size_nm[1]
        a = in_counts(first)
        b = moved(in_counts(later), (-dy, -dx), order=3, mode="constant", cval=np.nan, prefilter=True)
        valid = np.isfinite(b)
        b = np.where(valid, b, 0.0)
        ratio = float(b[valid].sum() / a[valid].sum())
        pair = Pair(np.where(valid, a, 0.0), b, ratio, valid)
        score, null = self.metric(pair), undamaged(pair, self.metric)
        whole = np.asarray(per_patch(valid).all(axis=(2, 3)))
        return DamageReading(
            score=np.where(whole, score - null.mean, np.nan),
            sd=np.where(whole, null.sd, np.nan),
            p=np.where(whole, null.p(score), 1.0),
            valid=whole,
            shift_px=(dx, dy),
            residual_px=shift.sigma_nm / min(pixel_size_nm),
            reason="",
            metric=self.name,
            sha256=self.sha256,
        )


def build_meter(name: str, device: str, weights: Path | None = None) -> Meter:
    """The meter called ``name``, computing on ``device``; ``weights``: others than the shipped ones. Raises BadInput
    for a metric that does not exist."""
    if name not in METRICS:
        raise BadInput(f"metric {name!r} is not known", f"use one of {', '.join(METRICS)}")
    return Meter(name, METRICS[name], "1")
