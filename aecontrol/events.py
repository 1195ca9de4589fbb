"""What can happen in a session. The journal is a list of these, and nothing else is state."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from aecontrol.response import Response
from aecontrol.types import (
    ArrayRef,
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
    metric: str = Field("", description="version of the metric of damage, where it is measured")


class Resumed(Model):
    """A new process took over; every reserved key must be settled before anything else."""

    kind: Literal["resumed"] = "resumed"


class Decided(Model):
    """A decision was taken (step 0 is the overview, sub-scans count up from 1, frames of the references of drift
    and damage down from -1)."""

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


class DamageMeasured(Model):
    """A frame was compared with the ``first`` one of the same place. ``scores`` float64 [patches, 4]: place x, y in nm,
    excess of the metric over its null, standard deviation of an undamaged patch; ``mean`` and ``sd`` of the mean over
    the patches. ``expected`` and ``expected_sd``: what the response of that moment foretold of the mean, where anything
    had been fitted. Nothing was measured where ``reason`` says why, as for the first frame of a place."""

    kind: Literal["damage_measured"] = "damage_measured"
    key: Sha256
    first: Sha256 | None = None
    metric: str = Field(description="version of the metric")
    scores: ArrayRef | None = None
    mean: float | None = None
    sd: NonNegative | None = None
    expected: float | None = None
    expected_sd: NonNegative | None = None
    reason: str = ""


class ResponseFitted(Model):
    """What is now believed of how damage follows fluence, after ``measurements`` comparisons."""

    kind: Literal["response_fitted"] = "response_fitted"
    response: Response
    measurements: int


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
    | DamageMeasured
    | ResponseFitted
    | ModelUpdated
    | Reembedded
    | Paused
    | Stopped,
    Field(discriminator="kind"),
]


def step_text(step: int) -> str:
    """A step's number for people."""
    return f"reference frame {-step}" if step < 0 else f"step {step}"


_ADAPTER: TypeAdapter[SessionEvent] = TypeAdapter(SessionEvent)


def decode_event(body: str) -> SessionEvent:
    """One journal body as an event. Raises pydantic's ValidationError on anything unknown."""
    return _ADAPTER.validate_json(body)
