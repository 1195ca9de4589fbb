"""Least squares of an image's residual on smooth fields and a few scalars, from sums over small blocks of pixels.

A field that bends only from knot to knot is all but flat in a block, so that the normal equations need the pixels once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BLOCKS = 12
"""Blocks of pixels between knots, on which the knots' functions are flat for the normal equations."""
_STRIP = 2**15
"""Pixels that the normal equations are summed over at once."""
_SOLVER_STEPS = 8


@dataclass(frozen=True)
class System:
    """Normal equations of a residual: a smooth background, a smooth scale of the core, and scalars of other terms.

    ``normal`` [t, t, by, bx] and ``right`` [t, by, bx] are weighted sums of products over blocks of pixels, of the
    terms (one, core, the others); ``hats`` the means of the knots' functions in the blocks along y and x.
    """

    normal: Floats
    right: Floats
    hats: tuple[Floats, Floats]

    @classmethod
    def of(cls, weight: Floats, residual: Floats, terms: list[Floats], hats: tuple[Floats, Floats]) -> System:
        """From images, all [rows, cols], and the knots' functions at the pixels [rows, ky], [cols, kx]."""
        starts = []
        for hat in hats:
            step = max(1, len(hat) // (_BLOCKS * (hat.shape[1] - 1)))
            starts.append(np.arange(0, len(hat), step))
        size = len(terms) + 1
        ends = np.append(starts[0], len(weight))
        normal = np.empty((size, size, *(len(s) for s in starts)))
        right = np.empty(normal.shape[1:])
        # as many rows at a time as stay in the processor's cache
        strip = max(1, _STRIP // (int(ends[1]) * weight.shape[1]))
        for first in range(0, len(starts[0]), strip):
            last = min(first + strip, len(starts[0]))
            rows, edges = slice(ends[first], ends[last]), starts[0][first:last] - ends[first]

            def summed(image: Floats, edges: Ints = edges) -> Floats:
                return np.asarray(np.add.reduceat(np.add.reduceat(image, edges, axis=0), starts[1], axis=1))

            parts = [np.ones_like(weight[rows]), *(t[rows] for t in terms)]
            for i, one in enumerate(parts):
                weighted = weight[rows] * one
                right[i, first:last] = summed(weighted * residual[rows])
                for j, other in enumerate(parts[: i + 1]):
                    normal[i, j, first:last] = normal[j, i, first:last] = summed(weighted * other)
        means = [
            np.add.reduceat(h, s, axis=0) / np.diff(np.append(s, len(h)))[:, None]
            for h, s in zip(hats, starts, strict=True)
        ]
        return cls(normal, right, (means[0], means[1]))

    def without_last(self, value: float) -> System:
        """The same with the last term's scalar held at ``value``."""
        normal, right = self.normal.copy(), self.right - value * self.normal[-1]
        normal[-1] = normal[:, -1] = right[-1] = 0.0
        return System(normal, right, self.hats)

    def solve(self) -> Floats:
        """Knots of the background and of the scale, flat, and the scalars."""
        hat_y, hat_x = self.hats
        knots = (2, hat_y.shape[1], hat_x.shape[1])
        smooth = math.prod(knots)

        def back(sums: Floats, hat_y: Floats = hat_y, hat_x: Floats = hat_x) -> Floats:
            return np.concatenate([(hat_y.T @ sums[:2] @ hat_x).ravel(), sums[2:].sum((1, 2))])

        def apply(v: Floats) -> Floats:
            field = hat_y @ v[:smooth].reshape(knots) @ hat_x.T
            sums = (self.normal[:, :2] * field).sum(1)
            sums += np.einsum("abyx,b->ayx", self.normal[:, 2:], v[smooth:])
            return back(sums)

        scale = back(np.einsum("aayx->ayx", self.normal), hat_y**2, hat_x**2)
        return _conjugate_gradients(apply, back(self.right), 1 / (scale + 1e-12 * scale.max()))


def _conjugate_gradients(apply: Callable[[Floats], Floats], right: Floats, inverse: Floats) -> Floats:
    """Solve ``apply(v) = right``, preconditioned by the ``inverse`` of the diagonal."""
    v = np.zeros_like(right)
    residual = right
    p = z = inverse * residual
    rz = float(residual @ z)
    end = 1e-5 * rz
    for _ in range(_SOLVER_STEPS):
        if rz <= end or rz <= 0:
            break
        q = apply(p)
        alpha = rz / float(p @ q)
        v, residual = v + alpha * p, residual - alpha * q
        z = inverse * residual
        rz, before = float(residual @ z), rz
        p = z + rz / before * p
    return v
