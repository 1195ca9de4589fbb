"""The server's and the watchdog's end of the line to the process that holds the instrument."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import zmq

from aecontrol.durable import FolderLock
from aecontrol.errors import BadInput, InstrumentFault

from .column_messages import MAX_REQUEST_BYTES, Answer, Hello, Ready, Request, decode_answer, encode

COLUMN_LOCK = "column.lock"
QUEUE = 100
MAX_PART_BYTES = 1 << 28
RECONNECT_MS = 10
HELLO_S = 2.0
STEP_S = 0.02
LOG_TAIL = 2000


def column_address(folder: Path) -> str:
    """Where the column process of this bridge listens. Raises BadInput for a folder that others may enter, or whose
    name is too long for a socket."""
    folder = folder.resolve()
    if folder.stat().st_mode & 0o077:
        raise BadInput(f"{folder} can be entered by other users", f"chmod 700 {folder}")
    path = os.fsencode(folder / "column.sock")
    if len(path) > zmq.IPC_PATH_MAX_LEN:
        raise BadInput(
            f"{os.fsdecode(path)} is {len(path)} bytes long, a socket's name at most {zmq.IPC_PATH_MAX_LEN}",
            "use a folder with a shorter path",
        )
    return f"ipc://{os.fsdecode(path)}"


def column_lives(folder: Path) -> bool:
    """True while a column process holds this folder."""
    try:
        FolderLock(folder, COLUMN_LOCK).release()
    except BadInput:
        return True
    return False


@dataclass(frozen=True)
class Reply:
    """An answer; ``parts`` are .npy bytes of its arrays."""

    message: Answer
    parts: tuple[bytes, ...] = ()


class ColumnLink:
    """A connection to the column process of ``folder``. Nothing blocks except :meth:`ask`; ``socket`` becomes readable
    when there is something to :meth:`receive`. One thread only."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.socket.setsockopt(zmq.SNDHWM, QUEUE)
        self.socket.setsockopt(zmq.RCVHWM, QUEUE)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)
        self.socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self.socket.connect(column_address(folder))
        self._next = 0
        self._waiting: deque[Reply] = deque()

    def send(self, request: Request) -> int:
        """Send a request; the number that its answers will carry. Raises InstrumentFault when nobody is there to take
        it: then it was not sent and never will be."""
        self._next += 1
        data = encode(request.model_copy(update={"id": self._next}))
        if len(data) > MAX_REQUEST_BYTES:
            raise BadInput(f"a {request.t} of {len(data)} bytes, at most {MAX_REQUEST_BYTES}", "send it in parts")
        try:
            self.socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            raise InstrumentFault(
                f"the column process takes no {request.t}", "it has ended or hangs: see column.log"
            ) from None
        return self._next

    def receive(self) -> Reply | None:
        """The next answer, or None when there is none now. Raises InstrumentFault for what is not an answer."""
        return self._waiting.popleft() if self._waiting else self._take()

    def ask(self, request: Request, timeout_s: float) -> Reply:
        """Send, and wait for the first answer; other answers are kept for :meth:`receive`. Raises InstrumentFault when
        it does not come in time; the request may be carried out all the same."""
        deadline = time.monotonic() + timeout_s
        number = self.send(request)
        while (left_s := deadline - time.monotonic()) > 0:
            if not self.socket.poll(max(1, int(1e3 * left_s))):
                break
            reply = self._take()
            if reply is not None and reply.message.id == number:
                return reply
            if reply is not None:
                self._waiting.append(reply)
        raise InstrumentFault(f"the column process did not answer {request.t} within {timeout_s:g} s", "see column.log")

    def close(self) -> None:
        """Hang up. Requests that were sent may still be carried out."""
        self.socket.close()

    def _take(self) -> Reply | None:
        try:
            head, *parts = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return Reply(decode_answer(head), tuple(parts))


def connect_or_start(
    context: zmq.Context[zmq.Socket[bytes]], config: Path, folder: Path, timeout_s: float = 120.0
) -> tuple[ColumnLink, Ready]:
    """A connection to the column process of ``folder``, which is started unless it lives. It outlives its starter; what
    a living one is and has fired is in the answer. Raises BadInput, and InstrumentFault when it does not come up."""
    column_address(folder)
    deadline = time.monotonic() + timeout_s
    child = 0 if column_lives(folder) else _start(config, folder)
    while time.monotonic() < deadline:
        link = ColumnLink(context, folder)
        with contextlib.suppress(InstrumentFault):
            if link.socket.poll(int(1e3 * STEP_S), zmq.POLLOUT):
                reply = link.ask(Hello(), min(HELLO_S, timeout_s))
                if isinstance(reply.message, Ready):
                    return link, reply.message
        link.close()
        code = _exit_code(child) if child else 0
        if code:
            raise InstrumentFault(f"the column process ended at once: {_log_tail(folder)}", "mend the backend")
        if code == 0:  # none of ours, or it found another in its place
            child = 0 if column_lives(folder) else _start(config, folder)
    raise InstrumentFault(f"the column process did not answer within {timeout_s:g} s", f"see {folder / 'column.log'}")


def _start(config: Path, folder: Path) -> int:
    """A process that is nobody's: not ended with its starter, nor by what is typed at its starter's terminal."""
    log = os.open(folder / "column.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "drivers.column_host", str(config), str(folder)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in ((nothing, 0), (log, 1), (log, 2))],
            setsid=True,
        )
    finally:
        os.close(log)
        os.close(nothing)


def _exit_code(child: int) -> int | None:
    """Exit code of a child that has ended; None while it runs."""
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _log_tail(folder: Path) -> str:
    return (folder / "column.log").read_text(errors="replace")[-LOG_TAIL:].strip()
