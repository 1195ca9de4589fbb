"""From two frames to a reading of damage: registration, kernel, metrics, null."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from aecontrol.errors import BadInput
from aecontrol.perception.damage import classical
from aecontrol.perception.damage.meter import METRICS, Comparison, build_meter, compare, drawn_repeats
from aecontrol.perception.damage.null import denoised
from aecontrol.perception.damage.pair import Pair, in_counts
from aecontrol.perception.damage.reading import benjamini_hochberg
from aecontrol.perception.damage.register import Registration, register
from tests.perception.damage_frames import Crystal, counts

CRYSTAL = Crystal.square()
PX = (0.02, 0.02)
LIMIT_NM = 0.1


def test_a_shift_is_found_to_a_twentieth_of_a_pixel_and_resampling_keeps_the_noise():
    for seed, shift in enumerate(((0.3, -0.2), (3.4, -2.45), (-1.5, 0.75))):
        found = register(counts(CRYSTAL.still, 20, seed), counts(CRYSTAL.shows(shift), 20, 90 + seed), PX, LIMIT_NM)
        assert found.reason == ""
        assert found.shift_px == pytest.approx(shift, abs=0.05)
        inside = found.valid((200, 200))
        back = found.apply(CRYSTAL.shows(shift))
        assert np.abs(back - CRYSTAL.still)[inside].max() < 0.1  # at the rim
        noise = np.random.default_rng(seed).normal(size=(200, 200))
        assert found.apply(noise)[inside].std() == pytest.approx(noise.std(), rel=0.01)
        assert inside.mean() > 0.9


def test_rows_are_moved_only_where_they_jitter():
    jitter = np.random.default_rng(4).normal(0.0, 0.5, 200)
    first, later = counts(CRYSTAL.still, 50, 1), counts(CRYSTAL.shows(rows=jitter), 50, 2)
    found = register(first, later, PX, LIMIT_NM)
    left = found.rows_px - (jitter - jitter.mean())
    assert left.std() < 0.5 * jitter.std()
    still = register(first, counts(CRYSTAL.still, 50, 3), PX, LIMIT_NM)
    assert not still.rows_px.any()
    assert still.residual_px < 0.1


def test_rows_that_jitter_across_are_part_of_the_null():
    z, p = [], []
    for seed in range(4):
        first, later = (
            counts(CRYSTAL.shows(across=np.random.default_rng([seed, k]).normal(0.0, 0.1, 200)), 100, 2 * seed + k)
            for k in (0, 1)
        )
        assert register(first, later, PX, LIMIT_NM).across_px == pytest.approx(np.sqrt(0.02), abs=0.04)
        reading = build_meter("glr", "cpu").read(first, later, PX, LIMIT_NM)
        z.append((reading.score / reading.sd)[reading.valid])
        p.append(reading.p[reading.valid])
    assert abs(np.concatenate(z).mean()) < 0.2
    assert (np.concatenate(p) < 0.01).mean() <= 0.025
    still = register(counts(CRYSTAL.still, 100, 1), counts(CRYSTAL.still, 100, 2), PX, LIMIT_NM)
    assert still.across_px < 0.06


def test_rows_that_only_one_frame_shows_say_nothing_of_jitter():
    away = (0.3, 25.4)
    first, later = (
        counts(CRYSTAL.shows(shift, across=np.random.default_rng(k).normal(0.0, 0.15, 200)), 20, k)
        for k, shift in enumerate(((0.0, 0.0), away))
    )
    assert register(first, later, PX, LIMIT_NM, (0, 25)).across_px == pytest.approx(0.21, abs=0.06)
    still = register(counts(CRYSTAL.still, 20, 0), counts(CRYSTAL.shows(away), 20, 1), PX, LIMIT_NM, (0, 25))
    assert still.across_px == still.jitters_px == 0.0


def test_what_damage_and_focus_do_to_columns_along_the_rows_is_not_taken_for_jitter():
    still = Crystal.square(turn=0.0)
    for seed in range(3):
        kept = np.random.default_rng(seed).uniform(0.3, 1.0, len(still.at))
        worn = replace(still, weight=kept * still.weight)
        found = register(counts(still.still, 50, seed), counts(worn.shows(blur=2.4), 50, 9 + seed), PX, LIMIT_NM)
        assert found.reason == ""
        assert max(found.across_px, found.jitters_px) < 0.12


def test_the_kernel_takes_up_dose_and_focus():
    first, later = counts(CRYSTAL.still, 50, 1), counts(CRYSTAL.shows(blur=2.3), 60, 2)
    pair = Pair.of(first, later, np.ones(first.shape, dtype=bool))
    expected = 60 * (0.1 + 0.9 * CRYSTAL.shows(blur=2.3))
    clean = pair.kernel.apply(50 * (0.1 + 0.9 * CRYSTAL.still))
    unmatched = 1.2 * 50 * (0.1 + 0.9 * CRYSTAL.still)
    inner = np.s_[10:-10, 10:-10]
    assert np.abs(clean - expected)[inner].mean() < 0.25 * np.abs(unmatched - expected)[inner].mean()


def test_undamaged_patches_are_rarely_flagged_whatever_else_changed():
    meter, p = build_meter("glr", "cpu"), []
    for peak in (5, 20, 100):
        jitter = [np.random.default_rng([peak, k]).normal(0.0, 0.2, 200) for k in (0, 1)]
        first = counts(CRYSTAL.shows(rows=jitter[0]), peak, 10)
        later = counts(1.1 * CRYSTAL.shows((0.3, -0.2), 2.2, jitter[1]), peak, 11)
        reading = meter.read(first, later, PX, LIMIT_NM)
        assert reading.reason == ""
        assert abs(reading.mean_score) < np.nanmedian(reading.sd)
        assert not reading.flagged.any()
        p.append(reading.p[reading.valid])
    assert (np.concatenate(p) < 0.01).mean() <= 0.03
    assert 0.3 < np.concatenate(p).mean() < 0.75


def test_damage_is_found_where_it_is():
    reading = build_meter("glr", "cpu").read(
        counts(CRYSTAL.still, 20, 20), counts(CRYSTAL.without(70, 110, 28).shows((0.4, 0.1)), 20, 21), PX, LIMIT_NM
    )
    middle = (np.stack(np.meshgrid(*(np.arange(10),) * 2), -1) + 0.5) * 20
    away = np.hypot(middle[..., 0] - 70, middle[..., 1] - 110)
    assert reading.flagged[away < 18].all()
    assert not reading.flagged[(away > 55) & reading.valid].any()
    assert np.isnan(reading.score[~reading.valid]).all()
    assert (reading.p[~reading.valid] == 1).all()
    again = build_meter("glr", "cpu").read(
        counts(CRYSTAL.still, 20, 20), counts(CRYSTAL.without(70, 110, 28).shows((0.4, 0.1)), 20, 21), PX, LIMIT_NM
    )
    np.testing.assert_array_equal(reading.score, again.score)


@pytest.mark.parametrize("name", METRICS)
def test_damaged_frames_differ_more_than_a_repeat_does(name):
    first, everywhere = counts(CRYSTAL.still, 20, 1), np.ones((200, 200), dtype=bool)
    repeat, damaged = (
        METRICS[name](Pair.of(first, later, everywhere))
        for later in (counts(CRYSTAL.still, 20, 2), counts(CRYSTAL.without(100, 100, 40).shows(), 20, 2))
    )
    assert repeat.shape == (10, 10)
    assert damaged[3:7, 3:7].mean() > repeat[3:7, 3:7].mean() + repeat.std() / 2
    assert damaged[:2].mean() < repeat[:2].mean() + 0.5 * repeat.std()


def test_the_likelihood_ratio_of_flat_frames_is_that_of_two_poisson_counts():
    a, b = np.full((40, 40), 6.0), np.full((40, 40), 9.0)
    pair = Pair(a, b, np.ones(a.shape, dtype=bool), 1.0)  # a dose ratio of 1 is known: 4 patches are too few to fit it
    rate = 7.5
    expected = 6.0 * np.log(6.0 / rate) + 9.0 * np.log(9.0 / rate)
    assert classical.likelihood_ratio(pair) == pytest.approx(np.full((2, 2), expected))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.001, 0.3))
@settings(max_examples=25, deadline=None)
def test_false_discovery_control_agrees_with_scipy(p, rate):
    values = np.array(p)
    adjusted = false_discovery_control(values)
    clear = np.abs(adjusted - rate) > 1e-9 * rate
    found = benjamini_hochberg(values, np.ones(values.shape, dtype=bool), rate)
    np.testing.assert_array_equal(found[clear], (adjusted <= rate)[clear])


def test_any_gain_and_offset_of_the_detector_come_back_to_counts():
    frame = counts(CRYSTAL.still, 40, 5)
    assert in_counts(frame) is frame
    found = in_counts(3.7 * frame - 50.0)
    assert found.mean() == pytest.approx(frame.mean(), rel=0.15)
    assert np.polyfit(frame.ravel(), found.ravel(), 1)[0] == pytest.approx(1.0, rel=0.15)


def test_denoising_keeps_the_crystal():
    truth = 20 * (0.1 + 0.9 * CRYSTAL.still)
    clean = denoised(counts(CRYSTAL.still, 20, 6))
    assert ((clean - truth) ** 2).mean() < 0.1 * truth.mean()  # of the variance of the noise
    assert clean.min() >= 0


def test_frames_that_tell_nothing_are_refused_with_a_reason():
    meter = build_meter("glr", "cpu")
    a = counts(CRYSTAL.still, 20, 1)
    elsewhere = counts(np.random.default_rng(3).random((200, 200)), 20, 2)
    hole = a.copy()
    hole[3, 4] = np.nan
    for other, why in (
        (a[:180], "differ in shape"),
        (hole, "not numbers"),
        (np.zeros_like(a), "no contrast"),
        (elsewhere, "hardly correlate"),
    ):
        reading = meter.read(a, other, PX, LIMIT_NM)
        assert why in reading.reason
        assert not reading.valid.any()
        assert not reading.flagged.any()
        assert np.isnan(reading.mean_score)


def test_what_a_lattice_leaves_open_is_not_decided():
    alike = replace(CRYSTAL, weight=np.ones_like(CRYSTAL.weight))
    half = (5.35 * np.cos(0.3), 5.35 * np.sin(0.3))
    reading = build_meter("glr", "cpu").read(counts(alike.still, 20, 1), counts(alike.shows(half), 20, 2), PX, 0.15)
    assert "fits about as well" in reading.reason


def test_a_metric_that_does_not_exist_and_weights_without_a_use_are_refused(tmp_path):
    with pytest.raises(BadInput, match="'none' is not known"):
        build_meter("none", "cpu")
    with pytest.raises(BadInput, match="has no weights"):
        build_meter("glr", "cpu", tmp_path / "w")


def test_the_learned_metric_says_nothing_of_frames_darker_than_those_it_learned_from():
    random, meter = np.random.default_rng(0), build_meter("learned", "cpu")
    for level, dark in ((0.5, True), (20.0, False)):
        first, later = random.poisson(level, (2, 100, 100)).astype(float)
        pair = Pair.of(first, later, np.ones(first.shape, dtype=bool))
        assert ("counts in the brightest pixels" in meter._too_dark(pair)) == dark
    comparison = Comparison((100, 100), Registration.none(""), pair)
    sober = replace(meter, least_counts=1e6)
    assert "counts in the brightest pixels" in sober.judge(comparison, [pair]).reason


def test_less_damage_than_none_is_no_reading_of_a_metric_that_estimates_it():
    first, later = counts(CRYSTAL.still, 50, 1), counts(CRYSTAL.still, 50, 2)
    comparison = compare(first, later, PX, LIMIT_NM)
    worn = [compare(first, counts(CRYSTAL.without(100, 100, 60).still, 50, k), PX, LIMIT_NM).pair for k in (3, 4)]
    assert "makes no sense" in build_meter("learned", "cpu").judge(comparison, worn).reason
    assert build_meter("glr", "cpu").judge(comparison, worn).reason == ""
    assert build_meter("learned", "cpu").judge(comparison, drawn_repeats(comparison)).reason == ""
