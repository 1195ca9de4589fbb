"""[driver] kind = "zmq": a microscope behind a bridge, reached over the network."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from aecontrol.durable import write_durable
from aecontrol.exposure.client import Client
from aecontrol.journal import Journal
from aecontrol.types import Model, Positive

from .remote import RemoteMicroscope


class ZmqDriver(Model):
    """A bridge's address and the keys that open it. Everything else the bridge says of itself."""

    kind: Literal["zmq"] = "zmq"
    address: str = Field(pattern=r"^tcp://[^\s]+:\d+$", description="the bridge's control socket, tcp://HOST:PORT")
    secret_key: Path | None = Field(
        None, description="this controller's secret key; a relative path starts at the file"
    )
    server_key: Path | None = Field(None, description="the bridge's public key")
    force: bool = Field(False, description="take the lease from whoever holds it; needs an operator's key")
    patience_s: Positive = Field(60.0, description="how long a bridge that has fallen silent is asked again, s")

    @model_validator(mode="after")
    def _both_keys(self) -> ZmqDriver:
        if (self.secret_key is None) != (self.server_key is None):
            raise ValueError("secret_key and server_key belong together; a bridge without keys needs neither")
        return self

    def build(self, folder: Path, base: Path, seed: int) -> RemoteMicroscope:
        """Connect. ``folder`` keeps the copy of the bridge's ledger and the name under which the lease is held. Raises
        InstrumentFault when nobody answers, BadInput for keys that cannot be used."""
        from .keys import load_client
        from .sockets import BulkClient, Dealer

        keys = None
        if self.secret_key is not None and self.server_key is not None:
            keys = load_client(base / self.secret_key, base / self.server_key)
        folder.mkdir(parents=True, exist_ok=True)
        mirror = Journal(folder / "ledger.sqlite")
        dealer = Dealer(self.address, keys)
        client = Client(dealer, mirror, _name(folder), time.monotonic, self.patience_s, force=self.force)

        bulk: list[BulkClient] = []

        def fetch(sha256: str, nbytes: int) -> bytes:
            if not bulk:
                host = self.address.rsplit(":", 1)[0]
                bulk.append(BulkClient(f"{host}:{client.frames_port}", keys))
            return bulk[0].fetch(sha256, nbytes, self.patience_s)

        def release() -> None:
            for connection in (dealer, *bulk):
                connection.close()
            mirror.close()

        microscope = RemoteMicroscope(client, fetch, release)
        try:
            microscope.capabilities()
        except BaseException:
            release()
            raise
        return microscope


def _name(folder: Path) -> str:
    """Under which name this session holds the lease: the same after a crash."""
    path = folder / "controller"
    if not path.exists():
        write_durable(path, uuid.uuid4().hex.encode())
    return path.read_text()
