"""The learned damage metric: the same in any units, right where atoms were removed, silent where none were."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from aecontrol.errors import BadInput
from aecontrol.perception.damage.learn_damage import DamageLessons, DamageTraining, train_damage, train_from_toml
from aecontrol.perception.damage.learned import LearnedDamage
from aecontrol.perception.damage.siamese import save, standardised
from aecontrol.perception.train import fit
from simulators.damage_scenes import DamageScenes
from tests.benchmarks.damage_frames import PATCH, Condition, frames

SMALL = DamageTraining(steps=4, batch=2, pairs=3, held_out_scenes=1, checkpoint_steps=2)
SCENES = DamageScenes(size_px=40)


@dataclass(frozen=True)
class Two:
    first: np.ndarray
    later: np.ndarray


@pytest.fixture(scope="module")
def learned():
    torch.set_num_threads(1)
    return LearnedDamage()


@pytest.fixture(scope="module")
def striped():
    """Two exposures of stripes, 16 and 48 counts a pixel; the rate [h, w] of the first."""
    rate = np.where(np.arange(160) % 8 < 4, 2.0, 30.0) * np.ones((160, 1))
    random = np.random.default_rng(0)
    return random.poisson(rate).astype(np.float32), random.poisson(3 * rate).astype(np.float32), rate


@settings(max_examples=10, deadline=None)
@given(st.floats(1e-3, 1e3))
def test_frames_look_the_same_in_any_units(striped, unit):
    pair = torch.from_numpy(np.stack(striped[:2])[None])
    for ours, theirs in zip(standardised(pair), standardised(pair * unit), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)


def test_doses_and_noise_are_read_from_the_frames_themselves(striped):
    rate = striped[2]
    seen, noise = standardised(torch.from_numpy(np.stack(striped[:2])[None]))
    assert np.allclose(noise[0], np.sqrt(rate.mean() / np.array([1.0, 3.0])) / rate.std(), rtol=0.06)
    for frame in seen[0, :, 0].numpy():  # either frame: the rate about its mean, in units of its contrast
        assert np.allclose(frame[:, rate[0] > 10].mean(), 1.0, atol=0.03)
        assert np.allclose(frame[:, rate[0] < 10].mean(), -1.0, atol=0.03)


@pytest.mark.parametrize("lattice", ["llzo", "srtio3", "mos2"])
def test_damage_is_found_where_atoms_were_hit(learned, lattice):
    """Lattices that training never saw, rendered by code that it does not share."""
    pair = frames(lattice, 7, Condition(20.0, 0.1))
    score, still = learned(Two(pair.first, pair.later)), learned(Two(pair.first, pair.repeat))
    damaged = pair.fraction >= 0.05
    judged = damaged | pair.clear
    ranks = rankdata(score[judged])[damaged[judged]]
    area = (ranks.mean() - (len(ranks) + 1) / 2) / (judged.sum() - len(ranks))
    assert area > 0.97
    assert still.mean() < 0.02
    assert score[pair.fraction > 0.5].mean() > 10 * still.mean()


def test_damage_in_one_patch_stays_in_it(learned):
    pair = frames("srtio3", 3, Condition(40.0))
    spoilt = pair.repeat.copy()
    row, col = np.argwhere(pair.clear)[57]
    place = np.s_[row * PATCH + 2 : (row + 1) * PATCH - 2, col * PATCH + 2 : (col + 1) * PATCH - 2]
    spoilt[place] = np.random.default_rng(0).poisson(pair.repeat.mean(), (PATCH - 4, PATCH - 4))
    score = learned(Two(pair.first, spoilt))
    assert np.unravel_index(score.argmax(), score.shape) == (row, col)
    assert np.sort(score.ravel())[-2] < 0.5 * score.max()


def test_partial_patches_are_dropped_and_frames_do_not_meddle(learned):
    random = np.random.default_rng(0)
    first, later = random.poisson(9.0, (2, 2, 130, 70)).astype(float)
    fraction, sd = learned.estimate(first, later)
    assert fraction.shape == sd.shape == (2, 6, 3)
    for k in (0, 1):
        alone = learned(Two(first[k, :120, :60], later[k, :120, :60]))
        assert np.allclose(alone, fraction[k], atol=0.01)


def test_the_card_is_of_the_shipped_weights(learned):
    card = json.loads(files("aecontrol.perception").joinpath("weights/damage.json").read_text())
    assert card["sha256"] == learned.sha256
    assert not {"llzo", "srtio3", "mos2"} & set(json.dumps(card["scenes"]).split('"'))


def test_foreign_or_missing_weights_are_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        LearnedDamage(tmp_path / "none.safetensors")
    regions = Path(str(files("aecontrol.perception").joinpath("weights/regions.safetensors")))
    with pytest.raises(BadInput, match="not the weights"):
        _ = LearnedDamage(regions).network


class _PowerCutError(Exception):
    pass


def test_training_repeats_itself_even_when_interrupted(tmp_path):
    lessons = DamageLessons(SMALL, SCENES)
    whole = save(fit(SMALL, lessons, tmp_path / "whole")[0])

    def cut(step: int, steps: int, loss: float) -> None:
        if step == 3:
            raise _PowerCutError

    with pytest.raises(_PowerCutError):
        fit(SMALL, lessons, tmp_path / "parts", progress=cut)
    assert save(fit(SMALL, DamageLessons(SMALL, SCENES), tmp_path / "parts")[0]) == whole


@pytest.mark.slow
def test_the_card_describes_the_weights(tmp_path):
    few = SMALL.model_copy(update={"held_out_scenes": 12})
    card = train_damage(few, DamageScenes(size_px=80), tmp_path)
    assert card["sha256"] == hashlib.sha256((tmp_path / "damage.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "damage.json").read_text()) == card
    assert set(card["metrics"]) == set(SCENES.held_out())
    assert not list(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize("text", ["x =", "[train]\nsize = 33\n[scenes]\nkind = 'damage'", "[train]", "[other]"])
def test_bad_training_files_are_refused(tmp_path, text):
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(BadInput):
        train_from_toml(path, tmp_path)
