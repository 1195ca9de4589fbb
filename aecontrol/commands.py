"""What the core can ask of the world: the commands between a state and the events that carrying them out will bring."""

from __future__ import annotations

from dataclasses import dataclass

from aecontrol.events import Paused, Reserved, Stopped
from aecontrol.exposure import KeyRecord
from aecontrol.protocols import History
from aecontrol.types import Frame, Observation, Scan, ScanRegion


@dataclass(frozen=True)
class Identify:
    """Ask instrument and perceiver what they are."""


@dataclass(frozen=True)
class FollowPlan:
    """Take a scan that the plan itself asks for: the overview (step 0) or the reference region (step < 0)."""

    step: int
    scan: Scan


@dataclass(frozen=True)
class Decide:
    """Ask the policy."""

    step: int
    history: History
    candidates: tuple[ScanRegion, ...]


@dataclass(frozen=True)
class Refuse:
    """Record that the guard turned a decision down."""

    step: int
    reason: str


@dataclass(frozen=True)
class Reserve:
    """Charge an exposure at its bound, durably, before anything is sent."""

    event: Reserved


@dataclass(frozen=True)
class Expose:
    """Fire a reserved key."""

    record: KeyRecord


@dataclass(frozen=True)
class Settle:
    """Ask what became of a key that an earlier process reserved; never fires."""

    record: KeyRecord


@dataclass(frozen=True)
class Fetch:
    """Bring the frame of a settled key into the session folder."""

    record: KeyRecord


@dataclass(frozen=True)
class Perceive:
    """Read a recorded frame."""

    record: KeyRecord
    frame: Frame


@dataclass(frozen=True)
class MeasureDrift:
    """Compare a frame of the reference region with the first one (``reference`` None: it is the first)."""

    record: KeyRecord
    frame: Frame
    reference: Frame | None


@dataclass(frozen=True)
class MeasureDamage:
    """Compare a frame with the first one of the same place (``first`` None: it is the first)."""

    record: KeyRecord
    frame: Frame
    first: KeyRecord | None
    first_frame: Frame | None


@dataclass(frozen=True)
class FitResponse:
    """Learn from all comparisons so far how damage follows fluence."""

    measurements: int


@dataclass(frozen=True)
class Learn:
    """Train the embedding on the sub-scans so far."""

    observations: tuple[Observation, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Reembed:
    """Encode all earlier sub-scans with the new embedding."""

    observations: tuple[Observation, ...]
    embedding: str
    trained_on: int


@dataclass(frozen=True)
class Finish:
    """End or pause the session."""

    event: Stopped | Paused


Command = (
    Identify
    | FollowPlan
    | Decide
    | Refuse
    | Reserve
    | Expose
    | Settle
    | Fetch
    | Perceive
    | MeasureDrift
    | MeasureDamage
    | FitResponse
    | Learn
    | Reembed
    | Finish
)
