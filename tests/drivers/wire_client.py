"""What the tests of the wire talk with: good clients, and peers of an attacker's own making."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import zmq

from drivers.gate import secure
from drivers.keys import ClientKeys, load_client
from drivers.sockets import Dealer

ROOT = Path(__file__).parents[2]
ANSWER_S = 0.1
GROWTH = 64 << 20


@dataclass
class Wire:
    """The running server, a context for clients, and everybody's keys."""

    control: str
    bulk: str
    keys: Path
    spool: Path
    process: psutil.Process
    context: zmq.Context[zmq.Socket[bytes]]

    @property
    def target(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.control.rsplit(":", 1)[1])

    def client(self, name: str) -> ClientKeys:
        return load_client(self.keys / f"{name}.secret", self.keys / "server.public")

    @contextmanager
    def dealer(self, name: str = "controller", address: str = "") -> Iterator[Dealer]:
        dealer = Dealer(self.context, address or self.control, self.client(name))
        try:
            yield dealer
        finally:
            dealer.close()

    @contextmanager
    def raw(self, keys: ClientKeys | None, **options: object) -> Iterator[zmq.Socket[bytes]]:
        """A peer of an attacker's own making."""
        with self.context.socket(zmq.DEALER) as peer:
            secure(peer, keys)
            peer.rcvtimeo = peer.sndtimeo = 5000
            for name, value in options.items():
                setattr(peer, name, value)
            peer.connect(self.control)
            yield peer

    def ask(self, dealer: Dealer, header: bytes = b"ping") -> bytes:
        dealer.send(header)
        answer = dealer.receive(2.0)
        assert answer is not None
        return answer

    def counts(self) -> dict[str, int]:
        with self.dealer("operator") as dealer:
            counts: dict[str, int] = json.loads(self.ask(dealer, b"counts"))
            return counts


def fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
