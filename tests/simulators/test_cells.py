import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulators.cells import CellIndex

SIDE = st.floats(-60, 160) | st.just(float("inf")) | st.just(float("-inf"))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 300),
    seed=st.integers(0, 10**6),
    cell=st.floats(0.5, 200),
    a=st.tuples(SIDE, SIDE),
    b=st.tuples(SIDE, SIDE),
)
def test_a_box_holds_every_point_inside_it_and_none_more_than_a_cell_away(n, seed, cell, a, b):
    points = np.random.default_rng(seed).random((n, 2)) * 100.0
    low, high = np.minimum(a, b), np.maximum(a, b)
    found = CellIndex(points, cell).box(low, high)
    assert found.tolist() == sorted(set(found.tolist()))
    inside = np.flatnonzero(np.all((points >= low) & (points <= high), axis=1))
    assert set(inside) <= set(found)
    assert np.all((points[found] >= low - cell * 1.0001) & (points[found] <= high + cell * 1.0001))


def test_a_point_on_the_edge_of_the_box_or_of_a_cell_is_found():
    points = np.array([[0.0, 0.0], [5.0, 5.0], [10.0, 10.0]])
    index = CellIndex(points, 5.0)
    assert index.box((5.0, 5.0), (5.0, 5.0)).tolist() == [1]
    assert index.box((0.0, 0.0), (10.0, 10.0)).tolist() == [0, 1, 2]
