"""All shipped policies pass the contract; what each is for; and checks with known answers (METHODS 7.5)."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from policies.baselines import Greedy, Random, Raster, Serpentine, Sobol
from policies.bayes import Bayes, log_expected_improvement
from policies.contract import PolicyContract, history, windows


class TestRaster(PolicyContract):
    policy = Raster()

    def test_row_by_row_from_the_corner(self):
        candidates = windows(2, 3)
        order = []
        while len(order) < 6:
            order.append(self.chosen(history(candidates, order, [0.0] * len(order), None), candidates))
        assert order == [0, 1, 2, 3, 4, 5]


class TestSerpentine(PolicyContract):
    policy = Serpentine()

    def test_every_other_row_backwards(self):
        candidates = windows(3, 3)
        order = []
        while len(order) < 9:
            order.append(self.chosen(history(candidates, order, [0.0] * len(order), None), candidates))
        assert order == [0, 1, 2, 5, 4, 3, 6, 7, 8]


class TestRandom(PolicyContract):
    policy = Random()

    def test_seeds_differ_and_cover(self):
        candidates = windows(4, 4)
        view = history(candidates, [], [], None)
        assert len({self.chosen(view, candidates, seed) for seed in range(200)}) == 16


class TestSobol(PolicyContract):
    policy = Sobol()

    def test_it_spreads(self):
        """After 16 of 64 windows every quarter of the field has been seen at least twice, for any seed."""
        candidates = windows(8, 8)
        for seed in range(5):
            order = []
            while len(order) < 16:
                order.append(self.chosen(history(candidates, order, [0.0] * len(order), None), candidates, seed))
            quarters = [(i // 8 >= 4, i % 8 >= 4) for i in order]
            assert min(quarters.count(q) for q in set(quarters)) >= 2
            assert len(set(quarters)) == 4


class TestGreedy(PolicyContract):
    policy = Greedy()

    def test_the_best_evidence_first(self):
        candidates = windows(2, 3)
        assert self.chosen(history(candidates, [], [], [0.0, 1.0, 5.0, 2.0, 3.0, 4.0]), candidates) == 2


class TestBayesUcb(PolicyContract):
    policy = Bayes(acquisition="ucb")
    cases = 25


class TestBayesLogEi(PolicyContract):
    policy = Bayes(acquisition="logei")
    cases = 12


class TestBayesMaxVariance(PolicyContract):
    policy = Bayes(acquisition="max_variance")
    cases = 12


def blob(candidates, center, height=40.0, width=6.0):
    positions = np.array([c.center_nm for c in candidates])
    return height * np.exp(-((positions - center) ** 2).sum(axis=1) / (2 * width**2))


def collected(policy, candidates, values, overview, steps):
    order: list[int] = []
    while len(order) < steps:
        view = history(candidates, order, [float(values[i]) for i in order], overview)
        order.append(policy.decide(view, candidates, 0).explanation.candidate)
    return float(sum(values[i] for i in order))


def test_bayes_collects_more_than_its_evidence_alone_and_than_chance():
    """Blobs seen through a noisy overview: the sum of what 10 of 64 windows hold, over 6 fields."""
    candidates = windows(8, 8)
    totals = {"bayes": 0.0, "greedy": 0.0, "random": 0.0}
    for seed in range(6):
        random = np.random.default_rng(seed)
        values = blob(candidates, random.uniform(5, 35, 2)) + blob(candidates, random.uniform(5, 35, 2))
        noisy = [float(v) for v in values + random.normal(0, 12, 64)]
        totals["bayes"] += collected(Bayes(), candidates, values, noisy, 10)
        totals["greedy"] += collected(Greedy(), candidates, values, noisy, 10)
        totals["random"] += 10 * values.mean()
    assert totals["bayes"] > totals["greedy"] > 1.5 * totals["random"]


@pytest.mark.slow
def test_shuffled_labels_destroy_the_gain():
    """Leak test: where place tells nothing, place must not help (METHODS 7.5)."""
    candidates = windows(8, 8)
    gains = []
    for seed in range(8):
        random = np.random.default_rng(seed)
        values = random.permutation(blob(candidates, random.uniform(10, 30, 2)))
        gains.append(collected(Bayes(), candidates, values, None, 12) / (12 * values.mean()))
    assert 0.6 < np.mean(gains) < 1.5


def test_a_constant_field_ties_to_the_lowest_index():
    candidates = windows(3, 3)
    assert Greedy().decide(history(candidates, [], [], [1.0] * 9), candidates, 0).explanation.candidate == 0
    view = history(candidates, [0, 4, 8], [1.0] * 3, [1.0] * 9)
    best = Bayes(beta=0.0).decide(view, candidates, 0).explanation
    assert best.candidate == 1


@pytest.mark.parametrize("values", [[1e300] * 3, [5.0] * 3, [1e-300, 0.0, 1e-300], [-1e12, 1e12, 0.0]])
def test_pathological_values_are_survived_and_named(values):
    candidates = windows(3, 3)
    decision = Bayes().decide(history(candidates, [0, 1, 2], values, [float(i) for i in range(9)]), candidates, 0)
    assert decision.explanation.candidate in range(3, 9)


def test_a_failed_fit_takes_the_next_rung_and_says_so(monkeypatch):
    from policies import surrogate

    candidates = windows(3, 3)
    view = history(candidates, [0, 1, 2], [1.0, 7.0, 3.5], [float(i) for i in range(9)])

    def fail(*arguments, **options):
        raise surrogate.FitFailed("injected")

    monkeypatch.setattr("policies.bayes._FITS", type(__import__("policies.bayes").bayes._FITS)())
    monkeypatch.setattr(surrogate, "fit", fail)
    assert "default hyper-parameters" in Bayes().decide(view, candidates, 0).explanation.fallback
    monkeypatch.setattr(surrogate, "posterior", fail)
    explanation = Bayes().decide(view, candidates, 0).explanation
    assert "overview evidence" in explanation.fallback
    assert explanation.candidate == 8
    blind = history(candidates, [0, 1, 2], [1.0, 7.0, 3.5], None)
    assert "space filling" in Bayes().decide(blind, candidates, 0).explanation.fallback


def test_log_expected_improvement_against_its_definition():
    """E[max(y - f, 0)] for y ~ N(m, s^2), by numerical integration."""
    for mean, sd, best in ((0.0, 1.0, 0.5), (2.0, 0.3, 2.5), (-1.0, 2.0, 4.0), (3.0, 0.1, 1.0)):
        y = np.linspace(best, mean + 12 * sd + abs(best - mean), 400_001)
        density = np.exp(-((y - mean) ** 2) / (2 * sd**2)) / (sd * math.sqrt(2 * math.pi))
        truth = float(np.trapezoid((y - best) * density, y))
        ours = float(log_expected_improvement(np.array([mean]), np.array([sd]), best)[0])
        assert ours == pytest.approx(math.log(truth), abs=1e-6)
    far = log_expected_improvement(np.array([0.0, 0.0]), np.array([1.0, 1.0]), 40.0)
    assert np.isfinite(far).all()


def test_another_process_decides_the_same():
    code = (
        "from policies.bayes import Bayes; from policies.contract import *\n"
        "c = windows(6, 6); h = history(c, [0, 7, 20, 31], [3.0, 9.5, 1.25, 4.0], [float(i % 7) for i in range(36)])\n"
        "print(Bayes().decide(h, c, 0).model_dump_json())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    grid = windows(6, 6)
    view = history(grid, [0, 7, 20, 31], [3.0, 9.5, 1.25, 4.0], [float(i % 7) for i in range(36)])
    assert Bayes().decide(view, grid, 0).model_dump_json() == said.strip()
