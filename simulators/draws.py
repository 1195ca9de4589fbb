"""Random numbers that belong to an atom: they follow its element and its place, never its number in an array.

A named stream gives one salt; the salt and an atom's identity are hashed into a uniform number. So shuffling the atoms,
or leaving some out, changes no draw of the others, and a further draw for one atom costs no array.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .streams import stream

Keys = NDArray[np.uint64]
Array = NDArray[np.float64]
SITE_STEP_A = 1e-3
"""Sites are told apart by this much, angstrom."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def identities(positions_A: Array, atomic_numbers: NDArray[np.int64]) -> Keys:
    """One key per atom [n] from its place ``positions_A`` [n, 3] and element; atoms alike in both count on."""
    keys = _mix(atomic_numbers.astype(np.uint64))
    for axis in np.rint(positions_A / SITE_STEP_A).astype(np.int64).T:
        keys = _mix(keys + GOLDEN + axis.astype(np.uint64))
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    if len(again):
        group = np.searchsorted(keys[order], keys[order[again]])
        keys[order[again]] = _mix(keys[order[again]] + GOLDEN * (again - group).astype(np.uint64))
    return keys


def uniform(seed: int, role: str, keys: Keys, turn: int = 0) -> Array:
    """A number in (0, 1) for each of ``keys`` [n]; another ``turn`` gives another, independent number."""
    salt = _salt(seed, role, turn)
    return np.asarray(((_mix(_mix(keys ^ salt) + salt) >> np.uint64(11)) + 0.5) * 2.0**-53)


def exponential(seed: int, role: str, keys: Keys, turn: int = 0) -> Array:
    """An Exp(1) number for each of ``keys`` [n]."""
    return np.asarray(-np.log(uniform(seed, role, keys, turn)))


def normal(seed: int, role: str, keys: Keys) -> Array:
    """Three standard normal numbers for each of ``keys`` [n, 3] (Box and Muller)."""
    radius, angle = (np.stack([uniform(seed, role, keys, 2 * i + j) for i in range(3)], axis=1) for j in range(2))
    return np.asarray(np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle))


@lru_cache(maxsize=256)
def _salt(seed: int, role: str, turn: int) -> np.uint64:
    return stream(seed, role, turn).integers(2**64, dtype=np.uint64)


def _mix(keys: Keys) -> Keys:
    """The SplitMix64 finaliser (Steele, Lea and Flood 2014): a bijection in which every bit depends on every bit."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(keys ^ (keys >> np.uint64(31)))
