"""Frames of a flat crystal, drawn column by column: what tests of damage compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Crystal:
    """Columns at ``at`` [n, 2] (x, y) px of brightness ``weight`` [n], seen in frames of ``side`` px."""

    at: Floats
    weight: Floats
    side: int = 200

    @classmethod
    def square(cls, side: int = 200, step: float = 10.7, turn: float = 0.3) -> Crystal:
        k = np.arange(-side // 5, side // 5)
        grid = np.stack(np.meshgrid(k, k), -1).reshape(-1, 2) @ np.array(
            [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
        )
        at = step * grid + side / 2 + 0.37
        near = np.all((at > -12) & (at < side + 12), axis=1)
        return cls(at[near], np.where(np.arange(len(at)) % 2, 1.0, 0.6)[near], side)

    def without(self, x: float, y: float, radius: float) -> Crystal:
        """The crystal with half the matter of its columns gone in a disc."""
        inside = np.hypot(self.at[:, 0] - x, self.at[:, 1] - y) < radius
        return replace(self, weight=np.where(inside, 0.5 * self.weight, self.weight))

    def shows(
        self,
        shift: tuple[float, float] = (0.0, 0.0),
        blur: float = 2.0,
        rows: Floats | None = None,
        across: Floats | float = 0.0,
    ) -> Floats:
        """Brightness, 1 at the brightest column, with the content moved by ``shift`` and that of each row by ``rows``
        along it and ``across`` it."""
        pixel = np.arange(self.side) + 0.5
        down = np.exp(-0.5 * (((pixel - across)[:, None] - self.at[:, 1] - shift[1]) / blur) ** 2) * (2.0 / blur) ** 2
        x = self.at[:, 0] + shift[0]
        if rows is None:
            return (down * self.weight) @ np.exp(-0.5 * ((pixel[:, None] - x) / blur) ** 2).T
        moved = [np.exp(-0.5 * ((pixel - x[:, None] - row) / blur) ** 2) for row in rows]
        return np.stack([(line * self.weight) @ image for line, image in zip(down, moved, strict=True)])

    @cached_property
    def still(self) -> Floats:
        """What a frame shows."""
        return self.shows()


def counts(brightness: Floats, peak: float, seed: int, background: float = 0.1) -> Floats:
    """A recorded frame."""
    return np.random.default_rng(seed).poisson(peak * (background + (1 - background) * brightness)).astype(float)
