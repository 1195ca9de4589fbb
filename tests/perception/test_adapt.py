"""Adaptation to a session's own frames: what is taught, and that networks which learnt wrongly are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree

from aecontrol.adapt import Request
from aecontrol.adapt import adapt as adapt_from
from aecontrol.errors import BadInput
from aecontrol.perception.adapt import Adaptation, adapt
from aecontrol.perception.finder import AtomFinder
from aecontrol.perception.guards import Exam, HeldOut, Spots, explain, refusals
from aecontrol.perception.own_frames import Block, Frame, blocks_of, label
from aecontrol.types import Budget
from tests.aecontrol.parts import CountingColumn, Reckless, configuration
from tests.aecontrol.test_session import run

PIXEL, BLUR, SPACING = 0.03, 0.055, 0.26


def sheet(seed, counts=400.0, pixels=176, vacant=0.1):
    """Counts of a square lattice with vacant sites: (image, atoms [n, 2] px, vacant sites [m, 2] px)."""
    rng = np.random.default_rng(seed)
    side = pixels * PIXEL
    sites = np.stack(np.meshgrid(*2 * [np.arange(0.13, side, SPACING)]), -1).reshape(-1, 2) / PIXEL
    empty = rng.random(len(sites)) < vacant
    at = np.arange(pixels) + 0.5
    gx, gy = (np.exp(-0.5 * ((at - c[:, None]) * PIXEL / BLUR) ** 2) for c in sites[~empty].T)
    image = rng.poisson(counts / (2 * np.pi * (BLUR / PIXEL) ** 2) * gy.T @ gx + 0.3).astype(np.float32)
    return image, sites[~empty], sites[empty]


class Altered:
    """The shipped finder with some finds left out, and others added wherever a list says."""

    def __init__(self, keep=1.0, painted=()):
        self.finder, self.keep, self.painted = AtomFinder(), keep, np.reshape(painted, (-1, 2))

    def find(self, image, pixel_size_nm, threshold=0.5, refined=True):
        found = self.finder.find(image, pixel_size_nm, threshold, refined=False)
        kept = np.arange(len(found)) < self.keep * len(found)  # the brightest
        x, y = np.stack([found.x_px, found.y_px])[:, kept]
        painted = self.painted
        if len(painted):
            painted = painted[cKDTree(np.stack([x, y], 1)).query(painted)[0] > 3]
        return replace(
            found,
            x_px=np.append(x, painted[:, 0]),
            y_px=np.append(y, painted[:, 1]),
            confidence=np.append(found.confidence[kept], np.ones(len(painted))),
            disagreement=np.append(found.disagreement[kept], np.zeros(len(painted))),
        )


@pytest.fixture(scope="module")
def exam():
    image, atoms, _ = sheet(1)
    scene = Block(image, (PIXEL, PIXEL), atoms, np.ones(len(atoms), dtype=bool))
    other, there, _ = sheet(2, 150.0, 96)
    return Exam([HeldOut.read(scene, 0)], [Block(other, (PIXEL, PIXEL), there, np.ones(len(there), dtype=bool))])


@pytest.fixture(scope="module")
def poor(exam):
    return exam.sit(Altered(keep=0.8))


@pytest.fixture(scope="module")
def good(exam):
    return exam.sit(Altered())


def test_only_atoms_are_taught_and_vacancies_are_not():
    image, atoms, vacant = sheet(0)
    taught = label(Frame("", image, (PIXEL, PIXEL)), AtomFinder())
    sure = taught.positions_px[taught.wanted]
    assert cKDTree(atoms).query(sure)[0].max() * PIXEL < 0.03
    assert len(sure) > 0.8 * len(atoms)
    assert cKDTree(sure).query(vacant)[0].min() * PIXEL > 0.1


def test_an_atom_that_no_network_sees_is_left_open_never_taught_as_nothing():
    image, atoms, _ = sheet(0)
    taught = label(Frame("", image, (PIXEL, PIXEL)), Altered(keep=0.7))
    assert (cKDTree(taught.positions_px).query(atoms)[0] * PIXEL < 0.06).mean() > 0.99
    assert (~taught.wanted).sum() > 0.2 * len(atoms)


def test_spots_are_linear_and_their_fit_exact():
    rng = np.random.default_rng(0)
    spots = Spots(*rng.uniform(5, 59, (2, 12)), 0.06, (64, 80), (0.03, 0.028))
    intensities = rng.uniform(10, 100, 12)
    image = spots.light(intensities) + np.linspace(2, 5, 80)
    assert np.allclose(spots.light(intensities).sum(), intensities.sum(), rtol=1e-3)
    fitted = spots.fit(image, np.ones(image.shape))
    assert np.allclose(fitted[:12], intensities, rtol=0.01)
    assert np.allclose(spots.image(fitted), image, atol=0.05)


@pytest.mark.parametrize("gain", [1.0, 7.3])
def test_halves_share_the_specimen_but_no_noise(gain):
    image, atoms, _ = sheet(3, pixels=128)
    piece = HeldOut(gain * image.astype(float), (PIXEL, PIXEL), *atoms.T, len(atoms), BLUR, 0)
    first, other = piece.halves
    assert np.allclose(first + other, piece.image)
    seen = explain(piece.image, Spots(*atoms.T, BLUR, image.shape, piece.pixel_nm))
    assert seen.counts == (gain == 1.0)
    noise = [(half - seen.expected / 2) / np.sqrt(seen.variance / 2) for half in (first, other)]
    assert abs(np.corrcoef(*(n.ravel() for n in noise))[0, 1]) < 0.05
    assert 0.8 < noise[0].var() < 1.2


def test_better_eyes_pass_and_worse_ones_are_refused(poor, good):
    assert refusals(poor, good) == []
    assert any("foretell" in reason for reason in refusals(good, poor))
    assert any("do not foretell" in reason for reason in refusals(good, good))


def test_networks_that_paint_the_perfect_lattice_are_refused(exam, poor):
    _, atoms, vacant = sheet(1)
    before, after = poor, exam.sit(Altered(painted=np.concatenate([atoms, vacant])))
    assert before.marks.vacancies > 0.9 > 0.1 > after.marks.vacancies
    assert any("emptied sites" in reason for reason in refusals(before, after))


def test_where_spots_do_not_explain_the_counts_nothing_is_accepted(poor, good):
    assert 0.9 < poor.marks.explained < 1.1
    smeared = replace(poor, marks=poor.marks.model_copy(update={"explained": 1.2}))
    assert any("spots" in reason for reason in refusals(smeared, good))


def test_ruined_networks_leave_a_card_that_says_why_and_no_weights(tmp_path):
    image, _, _ = sheet(4)
    settings = Adaptation(rounds=1, steps=2, batch=2, patch_px=32, learning_rate=1.0, exam_scenes=4)
    card = adapt([Frame("frame", image, (PIXEL, PIXEL))], tmp_path / "out", settings)
    assert not card["accepted"]
    assert "foretell" in card["reason"]
    assert json.loads((tmp_path / "out" / "atoms.json").read_text()) == card
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["atoms.json"]
    assert not set(card["blocks_learnt"]) & set(card["blocks_held_out"])


@pytest.mark.slow
def test_an_ensemble_that_was_taught_the_perfect_lattice_is_refused(tmp_path):
    """The whole way, with labels that complete the lattice over its vacancies."""
    image, atoms, vacant = sheet(5, 150.0, vacant=0.3)
    sites = np.concatenate([atoms, vacant])

    def complete(frame, _):
        top, left = (int(n) for n in frame.name.partition("[")[2][:-1].split(","))
        return Block(frame.image, frame.pixel_size_nm, sites - [left, top], np.ones(len(sites), dtype=bool))

    settings = Adaptation(rounds=1, steps=60, batch=4, patch_px=64, exam_scenes=4)
    card = adapt([Frame("", image, (PIXEL, PIXEL))], tmp_path, settings, teach=complete)
    assert any("emptied sites" in reason for reason in card["rounds"][0]["refused"])
    assert not card["accepted"]


def test_blocks_cover_a_frame_once():
    frame = Frame("f", np.arange(400 * 170).reshape(400, 170), (PIXEL, PIXEL))
    pieces = blocks_of(frame)
    assert len(pieces) == 3 * 2
    assert sorted(np.concatenate([p.image.ravel() for p in pieces])) == list(range(frame.image.size))


def test_what_cannot_be_learnt_from_is_said(tmp_path):
    image, _, _ = sheet(4, pixels=96)
    with pytest.raises(BadInput, match="4 blocks are needed"):
        adapt([Frame("small", image, (PIXEL, PIXEL))], tmp_path)
    np.save(tmp_path / "plain.npy", image)
    with pytest.raises(BadInput, match="pixel-size-nm"):
        adapt_from(Request(sources=(tmp_path / "plain.npy",)), tmp_path / "out", "cpu")
    with pytest.raises(BadInput, match="no session"):
        adapt_from(Request(sources=(tmp_path,)), tmp_path / "out", "cpu")
    run(tmp_path / "s", configuration(Reckless(3, recklessness=0.0), CountingColumn(), Budget(electrons=10**6)))
    with pytest.raises(BadInput, match="0 frames"):  # its pixels of 0.25 nm resolve no atoms
        adapt_from(Request(sources=(tmp_path / "s",)), tmp_path / "out", "cpu")
