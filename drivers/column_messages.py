"""What is said to the process that holds the instrument, and what it answers: strict JSON over a socket of one machine.

A request carries a number, its answers carry the same. FIRE is answered twice: STARTED or REFUSED at once, FIRED or
BROKE when the beam is off and the frame is durable. Arrays follow a message as parts of .npy bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from aecontrol.errors import InstrumentFault
from aecontrol.types import Capabilities, Count, InstrumentState, Model, NonNegative, ScanRegion, Sha256

MAX_REQUEST_BYTES = 1 << 20
MAX_ABSORBED = 1000
"""Shots in one ABSORB, so that it fits into a request."""


class Message(Model):
    """Base: ``id`` is the request's number."""

    id: Count = 0


class PastShot(Model):
    """An exposure of this specimen: fired, or taken over from the ledger of an earlier process."""

    key: Sha256
    ordinal: Count


class AbsorbedShot(PastShot):
    """An exposure in the ledger that this process has not seen. ``region`` in the instrument's own field."""

    region: ScanRegion


# ---------------------------------------------------------------- requests


class Hello(Message):
    """Who are you? Answered READY."""

    t: Literal["HELLO"] = "HELLO"


class Fire(Message):
    """Expose ``region`` (in the instrument's own field), as shot ``ordinal``, under ``key``; but not after
    ``not_after_ns`` (CLOCK_MONOTONIC), when whoever authorised it may have lost the right to."""

    t: Literal["FIRE"] = "FIRE"
    key: Sha256
    ordinal: Count
    region: ScanRegion
    not_after_ns: Count


class Blank(Message):
    """Blank at once. Answered BLANKED."""

    t: Literal["BLANK"] = "BLANK"


class State(Message):
    """How are you? Answered STATED."""

    t: Literal["STATE"] = "STATE"


class Absorb(Message):
    """Bring the specimen up to date with these shots. Answered DONE."""

    t: Literal["ABSORB"] = "ABSORB"
    shots: tuple[AbsorbedShot, ...] = Field(max_length=MAX_ABSORBED)


class MoveStage(Message):
    """Move the stage. Answered DONE when it has settled."""

    t: Literal["MOVE_STAGE"] = "MOVE_STAGE"
    to_nm: tuple[float, float]


class Park(Message):
    """Rest the idle beam here. Answered DONE."""

    t: Literal["PARK"] = "PARK"
    at_nm: tuple[float, float]


class AskTruth(Message):
    """What is really there? For scoring only. Answered TRUTH_IS."""

    t: Literal["TRUTH"] = "TRUTH"
    target: str


class AskNoiseless(Message):
    """The ideal image of a region. For scoring only. Answered IDEAL."""

    t: Literal["NOISELESS"] = "NOISELESS"
    region: ScanRegion


class Close(Message):
    """Blank, release the instrument and end. Answered DONE."""

    t: Literal["CLOSE"] = "CLOSE"


Request = Hello | Fire | Blank | State | Absorb | MoveStage | Park | AskTruth | AskNoiseless | Close

# ---------------------------------------------------------------- answers


class Ready(Message):
    """``shots`` in the order in which they were fired or absorbed since this process began; ``firing``: the pulse that
    runs now."""

    t: Literal["READY"] = "READY"
    pid: int
    capabilities: Capabilities
    shots: tuple[PastShot, ...]
    firing: Sha256 | None = None


class Started(Message):
    """The pulse was handed to the instrument; FIRED or BROKE will follow."""

    t: Literal["STARTED"] = "STARTED"
    key: Sha256


class Refused(Message):
    """Nothing was done, and nothing will be."""

    t: Literal["REFUSED"] = "REFUSED"
    reason: str


class Fired(Message):
    """The beam is blanked and the frame durable in the spool. ``digests``: channel -> sha256 of the .npy bytes."""

    t: Literal["FIRED"] = "FIRED"
    key: Sha256
    electrons: Count | None
    pixels: Count
    seconds: NonNegative
    started_s: NonNegative
    digests: dict[str, Sha256]
    flags: tuple[str, ...] = ()


class Broke(Message):
    """Something failed after STARTED: nobody knows what was delivered."""

    t: Literal["BROKE"] = "BROKE"
    key: Sha256
    reason: str


class Blanked(Message):
    """The instrument was told to blank; ``at_ns`` (CLOCK_MONOTONIC) when that was done, and whether it says that the
    beam is off."""

    t: Literal["BLANKED"] = "BLANKED"
    at_ns: Count
    beam_on: bool


class Stated(Message):
    """What the instrument says of itself; ``firing``: the pulse that runs now, its frame included."""

    t: Literal["STATED"] = "STATED"
    state: InstrumentState
    firing: Sha256 | None = None


class Done(Message):
    """The request was carried out."""

    t: Literal["DONE"] = "DONE"


class Failed(Message):
    """The request was begun and failed."""

    t: Literal["FAILED"] = "FAILED"
    reason: str


class TruthIs(Message):
    """True objects; arrays: targets [n, 2] nm, atoms [m, 2] nm (or [0, 2]), changes [k, 5] (x, y, fluence, time, site),
    sites [s, 3] (x, y, atomic number; or [0, 3])."""

    t: Literal["TRUTH_IS"] = "TRUTH_IS"
    known: bool
    labels: tuple[str, ...] = ()
    electrons_delivered: Count | None = None
    atoms_known: bool = False
    sites_known: bool = False
    kinds: tuple[str, ...] = ()


class Ideal(Message):
    """Ideal images; one array for each of ``channels``; null: the instrument knows none."""

    t: Literal["IDEAL"] = "IDEAL"
    channels: tuple[str, ...] | None


Answer = Ready | Started | Refused | Fired | Broke | Blanked | Stated | Done | Failed | TruthIs | Ideal

_REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="t")])
_ANSWERS: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="t")])


def encode(message: Message) -> bytes:
    """The JSON of a message."""
    return message.model_dump_json().encode()


def decode_request(data: bytes) -> Request:
    """A request. Raises InstrumentFault for anything else."""
    try:
        return _REQUESTS.validate_json(data, strict=True)
    except ValidationError as error:
        raise InstrumentFault(f"not a request: {error.errors(include_url=False)[0]['msg']}") from error


def decode_answer(data: bytes) -> Answer:
    """An answer. Raises InstrumentFault for anything else."""
    try:
        return _ANSWERS.validate_json(data, strict=True)
    except ValidationError as error:
        raise InstrumentFault(f"not an answer: {error.errors(include_url=False)[0]['msg']}") from error
