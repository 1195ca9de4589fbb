"""A bad network on purpose: a TCP proxy between two real peers that cuts, stalls, loses, delays and damages bytes.

    with TcpProxy(("127.0.0.1", 5555)) as proxy:
        client.connect(proxy.address)
        proxy.fault = "stall"           # now; "" makes it a good network again
        proxy.cut()                     # every connection is reset

Faults, for the ``direction`` 'up' (to the server), 'down' or 'both':

- 'stall': bytes wait, and arrive once the fault is over; peers see a slow network;
- 'half-open': bytes vanish, connections stay: peers believe that the link is up;
- 'trickle': one byte a second;
- 'flip': one bit in every piece that passes is turned over;
- 'truncate': half of the next piece passes, then the connection is reset.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import defaultdict
from types import TracebackType
from typing import Literal

Fault = Literal["", "stall", "half-open", "trickle", "flip", "truncate"]
Direction = Literal["up", "down", "both"]
TICK_S = 0.02
PIECE = 1 << 16


class TcpProxy:
    """Listens on a free port of 127.0.0.1. ``recorded[n]`` are the bytes that connection n sent up, if ``record``."""

    def __init__(self, target: tuple[str, int], seed: int = 0, record: bool = False) -> None:
        self.fault: Fault = ""
        self.direction: Direction = "both"
        self.accepting = True  # False: new connections are reset
        self.recorded: dict[int, bytearray] = defaultdict(bytearray)
        self._target, self._record, self._random = target, record, random.Random(seed)
        self._ended = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TICK_S)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cut(self) -> None:
        """Reset every connection; new ones are accepted again while ``accepting``."""
        while self._pairs:
            for end in self._pairs.pop():
                reset(end)

    def close(self) -> None:
        """Reset everything and wait for the threads."""
        self._ended.set()
        self._threads[0].join()  # the listener's: no connection is added after it
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        number = 0
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                server = socket.create_connection(self._target, timeout=1.0) if self.accepting else None
            except OSError:
                server = None
            if server is None:
                reset(client)
                continue
            self._pairs.append((client, server))
            for end in (client, server):
                end.settimeout(TICK_S)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._carry, client, server, "up", number)
            self._start(self._carry, server, client, "down", number)
            number += 1

    def _carry(self, source: socket.socket, sink: socket.socket, direction: Direction, number: int) -> None:
        """Carry bytes one way until either end closes."""
        cut = False
        while not (cut or self._ended.is_set()):
            try:
                piece = source.recv(PIECE)
                if not piece:
                    break
                if self._record and direction == "up":
                    self.recorded[number] += piece
                cut = self._pass(piece, sink, direction)
            except TimeoutError:
                continue
            except OSError:
                break
        reset(source)
        reset(sink)

    def _now(self, direction: Direction) -> Fault:
        return self.fault if self.direction in (direction, "both") and not self._ended.is_set() else ""

    def _pass(self, piece: bytes, sink: socket.socket, direction: Direction) -> bool:
        """Hand on what is left of one piece; True when the connection has to be cut after it."""
        while self._now(direction) == "stall":
            time.sleep(TICK_S)
        while piece and self._now(direction) == "trickle":
            send_all(sink, piece[:1], self._ended)
            piece = piece[1:]
            self._ended.wait(1.0)
        fault = self._now(direction)
        if fault == "half-open":
            piece = b""
        elif fault == "truncate":
            piece = piece[: len(piece) // 2]
        elif fault == "flip" and piece:
            bit = self._random.randrange(8 * len(piece))
            piece = piece[: bit // 8] + bytes([piece[bit // 8] ^ 1 << bit % 8]) + piece[bit // 8 + 1 :]
        send_all(sink, piece, self._ended)
        return fault == "truncate"


def send_all(sink: socket.socket, data: bytes, ended: threading.Event) -> None:
    """As ``sendall``, but a peer that does not read only makes it wait, until ``ended``."""
    view = memoryview(data)
    while view and not ended.is_set():
        try:
            view = view[sink.send(view) :]
        except TimeoutError:
            continue


def reset(end: socket.socket) -> None:
    """Close with a reset, as a crash or a cut does; safe to repeat."""
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    end.close()
