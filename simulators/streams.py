"""Named random streams: a stream depends on (seed, role, step) only, never on who drew before."""

from __future__ import annotations

from zlib import crc32

import numpy as np


def stream(seed: int, role: str, step: int = 0) -> np.random.Generator:
    """A fresh generator for ``role`` at ``step``; adding a consumer elsewhere cannot shift it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(crc32(role.encode()), step)))
