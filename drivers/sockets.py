"""The control socket, both ends: short headers, opaque here, whose loss must never be silent and whose flood must never
be felt. One message is one part of at most 16 KiB. Nothing here blocks, except a client that waits for an answer.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import NamedTuple

import zmq

from aecontrol.errors import InstrumentFault

from .gate import HANDSHAKE_S, Gate, join, secure
from .keys import ClientKeys, Role

MAX_HEADER = 16 << 10
MAX_FRAME = 64 << 10  # a longer frame makes libzmq cut the peer off before it is read
QUEUE = 64  # messages waiting for one peer, in either direction
STRIKES = 8
REMEMBERED = 1024  # routes with strikes
CONTROL_LANE, BULK_LANE = 1, 2  # I/O threads, as bits: heartbeats never queue behind frames


class Received(NamedTuple):
    """One message of an admitted peer. ``route`` is where an answer goes; ``user`` and ``role`` come from its key."""

    route: bytes
    user: str
    role: Role
    header: bytes


class ControlServer:
    """The bridge's end. ``counts`` tells what was dropped: 'parts' (more than one), 'long', 'empty' messages, messages
    'ignored' because their sender had its strikes, answers to peers that are 'gone' or 'slow'.

    ``address`` is where it listens. Raises BadInput and InstrumentFault as
    :meth:`Gate.bind` does.
    """

    def __init__(self, gate: Gate, address: str) -> None:
        self.counts: Counter[str] = Counter()
        self._gate = gate
        self._strikes: OrderedDict[bytes, int] = OrderedDict()
        self.socket = router(gate, CONTROL_LANE, MAX_FRAME, QUEUE)
        try:
            self.address = gate.bind(self.socket, address)
        except BaseException:
            self.socket.close()
            raise

    def register(self, poller: zmq.Poller) -> None:
        """Have ``poller`` wake up whenever :meth:`receive` has something to do."""
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._gate.socket, zmq.POLLIN)

    def receive(self, most: int = 64) -> list[Received]:
        """What has arrived, at most ``most`` messages, those dropped included. Never waits. Also lets in who waits at
        the gate: to be called whenever the poller wakes."""
        self._gate.answer()
        found: list[Received] = []
        for _ in range(most):
            parts = next_message(self.socket)
            if parts is None:
                break
            route, header = parts[0].bytes, parts[1]
            if self._strikes.get(route, 0) >= STRIKES:
                self.counts["ignored"] += 1
            elif fault := _fault(parts):
                self.counts[fault] += 1
                self.strike(route)
            else:
                user = self._gate.user(header)
                found.append(Received(route, user, self._gate.role(user), header.bytes))
        return found

    def send(self, route: bytes, header: bytes) -> bool:
        """Answer a peer. Never waits: False when the peer is gone, or does not read and its queue is full; the answer
        is then dropped, and the peer will ask again."""
        try:
            self.socket.send_multipart([route, header], flags=zmq.NOBLOCK)
        except zmq.Again:
            self.counts["slow"] += 1
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counts["gone"] += 1
            return False
        return True

    def strike(self, route: bytes) -> None:
        """Note a malformed message; after several, whatever comes by this route is ignored. Its sender may connect
        again, as often as the gate lets its key."""
        self._strikes[route] = self._strikes.pop(route, 0) + 1
        if len(self._strikes) > REMEMBERED:
            self._strikes.popitem(last=False)

    def close(self) -> None:
        """Stop listening; answers not yet sent are dropped."""
        self.socket.close()


def router(gate: Gate, lane: int, frame: int, queue: int) -> zmq.Socket[bytes]:
    """A bridge's socket with every limit set: frames of at most ``frame`` bytes, ``queue`` messages a peer."""
    socket: zmq.Socket[bytes] = gate.context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.affinity = lane
    socket.maxmsgsize = frame
    socket.sndhwm = socket.rcvhwm = queue
    socket.router_mandatory = True  # an answer that cannot be delivered is noticed
    socket.router_handover = False  # nobody takes over a living peer's routing id
    socket.tcp_keepalive, socket.tcp_keepalive_idle = 1, 10
    socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = 5, 3
    return socket


def next_message(socket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """The next message's first three parts (None: nothing has arrived). libzmq bounds the length of a part but not
    their number, so parts beyond the third are taken off the queue one by one and never kept."""
    try:
        parts = [socket.recv(zmq.NOBLOCK, copy=False)]
    except zmq.Again:
        return None
    more = parts[0].more
    while more:
        part = socket.recv(zmq.NOBLOCK, copy=False)
        more = part.more
        if len(parts) < 3:
            parts.append(part)
    return parts


def _fault(parts: list[zmq.Frame]) -> str:
    if len(parts) != 2:
        return "parts"
    size = len(parts[1].buffer)
    return "empty" if size == 0 else "long" if size > MAX_HEADER else ""


class Dealer:
    """A client's end: one connection, for life. When it is lost, close this one and make another, which has a new
    routing id and must introduce itself; nothing that was queued can arrive late.

    Raises InstrumentFault when no bridge completes the handshake within ``seconds``.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        keys: ClientKeys | None,
        seconds: float = HANDSHAKE_S,
    ) -> None:
        self._address = address
        self._socket = dealer(context, address, keys, CONTROL_LANE, MAX_FRAME, seconds)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """To be polled."""
        return self._socket

    def send(self, header: bytes) -> None:
        """Send one message. Raises InstrumentFault when the connection is lost or the bridge does not read: the message
        was then not sent and never will be."""
        try:
            self._socket.send(header, zmq.NOBLOCK)
        except zmq.Again:
            raise InstrumentFault(f"the connection to {self._address} is lost", "connect again") from None

    def receive(self, timeout_s: float) -> bytes | None:
        """The next answer, or None when none came in time. Answers of several parts are dropped."""
        if not self._socket.poll(int(1000 * timeout_s)):
            return None
        parts = next_message(self._socket)
        if parts is None or len(parts) > 1:
            return None
        return parts[0].bytes

    def close(self) -> None:
        """Drop the connection, and whatever was not sent."""
        self._socket.close()


def dealer(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    keys: ClientKeys | None,
    lane: int,
    frame: int,
    seconds: float,
) -> zmq.Socket[bytes]:
    """A connected client's socket with every limit set. Raises InstrumentFault when there is no bridge."""
    socket = context.socket(zmq.DEALER)
    try:
        secure(socket, keys)
        socket.affinity = lane if context.get(zmq.IO_THREADS) > 1 else CONTROL_LANE
        socket.maxmsgsize = frame
        socket.sndhwm = socket.rcvhwm = QUEUE
        socket.immediate = True  # nothing is queued for a bridge that is not there
        socket.ipv6 = "[" in address
        found = join(socket, address, seconds)
    except zmq.ZMQError as error:
        socket.close()
        raise InstrumentFault(f"cannot connect to {address}: {error}", "give tcp://HOST:PORT") from error
    if found != "admitted":
        socket.close()
        raise InstrumentFault(
            f"no bridge at {address} lets this client in ({found}): wrong address or key",
            "check the address, server.public, and that the bridge's authorized.toml lists this client's key",
        )
    return socket
