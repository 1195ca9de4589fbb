"""The gate of a bridge: encryption, the list of admitted keys, and a proof at start that both work.

libzmq's CURVE alone admits anybody who knows the server's public key; the list is kept by an *authenticator* that
answers libzmq's questions (ZAP, RFC 27). It has no thread: a busy bridge was measured to starve one for seconds, while
in the bridge's own loop it is served as promptly as a ping. Every socket is bound through :meth:`Gate.bind`, which then
knocks twice: an unknown key must be turned away, a known one let in.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from aecontrol.errors import BadInput, InstrumentFault

from .keys import ClientKeys, KeyRing, Role, decode_key

ZAP_ADDRESS = "inproc://zeromq.zap.01"
DOMAIN = "aecontrol"
LOCAL = "local"  # who a peer is on a simulated bridge without keys
HANDSHAKE_S = 2.0
BURST, PER_SECOND = 64, 4.0  # connections that one key may open at once, and then per second

Knock = Literal["admitted", "refused", "no answer"]


class Refusal(NamedTuple):
    """One connection that was turned away: for the audit log."""

    address: str
    key: str
    why: str


class Gate:
    """Owns the bridge's zmq context and decides who connects.

    ``ring`` None means no encryption and everybody is the local operator: allowed only for a ``simulated`` backend, and
    only on loopback. Two I/O threads: what goes over the bulk socket never delays the control socket.
    """

    def __init__(self, ring: KeyRing | None, simulated: bool = False) -> None:
        if ring is None and not simulated:
            raise BadInput("a bridge to a real instrument has no keys", "make some with `aecontrol keys new DIR`")
        self.context = zmq.Context(io_threads=2)
        self.refusals: deque[Refusal] = deque(maxlen=256)
        self.counts: Counter[str] = Counter()
        self._ring = ring
        self._names = {} if ring is None else {decode_key(peer.public): name for name, peer in ring.peers.items()}
        self._guest = self._stranger = b""
        self._tokens: dict[str, tuple[float, float]] = {}
        self._zap = self.context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(ZAP_ADDRESS)

    def bind(self, socket: zmq.Socket[bytes], address: str) -> str:
        """Bind ``socket`` behind the gate and prove that the gate works. ``address`` is ``tcp://IP:PORT``, a port of *
        takes any free one. Returns the address as bound. Raises BadInput for an address that must not or cannot be
        bound, InstrumentFault when the gate does not keep strangers out or lets nobody in."""
        socket.ipv6 = check_address(address, self._ring) == 6
        socket.handshake_ivl = int(1000 * HANDSHAKE_S)
        if self._ring is not None:
            socket.zap_domain = DOMAIN.encode()
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without an authenticator nobody is admitted
            socket.curve_server = True
            socket.curve_secretkey = self._ring.secret.encode()
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise BadInput(f"cannot listen at {address}: {error}", "give a free port of this machine") from error
        bound = str(socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")
        if self._ring is not None:
            self._prove(bound)
        return bound

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """To be polled: readable when :meth:`answer` has something to do."""
        return self._zap

    def answer(self, most: int = 16) -> None:
        """Decide on the connections that wait at the gate, at most ``most`` of them. Never waits. Until this is called
        nobody is admitted, and a peer gives up after HANDSHAKE_S."""
        for _ in range(most):
            try:
                asked = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._zap.send_multipart(self._verdict(asked))

    def role(self, user: str) -> Role:
        """What an admitted peer may do."""
        return "operator" if self._ring is None else self._ring.peers[user].role

    def user(self, part: zmq.Frame) -> str:
        """Who sent this frame, by the key that opened its connection. The routing id says nothing: peers choose it.
        A peer could name itself in its own handshake too; what the authenticator said takes precedence in libzmq."""
        return LOCAL if self._ring is None else str(part.get("User-Id"))

    def close(self) -> None:
        """Admit nobody any more. Every socket of the context must be closed before."""
        self._zap.close()
        self.context.term()

    def _prove(self, bound: str) -> None:
        assert self._ring is not None
        server = zmq.curve_public(self._ring.secret.encode()).decode()
        public, secret = zmq.curve_keypair()
        keys = ClientKeys(public.decode(), secret.decode(), server)
        self._stranger = z85.decode(public)
        if (found := self._knock(bound, keys)) != "refused":
            raise InstrumentFault(
                f"a stranger's key at {bound}: {found}, and must be refused", "do not use this bridge"
            )
        self._guest, self._stranger = self._stranger, b""
        found = self._knock(bound, keys)
        self._guest = b""
        if found != "admitted":
            raise InstrumentFault(f"a known key at {bound}: {found}", "restart the bridge")

    def _knock(self, bound: str, keys: ClientKeys) -> Knock:
        """Knock from a thread, and answer meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(knock, self.context, bound, keys)
            while not found.done():
                self._zap.poll(1)
                self.answer()
            return found.result()

    def _verdict(self, asked: list[bytes]) -> list[bytes]:
        """The reply to one question: [version, id, domain, address, routing id, mechanism, key] -> [version, id,
        status, text, user, metadata]. Whatever is not a known key of our own domain is refused."""
        request = asked[1] if len(asked) > 1 else b""
        proper = len(asked) == 7 and (asked[2], asked[5]) == (DOMAIN.encode(), b"CURVE") and len(asked[6]) == 32
        if proper and asked[6] == self._guest:
            return [b"1.0", request, b"200", b"OK", b"guest", b""]
        name = self._names.get(asked[6]) if proper else None
        if name is not None and self._may_connect(name):
            self.counts["admitted"] += 1
            return [b"1.0", request, b"200", b"OK", name.encode(), b""]
        why = "not a known key" if name is None else f"{name} connects too often"
        if not proper or asked[6] != self._stranger:
            address = asked[3].decode("ascii", "replace") if proper else ""
            self.counts["refused"] += 1
            self.refusals.append(Refusal(address, z85.encode(asked[6]).decode() if proper else "", why))
        return [b"1.0", request, b"400", why.encode(), b"", b""]

    def _may_connect(self, name: str) -> bool:
        """A key may open a burst of connections, then a few a second: a peer that libzmq cut off, or that was ignored,
        does not come back as fast as it likes."""
        now = time.monotonic()
        tokens, then = self._tokens.get(name, (float(BURST), now))
        tokens = min(BURST, tokens + PER_SECOND * (now - then))
        self._tokens[name] = (max(tokens - 1, 0.0), now)
        return tokens >= 1


def secure(socket: zmq.Socket[bytes], keys: ClientKeys | None) -> None:
    """Give a client's socket its keys; None for a simulated bridge without any."""
    socket.linger = 0
    socket.reconnect_ivl = -1  # a lost connection is lost: the next one is a new socket that introduces itself
    socket.handshake_ivl = int(1000 * HANDSHAKE_S)
    if keys is not None:
        socket.curve_publickey = keys.public.encode()
        socket.curve_secretkey = keys.secret.encode()
        socket.curve_serverkey = keys.server.encode()


def join(socket: zmq.Socket[bytes], address: str, seconds: float = HANDSHAKE_S) -> Knock:
    """Connect ``socket`` and wait at most ``seconds`` for the end of the handshake."""
    failed = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED
    lost = failed | zmq.EVENT_CLOSED  # closed: nobody listens there
    refused, admitted = zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_SUCCEEDED
    monitor = socket.get_monitor_socket(refused | admitted | lost)
    until = time.monotonic() + seconds
    try:
        socket.connect(address)
        while (left := until - time.monotonic()) > 0:
            if not monitor.poll(int(1000 * left) + 1):
                continue
            event = recv_monitor_message(monitor)["event"]
            if event in (admitted, refused):
                return "admitted" if event == admitted else "refused"
            return "no answer"
    finally:
        socket.disable_monitor()
        monitor.close(linger=0)
    return "no answer"


def knock(context: zmq.Context[zmq.Socket[bytes]], address: str, keys: ClientKeys) -> Knock:
    """Try a key at a bridge's address and go away again."""
    with context.socket(zmq.DEALER) as socket:
        secure(socket, keys)
        return join(socket, address)


def check_address(address: str, ring: KeyRing | None) -> int:
    """The IP version of an address at which a bridge with these keys may listen. Raises BadInput for any other."""
    loopback, version = _parse(address)
    if ring is None and not loopback:
        raise BadInput(f"{address} can be reached from outside and the bridge has no keys", "make and use keys")
    return version


def _parse(address: str) -> tuple[bool, int]:
    """(loopback, IP version) of ``tcp://IP:PORT``. Names, interfaces and 'every address' are refused: a bridge listens
    where its owner said, nowhere else."""
    match = re.fullmatch(r"tcp://(?:\[([0-9a-fA-F:]+)\]|([0-9.]+)):(\*|[0-9]{1,5})", address)
    try:
        ip = ipaddress.ip_address((match[1] or match[2]) if match else "")
    except ValueError:
        raise BadInput(
            f"{address!r} is not tcp://IP:PORT", "give the IP address of the interface to listen at"
        ) from None
    if ip.is_unspecified:
        raise BadInput(f"{address} listens at every interface", "give the IP address of one")
    return ip.is_loopback, ip.version
