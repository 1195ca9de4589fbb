"""The region finder: outlines and lengths as drawn, off-centring as built, specimens that training never saw."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.canvas import draw_png
from aecontrol.errors import BadInput
from aecontrol.perception import order, polar, views
from aecontrol.perception.ensemble import Ensemble
from aecontrol.perception.learn_regions import RegionLessons, RegionTraining, lesson, train_from_toml
from aecontrol.perception.regions import RegionFinder, outline
from aecontrol.region_figure import draw_regions
from simulators.regions import RegionScenes
from simulators.scan import nominal_positions_nm
from simulators.setup import ColumnSetup
from simulators.simulation import View


@dataclass(frozen=True)
class Columns:
    x_px: np.ndarray
    y_px: np.ndarray
    intensity: np.ndarray


@pytest.fixture(scope="module")
def finder():
    return RegionFinder()


@pytest.fixture(scope="module")
def particles():
    """Au on carbon, as the probe-based renderer shows it: image, pixel, where the particles are."""
    specimen = {"kind": "nanoparticle", "size_nm": [12, 12], "n_particles": 3, "diameter_nm": [2, 4]}
    column = ColumnSetup.model_validate({"specimen": specimen}).column(5)
    region = View(shape=(120, 120), dwell_time_s=1e-6).region(column.field_nm)
    truth = column.snapshot().labels(nominal_positions_nm(region))["particle"] >= 0
    return column.preview(0, region)["HAADF"], region.pixel_size_nm, truth


def bar(angle_deg, offset, width=0.7, side=8.0, pixel=0.06):
    """A straight bar across a square frame, and the length of its middle line inside the frame."""
    n = round(side / pixel)
    at = (np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1) + 0.5) * pixel - side / 2
    along = np.array([np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))])
    across = np.array([-along[1], along[0]])
    t = np.linspace(-side, side, 20001)
    inside = np.abs(t[:, None] * along + offset * across).max(1) < side / 2
    return (np.abs(at @ across - offset) < width / 2).astype(np.float32), inside.sum() * (t[1] - t[0])


@settings(max_examples=12, deadline=None)
@given(st.floats(0, 180), st.floats(-1.5, 1.5))
def test_a_straight_line_has_its_length(angle, offset):
    drawn, length = bar(angle, offset)
    (region,) = outline(drawn, (0.06, 0.06), "boundary", (0.06, 0.06))[1]
    corners = abs(angle % 90.0 - 45.0) < 4.0  # both ends lie in or beside one, which cuts them
    assert region.length_nm == pytest.approx(length, rel=0.1 if corners else 0.07)
    assert region.at_rim


def test_a_disc_has_its_area_and_centre():
    at = np.stack(np.meshgrid(np.arange(100), np.arange(80)), -1) + 0.5
    drawn = (np.hypot(*(at - [60.2, 30.7]).transpose(2, 0, 1)) < 15).astype(np.float32)
    (region,) = outline(drawn, (0.12, 0.12), "particle", (0.06, 0.06))[1]
    assert region.area_nm2 == pytest.approx(np.pi * (15 * 0.12) ** 2, rel=0.02)
    assert (region.x_px, region.y_px) == pytest.approx((120.4, 61.4), abs=0.2)  # px of the image are half as large
    assert not region.at_rim
    assert region.confidence > 0.95


def test_weak_and_small_regions_are_absent():
    drawn, _ = bar(20, 0)
    for change in (0.7 * drawn, bar(20, 0)[0] * (np.arange(133) < 8)):  # unsure; shorter than a nanometre
        grid, regions = outline(change.astype(np.float32), (0.06, 0.06), "boundary", (0.06, 0.06))
        assert not regions
        assert not grid.labels.any()


def test_a_boundary_lies_between_two_lattices():
    """Fringes of two directions on both sides, on one side, on none; an edge; fringes of one direction."""
    at = np.stack(np.meshgrid(np.arange(120), np.arange(120)), -1) * 0.06
    lattice = np.cos(at @ [30.0, 0.0]) + np.cos(at @ [8.0, 29.0])
    noise = np.random.default_rng(0).normal(0, 0.5, at.shape[:2])
    left = at[..., 0] < 3.6
    images = {
        "both": lattice + noise,
        "one": lattice * left + noise,
        "none": noise,
        "edge": 20 * left + noise,
        "stripes": np.cos(at @ [30.0, 0.0]) + noise,
    }
    inside = np.ones((100, 6), dtype=bool)
    found = {
        name: order.between_lattices(i.astype(np.float32), (0.06, 0.06), inside, (10, 57)) for name, i in images.items()
    }
    assert found == {"both": True, "one": False, "none": False, "edge": False, "stripes": False}


def test_off_centring_is_that_of_the_built_crystal():
    rng = np.random.default_rng(0)
    cells = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2) * 0.4
    shift = np.where(cells[:, :1] < 4.0, [[0.015, 0.005]], [[-0.015, 0.005]])
    xy = np.concatenate([cells, cells + 0.2 + shift]) + rng.normal(0, 0.002, (800, 2))
    found = polar.off_centring(xy, np.repeat([1.0, 0.3], 400))
    far = np.abs(found.xy_nm[:, 0] - 4.1) > 0.7
    sign = np.where(found.xy_nm[far, 0] < 4, 1, -1)
    assert far.sum() > 500
    assert np.abs(found.shift_nm[far].mean(0) - [0.015 * sign.mean(), 0.005]).max() < 0.001
    assert np.corrcoef(found.shift_nm[far, 0], sign)[0, 1] > 0.95
    along = polar.maps(found, (40, 40), (0.2, 0.2))[0]
    left, right = along[5:-5, 5:17].mean(), along[5:-5, 24:-5].mean()
    assert left * right < 0  # from its middle value, either side of the wall
    assert abs(left - right) > 4


def test_particles_of_a_specimen_are_found(finder, particles):
    image, pixel, truth = particles
    found = finder.find(image, pixel)
    inside = found.labels("particle") > 0
    assert (inside & truth).sum() / (inside | truth).sum() > 0.75
    rows = json.loads(json.dumps(found.table()))
    assert sum(row["class"] == "particle" for row in rows) == 3
    assert set(found.not_judged) == {"wall"}
    assert found.probability("particle").shape == image.shape


def test_gain_and_offset_do_not_matter(finder, particles):
    image, pixel, _ = particles
    one, other = finder.find(image, pixel), finder.find(7.5 * image + 300, pixel)
    assert np.abs(one.probability("particle") - other.probability("particle")).max() < 0.01


def test_walls_are_read_from_columns(finder):
    """A built crystal with one wall at 8 nm, and the same without."""
    cells = np.stack(np.meshgrid(np.arange(40), np.arange(40)), -1).reshape(-1, 2) * 0.4 + 0.1
    for flip in (True, False):
        sign = np.where((cells[:, :1] < 8.0) | (not flip), 1.0, -1.0)
        xy = np.concatenate([cells, cells + 0.2 + sign * [[0.012, 0.012]]])
        xy += np.random.default_rng(1).normal(0, 0.004, xy.shape)
        columns = Columns(xy[:, 0] / 0.04, xy[:, 1] / 0.04, np.repeat([1.0, 0.3], len(cells)))
        walls = [r for r in finder.find(np.zeros((400, 400)), (0.04, 0.04), columns).regions if r.kind == "wall"]
        assert len(walls) == flip
        if flip:
            assert walls[0].x_px * 0.04 == pytest.approx(8.1, abs=0.3)
            assert walls[0].length_nm == pytest.approx(16, rel=0.1)


def test_windows_are_the_whole_image(finder):
    """A view too large for one window, against the network's own answer to all of it at once."""
    import torch

    seen = np.random.default_rng(0).normal(0, 1, (90, 641)).astype(np.float32)
    for channel, kind in enumerate(views.CLASSES):
        padded = np.pad(seen, ((0, 2), (0, 3)))
        with torch.inference_mode():
            answers = [
                net(torch.from_numpy(padded)[None, None])[0, channel].sigmoid()
                for net in Ensemble("regions", None, "cpu").members
            ]
        whole = np.mean(answers, axis=0)[:90, :641]
        assert np.abs(finder.probability(kind, seen) - whole).max() < 1e-5


def test_nothing_is_found_in_nothing(finder):
    found = finder.find(np.full((200, 200), 3.0), (0.05, 0.05))
    assert not found.regions
    assert found.table() == []


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (np.full((50, 50), np.nan), (0.05, 0.05)),
        (np.zeros((3, 50, 50)), (0.05, 0.05)),
        (np.zeros((400, 1)), (0.05, 0.05)),
        (np.zeros((0, 0)), (0.05, 0.05)),
        (np.zeros((50, 50)), (2.0, 2.0)),
        (np.zeros((50, 50)), (0.0, 0.05)),
        (np.zeros((50, 50)), (np.nan, 0.05)),
    ],
)
def test_bad_images_are_refused(finder, image, pixel):
    with pytest.raises(BadInput):
        finder.find(image, pixel)


def test_a_coarse_image_shows_particles_only(finder):
    found = finder.find(np.random.default_rng(0).poisson(9, (64, 64)), (0.2, 0.2))
    assert set(found.maps) == {"particle"}
    assert set(found.not_judged) == {"boundary", "wall"}


def test_foreign_weights_are_refused(tmp_path, particles):
    for data in (b"", b"not safetensors at all", None):
        path = tmp_path / "w.safetensors"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(BadInput):
            RegionFinder(path).find(particles[0], particles[1])


def test_overlay_is_a_picture_with_every_class_named(finder, particles):
    image, pixel, _ = particles
    found = finder.find(image, pixel)
    figure = draw_regions(image, found)
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["3 particles", "0 grain boundaries", "domain walls: not judged"]
    assert draw_png(lambda: figure)[:4] == b"\x89PNG"


def test_lessons_put_regions_where_the_scene_says():
    """Bright particles on a dim film: the target covers what is bright, in the view's own pixels."""
    seen, maps = lesson(RegionScenes(families=("particles",)).render(0, 3))
    inside = maps[0] > 0
    assert maps.shape[1:] == seen.image.shape
    assert (maps[1:] < 0).all()  # the scene does not tell of boundaries and walls
    assert inside.any()
    assert seen.image[inside].mean() > seen.image[~inside].mean() + 1


def test_loss_rewards_the_truth_and_ignores_what_is_untold():
    import torch

    lessons = RegionLessons(RegionTraining(batch=4, patch_px=32), RegionScenes())
    _, targets, weights = (torch.from_numpy(a) for a in lessons.batch(0, 0))
    right = torch.where(targets > 0, 9.0, -9.0)
    other = torch.where(targets < 0, 5.0, right)
    assert lessons.loss(right, targets, weights) < 0.02
    assert lessons.loss(other, targets, weights) == pytest.approx(float(lessons.loss(right, targets, weights)))
    assert lessons.loss(-right, targets, weights) > 5


@pytest.mark.parametrize("text", ["[train]\nsteps = 0\n[scenes]\nkind = 'regions'", "[train]", "x =", "[more]"])
def test_bad_training_files_are_refused(tmp_path, text):
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(BadInput):
        train_from_toml(path, tmp_path)


def test_training_writes_weights_that_the_finder_reads(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text(
        "[train]\nsteps = 2\nbatch = 2\npatch_px = 32\nsize = 2\nheld_out_scenes = 1\n[scenes]\nkind = 'regions'"
    )
    card = train_from_toml(path, tmp_path)
    assert RegionFinder(tmp_path / "regions.safetensors").version == card["sha256"]
    assert json.loads((tmp_path / "regions.json").read_text()) == card
    assert set(card["pixel_nm"]) == set(views.PIXEL_NM)
