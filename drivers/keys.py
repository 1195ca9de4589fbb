"""CURVE keys on disk: who may talk to a bridge, and in which role.

A folder of keys holds ``server.secret``, ``server.public``, one ``NAME.secret`` for every peer and ``authorized.toml``,
the list of public keys that the bridge admits. A key file is one line, 40 characters of z85. Secrets are read by their
owner alone: a key that others can read is no key, so it is refused.
"""

from __future__ import annotations

import os
import stat
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import zmq
from pydantic import AfterValidator, Field, model_validator
from zmq.utils import z85

from aecontrol.durable import sync_folder
from aecontrol.errors import BadInput
from aecontrol.registry import validate
from aecontrol.types import Model

Role = Literal["observer", "controller", "operator"]

MAX_LIST_BYTES = 1 << 20
KEY_CHARACTERS = 40
_HEAD = """\
# Who may connect to this bridge, by CURVE public key. Roles: observer (asks and fetches frames), controller
# (also holds the lease and exposes), operator (also takes a lease by force and clears a latch).
"""


def _checked(text: str) -> str:
    decode_key(text)
    return text


def decode_key(text: str) -> bytes:
    """The 32 bytes of a z85 key. Raises ValueError when it is none."""
    if len(text) != KEY_CHARACTERS:
        raise ValueError(f"a key has {KEY_CHARACTERS} characters, not {len(text)}")
    try:
        return z85.decode(text)
    except (KeyError, struct.error, UnicodeEncodeError) as error:
        raise ValueError("not a z85 key") from error


PublicKey = Annotated[str, AfterValidator(_checked)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Peer(Model):
    """One table of ``authorized.toml``."""

    public: PublicKey = Field(description="the peer's public key, z85")
    role: Role = Field(description="what the peer may do")


class Authorized(Model):
    """``authorized.toml``: peers by name. A public key belongs to one name only."""

    peers: dict[Name, Peer]

    @model_validator(mode="after")
    def _one_name_per_key(self) -> Authorized:
        keys = [peer.public for peer in self.peers.values()]
        if len(set(keys)) < len(keys):
            raise ValueError("one public key is listed under two names")
        return self


@dataclass(frozen=True)
class KeyRing:
    """What the bridge holds: its own secret and whom it admits."""

    secret: str = field(repr=False)
    peers: Mapping[str, Peer]

    @classmethod
    def load(cls, folder: Path) -> KeyRing:
        """Read ``server.secret`` and ``authorized.toml``. Raises BadInput for what is missing, malformed or open to
        others."""
        path = folder / "authorized.toml"
        text = _read(path, MAX_LIST_BYTES, stat.S_IWGRP | stat.S_IWOTH)
        try:
            table = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise BadInput(f"{path} is not TOML: {error}", "see the file that `aecontrol keys new` writes") from error
        return cls(_read_secret(folder / "server.secret"), validate(Authorized, table, str(path)).peers)


@dataclass(frozen=True)
class ClientKeys:
    """What a client holds: its own pair and the public key of the bridge that it trusts."""

    public: str
    secret: str = field(repr=False)
    server: str


def load_client(secret_file: Path, server_public_file: Path) -> ClientKeys:
    """Read a client's keys. Raises BadInput for what is missing, malformed or open to others."""
    secret = _read_secret(secret_file)
    return ClientKeys(_public(secret), secret, _read_key(server_public_file, 0))


def new_keys(folder: Path) -> tuple[Path, ...]:
    """Make keys for a bridge and one peer of every role; returns the files. Nothing is ever overwritten: raises
    BadInput, with nothing written, when a file exists or the folder cannot be written."""
    roles: tuple[Role, ...] = ("controller", "operator", "observer")
    pairs = {name: _new_pair() for name in ("server", *roles)}
    texts = {f"{name}.secret": f"{secret}\n" for name, (_, secret) in pairs.items()}
    texts["server.public"] = f"{pairs['server'][0]}\n"
    tables = (f'\n[peers.{role}]\npublic = "{pairs[role][0]}"\nrole = "{role}"\n' for role in roles)
    texts["authorized.toml"] = _HEAD + "".join(tables)
    paths = tuple(folder / name for name in texts)
    for path in paths:
        if path.exists() or path.is_symlink():
            raise BadInput(f"{path} exists", "keys are never overwritten: give a new folder")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, text in zip(paths, texts.values(), strict=True):
            _write_private(path, text)
        sync_folder(folder)
    except OSError as error:
        raise BadInput(f"cannot write keys to {folder}: {error}", "give a folder that you may write") from error
    return paths


def _new_pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _public(secret: str) -> str:
    return zmq.curve_public(secret.encode()).decode()


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="ascii") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(descriptor)


def _read_secret(path: Path) -> str:
    return _read_key(path, stat.S_IRWXG | stat.S_IRWXO)


def _read_key(path: Path, forbidden: int) -> str:
    text = _read(path, 2 * KEY_CHARACTERS, forbidden).strip()
    try:
        decode_key(text)
    except ValueError as error:  # the text itself may be a secret: it is not shown
        raise BadInput(f"{path} is not a key: {error}", "make keys with `aecontrol keys new DIR`") from None
    return text


def _read(path: Path, most: int, forbidden: int) -> str:
    """The text of a small file whose mode has none of the ``forbidden`` bits. The mode is asked of the open file, so
    that nobody can exchange it in between."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as handle:
            status = os.fstat(descriptor)
            data = handle.read(most + 1) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error}", "make keys with `aecontrol keys new DIR`") from error
    if status.st_mode & forbidden:
        raise BadInput(f"{path} has mode {stat.S_IMODE(status.st_mode):04o}: others can use it", f"chmod 600 {path}")
    if not data or len(data) > most:
        raise BadInput(f"{path} is empty, no plain file, or larger than {most} bytes", "give the right file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text", "give the right file") from error
