import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulators.optics import Optics, wavelength_A
from simulators.render import POTENTIAL_WIDTH_A, HaadfRenderer
from simulators.specimens.sheets import Mos2

from .oracles import round_kernel

SHARP = Optics(source_fwhm_nm=0.0)
DEFAULT = HaadfRenderer(Optics())
SHARP_RENDERER = HaadfRenderer(SHARP)
MO, S = np.array([42]), np.array([16])


def raster(low, shape, pixel):
    y, x = np.meshgrid(np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5, indexing="ij")
    return np.stack([low[0] + pixel * x, low[1] + pixel * y], axis=-1)


def one_atom(renderer, where, probe, numbers=MO, rms=0.06):
    return renderer.image(np.array([where]), numbers, np.array([rms]), probe)


def test_an_atom_appears_where_it_is():
    pixel = 0.2
    image = one_atom(DEFAULT, (3.0, 7.0), raster((0, 0), (60, 40), pixel))
    # 7.0 / 0.2 - 1/2 = 34.5 and 3.0 / 0.2 - 1/2 = 14.5: the four pixels around that point share the maximum
    assert image[34:36, 14:16] == pytest.approx(image.max(), rel=1e-3)
    assert image[33, 14] < 0.95 * image.max() > image[34, 13]


@pytest.mark.parametrize("renderer", [DEFAULT, SHARP_RENDERER], ids=["source", "no source"])
def test_single_atom_matches_the_analytic_probe_at_any_sub_pixel_position(renderer):
    cutoff = 0.030 / wavelength_A(80)
    variance = renderer.optics.source_sigma_A**2 + 0.06**2 + POTENTIAL_WIDTH_A**2
    probe = raster((0, 0), (40, 40), 0.3)
    for where in np.random.default_rng(0).random((6, 2)) * 4 + 4:
        distance = np.hypot(*(probe - where).T).T
        exact = renderer.cross_sections_A2(MO)[0] * round_kernel(distance, cutoff, variance)
        # 0.3 % is the softened edge of the aperture, common to all positions
        assert np.abs(one_atom(renderer, where, probe) / 1.003 - exact).max() < 1e-3 * exact.max()


@settings(max_examples=30, deadline=None)
@given(x=st.floats(0, 1), y=st.floats(0, 1), turn=st.floats(-3.1, 3.1), shift=st.floats(-1, 1))
def test_moving_atom_and_probe_together_changes_nothing(x, y, turn, shift):
    probe = raster((0, 0), (20, 20), 0.4)
    still = one_atom(SHARP_RENDERER, (4.0 + x, 4.0 + y), probe)
    step = np.array([0.37 * 0.4 * shift, 0.29])
    moved = one_atom(SHARP_RENDERER, np.array([4.0 + x, 4.0 + y]) + step, probe + step)
    assert np.abs(moved - still).max() < 1e-3 * still.max()
    c, s = math.cos(turn), math.sin(turn)
    rotate = np.array([[c, s], [-s, c]])
    turned = SHARP_RENDERER.image(
        np.array([[4.0 + x, 4.0 + y]]) @ rotate, MO, np.array([0.06]), probe @ rotate, rotation_rad=turn
    )
    assert np.abs(turned - still).max() < 1e-3 * still.max()


def test_image_is_the_sum_of_its_atoms():
    probe = raster((0, 0), (30, 30), 0.25)
    where, rms = np.array([[2.0, 3.0], [4.1, 3.9]]), np.array([0.06, 0.07])
    both = DEFAULT.image(where, np.array([42, 16]), rms, probe)
    apart = one_atom(DEFAULT, where[0], probe) + one_atom(DEFAULT, where[1], probe, S, 0.07)
    assert np.abs(both - apart).max() < 1e-6 * both.max()


@settings(max_examples=12, deadline=None)
@given(x=st.floats(4, 8), y=st.floats(4, 8), turn=st.floats(-1.5, 1.5), cols=st.integers(16, 40))
def test_a_sub_scan_agrees_with_the_same_points_of_a_larger_scan(x, y, turn, cols):
    specimen = Mos2(size_nm=(12, 12)).build(0)
    c, s = math.cos(turn), math.sin(turn)
    small = raster((-1.5, -1.5), (24, cols), 0.3 / 3.0)[..., :] @ np.array([[c, s], [-s, c]]) + (x, y)
    wide = raster((0, 0), (60, 60), 0.2)
    alone = DEFAULT.render(specimen, small, turn).channels["HAADF"]
    together = DEFAULT.render(specimen, np.concatenate([wide.reshape(-1, 2), small.reshape(-1, 2)])).channels["HAADF"]
    error = together[-small[..., 0].size :].reshape(alone.shape) - alone
    assert np.abs(error).max() < 3e-3 * alone.max()
    # as a displacement: least squares against the gradient, in units of the 0.1 nm pixel
    gradient = np.stack(np.gradient(alone))[:, 1:-1, 1:-1].reshape(2, -1)
    displacement = np.linalg.lstsq(gradient.T, error[1:-1, 1:-1].ravel(), rcond=None)[0]
    assert np.abs(displacement).max() < 0.02


def test_astigmatic_probe_stays_fixed_to_the_specimen_when_the_scan_turns():
    renderer = HaadfRenderer(Optics(c1_nm=4.0, a1_nm=3.0, a1_deg=10.0))
    probe = raster((0, 0), (30, 30), 0.3)
    assert one_atom(renderer, (4.2, 4.9), probe) == pytest.approx(
        renderer.image(np.array([[4.2, 4.9]]), MO, np.array([0.06]), probe, rotation_rad=0.6), abs=2e-5
    )
    round_one = one_atom(HaadfRenderer(Optics(c1_nm=4.0)), (4.2, 4.9), probe)
    assert np.abs(one_atom(renderer, (4.2, 4.9), probe) - round_one).max() > 1e-3


@pytest.mark.parametrize(("inner", "metal", "sulphur"), [(86, 0.01785, 0.00330), (60, 0.03516, 0.00688)])
def test_single_atom_peaks_agree_with_multislice(inner, metal, sulphur):
    renderer = HaadfRenderer(SHARP.model_copy(update={"detector_inner_mrad": float(inner)}))
    fine = raster((-1, -1), (41, 41), 2 / 41)
    peak = one_atom(renderer, (0, 0), fine)
    assert peak.max() == pytest.approx(metal, rel=0.03)
    assert one_atom(renderer, (0, 0), fine, S, 0.07).max() == pytest.approx(sulphur, rel=0.03)
    row = peak[20]
    half = np.flatnonzero(row > row.max() / 2)
    assert (half[-1] - half[0] + 1) * 2 / 41 == pytest.approx(0.77, abs=0.06)


def test_validity_says_when_the_model_may_not_be_trusted():
    assert DEFAULT.validity(0.3, True).linear_ok
    assert DEFAULT.validity(0.3, True).calibrated
    assert DEFAULT.validity(0.3, True).note == ""
    assert not DEFAULT.validity(8.0, True).linear_ok
    assert not HaadfRenderer(Optics(detector_inner_mrad=60)).validity(0.3, True).linear_ok
    elsewhere = HaadfRenderer(Optics(voltage_kV=200))
    assert not elsewhere.calibrated
    assert "qualitative" in elsewhere.validity(0.3, True).note
    assert elsewhere.exponent == 1.7
    assert not HaadfRenderer(Optics(), exponent=2.0).calibrated


def test_atoms_that_are_missing_or_far_away_are_not_seen():
    specimen = Mos2(size_nm=(4, 4)).build(0)
    empty = specimen.changed(np.zeros(len(specimen), dtype=bool), specimen.positions_A)
    probe = raster((0, 0), (16, 16), 0.25)
    assert not DEFAULT.render(empty, probe).channels["HAADF"].any()
    assert np.array_equal(one_atom(DEFAULT, (60.0, 60.0), probe), np.zeros((16, 16)))
