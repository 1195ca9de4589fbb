"""The atom finder against physical limits, images from the probe-based renderer, and invariances."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from aecontrol.errors import BadInput
from aecontrol.perception.finder import AtomFinder, Found
from aecontrol.perception.labelled import read_labelled
from aecontrol.perception.refine import refine
from aecontrol.types import ScanRegion

PIXEL = 0.03
LABELLED = Path(__file__).parents[2] / "configs" / "labelled" / "pt_nc.npz"


@pytest.fixture(scope="module")
def finder() -> AtomFinder:
    return AtomFinder()


def spots(positions, counts, sigma, shape, background):
    """Expected counts of Gaussian columns at pixel centres; positions and sigma in pixels."""
    y, x = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    gx = np.exp(-((x - positions[:, :1]) ** 2) / (2 * sigma**2))
    gy = np.exp(-((y - positions[:, 1:]) ** 2) / (2 * sigma**2))
    return (gy * (counts / (2 * np.pi * sigma**2))[:, None]).T @ gx + background


def cramer_rao(counts, sigma, background):
    """Standard error of x for one isolated column, with (counts, x, y, background) unknown: numeric Fisher matrix."""
    theta = np.array([counts, 20.0, 20.0, background])
    steps = np.array([counts * 1e-3, 1e-3, 1e-3, background * 1e-3])

    def model(t):
        return spots(np.array([[t[1], t[2]]]), np.array([t[0]]), sigma, (40, 40), t[3]).ravel()

    jacobian = np.stack(
        [(model(theta + e) - model(theta - e)) / (2 * s) for e, s in zip(np.diag(steps), steps, strict=True)]
    )
    return np.sqrt(np.linalg.inv((jacobian / model(theta)) @ jacobian.T)[1, 1])


def pairs(found: Found, truth, gate_px):
    """Indices (find, truth) of mutual nearest neighbours within the gate."""
    got = np.stack([found.x_px, found.y_px], 1)
    distance, nearest = cKDTree(truth).query(got)
    back = cKDTree(got).query(truth)[1]
    i = np.flatnonzero((back[nearest] == np.arange(len(got))) & (distance <= gate_px))
    return i, nearest[i]


@pytest.mark.parametrize(("counts", "background"), [(1000.0, 1.0), (200.0, 0.2)])
def test_isolated_columns_are_placed_at_the_cramer_rao_bound(finder, counts, background):
    rng = np.random.default_rng(7)
    sigma = 0.045 / PIXEL
    grid = np.stack(np.meshgrid(np.arange(20.0, 620, 30), np.arange(20.0, 620, 30)), -1).reshape(-1, 2)
    truth = grid + rng.uniform(-1.5, 1.5, grid.shape)
    image = rng.poisson(spots(truth, np.full(len(truth), counts), sigma, (640, 640), background))
    found = finder.find(image, (PIXEL, PIXEL))
    i, j = pairs(found, truth, 3.0)
    assert len(i) == len(truth) == len(found)
    error = np.stack([found.x_px[i], found.y_px[i]], 1) - truth[j]
    bound = cramer_rao(counts, sigma, background)
    # 800 values: the sampling error of an RMS is 2.5 %, of a mean 3.5 % of the bound
    assert 0.9 * bound < np.sqrt((error**2).mean()) < 1.12 * bound
    assert np.abs(error.mean(0)).max() < 0.2 * bound
    assert np.median(found.sigma_x) == pytest.approx(bound, rel=0.15)
    assert found.intensity.mean() == pytest.approx(counts, rel=0.03)
    assert found.blur_nm == pytest.approx(0.045, rel=0.03)
    assert found.background == pytest.approx(background, rel=0.1)


def mos2_frame(seed, s2_counts, size_nm=8.0, pixels=256):
    """A noisy MoS2 frame from the probe-based renderer: image, column positions in nm, labels."""
    from simulators.optics import Optics
    from simulators.render import Renderer
    from simulators.scan import nominal_positions_nm
    from simulators.specimens.sheets import Mos2, SulphurVacancies

    vacancies = SulphurVacancies(background_fraction=0.06)
    specimen = Mos2(size_nm=(size_nm, size_nm), rotation_deg=11.0 + 17 * seed, vacancies=vacancies).build(seed)
    region = ScanRegion(
        center_nm=(size_nm / 2, size_nm / 2), fov_nm=(size_nm, size_nm), shape=(pixels, pixels), dwell_time_s=1e-6
    )
    renderer = Renderer(Optics())
    fraction = renderer.render(specimen, nominal_positions_nm(region)).channels["HAADF"]
    column_A2 = 2 * renderer.objects["HAADF"].strength_A2(16)
    per_pixel = s2_counts / column_A2 * (10 * size_nm / pixels) ** 2
    positions, labels = specimen.targets("atom")
    image = np.random.default_rng(seed).poisson(per_pixel * (fraction + 1e-5))
    return image, positions, np.array(labels), size_nm / pixels


@pytest.mark.parametrize(("s2_counts", "least"), [(50, 0.97), (200, 0.98)])
def test_mos2_from_another_renderer_is_found(finder, s2_counts, least):
    hits = there = judged = dim = dim_hits = 0
    for seed in range(2):
        image, truth, labels, pixel = mos2_frame(seed, s2_counts)
        found = finder.find(image, (pixel, pixel))
        i, j = pairs(found, truth / pixel, 0.05 / pixel)
        hits, there, judged = hits + len(i), there + len(truth), judged + len(found)
        dim, dim_hits = dim + (labels == "S2").sum(), dim_hits + (labels[j] == "S2").sum()
    assert 2 * hits / (there + judged) >= least
    assert dim_hits / dim >= 0.97  # the dim sublattice is not hidden by the bright one


def test_a_single_sulphur_is_dimmer_than_two(finder):
    image, truth, labels, pixel = mos2_frame(3, 400)
    found = finder.find(image, (pixel, pixel))
    i, j = pairs(found, truth / pixel, 0.05 / pixel)
    mean = {label: found.intensity[i[labels[j] == label]].mean() for label in ("Mo", "S2", "S1")}
    assert mean["S1"] == pytest.approx(mean["S2"] / 2, rel=0.15)
    assert mean["Mo"] > 2 * mean["S2"]


def test_gain_and_offset_change_nothing_but_units(finder):
    image, _, _, pixel = mos2_frame(1, 100, size_nm=4.0, pixels=128)
    plain, scaled = finder.find(image, (pixel, pixel)), finder.find(1000.0 + 7.0 * image, (pixel, pixel))
    assert np.allclose(plain.x_px, scaled.x_px, atol=1e-3)
    assert np.allclose(plain.sigma_y, scaled.sigma_y, rtol=1e-2)
    assert np.allclose(7 * plain.intensity, scaled.intensity, rtol=1e-3, atol=0.5)


def test_a_window_reads_like_the_same_place_in_a_larger_frame_up_to_its_rim(finder):
    image, truth, _, pixel = mos2_frame(2, 300)
    window = finder.find(image[64:160, 32:128], (pixel, pixel), threshold=0.3)  # half an S atom on the rim is faint
    truth = truth / pixel - [32, 64]
    inside = truth[((truth > 1) & (truth < 95)).all(1)]
    i, _ = pairs(window, inside, 0.05 / pixel)
    assert len(i) / len(inside) >= 0.97
    assert len(window) <= 1.04 * ((truth > 0) & (truth < 96)).all(1).sum()
    rim = inside[~((inside > 5) & (inside < 91)).all(1)]
    assert len(rim) >= 20
    assert len(pairs(window, rim, 0.06 / pixel)[0]) / len(rim) >= 0.9


def test_smallest_window(finder):
    image, truth, _, pixel = mos2_frame(2, 300)
    window = finder.find(image[100:132, 100:132], (pixel, pixel))
    truth = truth / pixel - 100
    inside = truth[((truth > 1) & (truth < 31)).all(1)]
    assert len(pairs(window, inside, 0.05 / pixel)[0]) >= 0.9 * len(inside)
    assert len(window) <= 1.15 * len(inside) + 1


@pytest.mark.parametrize("pixels", [(400, 800), (160, 130)])
def test_other_pixel_shapes_and_sizes(finder, pixels):
    rng = np.random.default_rng(0)
    rows, cols = pixels
    truth_nm = np.stack(np.meshgrid(np.arange(0.5, 8, 0.5), np.arange(0.5, 8, 0.5)), -1).reshape(-1, 2)
    truth_nm = truth_nm + rng.uniform(-0.05, 0.05, truth_nm.shape)
    p = np.array([8 / cols, 8 / rows])
    y, x = (np.arange(rows) + 0.5) * p[1], (np.arange(cols) + 0.5) * p[0]
    gx, gy = (np.exp(-((a - t) ** 2) / (2 * 0.05**2)) for a, t in ((x, truth_nm[:, :1]), (y, truth_nm[:, 1:])))
    image = rng.poisson(p.prod() / (2 * np.pi * 0.05**2) * 2000 * gy.T @ gx + 0.1)
    found = finder.find(image, (p[0], p[1]))
    at = np.stack([found.x_px, found.y_px], 1) * p
    distance, _ = cKDTree(at).query(truth_nm)
    assert len(found) == len(truth_nm)
    assert np.median(distance) < 0.004


def test_hand_labelled_pt_atoms_on_carbon(finder):
    """Real images of which training saw others of the same series."""
    pixel = 0.029296875
    pairs_made = finds = labels = 0
    for name in ("057", "072"):
        image, truth = read_labelled(LABELLED)[name]
        found = finder.find(image, (pixel, pixel), 0.1, refined=False)
        pairs_made += len(pairs(found, truth, 0.2 / pixel)[0])
        finds, labels = finds + len(found), labels + len(truth)
    assert 2 * pairs_made / (finds + labels) >= 0.6


def test_the_weights_of_another_network_are_refused():
    other = files("aecontrol.perception").joinpath("weights/regions.safetensors")
    with pytest.raises(BadInput, match="outputs are particle, boundary, wall"):
        AtomFinder(Path(str(other))).find(np.ones((64, 64)), (PIXEL, PIXEL))


def test_nothing_is_found_where_nothing_is(finder):
    assert len(finder.find(np.full((64, 64), 3.0), (PIXEL, PIXEL))) == 0
    assert len(finder.find(np.zeros((64, 64)), (PIXEL, PIXEL))) == 0
    noise = np.random.default_rng(1).poisson(20.0, (256, 256))
    empty = finder.find(noise, (PIXEL, PIXEL))
    assert len(empty) <= 2  # 59 nm^2: MoS2 would have 2000 columns there
    assert finder.find(np.zeros((64, 64)), (PIXEL, PIXEL)).blur_nm is None


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (np.full((64, 64), np.nan), PIXEL),
        (np.zeros((3, 64, 64)), PIXEL),
        (np.zeros((64, 64)), 0.5),
        (np.zeros((64, 64)), 0.0),
        (np.zeros((4, 64)), PIXEL),
    ],
)
def test_bad_images_are_refused(finder, image, pixel):
    with pytest.raises(BadInput):
        finder.find(image, (pixel, pixel))


def test_weights_name_the_version_and_foreign_ones_are_refused(finder, tmp_path):
    import hashlib
    import json
    from importlib.resources import files

    folder = files("aecontrol.perception") / "weights"
    assert finder.version == hashlib.sha256((folder / "atoms.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "atoms.json").read_text())["sha256"] == finder.version
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes(b"not weights at all")
    with pytest.raises(BadInput):
        AtomFinder(foreign).find(np.zeros((64, 64)), (PIXEL, PIXEL))
    with pytest.raises(BadInput):
        AtomFinder(tmp_path / "absent")


@settings(max_examples=15, deadline=None)
@given(
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(1.2, 2.0),
    st.floats(10.0, 1e6),
    st.floats(0.3, 3.0),
    st.floats(-0.5, 0.5),
)
def test_noise_free_neighbours_are_separated_exactly(dx, dy, sigma, counts, ratio, start):
    truth = np.array([[20 + dx, 20 + dy], [25.5 + dx, 21 + dy], [40.0, 41.0]])
    image = spots(truth, counts * np.array([1.0, ratio, 2.0]), sigma, (60, 60), 0.01 * counts)
    fit = refine(image, truth[:, 0] + start, truth[:, 1] - start, (PIXEL, PIXEL))
    assert np.abs(np.stack([fit.x, fit.y], 1) - truth).max() < 0.02
    assert fit.intensity / counts == pytest.approx([1.0, ratio, 2.0], rel=0.02)
