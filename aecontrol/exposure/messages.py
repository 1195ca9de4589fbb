"""What travels between controller and bridge: strict JSON headers, versioned, one model a message.

A header is at most ``MAX_HEADER`` bytes; an unknown field, a wrong type, a non-finite number, an integer beyond 64 bits
or another version is :class:`Malformed`, and changes nothing. Request ids rise within one connection. Times are in the
bridge's own monotonic clock (ns since it does not matter when), and mean something only together with its ``boot_id``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from aecontrol.errors import AecontrolError
from aecontrol.types import (
    Capabilities,
    Charge,
    Count,
    InstrumentState,
    Model,
    NonNegative,
    Positive,
    PositiveInt,
    ScanRegion,
    Sha256,
)

from .keys import Outcome

VERSION = 1
MAX_HEADER = 16 << 10
MAX_REPLY = 60 << 10
RECORDS_BYTES = 40 << 10
"""Ledger records sent in one reply, bytes."""

Name = Annotated[str, Field(pattern=r"^[0-9a-zA-Z_.-]{1,64}$")]
Role = Literal["observer", "controller", "operator"]


class Malformed(AecontrolError):
    """A message that is not one; what it asked for did not happen."""

    exit_code = 4


class Timing(Model):
    """The clockwork that both ends agree on in HELLO."""

    heartbeat_s: Positive = Field(0.1, description="H, s: the beam is blanked at most 2 H after the last heartbeat")
    lease_s: Positive = Field(1.0, description="silence after which another controller may take over, s")
    away_s: Positive = Field(900.0, description="longest time for which a controller may keep its lease while away, s")
    deadline_s: Positive = Field(1.0, description="time within which an exposure must have begun, s")


class _Message(Model):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    v: Literal[1] = 1


# ---------------------------------------------------------------- requests


class AnyRequest(_Message):
    """Base of all requests; ids rise within one connection."""

    id: PositiveInt = 1


class Hello(AnyRequest):
    """Who is there? Answered by :class:`Welcome`."""

    t: Literal["HELLO"] = "HELLO"
    client: Annotated[str, Field(max_length=64)]


class Acquire(AnyRequest):
    """Take the lease. ``seq`` and ``head``: how far the controller knows the bridge's ledger; another ledger is
    refused. ``force`` (operators only) takes it from a living holder, and blanks first."""

    t: Literal["ACQUIRE"] = "ACQUIRE"
    session: Name
    seq: Count
    head: Sha256
    force: bool = False


class Beat(AnyRequest):
    """The controller's main loop has come round again: ``tick`` counts its turns."""

    t: Literal["BEAT"] = "BEAT"
    epoch: Count
    tick: Count


class Away(AnyRequest):
    """The main loop will be busy elsewhere (a fit, a frame) for at most ``seconds``: the beam stays blanked and the
    lease is kept."""

    t: Literal["AWAY"] = "AWAY"
    epoch: Count
    tick: Count
    seconds: Positive


class Release(AnyRequest):
    """Give the lease back."""

    t: Literal["RELEASE"] = "RELEASE"
    epoch: Count


class Expose(AnyRequest):
    """Fire ``region`` under ``key``, if it can begin before ``deadline_ns`` of the clock of ``boot_id``."""

    t: Literal["EXPOSE"] = "EXPOSE"
    key: Sha256
    session: Name
    epoch: Count
    tick: Count
    boot_id: Name
    deadline_ns: Count
    region: ScanRegion
    bound: Charge


class Stage(AnyRequest):
    """Move the stage so that the field's corner lies at ``to_nm`` of the specimen frame."""

    t: Literal["STAGE"] = "STAGE"
    epoch: Count
    tick: Count
    boot_id: Name
    deadline_ns: Count
    to_nm: tuple[float, float]


class Park(AnyRequest):
    """Rest the idle beam at ``at_nm`` of the field."""

    t: Literal["PARK"] = "PARK"
    epoch: Count
    tick: Count
    boot_id: Name
    deadline_ns: Count
    at_nm: tuple[float, float]


class Cancel(AnyRequest):
    """What became of ``key``? One never seen is tombstoned. Only the process ``boot_id``, whose ledger the controller
    has compared with its own, may say so: from an older ledger it would be untrue."""

    t: Literal["CANCEL"] = "CANCEL"
    boot_id: Name
    key: Sha256


class Forget(AnyRequest):
    """The frame of ``key`` with these digests is durable at the controller whose session exposed it: the bridge may
    delete its own."""

    t: Literal["FORGET"] = "FORGET"
    key: Sha256
    session: Name
    digests: dict[str, Sha256]


class Blank(AnyRequest):
    """Blank the beam now. Anybody may."""

    t: Literal["BLANK"] = "BLANK"


class Ping(AnyRequest):
    """Are you there?"""

    t: Literal["PING"] = "PING"


class Status(AnyRequest):
    """The instrument, the lease and what has been charged."""

    t: Literal["STATUS"] = "STATUS"


class Records(AnyRequest):
    """The ledger's records after the ``after``-th."""

    t: Literal["RECORDS"] = "RECORDS"
    after: Count


class Frames(AnyRequest):
    """Which files hold the frame of ``key``."""

    t: Literal["FRAMES"] = "FRAMES"
    key: Sha256


class Truths(AnyRequest):
    """What is really there; simulated instruments only."""

    t: Literal["TRUTHS"] = "TRUTHS"
    target: Name | None = Field(None, description="kind of true objects")
    region: ScanRegion | None = Field(None, description="or: the ideal image of this region")


class Clear(AnyRequest):
    """An operator has looked, and says why the latch may go."""

    t: Literal["CLEAR"] = "CLEAR"
    reason: Annotated[str, Field(min_length=8, max_length=500)]


Request = Annotated[
    Hello
    | Acquire
    | Beat
    | Away
    | Release
    | Expose
    | Stage
    | Park
    | Cancel
    | Forget
    | Blank
    | Ping
    | Status
    | Records
    | Frames
    | Truths
    | Clear,
    Field(discriminator="t"),
]


# ---------------------------------------------------------------- replies


class _Reply(_Message):
    re: Count = 0


class Welcome(_Reply):
    """What the bridge is."""

    t: Literal["WELCOME"] = "WELCOME"
    capabilities: Capabilities
    timing: Timing
    boot_id: Name
    mono_ns: Count
    seq: Count
    head: Sha256
    role: Role
    frames_port: Count = Field(0, description="TCP port of the frames' socket, on the same host")


class Granted(_Reply):
    """The lease is yours."""

    t: Literal["GRANTED"] = "GRANTED"
    epoch: Count


class Beating(_Reply):
    """Heard. ``live``: the key that is firing; ``seq``: records in the ledger."""

    t: Literal["BEATING"] = "BEATING"
    boot_id: Name
    mono_ns: Count
    live: Sha256 | None = None
    hindrance: str = Field("", description="why nothing can be exposed just now, though that will pass")
    seq: Count
    latched: str = ""


class Firing(_Reply):
    """The key is charged and its pulse runs; the outcome follows."""

    t: Literal["FIRING"] = "FIRING"
    key: Sha256


class Settled(_Reply):
    """What became of a key."""

    t: Literal["SETTLED"] = "SETTLED"
    outcome: Outcome


class Done(_Reply):
    """Carried out."""

    t: Literal["DONE"] = "DONE"


class Told(_Reply):
    """The answer to STATUS."""

    t: Literal["TOLD"] = "TOLD"
    state: InstrumentState
    holder: str = ""
    session: str = ""
    held_s: NonNegative = 0.0
    epoch: Count
    latched: str = ""
    electrons: Count = Field(description="charged since the ledger was opened")
    pixels: Count


class Recorded(_Reply):
    """Records of the ledger, oldest first, and how many there are in all."""

    t: Literal["RECORDED"] = "RECORDED"
    bodies: list[str]
    seq: Count
    head: Sha256


class SpoolFile(Model):
    """One file of the spool: its digest and size, bytes."""

    sha256: Sha256
    nbytes: Count


class Spooled(_Reply):
    """Where a frame can be fetched. ``electrons_per_pixel``: mean dose of a pixel."""

    t: Literal["SPOOLED"] = "SPOOLED"
    channels: dict[str, SpoolFile]
    started_s: NonNegative
    electrons_per_pixel: Positive | None
    flags: tuple[str, ...]


class Arrays(_Reply):
    """Files that can be fetched: the first says in JSON what the others, .npy, are."""

    t: Literal["ARRAYS"] = "ARRAYS"
    files: list[SpoolFile]


Code = Literal[
    "MALFORMED", "VERSION", "FORBIDDEN", "FENCED", "NO_LEASE", "LEASE_HELD", "LEDGER_MISMATCH", "STALE", "STALLED",
    "KEY_REUSE", "LATCHED", "REFUSED", "UNKNOWN", "BUSY", "FAULT",
]  # fmt: skip


class Refusal(_Reply):
    """No, and why."""

    t: Literal["REFUSAL"] = "REFUSAL"
    code: Code
    reason: str


Reply = Annotated[
    Welcome | Granted | Beating | Firing | Settled | Done | Told | Recorded | Spooled | Arrays | Refusal,
    Field(discriminator="t"),
]

M = TypeVar("M", bound=_Message)
_REQUEST: TypeAdapter[Request] = TypeAdapter(Request)
_REPLY: TypeAdapter[Reply] = TypeAdapter(Reply)


def encode(message: _Message) -> bytes:
    """A message as bytes."""
    return message.model_dump_json().encode()


def decode_request(header: bytes) -> Request:
    """Bytes as a request. Raises Malformed, and nothing else, whatever the bytes."""
    if len(header) > MAX_HEADER:
        raise Malformed(f"a header of {len(header)} bytes; the limit is {MAX_HEADER}")
    return _decode(_REQUEST, header)


def decode_reply(header: bytes) -> Reply:
    """Bytes as a reply. Raises Malformed, and nothing else, whatever the bytes."""
    if len(header) > MAX_REPLY:
        raise Malformed(f"a reply of {len(header)} bytes; the limit is {MAX_REPLY}")
    return _decode(_REPLY, header)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no field is given twice: which of the two would count?"""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a field is given twice")
    return found


def _decode(adapter: TypeAdapter[M], header: bytes) -> M:
    try:
        json.loads(header, object_pairs_hook=_once)
        message = adapter.validate_json(header, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Malformed(f"{where}: {first['msg']}"[:300]) from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}"[:300]) from None
    if missing := {"v", "id" if isinstance(message, AnyRequest) else "re"} - message.model_fields_set:
        raise Malformed(f"{', '.join(sorted(missing))}: missing")
    return message
