"""What a person reads last is what happened."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from aecontrol.aftermath import _oracle, _recall_table, beam_damage
from aecontrol.dose import bound_charge
from aecontrol.protocols import Change, Truth
from aecontrol.state import State, candidate_grid
from aecontrol.types import Atom, Budget, Plan, ScanPlan

from .parts import CAPABILITIES


def state(electrons):
    plan = Plan(
        scan=ScanPlan(fov_nm=(2.0, 2.0), shape=(8, 8), dwell_time_s=1e-5),
        budget=Budget(electrons=electrons),
        match_nm=0.1,
    )
    grid = candidate_grid(plan.scan, CAPABILITIES.field_nm)
    return State(session="s", seed=0, plan=plan, capabilities=CAPABILITIES, candidates=grid)


def test_the_oracle_takes_the_fullest_window_first_and_keeps_the_budget():
    targets = np.array([[0.5, 0.5], [5.0, 3.0], [5.5, 3.5], [4.5, 2.5], [3.0, 1.0]])  # 1, 3 and 1 in three windows
    one = bound_charge(state(10**9).candidates[0], CAPABILITIES).electrons
    curve = _oracle(state(2 * one), Truth(targets, ("S1",) * 5))
    assert curve["matched"] == [3.0, 4.0]
    assert curve["charge"] == [one, 2 * one]
    assert _oracle(state(10**9), Truth(targets, ("S1",) * 5))["matched"][-1] == 5.0


def test_recall_is_read_off_the_curves_at_quarters_of_the_charge():
    summary = {
        "contract": {"targets": {"true": 10}},
        "curve": {"charge": [10.0, 20.0, 40.0], "matched": [0.0, 4.0, 8.0]},
        "comparison": {"random": {"curve": {"charge": [30.0], "matched": [5.0]}}},
    }
    lines = _recall_table(summary, "pixels")
    assert lines[1].split()[-4:] == ["0.00", "0.40", "0.40", "0.80"]
    assert lines[2].split() == ["random", "0.00", "0.00", "0.50", "0.50"]


@pytest.mark.parametrize("side", [0, 1])
def test_candidates_cover_the_field_to_its_far_edge(side):
    plan = ScanPlan(fov_nm=(2.0, 2.0), shape=(8, 8), dwell_time_s=1e-5, stride_nm=(1.7, 1.7))
    grid = candidate_grid(plan, (6.5, 4.3))
    assert max(r.center_nm[side] + 1.0 for r in grid) == pytest.approx((6.5, 4.3)[side])
    assert min(r.center_nm[side] - 1.0 for r in grid) == pytest.approx(0.0)


def test_finds_that_the_beam_made_are_counted_apart():
    there = np.array([[1.0, 1.0], [5.0, 5.0]])
    changes = (
        Change((2.0, 2.0), "removed", 1e3, 0.1),
        Change((3.0, 3.0), "displaced", 1e3, 0.2),
        Change((8.0, 8.0), "removed", 1e3, 0.3),
    )
    finds = [Atom(x_nm=at, y_nm=at, label="S1", confidence=1.0) for at in (1.0, 2.0, 3.0, 7.0)]
    state = SimpleNamespace(found=lambda: finds, plan=SimpleNamespace(match_nm=0.1))
    known = Truth(there, ("S1", "S1"), 10, atoms=np.zeros((1, 2)), changes=changes)
    assert beam_damage(state, known) == {"displaced": 1, "removed": 2, "finds": 2}
    assert beam_damage(state, Truth(there, ("S1", "S1"))) is None
