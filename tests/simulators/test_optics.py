import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import j0, j1

from aecontrol.errors import BadInput
from simulators.optics import (
    PROBE_EXTENT_A,
    Optics,
    interaction_constant,
    probe_intensity,
    velocity_ratio,
    wavelength_A,
)

PIXELS = 1024
AXIS = (np.arange(PIXELS) - PIXELS // 2) * PROBE_EXTENT_A / PIXELS
RADIUS = np.hypot(AXIS[:, None], AXIS[None, :])


@pytest.mark.parametrize(
    ("kV", "picometre", "milliradian", "beta"),
    [
        (30, 6.97908, 1.54327, 0.32838),
        (60, 4.86606, 1.13569, 0.44622),
        (80, 4.17572, 1.00871, 0.50240),
        (100, 3.70144, 0.92440, 0.54822),
        (200, 2.50793, 0.72884, 0.69531),
        (300, 1.96875, 0.65262, 0.77653),
    ],
)
def test_beam_constants_match_the_published_table(kV, picometre, milliradian, beta):
    assert wavelength_A(kV) * 100 == pytest.approx(picometre, rel=2e-6)
    assert interaction_constant(kV) * 1000 == pytest.approx(milliradian, rel=1e-5)
    assert velocity_ratio(kV) == pytest.approx(beta, abs=1e-5)


def width_at_half_maximum(probe):
    line = probe[PIXELS // 2, PIXELS // 2 :]
    beyond = int(np.argmax(line < line[0] / 2))
    return 2 * np.interp(line[0] / 2, line[[beyond, beyond - 1]], AXIS[PIXELS // 2 + np.array([beyond, beyond - 1])])


def test_aberration_free_probe_is_the_airy_pattern():
    optics = Optics(source_fwhm_nm=0.0)
    probe = probe_intensity(optics, PIXELS)
    cutoff = 0.030 / wavelength_A(80)
    assert width_at_half_maximum(probe) == pytest.approx(0.5145 / cutoff, rel=2e-3)
    x = 2 * math.pi * cutoff * np.maximum(RADIUS, 1e-9)
    airy = (2 * j1(x) / x) ** 2
    assert np.abs(probe / probe.max() - airy)[RADIUS < 5].max() < 5e-3
    assert probe.max() / (AXIS[1] - AXIS[0]) ** 2 == pytest.approx(math.pi * cutoff**2, rel=4e-3)
    beyond = float(j0(2 * math.pi * cutoff * 5) ** 2 + j1(2 * math.pi * cutoff * 5) ** 2)  # Rayleigh's encircled power
    assert probe[RADIUS > 5].sum() == pytest.approx(beyond, rel=0.12)


@pytest.mark.parametrize(
    ("kV", "alpha", "source_A", "c1_A", "fwhm", "d50", "outside"),
    [
        (60, 30, 0, 0, 0.834, 0.863, (0.152, 0.076, 0.022)),
        (80, 30, 0.5, 0, 0.843, 0.914, (0.145, 0.062, 0.019)),
        (80, 30, 0.8, 0, 1.040, 1.161, (0.189, 0.064, 0.019)),
        (80, 30, 0, 50, 0.756, 1.822, (0.435, 0.111, 0.021)),
        (300, 21.4, 0, 0, 0.473, 0.494, (0.084, 0.041, 0.012)),
    ],
)
def test_probe_sizes_and_tails_match_the_published_table(kV, alpha, source_A, c1_A, fwhm, d50, outside):
    optics = Optics(voltage_kV=kV, semi_angle_mrad=alpha, source_fwhm_nm=source_A / 10, c1_nm=c1_A / 10)
    probe = probe_intensity(optics, PIXELS, folds=1)  # the table was made on a box of 40 angstrom
    assert probe.min() >= 0.0
    assert probe.sum() == pytest.approx(1.0, abs=1e-12)
    assert width_at_half_maximum(probe) == pytest.approx(fwhm, abs=2e-3)
    order = np.argsort(RADIUS, axis=None)
    half_current = np.interp(0.5, np.cumsum(probe.ravel()[order]), RADIUS.ravel()[order])
    assert 2 * half_current == pytest.approx(d50, abs=3e-3)
    assert [probe[r < RADIUS].sum() for r in (1, 2, 5)] == pytest.approx(outside, abs=1.1e-3)


def test_spherical_aberration_is_balanced_by_negative_c1():
    c3_um, alpha = 10.0, 0.025
    best_nm = -0.5 * c3_um * 1e3 * alpha**2  # least phase variance over the aperture
    defoci = best_nm * np.array([-1.0, 0.0, 0.6, 1.0, 1.4])
    peaks = [
        probe_intensity(Optics(c3_um=c3_um, c1_nm=c1, semi_angle_mrad=1e3 * alpha, source_fwhm_nm=0), 256).max()
        for c1 in defoci
    ]
    assert np.argmax(peaks) == 3
    assert peaks[3] > 1.15 * peaks[1] > 1.5 * peaks[0]


def test_astigmatism_stretches_the_defocused_probe_along_its_azimuth():
    probe = probe_intensity(Optics(c1_nm=5.0, a1_nm=4.0, a1_deg=0.0), PIXELS)
    assert (probe * AXIS[None, :] ** 2)[RADIUS < 5].sum() > 2 * (probe * AXIS[:, None] ** 2)[RADIUS < 5].sum()


def test_grid_too_coarse_for_the_probe_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        probe_intensity(Optics(), 64)


@pytest.mark.parametrize(
    "change",
    [
        {"semi_angle_mrad": 0.0},
        {"voltage_kV": -80.0},
        {"voltage_kV": 0.0},
        {"source_fwhm_nm": -0.1},
        {"c1_nm": math.nan},
        {"detector_inner_mrad": 80.0},
    ],
)
def test_impossible_optics_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        Optics(**change)


def test_aberrations_that_do_not_fit_the_box_are_refused():
    with pytest.raises(BadInput, match="spread the probe"):
        probe_intensity(Optics(c1_nm=500.0), PIXELS)


def test_defocus_spread_is_the_mean_of_probes_over_a_gaussian_of_defoci():
    spread = probe_intensity(Optics(defocus_spread_nm=3.0, c1_nm=2.0), 256)
    defoci = np.linspace(-5, 5, 81)
    weights = np.exp(-0.5 * defoci**2)
    mean = sum(w * probe_intensity(Optics(c1_nm=2.0 + 3.0 * x), 256) for x, w in zip(defoci, weights, strict=True))
    assert np.abs(spread - mean / weights.sum()).max() < 1e-3 * spread.max()


@pytest.mark.parametrize(
    "optics",
    [
        Optics(voltage_kV=80, source_fwhm_nm=0),
        Optics(voltage_kV=60, semi_angle_mrad=34, c1_nm=-4, c3_um=5, c5_mm=2, source_fwhm_nm=0),
        Optics(voltage_kV=120, semi_angle_mrad=24, a1_nm=3, a1_deg=25, c1_nm=2, source_fwhm_nm=0),
        Optics(voltage_kV=200, semi_angle_mrad=21.4, a2_nm=40, a2_deg=-50, b2_nm=60, b2_deg=70, source_fwhm_nm=0),
        Optics(voltage_kV=300, semi_angle_mrad=18, c3_um=-3, a1_nm=1, b2_nm=20, source_fwhm_nm=0),
    ],
    ids=["ideal", "round", "astigmatic", "coma", "mixed"],
)
def test_probe_and_constants_agree_with_abtem(optics):
    abtem = pytest.importorskip("abtem", reason="abTEM (the multislice extra) is the oracle")
    from abtem.core.energy import energy2sigma, energy2wavelength

    assert optics.wavelength_A == pytest.approx(energy2wavelength(1e3 * optics.voltage_kV), rel=1e-5)
    assert interaction_constant(optics.voltage_kV) == pytest.approx(energy2sigma(1e3 * optics.voltage_kV), rel=1e-5)
    n = 512
    aberrations = {  # its C10 has the opposite sign of its defocus, its C21 counts three times
        "C10": 10 * optics.c1_nm, "C12": 10 * optics.a1_nm, "phi12": math.radians(optics.a1_deg),
        "C23": 10 * optics.a2_nm, "phi23": math.radians(optics.a2_deg),
        "C21": 10 * optics.b2_nm, "phi21": math.radians(optics.b2_deg),
        "C30": 1e4 * optics.c3_um, "C50": 1e7 * optics.c5_mm,
    }  # fmt: skip
    probe = abtem.Probe(
        energy=1e3 * optics.voltage_kV,
        semiangle_cutoff=optics.semi_angle_mrad,
        extent=40.0,
        gpts=n,
        aberrations={name: value for name, value in aberrations.items() if value},
    )
    theirs = probe.build(abtem.CustomScan([[20.0, 20.0]]), lazy=False).intensity().array.reshape(n, n).T  # [y, x]
    ours = probe_intensity(optics, n, folds=1)
    assert np.abs(ours / ours.sum() - theirs / theirs.sum()).max() < 1e-4 * (theirs / theirs.sum()).max()
