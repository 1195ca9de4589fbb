"""What a session is at one moment: a fold of its journal. And the regions that its plan speaks of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from aecontrol.areas import AreaCharge
from aecontrol.dose import TileMap, Totals
from aecontrol.errors import BadInput
from aecontrol.events import Decided, Stopped
from aecontrol.exposure import KeyRecord
from aecontrol.harm import Harm, reference_frame, same_place
from aecontrol.scoring import merge_duplicates
from aecontrol.types import (
    Atom,
    Capabilities,
    DriftPlan,
    Frame,
    Observation,
    OverviewPlan,
    Plan,
    ReferencePlan,
    Scan,
    ScanPlan,
    ScanRegion,
    WindowPlan,
)

MAX_REFUSALS = 3  # decisions refused, or shots voided, in a row before the session stops as unsafe
MAX_UNMEASURED = 2  # measurements of drift in a row that told nothing before the session pauses
MAX_BAD_FRAMES = 3  # unusable frames in a row before the session pauses (SAFETY 6)
Phase = Literal[
    "new",
    "overview",
    "ready",
    "decided",
    "reserved",
    "exposed",
    "recorded",
    "measuring",
    "fitting",
    "learning",
    "reembedding",
    "paused",
    "stopped",
]


@dataclass(frozen=True)
class ScanRecord:
    """One perceived sub-scan."""

    step: int
    candidate: int
    key: str
    observation: Observation


@dataclass(frozen=True)
class Drift:
    """Where the specimen is, as far as that has been measured."""

    shift_nm: tuple[float, float] = (0.0, 0.0)  # how far it had moved in the instrument's field when last measured
    rate_nm: tuple[float, float] | None = None  # and how far it moved from one exposure to the next before that
    reference: str = ""  # key of the first frame of the reference region; empty: there is none yet
    since: int = 0  # exposures since the last accepted measurement, others of the reference region among them
    stale: bool = False  # nobody knows how much time has passed since then
    fresh: bool = True  # no time has passed since the last exposure but what its frame took to be read
    unmeasured: int = 0  # of those, how many in a row told nothing
    reason: str = ""  # why the last one did not
    waiting: tuple[int, int, Scan] | None = None  # step, attempt and decision to go back to

    @property
    def expected_nm(self) -> tuple[float, float]:
        """Where the specimen will be at the next exposure if it goes on moving as it did."""
        if self.rate_nm is None:
            return self.shift_nm
        steps = self.since + 1
        return self.shift_nm[0] + steps * self.rate_nm[0], self.shift_nm[1] + steps * self.rate_nm[1]


@dataclass(frozen=True)
class State:
    """A fold of the journal."""

    session: str
    seed: int
    plan: Plan
    phase: Phase = "new"
    resting: Phase = "new"  # where a paused session goes on
    capabilities: Capabilities | None = None
    perceiver: str = ""
    metric: str = ""
    candidates: tuple[ScanRegion, ...] = ()
    step: int = 0  # the last overview or sub-scan that was decided
    asides: int = 0  # frames of references of drift and damage that were decided
    intent: int = 0  # the step that is being carried out: this one, or such a frame (< 0)
    attempt: int = 0
    decision: Scan | None = None
    current: str = ""
    unsettled: bool = False  # a new process took over while a key was reserved
    keys: Mapping[str, KeyRecord] = field(default_factory=dict)
    frames: Mapping[str, Frame] = field(default_factory=dict)
    charged: Totals = Totals()
    tiles: TileMap | None = None
    drift: Drift = Drift()
    harm: Harm | None = None
    areas: tuple[AreaCharge, ...] = ()  # charged to each area of the plan
    decisions: tuple[Decided, ...] = ()
    closed: frozenset[int] = frozenset()  # candidates that must not be exposed (again)
    overview: tuple[Observation, ...] = ()
    scans: tuple[ScanRecord, ...] = ()
    embedding: str | None = None
    trained_on: int = 0
    refusals: int = 0
    bad_frames: int = 0
    alarm: str = ""
    stopped: Stopped | None = None
    paused: str = ""

    @property
    def tile_map(self) -> TileMap:
        """The areal ledger (empty before the instrument is known)."""
        assert self.tiles is not None
        return self.tiles

    @property
    def bounded(self) -> Capabilities:
        """The instrument as its bounds are computed: with the drift that the plan allows for."""
        assert self.capabilities is not None
        return self.capabilities if self.plan.drift is None else self.capabilities.held(self.plan.drift.limit_nm)

    @property
    def rest(self) -> Phase:
        """The phase between two exposures: ahead of the overview that is planned, or after it."""
        taken = any(decided.step == 0 for decided in self.decisions)
        return "ready" if self.plan.overview is None or taken else "overview"

    @property
    def role(self) -> str:
        """What the exposure is for that is being carried out."""
        return "" if self.decision is None else self.decision.role

    @property
    def region(self) -> ScanRegion:
        """What was decided to be exposed."""
        assert self.decision is not None
        return self.decision.regions[0]

    def found(self) -> tuple[Atom, ...]:
        """Target objects found in all sub-scans; the more confident of two within ``match_nm`` stands for both."""
        every = [atom for scan in self.scans for atom in scan.observation.found]
        kept = merge_duplicates(
            [(atom.x_nm, atom.y_nm) for atom in every] or np.empty((0, 2)),
            self.plan.match_nm,
            [atom.confidence for atom in every],
        )
        return tuple(every[index] for index in kept)


def overview_region(plan: OverviewPlan, field_nm: tuple[float, float], margin_nm: float = 0.0) -> ScanRegion:
    """The overview as a region; by default it covers the whole field but for a margin."""
    return ScanRegion(
        center_nm=plan.center_nm or (field_nm[0] / 2, field_nm[1] / 2),
        fov_nm=plan.fov_nm or (field_nm[0] - 2 * margin_nm, field_nm[1] - 2 * margin_nm),
        shape=plan.shape,
        dwell_time_s=plan.dwell_time_s,
    )


def reference_region(plan: DriftPlan) -> ScanRegion:
    """The region by which drift is measured."""
    return ScanRegion(center_nm=plan.center_nm, fov_nm=plan.fov_nm, shape=plan.shape, dwell_time_s=plan.dwell_time_s)


def candidate_grid(plan: ScanPlan, field_nm: tuple[float, float], margin_nm: float = 0.0) -> tuple[ScanRegion, ...]:
    """All sub-scans that a policy may choose: one grid after the other, of each kind of window. Raises BadInput when a
    window is larger than the field, or two kinds are the same."""
    grids = [windows(kind, field_nm, margin_nm) for kind in plan.kinds]
    every = tuple(dict.fromkeys(region for grid in grids for region in grid))
    if len(every) < sum(len(grid) for grid in grids):
        raise BadInput("scan.choices: two kinds of windows cover the same places alike", "leave one of them out")
    return every


def windows(plan: WindowPlan, field_nm: tuple[float, float], margin_nm: float) -> tuple[ScanRegion, ...]:
    """Windows of one kind, row by row from the top-left corner of the field less a margin.

    The grid starts flush with the corner; when the stride does not divide the field, the last column and row are moved
    back flush with the far edge. Raises BadInput when the window is larger than the field.
    """
    field_nm = (field_nm[0] - 2 * margin_nm, field_nm[1] - 2 * margin_nm)
    for side, name in ((0, "width"), (1, "height")):
        if plan.fov_nm[side] > field_nm[side] * (1 + 1e-9):
            less = f" less drift.margin_nm {margin_nm:g} nm on both sides" if margin_nm else ""
            raise BadInput(
                f"scan.fov_nm {name} {plan.fov_nm[side]:g} nm is larger than the field{less}, {field_nm[side]:g} nm",
                "make the sub-scan smaller or the field larger",
            )
    stride = plan.stride_nm or plan.fov_nm

    def starts(side: int) -> list[float]:
        free = field_nm[side] - plan.fov_nm[side]
        count = math.floor(free / stride[side] + 1e-9) + 1
        positions = [k * stride[side] for k in range(count)]
        if free - positions[-1] > 1e-6:
            positions.append(free)
        return positions

    return tuple(
        ScanRegion(
            center_nm=(x + margin_nm + plan.fov_nm[0] / 2, y + margin_nm + plan.fov_nm[1] / 2),
            fov_nm=plan.fov_nm,
            shape=plan.shape,
            dwell_time_s=plan.dwell_time_s,
        )
        for y in starts(1)
        for x in starts(0)
    )


def candidate_index(state: State, region: ScanRegion) -> int:
    """Index of ``region``, wherever it has drifted, among the candidates; -1 when it is none of them."""
    return _indices(state.candidates).get(region.model_copy(update={"shift_nm": (0.0, 0.0)}), -1)


def candidate_of(state: State, step: int, region: ScanRegion) -> int:
    """Index of the candidate that a step exposes; -1 when it is none of them, as no measurement of drift is."""
    return candidate_index(state, region) if step >= 0 else -1


@lru_cache(maxsize=4)
def _indices(candidates: tuple[ScanRegion, ...]) -> Mapping[ScanRegion, int]:
    return {region: index for index, region in reversed(list(enumerate(candidates)))}


def first_look(state: State, key: str) -> str | None:
    """Key of the first usable frame of the place that the frame of ``key`` shows, among sub-scans and reference places;
    None when it is itself the first."""
    record = state.keys[key]
    for earlier, other in state.keys.items():
        if earlier == key:
            return None
        frame = state.frames.get(earlier)
        if frame is not None and frame.usable and same_place(other.region, record.region):
            return earlier
    return None


def frames_of(state: State, reference: ReferencePlan) -> int:
    """Exposures of a sacrificed place so far."""
    assert state.plan.damage is not None
    region = reference_frame(state.plan.damage, reference)
    return sum(record.state != "VOID" and same_place(record.region, region) for record in state.keys.values())
