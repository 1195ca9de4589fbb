"""A bridge's sockets in a process of their own, with nothing behind them: every message is answered with who sent it.

    python -m tests.drivers.wire_server KEYS SPOOL       ends when its standard input does

Prints one line of JSON, {"control": address, "bulk": address}; a file of SPOOL is served under its own name. A message
'counts' is answered with the counters, 'big' with 15 KB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import zmq

from drivers.bulk import BulkServer
from drivers.gate import Gate
from drivers.keys import KeyRing
from drivers.sockets import ControlServer, Received


def main() -> None:
    folder, spool = Path(sys.argv[1]), Path(sys.argv[2])
    gate = Gate(KeyRing.load(folder))
    control = ControlServer(gate, "tcp://127.0.0.1:*")
    bulk = BulkServer(gate, "tcp://127.0.0.1:*", lambda digest: spool / digest)
    print(json.dumps({"control": control.address, "bulk": bulk.address}), flush=True)
    poller = zmq.Poller()
    control.register(poller)
    poller.register(sys.stdin, zmq.POLLIN)
    served = 0
    while sys.stdin.fileno() not in dict(poller.poll()):
        for message in control.receive():
            served += 1
            counts = {"served": served, **control.counts, **gate.counts}
            control.send(message.route, answer(message, counts))
    control.close()
    bulk.close()
    gate.close()


def answer(message: Received, counts: dict[str, int]) -> bytes:
    if message.header == b"big":
        return bytes(15_000)
    if message.header == b"counts":
        return json.dumps(counts).encode()
    return f"{message.user} {message.role} {message.header.decode('latin-1')}".encode()


if __name__ == "__main__":
    main()
