"""Frames over real sockets: whole, in spite of bad networks and bridges that err."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq

from aecontrol.errors import InstrumentFault
from drivers.bulk import MAX_CHUNK, BulkClient, ChunkReply, ChunkRequest
from drivers.gate import secure

from .proxy import TcpProxy
from .wire_client import Wire


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


Reply = Callable[[ChunkRequest, bytes], list[bytes]]


def honest(request: ChunkRequest, data: bytes) -> list[bytes]:
    part = data[request.offset : request.offset + request.nbytes]
    header = ChunkReply(sha256=request.sha256, offset=request.offset, nbytes=len(part), size=len(data))
    return [header.model_dump_json().encode(), part]


@contextmanager
def bridge(data: bytes, replies: dict[int, Reply]) -> Iterator[BulkClient]:
    """A client of a bridge without keys that answers request number n by ``replies[n]``, all others honestly."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = context.socket(zmq.ROUTER)
    server.linger = 0
    server.bind("tcp://127.0.0.1:*")
    ended = threading.Event()

    def serve() -> None:
        number = 0
        while not ended.is_set():
            if server.poll(20):
                route, asked = server.recv_multipart()
                parts = replies.get(number, honest)(ChunkRequest.model_validate_json(asked), data)
                number += 1
                if parts:
                    server.send_multipart([route, *parts])

    thread = threading.Thread(target=serve)
    thread.start()
    client = BulkClient(context, lambda: server.get_string(zmq.LAST_ENDPOINT), None)
    try:
        yield client
    finally:
        ended.set()
        thread.join()
        client.close()
        server.close()
        context.term()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda request, data: [],
        lambda request, data: honest(request.model_copy(update={"offset": 0}), data),
        lambda request, data: [b"NaN", b""],
        lambda request, data: honest(request, data)[:1],
        lambda request, data: [*honest(request, data), b""],
        lambda request, data: [honest(request, data)[0].replace(b'"offset":', b'"offset":1'), b""],
    ],
    ids=["lost", "repeated", "garbage", "no bytes", "too many parts", "elsewhere"],
)
def test_a_lost_or_wrong_chunk_is_asked_for_again(wrong: Reply) -> None:
    data = random.Random(3).randbytes(6 * MAX_CHUNK + 5)
    with bridge(data, {2: wrong}) as client:
        assert client.fetch(hashlib.sha256(data).hexdigest(), len(data), 5.0) == data


def test_a_bridge_that_alters_a_chunk_is_found_out() -> None:
    data = random.Random(4).randbytes(2 * MAX_CHUNK)
    other = {1: lambda request, data: honest(request, bytes(len(data)))}
    with bridge(data, other) as client, pytest.raises(InstrumentFault, match="other contents"):
        client.fetch(hashlib.sha256(data).hexdigest(), len(data), 5.0)


def test_a_large_frame_comes_at_half_the_speed_that_is_claimed(wire: Wire) -> None:
    """16.8 MB over CURVE, digest included: the bar is 400 MB/s on an idle machine."""
    digest, data = spooled(wire, 16_800_000)
    speeds = []
    with bulk(wire) as client:
        for _ in range(5):
            before = time.perf_counter()
            assert client.fetch(digest, len(data), 10.0) == data
            speeds.append(len(data) / 1e6 / (time.perf_counter() - before))
    assert max(speeds) > 200
