"""Malformed messages against a decoder: it must return a message or raise its own error, quickly, and keep nothing.

    python -m tests.benchmarks.fuzz_messages [--decoder aecontrol.exposure.messages:decode_request] [--number 1000000]

``--decoder`` takes bytes. ``--error`` is what it may raise, ``--samples`` a function without arguments that gives valid
messages to start from. Each message is made from its number alone, so a crash is seen again with
``--only NUMBER``. Exit code 1 when anything crashed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

LIMIT = 16 << 10
SEED = 20_250_101
HEX = "0123456789abcdef" * 4
Decoder = Callable[[bytes], Any]

GENERIC = (
    {"sha256": HEX, "offset": 0, "nbytes": 1 << 20},
    {"v": 1, "t": "HELLO", "id": 1, "seq": 1, "session": "s", "client": "c"},
    {"v": 1, "t": "EXPOSE", "id": 7, "seq": 8, "session": "s", "epoch": 3, "boot_id": HEX, "key": HEX,
     "deadline_ns": 1 << 60, "bound": {"electrons": 10**9, "pixels": 65536, "seconds": 0.5},
     "region": {"center_nm": [1.0, 2.0], "fov_nm": [3.0, 4.0], "shape": [256, 256], "dwell_time_s": 1e-6}},
    {"v": 1, "t": "BEAT", "id": 9, "seq": 10, "epoch": 3, "tick": 11},
)  # fmt: skip

ODD = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 1 << 63, -(1 << 63) - 1, 1 << 64, 10**4000, "", "0" * 64, "A" * 64,
    "../../etc/passwd", "\x00", "\ud800", "\u202e", "\uffff", "é" * 64, [], {}, [[]], {"": None}, float("nan"),
    float("inf"), -float("inf"), "NaN", "1", ["x"] * 100, {"__proto__": 1}, {"t": "EXPOSE"},
)  # fmt: skip
LITERALS = (b"1e400", b"-1e-400", b"0x10", b"01", b"1_000", b"9" * 5000, b"NaN", b"-Infinity", b"1.0", b"'x'", b"\xff")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value in a JSON tree."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value at ``path``."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = changed(tree[path[0]], path[1:], value)
    return copy


def dumps(tree: Any) -> bytes:
    """JSON, with what JSON does not have (NaN, lone surrogates) as Python would write it."""
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def flip(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """A few bits turned over."""
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        spoilt[chance.randrange(len(spoilt))] ^= 1 << chance.randrange(8)
    return bytes(spoilt)


def cut(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """Truncated, or with a piece missing or repeated."""
    a, b = sorted(chance.choices(range(len(data) + 1), k=2))
    return chance.choice((data[:a], data[b:], data[:a] + data[b:], data[:b] + data[a:]))


def retyped(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """Another value, of whatever type, in one place or two."""
    for _ in range(chance.randint(1, 2)):
        tree = changed(tree, chance.choice(places(tree)), chance.choice(ODD))
    return dumps(tree)


def literal(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """A number or word that JSON does not allow, or no machine can hold."""
    path = chance.choice(places(tree))
    return dumps(changed(tree, path, "@here@")).replace(b'"@here@"', chance.choice(LITERALS))


def more_keys(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """Unknown, missing and duplicated keys."""
    keys = list(tree)
    kind = chance.randrange(3)
    if kind == 0:
        return dumps({**tree, chance.choice(("extra", "", "__class__", "sha256 ", "é")): chance.choice(ODD)})
    if kind == 1:
        return dumps({key: tree[key] for key in chance.sample(keys, len(keys) - 1)})
    key = chance.choice(keys)
    return data[:-1] + b"," + dumps({key: chance.choice((tree[key], *ODD))})[1:]


def nested(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """A very deep value in one place."""
    depth = chance.choice((10, 200, 1000, 8000))
    opening, closing = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    deep = opening * depth + b"1" + closing * chance.choice((depth, 0))
    return dumps(changed(tree, chance.choice(places(tree)), "@here@")).replace(b'"@here@"', deep)


def padded(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """At the limit of a header's length, by a byte more or less: spaces or one long text."""
    size = LIMIT + chance.choice((-1, 0, 1, 1000))
    if chance.random() < 0.5:
        return data + b" " * (size - len(data))
    longer = dumps(changed(tree, chance.choice([p for p in places(tree) if p]), "@here@"))
    return longer.replace(b"@here@", chance.choice((b"a", b"\\u0000", "é".encode())) * (size - len(longer)))


def encoded(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """Another text encoding, or a byte order mark."""
    text = data.decode("utf-8", "replace")
    return chance.choice((b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-32"), data + b"\0", b"\0"))


def noise(chance: random.Random, data: bytes, tree: Any) -> bytes:
    """Random bytes."""
    return chance.randbytes(chance.randrange(200))


STRATEGIES = (flip, cut, retyped, literal, more_keys, nested, padded, encoded, noise)


def message(number: int, samples: Sequence[bytes]) -> tuple[str, bytes]:
    """(strategy, bytes) of one message, from its number alone."""
    chance = random.Random(SEED + number)
    data = chance.choice(samples)
    strategy = chance.choice(STRATEGIES)
    return strategy.__name__, strategy(chance, data, json.loads(data))


@dataclass
class Tally:
    """What became of some messages."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    slowest: int = 0
    peak_bytes: int = 0
    grown_bytes: int = 0

    def join(self, other: Tally) -> None:
        """Take in another process's."""
        self.outcomes += other.outcomes
        self.crashes += other.crashes
        if other.slowest_s > self.slowest_s:
            self.slowest_s, self.slowest = other.slowest_s, other.slowest
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        self.grown_bytes = max(self.grown_bytes, other.grown_bytes)


def load(path: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def peak() -> int:
    """Peak resident memory of this process, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(numbers: range, decoder: str, error: str, samples: str) -> Tally:
    """Decode the messages of these numbers."""
    decode, refusal, tally = load(decoder), load(error), Tally()
    seeds = list(load(samples)()) if samples else [dumps(tree) for tree in GENERIC]
    for warm in range(200):  # what is allocated once is not growth
        attempt(decode, refusal, message(numbers.start + warm, seeds)[1])
    before = peak()
    for number in numbers:
        strategy, data = message(number, seeds)
        start = time.perf_counter()
        outcome = attempt(decode, refusal, data)
        seconds = time.perf_counter() - start
        if outcome not in ("accepted", "refused"):
            tally.crashes.append(f"--only {number} ({strategy}): {outcome}")
            outcome = "crashed"
        tally.outcomes[strategy, outcome] += 1
        if seconds > tally.slowest_s:
            tally.slowest_s, tally.slowest = seconds, number
    tally.peak_bytes, tally.grown_bytes = peak(), peak() - before
    return tally


def attempt(decode: Decoder, refusal: type[Exception], data: bytes) -> str:
    """'accepted', 'refused', or what was raised instead."""
    try:
        decode(data)
    except refusal:
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "accepted"


def campaign(number: int, processes: int, decoder: str, error: str, samples: str) -> Tally:
    """``number`` messages, divided among processes."""
    shares = [range(k * number // processes, (k + 1) * number // processes) for k in range(processes)]
    work = [(share, decoder, error, samples) for share in shares]
    tally = Tally()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for part in pool.starmap(fuzz, work):
            tally.join(part)
    return tally


def main() -> int:
    """Print what became of the messages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="aecontrol.exposure.messages:decode_request")
    parser.add_argument("--error", default="aecontrol.errors:AecontrolError")
    parser.add_argument("--samples", default="tests.faults.requests:samples")
    parser.add_argument("--number", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    common = (given.decoder, given.error, given.samples)
    if given.only is not None:
        seeds = list(load(given.samples)()) if given.samples else [dumps(tree) for tree in GENERIC]
        strategy, data = message(given.only, seeds)
        print(f"{strategy}: {data!r}")
        print(attempt(load(given.decoder), load(given.error), data))
        return 0
    start = time.perf_counter()
    tally = campaign(given.number, given.processes, *common)
    print(f"{'':10} {'accepted':>9} {'refused':>9} {'crashed':>9}")
    for strategy in (s.__name__ for s in STRATEGIES):
        print(
            f"{strategy:10} " + " ".join(f"{tally.outcomes[strategy, o]:9}" for o in ("accepted", "refused", "crashed"))
        )
    print(
        f"{given.number} messages in {time.perf_counter() - start:.0f} s; slowest {1e3 * tally.slowest_s:.1f} ms"
        f" (--only {tally.slowest}); peak RSS {tally.peak_bytes / 1e6:.0f} MB, growth {tally.grown_bytes / 1e6:.1f} MB"
    )
    for crash in tally.crashes[:20]:
        print(crash)
    return 1 if tally.crashes else 0


if __name__ == "__main__":
    sys.exit(main())
