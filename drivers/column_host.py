"""The process that holds the instrument: ``python -m drivers.column_host CONFIG FOLDER``.

It outlives the bridge's server, as an instrument does: a restarted server finds it again, with the list of what it has
fired. It writes frames into the spool, fires no key and no ordinal twice, and answers BLANK and STATE from one thread
while a pulse runs in another. It decides nothing else. Left alone with the beam off, it ends.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from aecontrol.durable import FolderLock
from aecontrol.errors import AecontrolError, BadInput, InstrumentFault
from aecontrol.protocols import HasTruth

from .backend import Backend, MovesStage, Parks
from .bridge_file import read_bridge_file
from .column_link import COLUMN_LOCK, QUEUE, column_address
from .column_messages import (
    MAX_REQUEST_BYTES,
    Absorb,
    AskNoiseless,
    AskTruth,
    Blank,
    Blanked,
    Broke,
    Close,
    Done,
    Failed,
    Fire,
    Fired,
    Hello,
    Message,
    MoveStage,
    Park,
    PastShot,
    Ready,
    Refused,
    Request,
    Started,
    State,
    Stated,
    decode_request,
    encode,
)
from .column_truth import ideal_message, truth_message
from .first_in_line import run_as_others, run_first
from .log_aside import log_aside
from .spool import Spool, spooled_channels

log = logging.getLogger(__name__)
SWITCH_S = 5e-4
"""How long one thread may keep the interpreter when the other wants it."""
REPEAT_BLANK_S = 2e-3
"""A pulse that was told to stop is told again so often, until it has."""
LOCK_S = 2.0
"""A probe by others holds the lock for an instant."""
LINGER_MS = 200
GOODBYE_S = 0.1
"""Between the last answer and the end: a peer that has not yet read it loses it when the connection ends."""
Answered = tuple[Message, Sequence[bytes]]


class ColumnHost:
    """Serves ``backend`` on ``socket`` (a bound ROUTER) until it is closed or left alone for ``idle_exit_s``."""

    def __init__(self, backend: Backend, folder: Path, socket: zmq.Socket[bytes], idle_exit_s: float) -> None:
        self._backend, self._socket, self._idle_exit_s = backend, socket, idle_exit_s
        self._capabilities = backend.describe()
        self._spool = Spool(folder / "spool", spooled_channels(self._capabilities))
        self._shots: list[PastShot] = []
        self._seen: set[str | int] = set()
        self._firing: str | None = None
        self._stopped = False  # the running pulse was told to end
        self._busy = False
        self._closing = False
        self._results: queue.SimpleQueue[tuple[bytes, int, Answered]] = queue.SimpleQueue()
        self._woken, self._wake = os.pipe()

    def serve(self) -> None:
        """Answer until the end; then blank and release the instrument."""
        try:
            self._listen()
        finally:
            self._backend.blank()
            self._backend.close()
            time.sleep(GOODBYE_S)

    def end(self) -> None:
        """Blank, and end once the running pulse has. From a signal's handler."""
        self._closing = self._stopped = True
        os.write(self._wake, b"!")

    # ------------------------------------------------------------ the thread that answers

    def _listen(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        heard_s = time.monotonic()
        while not self._closing or self._busy:
            ready = dict(poller.poll(self._wait_ms()))
            if self._woken in ready:
                os.read(self._woken, 64)
                self._finish()
            if self._socket in ready:
                heard_s = time.monotonic()
                self._hear()
            if self._busy and self._stopped:
                self._repeat_blank()
            if not self._busy and time.monotonic() - heard_s > self._idle_exit_s and not self._beam_on():
                log.info("nobody has spoken for %g s, the beam is off: ending", self._idle_exit_s)
                break

    def _wait_ms(self) -> int:
        return int(1e3 * (REPEAT_BLANK_S if self._busy and self._stopped else min(1.0, self._idle_exit_s)))

    def _hear(self) -> None:
        route, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
        try:
            if len(parts) != 1:
                raise InstrumentFault(f"a request of {len(parts)} parts, not 1")
            request = decode_request(parts[0])
        except InstrumentFault as error:
            log.warning("%s", error)
            self._send(route, 0, (Refused(reason=error.what), ()))
            return
        answer = self._answer(route, request)
        if answer is not None:
            self._send(route, request.id, (answer, ()))

    def _answer(self, route: bytes, request: Request) -> Message | None:
        """What can be said at once; None when a job was begun, which will answer."""
        try:
            match request:
                case Blank():
                    return self._blank()
                case State():
                    return Stated(state=self._backend.state(), firing=self._firing)
                case Hello():
                    return Ready(
                        pid=os.getpid(),
                        capabilities=self._capabilities,
                        shots=tuple(self._shots),
                        firing=self._firing,
                    )
                case Fire():
                    return self._fire(route, request)
                case Close() if not self._busy:
                    self._closing = True
                    return Done()
        except Exception as error:  # vendor software may raise anything; the line must stay open
            log.exception("%s failed", request.t)
            return Failed(reason=f"{request.t} failed: {error}")
        if self._busy or self._closing:
            return Refused(reason="busy")
        self._begin(route, request.id, lambda: self._carry_out(request))
        return None

    def _blank(self) -> Message:
        self._stopped = True
        self._backend.blank()
        at_ns = time.monotonic_ns()
        return Blanked(at_ns=at_ns, beam_on=self._beam_on())

    def _beam_on(self) -> bool:
        """What the instrument says; an instrument that cannot tell has its beam on."""
        try:
            return self._backend.state().beam_on
        except Exception:
            log.exception("the instrument does not tell its state")
            return True

    def _repeat_blank(self) -> None:
        """A pulse on its way to the instrument may miss the first call; none misses all."""
        try:
            self._backend.blank()
        except Exception:
            log.exception("blanking failed; trying again")

    def _fire(self, route: bytes, request: Fire) -> Message | None:
        refusal = ""
        if self._busy or self._closing:
            refusal = "busy"
        elif request.key in self._seen or request.ordinal in self._seen:
            refusal = f"key {request.key[:12]} or shot {request.ordinal} was fired or absorbed before"
        elif time.monotonic_ns() > request.not_after_ns:
            refusal = "it came too late"
        if refusal:
            return Refused(reason=refusal)
        self._note(request.key, request.ordinal)
        self._firing = request.key
        self._stopped = False
        self._send(route, request.id, (Started(key=request.key), ()))
        self._begin(route, request.id, lambda: (self._pulse(request), ()))
        return None

    def _note(self, key: str, ordinal: int) -> None:
        self._shots.append(PastShot(key=key, ordinal=ordinal))
        self._seen |= {key, ordinal}

    def _begin(self, route: bytes, number: int, job: Callable[[], Answered]) -> None:
        """Let ``job`` run in a thread of its own, one at a time; its result is the answer."""
        self._busy = True

        def run() -> None:
            run_as_others()
            try:
                result = job()
            except BaseException as error:  # nothing may leave the host busy for ever
                log.exception("a job failed")
                result = (Failed(reason=str(error)), ())
            self._results.put((route, number, result))
            os.write(self._wake, b"!")

        threading.Thread(target=run, name="instrument").start()

    def _finish(self) -> None:
        while not self._results.empty():
            route, number, result = self._results.get()
            self._busy = False
            self._firing = None
            self._send(route, number, result)

    def _send(self, route: bytes, number: int, answer: Answered) -> None:
        """To a peer that is gone or does not read, nothing is sent: a ROUTER drops it."""
        message, parts = answer
        head = encode(message.model_copy(update={"id": number}))
        self._socket.send_multipart([route, head, *parts], zmq.NOBLOCK)

    # ------------------------------------------------------------ the thread that works

    def _pulse(self, request: Fire) -> Message:
        """Fire once, and write the frame. Whatever goes wrong, the beam is blanked and the shot is broken off."""
        if self._stopped or time.monotonic_ns() > request.not_after_ns:
            return Broke(key=request.key, reason="blanked, or too late, just before it began")
        try:
            pulse = self._backend.fire(request.ordinal, request.region)
            digests = self._spool.write(request.key, pulse)
            return Fired(
                key=request.key,
                electrons=None if pulse.electrons is None else int(pulse.electrons),
                pixels=int(pulse.pixels),
                seconds=float(pulse.seconds),
                started_s=float(pulse.started_s),
                digests=digests,
                flags=tuple(pulse.flags),
            )
        except BaseException as error:
            log.exception("shot %s broke off", request.key[:12])
            self._repeat_blank()
            return Broke(key=request.key, reason=str(error) or type(error).__name__)

    def _carry_out(self, request: Request) -> Answered:
        """Everything that touches the instrument, takes time and is not a pulse."""
        backend = self._backend
        match request:
            case Absorb():
                if known := [s.ordinal for s in request.shots if s.key in self._seen or s.ordinal in self._seen]:
                    return Refused(reason=f"shots {known} were fired or absorbed before"), ()
                for shot in request.shots:
                    self._note(shot.key, shot.ordinal)
                    backend.absorb(shot.ordinal, shot.region)
                return Done(), ()
            case MoveStage() if isinstance(backend, MovesStage):
                backend.move_stage(request.to_nm)
                return Done(), ()
            case Park() if isinstance(backend, Parks):
                backend.park(request.at_nm)
                return Done(), ()
            case AskTruth() if isinstance(backend, HasTruth):
                return truth_message(backend.truth(request.target))
            case AskNoiseless() if isinstance(backend, HasTruth):
                return ideal_message(backend.noiseless(request.region))
        return Refused(reason=f"this instrument cannot {request.t}"), ()


def main(config: Path, folder: Path) -> int:
    """Serve until the end. Returns the exit code: 0 also when another process already serves this folder."""
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_S)
    address = column_address(folder)
    try:
        lock = FolderLock(folder, COLUMN_LOCK, LOCK_S)
    except BadInput:
        log.info("another column process serves %s", folder)
        return 0
    settings = read_bridge_file(config)
    backend = settings.backend.open(settings.base, settings.column.seed)
    run_first()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, QUEUE)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
    try:
        socket.bind(address)
        host = ColumnHost(backend, folder, socket, settings.column.idle_exit_s)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: host.end())
        log.info("serving %s as process %d", backend.describe().identity, os.getpid())
        host.serve()
    finally:
        context.destroy()
        lock.release()
    return 0


if __name__ == "__main__":
    listener = log_aside()
    try:
        sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
    except AecontrolError as error:
        sys.exit(f"{error}")
    finally:
        listener.stop()
