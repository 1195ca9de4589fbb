"""How damage follows fluence: what is believed of it now, as draws from a posterior. Pure arithmetic.

Damage is the share d of the matter in a patch that the beam has displaced or removed,

    d(F) = 1 - exp(-(F / F_c)^k)

with one critical fluence F_c for each phase of the specimen; a metric shows A (d(F_later) - d(F_first)), A being its
gain. Until a phase has been seen at fluences beyond its F_c, only the slope 1 / F_c is known and not where damage
saturates: then the straight line F / F_c (for k = 1) stands for d, which it bounds from above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aecontrol.types import Count, Model, NonNegative, Positive

Floats = NDArray[np.float64]
DRAWS = 128
PRIOR_SD = 2.0
"""Standard deviation of the logarithm of a critical fluence before anything was measured."""
Draws = Annotated[tuple[Positive, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Evidence:
    """Patches of one phase, compared between two exposures. ``phase`` indexes ``Response.phases``; ``first`` and
    ``later`` [n] e/A^2: fluence at the patch in the middle of either exposure; ``score`` [n]: excess of the metric over
    its null; ``sd`` [n]: standard deviation of the score of an undamaged patch; ``frame``: name of the first frame,
    whose noise all comparisons with it share ('': no other is compared with it); ``units``: atoms or bond units in a
    patch that break by themselves, infinite where that is not known."""

    phase: int
    first: Floats
    later: Floats
    score: Floats
    sd: Floats
    frame: str = ""
    units: float = math.inf


class Response(Model):
    """Joint draws from the posterior of the critical fluences and of the metric's gain."""

    phases: tuple[str, ...] = Field(min_length=1, description="names")
    critical_fluence_e_per_A2: tuple[Draws, ...] = Field(description="by phase and draw")
    amplitude: Draws = Field(description="score of a patch that is wholly damaged, by draw")
    exponent: Positive = Field(1.0, description="k")
    tested_e_per_A2: tuple[NonNegative, ...] = Field(description="highest fluence that evidence covers, by phase")
    patches: Count = Field(description="comparisons of patches that it rests on; 0: the prior")
    method: str = Field(description="'prior', or how it was fitted")
    diagnostics: dict[str, float] = Field(default_factory=dict, description="what tells whether the fit can be trusted")

    @model_validator(mode="after")
    def _one_draw_each(self) -> Response:
        sizes = {len(self.amplitude), *(len(draws) for draws in self.critical_fluence_e_per_A2)}
        if len(sizes) != 1 or not len(self.phases) == len(self.critical_fluence_e_per_A2) == len(self.tested_e_per_A2):
            raise ValueError("a response needs one critical fluence a phase and draw, and one amplitude a draw")
        return self

    def damaged(self, phase: NDArray[np.int64], fluence: Floats) -> Floats:
        """Share of the matter that is damaged [draws, n] where ``phase`` [n] has received ``fluence`` [n] e/A^2: a
        straight line in F^k, cut at 1, for a phase whose critical fluence is not yet likely to have been passed."""
        scale, saturates = _tables(self.critical_fluence_e_per_A2, self.tested_e_per_A2)
        x = (fluence / scale[:, phase]) ** self.exponent
        if saturates.all():  # the most common case by far, at half the cost
            return np.asarray(-np.expm1(-x))
        return np.where(saturates[phase], -np.expm1(-x), np.minimum(x, 1.0))

    def score(self, phase: NDArray[np.int64], first: Floats, later: Floats) -> Floats:
        """What the metric is expected to show [draws, n] between two fluences, e/A^2 [n]."""
        scale, _ = _tables(self.critical_fluence_e_per_A2, self.tested_e_per_A2)
        change = np.exp(-((first / scale[:, phase]) ** self.exponent))
        change = change - np.exp(-((later / scale[:, phase]) ** self.exponent))
        return np.array(self.amplitude)[:, None] * change


@lru_cache(maxsize=8)
def _tables(critical: tuple[tuple[float, ...], ...], tested: tuple[float, ...]) -> tuple[Floats, NDArray[np.bool_]]:
    """Critical fluences [draws, phases], and which phases are known to saturate [phases]."""
    scale = np.array(critical).T
    return scale, np.median(scale, axis=0) < np.array(tested)


def prior(phases: tuple[str, ...], reference_e_per_A2: float, exponent: float) -> Response:
    """What is believed before anything was measured: log F_c normal about the first guess, the same for every phase."""
    normal = NormalDist()
    spread = [normal.inv_cdf((k + 0.5) / DRAWS) for k in range(DRAWS)]
    draws = tuple(reference_e_per_A2 * float(np.exp(PRIOR_SD * z)) for z in spread)
    return Response(
        phases=phases,
        critical_fluence_e_per_A2=(draws,) * len(phases),
        amplitude=(1.0,) * DRAWS,
        exponent=exponent,
        tested_e_per_A2=(0.0,) * len(phases),
        patches=0,
        method="prior",
    )
