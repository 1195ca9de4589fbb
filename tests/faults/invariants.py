"""Checkers of I1 to I8. They read what is durable, what was sent and what the column did, and share no code with it.

Every figure here is kept twice on purpose: once by the code under test, once by these few dictionaries.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from aecontrol.types import Budget, ScanRegion

from .swarm import MS, SECOND, H
from .world import World

_TERMINAL = ("POST", "VOID", "INDET")


@dataclass
class Account:
    """One ledger as its durable records have it: key -> state, charge, digests."""

    name: str
    state: dict[str, str] = field(default_factory=dict)
    bound: dict[str, int] = field(default_factory=dict)
    charge: dict[str, int] = field(default_factory=dict)
    digests: dict[str, dict[str, str]] = field(default_factory=dict)

    def learn(self, world: World, key: str, state: str, bound: int | None, measured: int | None, digests: Any) -> None:
        """One more durable record of a key."""
        if self.state.get(key) in _TERMINAL:
            world.fail("I7", f"{key[:8]} was {self.state[key]} in {self.name}, which now writes {state}")
        self.state[key] = state
        if bound is not None:
            self.bound[key] = bound
        self.digests[key] = digests or {}
        self.charge[key] = {"VOID": 0, "POST": measured or 0}.get(state, self.bound.get(key, 0))


@dataclass(frozen=True)
class Asked:
    """An EXPOSE as the server took it: whether it might fire then, by the checker's own rules, and until when."""

    valid: bool
    why: str
    epoch: int
    deadline_ns: int


@dataclass
class Holder:
    """Who may expose, by the checker's own bookkeeping. Times are of the world, ns."""

    user: str
    epoch: int
    until_ns: int
    tick: int = 0


class Checker:
    """Told of everything that is durable or physical, in the order in which it happens."""

    def __init__(self, world: World, c_budget: Budget, s_budget: Budget, lease_ns: int, away_ns: int) -> None:
        self._world, self._budgets = world, {"C": c_budget, "S": s_budget}
        self._lease_ns, self._away_ns = lease_ns, away_ns
        self.c, self.s = Account("C's ledger"), Account("S's ledger")
        self.steps: dict[str, int] = {}
        self.delivered: dict[str, int] = {}
        self.truth: dict[str, tuple[str, bool]] = {}  # digest of the column's own frame, and whether it is whole
        self.recorded: dict[str, str] = {}  # digest durable at C
        self.restored = False
        self._before: set[str] = set()  # keys whose order may have been on its way when the old ledger came back
        self.boot, self.offset_ns, self.epoch = "", 0, 0
        self.holder: Holder | None = None
        self.beat_ns = -SECOND
        self._acquired_ns = 0
        self._asked: dict[str, Asked] = {}
        self._on: tuple[str, int] | None = None  # key, epoch of the beam
        self._epoch_ns = 0
        self._tiles: dict[str, dict[tuple[int, int], float]] = {"C": defaultdict(float), "S": defaultdict(float)}
        self.live: Any = None  # the column's running pulse, for what has been delivered so far
        self.foreign: set[str] = set()  # keys of a rival, which C knows nothing of

    # ------------------------------------------------------------ what the server takes in

    def took(self, user: str, request: dict[str, Any]) -> None:
        """S has taken a request from its socket."""
        now, kind = self._world.now, request["t"]
        if kind == "ACQUIRE":
            self._acquired_ns = now
        elif kind in ("BEAT", "AWAY"):
            if not self._renewed(user, request) and kind == "AWAY":
                assert self.holder is not None
                away = min(int(request["seconds"] * SECOND), self._away_ns)
                self.holder.until_ns = max(self.holder.until_ns, now + away)
        elif kind == "RELEASE":
            if self.holder and (self.holder.user, self.holder.epoch) == (user, request["epoch"]):
                self.holder = None
        elif kind == "EXPOSE" and request["key"] not in self.s.state:
            deadline = request["deadline_ns"] - self.offset_ns
            why = "another boot" if request["boot_id"] != self.boot else "too late" if now > deadline else ""
            why = why or self._renewed(user, request)
            self._asked[request["key"]] = Asked(not why, why, request["epoch"], deadline)

    def _renewed(self, user: str, request: dict[str, Any]) -> str:
        """Why this is no sign of life, or ''."""
        holder, now = self.holder, self._world.now
        if holder is None or now > holder.until_ns:
            return "no lease"
        if request["epoch"] != holder.epoch or user != holder.user:
            return "fenced"
        if request["tick"] <= holder.tick:
            return "an old tick"
        self._check_beam(now)
        holder.tick, holder.until_ns, self.beat_ns = request["tick"], now + self._lease_ns, now
        return ""

    def restore(self) -> None:
        """Somebody has put an old copy in the place of S's ledger: from here on C must not expose."""
        self.restored, self._before = True, set(self._asked)

    def booted(self, boot_id: str, offset_ns: int) -> None:
        """A new process of S, with a clock ``offset_ns`` ahead of the world's."""
        self.boot, self.offset_ns, self.holder = boot_id, offset_ns, None

    # ------------------------------------------------------------ what is durable

    def s_wrote(self, body: str, claimed: int | None) -> None:
        """A record of S is on the disk; ``claimed``: electrons that S says are charged."""
        record = json.loads(body)
        kind = record["kind"]
        if kind == "EPOCH":
            if record["epoch"] <= self.epoch and not self.restored:
                self._world.fail("I4", f"epoch {record['epoch']} after {self.epoch}")
            self.epoch, self._epoch_ns = record["epoch"], self._world.now
            self.holder = Holder(record["holder"], self.epoch, self._acquired_ns + self._lease_ns)
            self.beat_ns = self._acquired_ns
        elif "key" in record and not self.restored:
            self._learn_s(kind, record)
        sure = sum(self.delivered.values()) + self._flowing()
        if claimed is not None and claimed < sure and not self.restored:
            self._world.fail("I2", f"S says that {claimed} electrons are charged, {sure} are delivered")

    def _learn_s(self, kind: str, record: dict[str, Any]) -> None:
        key = record["key"]
        bound = (record.get("bound") or {}).get("electrons")
        measured = (record.get("measured") or {}).get("electrons")
        self.s.learn(self._world, key, kind, bound, measured, record.get("digests"))
        if kind == "POST" and measured != self.delivered.get(key, 0):
            self._world.fail("I8", f"{key[:8]}: S posts {measured}, the column delivered {self.delivered.get(key, 0)}")
        self._covered(key)

    def c_wrote(self, body: str, claimed: int | None) -> None:
        """An event of C is on the disk; ``claimed``: electrons that C said were charged just before."""
        event = json.loads(body)
        kind, key = event["kind"], event.get("key", "")
        if kind == "reserved":
            self.steps[key] = event["step"]
            self.c.learn(self._world, key, "RESERVED", event["bound"]["electrons"], None, {})
        elif kind in ("posted", "voided", "indeterminate"):
            state = {"posted": "POST", "voided": "VOID", "indeterminate": "INDET"}[kind]
            measured = event["measured"]["electrons"] if kind == "posted" else None
            self.c.learn(self._world, key, state, None, measured, event.get("digests"))
            if kind == "posted" and measured != self.s.charge.get(key) and not self.restored:
                self._world.fail("I8", f"{key[:8]}: C posts {measured}, S {self.s.charge.get(key)}")
            self._covered(key)
        elif kind == "recorded":
            self._recorded(key, event["frame"])
        sure = sum(self.delivered.get(k, 0) for k in self.steps) + (self._flowing() if self._c_flows() else 0)
        if claimed is not None and claimed < sure:
            self._world.fail("I2", f"C says that {claimed} electrons are charged, {sure} are delivered")

    def _recorded(self, key: str, frame: dict[str, Any]) -> None:
        sha, whole = frame["channels"]["HAADF"]["sha256"], "partial" not in frame["flags"]
        if key not in self.truth or sha != self.truth[key][0]:
            self._world.fail("I6", f"{key[:8]}: the frame at C is not the column's")
        if whole and not self.truth[key][1]:
            self._world.fail("I6", f"{key[:8]}: a partial frame is presented as whole")
        self.recorded[key] = sha

    def discarded(self, key: str) -> None:
        """S deletes its copy of a frame."""
        if key in self.steps and self.recorded.get(key) != self.truth[key][0]:
            self._world.fail("I6", f"{key[:8]}: S deletes a frame that is not durable at C")

    # ------------------------------------------------------------ what the column does

    def beam_on(self, key: str) -> None:
        """A pulse begins."""
        world, now = self._world, self._world.now
        if key in self.delivered:
            world.fail("I1", f"{key[:8]} fires again")
        if key in self.steps:
            fired = [k for k in self.delivered if self.steps.get(k) == self.steps[key]]
            if fired:
                world.fail("I1", f"step {self.steps[key]} fires again: {fired[0][:8]}, then {key[:8]}")
            if self.restored and key not in self._before:
                world.fail("I2", f"{key[:8]} fires on a ledger restored from an old copy")
        asked = self._asked.get(key)
        if asked is None or not asked.valid:
            world.fail("I4", f"{key[:8]} fires: {asked.why if asked else 'nobody asked'}")
        assert asked is not None
        if asked.epoch != self.epoch:
            world.fail("I4", f"{key[:8]} fires under epoch {asked.epoch}, {self.epoch} is current")
        if now > asked.deadline_ns:
            world.fail("I4", f"{key[:8]} fires {(now - asked.deadline_ns) / MS:.1f} ms after its deadline")
        if self.holder is None or now > self.holder.until_ns:
            world.fail("I4", f"{key[:8]} fires without a lease")
        self.delivered[key] = 0
        self._on = key, self.epoch
        self._check_beam(now)
        self._covered(key, least=1)

    def beam_off(self, key: str, region: ScanRegion, electrons: int, pixels: int, on_ns: int) -> None:
        """A pulse has ended."""
        world, now = self._world, self._world.now
        assert self._on is not None
        self._check_beam(now)
        if self._on[1] < self.epoch and now - self._epoch_ns > 3 * MS:
            world.fail("I4", f"{key[:8]} of epoch {self._on[1]} is still on under epoch {self.epoch}")
        self._on = None
        self.delivered[key] = electrons
        self._covered(key)
        self._deposit(key, region, electrons, pixels)
        for name, keys in (("S", self.delivered), ("C", self.steps)):
            limit, spent = self._budgets[name].electrons, sum(self.delivered.get(k, 0) for k in keys)
            if limit is not None and spent > limit and not self.restored:
                world.fail("I3", f"{spent} electrons are delivered, {name}'s budget is {limit}")

    def spooled(self, key: str, sha: str, whole: bool) -> None:
        """The column has written a frame."""
        self.truth[key] = (sha, whole)

    def _check_beam(self, now: int) -> None:
        if self._on and now - self.beat_ns > 2 * H:
            key, late = self._on[0], (now - self.beat_ns) / MS
            self._world.fail("I5", f"{key[:8]} is on {late:.1f} ms after the last valid heartbeat")

    def _flowing(self) -> int:
        return self.live().electrons(self._world.now) if self._on and self.live() else 0

    def _c_flows(self) -> bool:
        return self._on is not None and self._on[0] in self.steps

    def _covered(self, key: str, least: int = 0) -> None:
        """Delivered <= charged, in both durable ledgers."""
        flowing = self._flowing() if self._on and self._on[0] == key else 0
        sure = max(least, self.delivered.get(key, 0) + flowing)
        if not self.restored and self.s.charge.get(key, 0) < sure:
            self._world.fail("I2", f"{key[:8]}: {sure} delivered, S has charged {self.s.charge.get(key, 0)}")
        mine = key in self.steps or key not in self.foreign
        if mine and self.c.charge.get(key, 0) < sure:
            self._world.fail("I2", f"{key[:8]}: {sure} delivered, C has charged {self.c.charge.get(key, 0)}")

    def _deposit(self, key: str, region: ScanRegion, electrons: int, pixels: int) -> None:
        """Every pixel's electrons into the 1 nm tile under it; the rest of a cut pulse into the next pixel."""
        rows, cols = region.shape
        hit = min(pixels + 1, region.pixels)
        c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
        found: dict[tuple[int, int], float] = defaultdict(float)
        for n in range(hit):
            u = ((n % cols) + 0.5) * region.fov_nm[0] / cols - region.fov_nm[0] / 2
            v = ((n // cols) + 0.5) * region.fov_nm[1] / rows - region.fov_nm[1] / 2
            tile = math.floor(region.center_nm[0] + c * u - s * v), math.floor(region.center_nm[1] + s * u + c * v)
            found[tile] += electrons / hit / 100.0
        for name in ("S", "C") if key in self.steps else ("S",):
            tiles, limit = self._tiles[name], self._budgets[name].peak_fluence_e_per_A2
            for tile, fluence in found.items():
                tiles[tile] += fluence
                if limit is not None and tiles[tile] > limit * (1 + 1e-9) and not self.restored:
                    self._world.fail("I3", f"tile {tile} got {tiles[tile]:.6g} e/A^2, {name}'s limit is {limit:.6g}")

    # ------------------------------------------------------------ when faults have stopped

    def settled(self, keys: list[str]) -> None:
        """I7: these keys are terminal on both sides, and both say the same."""
        for key in keys:
            mine, theirs = self.c.state[key], self.s.state.get(key, "absent")
            if mine not in _TERMINAL or theirs != mine:
                self._world.fail("I7", f"{key[:8]} is {mine} for C, {theirs} for S")
            both = [(account.charge[key], account.digests[key]) for account in (self.c, self.s)]
            if mine != "VOID" and both[0] != both[1]:
                self._world.fail("I7", f"{key[:8]}: the ledgers do not agree")
