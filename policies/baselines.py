"""Policies that learn nothing from the sub-scans, or only the simplest thing: what a learned policy has to beat.

None of them weighs one kind of window against another: each uses up the plan's first kind before it takes the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aecontrol.protocols import History
from aecontrol.types import Decision, Explanation, Model, ScanRegion

from .choosing import (
    Floats,
    Indices,
    best_index,
    centres_nm,
    evidence,
    feasible_indices,
    first_kind,
    grid_axes_nm,
    place,
    policy_stream,
    scan,
    significant,
    sobol_choice,
)


class Raster(Model):
    """Row by row from the top-left corner, every row from left to right: a plain tiled scan."""

    kind: Literal["raster"] = "raster"

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """The first feasible window in raster order."""
        allowed, _ = _allowed(history, candidates)
        fast, slow = grid_axes_nm(candidates)
        order = np.lexsort((fast, slow))
        return _next_in_order(self.kind, order[np.isin(order, allowed)], candidates)


class Serpentine(Model):
    """Row by row from the top-left corner, every other row from right to left: the shortest path of the beam."""

    kind: Literal["serpentine"] = "serpentine"

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """The first feasible window in serpentine order."""
        allowed, kind = _allowed(history, candidates)
        fast, slow = grid_axes_nm(candidates)
        row = np.searchsorted(np.unique(slow[kind]), slow)
        order = np.lexsort((np.where(row % 2 == 0, fast, -fast), row))
        return _next_in_order(self.kind, order[np.isin(order, allowed)], candidates)


class Random(Model):
    """Uniformly at random among the feasible windows."""

    kind: Literal["random"] = "random"

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """One draw from the stream of (seed, 'policy', step)."""
        allowed, _ = _allowed(history, candidates)
        index = int(policy_stream(seed, history.step).choice(allowed))
        why = f"{place(candidates, index)}, drawn at random from {allowed.size} feasible windows"
        return scan(candidates, Explanation(policy=self.kind, why=why, candidate=index))


class Sobol(Model):
    """Space filling: a scrambled Sobol sequence (Owen scrambling, seeded), each point moved to the nearest feasible
    window."""

    kind: Literal["sobol"] = "sobol"

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """The window nearest to point number ``history.step``."""
        allowed, _ = _allowed(history, candidates)
        index = sobol_choice(history, candidates, allowed, seed)
        why = (
            f"{place(candidates, index)}, the nearest of {allowed.size} feasible windows to Sobol point {history.step}"
        )
        return scan(candidates, Explanation(policy=self.kind, why=why, candidate=index))


class Greedy(Model):
    """Exploit only: the highest evidence that is already there, learning no relation between evidence and target.

    With an overview the evidence is the overview's. Without one it is the value of the nearest sub-scan (nearest
    neighbour regression), the nearer window first; before any value, the first feasible window.
    """

    kind: Literal["greedy"] = "greedy"

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """The feasible window with the highest evidence; the lowest index wins a tie."""
        allowed, _ = _allowed(history, candidates)
        overview = evidence(history, candidates)
        fallback = None
        if np.isfinite(overview).any():
            scores = np.where(np.isfinite(overview), overview, -np.inf)
            what = "highest overview evidence"
        else:
            scores, allowed = _nearest_values(history, candidates, allowed)
            what = "nearest to the best sub-scan so far, value"
        index = best_index(scores, allowed)
        if np.isfinite(scores[index]):
            why = f"{place(candidates, index)}: {what} {scores[index]:.4g}, among {allowed.size} windows"
            mean = significant(float(scores[index]))
        else:
            why = f"{place(candidates, index)}: no evidence yet, the first of {allowed.size} feasible windows"
            fallback, mean = "first feasible window: no evidence", None
        explanation = Explanation(policy=self.kind, why=why, candidate=index, mean=mean, fallback=fallback)
        return scan(candidates, explanation)


def _allowed(history: History, candidates: Sequence[ScanRegion]) -> tuple[Indices, NDArray[np.bool_]]:
    """The feasible windows of the kind that is to be used up first, and which candidates [n] are of that kind."""
    allowed = feasible_indices(history, candidates)
    kind = first_kind(candidates, allowed)
    return allowed[kind[allowed]], kind


def _next_in_order(kind: str, order: Indices, candidates: Sequence[ScanRegion]) -> Decision:
    index = int(order[0])
    why = f"{place(candidates, index)}, the first of {order.size} feasible windows in {kind} order"
    return scan(candidates, Explanation(policy=kind, why=why, candidate=index))


def _nearest_values(history: History, candidates: Sequence[ScanRegion], allowed: Indices) -> tuple[Floats, Indices]:
    """Value of the sub-scan nearest to each candidate [n] (-inf before any), and ``allowed`` with, among the windows
    of the best value, only the nearest ones kept."""
    known = [o for o in history.scans if o.value is not None]
    if not known:
        return np.full(len(candidates), -np.inf), allowed
    values = np.array([o.value for o in known], dtype=np.float64)
    gaps = centres_nm(candidates)[:, None] - centres_nm([o.region for o in known])[None]
    distance = np.round(np.linalg.norm(gaps, axis=2), 6)
    # Of equally near sub-scans the better one speaks.
    nearest = distance.min(axis=1)
    scores = np.where(distance == nearest[:, None], values, -np.inf).max(axis=1)
    best = allowed[scores[allowed] == scores[allowed].max()]
    return scores, best[nearest[best] == nearest[best].min()]
