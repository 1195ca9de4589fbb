"""What goes wrong in one world, and how often: drawn anew for every seed, so that each fault is often alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

MS = 1_000_000
SECOND = 1_000 * MS
H = 100 * MS
"""The heartbeat interval of every world, ns."""


@dataclass(frozen=True)
class Swarm:
    """Rates of faults. ``per message``, ``per write`` ... are probabilities; ``every_s`` are mean times between two of
    a kind, s (0: never)."""

    drop: float = 0.0  # per message
    duplicate: float = 0.0
    slow: float = 0.0  # up to 15 H late
    corrupt: float = 0.0
    fifo: bool = True  # messages of one connection stay in order
    partition_every_s: float = 0.0
    bulk: float = 0.0  # per file fetched: lost or damaged

    server_crash_at_write: float = 0.0  # per write, before or after it is durable
    server_crash_every_s: float = 0.0
    server_hang_every_s: float = 0.0
    reboot: float = 0.0  # share of the server's crashes that are the whole machine's: its clock starts anew
    disk_stall: float = 0.0  # per write: up to 3 s
    disk_full_every_s: float = 0.0
    disk_error: float = 0.0  # per write: fsync says EIO, the record may be there or not
    watchdog_kill_every_s: float = 0.0
    interlock_every_s: float = 0.0
    column_slow: float = 0.0  # per pulse: the command reaches the column up to 0.4 s late
    column_broken: float = 0.0  # per pulse: the column's process fails after the beam
    spool_slow: float = 0.0  # per frame

    controller_crash_at_write: float = 0.0
    controller_crash_every_s: float = 0.0
    controller_hang_every_s: float = 0.0
    controller_disk_full: float = 0.0  # per write
    slow_fit: float = 0.0  # per decision: longer than the lease, sometimes longer than away

    rival_every_s: float = 0.0
    restore_old_ledger: bool = False
    stop_s: float = 4.0  # no new fault after this


_EVERY = {
    "partition_every_s": 1.5,
    "server_crash_every_s": 1.5,
    "server_hang_every_s": 1.0,
    "disk_full_every_s": 3.0,
    "watchdog_kill_every_s": 1.0,
    "interlock_every_s": 2.0,
    "controller_crash_every_s": 1.5,
    "controller_hang_every_s": 1.0,
    "rival_every_s": 0.4,
}
_MOST = {
    "drop": 0.4,
    "duplicate": 0.4,
    "slow": 0.3,
    "corrupt": 0.2,
    "bulk": 0.4,
    "server_crash_at_write": 0.15,
    "reboot": 0.5,
    "disk_stall": 0.3,
    "disk_error": 0.1,
    "column_slow": 0.4,
    "column_broken": 0.3,
    "spool_slow": 0.4,
    "controller_crash_at_write": 0.1,
    "controller_disk_full": 0.1,
    "slow_fit": 0.4,
}


def draw(rng: random.Random) -> Swarm:
    """The faults of one world: each kind is on in one world of four, at a rate of its own,
    mostly a small one: where nothing gets through, nothing can go wrong."""
    drawn: dict[str, float | bool] = {}
    for spec in fields(Swarm):
        on, share = rng.random() < 1 / 4, rng.random()
        if spec.name in _EVERY:
            drawn[spec.name] = _EVERY[spec.name] * (0.5 + share) if on else 0.0
        elif spec.name in _MOST:
            drawn[spec.name] = _MOST[spec.name] * share**2 if on else 0.0
    drawn["fifo"] = rng.random() < 0.6
    drawn["restore_old_ledger"] = rng.random() < 0.1
    if drawn["restore_old_ledger"]:  # it takes a restart to come into its place
        drawn["server_crash_every_s"] = _EVERY["server_crash_every_s"]
    drawn["stop_s"] = rng.uniform(2.0, 8.0)
    return Swarm(**drawn)  # type: ignore[arg-type]
