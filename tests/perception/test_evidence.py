"""Evidence in a coarse overview: planted atoms rank first, and real labels are reached with fewer pixels."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from aecontrol.files import read_image
from aecontrol.perception.bright import SPOT_NM
from aecontrol.perception.evidence import bright_atom_evidence
from aecontrol.scoring import spent_at_recall
from aecontrol.types import ScanRegion
from tests.windows import inside_boxes, pixels_spent, random_order, window_boxes

DATA = Path(__file__).parents[1] / "data" / "pt_single_atoms"
PIXEL, FIELD = 0.1, 8.0


def overview(field=FIELD, shape=(80, 80), **change):
    values = {"center_nm": (field / 2, field / 2), "fov_nm": (field, field), "shape": shape, "dwell_time_s": 1e-6}
    return ScanRegion(**{**values, **change})


def windows(size, field=FIELD):
    count = round(field / size)
    return [
        ScanRegion(
            center_nm=((j + 0.5) * size, (i + 0.5) * size), fov_nm=(size, size), shape=(32, 32), dwell_time_s=1e-6
        )
        for i in range(count)
        for j in range(count)
    ]


def support(seed, atoms=(), contrast=0.4):
    """Overview of an uneven support beside vacuum, with atoms at (x, y) nm and Poisson noise."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:80, :80] + 0.5) * PIXEL
    texture = gaussian_filter(rng.normal(size=(80, 80)), 6)
    mean = 200 * (1 + 0.2 * texture / texture.std()) / (1 + np.exp(-(y - 2) / 0.3)) + 20
    for ax, ay in atoms:
        mean = mean + contrast * 200 * np.exp(-((x - ax) ** 2 + (y - ay) ** 2) / (2 * SPOT_NM**2))
    return rng.poisson(np.maximum(mean, 1)).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_windows_with_an_atom_rank_above_the_others_whatever_gain_offset_and_slope(seed):
    atoms = [(1.5, 4.4), (6.6, 5.5), (3.5, 7.4)]
    image, grid = support(seed, atoms, contrast=1.2), windows(1.0)
    evidence = bright_atom_evidence(image, overview(), grid)
    values = np.array([value for value, _, _ in evidence])
    assert set(np.argsort(-values)[:3]) == {8 * math.floor(y) + math.floor(x) for x, y in atoms}
    assert all(variance > 0 for _, variance, _ in evidence)
    assert len({tuple(features) for _, _, features in evidence}) == 1
    y, x = np.mgrid[:80, :80]
    other = bright_atom_evidence(50 * image + 100 * x - 30 * y + 1e5, overview(), grid)
    np.testing.assert_allclose([v for v, _, _ in other], values, rtol=1e-6)


def test_two_atoms_outweigh_one_by_the_root_of_two():
    y, x = (np.mgrid[:80, :80] + 0.5) * PIXEL
    spots = [np.exp(-((x - ax) ** 2 + (y - ay) ** 2) / (2 * SPOT_NM**2)) for ax, ay in ((2, 2), (1.5, 6.4), (2.5, 5.6))]
    image = 200 + 400 * sum(spots) + np.random.default_rng(0).normal(0, 10, (80, 80))
    values = [v for v, _, _ in bright_atom_evidence(image, overview(), windows(4.0))]
    assert values[2] / values[0] == pytest.approx(math.sqrt(2), rel=0.15)


def test_windows_turned_or_beyond_the_overview():
    image = support(0, [(5.0, 5.0)], contrast=3.0)
    turned = windows(8.0)[0].model_copy(update={"center_nm": (5.0, 5.0), "fov_nm": (3.0, 0.6), "rotation_rad": 0.6})
    along = bright_atom_evidence(image, overview(), [turned])[0][0]
    moved = turned.model_copy(update={"center_nm": (5.0 - 0.8 * math.sin(0.6), 5.0 + 0.8 * math.cos(0.6))})
    assert along > 3 * bright_atom_evidence(image, overview(), [moved])[0][0]
    outside = turned.model_copy(update={"center_nm": (8.5, 8.5), "rotation_rad": 0.0})
    assert bright_atom_evidence(image, overview(), [outside]) == [(None, None, {})]


def test_a_turned_overview_points_at_the_same_place():
    """The same frame taken along turned axes shows the same window."""
    y, x = (np.mgrid[:80, :80] + 0.5) * PIXEL - FIELD / 2
    c, s = math.cos(0.5), math.sin(0.5)
    at = (4 + c * x - s * y, 4 + s * x + c * y)
    spot = np.exp(-((at[0] - 5.5) ** 2 + (at[1] - 2.5) ** 2) / (2 * SPOT_NM**2))
    image = 200 + 300 * spot + np.random.default_rng(0).normal(0, 10, spot.shape)
    evidence = bright_atom_evidence(image, overview(rotation_rad=0.5), windows(1.0))
    assert int(np.argmax([-1 if v is None else v for v, _, _ in evidence])) == 8 * 2 + 5


@pytest.mark.parametrize(
    ("image", "region"),
    [
        (np.full((80, 80), 5.0), overview()),
        (np.ones((4, 4)), overview(shape=(4, 4))),
        (np.random.default_rng(0).normal(size=(80, 80)), overview(field=40.0)),
    ],
)
def test_a_frame_that_tells_nothing_abstains(image, region):
    assert bright_atom_evidence(image, region, windows(1.0)[:2]) == [(None, None, {})] * 2


@pytest.mark.parametrize("name", ["img_021", "img_034"])
def test_labels_of_a_real_image_are_reached_with_a_third_fewer_pixels_than_at_random(name):
    picture = read_image(DATA / f"{name}.npz")
    nm, boxes = picture.pixel_size_nm, window_boxes(picture.array.shape, 32)
    grid = [
        ScanRegion(
            center_nm=((c + 16) * nm, (r + 16) * nm), fov_nm=(32 * nm, 32 * nm), shape=(32, 32), dwell_time_s=1e-6
        )
        for r, c, _, _ in boxes
    ]
    seen = np.zeros(picture.array.shape, bool)
    seen[2::4, 2::4] = True
    region = overview(field=512 * nm, shape=(128, 128))
    evidence = bright_atom_evidence(picture.array[2::4, 2::4].astype(float), region, grid)
    inside = inside_boxes(boxes, picture.labels)

    def pixels(order, revealed):
        recall = np.logical_or.accumulate(inside[order]).mean(1)
        return spent_at_recall(pixels_spent(boxes, order, revealed), recall, 0.8)

    own = pixels(np.argsort([-v for v, _, _ in evidence], kind="stable"), seen)
    random = np.mean([pixels(random_order(len(boxes), seed), np.zeros_like(seen)) for seed in range(10)])
    assert own < 0.67 * random
