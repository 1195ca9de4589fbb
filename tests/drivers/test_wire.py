"""The bridge's sockets against hostile peers and bad networks: real sockets, the server in a process of its own."""

from __future__ import annotations

import json
import random
import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import zmq

from aecontrol.errors import InstrumentFault
from drivers.bulk import BulkClient
from drivers.gate import BURST, HANDSHAKE_S
from drivers.keys import ClientKeys
from drivers.sockets import MAX_FRAME, MAX_HEADER, STRIKES, Dealer

from .proxy import TcpProxy
from .wire_client import ANSWER_S, Wire, fastest


def pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


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
            with pytest.raises(InstrumentFault, match="connect again"):  # not even once the network is back
                dealer.send(b"expose")
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
