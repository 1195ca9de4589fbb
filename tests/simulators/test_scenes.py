"""Random scenes: repeatable, with their atoms where they say, and as bright as they say."""

from __future__ import annotations

import numpy as np
import pytest

from simulators import crystal_scenes
from simulators.column_sets import Columns, of_material
from simulators.crystal_scenes import EVIDENT, CrystalScenes
from simulators.scenes import SingleAtomScenes


@pytest.mark.parametrize("scenes", [SingleAtomScenes(), CrystalScenes(materials=("graphene", "random"))])
def test_a_scene_depends_on_its_seed_and_index_only(scenes):
    first, again = scenes.render(1, 5), scenes.render(1, 5)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.positions_px, again.positions_px)
    assert not np.array_equal(first.image, scenes.render(1, 6).image)
    assert not np.array_equal(first.image, scenes.render(2, 5).image)


@pytest.mark.parametrize(
    "scenes",
    [
        SingleAtomScenes(clean=True, pixel_nm=(0.02, 0.02), coarse_fraction=0.0),
        CrystalScenes(
            materials=("graphene", "random"), clean=True, counts=(1e5, 1e5), pixel_nm=(0.02, 0.02), coarse_fraction=0.0
        ),
    ],
)
def test_light_is_where_the_atoms_are(scenes):
    """Centres of mass about the atoms, in counts: an oracle for the pixel convention that knows no Gaussian."""
    offsets = []
    for index in range(24):
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
    scenes = CrystalScenes(materials=("graphene",), clean=True, counts=(400.0, 400.0), coarse_fraction=0.0)
    for index in range(4):
        scene = scenes.render(2, index)
        assert np.median(scene.counts) == pytest.approx(400.0)
        inside = ((scene.positions_px > 0) & (scene.positions_px < len(scene.image))).all(1)
        expected = scene.counts[inside].sum()
        assert 0.9 * expected < scene.image.sum() < 1.8 * expected  # the rest is background


def test_a_column_has_its_place_its_counts_and_its_width():
    """The Fourier sum against the moments of an image of one column."""
    alone = Columns(np.array([[1.503, 1.381]]), np.array([1.0]), np.array([[0.03, 0.05]]), np.array([True]))
    otf, step = crystal_scenes._probe(3)
    narrow = Columns(alone.xy, alone.weight, np.zeros((1, 2)), alone.listed)
    moments = []
    for columns in (alone, narrow):
        image, peak = crystal_scenes.paint(columns, 50.0, otf, step, 96, 0.03, np.zeros((2, 96)))
        at = (np.arange(96) + 0.5) * 0.03
        total = image.sum()
        mean = np.array([image.sum(0) @ at, image.sum(1) @ at]) / total
        moments.append([(image.sum(k) @ (at - mean[k]) ** 2) / total for k in (0, 1)])
        assert total == pytest.approx(50.0, rel=0.02)
        assert peak * 50.0 > 0.9 * image.max()  # at its place, from which coma moves the highest point a little
        assert mean == pytest.approx(alone.xy[0], abs=0.005)  # coma moves the centre of mass a little
    assert np.subtract(*moments) == pytest.approx([0.03**2, 0.05**2], rel=0.05)


def test_what_must_be_found_can_be_seen():
    """Wanted columns stand out of the noise in the image itself; hopeless ones are not listed at all."""
    scenes = CrystalScenes(materials=("mos2", "srtio3", "random"), clean=True, coarse_fraction=0.0)
    for index in range(20):
        scene = scenes.render(4, index)
        inside = ((scene.positions_px > 0) & (scene.positions_px < len(scene.image))).all(1)
        wanted = scene.counts[scene.wanted & inside]
        alone = np.sqrt(2 * ((wanted + 0.1) * np.log1p(wanted / 0.1) - wanted))  # on the least background there is
        assert (alone > EVIDENT).all()


@pytest.mark.parametrize("material", ["mos2", "graphene", "hbn", "srtio3", "nanoparticle", "random"])
def test_columns_of_a_material_are_apart(material):
    columns = of_material(material, 0)
    at = columns.xy[columns.listed]
    distance = np.hypot(*(at[:200, None] - at[None]).transpose(2, 0, 1))
    assert np.sort(distance, axis=1)[:, 1].min() > 0.069
    assert (columns.weight > 0).all()
    if material == "nanoparticle":
        assert columns.listed.mean() < 0.1  # the carbon film is no set of columns
