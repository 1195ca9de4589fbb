"""Random scenes: repeatable, and with their atoms where they say."""

from __future__ import annotations

import numpy as np
import pytest

from simulators.scenes import HaadfScenes


def test_a_scene_depends_on_its_seed_and_index_only():
    first, again = HaadfScenes().render(1, 5), HaadfScenes().render(1, 5)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.positions_px, again.positions_px)
    assert not np.array_equal(first.image, HaadfScenes().render(1, 6).image)
    assert not np.array_equal(first.image, HaadfScenes().render(2, 5).image)


@pytest.mark.parametrize("family", ["single_atoms", "graphene", "mos2"])
def test_light_is_where_the_atoms_are(family):
    """Centres of mass about the atoms, in counts: an oracle for the pixel convention that knows no Gaussian."""
    scenes = HaadfScenes(families=(family,), clean=True, counts=(1e5, 1e5), pixel_nm=(0.02, 0.02), coarse_fraction=0.0)
    offsets = []
    for index in range(12):
        scene = scenes.render(0, index)
        for x, y in scene.positions_px:
            row, col = int(y), int(x)
            if not (4 <= row < 92 and 4 <= col < 92):
                continue
            alone = np.sort(np.hypot(*(scene.positions_px - [x, y]).T))[1:2].min(initial=99) > 5
            window = scene.image[row - 2 : row + 3, col - 2 : col + 3].astype(float)
            weight = window - window.min()
            if alone and weight.sum() > 0:
                at = np.arange(-2, 3) + 0.5
                center = np.array([weight.sum(0) @ at, weight.sum(1) @ at]) / weight.sum()
                offsets.append([col + center[0] - x, row + center[1] - y])
    assert len(offsets) >= 15
    assert np.abs(np.median(offsets, axis=0)).max() < 0.12  # half a pixel would show


def test_dose_is_what_was_asked():
    scenes = HaadfScenes(families=("mos2",), clean=True, counts=(400.0, 400.0), coarse_fraction=0.0)
    for index in range(4):
        scene = scenes.render(2, index)
        assert scene.counts[scene.labels == "Mo"] == pytest.approx(400.0)
        inside = ((scene.positions_px > 0) & (scene.positions_px < len(scene.image))).all(1)
        expected = scene.counts[inside].sum()
        assert expected < scene.image.sum() < 2.5 * expected  # the rest is background
