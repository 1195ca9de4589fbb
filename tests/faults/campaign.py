"""Many worlds: ``python -m tests.faults.campaign --seeds 100000 --workers 2``.

Prints one line for each failure with the command that replays it, and how often each fault and each outcome occurred:
a swarm in which a fault never bites proves nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from aecontrol.exposure import InterlockLimits
from aecontrol.exposure import messages as m
from aecontrol.types import Budget

from .column import Column, Watchdog
from .controller import RESTART_NS, Controller
from .invariants import Checker
from .mutants import MUTANTS
from .network import Network
from .rival import Rival
from .shell import Shell
from .swarm import SECOND
from .world import Breach, World

RAM = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
SETTLE_NS = 10 * SECOND
END_NS = 60 * SECOND
"""A session of six shots is over this long after the last fault, whatever happened before."""
Mutation = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Verdict:
    """What became of one world."""

    seed: int
    invariant: str
    text: str
    digest: str
    count: Counter[str]


def play(seed: int, mutation: Mutation | None = None) -> Verdict:
    """One world from its beginning to its end; ``invariant`` is '' when none was broken."""
    world = World(seed)
    folder = Path(tempfile.mkdtemp(dir=RAM))
    invariant = text = ""
    try:
        with pytest.MonkeyPatch.context() as patch:
            if mutation is not None:
                mutation(patch)
            _live(world, folder, patch)
    except Breach as breach:
        invariant, text = breach.invariant, str(breach)
    except Exception as error:
        invariant, text = "error", f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    return Verdict(seed, invariant, text, world.digest, world.count)


def _live(world: World, folder: Path, patch: pytest.MonkeyPatch) -> None:
    rng = world.rng
    mine = Budget(electrons=rng.randint(10**8, 10**9), peak_fluence_e_per_A2=10 ** rng.uniform(5.6, 6.6))
    theirs = Budget(electrons=rng.randint(10**8, 10**9), peak_fluence_e_per_A2=10 ** rng.uniform(5.6, 6.6))
    timing = m.Timing(away_s=rng.choice((1.5, 4.0, 900.0)))
    away_ns, lease_ns = int(timing.away_s * SECOND), int(timing.lease_s * SECOND)
    checker = Checker(world, mine, theirs, lease_ns, away_ns)
    network = Network(world)
    column = Column(world, checker)
    checker.live = lambda: column.pulse
    watchdog = Watchdog(world, column)
    shell = Shell(world, network, column, watchdog, checker, InterlockLimits(budget=theirs), timing)
    controller = Controller(world, network, column, checker, folder / "s", mine)
    shell.latest_mirrored = lambda: controller.mirror.seq
    Rival(world, network, checker)
    world.at(world.stop_ns, partial(_demand_rest, world, controller, checker))
    controller.live(patch)
    world.run(max(world.now, world.stop_ns) + 4 * SECOND)
    _judge(world, shell, controller, checker)


def _demand_rest(world: World, controller: Controller, checker: Checker) -> None:
    """Faults have stopped: what is open now must be settled ten seconds after C runs again, and the session end."""
    open_keys = [key for key, state in checker.c.state.items() if state == "RESERVED"]

    def settled() -> None:
        if not checker.restored:
            checker.settled(open_keys)

    def ended() -> None:
        if controller.state is None and not controller.refused:
            world.fail("I7", "the session does not end")

    running = controller.running or controller.state is not None
    world.at(SETTLE_NS + (0 if running else RESTART_NS), settled)
    world.at(END_NS, ended)


def _judge(world: World, shell: Shell, controller: Controller, checker: Checker) -> None:
    """The end of the world: both ledgers agree entry by entry, and C's copy of S's is what S has."""
    if controller.refused or checker.restored:
        world.count["end: refused" if controller.refused else "end: before the restore"] += 1
        return
    checker.settled(list(checker.c.state))
    mirrored = controller.mirror.bodies
    if mirrored != shell.disk[: len(mirrored)]:
        world.fail("I7", "C's copy of S's ledger is not what S has")
    for state in checker.c.state.values():
        world.count["key: " + state] += 1
    assert controller.state is not None
    assert controller.state.stopped is not None
    world.count["end: " + controller.state.stopped.cause] += 1


# ---------------------------------------------------------------- many


def verdicts(seeds: range, workers: int) -> Iterator[Verdict]:
    """Play all; with several workers in any order."""
    if workers <= 1:
        yield from map(play, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=5000) as pool:
        yield from pool.imap_unordered(play, seeds, chunksize=20)


def hunt(name: str, seeds: range) -> Verdict | None:
    """The first of ``seeds`` in which the deliberate defect ``name`` is noticed."""
    found = (play(seed, MUTANTS[name]) for seed in seeds)
    return next((verdict for verdict in found if verdict.invariant), None)


def hunt_all(seeds: range, workers: int) -> int:
    """Hunt every defect; print where each is noticed. The number of those that are not."""
    missed = 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for name, found in zip(MUTANTS, pool.imap(partial(hunt, seeds=seeds), MUTANTS), strict=True):
            missed += found is None
            print(f"{name}: " + (f"seed {found.seed}, {found.text}" if found else "NOT NOTICED"), flush=True)
    return missed


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit code is 1 when any invariant was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--mutants", action="store_true", help="hunt the deliberate defects instead")
    options = parser.parse_args(arguments)
    if options.mutants:
        return hunt_all(range(options.first, options.first + options.seeds), options.workers)
    count: Counter[str] = Counter()
    failures = 0
    begun = time.perf_counter()
    for n, verdict in enumerate(verdicts(range(options.first, options.first + options.seeds), options.workers), 1):
        count.update(verdict.count)
        if verdict.invariant:
            failures += 1
            replay = f"python -m tests.faults.campaign --seeds 1 --first {verdict.seed}"
            print(f"seed {verdict.seed}: {verdict.text}   {replay}", flush=True)
        if n % 5000 == 0 or n == options.seeds:
            rate = n / (time.perf_counter() - begun)
            print(f"{n} worlds, {failures} failures, {rate:.0f} worlds/s", flush=True)
    for what, times in sorted(count.items()):
        print(f"{times:10d}  {what}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
