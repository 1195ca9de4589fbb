"""Training: repeatable, learns, and its scenes put atoms where they say."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from aecontrol.errors import BadInput
from aecontrol.perception import sampling
from aecontrol.perception.finder import decode
from aecontrol.perception.learn_atoms import (
    AtomLessons,
    AtomTraining,
    Source,
    crop,
    match,
    train_atoms,
    train_from_toml,
)
from aecontrol.perception.train import fit
from simulators.crystal_scenes import CrystalScenes
from simulators.scenes import SingleAtomScenes

SMALL = AtomTraining(
    steps=24, batch=4, patch_px=32, size=4, learning_rate=0.02, held_out_scenes=1, members=2, checkpoint_steps=10
)
SCENES = SingleAtomScenes(size_px=40)
FEW = (Source(SCENES), Source(SCENES, 2.0, after=0.5))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    losses: list[float] = []
    folder = tmp_path_factory.mktemp("weights")
    card = train_atoms(SMALL, FEW, folder, progress=lambda step, steps, loss: losses.append(loss))
    return folder, card, losses


def test_card_describes_the_weights(trained):
    folder, card, losses = trained
    data = (folder / "atoms.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(data).hexdigest()
    assert json.loads((folder / "atoms.json").read_text()) == card
    assert set(card["metrics"]) == set(SCENES.held_out())
    assert len(losses) == SMALL.members * SMALL.steps
    assert losses[SMALL.steps - 1] < losses[0]
    assert not list(folder.glob("checkpoint*"))


def test_same_seed_same_weights(trained, tmp_path):
    assert train_atoms(SMALL, FEW, tmp_path)["sha256"] == trained[1]["sha256"]
    other = train_atoms(SMALL.model_copy(update={"seed": 1}), FEW, tmp_path)
    assert other["sha256"] != trained[1]["sha256"]


@pytest.mark.parametrize(
    "text",
    [
        "[train]\nsteps = 0\n[[scenes]]\nkind = 'single_atoms'",
        "[train]",
        "[[scenes]]\nkind = 'no'",
        "[scenes]\nkind = 'single_atoms'",
        "[[scenes]]\nkind = 'single_atoms'\nshare = -1",
        "x =",
    ],
)
def test_bad_training_files_are_refused(tmp_path, text):
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(BadInput):
        train_from_toml(path, tmp_path)


@pytest.mark.parametrize(
    "scenes",
    [
        CrystalScenes(materials=("mos2", "graphene", "random"), counts=(2000.0, 2000.0), coarse_fraction=0.3),
        SingleAtomScenes(coarse_fraction=0.3),
    ],
)
def test_heat_of_a_scene_decodes_to_its_atoms(scenes):
    """The training target and the decoder are each other's inverse, rims and coarse pixels included."""
    for index in range(6):
        scene = scenes.render(3, index)
        whole = sampling.resample(scene.image, scene.pixel_size_nm)
        side = 4 * (max(whole.image.shape) // 4 + 1)
        _, heat, _ = crop(scene, whole, side, np.random.default_rng(0), own_statistics=False)
        heat = heat[: whole.image.shape[0], : whole.image.shape[1]]
        pixel = (scene.pixel_size_nm[1] * whole.scale[0], scene.pixel_size_nm[0] * whole.scale[1])
        peaks = decode(heat[None], pixel, 0.5)
        size = np.array(whole.image.shape[::-1]) * pixel[::-1]
        found = np.stack([peaks.cols, peaks.rows], 1) * pixel[::-1]
        hits, judged, there, squares = match(found, scene.positions_px * scene.pixel_size_nm, size, 0.05, scene.wanted)
        assert hits == judged
        assert hits >= 0.98 * there  # disorder pushes a few pairs into one
        assert squares <= hits * 0.015**2
        inner = ((found > 0.1) & (found < size - 0.1)).all(1)  # on the rim, atoms outside leave a part of their heat
        assert (peaks.confidence[inner] > 0.9).all()


class _PowerCutError(Exception):
    pass


def test_an_interrupted_training_ends_where_it_would_have(trained, tmp_path):
    def cut(step: int, steps: int, loss: float) -> None:
        if step == SMALL.steps + 15:
            raise _PowerCutError

    with pytest.raises(_PowerCutError):
        train_atoms(SMALL, FEW, tmp_path, progress=cut)
    seen: list[int] = []
    assert train_atoms(SMALL, FEW, tmp_path, progress=lambda s, *_: seen.append(s))["sha256"] == trained[1]["sha256"]
    assert seen[0] == SMALL.steps + 11


def test_checkpoints_of_another_training_are_refused(tmp_path):
    fit(SMALL, AtomLessons(SMALL, FEW), tmp_path)
    with pytest.raises(BadInput, match="another training"):
        fit(SMALL.model_copy(update={"batch": 2}), AtomLessons(SMALL, FEW), tmp_path)
    (tmp_path / "checkpoint-0.pt").write_bytes(b"torn")
    with pytest.raises(BadInput, match="cannot be read"):
        fit(SMALL, AtomLessons(SMALL, FEW), tmp_path)


def test_match_counts_each_atom_once():
    truth = np.array([[1.0, 1.0], [2.0, 1.0], [0.05, 1.0]])
    found = np.array([[1.01, 1.0], [1.0, 1.02], [3.0, 2.0], [0.06, 1.0]])
    hits, judged, there, squares = match(found, truth, np.array([4.0, 4.0]), 0.05)
    assert (hits, judged, there) == (1, 3, 2)  # the rim atom is not judged, the double find is a false one
    assert squares == pytest.approx(1e-4)
