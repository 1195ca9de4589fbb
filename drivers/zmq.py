"""[driver] kind = "zmq": a microscope behind a bridge, reached over the network."""

from __future__ import annotations

import logging
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from aecontrol.durable import write_durable
from aecontrol.errors import InstrumentFault
from aecontrol.exposure import messages as m
from aecontrol.exposure.client import Client
from aecontrol.journal import Journal
from aecontrol.types import Model, Positive

from .remote import RemoteMicroscope

if TYPE_CHECKING:  # nothing of the network is loaded before a session connects
    import zmq

    from .keys import ClientKeys
    from .sockets import Dealer

log = logging.getLogger(__name__)
BLANK_S = 5.0


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
        import zmq

        from .bulk import BulkClient

        keys = self._keys(base)
        folder.mkdir(parents=True, exist_ok=True)
        mirror = Journal(folder / "ledger.sqlite")
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        line = Line(context, self.address, keys)
        client = Client(line, mirror, _name(folder), time.monotonic, self.patience_s, force=self.force)
        host = self.address.rsplit(":", 1)[0]
        bulk = BulkClient(context, lambda: f"{host}:{client.frames_port}", keys)

        def fetch(sha256: str, nbytes: int) -> bytes:
            return bulk.fetch(sha256, nbytes, self.patience_s)

        def release() -> None:
            line.close()
            bulk.close()
            context.term()
            mirror.close()

        microscope = RemoteMicroscope(client, fetch, release)
        try:
            microscope.capabilities()
        except BaseException:
            release()
            raise
        return microscope

    def blank(self, base: Path) -> None:
        """Blank the beam at once, whoever is exposing, and see that it is off. Raises InstrumentFault when nobody
        answers, or when the instrument says that it is still on."""
        import zmq

        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        line = Line(context, self.address, self._keys(base))
        until_s, number = time.monotonic() + BLANK_S, 0
        try:
            while time.monotonic() < until_s:
                number += 2
                line.send(m.encode(m.Blank(id=number)))
                line.send(m.encode(m.Status(id=number + 1)))
                while (header := line.receive(0.1)) is not None:
                    reply = m.decode_reply(header)
                    if isinstance(reply, m.Told) and reply.re > 2 and not reply.state.beam_on:
                        return
        finally:
            line.close()
            context.term()
        raise InstrumentFault(
            f"the beam behind {self.address} was not seen to go off within {BLANK_S:g} s",
            "blank it at the instrument; then see whether address and key are right and the bridge runs",
        )

    def _keys(self, base: Path) -> ClientKeys | None:
        from .keys import load_client

        if self.secret_key is None or self.server_key is None:
            return None
        return load_client(base / self.secret_key, base / self.server_key)


class Line:
    """A client's :class:`~aecontrol.exposure.client.Link`: a connection that is made when there is something to say,
    and made anew when it was lost."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: ClientKeys | None) -> None:
        self.address = address
        self._context, self._keys = context, keys
        self._dealer: Dealer | None = None

    def send(self, header: bytes) -> None:
        """Hand a message over, or lose it: whoever sent it will notice that no answer comes."""
        from .sockets import Dealer

        try:
            self._dealer = self._dealer or Dealer(self._context, self.address, self._keys)
            self._dealer.send(header)
        except InstrumentFault as error:
            log.info("%s", error.what)
            self.close()

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None when none came in time."""
        if self._dealer is None:
            time.sleep(timeout_s)
            return None
        return self._dealer.receive(timeout_s)

    def reconnect(self) -> None:
        """Drop the connection; the next message makes another, with a new routing id."""
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        if self._dealer is not None:
            self._dealer.close()
        self._dealer = None


def _name(folder: Path) -> str:
    """Under which name this session holds the lease: the same after a crash."""
    path = folder / "controller"
    if not path.exists():
        write_durable(path, uuid.uuid4().hex.encode())
    return path.read_text()
