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
from aecontrol.types import Charge, Decision, Observation, Scan, ScanRegion, Stop


def windows(
    rows: int, cols: int, side_nm: float = 5.0, dwell_time_s: float = 1e-6, pixels: int = 16
) -> tuple[ScanRegion, ...]:
    """A grid of square windows, row by row."""
    return tuple(
        ScanRegion(
            center_nm=((col + 0.5) * side_nm, (row + 0.5) * side_nm),
            fov_nm=(side_nm, side_nm),
            shape=(pixels, pixels),
            dwell_time_s=dwell_time_s,
        )
        for row in range(rows)
        for col in range(cols)
    )


def several_kinds() -> tuple[ScanRegion, ...]:
    """A field of 20 x 20 nm in windows of 5 x 5 nm, in the same windows with a longer dwell, and in quarters."""
    return (*windows(4, 4), *windows(4, 4, dwell_time_s=4e-6), *windows(2, 2, side_nm=10.0, pixels=32))


def observation(region: ScanRegion, value: float | None, variance: float = 1.0) -> Observation:
    """What perception would say of ``region``; None: it abstained."""
    return Observation(region=region, value=value, variance=None if value is None else variance, model="contract")


def history(
    candidates: Sequence[ScanRegion],
    scanned: Sequence[int],
    values: Sequence[float | None],
    overview: Sequence[float | None] | None,
    forbidden: Sequence[int] = (),
    *,
    damage: Sequence[float] | None = None,
    validity: Sequence[float] = (),
    left: float = 1.0,
) -> History:
    """A history in which ``scanned`` windows gave ``values``; neither they nor ``forbidden`` ones are feasible. Every
    window is charged its pixels' dwell time and ``damage`` [n]; ``left`` is the share left of every budget."""
    closed = {*scanned, *forbidden}
    return History(
        step=len(scanned) + 1,
        overview=() if overview is None else tuple(map(observation, candidates, overview)),
        scans=tuple(observation(candidates[i], v) for i, v in zip(scanned, values, strict=True)),
        scanned=tuple(scanned),
        feasible=tuple(i not in closed for i in range(len(candidates))),
        charges=tuple(
            Charge(
                electrons=round(1e7 * region.pixels * region.dwell_time_s),
                pixels=region.pixels,
                seconds=region.pixels * region.dwell_time_s,
                damage=0.0 if damage is None else damage[index],
            )
            for index, region in enumerate(candidates)
        ),
        validity=tuple(validity),
        left=dict.fromkeys(("electrons", "damage", "seconds"), left),
    )


def random_history(seed: int, candidates: Sequence[ScanRegion]) -> History:
    """A history of random length, mask, values and overview; some observations abstain. One window stays feasible."""
    return history(candidates, *_random(np.random.default_rng(seed), len(candidates)))


def random_damage(seed: int, candidates: Sequence[ScanRegion]) -> History:
    """The same, where windows are charged damage of any magnitude, or none, and are whole, damaged or dead."""
    random = np.random.default_rng(seed)
    arguments = _random(random, len(candidates))
    damage = np.where(random.random(len(candidates)) < 0.2, 0.0, 10 ** random.uniform(-6, 3, len(candidates)))
    validity = np.clip(random.uniform(-0.2, 1.2, len(candidates)), 0.0, 1.0)
    left = float(random.random())
    return history(candidates, *arguments, damage=damage.tolist(), validity=validity.tolist(), left=left)


def _random(
    random: np.random.Generator, size: int
) -> tuple[list[int], list[float | None], list[float | None] | None, list[int]]:
    """Scanned windows, their values, overview and forbidden windows."""
    order = random.permutation(size)
    count = int(random.integers(0, size))
    scale = float(10 ** random.uniform(-3, 6))
    values = [None if random.random() < 0.2 else float(v) for v in scale * random.standard_normal(count)]
    if random.random() < 0.2:
        values = [scale] * count
    overview = [None if random.random() < 0.1 else float(v) for v in scale * random.standard_normal(size)]
    left = order[count:]
    forbidden = left[: int(random.integers(0, len(left)))]
    no_overview = random.random() < 0.3
    return [int(i) for i in order[:count]], values, None if no_overview else overview, [int(i) for i in forbidden]


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

    def test_charges_damage_and_several_kinds_of_windows_are_coped_with(self) -> None:
        """Feasible windows only, and the same again, whatever is charged and however little is still whole."""
        candidates = several_kinds()
        for seed in range(self.cases // 2):
            view = random_damage(seed, candidates)
            decision = self.policy.decide(view, candidates, seed)
            assert self.policy.decide(view, candidates, seed) == decision
            assert isinstance(decision, Stop) or view.feasible[self.chosen(view, candidates, seed)]

    def test_a_whole_session_of_several_kinds_covers_the_field(self) -> None:
        """No window is visited twice, and every place has been scanned once, also where the policy ends by itself."""
        candidates = (*windows(2, 2), *windows(2, 2, dwell_time_s=4e-6), *windows(1, 1, side_nm=10.0))
        order: list[int] = []
        while len(order) < len(candidates):
            view = history(candidates, order, [float(i % 4) for i in order], [float(i % 4) for i in range(9)])
            if isinstance(self.policy.decide(view, candidates, 0), Stop):
                break
            order.append(self.chosen(view, candidates))
        assert len(order) == len(set(order))
        assert 8 in order or {index % 4 for index in order} == {0, 1, 2, 3}
