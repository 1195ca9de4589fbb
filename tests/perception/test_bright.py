"""The spot fit against its own model, against noise, and the finder against hand labels of a real image."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.errors import BadInput
from aecontrol.files import read_image
from aecontrol.perception.bright import SPOT_NM, BrightAtomFinder, fit_spots, pixel_noise
from aecontrol.scoring import score
from tests.windows import window_boxes

DATA = Path(__file__).parents[1] / "data" / "pt_single_atoms"
PIXEL = 15 / 512


def scene(shape, atoms, amplitude=100.0, pixel=(PIXEL, PIXEL), plane=(500.0, 0.0, 0.0)):
    """Gaussian atoms (x, y) in px from the corner on a tilted plane, pixel by pixel."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    image = plane[0] + plane[1] * x + plane[2] * y
    for ax, ay in atoms:
        square = ((x - ax) * pixel[0]) ** 2 + ((y - ay) * pixel[1]) ** 2
        image = image + amplitude * np.exp(-square / (2 * SPOT_NM**2))
    return image


@settings(max_examples=30, deadline=None)
@given(
    row=st.integers(0, 31),
    col=st.integers(0, 39),
    slope=st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
    pixel=st.sampled_from([(PIXEL, PIXEL), (0.03, 0.05), (0.117, 0.117)]),
)
def test_an_atom_on_any_plane_is_measured_exactly_even_at_the_very_edge(row, col, slope, pixel):
    image = scene((32, 40), [(col + 0.5, row + 0.5)], pixel=pixel, plane=(500.0, *slope))
    assert fit_spots(image, pixel).amplitude[row, col] == pytest.approx(100.0, rel=1e-3)


def test_the_stated_error_is_the_scatter_over_noise_and_grows_at_the_edge():
    rng = np.random.default_rng(0)
    trials = np.stack([fit_spots(rng.normal(500, 1, (24, 28)), (PIXEL, PIXEL)).amplitude for _ in range(600)])
    stated = fit_spots(np.zeros((24, 28)), (PIXEL, PIXEL)).unit_error
    np.testing.assert_allclose(trials.std(0), stated, rtol=0.15)  # 600 trials: 3 % each, 672 correlated pixels
    assert abs(np.mean(trials.std(0) / stated) - 1) < 0.02
    assert stated[0, 0] > 1.5 * stated[12, 14]


def test_pixel_noise_sees_the_noise_and_not_the_structure():
    rng = np.random.default_rng(1)
    image = scene((64, 64), [(20, 20), (40, 44)], amplitude=60.0, plane=(500.0, 3.0, -2.0))
    assert pixel_noise(image + rng.normal(0, 10, image.shape), (PIXEL, PIXEL)).mean() == pytest.approx(10, rel=0.05)
    assert pixel_noise(image, (PIXEL, PIXEL)).max() < 1.0


def test_found_atoms_lie_within_their_stated_errors_and_nothing_else_is_found():
    rng = np.random.default_rng(2)
    pulls, wrong = [], 0
    for _ in range(20):
        true = np.array([(12.0, 14.0), (38.0, 20.0), (20.0, 45.0)]) + rng.uniform(-0.5, 0.5, (3, 2))
        found = BrightAtomFinder().find(scene((64, 56), true) + rng.normal(0, 25, (64, 56)), (PIXEL, PIXEL))
        place = np.column_stack([found.x_px, found.y_px])
        distance = np.hypot(*(place[:, None] - true[None]).transpose(2, 0, 1))
        assert (distance.min(0) < 3).all()
        wrong += len(found) - 3
        nearest = distance.argmin(0)
        pulls += [(found.x_px[nearest] - true[:, 0]) / found.sigma_x[nearest]]
        pulls += [(found.y_px[nearest] - true[:, 1]) / found.sigma_y[nearest]]
        np.testing.assert_allclose(found.intensity[nearest], 100 * 2 * np.pi * (SPOT_NM / PIXEL) ** 2, rtol=0.5)
    assert wrong <= 1
    assert 0.7 < np.sqrt(np.mean(np.square(pulls))) < 1.5


def test_finds_do_not_depend_on_gain_offset_or_slope():
    rng = np.random.default_rng(3)
    image = scene((40, 40), [(10, 12), (28, 30)]) + rng.normal(0, 15, (40, 40))
    y, x = np.mgrid[:40, :40]
    one, other = (BrightAtomFinder().find(i, (PIXEL, PIXEL), 0.1) for i in (image, 7 * image + 3 * x - 5 * y + 1e4))
    assert len(one) >= 2
    for name in ("x_px", "y_px", "confidence"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-6)


@pytest.mark.parametrize(
    ("image", "pixel", "says"),
    [
        (np.ones((9, 9, 3)), PIXEL, "shape"),
        (np.full((40, 40), np.nan), PIXEL, "not finite"),
        (np.ones((40, 40)), 0.2, r"pixels of 0\.2 nm"),
        (np.ones((40, 8)), PIXEL, r"0\.234 x 1\.17 nm"),
    ],
)
def test_an_image_that_cannot_tell_an_atom_is_refused(image, pixel, says):
    with pytest.raises(BadInput, match=says):
        BrightAtomFinder().find(image, (pixel, pixel))


def test_a_blank_frame_holds_no_atom():
    assert len(BrightAtomFinder().find(np.full((40, 40), 7.0), (PIXEL, PIXEL), 1e-6)) == 0


def test_most_hand_labelled_atoms_of_a_real_image_are_found_window_by_window():
    picture = read_image(DATA / "img_034.npz")
    finder, places, sure = BrightAtomFinder(), [], []
    for row, col, rows, cols in window_boxes(picture.array.shape, 32):
        found = finder.find(picture.array[row : row + rows, col : col + cols], (PIXEL, PIXEL), 0.05)
        places.append(np.column_stack([found.x_px + col, found.y_px + row]))
        sure.append(found.confidence)
    xy, confidence = np.concatenate(places), np.concatenate(sure)
    many = score(xy, picture.labels, 0.2 / PIXEL, confidence)
    few = score(xy[confidence > 0.5], picture.labels, 0.2 / PIXEL, confidence[confidence > 0.5])
    assert many.recall > 0.8
    assert many.precision > 0.2  # labels by chance: 44 discs of 0.2 nm cover 2.5 % of the field
    assert few.precision > 0.7
    assert few.recall > 0.35
