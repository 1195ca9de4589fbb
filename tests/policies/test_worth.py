"""What a window is worth: charges, dead patches, dwell times and sizes, with answers known beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aecontrol.types import Stop
from policies.bayes import Bayes
from policies.contract import PolicyContract, history, several_kinds, windows
from policies.worth import Looks, learn_threshold, log_price, shown, unseen


class TestBayesPerDamage(PolicyContract):
    policy = Bayes(cost="damage")
    cases = 6


GRID = windows(4, 6)
X = np.array([region.center_nm[0] for region in GRID])
RICH = [float(value) for value in 4.0 + X / 10.0]
"""Overview evidence that grows slowly to the right."""
SOFT = np.where(X > 15.0, 10.0, 1.0).tolist()
"""Damage charged: ten times as much in the right half."""
SCANNED = [0, 9, 14, 23]


def choice(policy, overview=RICH, **of_damage):
    view = history(GRID, SCANNED, [overview[i] for i in SCANNED], overview, **of_damage)
    return policy.decide(view, GRID, 0).explanation


def test_per_damage_the_hardy_half_comes_first():
    """Targets are a quarter denser where the beam does ten times the harm."""
    assert X[choice(Bayes(), damage=SOFT).candidate] > 15.0
    assert X[choice(Bayes(cost="electrons"), damage=SOFT).candidate] > 15.0
    thrifty = choice(Bayes(cost="damage"), damage=SOFT)
    assert X[thrifty.candidate] < 15.0
    assert "charge 1 nm^2 of damage" in thrifty.why


@pytest.mark.parametrize("unit", [1e-9, 1e6])
def test_the_unit_of_the_charge_does_not_matter(unit):
    scaled = [unit * damage for damage in SOFT]
    assert choice(Bayes(cost="damage"), damage=scaled).candidate == choice(Bayes(cost="damage"), damage=SOFT).candidate


def test_what_is_free_is_not_worth_everything():
    """A window that costs nothing, where nothing is expected."""
    overview = [1e-6 if i == 5 else 5.0 for i in range(24)]
    damage = [0.0 if i == 5 else 1.0 for i in range(24)]
    few = history(GRID, [], [], overview, damage=damage)
    assert Bayes(cost="damage").decide(few, GRID, 0).explanation.candidate != 5


def test_expected_improvement_cools():
    """The hardy half while the budget is full; where the single best one is, when it is nearly spent."""
    policy = Bayes(acquisition="logei", cost="damage")
    damage = [value**2 for value in SOFT]
    assert X[choice(policy, damage=damage, left=1.0).candidate] < 15.0
    assert X[choice(policy, damage=damage, left=0.01).candidate] > 15.0


@pytest.mark.parametrize("policy", [Bayes(), Bayes(acquisition="logei"), Bayes(cost="damage"), Bayes(cost="electrons")])
def test_nobody_parks_on_dead_patches(policy):
    """The right half is dead: to scan it again costs as little damage as there is left to see."""
    dead = np.where(X > 15.0, 1e-2, 1.0).tolist()
    damage = dead
    assert X[choice(policy, damage=damage).candidate] > 15.0
    assert X[choice(policy, damage=damage, validity=dead).candidate] < 15.0
    for values in (-10.0, 0.0):  # not even where little is expected anywhere
        overview = [values] * 24
        assert X[choice(policy, overview, damage=damage, validity=dead).candidate] < 15.0


# ---------------------------------------------------------------- several kinds of windows

KINDS = several_kinds()  # 16 short windows, the same 16 four times as long, 4 large ones with a short dwell


def test_what_is_left_to_see():
    """Scanned at length: nothing is left for any window on that place, and a large one has three quarters to go.
    Scanned in short: only what more electrons show."""
    looks = Looks.of(KINDS, KINDS[0])
    assert np.allclose(looks.exposure, np.repeat([1.0, 4.0, 1.0], [16, 16, 4]))
    assert np.allclose(looks.area, np.repeat([1.0, 4.0], [32, 4]))
    left = unseen(KINDS, looks, history(KINDS, [16], [3.0], None), 2.0)
    assert left[[0, 1, 16, 17]] == pytest.approx([0.0, 1.0, 0.0, 1.0])
    assert left[32:] == pytest.approx([0.75, 1.0, 1.0, 1.0])
    short, long = shown(np.array([1.0, 4.0]), 2.0)
    left = unseen(KINDS, looks, history(KINDS, [0], [3.0], None), 2.0)
    assert left[16] == pytest.approx((long - short) / long)
    abstained = unseen(KINDS, looks, history(KINDS, [0], [None], None), 2.0)
    assert np.array_equal(abstained, left)


def seen_by(threshold: float, scans: list[int], random: np.random.Generator) -> list[float]:
    """How many of some 20 targets on 25 nm^2, drawn anew for each place, a scan shows."""
    looks = Looks.of(KINDS, KINDS[0])
    there = random.poisson(20.0 * looks.area[scans])
    return [float(n) for n in random.binomial(there, shown(looks.exposure[scans], threshold))]


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_exposure_that_shows_targets_is_learned(true):
    """Within a factor of 1.5 on average over fields, from 12 sub-scans of two dwell times."""
    from policies.surrogate import Design

    scans = [0, 2, 5, 7, 8, 10, 17, 19, 20, 22, 29, 31]
    places = np.array([KINDS[i].center_nm for i in scans]) / 20.0
    learned = []
    for seed in range(8):
        values = np.array(seen_by(true, scans, np.random.default_rng(seed)))
        looks = Looks.of([KINDS[i] for i in scans], KINDS[0])
        design = Design(places, np.zeros((len(scans), 0)))
        learned.append(np.log(learn_threshold(design, values, values, looks, np.array([0.25, 0.25]))))
    assert abs(np.mean(learned) - np.log(true)) < np.log(1.5)


@pytest.mark.parametrize(("true", "long"), [(0.4, False), (4.0, True)])
def test_electrons_go_where_the_signal_needs_them(true, long):
    """Per electron: short scans where they show all, long ones where short ones show next to nothing."""
    scans = [0, 3, 5, 10, 12, 17, 22, 24, 29, 31]
    policy = Bayes(cost="electrons")
    taken = []
    for seed in range(4):
        view = history(KINDS[:32], scans, seen_by(true, scans, np.random.default_rng(seed)), None)
        taken.append(policy.decide(view, KINDS[:32], 0).explanation.candidate >= 16)
    assert sum(taken) >= 3 if long else sum(taken) <= 1


def test_a_place_is_not_scanned_twice_for_what_is_known():
    """Ten scans of 16 places: the next one goes to a new place, whichever its kind."""
    scans = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    view = history(KINDS, scans, seen_by(0.5, scans, np.random.default_rng(0)), None)
    chosen = Bayes(cost="electrons").decide(view, KINDS, 0).explanation.candidate
    assert chosen % 16 >= 10 if chosen < 32 else chosen in (34, 35)


def test_a_session_ends_when_nothing_is_left_to_see():
    """Every place was scanned at length: the short windows are feasible, and worth nothing. Not so one kind alone."""
    scans = list(range(16, 32))
    view = history(KINDS, scans, [3.0] * 16, None)
    decision = Bayes(cost="electrons").decide(view, KINDS, 0)
    assert decision.kind == "stop"
    assert "none would show anything" in decision.reason
    alike = KINDS[:16]
    view = history(alike, list(range(15)), [0.0] * 15, None)
    assert Bayes(cost="electrons").decide(view, alike, 0).explanation.candidate == 15


def test_where_the_overview_shows_what_is_known_already_the_rest_is_next():
    """Only one place has evidence, and it was scanned at length: no other has any to be chosen by."""
    overview = [5.0 if place % 16 == 0 and place < 32 else None for place in range(len(KINDS))]
    view = history(KINDS, [16], [3.0], overview)
    explanation = Bayes(cost="electrons").decide(view, KINDS, 0).explanation
    assert explanation.candidate not in (0, 16)
    assert "no overview evidence" in explanation.why
    assert "nan" not in explanation.why


@pytest.mark.parametrize("overview", [RICH, None])
def test_dead_matter_is_not_scanned_before_the_surrogate_is_asked_either(overview):
    alive = [0.8 if place in (7, 9) else 0.0 for place in range(len(GRID))]
    one = history(GRID, [9], [1.0], overview, validity=alive)
    assert Bayes().decide(one, GRID, 0).explanation.candidate == 7
    none = history(GRID, [9], [1.0], overview, validity=[0.0] * len(GRID))
    assert isinstance(Bayes().decide(none, GRID, 0), Stop)


@pytest.mark.parametrize("policy", [Bayes(), Bayes(cost="electrons"), Bayes(acquisition="max_variance")])
def test_as_many_electrons_in_finer_pixels_show_nothing_new(policy):
    """Two kinds of windows of equal size and exposure are still two: a place that one has seen is not offered again."""
    twice = (*windows(3, 3, dwell_time_s=4e-6), *windows(3, 3, pixels=32))
    scans = [0, 1, 2, 3, 4, 5, 6, 7]
    view = history(twice, scans, [9.0, 8.0, 9.0, 7.0, 9.0, 8.0, 9.0, 0.0], None)
    assert policy.decide(view, twice, 0).explanation.candidate in (8, 17)


def test_where_pixels_are_the_currency_the_charge_cools_with_their_budget():
    """On a record no electrons are counted."""
    view = history(GRID, [], [], RICH)
    charges = [c.model_copy(update={"electrons": None, "pixels": 10 * (i + 1)}) for i, c in enumerate(view.charges)]
    view = replace(view, charges=tuple(charges), left={"pixels": 0.25})
    whole = log_price(view, "electrons", cools=False)
    assert np.allclose(log_price(view, "electrons", cools=True), 0.25 * whole)


def test_rounding_leaves_nothing_to_see():
    """Exposures that differ in their last digits only show the same."""
    twice = (*windows(2, 2), *windows(2, 2, dwell_time_s=1e-6 * (1.0 + 1e-12)))
    view = history(twice, [0, 1, 2, 3], [3.0] * 4, None)
    assert (unseen(twice, Looks.of(twice, twice[0]), view, 1.0) == 0.0).all()
    assert Bayes(cost="electrons").decide(view, twice, 0).kind == "stop"
