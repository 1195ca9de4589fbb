"""What a session knows of the damage that it does, and what it charges for it: a fold of exposures and measurements.

An exposure is reserved at a quantile of what it may harm, settled at what the response expects of the electrons that
were measured, and at more where a second look at the place showed more. A new response values everything anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aecontrol import forecast
from aecontrol.dose import TILE_NM
from aecontrol.events import DamageMeasured
from aecontrol.exposure import KeyRecord
from aecontrol.response import Evidence, Floats, Response, prior
from aecontrol.types import AreaPlan, Capabilities, Charge, DamagePlan, Plan, ReferencePlan, ScanRegion

MOST_SACRIFICED = 0.25
"""Windows of which more lies in sacrificed places are not offered."""
MOST_COMPARABLE = 0.4
"""Where more than this share is foretold to be damaged, it is no wonder that frames cannot be compared (a choice)."""
MODEL_ERROR = 0.15
"""Relative standard deviation of a forecast beyond what the fit knows: no law and no metric is exact (a choice)."""
Keys = Mapping[str, KeyRecord]
Basis = Literal["measured", "model", "none"]


class HarmCharge(NamedTuple):
    """What one key is charged for damage, nm^2: in all, and in each area."""

    damage: float
    basis: Basis
    by_area: tuple[float, ...]


@dataclass(frozen=True)
class Harm:
    """See the module. ``fluence`` [tiles of the ground] e/A^2 is what all settled keys have brought; ``fitted`` says on
    how many measurements the response rests."""

    plan: DamagePlan
    areas: tuple[AreaPlan, ...]
    instrument: Capabilities
    response: Response
    fluence: Floats
    charges: Mapping[str, HarmCharge] = field(default_factory=dict)
    measurements: tuple[DamageMeasured, ...] = ()
    fitted: int = 0
    alarm: str = ""

    @classmethod
    def of(cls, plan: Plan, instrument: Capabilities) -> Harm | None:
        """At the start of a session; None where the plan does not ask for damage."""
        if plan.damage is None:
            return None
        guess = prior(
            forecast.phases_of(plan.damage, plan.areas),
            plan.damage.critical_fluence_e_per_A2,
            plan.damage.exponent,
        )
        on = forecast.ground(plan.damage, plan.areas, instrument.field_nm)
        return cls(plan.damage, plan.areas, instrument, guess, on.fresh)

    @property
    def ground(self) -> forecast.Ground:
        """The specimen tile by tile."""
        return forecast.ground(self.plan, self.areas, self.instrument.field_nm)

    @property
    def usable(self) -> tuple[DamageMeasured, ...]:
        """Measurements that told something."""
        return tuple(event for event in self.measurements if event.scores is not None)

    @property
    def total(self) -> HarmCharge:
        """All settled charges."""
        every = self.charges.values()
        basis: Basis = "none" if not self.charges else "model"
        if any(charge.basis == "measured" for charge in every):
            basis = "measured"
        by_area = tuple(sum(charge.by_area[k] for charge in every) for k in range(len(self.areas)))
        return HarmCharge(math.fsum(charge.damage for charge in every), basis, by_area)

    def reserve(self, region: ScanRegion, bound: Charge) -> float:
        """Damage to reserve for an exposure, nm^2: the planned quantile of what its declared electrons may harm."""
        return self._reserved(region, bound)[0]

    def outlook(self, region: ScanRegion, bound: Charge) -> tuple[float, float]:
        """Damage to reserve for an exposure, and what its declared electrons are expected to do: about what it will be
        settled at. Both nm^2."""
        return self._reserved(region, bound)

    def reserve_by_area(self, region: ScanRegion, bound: Charge) -> tuple[float, ...]:
        """The same in each area that has a limit of damage; 0 in the others."""
        return tuple(0.0 if area.damage is None else self._reserved(region, bound, area)[0] for area in self.areas)

    def exceeds(self, budget: float) -> float:
        """Chance that the damage so far is more than ``budget`` nm^2."""
        return forecast.total(self.plan, self.response, self.ground, self.fluence).exceeds(budget)

    def intact(self, region: ScanRegion) -> float:
        """Expected share of the matter in a region that is still undamaged."""
        where = forecast.footprint(_place(region), self.instrument.field_nm)
        return forecast.intact(self.response, self.ground, self.fluence, where)

    # ------------------------------------------------------------ what happens

    def settled(self, record: KeyRecord) -> Harm:
        """After a key was settled: what it brought is on the map and charged; nothing for one that never fired."""
        if record.state == "VOID":
            return self
        where = forecast.footprint(_place(record.scanned), self.instrument.field_nm)
        fluence = self.fluence.copy()
        fluence[where.tiles] += where.added(record.charge.electrons or 0)
        charge = self._charge(record)
        return replace(self, fluence=fluence, charges={**self.charges, record.key: charge})

    def measured(self, event: DamageMeasured, keys: Keys) -> Harm:
        """After a frame was compared with the first one of its place."""
        after = replace(self, measurements=(*self.measurements, event))
        if event.mean is None or event.sd is None or event.first is None:
            return replace(after, alarm=self.alarm or after._unreadable(keys[event.key].region, keys))
        if self.response.method != "prior":
            after = replace(after, alarm=self._contradiction(event, keys))
        return after._with_surplus(event, keys)

    def refitted(self, response: Response, measurements: int, keys: Keys) -> Harm:
        """With a new response, by which every exposure so far is valued anew."""
        after = replace(self, response=response, fitted=measurements, fluence=self.ground.fresh, charges={})
        for record in keys.values():
            if record.state != "RESERVED":
                after = after.settled(record)
        for event in self.usable:
            after = after._with_surplus(event, keys)
        if self.response.method != "prior" or self.alarm:
            return after
        places = (reference_frame(self.plan, place) for place in self.plan.references)
        return replace(after, alarm=next(filter(None, (after._unforetold(place, keys) for place in places)), ""))

    def evidence(self, event: DamageMeasured, scores: NDArray[np.float64], patch_nm2: float, keys: Keys) -> Evidence:
        """A comparison as the fit takes it; ``scores`` is the table that the event names, of patches that large."""
        assert event.first is not None
        first, later = _fluences(scores[:, :2], event.first, event.key, keys)
        phase = int(np.bincount(self._phases(scores[:, :2])).argmax())
        units = self.plan.sites_per_nm2 * patch_nm2
        return Evidence(phase, first, later, scores[:, 2], scores[:, 3], event.first, units)

    def middle(self, event: DamageMeasured, keys: Keys) -> tuple[int, float, float]:
        """Phase in the middle of the place of a comparison, and the fluences there in the middle of its two exposures,
        e/A^2."""
        assert event.first is not None
        place = np.array([keys[event.key].region.center_nm])
        first, later = _fluences(place, event.first, event.key, keys)
        return int(self._phases(place)[0]), float(first[0]), float(later[0])

    # ------------------------------------------------------------ inside

    def _phases(self, points_nm: Floats) -> NDArray[np.int64]:
        """Index of the phase [n] at points of the specimen [n, 2]."""
        x, y = np.floor(points_nm.T / TILE_NM).astype(int) + forecast.MARGIN
        rows, cols = self.ground.shape
        return np.asarray(self.ground.phase.reshape(rows, cols)[np.clip(y, 0, rows - 1), np.clip(x, 0, cols - 1)])

    def _reserved(self, region: ScanRegion, bound: Charge, area: AreaPlan | None = None) -> tuple[float, float]:
        """The planned quantile of what the declared current may harm, and its mean: the tolerance, which the bound of
        electrons adds in full, is taken as two standard deviations. In the one area, or anywhere."""
        tolerance = self.instrument.current_tolerance
        forecast = self._forecast(region, (bound.electrons or 0) / (1.0 + tolerance), area)
        expected = forecast.expected
        # what is charged in the end is the mean, which lies far above the median where little is known
        reserved = max(forecast.blurred(0.5 * tolerance).quantile(self.plan.quantile), (1.0 + tolerance) * expected)
        return reserved, expected

    def _forecast(self, region: ScanRegion, electrons: float, area: AreaPlan | None = None) -> forecast.Forecast:
        field_nm = self.instrument.field_nm
        where = forecast.footprint(_place(region), field_nm)
        if area is not None:
            where = where.among(forecast.area_tiles(area, field_nm))
        return forecast.forecast(self.plan, self.response, self.ground, self.fluence, where, electrons)

    def _charge(self, record: KeyRecord) -> HarmCharge:
        """What a settled key is charged on top of the present map: what is expected of the electrons measured; what was
        reserved where nobody knows."""
        electrons = record.charge.electrons or 0
        if record.state == "INDET":
            reserved = tuple(self._reserved(record.region, record.bound, area)[0] for area in self.areas)
            return HarmCharge(record.bound.damage, "model", reserved)
        areas = tuple(self._forecast(record.scanned, electrons, area).expected for area in self.areas)
        return HarmCharge(self._forecast(record.scanned, electrons).expected, "model", areas)

    def _foretold(self, event: DamageMeasured, keys: Keys) -> tuple[float, float]:
        """Mean score that the response expects of a comparison, and its standard deviation: of the response, of what
        all patches of a pair of frames share, and of the finite number of sites."""
        phase, first, later = self.middle(event, keys)
        draws = self.response.score(np.array([phase]), np.array([first]), np.array([later]))
        gain = float(np.mean(self.response.amplitude))
        share = min(max(float(draws.mean()) / gain, 0.0), 1.0)
        sites = self.plan.sites_per_nm2 * keys[event.key].region.area_nm2
        chance = gain * math.sqrt(share * (1.0 - share) / sites)
        shared = self.response.diagnostics.get("shared_sd", 0.0)
        return float(draws.mean()), math.hypot(float(draws.std()), shared, chance)

    def _contradiction(self, event: DamageMeasured, keys: Keys) -> str:
        """Why a measurement cannot be what the response foretold; empty when it can."""
        assert event.mean is not None
        assert event.sd is not None
        mean, sd = self._foretold(event, keys)
        off = abs(event.mean - mean) / math.hypot(sd, event.sd, MODEL_ERROR * mean)
        if off <= -NormalDist().inv_cdf(self.plan.alarm / 2.0):
            return ""
        return (
            f"a comparison shows damage of {event.mean:.3g}, foretold was {mean:.3g} (off by {off:.1f} standard "
            "deviations): is it the material, temperature and current that the references had?"
        )

    def _unreadable(self, region: ScanRegion, keys: Keys) -> str:
        """Why it matters that the last frame of a region could not be compared with the first one; empty when it does
        not. It does where a sacrificed place has told nothing, after two attempts and when the session is about to
        begin; and where two in a row could not, though nobody has foretold that so much would be gone. Before the first
        fit nobody has foretold anything."""
        if not any(same_place(region, reference_frame(self.plan, place)) for place in self.plan.references):
            return ""
        lost = self._lost(region, keys)
        if any(event.mean is not None for event in self._seen(region, keys)):
            return self._unforetold(region, keys) if self.response.method != "prior" and len(lost) == 2 else ""
        taken = sum(record.state != "VOID" and same_place(record.region, region) for record in keys.values())
        return self._blind(region, keys) if len(lost) == 2 or taken == self.plan.exposures else ""

    def _unforetold(self, region: ScanRegion, keys: Keys) -> str:
        """The same for two or more in a row, by the present response."""
        lost = self._lost(region, keys)
        if len(lost) < 2:
            return ""
        phase, _, later = self.middle(lost[0], keys)
        gone = self.response.damaged(np.array([phase]), np.array([later])).mean()
        return "" if gone >= MOST_COMPARABLE else self._blind(region, keys)

    def _blind(self, region: ScanRegion, keys: Keys) -> str:
        x, y = region.center_nm
        return (
            f"frames of the place at ({x:g}, {y:g}) nm cannot be compared with its first one "
            f"({self._seen(region, keys)[-1].reason}): what the beam does there is not known, and the place may be "
            "gone already; look at them"
        )

    def _seen(self, region: ScanRegion, keys: Keys) -> list[DamageMeasured]:
        """What was measured of a region, in order."""
        return [event for event in self.measurements if same_place(keys[event.key].region, region)]

    def _lost(self, region: ScanRegion, keys: Keys) -> list[DamageMeasured]:
        """Its last frames that could not be compared, last one first."""
        backwards = reversed(self._seen(region, keys))
        return list(takewhile(lambda event: event.mean is None and event.first is not None, backwards))

    def _with_surplus(self, event: DamageMeasured, keys: Keys) -> Harm:
        """The charge of a key that was looked at again, raised by what was measured beyond what is expected."""
        assert event.mean is not None
        mean, _ = self._foretold(event, keys)
        region, charge = keys[event.key].region, self.charges[event.key]
        where = forecast.footprint(_place(region), self.instrument.field_nm)
        surplus = max(event.mean - mean, 0.0) / float(np.mean(self.response.amplitude))
        per_share = surplus * region.area_nm2 / float(where.share.sum())

        def raised(now: float, part: forecast.Footprint) -> float:
            return now + per_share * float((self.ground.weight[part.tiles] * part.share).sum())

        parts = (where.among(forecast.area_tiles(area, self.instrument.field_nm)) for area in self.areas)
        by_area = tuple(map(raised, charge.by_area, parts))
        charge = HarmCharge(raised(charge.damage, where), "measured", by_area)
        return replace(self, charges={**self.charges, event.key: charge})


def reference_frame(plan: DamagePlan, reference: ReferencePlan) -> ScanRegion:
    """The region by which the damage to a reference place is measured."""
    return ScanRegion(
        center_nm=reference.center_nm, fov_nm=plan.fov_nm, shape=plan.shape, dwell_time_s=plan.dwell_time_s
    )


def sacrificed_share(plan: DamagePlan, window: ScanRegion) -> float:
    """The part of a window of the grid (which is never turned) that lies in sacrificed places: what is found there is
    the beam's own making."""
    low, high = (np.array(window.center_nm) + sign * np.array(window.fov_nm) / 2 for sign in (-1, 1))
    shared = 0.0
    for reference in plan.references:
        half = np.array(plan.fov_nm) / 2
        sides = np.minimum(high, reference.center_nm + half) - np.maximum(low, reference.center_nm - half)
        shared += float(np.prod(np.maximum(sides, 0.0)))
    return shared / window.area_nm2


def same_place(a: ScanRegion, b: ScanRegion) -> bool:
    """True for two regions that scan the same pixels of the specimen, however long."""
    return _place(a).model_copy(update={"dwell_time_s": b.dwell_time_s}) == _place(b)


def _place(region: ScanRegion) -> ScanRegion:
    """A region of the specimen, wherever drift has taken it."""
    return region.model_copy(update={"shift_nm": (0.0, 0.0)})


def _fluences(points_nm: Floats, first: str, later: str, keys: Keys) -> tuple[Floats, Floats]:
    """Fluence [n] at points of the specimen in the middle of two exposures, e/A^2."""
    found = dict(_middles(points_nm, keys))
    return found[first], found[later]


def _middles(points_nm: Floats, keys: Keys) -> Iterator[tuple[str, Floats]]:
    """Each exposure in order with the fluence that points [n, 2] had received in the middle of it. One of which nobody
    knows whether it happened is taken not to have: what is seen is blamed on less fluence then, never on more."""
    before = np.zeros(len(points_nm))
    for key, record in keys.items():
        if record.state == "VOID":
            continue
        electrons = 0 if record.state == "INDET" else record.charge.electrons or 0
        added = forecast.local_fluence(points_nm, record.scanned, electrons)
        yield key, before + 0.5 * added
        before = before + added
