"""Two worlds for ``charge_calibration.py``: one without images whose metric is simulated, and the simulated column
whose frames the learned metric reads.

Both are sheets or crystals of one phase whose bond units break at exponentially distributed fluences; the critical
fluence lies within a factor ``WITHIN`` of the first guess, log-uniformly.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aecontrol import forecast
from aecontrol.dose import bound_charge
from aecontrol.measuring import LEAST_PATCHES
from aecontrol.perception.damage.meter import Meter
from aecontrol.perception.damage.reading import PATCH_PX
from aecontrol.true_damage import SCATTERING_POWER
from aecontrol.types import Capabilities, DamagePlan, ReferencePlan, ScanRegion
from aecontrol.units import electrons_per_second
from simulators.fluence import FluenceMap
from simulators.optics import Optics
from simulators.scan import nominal_positions_nm
from simulators.setup import ColumnSetup
from simulators.specimens.garnet import Llzo

Floats = NDArray[np.float64]
WITHIN = 5.0
FIELD_NM = (14.0, 11.0)
PLACE_NM = (2.5, 2.5)
CURRENT_PA, TOLERANCE = 10.0, 0.05
FIRST = "the first frame of its place"
LADDER_GUESS = 0.3
"""Fluence of one frame of the place, in first guesses of the critical one."""


class World(Protocol):
    """A specimen under the beam. ``place``: the sacrificed region as the ladder scans it; ``critical``: what is to be
    learned, e/A^2."""

    name: str
    critical: float
    plan: DamagePlan
    column: Capabilities
    place: ScanRegion
    gain_sd: float
    metric_sd: float
    patch_nm2: float

    def scan(self, window: ScanRegion) -> tuple[int, float]:
        """Expose a window: electrons delivered, damage done (nm^2, sacrificed places left out)."""

    def look(self) -> tuple[int, Floats | str]:
        """Expose the place: electrons delivered; patches (x, y, score, sd) [n, 4] against the first look, or why there
        are none."""


def region(center_nm: tuple[float, float], side_nm: float, fluence: float, pixel_nm: float) -> ScanRegion:
    """A square window whose declared fluence is ``fluence`` e/A^2."""
    pixels = round(side_nm / pixel_nm)
    dwell = fluence * (10.0 * side_nm / pixels) ** 2 / electrons_per_second(CURRENT_PA)
    return ScanRegion(center_nm=center_nm, fov_nm=(side_nm, side_nm), shape=(pixels, pixels), dwell_time_s=dwell)


def _plan(side_nm: float, guess: float, sites_per_nm2: float, quantile: float) -> DamagePlan:
    return DamagePlan(
        references=(ReferencePlan(center_nm=PLACE_NM),),
        fov_nm=(side_nm, side_nm),
        critical_fluence_e_per_A2=guess,
        sites_per_nm2=sites_per_nm2,
        quantile=quantile,
    )


def _capabilities() -> Capabilities:
    return Capabilities(
        identity="",
        simulated=True,
        unit="electrons",
        field_nm=FIELD_NM,
        channels=("HAADF",),
        beam_current_pA=CURRENT_PA,
        current_tolerance=TOLERANCE,
    )


def _worth(places_nm: Floats, matter: Floats, on: forecast.Ground) -> Floats:
    """What the loss of each atom [n] counts, nm^2: its share of the matter of its tile."""
    column, row = np.floor(places_nm.T).astype(int) + forecast.MARGIN
    inside = (column >= 0) & (row >= 0) & (column < on.shape[1]) & (row < on.shape[0])
    tile = np.where(inside, row * on.shape[1] + column, 0)
    whole = np.bincount(tile[inside], matter[inside], len(on.weight))
    return np.where(inside, matter * on.weight[tile] / np.maximum(whole[tile], 1e-300), 0.0)


class NoImages:
    """A garnet, 10 nm thick, whose bond units are an eighth of a cell. Scores: true share times a gain (10 % s.d., as
    the fit is told), null s.d. about 0.05 a patch and pair, an error that patches share of 0.01 a pair, half of both
    from the first frame. The current is off by 2.5 % (s.d.) of what is declared; electrons are metered exactly."""

    gain_sd, metric_sd = 0.1, 0.0
    GUESS, PATCH_NM, PATCHES, RIM_NM, SHARED_SD, LAYERS = 1000.0, 0.5, 6, 0.5, 0.01, 8
    patch_nm2 = PATCH_NM**2

    def __init__(self, seed: int, random: np.random.Generator, quantile: float) -> None:
        self.name = "simulated"
        self.random = random
        self.critical = self.GUESS * WITHIN ** random.uniform(-1.0, 1.0)
        side = self.PATCH_NM * self.PATCHES + 2 * self.RIM_NM
        self.plan = _plan(side, self.GUESS, 8.0 * self.LAYERS / 1.29682**2, quantile)
        self.column = _capabilities()
        self.place = region(PLACE_NM, side, LADDER_GUESS * self.GUESS, 0.1)
        garnet = Llzo(size_nm=FIELD_NM, thickness_nm=1.29682 * self.LAYERS, rotation_deg=17.0 * seed).build(seed)
        self.unit, self.matter = garnet.unit, garnet.atomic_numbers**SCATTERING_POWER
        self.at = garnet.positions_A[:, :2] / 10.0
        count = np.bincount(self.unit)
        self.sites_A = np.column_stack([np.bincount(self.unit, column) / count for column in 10.0 * self.at.T])
        self.due = self.critical * np.random.default_rng((seed, 1)).exponential(size=len(count))
        low, high = self.sites_A.min(axis=0) - 10.0, self.sites_A.max(axis=0) + 10.0
        self.map = FluenceMap(Optics(), (low[0], low[1]), (high[0], high[1]))
        self.received = np.zeros(len(count))
        each = _worth(self.at, self.matter, forecast.ground(self.plan, (), FIELD_NM))
        self.worth = np.bincount(self.unit, each)
        self.current = 1.0 + 0.5 * TOLERANCE * random.normal()
        self.sd = 0.05 * np.exp(0.3 * random.normal(size=self.PATCHES**2))
        self.gain = math.exp(self.gain_sd * random.normal())
        self.first: Floats | None = None

    def scan(self, window: ScanRegion) -> tuple[int, float]:
        electrons, before = self._expose(window)
        broken = (self.due > before) & (self.due <= self.received)
        return electrons, float(self.worth[broken].sum())

    def look(self) -> tuple[int, Floats | str]:
        electrons, before = self._expose(self.place)
        draw = self.sd * self.random.normal(size=self.PATCHES**2) + self.SHARED_SD * self.random.normal()
        score = self.gain * self._shares(0.5 * (before + self.received)) + draw / math.sqrt(2)
        if self.first is None:
            self.first = score
            return electrons, FIRST
        middles = self.PATCH_NM * (np.arange(self.PATCHES) + 0.5) - 0.5 * self.PATCH_NM * self.PATCHES
        y, x = np.meshgrid(PLACE_NM[1] + middles, PLACE_NM[0] + middles, indexing="ij")
        return electrons, np.column_stack([x.ravel(), y.ravel(), score - self.first, self.sd])

    def _expose(self, window: ScanRegion) -> tuple[int, Floats]:
        """Electrons delivered, and the fluence [units] before."""
        declared = (bound_charge(window, self.column).electrons or 0) / (1.0 + TOLERANCE)
        electrons, before = round(declared * self.current), self.received
        points = 10.0 * nominal_positions_nm(window).reshape(-1, 2)
        self.map.deposit(points, electrons / len(points))
        self.received = np.asarray(self.map.at(self.sites_A))
        return electrons, before

    def _shares(self, fluence: Floats) -> Floats:
        """Share damaged [patches] of the place at the fluence [units]."""
        corner = np.array(PLACE_NM) - 0.5 * self.PATCH_NM * self.PATCHES
        cell = np.floor((self.at - corner) / self.PATCH_NM).astype(int)
        inside = ((cell >= 0) & (cell < self.PATCHES)).all(axis=1)
        patch, matter = (cell[:, 1] * self.PATCHES + cell[:, 0])[inside], self.matter[inside]
        gone = matter * (self.due <= fluence)[self.unit[inside]]
        return np.asarray(np.bincount(patch, gone) / np.bincount(patch, matter))


SPECIMENS = {
    "mos2": {"kind": "mos2"},
    "ws2": {"kind": "ws2"},
    "hbn": {"kind": "hbn"},
    "graphene": {"kind": "graphene"},
    "srtio3": {"kind": "srtio3", "thickness_nm": 5.0},
    "catio3": {"kind": "catio3", "thickness_nm": 5.0},
    "llzo": {"kind": "llzo", "thickness_nm": 5.2},
}
GAINS = {
    "mos2": (1.18, 0.21),
    "ws2": (1.21, 0.21),
    "hbn": (1.74, 0.18),
    "graphene": (2.01, 0.23),
    "srtio3": (0.64, 0.27),
    "catio3": (0.79, 0.21),
    "llzo": (0.80, 0.17),
}
"""Median gain of the learned metric and standard deviation of its logarithm: ``damage_gain --seeds 100 101``."""
ELEMENTS = ("Mo", "W", "S", "B", "N", "C", "Sr", "Ti", "Ca", "O", "Li", "La", "Zr")


class Column:
    """The simulated column with one of the :data:`SPECIMENS`, none of which the metric was trained on: frames of 4 nm
    in 160 x 160 pixels with 20 to 100 counts in the brightest ones; every element breaks, and what is broken is
    displaced, leaves, or does either. The place is read as a session reads it, its rim left out. ``known``: the session
    is told the gain for this kind of specimen, and how sure it is."""

    SIDE_NM, PIXEL_NM = 4.0, 0.025
    patch_nm2 = (PATCH_PX * PIXEL_NM) ** 2

    def __init__(self, seed: int, random: np.random.Generator, quantile: float, meter: Meter, known: bool) -> None:
        assert meter.gain_sd is not None
        kind = list(SPECIMENS)[seed % len(SPECIMENS)]
        self.gain, self.gain_sd = GAINS[kind] if known else (1.0, meter.gain_sd)
        self.meter, self.metric_sd = meter, meter.metric_sd / self.gain
        counts, leaving = 20.0 * 5.0 ** random.random(), float(random.choice([0.0, 0.5, 1.0]))
        self.name = f"{kind}, {counts:.0f} counts, {leaving:g} leave"
        setup = ColumnSetup(
            specimen={**SPECIMENS[kind], "size_nm": FIELD_NM, "rotation_deg": 17.0 * seed},
            beam_current_pA=CURRENT_PA,
            optics={"voltage_kV": 80.0, "semi_angle_mrad": 30.0, "source_fwhm_nm": 0.08},
            damage={"displacement_threshold_eV": {}, "excitation_barn": {}, "radiolysis_removes": leaving},
        )
        untouched = setup.column(seed)
        place = region(PLACE_NM, self.SIDE_NM, 1.0, self.PIXEL_NM)
        peak = float(np.quantile(untouched.noiseless(place)["HAADF"], 0.98))
        fluence = counts / peak / (10.0 * self.PIXEL_NM) ** 2
        guess = fluence / LADDER_GUESS
        self.critical = guess * WITHIN ** random.uniform(-1.0, 1.0)
        damage = setup.damage.model_copy(update={"critical_fluence_e_per_A2": dict.fromkeys(ELEMENTS, self.critical)})
        self.beam = setup.model_copy(update={"damage": damage}).column(seed)
        self.born = self.beam.snapshot()
        units = len(np.unique(self.born.unit)) / math.prod(self.born.size_nm)
        self.plan = _plan(self.SIDE_NM, guess, units, quantile)
        self.column = _capabilities()
        self.place = region(PLACE_NM, self.SIDE_NM, fluence, self.PIXEL_NM)
        matter = np.where(self.born.alive, self.born.atomic_numbers**SCATTERING_POWER, 0.0)
        self.worth = _worth(self.born.positions_A[:, :2] / 10.0, matter, forecast.ground(self.plan, (), FIELD_NM))
        self.shots, self.done = 0, 0.0
        self.first: NDArray[np.float32] | None = None

    def scan(self, window: ScanRegion) -> tuple[int, float]:
        electrons, _ = self._fire(window)
        before, self.done = self.done, self._harm()
        return electrons, self.done - before

    def look(self) -> tuple[int, Floats | str]:
        electrons, frame = self._fire(self.place)
        self.done = self._harm()
        if self.first is None:
            self.first = frame
            return electrons, FIRST
        reading = self.meter.read(self.first, frame, self.place.pixel_size_nm, 0.1)
        inner = np.zeros_like(reading.valid)
        inner[1:-1, 1:-1] = reading.valid[1:-1, 1:-1]
        if reading.reason or inner.sum() < LEAST_PATCHES:
            return electrons, reading.reason or "too few patches"
        row, col = np.nonzero(inner)
        x, y = ((k + 0.5) * PATCH_PX * self.PIXEL_NM - self.SIDE_NM / 2 for k in (col, row))
        shown = np.column_stack([reading.score[inner], reading.sd[inner]]) / self.gain
        return electrons, np.column_stack([PLACE_NM[0] + x, PLACE_NM[1] + y, shown])

    def _fire(self, window: ScanRegion) -> tuple[int, NDArray[np.float32]]:
        self.shots += 1
        pulse = self.beam.fire(self.shots, window)
        return pulse.electrons, pulse.channels["HAADF"]

    def _harm(self) -> float:
        """All damage so far, nm^2."""
        now = self.beam.snapshot()
        gone = ~now.alive | (np.abs(now.positions_A - self.born.positions_A).max(axis=1) > 0.0)
        return float(self.worth[gone].sum())
