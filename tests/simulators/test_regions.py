"""Scenes of regions: their labels lie where an independent look at what was drawn puts them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from simulators import region_lattices
from simulators.regions import RegionScenes, _Solid


@pytest.mark.parametrize("family", ["particles", "grains", "crystal"])
def test_a_scene_is_a_function_of_its_numbers(family):
    scenes = RegionScenes(families=(family,))
    one, again, other = scenes.render(1, 2), scenes.render(1, 2), scenes.render(1, 3)
    assert np.array_equal(one.image, again.image)
    assert one.image.shape != other.image.shape or not np.array_equal(one.image, other.image)
    assert np.isfinite(one.image).all()


def test_distance_from_borders_is_that_of_the_drawn_map():
    """Against the distance transform of the map of the nearest centres."""
    rng = np.random.default_rng(4)
    for _ in range(5):
        centers = rng.uniform(0, 6, (3, 2))
        step = 0.02
        at = np.stack(np.meshgrid(*2 * [np.arange(0, 6, step)]), -1)
        found = region_lattices._from_borders(at, centers, np.array([0.0, 20.0, 40.0]), 60.0)
        owner = ((at[..., None, :] - centers) ** 2).sum(-1).argmin(-1)
        drawn = np.stack([step * distance_transform_edt(owner == k) for k in range(3)]).max(0)
        near = (drawn < 0.5) & (np.abs(at - 3).max(-1) < 2)  # the drawn map knows no border beyond the frame
        assert near.any()
        assert np.abs(found - drawn)[near].max() < 3 * step


def test_grains_of_nearly_the_same_turn_have_no_border():
    at = np.random.default_rng(0).uniform(0, 6, (100, 2))
    centers = np.array([[1.0, 3.0], [5.0, 3.0]])
    assert np.isinf(region_lattices._from_borders(at, centers, np.array([1.0, 59.0]), 60.0)).all()


def test_off_centring_changes_where_the_domain_does():
    """B against the mean of its four A: one vector in each of two domains, and the two differ."""
    for seed in range(10):
        columns = region_lattices._polar(np.random.default_rng(seed), 8.0, lambda at: np.sign(at[..., 0] - 4.0), 17.0)
        bright = columns.weight > np.sqrt(columns.weight.min() * columns.weight.max())
        at = columns.xy[~bright]
        near = cKDTree(columns.xy[bright]).query(at, k=4)[1]
        shift = at - columns.xy[bright][near].mean(1)
        inner = np.abs(at - 4).max(1) < 3.5
        left, right = shift[inner & (at[:, 0] < 3.5)], shift[inner & (at[:, 0] > 4.5)]
        assert np.linalg.norm(left.mean(0) - right.mean(0)) > 0.011
        assert max(left.std(0).max(), right.std(0).max()) < 0.007  # disorder of at most 5 pm, and that of four A


def test_many_facets_make_a_ball():
    normals = np.random.default_rng(1).standard_normal((4000, 3))
    normals /= np.linalg.norm(normals, axis=1)[:, None]
    ball = _Solid(np.array([3.0, 2.0]), normals, np.full(4000, 1.5), np.zeros((0, 2)))
    off = np.random.default_rng(2).uniform(-0.9, 0.9, (50, 2))
    chord = 2 * np.sqrt(1.5**2 - (off**2).sum(1))
    assert ball.thickness(off + np.array([3.0, 2.0])) == pytest.approx(chord, abs=0.03)
    assert not ball.covers(np.array([[3.0, 3.6]]))[0]
