"""Octahedral tilts as pure functions: Glazer's rule puts them in, a best fit reads them off the finished structure.

All vectors are in the pseudo-cubic (pc) frame: x, y, z along [100], [010], [001]. Rotations do not commute and each O
belongs to two octahedra, so what is put in is not what the structure shows; labels are what :func:`fit_tilts` reads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .base import Vectors

Steps = NDArray[np.int64]

ARMS: Steps = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
"""The six directions from B to its O, in the order that :func:`fit_tilts` expects."""


def glazer_rotations(index: Steps, tilt_deg: Vectors, signs: str) -> Vectors:
    """Rotation vector [n, 3], rad, of the octahedron at each integer B site ``index`` [n, 3].

    ``tilt_deg`` [3] or [n, 3] are the magnitudes about x, y, z; ``signs`` one of '+', '-', '0' for each axis:
    neighbours along the axis turn alike, oppositely, or not at all; neighbours across it always oppositely.
    """
    total = index.sum(axis=1)
    rotations = np.zeros((len(index), 3))
    for axis, sign in enumerate(signs):
        if sign != "0":
            steps = total - index[:, axis] if sign == "+" else total
            rotations[:, axis] = 1.0 - 2.0 * (steps % 2)
    return rotations * np.radians(tilt_deg)


def apply_glazer(arms_A: Vectors, rotations: Vectors) -> tuple[Vectors, Vectors]:
    """Shift of each O [n, 3] and how far its two rigid octahedra disagree about it [n], angstrom.

    ``arms_A`` [n, 2, 3] lead to the untilted O from the two B atoms that share it, ``rotations`` [n, 2, 3] are theirs.
    The O goes to the mean of the two places.
    """
    wanted = _rotate(arms_A, rotations) - arms_A
    return wanted.mean(axis=1), np.linalg.norm(wanted[:, 0] - wanted[:, 1], axis=1)


def fit_tilts(bonds_A: Vectors) -> Vectors:
    """Tilts (alpha, beta, gamma) [n, 3], degrees: the rotation vector that best turns the axes into the B-O bonds.

    ``bonds_A`` [n, 6, 3] in the order of :data:`ARMS`. Kabsch, Acta Cryst. A32 (1976) 922; opposite bonds enter by
    their difference, so a B atom off the centre of its octahedron changes nothing.
    """
    spread = np.einsum("ki,nkj->nij", ARMS.astype(np.float64), bonds_A)
    u, _, vt = np.linalg.svd(spread)  # of bonds in a right-handed order, so that no reflection can come out
    turn = np.einsum("nij,njk->nki", u, vt)
    angle = np.arccos(np.clip(0.5 * (np.trace(turn, axis1=1, axis2=2) - 1.0), -1.0, 1.0))
    twist = np.stack(
        [turn[:, 2, 1] - turn[:, 1, 2], turn[:, 0, 2] - turn[:, 2, 0], turn[:, 1, 0] - turn[:, 0, 1]], axis=1
    )
    return np.asarray(np.degrees(0.5 * twist / np.sinc(angle / np.pi)[:, None]))


def _rotate(vectors: Vectors, rotations: Vectors) -> Vectors:
    """Rodrigues' formula for rotation vectors of the same shape [..., 3]; exact at zero angle."""
    angle = np.linalg.norm(rotations, axis=-1, keepdims=True)
    once = np.cross(rotations, vectors)
    twice = np.cross(rotations, once)
    return np.asarray(vectors + np.sinc(angle / np.pi) * once + 0.5 * np.sinc(0.5 * angle / np.pi) ** 2 * twice)
