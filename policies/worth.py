"""What a window is worth beside what is expected at its place: how large it is, how long it dwells, what has been seen
there already, how much of its matter is still whole, and what it is charged. Pure arithmetic.

Values are sums over a window (counts of targets), so they grow with its area. A window shows the share

    p(e) = 1 - exp(-(e / e0)^2)

of the targets in it, e being its exposure, the beam time per area: far below e0 a target drowns in the noise, far above
it more electrons show nothing new, and p / e, what an electron shows, is highest in between (at 1.12 e0). The law is a
choice; e0 is learned from the sub-scans. A target that one scan has missed is taken to be missed by every scan that
exposes no more: what is left to see at a place that was scanned is p(e) - p(e scanned), and never less than nothing.

Everything is relative to the first candidate: where all windows are alike, sizes, gains and shares are exactly 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from aecontrol.errors import BadInput
from aecontrol.protocols import History
from aecontrol.types import Charge, ScanRegion

from .choosing import Floats

if TYPE_CHECKING:
    from .surrogate import Design

Cost = Literal["none", "electrons", "damage", "seconds"]

FREE = 1e-3
"""A charge below this share of the dearest window's counts as this share: what is free is not worth everything."""
THRESHOLDS = np.exp(np.linspace(-math.log(8.0), math.log(8.0), 13))
"""Values of e0 that are weighed, in exposures of the first kind of window; their logarithm is N(0, 1) beforehand: the
user is taken to have chosen a first kind that is about right."""
ROUNDING = 1e-9
"""A smaller share than this of what a window shows is nothing: exposures are products that are rounded."""
POINTS = (np.arange(6) + 0.5) / 6 - 0.5
"""Where along each side a window is asked whether it has been seen, in units of the side."""


@dataclass(frozen=True)
class Looks:
    """How closely windows look: ``area`` [n] and ``exposure`` [n], beam time per area, both relative to the first;
    ``alike``: whether all are of one kind, pixels included."""

    area: Floats
    exposure: Floats
    alike: bool

    @classmethod
    def of(cls, regions: Sequence[ScanRegion], first: ScanRegion) -> Looks:
        """The looks of ``regions``."""
        area = np.array([region.area_nm2 for region in regions], dtype=np.float64)
        time = np.array([region.pixels * region.dwell_time_s for region in regions], dtype=np.float64)
        unit = first.pixels * first.dwell_time_s / first.area_nm2
        kinds = {(region.fov_nm, region.shape, region.dwell_time_s) for region in (first, *regions)}
        return cls(area / first.area_nm2, (time / area) / unit, len(kinds) == 1)

    def first(self, n: int) -> Looks:
        """The looks of the first n windows."""
        return Looks(self.area[:n], self.exposure[:n], self.alike)

    def gain(self, threshold: float) -> Floats:
        """What each window shows of unseen ground [n], over what a window of the first kind would."""
        return np.asarray(self.area * (shown(self.exposure, threshold) / shown(np.ones(1), threshold)[0]))


def shown(exposure: Floats, threshold: float) -> Floats:
    """Share of the targets that an exposure shows [n], e0 being ``threshold``."""
    return np.asarray(-np.expm1(-((exposure / threshold) ** 2)))


def per_window(values: Floats, variances: Floats, looks: Looks, threshold: float) -> tuple[Floats, Floats]:
    """Values [n] and variances [n] of sub-scans as if each had been a window of the first kind.

    A scan that shows the share p of few targets leaves their number uncertain, however sure it is of those that it
    shows: binomial thinning adds the variance (1 - p) / p times the expected number.
    """
    gain, share = looks.gain(threshold), shown(looks.exposure, threshold)
    with np.errstate(all="ignore"):  # what overflows is refused where it is standardised
        expected = max(float(values.sum() / gain.sum()), 0.0) * shown(np.ones(1), threshold)[0]
        return values / gain, variances / gain**2 + expected * (1.0 - share) / (share * looks.area)


def learn_threshold(design: Design, values: Floats, variances: Floats, looks: Looks, window: Floats) -> float:
    """The most probable e0 of these sub-scans, in exposures of the first kind: that with which scans of all exposures
    tell of one and the same specimen. 1 while all exposures are the same, and where nothing can be computed. ``window``
    (x, y): the first kind's size over the field's."""
    from . import surrogate

    if len(np.unique(looks.exposure)) < 2:
        return 1.0
    believed = []
    for threshold in THRESHOLDS:
        try:
            targets = surrogate.standardise(*per_window(values, variances, looks, float(threshold)))
            likelihood = surrogate.log_likelihood(design, targets, surrogate.default_hyperparameters(window))
        except surrogate.FitFailed:
            return 1.0
        per_value = np.log(looks.gain(float(threshold)) * targets.scale).sum()
        believed.append(likelihood - per_value - math.log(threshold) ** 2 / 2)
    return float(THRESHOLDS[int(np.argmax(np.round(believed, 6)))])


def unseen(candidates: Sequence[ScanRegion], looks: Looks, history: History, threshold: float) -> Floats:
    """Share [n] of what each window would show that no sub-scan has shown yet; 1 where all windows are of one kind,
    for then none is offered twice. A sub-scan of which perception could not tell anything counts too: another one of
    its kind would not tell more."""
    share = shown(looks.exposure, threshold)
    told = [observation.region for observation in history.scans]
    if looks.alike or not told:
        return np.ones(len(candidates))
    x, y = (
        np.array([region.center_nm[side] + POINTS * region.fov_nm[side] for region in candidates]) for side in (0, 1)
    )
    x, y = np.broadcast_arrays(x[:, None, :], y[:, :, None])
    seen = np.zeros(x.shape)
    for region, there in zip(told, shown(Looks.of(told, candidates[0]).exposure, threshold), strict=True):
        seen = np.maximum(seen, there * _inside(region, x, y))
    left = np.maximum(share[:, None, None] - seen, 0.0).mean(axis=(1, 2)) / share
    return np.where(left > ROUNDING, left, 0.0)


def _inside(region: ScanRegion, x: Floats, y: Floats) -> Floats:
    """1 where a point (nm) lies in ``region``, 0 elsewhere."""
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    dx, dy = x - region.center_nm[0], y - region.center_nm[1]
    u, v = c * dx + s * dy, c * dy - s * dx
    return np.asarray((np.abs(u) <= region.fov_nm[0] / 2) & (np.abs(v) <= region.fov_nm[1] / 2), dtype=np.float64)


def log_legible(history: History, candidates: Sequence[ScanRegion]) -> Floats:
    """Logarithm of the share of each window's targets that can still be told [n]; 0 where nothing is known of damage.

    It is the square of the share that is still whole: a target is told from its neighbours, and both have to be. With
    the share alone a dead patch would be worth its charge as much as a fresh one, for what is left to harm there is as
    little as what is left to see.
    """
    if not history.validity:
        return np.zeros(len(candidates))
    if len(history.validity) != len(candidates):
        raise BadInput(
            f"{len(history.validity)} validities for {len(candidates)} candidates",
            "give one entry of history.validity per candidate, or none",
        )
    with np.errstate(divide="ignore"):
        return np.asarray(2.0 * np.log(np.array(history.validity, dtype=np.float64)))


def charged(history: History, cost: Cost) -> Floats:
    """What each window is charged [n] in the currency of ``cost``: electrons (pixels where they are not metered) or
    seconds at most, damage as it is expected."""
    return np.array([_charge(charge, cost) for charge in history.charges], dtype=np.float64)


def log_price(history: History, cost: Cost, cools: bool) -> Floats:
    """alpha log(charge) [n], the charge in units of the dearest window's; 0 without a cost.

    alpha is 1: value per charge. With ``cools`` it is the share of the budget that is left (cost cooling; Lee et al.
    2020, arXiv 2003.10870): thrifty at first, heedless of the charge at the end.
    """
    if cost == "none":
        return np.zeros(len(history.charges))
    charge = charged(history, cost)
    dearest = float(charge.max(initial=0.0))
    if dearest <= 0.0:
        return np.zeros(len(charge))
    currency = "pixels" if cost == "electrons" and history.charges[0].electrons is None else cost
    alpha = min(max(history.left.get(currency, 1.0), 0.0), 1.0) if cools else 1.0
    return np.asarray(alpha * np.log(np.maximum(charge / dearest, FREE)))


def _charge(charge: Charge, cost: Cost) -> float:
    if cost == "damage":
        return charge.damage
    if cost == "seconds":
        return charge.seconds
    return float(charge.pixels if charge.electrons is None else charge.electrons)
