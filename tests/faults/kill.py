"""kill -9 and SIGSTOP, at any moment, of real processes: ``python -m tests.faults.kill --kills 300 [--seed 1]``.

Sessions run over a bridge with CURVE keys, in real time. Controller, server and watchdog are killed, or stopped for a
while, and started again; the column survives. At the end of each session the column's own log is held against both
ledgers.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from drivers.column_link import ColumnLink
from drivers.column_messages import Hello, Ready, State, Stated

from .accounts import Accounts, complaints, read_accounts
from .metered import read_meter
from .plant import Plant, hit, plant

STEPS = 40
MOMENTS = ("any", "RESERVED", "FIRING", "beam", "frame", "POST", "RECORDED")
"""'any' time, also while the last victim is coming up again; just after a record appeared in the controller's journal
(RESERVED, RECORDED) or in the server's ledger (FIRING, POST), or a frame in the spool; in the middle of a pulse."""
WORDS = {"RESERVED": "reserved", "RECORDED": "recorded", "FIRING": "FIRING", "POST": "POST"}
SETTLE_S = 60.0
"""How long a session may take to end once nobody hits any more, s."""


@dataclass
class Tally:
    """What was hit, in which state, and what came of it."""

    hits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    beam: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    electrons: int = 0
    charged: int = 0
    frames: int = 0
    gave_up: int = 0

    def add(self, accounts: Accounts) -> None:
        """One session more."""
        self.sessions += 1
        self.electrons += sum(pulse.electrons or 0 for pulse in accounts.pulses)
        self.charged += accounts.server.charged.electrons
        self.keys.update(entry.state for entry in accounts.server.entries.values())
        self.keys["partial"] += sum("partial" in frame.flags for frame in accounts.controller.frames.values())
        self.frames += len(accounts.controller.frames)
        assert accounts.controller.stopped is not None
        self.ends[accounts.controller.stopped.cause] += 1

    def lines(self) -> Iterator[str]:
        """The figures."""
        for (victim, how, moment), times in sorted(self.hits.items()):
            yield f"  {victim:10} {how:14} at {moment:8} {times:4}"
        yield f"hits while the beam was {', '.join(f'{what}: {n}' for what, n in sorted(self.beam.items()))}"
        yield f"keys: {', '.join(f'{state} {n}' for state, n in sorted(self.keys.items()))}; frames kept {self.frames}"
        yield f"electrons delivered {self.electrons}, charged {self.charged}"
        yield f"{sum(self.hits.values())} hits in {self.sessions} sessions, which ended by {dict(self.ends)}"
        yield f"controllers that gave up before the others were back: {self.gave_up}"


def session(folder: Path, draw: random.Random, kills: int, tally: Tally, steps: int = STEPS) -> int:
    """One session under up to ``kills`` hits. Returns how many there were. Raises AssertionError with what is wrong."""
    with plant(folder, steps, draw.uniform(0.05, 0.3)) as it:
        assert it.until(lambda: begun(it), 30.0), it.log("server") + it.log("controller")
        done = 0
        while done < kills and not it.done:
            done += strike(it, draw, tally)
        assert it.until(lambda: False, SETTLE_S) or it.done, (
            f"{folder} did not end in {SETTLE_S:g} s\n{it.log('controller')}\n{it.log('server')}"
        )
        accounts = read_accounts(folder, *column_says(it.specimen))
        assert not (wrong := list(complaints(accounts))), f"{folder}: {wrong}"
        tally.add(accounts)
        tally.gave_up += it.gave_up
    return done


def begun(it: Plant) -> bool:
    """Whether the first exposure is under way."""
    return bool(read_meter(it.folder))


def strike(it: Plant, draw: random.Random, tally: Tally) -> bool:
    """Wait for a moment and hit somebody; False when nobody was there to be hit."""
    moment, victim = draw.choice(MOMENTS), draw.choice(("controller", "server", "watchdog"))
    how = draw.choices(("kill", "stop", "stop and kill"), (6, 3, 1))[0]
    pause_s, asleep_s = draw.uniform(0.0, 1.0), draw.uniform(0.05, 1.0)
    await_moment(it, moment, pause_s)
    pid = it.pid(victim)
    if it.done or not pid or not hit(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP):
        return False
    beam_on = read_meter(it.folder)[-1].off_ns is None
    if how != "kill":
        it.until(lambda: False, asleep_s)
        hit(pid, signal.SIGKILL if how == "stop and kill" else signal.SIGCONT)
    tally.hits[victim, how, moment] += 1
    tally.beam["on" if beam_on else "off"] += 1
    return True


def await_moment(it: Plant, moment: str, pause_s: float) -> None:
    """Return as soon as it has come, or when it does not come for a while."""
    if moment == "any":
        it.until(lambda: False, pause_s)
        return
    if moment == "beam":
        it.until(lambda: read_meter(it.folder)[-1].off_ns is None, 5.0)
        it.until(lambda: False, 0.2 * pause_s)
        return
    if moment == "frame":
        spool = it.specimen / "spool"
        before = {path.name for path in spool.glob("*.json")}
        it.until(lambda: {path.name for path in spool.glob("*.json")} - before, 5.0)
        return
    file = it.session / "session.sqlite" if moment in ("RESERVED", "RECORDED") else it.specimen / "ledger.sqlite"
    with contextlib.closing(tail(file, WORDS[moment])) as news:
        it.until(lambda: next(news), 5.0)


def tail(path: Path, word: str) -> Iterator[bool]:
    """Whether a record of this kind has been added since the last time."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    query = "SELECT max(seq) FROM journal WHERE seq > ? AND body LIKE ?"
    try:
        (seen,) = connection.execute("SELECT coalesce(max(seq), 0) FROM journal").fetchone()
        while True:
            try:
                (new,) = connection.execute(query, (seen, f'%"kind":"{word}"%')).fetchone()
            except sqlite3.Error:  # its writer is just coming up
                new = None
            seen = new or seen
            yield new is not None
    finally:
        connection.close()


def column_says(specimen: Path) -> tuple[dict[int, str], int]:
    """The keys that the column has fired, by ordinal, and its meter."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = ColumnLink(context, specimen)
    try:
        link.socket.poll(5000, zmq.POLLOUT)
        ready, stated = link.ask(Hello(), 5.0).message, link.ask(State(), 5.0).message
        assert isinstance(ready, Ready)
        assert isinstance(stated, Stated)
        assert stated.state.electrons is not None
        return {shot.ordinal: shot.key for shot in ready.shots}, stated.state.electrons
    finally:
        link.close()
        context.destroy(linger=0)


def campaign(folder: Path, kills: int, seed: int, each: int = 15, say: Callable[[str], None] = print) -> Tally:
    """Sessions until ``kills`` hits were made, ``each`` at most in one. Raises AssertionError at the first breach."""
    tally, number, began_s = Tally(), 0, time.monotonic()
    while (left := kills - sum(tally.hits.values())) > 0:
        number += 1
        done = session(folder / str(number), random.Random(f"{seed} {number}"), min(each, left), tally)
        say(f"session {number}: {done} hits, {kills - sum(tally.hits.values())} to go, seed {seed}")
    for line in tally.lines():
        say(line)
    say(f"0 double exposures, 0 uncharged electrons, 0 frames lost; {time.monotonic() - began_s:.0f} s")
    return tally


def main() -> None:
    """The campaign, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill") as folder:
        campaign(Path(folder), options.kills, options.seed, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
