import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from aecontrol.errors import BadInput
from aecontrol.types import ScanRegion
from simulators.optics import Optics, probe_intensity, wavelength_A
from simulators.render import Renderer
from simulators.scan import nominal_positions_nm
from simulators.scattering import POTENTIAL_WIDTH_A, TABLE_FILE, Contrast
from simulators.specimens.sheets import Mos2

from .oracles import round_kernel

SHARP = Optics(source_fwhm_nm=0.0)
POWER = Contrast(level="power")
DEFAULT = Renderer(Optics())
SHARP_RENDERER = Renderer(SHARP)
DETECTORS = {"BF": (0.0, 30.0), "MAADF": (30.0, 86.0), "HAADF": (86.0, 220.0)}
MO, S = np.array([42]), np.array([16])


def raster(low, shape, pixel):
    y, x = np.meshgrid(np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5, indexing="ij")
    return np.stack([low[0] + pixel * x, low[1] + pixel * y], axis=-1)


def image(renderer, *atoms_and_probe, **more):
    return renderer.images(*atoms_and_probe, **more)["HAADF"]


def one_atom(renderer, where, probe, numbers=MO, rms=0.06):
    return image(renderer, np.array([where]), numbers, np.array([rms]), probe)


def test_an_atom_appears_where_it_is():
    pixel = 0.2
    seen = one_atom(DEFAULT, (3.0, 7.0), raster((0, 0), (60, 40), pixel))
    # 7.0 / 0.2 - 1/2 = 34.5 and 3.0 / 0.2 - 1/2 = 14.5: the four pixels around that point share the maximum
    assert seen[34:36, 14:16] == pytest.approx(seen.max(), rel=1e-3)
    assert seen[33, 14] < 0.95 * seen.max() > seen[34, 13]


@pytest.mark.parametrize("optics", [Optics(), SHARP], ids=["source", "no source"])
def test_single_atom_matches_the_analytic_probe_at_any_sub_pixel_position(optics):
    renderer = Renderer(optics, contrast=POWER)
    cutoff = 0.030 / wavelength_A(80)
    variance = renderer.optics.source_sigma_A**2 + 0.06**2 + POTENTIAL_WIDTH_A**2
    probe = raster((0, 0), (40, 40), 0.3)
    for where in np.random.default_rng(0).random((6, 2)) * 4 + 4:
        distance = np.hypot(*(probe - where).T).T
        exact = renderer.objects["HAADF"].strength_A2(42) * round_kernel(distance, cutoff, variance)
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
    turned = image(
        SHARP_RENDERER, np.array([[4.0 + x, 4.0 + y]]) @ rotate, MO, np.array([0.06]), probe @ rotate, rotation_rad=turn
    )
    assert np.abs(turned - still).max() < 1e-3 * still.max()


def test_image_is_the_sum_of_its_atoms():
    probe = raster((0, 0), (30, 30), 0.25)
    where, rms = np.array([[2.0, 3.0], [4.1, 3.9]]), np.array([0.06, 0.07])
    both = image(DEFAULT, where, np.array([42, 16]), rms, probe)
    apart = one_atom(DEFAULT, where[0], probe) + one_atom(DEFAULT, where[1], probe, S, 0.07)
    assert np.abs(both - apart).max() < 1e-6 * both.max()


def crop_of_overview(specimen, region):
    """The frame of ``region`` cut from an upright overview of 0.012 nm pixels by cubic splines."""
    side = max(region.fov_nm) * 1.5 + 0.6
    pixel = 0.012
    n = math.ceil(side / pixel)
    corner = np.asarray(region.center_nm) - n * pixel / 2
    wide = DEFAULT.render(specimen, raster(corner, (n, n), pixel)).channels["HAADF"]
    at = (nominal_positions_nm(region) - corner) / pixel - 0.5
    return ndimage.map_coordinates(wide.astype(float), [at[..., 1], at[..., 0]], order=3)


@settings(max_examples=20, deadline=None)
@given(
    x=st.floats(4, 8),
    y=st.floats(4, 8),
    turn=st.floats(-3.1, 3.1),
    fov=st.tuples(st.floats(1.0, 3.0), st.floats(1.0, 3.0)),
    shape=st.tuples(st.integers(24, 60), st.integers(24, 60)),
)
def test_a_sub_scan_is_the_crop_of_the_overview_at_any_rotation_field_and_sampling(x, y, turn, fov, shape):
    specimen = Mos2(size_nm=(12, 12)).build(0)
    region = ScanRegion(center_nm=(x, y), fov_nm=fov, shape=shape, rotation_rad=turn, dwell_time_s=1e-5)
    alone = DEFAULT.render(specimen, nominal_positions_nm(region), turn).channels["HAADF"].astype(float)
    error = crop_of_overview(specimen, region) - alone
    assert np.abs(error).max() < 4e-3 * alone.max()
    # as a displacement: least squares against the gradient, in pixels
    gradient = np.stack(np.gradient(alone))[:, 1:-1, 1:-1].reshape(2, -1)
    displacement = np.linalg.lstsq(gradient.T, error[1:-1, 1:-1].ravel(), rcond=None)[0]
    assert np.abs(displacement).max() < 0.02


def test_astigmatic_probe_stays_fixed_to_the_specimen_when_the_scan_turns():
    renderer = Renderer(Optics(c1_nm=4.0, a1_nm=3.0, a1_deg=10.0))
    probe = raster((0, 0), (30, 30), 0.3)
    assert one_atom(renderer, (4.2, 4.9), probe) == pytest.approx(
        image(renderer, np.array([[4.2, 4.9]]), MO, np.array([0.06]), probe, rotation_rad=0.6), abs=2e-5
    )
    round_one = one_atom(Renderer(Optics(c1_nm=4.0)), (4.2, 4.9), probe)
    assert np.abs(one_atom(renderer, (4.2, 4.9), probe) - round_one).max() > 1e-3


def test_comatic_image_is_the_probe_seen_from_the_atom():
    optics = SHARP.model_copy(update={"b2_nm": 150.0, "b2_deg": 30.0})
    renderer = Renderer(optics, contrast=POWER)
    widened = probe_intensity(optics, 256, extra_variance_A2=0.06**2 + POTENTIAL_WIDTH_A**2)
    offset = (np.arange(-20, 21)) * 40.0 / 256
    probe = np.stack(np.meshgrid(offset, offset), axis=-1)
    seen = one_atom(renderer, (0.0, 0.0), probe)
    # the probe at r illuminates the atom with P(0 - r)
    expected = widened[128 - 20 : 128 + 21, 128 - 20 : 128 + 21][::-1, ::-1]
    assert np.abs(seen / seen.sum() - expected / expected.sum()).max() < 2e-3 * (expected / expected.sum()).max()
    assert np.abs(expected - expected[::-1, ::-1]).max() > 0.1 * expected.max()


@pytest.mark.parametrize("setting", [(60.0, 30.0), (80.0, 30.0), (100.0, 30.0), (200.0, 21.4), (300.0, 21.4)])
def test_single_atoms_are_those_of_the_multislice_tables(setting):
    kV, alpha = setting
    tables = np.load(TABLE_FILE)
    within = tables[f"{kV:g}kV_{alpha:g}mrad"].astype(float)
    edges, radii = tables["edges_mrad"], tables["radii_A"]
    renderer = Renderer(
        Optics(voltage_kV=kV, semi_angle_mrad=alpha, source_fwhm_nm=0.0), {"A": (90, 200), "B": (50, 90)}
    )
    probe = np.stack([3.3 + radii * 0.6, 4.1 + radii * 0.8], axis=-1)
    for number in (6, 16, 42, 79):
        found = renderer.images(np.array([[3.3, 4.1]]), np.array([number]), np.zeros(1), probe)
        row = within[list(tables["numbers"]).index(number)]
        for name, (inner, outer) in renderer.detectors.items():
            expected = row[:, edges == outer] - row[:, edges == inner]
            assert np.abs(found[name] - expected.ravel()).max() < 2e-3 * expected.max()


def test_all_electrons_reach_a_detector_or_pass_beyond_the_last():
    probe = raster((0, 0), (24, 24), 0.25)
    rendered = Renderer(Optics(), DETECTORS).render(Mos2(size_nm=(3, 3)).build(0), 0.1 * probe)
    bright, middle, dark = (rendered.channels[name] for name in DETECTORS)
    total = bright + middle + dark
    assert total.max() <= 1.0 + 1e-5
    assert total.min() > 0.99
    assert np.corrcoef(bright.ravel(), dark.ravel())[0, 1] < -0.9  # dark where the others are bright
    assert middle.mean() > 2 * dark.mean()
    assert all(validity.linear_ok == (name != "MAADF") for name, validity in rendered.validity.items())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(80.0, 30.0), (200.0, 21.4)]), st.floats(0, 100), st.floats(20, 110), st.sampled_from([6, 22, 79])
)
def test_any_ring_lets_an_atoms_image_die_away_and_two_rings_add_up(setting, inner, width, number):
    optics = Optics(voltage_kV=setting[0], semi_angle_mrad=setting[1], source_fwhm_nm=0.0)
    middle, outer = inner + 0.4 * width, inner + width
    whole = Renderer(optics, {"A": (inner, outer)})
    parts = Renderer(optics, {"A": (inner, middle), "B": (middle, outer)})
    probe = np.array([[10.0, 10.0], [10.6, 10.0], [16.5, 10.0]])
    atom = np.array([[10.0, 10.0]]), np.array([number]), np.array([0.06])
    one, two = whole.images(*atom, probe), parts.images(*atom, probe)
    scale = max(np.abs(two[name]).max() for name in "AB")
    assert np.abs(one["A"] - two["A"] - two["B"]).max() < 0.03 * scale + 1e-5
    assert np.abs(one["A"][2]) < 0.03 * scale + 1e-5
    assert whole.vacuum["A"] == pytest.approx(parts.vacuum["A"] + parts.vacuum["B"], abs=1e-9)


@pytest.mark.parametrize(
    ("annulus", "sign"),
    [((0.0, 30.0), -1), ((0.0, 40.0), -1), ((24.0, 200.0), 1), ((26.0, 200.0), 1), ((10.0, 20.0), -1)],
)
@pytest.mark.parametrize(
    "optics", [Optics(), Optics(voltage_kV=120.0, semi_angle_mrad=30.0)], ids=["table", "no table"]
)
def test_power_law_knows_whether_a_detector_gains_or_loses(optics, annulus, sign):
    strength = Renderer(optics, {"A": annulus}, POWER).objects["A"].strength_A2(42)
    assert math.copysign(1.0, strength) == sign


def test_power_law_keeps_the_scale_of_the_tables_and_has_its_exponent():
    table, power = Renderer(Optics()), Renderer(Optics(), contrast=Contrast(level="power", exponent=1.8))
    ratio = [power.objects["HAADF"].strength_A2(z) / table.objects["HAADF"].strength_A2(z) for z in (6, 16, 42, 79)]
    assert 0.6 < min(ratio) < 1.0 < max(ratio) < 1.5
    strength = power.objects["HAADF"].strength_A2
    assert math.log(strength(42) / strength(16)) / math.log(42 / 16) == pytest.approx(1.8)


def test_validity_says_when_the_model_may_not_be_trusted():
    def haadf(renderer, thickness_nm=0.3, zone_axis=True):
        return renderer.validity(thickness_nm, zone_axis)["HAADF"]

    assert (haadf(DEFAULT).linear_ok, haadf(DEFAULT).calibrated, haadf(DEFAULT).note) == (True, True, "")
    assert not haadf(DEFAULT, 8.0).linear_ok
    assert haadf(DEFAULT, 8.0, zone_axis=False).linear_ok
    assert not haadf(Renderer(Optics(), {"HAADF": (60.0, 200.0)})).linear_ok
    elsewhere = Renderer(Optics(voltage_kV=90))
    assert not haadf(elsewhere).calibrated
    assert "qualitative" in haadf(elsewhere).note
    small_disc = Renderer(Optics(), {"BF": (0.0, 15.0)}).validity(0.3, True)["BF"]
    assert not small_disc.linear_ok
    assert "multislice" in small_disc.note


@pytest.mark.parametrize(
    ("number", "place", "word"), [(2, 0.0, "atomic number"), (42, math.nan, "not finite"), (42, math.inf, "not finite")]
)
def test_what_cannot_be_rendered_is_refused(number, place, word):
    with pytest.raises(BadInput, match=word):
        one_atom(DEFAULT, (0.0, 0.0), np.array([[[place, 0.0]]]), np.array([number]))


@pytest.mark.parametrize("annulus", [(200.0, 86.0), (-1.0, 50.0), (50.0, 50.0)])
def test_impossible_detector_is_refused(annulus):
    with pytest.raises(BadInput, match="inner < outer"):
        Renderer(Optics(), {"HAADF": annulus})


def test_detectors_beyond_the_tables_are_refused_when_tables_are_asked_for():
    with pytest.raises(BadInput, match="230 mrad is beyond"):
        Renderer(Optics(), {"HAADF": (86.0, 230.0)}, Contrast(level="table"))


def test_aberrations_are_named_where_they_take_the_calibration_away():
    validity = Renderer(Optics(c1_nm=4.0)).validity(0.3, True)["HAADF"]
    assert validity.linear_ok
    assert not validity.calibrated
    assert "aberration-free" in validity.note


def test_atoms_that_are_missing_or_far_away_are_not_seen():
    specimen = Mos2(size_nm=(4, 4)).build(0)
    empty = specimen.changed(np.zeros(len(specimen), dtype=bool), specimen.positions_A)
    probe = raster((0, 0), (16, 16), 0.25)
    assert not DEFAULT.render(empty, probe).channels["HAADF"].any()
    assert np.array_equal(one_atom(DEFAULT, (60.0, 60.0), probe), np.zeros((16, 16)))
