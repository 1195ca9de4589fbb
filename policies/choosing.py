"""What every policy shares: the mask, the grid of windows, exact comparison of scores, and the decision itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.protocols import History
from aecontrol.types import Explanation, Scan, ScanRegion

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

MAP_LIMIT = 4096
"""Posterior maps of more candidates than this are left out of the explanation, to keep the journal small (a choice)."""


def feasible_indices(history: History, candidates: Sequence[ScanRegion]) -> Indices:
    """Indices of the candidates that the guard allows, ascending. Raises BadInput when there is none to choose from,
    or when mask and candidates differ in length."""
    if len(history.feasible) != len(candidates):
        raise BadInput(
            f"the mask has {len(history.feasible)} entries for {len(candidates)} candidates",
            "give one entry of history.feasible per candidate",
        )
    indices = np.flatnonzero(np.asarray(history.feasible, dtype=bool))
    if indices.size == 0:
        raise BadInput(
            f"0 of {len(candidates)} candidates are feasible, at least 1 is needed", "stop the session first"
        )
    return indices


def first_kind(candidates: Sequence[ScanRegion], allowed: Indices) -> NDArray[np.bool_]:
    """Which candidates [n] are of the same kind (size, pixels, dwell time) as the first of ``allowed``: who does not
    weigh one kind of window against another uses up the first before the next."""
    kinds = [(region.fov_nm, region.shape, region.dwell_time_s) for region in candidates]
    return np.array([kind == kinds[int(allowed[0])] for kind in kinds])


def centres_nm(regions: Sequence[ScanRegion]) -> Floats:
    """[n, 2] centres (x, y), nm."""
    return np.array([region.center_nm for region in regions], dtype=np.float64).reshape(-1, 2)


def grid_axes_nm(candidates: Sequence[ScanRegion]) -> tuple[Floats, Floats]:
    """Centre coordinates along the fast and the slow axis of the windows, nm, each [n].

    Turned back by the rotation of the first window, so that the rows of a turned grid are rows here; rounded to
    1e-6 nm, so that windows of one row share one slow coordinate exactly.
    """
    x, y = centres_nm(candidates).T
    c, s = math.cos(candidates[0].rotation_rad), math.sin(candidates[0].rotation_rad)
    return np.round(c * x + s * y, 6), np.round(c * y - s * x, 6)


def extent_nm(candidates: Sequence[ScanRegion]) -> tuple[Floats, Floats]:
    """Corner (x, y) and size (x, y) of the box around all windows, nm."""
    corners = np.array([region.corners_nm() for region in candidates]).reshape(-1, 2)
    low = corners.min(axis=0)
    return low, corners.max(axis=0) - low


def round_significant(values: Floats, scale: float = 0.0) -> Floats:
    """``values`` rounded to 6 significant digits, where magnitudes below ``scale`` count as ``scale``.

    Differences below that are rounding noise of the linear algebra and must never decide. -inf stays.
    """
    rounded = np.array(values, dtype=np.float64)
    magnitude = np.maximum(np.abs(rounded), scale)
    live = np.isfinite(rounded) & (magnitude > 0)
    unit = 10.0 ** (np.floor(np.log10(magnitude[live])) - 5)
    rounded[live] = np.rint(rounded[live] / unit) * unit
    return rounded


def significant(value: float) -> float:
    """``value`` to 6 significant digits, as it is journaled."""
    return float(f"{value:.6g}")


def best_index(scores: Floats, allowed: Indices, scale: float = 0.0) -> int:
    """The candidate of ``allowed`` with the highest score [n], after rounding to 1e-6 relative; the lowest index wins
    a tie."""
    return int(allowed[int(np.argmax(round_significant(scores[allowed], scale)))])


def policy_stream(seed: int, *step: int) -> np.random.Generator:
    """The random stream of role 'policy' at ``step`` (without a step: of the whole session)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(b"policy"), *step)))


def sobol_choice(history: History, candidates: Sequence[ScanRegion], allowed: Indices, seed: int) -> int:
    """The allowed window nearest to point number ``history.step`` of a scrambled Sobol sequence over the field."""
    from scipy.stats import qmc

    sequence = qmc.Sobol(d=2, scramble=True, rng=policy_stream(seed))
    point = sequence.fast_forward(history.step).random(1)[0]
    low, size = extent_nm(candidates)
    distance = np.linalg.norm(centres_nm(candidates) - (low + point * size), axis=1)
    return best_index(-distance, allowed)


def evidence(history: History, candidates: Sequence[ScanRegion]) -> Floats:
    """[n] overview evidence of each window; NaN where perception abstained or there was no overview. Raises BadInput
    when there are overview readings, but not one per candidate."""
    if not history.overview:
        return np.full(len(candidates), np.nan)
    if len(history.overview) != len(candidates):
        raise BadInput(
            f"the overview has {len(history.overview)} readings for {len(candidates)} candidates",
            "give one overview reading per candidate, in candidate order",
        )
    return np.array([np.nan if o.value is None else o.value for o in history.overview], dtype=np.float64)


def place(candidates: Sequence[ScanRegion], index: int) -> str:
    """'window 12 of 64 at (7.5, 12.5) nm', for the reader of an explanation."""
    x, y = candidates[index].center_nm
    return f"window {index} of {len(candidates)} at ({x:.4g}, {y:.4g}) nm"


def scan(candidates: Sequence[ScanRegion], explanation: Explanation) -> Scan:
    """The decision to scan the candidate that ``explanation`` names."""
    if explanation.candidate is None:
        raise BadInput("the explanation names no candidate", "set Explanation.candidate to the chosen index")
    return Scan(regions=(candidates[explanation.candidate],), explanation=explanation)
