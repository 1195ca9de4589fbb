"""Frames over a socket of their own, pulled in chunks by digest: a client asks for what it has room for, nothing is
pushed. The digest is checked over the whole frame, so a lost, repeated or altered chunk cannot pass.

A request is one part (JSON); the answer is a header (JSON) and the bytes, which are empty when there is no such frame.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import zmq
from pydantic import Field, ValidationError

from aecontrol.errors import BadInput, InstrumentFault
from aecontrol.types import Count, Model, Sha256

from .gate import HANDSHAKE_S, Gate
from .keys import ClientKeys
from .sockets import BULK_LANE, dealer, next_message, router

MAX_CHUNK = 1 << 20
MAX_FRAME = MAX_CHUNK + (64 << 10)
MAX_BYTES = 1 << 34  # of one file: 16 GiB
MAX_REQUEST = 1 << 10
PIPELINE = 4  # chunks asked for ahead
QUEUE = 2 * PIPELINE  # libzmq returns room in halves: less would drop chunks of an honest client
STALL_S = 2.0  # without a chunk, before a connection that seems alive is given up
PAUSE_S = 0.2  # between attempts to connect


class ChunkRequest(Model):
    """Bytes [offset, offset + nbytes) of the frame with this digest, as far as it reaches."""

    sha256: Sha256
    offset: Annotated[Count, Field(le=MAX_BYTES)]
    nbytes: Annotated[int, Field(gt=0, le=MAX_CHUNK)]


class ChunkReply(Model):
    """Header of an answer. ``nbytes`` follow; ``size`` is the whole frame's, 0 when it is not here."""

    sha256: Sha256
    offset: Annotated[Count, Field(le=MAX_BYTES)]
    nbytes: Annotated[Count, Field(le=MAX_CHUNK)]
    size: Count


def decode_request(data: bytes) -> ChunkRequest:
    """A request from its bytes. Raises BadInput for anything but a well-formed one."""
    try:
        if len(data) > MAX_REQUEST:
            raise BadInput(f"a request of {len(data)} bytes, limit {MAX_REQUEST}")
        return ChunkRequest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise BadInput(f"not a request for a chunk: {error.error_count()} mistakes") from None


class BulkServer:
    """The bridge's end, in a thread of its own; any admitted peer may fetch. It is the bridge's loop that admits them,
    through :meth:`Gate.answer`.

    ``resolve`` gives the file of a digest, or None; it is called from the thread, and the name it returns was chosen
    here: what a peer sends is compared, never used as a path. ``counts``: 'chunks' sent, requests that were 'absent' or
    'malformed', chunks dropped because the peer is 'slow' or gone. Raises as :meth:`Gate.bind` does.
    """

    def __init__(self, gate: Gate, address: str, resolve: Callable[[str], Path | None]) -> None:
        self.counts: Counter[str] = Counter()
        self._resolve = resolve
        self._ended = threading.Event()
        self._socket = router(gate, BULK_LANE, MAX_REQUEST, QUEUE)
        try:
            self.address = gate.bind(self._socket, address)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="bulk", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sending; chunks under way are dropped."""
        self._ended.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            if self._socket.poll(50) and (parts := next_message(self._socket)) is not None:
                self._reply(parts)

    def _reply(self, parts: list[zmq.Frame]) -> None:
        try:
            request = decode_request(parts[1].bytes if len(parts) == 2 else b"")
        except BadInput:
            self.counts["malformed"] += 1
            return
        size, data = self._chunk(request)
        self.counts["chunks" if size else "absent"] += 1
        reply = ChunkReply(sha256=request.sha256, offset=request.offset, nbytes=len(data), size=size)
        try:
            self._socket.send_multipart(
                [parts[0].bytes, reply.model_dump_json().encode(), data], flags=zmq.NOBLOCK, copy=False
            )
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.counts["slow"] += 1

    def _chunk(self, request: ChunkRequest) -> tuple[int, bytes]:
        """(size of the frame, bytes asked for); (0, b"") for what is not here, or is no plain file. Read, not mapped: a
        mapped file that shrinks would kill the process."""
        path = self._resolve(request.sha256)
        if path is None:
            return 0, b""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return 0, b""
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return 0, b""
            return status.st_size, os.pread(descriptor, request.nbytes, request.offset)
        except OSError:
            return 0, b""
        finally:
            os.close(descriptor)


class BulkClient:
    """A client's end. Connects when something is fetched; a connection on which chunks fail to come is replaced, and
    the fetch goes on where it was. ``address`` is asked before each connection: a bridge that was started again may
    have another."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: Callable[[], str], keys: ClientKeys | None
    ) -> None:
        self._context, self._address, self._keys = context, address, keys
        self._socket: zmq.Socket[bytes] | None = None

    def fetch(self, sha256: str, nbytes: int, timeout_s: float) -> bytes:
        """The file of ``nbytes`` bytes with this digest. Raises InstrumentFault when the bridge does not have it, when
        it is not what was announced, or when it did not come within ``timeout_s``."""
        if not 0 < nbytes <= MAX_BYTES:
            raise InstrumentFault(f"a frame of {nbytes} bytes was announced, limit {MAX_BYTES}")
        until = time.monotonic() + timeout_s
        digest, chunks, have = hashlib.sha256(), list[memoryview](), 0
        while have < nbytes:
            for chunk in self._pull(sha256, nbytes, have, until):
                digest.update(chunk)
                chunks.append(chunk)
                have += len(chunk)
            if have < nbytes and time.monotonic() >= until:
                raise InstrumentFault(f"{have} of {nbytes} bytes of frame {sha256[:12]} came within {timeout_s:g} s")
        if digest.hexdigest() != sha256:
            raise InstrumentFault(f"frame {sha256[:12]} came with other contents: {digest.hexdigest()[:12]}")
        return b"".join(chunks)

    def close(self) -> None:
        """Drop the connection. Safe to repeat."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _pull(self, sha256: str, nbytes: int, have: int, until: float) -> Iterator[memoryview]:
        """Chunks in order from byte ``have`` on; ends early when one is missing, and leaves no connection behind."""
        socket, asked = self._connected(until), have
        while have < nbytes:
            while asked < min(nbytes, have + PIPELINE * MAX_CHUNK):
                size = min(MAX_CHUNK, nbytes - asked)
                request = ChunkRequest(sha256=sha256, offset=asked, nbytes=size)
                try:
                    socket.send(request.model_dump_json().encode(), zmq.NOBLOCK)
                except zmq.Again:
                    return self.close()
                asked += size
            parts = next_message(socket) if _arrives(socket, min(until, time.monotonic() + STALL_S)) else None
            chunk = None if parts is None else self._checked(parts, sha256, nbytes, have)
            if chunk is None:
                return self.close()
            have += len(chunk)
            yield chunk
        return None

    def _checked(self, parts: list[zmq.Frame], sha256: str, nbytes: int, have: int) -> memoryview | None:
        """The chunk at byte ``have``; None when another came instead. Raises InstrumentFault when the frame is not here
        or not what was announced."""
        try:
            reply = ChunkReply.model_validate_json(parts[0].bytes[:MAX_REQUEST], strict=True)
        except ValidationError:
            return None
        if len(parts) != 2 or (reply.sha256, reply.offset) != (sha256, have):
            return None
        chunk = parts[1].buffer
        if reply.size != nbytes or len(chunk) != min(MAX_CHUNK, nbytes - have):
            self.close()
            raise InstrumentFault(
                f"frame {sha256[:12]} of {nbytes} bytes was announced, the bridge has {reply.size} (0: none)"
            )
        return chunk

    def _connected(self, until: float) -> zmq.Socket[bytes]:
        while self._socket is None:
            left = until - time.monotonic()
            try:
                seconds = max(min(HANDSHAKE_S, left), 0.0)
                self._socket = dealer(self._context, self._address(), self._keys, BULK_LANE, MAX_FRAME, seconds)
            except InstrumentFault:
                if left <= PAUSE_S:
                    raise
                time.sleep(PAUSE_S)
        return self._socket


def _arrives(socket: zmq.Socket[bytes], until: float) -> bool:
    """True once a message can be read; False at ``until``, or as soon as the connection is lost: a socket that queues
    nothing for an absent peer then takes no more messages."""
    while (left := until - time.monotonic()) > 0:
        if socket.poll(int(1000 * min(left, 0.05)) + 1):
            return True
        if not socket.poll(0, zmq.POLLOUT):
            return False
    return False
