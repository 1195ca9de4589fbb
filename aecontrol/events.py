"""What can happen in a session. The journal is a list of these, and nothing else is state."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from aecontrol.types import (
    Capabilities,
    Charge,
    Decision,
    Frame,
    Model,
    NonNegative,
    Observation,
    Plan,
    ScanRegion,
    Sha256,
)


class SessionStarted(Model):
    """First event: what the user asked for. Durable before anything heavy is imported."""

    kind: Literal["session_started"] = "session_started"
    session: str
    seed: int
    config: dict[str, Any]
    base: str = Field(description="folder at which relative paths of the configuration start")
    plan: Plan
    version: str
    created_unix_s: float = Field(description="a label; no decision depends on it")


class InstrumentReady(Model):
    """The instrument and the perceiver have said what they are."""

    kind: Literal["instrument_ready"] = "instrument_ready"
    capabilities: Capabilities
    perceiver: str = Field(description="version of the perception model")


class Resumed(Model):
    """A new process took over; every reserved key must be settled before anything else."""

    kind: Literal["resumed"] = "resumed"


class Decided(Model):
    """A decision was taken (step 0 is the overview, sub-scans count up from 1, drift measurements down from -1)."""

    kind: Literal["decided"] = "decided"
    step: int
    decision: Decision
    wall_s: NonNegative = Field(description="from the last frame's arrival to this decision; a label")


class Refused(Model):
    """The guard refused a decision; nothing was sent to the instrument."""

    kind: Literal["refused"] = "refused"
    step: int
    reason: str


class Reserved(Model):
    """An exposure was charged at its bound, before the instrument was asked."""

    kind: Literal["reserved"] = "reserved"
    key: Sha256
    step: int
    attempt: int
    region: ScanRegion
    bound: Charge


class Posted(Model):
    """The instrument fired the key and measured what it delivered."""

    kind: Literal["posted"] = "posted"
    key: Sha256
    measured: Charge
    digests: dict[str, Sha256]


class Voided(Model):
    """The key did not fire and never will."""

    kind: Literal["voided"] = "voided"
    key: Sha256
    reason: str


class Indeterminate(Model):
    """The key may have fired: charged at its bound for good."""

    kind: Literal["indeterminate"] = "indeterminate"
    key: Sha256
    digests: dict[str, Sha256]
    reason: str


class Recorded(Model):
    """The frame of a key is durable in the session folder."""

    kind: Literal["recorded"] = "recorded"
    key: Sha256
    frame: Frame


class Perceived(Model):
    """Perception read a frame: one observation, or one per candidate window for the overview; none when it abstained
    or the frame was unusable (``note`` says why)."""

    kind: Literal["perceived"] = "perceived"
    key: Sha256
    observations: tuple[Observation, ...]
    note: str = ""


class DriftMeasured(Model):
    """A frame of the reference region told how far the specimen has moved in the instrument's field, or not
    (``accepted`` False): then ``shift_nm`` is the last one known, and ``reason`` says why. The first frame accepted is
    the reference itself."""

    kind: Literal["drift_measured"] = "drift_measured"
    key: Sha256
    shift_nm: tuple[float, float]
    sigma_nm: NonNegative = Field(description="standard deviation per axis")
    quality: NonNegative = Field(description="standard deviations by which this fits better than anything else")
    accepted: bool
    reason: str = ""


class ModelUpdated(Model):
    """An embedding was trained."""

    kind: Literal["model_updated"] = "model_updated"
    parent: Sha256 | None
    sha256: Sha256
    path: str
    method: str
    frames: tuple[Sha256, ...] = Field(description="keys of the frames whose patches were used")
    seed: int
    patches: int


class Reembedded(Model):
    """All earlier sub-scan observations as the new embedding sees them, in order."""

    kind: Literal["reembedded"] = "reembedded"
    embedding: Sha256
    observations: tuple[Observation, ...]


class Paused(Model):
    """The session waits for a person; ``resume`` goes on."""

    kind: Literal["paused"] = "paused"
    reason: str


class Stopped(Model):
    """The end. ``budget``, ``rule`` and ``policy`` are by plan; ``safety`` is not."""

    kind: Literal["stopped"] = "stopped"
    cause: Literal["budget", "rule", "policy", "safety"]
    reason: str


SessionEvent = Annotated[
    SessionStarted
    | InstrumentReady
    | Resumed
    | Decided
    | Refused
    | Reserved
    | Posted
    | Voided
    | Indeterminate
    | Recorded
    | Perceived
    | DriftMeasured
    | ModelUpdated
    | Reembedded
    | Paused
    | Stopped,
    Field(discriminator="kind"),
]


def step_text(step: int) -> str:
    """A step's number for people."""
    return f"drift measurement {-step}" if step < 0 else f"step {step}"


_ADAPTER: TypeAdapter[SessionEvent] = TypeAdapter(SessionEvent)


def decode_event(body: str) -> SessionEvent:
    """One journal body as an event. Raises pydantic's ValidationError on anything unknown."""
    return _ADAPTER.validate_json(body)
