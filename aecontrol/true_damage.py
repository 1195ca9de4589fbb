"""What the beam really did to a simulated specimen, tile by tile; for scoring only."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aecontrol.protocols import Truth

Floats = NDArray[np.float64]
SCATTERING_POWER = 1.7
"""Matter is weighed by this power of the atomic number, by which it scatters to high angles."""


def true_damage(
    truth: Truth, field_nm: tuple[float, float], margin: int = 0, until_s: float = math.inf
) -> Floats | None:
    """Share of the matter of each 1 nm tile [ny, nx] that the beam had displaced or removed by the clock ``until_s``,
    each site weighed by its scattering power; 0 where there is none, None where the truth does not tell.

    The first tile begins ``margin`` tiles outside the field. What healed is whole again. A vacancy's hop changes both
    of its sites: the one that an atom left is damaged, the one that it filled is whole.
    """
    if truth.sites is None:
        return None
    damaged = np.zeros(len(truth.sites), dtype=np.bool_)
    for change in truth.changes:
        if change.time_s <= until_s:
            hopped = change.kind == "hopped" and not damaged[change.site]
            damaged[change.site] = change.kind in ("removed", "displaced") or hopped
    matter = truth.sites[:, 2] ** SCATTERING_POWER
    nx, ny = (math.ceil(side) + 2 * margin for side in field_nm)
    tile = np.floor(truth.sites[:, :2]).astype(np.int64) + margin
    inside = ((tile >= 0) & (tile < (nx, ny))).all(axis=1)
    flat = tile[inside] @ (1, nx)
    lost, there = (
        np.bincount(flat, weights=weight[inside], minlength=nx * ny) for weight in (matter * damaged, matter)
    )
    return np.divide(lost, there, out=np.zeros(nx * ny), where=there > 0.0).reshape(ny, nx)
