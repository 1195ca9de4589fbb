"""How fast frames come over the wire, what the parts cost, and what a frame under way does to the control socket.

    python tests/benchmarks/wire.py [--megabytes 16.8] [--repeats 15]

Both ends on this machine, in two processes, over TCP on loopback. The last row of the first table is what a session
uses. MB is 10^6 bytes; every rate is a median, with the range.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import zmq

from drivers.bulk import PIPELINE, BulkClient, BulkServer, ChunkRequest
from drivers.gate import Gate, join, secure
from drivers.keys import ClientKeys, KeyRing, load_client, new_keys
from drivers.sockets import ControlServer, Dealer

ANY = "tcp://127.0.0.1:*"
CHUNKS = (1 << 16, 1 << 18, 1 << 20)


def serve(folder: Path | None, spool: Path, pipe: Connection) -> None:
    """The server's process: the bridge's own sockets, and a bare one that sends whole frames. Ends with the pipe."""
    gate = Gate(None if folder is None else KeyRing.load(folder), simulated=True)
    control, bulk = ControlServer(gate, ANY), BulkServer(gate, ANY, lambda digest: spool / digest)
    bare = gate.context.socket(zmq.ROUTER)
    pipe.send((control.address, bulk.address, gate.bind(bare, ANY)))
    poller = zmq.Poller()
    control.register(poller)
    for waited in (bare, pipe.fileno()):
        poller.register(waited, zmq.POLLIN)
    while pipe.fileno() not in (ready := dict(poller.poll())):
        for message in control.receive():
            control.send(message.route, message.header)
        if bare in ready:
            route, name = bare.recv_multipart()
            bare.send_multipart([route, (spool / name.decode()).read_bytes()], copy=False)
    bare.close(linger=0)
    control.close()
    bulk.close()
    gate.close()


@contextmanager
def server(folder: Path | None, spool: Path) -> Iterator[tuple[str, str, str]]:
    """Addresses of control, bulk and bare sockets of a server in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(folder, spool, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join(5)
        process.kill()


def pull(socket: zmq.Socket[bytes], name: str, size: int, chunk: int, hashed: bool) -> None:
    """One frame in chunks."""
    digest, have, asked = hashlib.sha256(), 0, 0
    parts = []
    while have < size:
        while asked < min(size, have + PIPELINE * chunk):
            request = ChunkRequest(sha256=name, offset=asked, nbytes=min(chunk, size - asked))
            socket.send(request.model_dump_json().encode())
            asked += request.nbytes
        part = socket.recv_multipart(copy=False)[1].buffer
        if hashed:
            digest.update(part)
        parts.append(part)
        have += len(part)
    b"".join(parts)


def pull_whole(socket: zmq.Socket[bytes], name: str, hashed: bool) -> None:
    """One frame as one part."""
    socket.send(name.encode())
    data = socket.recv()
    if hashed:
        hashlib.sha256(data).digest()


def rate(call: Callable[[], object], size: int, repeats: int) -> str:
    """Median MB/s and range."""
    rates = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        rates.append(size / (time.perf_counter() - start) / 1e6)
    rates = sorted(rates[1:])  # the first one warms up
    return f"{statistics.median(rates):6.0f} ({rates[0]:.0f}-{rates[-1]:.0f})"


@contextmanager
def peer(context: zmq.Context[zmq.Socket[bytes]], address: str, keys: ClientKeys | None) -> Iterator[zmq.Socket[bytes]]:
    """A client's socket without the limits that a session sets."""
    with context.socket(zmq.DEALER) as socket:
        secure(socket, keys)
        socket.rcvtimeo = 10_000
        assert join(socket, address) == "admitted"
        yield socket


def rates(
    context: zmq.Context[zmq.Socket[bytes]],
    addresses: tuple[str, str, str],
    keys: ClientKeys | None,
    name: str,
    size: int,
    repeats: int,
) -> None:
    """The first table, with or without CURVE."""
    cipher = "plain" if keys is None else "CURVE"
    for hashed in (False, True):
        label = f"{cipher:6} {'sha256' if hashed else '-':7}"
        with peer(context, addresses[2], keys) as socket:
            whole = functools.partial(pull_whole, socket, name, hashed)
            print(f"{label} {'one frame':>16} {rate(whole, size, repeats):>24}")
        for chunk in CHUNKS:
            with peer(context, addresses[1], keys) as socket:
                found = rate(functools.partial(pull, socket, name, size, chunk, hashed), size, repeats)
            print(f"{label} {f'{chunk >> 10} KiB':>16} {found:>24}", flush=True)
    client = BulkClient(context, lambda: addresses[1], keys)
    print(f"{cipher:6} {'sha256':7} {'fetch':>16} {rate(lambda: client.fetch(name, size, 10), size, repeats):>24}")
    client.close()


def pings(dealer: Dealer, number: int) -> str:
    """Round trips of ``number`` pings, one every 5 ms."""
    times = []
    for _ in range(number):
        time.sleep(0.005)
        start = time.perf_counter()
        dealer.send(b"ping")
        assert dealer.receive(2.0) is not None
        times.append(1e3 * (time.perf_counter() - start))
    return f"{np.median(times):8.2f} {np.quantile(times, 0.99):8.2f} {max(times):8.2f}"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=16.8)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    size = round(arguments.megabytes * 1e6)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
    with tempfile.TemporaryDirectory() as base:
        folder, spool = Path(base) / "keys", Path(base)
        new_keys(folder)
        data = np.random.default_rng(0).bytes(size)
        name = hashlib.sha256(data).hexdigest()
        (spool / name).write_bytes(data)
        client = load_client(folder / "controller.secret", folder / "server.public")
        print(f"{'cipher':6} {'digest':7} {'chunks':>16} {'MB/s':>24}")
        with server(None, spool) as addresses:
            rates(context, addresses, None, name, size, arguments.repeats)
        with server(folder, spool) as addresses:
            rates(context, addresses, client, name, size, arguments.repeats)
            print(f"\n{'ping, ms':16} {'median':>8} {'99 %':>8} {'max':>8}")
            dealer, bulk = Dealer(context, addresses[0], client), BulkClient(context, lambda: addresses[1], client)
            print(f"{'alone':16} {pings(dealer, 200)}")
            ended = threading.Event()
            puller = threading.Thread(target=lambda: [bulk.fetch(name, size, 10) for _ in iter(ended.is_set, True)])
            puller.start()
            print(f"{'frames pulled':16} {pings(dealer, 400)}")
            ended.set()
            puller.join()
            dealer.close()
            bulk.close()
    context.destroy(0)


if __name__ == "__main__":
    main()
