"""The bridge's sockets against hostile peers and bad networks: real sockets, the server in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from aecontrol.errors import BadInput, InstrumentFault
from drivers.bulk import MAX_CHUNK, BulkClient
from drivers.gate import BURST, HANDSHAKE_S, Gate, secure
from drivers.keys import ClientKeys, KeyRing, load_client, new_keys
from drivers.sockets import MAX_FRAME, MAX_HEADER, STRIKES, ControlServer, Dealer

from .proxy import TcpProxy

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


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    keys, spool = tmp_path_factory.mktemp("wire") / "keys", tmp_path_factory.mktemp("spool")
    new_keys(keys)
    command = [sys.executable, "-m", "tests.drivers.wire_server", str(keys), str(spool)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        try:
            assert server.stdout is not None
            addresses = json.loads(server.stdout.readline())
            yield Wire(**addresses, keys=keys, spool=spool, process=psutil.Process(server.pid), context=context)
            server.communicate(timeout=5)
            assert server.returncode == 0
        finally:
            server.kill()
            context.destroy(0)


@pytest.fixture
def steady(wire: Wire) -> Iterator[Wire]:
    """Whatever the test does, a good client's connection made before it still answers at once, a new one is let in, and
    the server's memory has not grown much."""
    before = wire.process.memory_info().rss
    with wire.dealer("operator") as good:
        wire.ask(good)
        yield wire
        assert fastest(lambda: wire.ask(good)) < ANSWER_S
        with wire.dealer("operator") as fresh:
            assert wire.ask(fresh) == b"operator operator ping"
    assert wire.process.memory_info().rss - before < GROWTH


def fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


# ---------------------------------------------------------------- keys


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    files = new_keys(folder)
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    before = {file: file.read_bytes() for file in files}
    (folder / "server.secret").unlink()
    with pytest.raises(BadInput, match="never overwritten"):
        new_keys(folder)
    assert not (folder / "server.secret").exists()
    assert all(file.read_bytes() == before[file] for file in files if file.exists())
    secret = before[folder / "controller.secret"].decode().strip()
    assert secret not in repr(load_client(folder / "controller.secret", folder / "server.public"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    new_keys(tmp_path)
    (tmp_path / "server.secret").chmod(mode)
    with pytest.raises(BadInput, match="chmod 600"):
        KeyRing.load(tmp_path)
    (tmp_path / "server.secret").chmod(0o600)
    assert {peer.role for peer in KeyRing.load(tmp_path).peers.values()} == {"observer", "controller", "operator"}
    (tmp_path / "authorized.toml").chmod(0o622)  # whoever writes the list lets himself in
    with pytest.raises(BadInput, match="chmod 600"):
        KeyRing.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("observer", "root"),
        lambda text: text + "admin = true\n",
        lambda text: text.replace('public = "', 'public = "x'),
        lambda text: text + text[text.index("[peers.controller]") :].replace("[peers.", "[peers.second_"),
        lambda text: text.replace("[peers.operator]", '[peers."../operator"]'),
        lambda text: text + "#" * (1 << 20),
        lambda text: "[" * 100_000,
        lambda text: "",
    ],
)
def test_a_malformed_list_is_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    new_keys(tmp_path)
    path = tmp_path / "authorized.toml"
    path.write_text(change(path.read_text()))
    with pytest.raises(BadInput):
        KeyRing.load(tmp_path)


@pytest.mark.parametrize("text", ["", "short", "\x00" * 40, "~" * 40, "#" * 40, "é" * 40, "0" * 41, "0" * 500])
def test_what_is_not_a_key_is_refused(tmp_path: Path, text: str) -> None:
    new_keys(tmp_path)
    (tmp_path / "server.public").write_text(text)
    with pytest.raises(BadInput):
        load_client(tmp_path / "controller.secret", tmp_path / "server.public")


# ---------------------------------------------------------------- the gate at start


class OpenGate(Gate):
    """Admits everybody, as libzmq does without an authenticator."""

    def _verdict(self, asked: list[bytes]) -> list[bytes]:
        return [b"1.0", asked[1], b"200", b"OK", b"anybody", b""]


class ShutGate(Gate):
    """Admits nobody."""

    def _verdict(self, asked: list[bytes]) -> list[bytes]:
        return [b"1.0", asked[1], b"400", b"no", b"", b""]


@pytest.mark.parametrize(
    ("kind", "mistake"), [(OpenGate, "stranger's key .* admitted"), (ShutGate, "a known key .* refused")]
)
def test_a_gate_that_does_not_work_refuses_to_open(tmp_path: Path, kind: type[Gate], mistake: str) -> None:
    new_keys(tmp_path)
    gate = kind(KeyRing.load(tmp_path))
    with pytest.raises(InstrumentFault, match=mistake):
        ControlServer(gate, "tcp://127.0.0.1:*")
    gate.close()


def test_a_gate_whose_authenticator_is_silent_refuses_to_open(tmp_path: Path) -> None:
    new_keys(tmp_path)
    gate = Gate(KeyRing.load(tmp_path))
    gate._ended.set()
    gate._thread.join()
    with pytest.raises(InstrumentFault, match="no answer"):
        ControlServer(gate, "tcp://127.0.0.1:*")
    gate.close()


def test_without_keys_only_a_simulator_on_loopback(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="aecontrol keys new"):
        Gate(None)
    gate = Gate(None, simulated=True)
    for address in ("tcp://192.0.2.1:5555", "tcp://[2001:db8::1]:5555"):
        with pytest.raises(BadInput, match="no keys"):
            ControlServer(gate, address)
    for address in ("tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://localhost:5555", "tcp://eth0:1", "ipc:///tmp/x", ""):
        with pytest.raises(BadInput):
            ControlServer(gate, address)
    server = ControlServer(gate, "tcp://127.0.0.1:*")
    with pytest.raises(BadInput, match="cannot listen"):
        ControlServer(gate, server.address)
    client = Dealer(gate.context, server.address, None)
    client.send(b"hello")
    assert server.socket.poll(1000)
    assert [(m.user, m.role, m.header) for m in server.receive()] == [("local", "operator", b"hello")]
    client.close()
    server.close()
    gate.close()


# ---------------------------------------------------------------- who is let in


def test_the_role_comes_from_the_key(steady: Wire) -> None:
    for name in ("observer", "controller", "operator"):
        with steady.dealer(name) as dealer:
            assert steady.ask(dealer) == f"{name} {name} ping".encode()


def test_strangers_are_refused(steady: Wire) -> None:
    good = steady.client("controller")
    public, secret = pair()
    strangers = [ClientKeys(public, secret, good.server), replace(good, server=public), None]
    for keys in strangers:
        with pytest.raises(InstrumentFault, match="address or key"):
            Dealer(steady.context, steady.control, keys)
        with pytest.raises(InstrumentFault, match="address or key"):
            BulkClient(steady.context, lambda: steady.bulk, keys).fetch("0" * 64, 1, 0.1)
    assert steady.counts()["refused"] >= 2


def test_a_second_peer_with_a_living_ones_routing_id_is_not_heard(steady: Wire) -> None:
    keys = steady.client("controller")
    with steady.raw(keys, routing_id=b"same") as first:
        first.send(b"one")
        assert first.recv().endswith(b"one")
        with steady.raw(steady.client("observer"), routing_id=b"same") as second:
            second.send(b"two")
            assert not second.poll(200)
            first.send(b"three")
            assert first.recv() == b"controller controller three"


def test_a_key_that_connects_too_often_has_to_wait(steady: Wire) -> None:
    with ExitStack() as stack:
        refused = 0
        for _ in range(200):
            try:
                stack.enter_context(steady.dealer("observer"))
            except InstrumentFault:
                refused += 1
        assert 0 < 200 - refused < 1.5 * BURST  # a burst, a few more as time passes, and no others
    with steady.dealer("controller") as other:
        assert steady.ask(other).startswith(b"controller")


# ---------------------------------------------------------------- hostile bytes


def send_parts(peer: zmq.Socket[bytes], number: int) -> None:
    for _ in range(number - 1):
        peer.send(b"x", zmq.SNDMORE)
    peer.send(b"x")


def test_malformed_messages_are_dropped_counted_and_their_sender_ignored(steady: Wire) -> None:
    before = steady.counts()
    with steady.raw(steady.client("controller")) as peer:
        send_parts(peer, 100_000)
        send_parts(peer, 2)
        peer.send(b"")
        peer.send(bytes(MAX_HEADER + 1))
        peer.send(b"fine")
        assert peer.recv().endswith(b"fine")
        for _ in range(STRIKES):
            peer.send(b"")
        peer.send(b"too late")
        assert not peer.poll(200)
    after = steady.counts()
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in ("parts", "long", "empty", "ignored")}
    assert grown == {"parts": 2, "long": 1, "empty": STRIKES - 3, "ignored": 5}


def test_an_oversized_frame_cuts_its_sender_off(steady: Wire) -> None:
    with steady.raw(steady.client("controller")) as peer:
        peer.send(b"fine")
        assert peer.recv().endswith(b"fine")
        peer.send(bytes(MAX_FRAME + 1))
        peer.send(b"too late")
        assert not peer.poll(200)


def test_a_reader_that_never_reads_costs_little(steady: Wire) -> None:
    with steady.raw(steady.client("controller"), rcvhwm=1, rcvbuf=4096, sndhwm=0) as peer:
        for _ in range(5000):
            peer.send(b"big")
        until = time.monotonic() + 5
        with steady.dealer("operator") as other:
            while "slow" not in json.loads(steady.ask(other, b"counts")) and time.monotonic() < until:
                time.sleep(0.1)
            assert "slow" in json.loads(steady.ask(other, b"counts"))


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: bridge\r\n\r\n",
    b"",
    GREETING,
    GREETING[:11],
    GREETING.replace(b"CURVE", b"NULL\0"),
    GREETING + b"\x04\xc8\x05HELLO" + bytes(194),
    GREETING + b"\x06" + (1 << 62).to_bytes(8, "big"),
    GREETING + b"\x02" + b"\xff" * 8,
]


def test_garbage_on_the_port_is_closed(steady: Wire) -> None:
    chance = random.Random(1)
    peers = [socket.create_connection(steady.target, timeout=5) for _ in range(200)]
    try:
        for peer, data in zip(peers, GARBAGE + [chance.randbytes(4096) for _ in range(50)], strict=False):
            peer.sendall(data)
        with steady.dealer("controller") as during:
            assert fastest(lambda: steady.ask(during)) < ANSWER_S
        until = time.monotonic() + HANDSHAKE_S + 2
        for peer in peers:  # also those that say nothing: the handshake has a time limit
            peer.settimeout(max(until - time.monotonic(), 0.1))
            assert ended(peer)
    finally:
        for peer in peers:
            peer.close()


def ended(peer: socket.socket) -> bool:
    """True once the server has closed the connection."""
    try:
        while peer.recv(4096):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def test_a_recorded_stream_is_refused(steady: Wire) -> None:
    with TcpProxy(steady.target, record=True) as proxy, steady.dealer(address=proxy.address) as dealer:
        for number in range(5):
            steady.ask(dealer, b"expose %d" % number)
        recorded = bytes(proxy.recorded[0])
    before = steady.counts()
    for pause in (0.0, 0.05):  # at once, and step by step as a peer would speak
        with socket.create_connection(steady.target, timeout=2) as replay:
            for piece in (recorded[:64], recorded[64:266], recorded[266:]):
                replay.sendall(piece)
                time.sleep(pause)
            assert ended(replay)
    after = steady.counts()
    assert after["served"] - before["served"] == 1  # the question for the counts
    assert after["admitted"] - before["admitted"] == 1


# ---------------------------------------------------------------- bad networks


def keep_sending(dealer: Dealer) -> None:
    for _ in range(50):
        dealer.send(b"expose")
        time.sleep(0.01)


def test_a_lost_connection_is_an_error_and_nothing_arrives_late(steady: Wire) -> None:
    with TcpProxy(steady.target) as proxy:
        with steady.dealer(address=proxy.address) as dealer:
            steady.ask(dealer)
            before = steady.counts()["served"]
            proxy.accepting = False
            proxy.cut()
            with pytest.raises(InstrumentFault, match="connect again"):
                keep_sending(dealer)
            proxy.accepting = True
            assert dealer.receive(0.2) is None
            seen = steady.counts()["served"]
        with steady.dealer(address=proxy.address) as again:
            assert steady.ask(again) == b"controller controller ping"
        assert seen - before <= 2  # at most what was on its way when the network was cut


@pytest.mark.parametrize("fault", ["half-open", "flip", "truncate", "stall"])
def test_what_a_bad_network_damages_never_reaches_the_bridge(steady: Wire, fault: Any) -> None:
    with TcpProxy(steady.target) as proxy, steady.dealer(address=proxy.address) as dealer:
        steady.ask(dealer)
        before = steady.counts()["served"]
        proxy.fault = fault
        dealer.send(b"expose 1")
        assert dealer.receive(0.2) is None
        assert steady.counts()["served"] - before == 1
        proxy.fault = ""
        late = dealer.receive(1.0 if fault == "stall" else 0.1)
        assert late == (b"controller controller expose 1" if fault == "stall" else None)


# ---------------------------------------------------------------- frames


def spooled(wire: Wire, size: int) -> tuple[str, bytes]:
    data = random.Random(size).randbytes(size)
    digest = hashlib.sha256(data).hexdigest()
    (wire.spool / digest).write_bytes(data)
    return digest, data


@contextmanager
def bulk(wire: Wire, address: str = "", name: str = "controller") -> Iterator[BulkClient]:
    client = BulkClient(wire.context, lambda: address or wire.bulk, wire.client(name))
    try:
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("size", [1, MAX_CHUNK - 1, MAX_CHUNK, MAX_CHUNK + 1, 9 * MAX_CHUNK + 7])
def test_a_frame_arrives_whole(steady: Wire, size: int) -> None:
    digest, data = spooled(steady, size)
    with bulk(steady, name="observer") as client:
        assert client.fetch(digest, size, 5.0) == data
        assert client.fetch(digest, size, 5.0) == data


@pytest.mark.parametrize("fault", ["cut", "flip", "truncate", "half-open"])
def test_a_fetch_goes_on_where_a_bad_network_broke_it(steady: Wire, fault: Any) -> None:
    digest, data = spooled(steady, 16 << 20)
    target = ("127.0.0.1", int(steady.bulk.rsplit(":", 1)[1]))
    with TcpProxy(target, record=True) as proxy, bulk(steady, proxy.address) as client:
        proxy.direction = "down"
        events = iter([0.01, 0.3])

        def disturb() -> None:
            for wait in events:
                time.sleep(wait)
                if fault == "cut":
                    proxy.cut()
                else:
                    proxy.fault = fault
            proxy.fault = ""

        proxy._start(disturb)
        assert client.fetch(digest, len(data), 10.0) == data
        assert len(proxy.recorded) > 1  # it did connect again


def test_what_is_not_the_frame_is_refused(steady: Wire) -> None:
    digest, data = spooled(steady, 3 * MAX_CHUNK)
    other = hashlib.sha256(b"other").hexdigest()
    (steady.spool / other).write_bytes(data)
    link = hashlib.sha256(b"link").hexdigest()
    (steady.spool / link).symlink_to(steady.spool / digest)
    pipe = hashlib.sha256(b"pipe").hexdigest()
    os.mkfifo(steady.spool / pipe)
    with bulk(steady) as client:
        for wrong, mistake in ((other, "other contents"), (link, "has 0"), (pipe, "has 0"), ("0" * 64, "has 0")):
            with pytest.raises(InstrumentFault, match=mistake):
                client.fetch(wrong, len(data), 2.0)
        with pytest.raises(InstrumentFault, match="announced"):
            client.fetch(digest, len(data) + 1, 2.0)
        assert client.fetch(digest, len(data), 2.0) == data


def test_malformed_requests_for_chunks_get_no_answer(steady: Wire) -> None:
    good = {"sha256": "0" * 64, "offset": 0, "nbytes": 1}
    bad = [{**good, "sha256": "../../etc/passwd"}, {**good, "nbytes": 1 << 40}, {**good, "offset": -1}, [], {}]
    with steady.context.socket(zmq.DEALER) as peer:
        secure(peer, steady.client("controller"))
        peer.connect(steady.bulk)
        for request in bad:
            peer.send(json.dumps(request).encode())
        peer.send_multipart([json.dumps(good).encode(), b"more"])
        peer.send(json.dumps(good).encode())
        assert peer.poll(1000)
        assert json.loads(peer.recv_multipart()[0])["size"] == 0
        assert not peer.poll(100)
