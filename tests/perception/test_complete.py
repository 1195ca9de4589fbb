"""What a crystal adds to the finds of a network, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from aecontrol.perception.complete import UNSURE_NM, Candidates, complete
from aecontrol.perception.finder import AtomFinder
from aecontrol.perception.learn_atoms import match
from tests.benchmarks import find_f1
from tests.perception.test_sites import PIXEL, crystal, draw

SIZE = 5.0


def seen(xy, share, seed=0, scatter=0.015):
    """What a network may report at few counts: ``share`` of the columns, a little off, with middling confidence."""
    random = np.random.default_rng(seed)
    at = xy[random.random(len(xy)) < share]
    return at + random.normal(0, scatter, at.shape)


def completed(xy, counts, finds, confidence=0.7):
    """``complete`` of the finds in a Poisson image of the columns."""
    image = draw(xy, counts, SIZE)
    return complete(image, (PIXEL, PIXEL), finds, np.full(len(finds), confidence), 0.5)


def f1(at, xy):
    hits, finds, there, _ = match(at, xy, np.array([SIZE, SIZE]), 0.05, np.ones(len(xy), dtype=bool))
    return 2 * hits / (finds + there)


@pytest.mark.parametrize(("name", "share"), [("MoS2", 0.6), ("graphene", 0.75), ("SrTiO3", 0.6)])
def test_at_ten_counts_the_lattice_finds_what_was_passed_over(name, share):
    xy, _, counts = crystal(name, SIZE)
    counts = counts * 10 / counts.min()
    inside = ((xy > 0.2) & (xy < SIZE - 0.2)).all(1)
    finds = seen(xy, share)
    phantoms = np.random.default_rng(1).uniform(0.2, SIZE - 0.2, (len(xy) // 20, 2))
    phantoms = phantoms[cKDTree(xy).query(phantoms)[0] > 0.07]
    got = completed(xy, counts, np.concatenate([finds, phantoms]))
    assert f1(finds, xy) < 0.88
    assert f1(got.xy, xy) > 0.98
    assert got.completed.sum() > 0.8 * (1 - share) * inside.sum()
    added = got.xy[got.completed]
    added = added[((added > 0.2) & (added < SIZE - 0.2)).all(1)]
    assert cKDTree(xy).query(added)[0].max() < 0.05


@pytest.mark.parametrize("damage", [0.04, 0.3])
def test_a_site_whose_counts_speak_against_an_atom_stays_vacant(damage):
    xy, kind, counts = crystal("MoS2", SIZE)
    random = np.random.default_rng(4)
    gone = (kind == 1) & (random.random(len(xy)) < damage) & ((xy > 0.3) & (xy < SIZE - 0.3)).all(1)
    finds = seen(xy[~gone], 0.85)
    got = completed(xy[~gone], counts[~gone] / 4, finds)  # 50 counts
    assert cKDTree(got.xy).query(xy[gone])[0].min() > 0.1
    assert f1(got.xy, xy[~gone]) > 0.99


def test_a_false_find_on_a_vacant_site_goes():
    xy, kind, counts = crystal("MoS2", SIZE)
    hole = np.flatnonzero((kind == 1) & (np.hypot(*(xy - SIZE / 2).T) < 1))[::4]
    there = np.setdiff1d(np.arange(len(xy)), hole)
    got = completed(xy[there], counts[there] / 4, np.concatenate([seen(xy[there], 0.9), xy[hole]]))
    assert cKDTree(got.xy).query(xy[hole])[0].min() > 0.1


def test_the_crystal_ends_where_it_ends():
    xy, _, counts = crystal("SrTiO3", SIZE)
    there = (np.hypot(*(xy - 3.0).T) > 0.9) & (xy[:, 0] + 0.4 * xy[:, 1] < 5.4)
    got = completed(xy[there], counts[there] / 40, seen(xy[there], 0.8))
    assert cKDTree(xy[there]).query(got.xy)[0].max() < 0.06
    assert f1(got.xy, xy[there]) > 0.97


@pytest.mark.parametrize("counts", [10.0, 300.0])
def test_without_a_crystal_the_finds_stay_as_they_were(counts):
    xy = np.random.default_rng(2).uniform(0.1, SIZE - 0.1, (150, 2))
    confidence = np.random.default_rng(3).uniform(0.3, 1.0, len(xy))
    got = complete(draw(xy, np.full(len(xy), counts), SIZE), (PIXEL, PIXEL), xy, confidence, 0.5)
    kept = np.flatnonzero(confidence >= 0.5)
    assert (got.peak == kept).all()
    assert (got.xy == xy[kept]).all()
    assert (got.confidence == confidence[kept]).all()
    assert (got.settled(xy[kept], np.full((len(kept), 2), 0.03))[0] == xy[kept]).all()
    assert len(complete(np.ones((50, 50)), (PIXEL, PIXEL), np.zeros((0, 2)), np.zeros(0), 0.5).xy) == 0


@given(st.floats(1e-4, 0.1), st.floats(1e-4, 0.1), st.floats(-0.1, 0.1))
def test_counts_and_lattice_are_weighed_by_their_precision(sigma, scatter, off):
    at, error = np.array([[off, 0.0]]), np.array([[sigma, sigma]])
    one = np.ones(1)
    candidates = Candidates(at, one, np.array([0]), np.array([0]), np.zeros((1, 2)), scatter * one)
    xy, posterior = candidates.settled(at, error)
    if sigma <= UNSURE_NM:  # well seen: the lattice has no say
        assert (xy == at).all()
        assert (posterior == error).all()
    else:
        assert xy[0, 0] == pytest.approx(off / (1 + (sigma / scatter) ** 2), abs=1e-12)
        assert posterior.max() < min(sigma, scatter)


@pytest.mark.parametrize("name", ["graphene", "MoS2"])
def test_nothing_is_painted_into_a_large_hole_of_a_bright_crystal(name):
    """In its middle all 24 nearest sites are empty: their level must not pass for that of full columns."""
    xy, _, counts = crystal(name, SIZE)
    there = np.hypot(*(xy - 2.5).T) > 1.5
    xy = (xy + np.random.default_rng(1).normal(0, 0.005, xy.shape))[there]
    image = draw(xy, 3 * counts[there], SIZE, 1, background=1.25)
    got = complete(image, (PIXEL, PIXEL), xy, np.ones(len(xy)), 0.5)
    assert cKDTree(xy).query(got.xy)[0].max() < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("material", [*find_f1.TRAINED, *find_f1.UNSEEN])
@pytest.mark.parametrize(("counts", "least"), [(10.0, 0.92), (50.0, 0.98)])
def test_crystals_are_found_whole_at_few_counts(material, counts, least):
    image, xy, asked, pixel = find_f1.scene(material, counts, 5)
    found = AtomFinder().find(image, (pixel, pixel))
    at = np.stack([found.x_px, found.y_px], 1) * pixel
    hits, finds, there, _ = match(at, xy, np.array([find_f1.SIZE_NM] * 2), 0.05, asked)
    assert 2 * hits / (finds + there) >= least
