"""What every policy must pass. A policy's own test is only its set-up::

    class TestMine(PolicyContract):
        policy = MyPolicy()

pytest collects the inherited tests; they need Hypothesis. A policy is pure: everything that it may know is in the
arguments of ``decide``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aecontrol.protocols import History, Policy
from aecontrol.types import Charge, Decision, Observation, Scan, ScanRegion


def windows(rows: int, cols: int, side_nm: float = 5.0) -> tuple[ScanRegion, ...]:
    """A grid of square windows, row by row."""
    return tuple(
        ScanRegion(
            center_nm=((col + 0.5) * side_nm, (row + 0.5) * side_nm),
            fov_nm=(side_nm, side_nm),
            shape=(16, 16),
            dwell_time_s=1e-6,
        )
        for row in range(rows)
        for col in range(cols)
    )


def observation(region: ScanRegion, value: float | None, variance: float = 1.0) -> Observation:
    """What perception would say of ``region``; None: it abstained."""
    return Observation(region=region, value=value, variance=None if value is None else variance, model="contract")


def history(
    candidates: Sequence[ScanRegion],
    scanned: Sequence[int],
    values: Sequence[float | None],
    overview: Sequence[float | None] | None,
    forbidden: Sequence[int] = (),
) -> History:
    """A history in which ``scanned`` windows gave ``values``; neither they nor ``forbidden`` ones are feasible."""
    closed = {*scanned, *forbidden}
    return History(
        step=len(scanned) + 1,
        overview=() if overview is None else tuple(map(observation, candidates, overview)),
        scans=tuple(observation(candidates[i], v) for i, v in zip(scanned, values, strict=True)),
        scanned=tuple(scanned),
        feasible=tuple(i not in closed for i in range(len(candidates))),
        charges=tuple(Charge(electrons=100, pixels=256, seconds=1.0) for _ in candidates),
    )


def random_history(seed: int, candidates: Sequence[ScanRegion]) -> History:
    """A history of random length, mask, values and overview; some observations abstain. One window stays feasible."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(candidates))
    count = int(random.integers(0, len(candidates)))
    scale = float(10 ** random.uniform(-3, 6))
    values = [None if random.random() < 0.2 else float(v) for v in scale * random.standard_normal(count)]
    if random.random() < 0.2:
        values = [scale] * count
    overview = [None if random.random() < 0.1 else float(v) for v in scale * random.standard_normal(len(candidates))]
    left = order[count:]
    forbidden = left[: int(random.integers(0, len(left)))]
    return history(
        candidates,
        [int(i) for i in order[:count]],
        values,
        None if random.random() < 0.3 else overview,
        [int(i) for i in forbidden],
    )


class PolicyContract:
    """Inherit, set ``policy``, and pytest runs the rest."""

    policy: Policy
    cases = 40

    def chosen(self, view: History, candidates: Sequence[ScanRegion], seed: int = 0) -> int:
        """Index of the window that the policy takes; checks that the decision is well formed."""
        decision: Decision = self.policy.decide(view, candidates, seed)
        assert isinstance(decision, Scan)
        index = candidates.index(decision.regions[0])
        assert decision.explanation.why
        assert decision.explanation.candidate == index
        return index

    def test_only_feasible_windows_are_chosen(self) -> None:
        """Whatever mask, values, overview and abstentions."""
        candidates = windows(4, 5)
        for seed in range(self.cases):
            view = random_history(seed, candidates)
            assert view.feasible[self.chosen(view, candidates, seed)]

    def test_the_same_question_has_the_same_answer(self) -> None:
        """Asked again, and asked in between of something else: decisions do not depend on what was asked before."""
        candidates = windows(4, 5)
        first = [self.policy.decide(random_history(s, candidates), candidates, 7) for s in range(8)]
        again = [self.policy.decide(random_history(s, candidates), candidates, 7) for s in reversed(range(8))]
        assert first == again[::-1]

    def test_the_last_feasible_window_is_taken(self) -> None:
        """With one window left there is nothing to choose."""
        candidates = windows(3, 3)
        for last in (0, 4, 8):
            others = [i for i in range(9) if i != last]
            assert self.chosen(history(candidates, others, [1.0] * 8, [0.0] * 9), candidates) == last

    def test_a_whole_session_visits_every_window_once(self) -> None:
        """From an empty history to the end, with and without an overview, values from 0 to large."""
        candidates = windows(3, 4)
        for overview in (None, [float(i % 5) for i in range(12)]):
            order: list[int] = []
            while len(order) < len(candidates):
                view = history(candidates, order, [float(i**2) for i in order], overview)
                order.append(self.chosen(view, candidates))
            assert sorted(order) == list(range(12))
