"""Scoring: matching is optimal, merging leaves distinct objects, curves count what was paid."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.errors import BadInput
from aecontrol.protocols import Change, Truth
from aecontrol.scoring import match, merge_duplicates, recall_curve, score, spent_at_recall
from aecontrol.true_damage import true_damage
from tests.windows import inside_boxes, oracle_order, pixels_spent, random_order, window_boxes

COORDINATE = st.integers(0, 12).map(float)
POINTS = st.lists(st.tuples(COORDINATE, COORDINATE), max_size=5)


def brute_force(found, true, gate):
    """(most pairs, smallest sum of distances) by trying every assignment."""
    best = (0, 0.0)
    for count in range(1, min(len(found), len(true)) + 1):
        for left in itertools.combinations(found, count):
            for right in itertools.permutations(true, count):
                lengths = [math.dist(a, b) for a, b in zip(left, right, strict=True)]
                if max(lengths) <= gate and (best[0] < count or sum(lengths) < best[1]):
                    best = (count, sum(lengths))
    return best


@settings(max_examples=60, deadline=None)
@given(found=POINTS, true=POINTS)
def test_matching_is_the_best_of_all_assignments(found, true):
    gate = 3.0
    left, right = match(found, true, gate)
    pairs = [math.dist(found[i], true[j]) for i, j in zip(left, right, strict=True)]
    assert len(set(left)) == len(left) == len(set(right))
    assert (len(pairs), pytest.approx(sum(pairs))) == brute_force(found, true, gate)


@given(points=st.lists(st.tuples(COORDINATE, COORDINATE), max_size=40))
def test_merging_keeps_one_find_of_each_neighbourhood(points):
    xy = np.asarray(points, float).reshape(-1, 2)
    kept = merge_duplicates(xy, 2.5)
    for i, j in itertools.combinations(kept, 2):
        assert math.dist(xy[i], xy[j]) >= 2.5
    for point in xy:
        assert np.hypot(*(xy[kept] - point).T).min() < 2.5


def test_merging_keeps_the_most_confident_and_no_chain_is_swallowed():
    row = [(0.0, 0.0), (0.9, 0.0), (1.8, 0.0)]
    assert merge_duplicates(row, 1.0).tolist() == [0, 2]
    assert merge_duplicates(row, 1.0, confidence=[0.1, 0.9, 0.1]).tolist() == [1]
    assert merge_duplicates([(0.0, 0.0), (1.0, 0.0)], 1.0).tolist() == [0, 1]  # "closer than", not "at"


def test_score_counts_duplicates_once_and_false_finds_against_precision():
    truth = [(1.0, 1.0), (5.0, 5.0), (9.0, 9.0)]
    result = score([(1.05, 1.0), (0.97, 1.0), (5.3, 5.0), (9.05, 9.05)], truth, 0.2)
    assert (result.found, result.true, result.matched) == (3, 3, 2)
    assert result.precision == result.recall == pytest.approx(2 / 3)
    nothing = score([], truth, 0.2)
    assert (nothing.precision, nothing.recall) == (None, 0.0)
    assert score([], [], 0.2).recall is None


def test_recall_never_falls_when_finds_far_from_each_other_are_added():
    truth = np.argwhere(np.ones((4, 5))) * 2.0
    curve = recall_curve([truth[:7] + 0.05, [], truth[5:12], [(50.0, 50.0)]], truth, 0.2)
    assert curve.tolist() == [7 / 20, 7 / 20, 12 / 20, 12 / 20]
    assert spent_at_recall([10, 20, 30, 40], curve, 0.6) == 30
    assert spent_at_recall([10, 20, 30, 40], curve, 0.61) == math.inf


@given(
    shape=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    size=st.integers(1, 5),
    stride=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_all_windows_in_any_order_pay_for_the_whole_field_once(shape, size, stride, seed):
    boxes = window_boxes(shape, size, min(stride, size))
    overview = np.zeros(shape, bool)
    overview[2::4, 2::4] = True
    paid = pixels_spent(boxes, random_order(len(boxes), seed), overview)
    assert paid[-1] == shape[0] * shape[1]
    assert (np.diff(paid) >= 0).all()


def test_oracle_finds_everything_no_later_than_raster_or_random():
    rng = np.random.default_rng(3)
    xy = rng.uniform(0, 64, (30, 2))
    boxes, fresh = window_boxes((64, 64), 8), np.zeros((64, 64), bool)
    inside = inside_boxes(boxes, xy)
    assert (inside.sum(0) == 1).all()  # without overlap every atom lies in exactly one window

    def pixels(order):
        finds = [xy[inside[k]] for k in order]
        return spent_at_recall(pixels_spent(boxes, order, fresh), recall_curve(finds, xy, 1e-6), 0.8)

    oracle = pixels(oracle_order(boxes, xy, fresh))
    assert oracle < min(pixels(np.arange(64)), *(pixels(random_order(64, s)) for s in range(5)))
    counts = np.sort(inside.sum(1))[::-1].cumsum()
    assert oracle == 64 * (np.argmax(counts >= 24) + 1)  # equal costs: fullest windows first is optimal


@pytest.mark.parametrize("bad", [[1.0, 2.0], [(1.0, 2.0, 3.0)], [(math.nan, 0.0)]])
def test_positions_that_are_not_finite_pairs_are_refused(bad):
    with pytest.raises(BadInput, match="positions"):
        score(bad, [(0.0, 0.0)], 0.1)


def test_useless_gate_windows_and_truth_are_refused():
    with pytest.raises(BadInput, match="gate"):
        match([(0.0, 0.0)], [(0.0, 0.0)], 0.0)
    with pytest.raises(BadInput, match="windows"):
        window_boxes((8, 8), 9)
    with pytest.raises(BadInput, match="no object"):
        recall_curve([[]], [], 0.1)


def test_true_damage_is_the_share_of_the_scattering_power_that_left_its_place():
    """Two tiles: a heavy and a light atom and a vacant site; two like atoms. One more atom outside the field."""
    sites = np.array([[0.2, 0.3, 42], [0.7, 0.3, 16], [0.5, 0.9, 0], [1.2, 0.1, 16], [1.8, 0.8, 16], [-0.5, 0.5, 6]])
    light = 16**1.7 / (42**1.7 + 16**1.7)

    def share(*changes, **options):
        steps = tuple(Change((0.0, 0.0), kind, 1.0, time, site) for time, (kind, site) in enumerate(changes))
        truth = Truth(np.empty((0, 2)), (), atoms=np.empty((0, 2)), changes=steps, sites=sites)
        return true_damage(truth, (2.0, 1.0), **options)

    assert share().tolist() == [[0.0, 0.0]]
    assert share(("removed", 1), ("displaced", 3))[0] == pytest.approx([light, 0.5])
    assert share(("removed", 1), ("displaced", 3), until_s=0.5)[0] == pytest.approx([light, 0.0])
    assert share(("removed", 1), ("healed", 1))[0] == pytest.approx([0.0, 0.0])
    assert share(("removed", 1), ("hopped", 3), ("hopped", 1))[0] == pytest.approx([0.0, 0.5])
    assert share(("removed", 5), margin=1).tolist() == [[0.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert true_damage(Truth(np.empty((0, 2)), ()), (2.0, 1.0)) is None
