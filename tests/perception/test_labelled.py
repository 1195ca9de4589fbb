"""Hand-labelled images: labels stay on their atoms whatever is done to a crop, and held-out images stay out."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from aecontrol.errors import BadInput
from aecontrol.perception.labelled import LabelledScenes, read_labelled

SIDE = 120
WIDTH = 2.0


def picture(seed: int, level: float):
    """Round spots on a level that tells the image, labelled as people do: by whole pixels."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(10, SIDE, 20), np.arange(10, SIDE, 20)), -1).reshape(-1, 2)
    xy = grid + rng.integers(-3, 4, grid.shape)
    y, x = np.mgrid[:SIDE, :SIDE]
    spots = np.exp(-0.5 * ((x - xy[:, 0, None, None]) ** 2 + (y - xy[:, 1, None, None]) ** 2) / WIDTH**2)
    return level + spots.sum(0), xy


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "labelled.npz"
    arrays = {}
    for k, name in enumerate("abc"):
        arrays[f"img_{name}"], arrays[f"xy_{name}"] = picture(k, 100.0 * k)
    np.savez(path, **arrays)
    return path


def scenes(file, **change):
    return LabelledScenes(file=file, images=("a", "c"), pixel_nm=0.03, size_px=64, **change)


def test_a_crop_is_the_same_again(file):
    first, again = scenes(file).render(3, 5), scenes(file).render(3, 5)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.positions_px, again.positions_px)
    assert not np.array_equal(first.image, scenes(file).render(3, 6).image)
    assert not np.array_equal(first.image, scenes(file).render(4, 5).image)


def test_labels_stay_on_their_spots(file):
    """Centres of mass of the spots, after mirroring, turning and magnifying, are where the labels say."""
    seen = set()
    for index in range(40):
        scene = scenes(file, magnification=(0.7, 1.4)).render(0, index)
        assert len(scene.positions_px) == len(scene.wanted)
        level = scene.image.min()
        rows, cols = scene.image.shape
        y, x = np.mgrid[:rows, :cols] + 0.5
        for at in scene.positions_px:
            if not ((at > 8) & (at < np.array([cols, rows]) - 8)).all():
                continue
            weight = (scene.image - level) * (np.hypot(x - at[0], y - at[1]) < 7)
            centre = np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
            np.testing.assert_allclose(centre, at, atol=0.15)
            seen.add(index)
    assert len(seen) == 40


def test_only_the_named_images_are_trained_on_and_only_the_others_judged(file):
    levels = {round(float(scenes(file).render(0, k).image.min()), -2) for k in range(30)}
    assert levels == {0.0, 200.0}
    (name, judged), *rest = scenes(file).held_out().items()
    assert not rest
    assert "not trained on" in name
    assert judged.images == ("b",)
    assert not scenes(file).model_copy(update={"images": ("a", "b", "c")}).held_out()


def test_judged_images_are_left_as_they_are(file):
    judged = scenes(file).held_out()["labelled, images not trained on"].render(0, 0)
    image, xy = read_labelled(file)["b"]
    np.testing.assert_array_equal(judged.image, image.astype(np.float32))
    np.testing.assert_array_equal(judged.positions_px, xy)


def test_bad_files_are_refused(file, tmp_path):
    with pytest.raises(ValidationError, match="not a file"):
        scenes(tmp_path / "none.npz")
    empty = tmp_path / "empty.npz"
    np.savez(empty, other=np.zeros(3))
    with pytest.raises(BadInput, match="no array img_"):
        scenes(empty).render(0, 0)
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    with pytest.raises(BadInput):
        scenes(text).render(0, 0)
    with pytest.raises(BadInput, match="no image 'z'"):
        scenes(file).model_copy(update={"images": ("z",)}).render(0, 0)
