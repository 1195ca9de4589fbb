"""Virtual time: one queue of events, one source of chance, one record of everything that happened."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable

from .swarm import SECOND, draw


class Breach(BaseException):
    """An invariant is broken. Not an Exception: nothing that runs in the world may catch it."""

    def __init__(self, invariant: str, text: str) -> None:
        self.invariant = invariant
        super().__init__(f"{invariant}: {text}")


class World:
    """A clock (ns), a queue of what will happen, and a digest of what did.

    ``swarm`` says what goes wrong; after ``stop_ns`` nothing does any more.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.swarm = draw(self.rng)
        self.now = 0
        self.stop_ns = int(self.swarm.stop_s * SECOND)
        self.count: Counter[str] = Counter()
        self.breach: Breach | None = None
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._trace = hashlib.sha256()

    @property
    def quiet(self) -> bool:
        """Faults have stopped."""
        return self.now >= self.stop_ns

    def at(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Let ``action`` happen in ``delay_ns``."""
        self._order += 1
        heapq.heappush(self._queue, (self.now + delay_ns, self._order, action))

    def run(self, until_ns: int, over: Callable[[], bool] = lambda: False) -> None:
        """Let time pass until ``until_ns``, or until ``over`` says that it is enough."""
        queue = self._queue
        while not over():
            if not queue or queue[0][0] > until_ns:
                self.now = max(self.now, until_ns)
                return
            self.now, _, action = heapq.heappop(queue)
            action()

    def chance(self, probability: float) -> bool:
        """True with ``probability``, as long as faults have not stopped."""
        return probability > 0 and self.rng.random() < probability and not self.quiet

    def between(self, low_ns: int, high_ns: int) -> int:
        """A duration, ns."""
        return self.rng.randint(low_ns, high_ns)

    def every(self, mean_s: float, action: Callable[[], None]) -> None:
        """Let ``action`` happen again and again, ``mean_s`` apart on average, until faults stop."""
        if mean_s <= 0:
            return

        def strike() -> None:
            if not self.quiet:
                action()
                self.every(mean_s, action)

        self.at(int(self.rng.expovariate(1 / mean_s) * SECOND), strike)

    def tell(self, what: str, detail: str = "") -> None:
        """Note what happened: counted by kind, and part of the digest."""
        self.count[what] += 1
        self._trace.update(f"{self.now} {what} {detail}\n".encode())

    def fail(self, invariant: str, text: str) -> None:
        """An invariant is broken: the world ends here."""
        self.breach = self.breach or Breach(invariant, f"{text} (at {self.now / SECOND:.6f} s)")
        raise self.breach

    @property
    def digest(self) -> str:
        """Digest of everything that happened so far."""
        return self._trace.hexdigest()
