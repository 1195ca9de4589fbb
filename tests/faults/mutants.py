"""Deliberate defects of the real code: a checker that was never seen to fail proves nothing.

Each is a few lines laid over the code under test; ``python -m tests.faults.campaign --mutants`` says at which seed each
is noticed, and by which invariant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aecontrol.chain import GENESIS
from aecontrol.commands import Reserve
from aecontrol.events import Posted, Resumed
from aecontrol.exposure import KeyRecord, Outcome, client, server
from aecontrol.exposure import messages as m
from aecontrol.exposure.client import Client
from aecontrol.exposure.ledger import Entry
from aecontrol.exposure.server import Append, Fire, Off, Send, Server
from aecontrol.folding import apply
from aecontrol.session import Effects
from aecontrol.types import Charge

from .column import Watchdog
from .shell import Shell

Mutation = Callable[[pytest.MonkeyPatch], None]
FOREVER = 1 << 62
MUTANTS: dict[str, Mutation] = {}


def mutant(mutation: Mutation) -> Mutation:
    MUTANTS[mutation.__name__] = mutation
    return mutation


def reshape(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a method by ``change(honest, *arguments)``."""
    honest = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(honest, *args, **kwargs))


# ---------------------------------------------------------------- the server's ledger


@mutant
def no_dedupe(patch):
    """A known key is treated as new."""

    def forget(honest, self, peer, request, now):
        kept = {key: entry for key, entry in self.ledger.entries.items() if key != request.key}
        self.ledger = replace(self.ledger, entries=kept)
        return honest(self, peer, request, now)

    reshape(patch, Server, "_on_expose", forget)


@mutant
def firing_written_after_fire(patch):
    def later(honest, self, peer, request, now):
        effects = honest(self, peer, request, now)
        return sorted(effects, key=lambda e: isinstance(e, Append))

    reshape(patch, Server, "_on_expose", later)


@mutant
def dedupe_in_memory(patch):
    """A new process knows no key of the old one."""

    def forget(honest, self, ledger, records, *rest):
        honest(self, ledger, records, *rest)
        self.ledger = replace(self.ledger, entries={})

    reshape(patch, Server, "__init__", forget)
    reshape(patch, Server, "boot", lambda honest, self, spooled: honest(self, {}))


@mutant
def no_tombstone(patch):
    """CANCEL of a key never seen is answered, not written."""

    def answer(honest, self, peer, request):
        if request.key in self.ledger.entries:
            return honest(self, peer, request)
        outcome = Outcome(key=request.key, state="VOID", reason="never seen")
        return [Send(peer.route, m.Settled(re=request.id, outcome=outcome))]

    reshape(patch, Server, "_on_cancel", answer)


@mutant
def indet_charged_zero(patch):
    honest = Entry.charge.fget
    patch.setattr(Entry, "charge", property(lambda e: None if e.state == "INDET" else honest(e)))


@mutant
def indet_charged_zero_by_c(patch):
    honest, zero = KeyRecord.charge.fget, Charge(electrons=0, pixels=0, seconds=0.0)
    patch.setattr(KeyRecord, "charge", property(lambda r: zero if r.state == "INDET" else honest(r)))


@mutant
def settled_at_reserved(patch):
    """POST says what was allowed, not what was measured."""

    def full(honest, ledger, key, measured, digests, limits):
        return honest(ledger, key, ledger.entries[key].bound, digests, limits)[:1]

    reshape(patch, server, "on_fired", full)


@mutant
def settled_at_reserved_by_c(patch):
    def full(honest, self, command, state):
        for event in honest(self, command, state):
            posted = isinstance(event, Posted)
            yield event.model_copy(update={"measured": command.record.bound}) if posted else event

    reshape(patch, Effects, "perform", full)


@mutant
def trusts_the_bound_of_c(patch):
    patch.setattr("aecontrol.exposure.ledger.over_shot_limits", lambda *args: None)


@mutant
def cancel_settles_a_running_pulse(patch):
    def impatient(honest, self, peer, request):
        live, self.live = self.live, None
        effects = honest(self, peer, request)
        self.live = live
        return effects

    reshape(patch, Server, "_on_cancel", impatient)


@mutant
def budget_of_s_ignored(patch):
    patch.setattr("aecontrol.exposure.ledger.over_budget", lambda *args: None)


# ---------------------------------------------------------------- lease, fencing, time


@mutant
def no_epoch_check(patch):
    """Anybody who is heard renews the lease."""

    def anybody(honest, self, peer, epoch, tick, now):
        lease = self.lease
        if lease is None:
            return honest(self, peer, epoch, tick, now)
        lease.tick = min(lease.tick, tick - 1)
        return honest(self, replace(peer, user=lease.user), lease.epoch, tick, now)

    reshape(patch, Server, "_renew", anybody)


@mutant
def volatile_epoch(patch):
    """A new process counts its epochs from the beginning."""

    def forget(honest, self, *rest):
        honest(self, *rest)
        self.ledger = replace(self.ledger, epoch=0)

    reshape(patch, Server, "__init__", forget)


@mutant
def boot_id_not_checked(patch):
    """Another process answers for keys that only the ledger of an earlier one may know."""

    def anyones(honest, self, peer, request, *now):
        return honest(self, peer, request.model_copy(update={"boot_id": self.boot_id}), *now)

    reshape(patch, Server, "_on_cancel", anyones)
    reshape(patch, Server, "_on_expose", anyones)


@mutant
def deadline_not_checked(patch):
    def timeless(honest, self, peer, request, now):
        return honest(self, peer, request.model_copy(update={"deadline_ns": FOREVER}), now)

    reshape(patch, Server, "_on_expose", timeless)


@mutant
def fire_not_held_back(patch):
    """A pulse is started however long FIRING took to write."""

    def whenever(honest, self, peer, request, now):
        effects = honest(self, peer, request, now)
        return [replace(e, not_after_ns=FOREVER) if isinstance(e, Fire) else e for e in effects]

    reshape(patch, Server, "_on_expose", whenever)


@mutant
def tick_not_checked(patch):
    def any_tick(honest, self, peer, epoch, tick, now):
        if self.lease is not None:
            self.lease.tick = min(self.lease.tick, tick - 1)
        return honest(self, peer, epoch, tick, now)

    reshape(patch, Server, "_renew", any_tick)


@mutant
def fenced_beat_accepted(patch):
    def generous(honest, self, peer, request, now):
        if self.lease is not None:
            peer = replace(peer, user=self.lease.user)
            tick = max(request.tick, self.lease.tick + 1)
            request = request.model_copy(update={"epoch": self.lease.epoch, "tick": tick})
        return honest(self, peer, request, now)

    reshape(patch, Server, "_on_beat", generous)


@mutant
def lease_never_expires(patch):
    patch.setattr(Server, "_expired", lambda self, lease, now: False)


@mutant
def takeover_does_not_blank(patch):
    def bright(honest, self, peer, request, now):
        return [e for e in honest(self, peer, request, now) if not isinstance(e, Off)]

    reshape(patch, Server, "_on_acquire", bright)


@mutant
def no_watchdog(patch):
    patch.setattr(Watchdog, "_poll", lambda self: None)


@mutant
def watchdog_not_watched(patch):
    """S does not look whether the watchdog lives, and the watchdog is not replaced."""
    patch.setattr(Watchdog, "seen_alive", True)
    reshape(patch, Server, "on_tick", lambda honest, self, now: [])


# ---------------------------------------------------------------- the controller


@mutant
def fresh_key_on_timeout(patch):
    def again(honest, self, key, region, bound):
        outcome = honest(self, key, region, bound)
        if outcome is None:
            key = hashlib.sha256(key.encode()).hexdigest()
            outcome = honest(self, key, region, bound)
        return outcome

    reshape(patch, Client, "_fire", again)


@mutant
def void_on_timeout(patch):
    def hopeful(honest, self, key, region, bound):
        return honest(self, key, region, bound) or Outcome(key=key, state="VOID", reason="no answer")

    reshape(patch, Client, "_fire", hopeful)


@mutant
def reserve_after_send(patch):
    def eager(honest, self, command, state):
        if isinstance(command, Reserve):
            self._microscope.expose(command.event.key, command.event.region, command.event.bound)
        yield from honest(self, command, state)

    reshape(patch, Effects, "perform", eager)


@mutant
def acknowledged_before_durable(patch):
    """The bridge may delete a frame as soon as it was sent."""

    def careless(honest, self, command):
        recorded = honest(self, command)
        self._microscope.acknowledge(command.record.key)
        return recorded

    reshape(patch, Effects, "_fetch", careless)


@mutant
def key_in_flight_forgotten(patch):
    """A lost lease, or a crash, takes the open key with it."""

    def forget(state, event):
        after = apply(state, event)
        if isinstance(event, Resumed) and after.unsettled:
            return replace(after, unsettled=False, phase="decided", attempt=after.attempt + 1)
        return after

    patch.setattr("aecontrol.session.apply", forget)
    patch.setattr("aecontrol.folding.apply", forget)


@mutant
def mirror_not_compared(patch):
    """The controller takes any ledger for the one that it knew."""

    def trust(honest, self, reply):
        self._mirror.bodies, self._mirror.head = [], GENESIS
        honest(self, reply)

    reshape(patch, client.Client, "_meet", trust)


@mutant
def digest_not_checked(patch):
    """Whatever arrives is taken for the frame."""
    patch.setattr("drivers.remote.sha256_hex", lambda data: Everything())

    def believe(honest, self, command):
        digests = dict.fromkeys(command.record.digests, Everything())
        return honest(self, replace(command, record=command.record.model_copy(update={"digests": digests})))

    reshape(patch, Effects, "_fetch", believe)


class Everything(str):
    """Equal to any digest."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


@mutant
def partial_frame_unflagged(patch):
    def whole(honest, self, re, key):
        reply = honest(self, re, key)
        return reply.model_copy(update={"flags": ()}) if isinstance(reply, m.Spooled) else reply

    reshape(patch, Shell, "_spooled", whole)
