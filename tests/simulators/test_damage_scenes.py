"""Pairs of frames to learn damage from: repeatable, and damaged where they say, as much as they say."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulators.column_sets import Columns
from simulators.damage_scenes import PATCH_PX, DamageScenes, damaged_fraction


def test_a_pair_depends_on_its_seed_and_index_only():
    scenes = DamageScenes(size_px=60)
    first, again, other = scenes.render(1, 5), scenes.render(1, 5), scenes.render(1, 6)
    for name in ("first", "later", "fraction"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.first, other.first)
    frames = first.exposed(np.random.default_rng(0))
    assert np.array_equal(frames, first.exposed(np.random.default_rng(0)))
    assert not np.array_equal(frames, first.exposed(np.random.default_rng(1)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_fraction_is_the_share_of_the_weight_that_was_hit(seed):
    rng = np.random.default_rng(seed)
    n, pixel = 30, 0.03
    pieces = Columns(rng.uniform(-0.2, 2.0, (n, 2)), rng.uniform(0.1, 1, n), np.zeros((n, 2)), np.ones(n, bool))
    hit = rng.random(n) < 0.5
    got = damaged_fraction(pieces, hit, 3 * PATCH_PX, pixel)
    for row in range(3):
        for col in range(3):
            inside = (np.floor(pieces.xy / (PATCH_PX * pixel)) == (col, row)).all(1)
            total = pieces.weight[inside].sum()
            assert np.isclose(got[row, col], pieces.weight[inside & hit].sum() / total if total else 0.0)


def test_frames_differ_where_matter_was_hit_and_nowhere_else():
    far, wide = [], []
    for index in range(14):
        pair = DamageScenes(clean=True, size_px=100, pixel_nm=(0.03, 0.03), counts=(100.0, 100.0)).render(0, index)
        change = np.abs(pair.later - pair.first).reshape(5, PATCH_PX, 5, PATCH_PX).max((1, 3))
        touched = np.pad(pair.fraction > 0, 1)
        near = np.max([touched[r : r + 5, c : c + 5] for r in range(3) for c in range(3)], axis=0)
        far += list(change[~near])  # 0.6 nm away: but for the probe's tails, and displacements out of the frame
        wide += list(change[pair.fraction > 0.5])
    assert len(far) > 30
    assert len(wide) > 30
    assert np.quantile(far, 0.95) < 1.5
    assert np.quantile(wide, 0.1) > 5.0
