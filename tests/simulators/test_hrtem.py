"""The TEM image against the contrast transfer of weak phase objects, abTEM's lens, and a camera that is known."""

import math

import numpy as np
import pytest

from aecontrol.errors import BadInput
from simulators.hrtem import (
    HrtemOptics,
    Mtf,
    aberration_phase,
    ctf,
    fit_mtf,
    focal_series,
    image_intensity,
    record,
    scherzer_c1_nm,
)

SHARP = HrtemOptics(cc_mm=0.0, convergence_mrad=0.0, c1_nm=-15.0, c3_um=5.0, aperture_mrad=45.0)
SAMPLING = (0.16, 0.2)
SHAPE = (320, 400)  # 64 A square


def frequencies():
    ky = np.fft.fftfreq(SHAPE[0], SAMPLING[1])[:, None]
    return np.fft.fftfreq(SHAPE[1], SAMPLING[0])[None, :], ky


def noise_object(strength=1e-4):
    return strength * np.random.default_rng(0).standard_normal(SHAPE)


def measured_transfer(optics):
    """FT(image) over 2 FT(phase), which for a weak phase is the contrast transfer with its sign."""
    phase = noise_object()
    image = image_intensity(np.exp(1j * phase), SAMPLING, optics)
    return np.fft.fft2(image) / (2.0 * np.fft.fft2(phase))


def rings(values, k, width):
    ring = np.round(k / width).astype(int)
    return np.bincount(ring.ravel(), weights=values.ravel()) / np.maximum(1, np.bincount(ring.ravel()))


def test_a_weak_phase_object_vanishes_where_chi_is_a_multiple_of_pi():
    kx, ky = frequencies()
    k = np.hypot(kx, ky)
    width = 1.0 / 64.0
    limit = SHARP.aperture_mrad * 1e-3 / SHARP.wavelength_A
    inside = np.arange(3, int(limit / width) - 1)
    power = rings(np.abs(measured_transfer(SHARP)) ** 2, k, width)
    at = inside * width
    seen = inside[1:-1][(power[inside][1:-1] < power[inside][:-2]) & (power[inside][1:-1] < power[inside][2:])]
    seen = seen[power[seen] < 0.25]
    fine = np.linspace(at[0], at[-1], 20001)
    turns = 0.0417572 * -150.0 * fine**2 + 0.5 * 5e4 * 0.0417572**3 * fine**4  # chi / pi
    zeros = fine[1:][np.floor(turns[1:]) != np.floor(turns[:-1])]
    assert len(zeros) >= 4
    for zero in zeros:
        assert np.abs(seen * width - zero).min() <= width


@pytest.mark.parametrize(
    "change", [{}, {"cc_mm": 1.5, "energy_spread_eV": 0.3}, {"convergence_mrad": 0.5}, {"a1_nm": 5.0, "a1_deg": 30.0}]
)
def test_a_weak_phase_object_shows_the_contrast_transfer_with_its_sign_and_envelopes(change):
    optics = SHARP.model_copy(update=change)
    kx, ky = frequencies()
    away = (np.hypot(kx, ky) > 0) & (np.hypot(kx, ky) < 0.98 * optics.aperture_mrad * 1e-3 / optics.wavelength_A)
    np.testing.assert_allclose(measured_transfer(optics)[away], ctf(optics, kx, ky)[away], atol=0.02)


@pytest.mark.parametrize(("a1_nm", "convergence_mrad"), [(3.0, 0.0), (0.0, 0.3)])
def test_the_lens_is_abtems(a1_nm, convergence_mrad):
    abtem = pytest.importorskip("abtem", reason="abTEM is not installed: pip install -e '.[multislice]'")
    spreads = {"cc_mm": 1.4, "energy_spread_eV": 0.4, "convergence_mrad": convergence_mrad}
    optics = HrtemOptics(c1_nm=-7.0, a1_nm=a1_nm, a1_deg=25.0, **spreads)
    settings = {"C10": -70.0, "C12": 10.0 * a1_nm, "phi12": math.radians(25.0), "C30": 5e4}
    spread = {"focal_spread": math.sqrt(2.0) * 70.0, "angular_spread": convergence_mrad}  # 1.4 mm x 0.4 eV / 80 keV
    lens = abtem.CTF(energy=80e3, semiangle_cutoff=45.0, soft=False, **spread, **settings)
    k = np.linspace(0.02, 1.0, 60)
    azimuth = np.linspace(-3.0, 3.0, 60)
    theirs = lens._evaluate_from_angular_grid(k * 0.0417572, azimuth)
    np.testing.assert_allclose(ctf(optics, k * np.cos(azimuth), k * np.sin(azimuth)), -theirs.imag, atol=1e-3)


def test_scherzers_focus_passes_a_wide_band_of_one_sign():
    c1 = scherzer_c1_nm(200.0, 1000.0)
    assert c1 == pytest.approx(-60.1, abs=0.1)  # 1.2 sqrt(1 mm x 2.508 pm)
    optics = HrtemOptics(voltage_kV=200.0, c1_nm=c1, c3_um=1000.0)
    k = np.linspace(0.01, 0.6, 600)
    transfer = np.sin(aberration_phase(optics, k, np.zeros_like(k)))
    first_zero = k[np.flatnonzero(transfer > 0)[0]]
    assert first_zero == pytest.approx(1.549 * (1e7 * 0.0250793**3) ** -0.25, rel=0.01)  # sqrt(2.4) (C3 lambda^3)^-1/4
    assert (transfer[(k > 0.5 * first_zero) & (k < 0.9 * first_zero)] < -0.6).all()
    with pytest.raises(BadInput, match="no Scherzer"):
        scherzer_c1_nm(200.0, -1.0)


def test_a_wave_of_one_gives_one_and_too_coarse_a_grid_is_refused():
    assert image_intensity(np.ones((32, 32)), (0.2, 0.2), HrtemOptics()) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(BadInput, match="cannot hold"):
        image_intensity(np.ones((32, 32)), (0.4, 0.2), HrtemOptics())
    with pytest.raises(BadInput, match="focal spread"):
        image_intensity(np.ones((32, 32)), (0.1, 0.1), HrtemOptics(cc_mm=50.0, energy_spread_eV=3.0, aperture_mrad=90))


@pytest.mark.parametrize(("mtf", "read_noise"), [((0.25, 1.2, 0.1), 0.0), ((0.35, 0.8, 0.02), 1.5)])
def test_the_mtf_is_found_again_in_vacuum_frames(mtf, read_noise):
    q0, p, c = mtf
    truth = Mtf(q0_per_px=q0, power=p, floor=c)
    random = np.random.default_rng(3)
    frames = np.stack([record(np.ones((512, 512)), 20.0, truth, read_noise, 2.5, random) for _ in range(10)])
    assert frames.mean() == pytest.approx(50.0, rel=1e-3)
    found, _ = fit_mtf(frames, 2.5)
    for q, bar in ((0.25, 0.03), (0.5, 0.05)):
        expected = (1 - c) / (1 + (q / q0) ** (2 * p)) + c
        assert float(found.at(np.array(q))) == pytest.approx(expected, rel=bar)
    with pytest.raises(BadInput, match="vacuum frames"):
        fit_mtf(frames[:1], 2.5)


def test_a_camera_pixel_sees_the_mean_over_its_square():
    rows = np.cos(2 * np.pi * 32 * np.arange(128) / 128)[:, None]  # a quarter cycle per pixel
    image = np.broadcast_to(1.0 + 0.5 * rows, (128, 128))
    perfect = Mtf(q0_per_px=1e4, power=1.0, floor=0.0)
    frame = record(image, 4e4, perfect, 0.0, 1.0, np.random.default_rng(0))
    over_square = 0.5 * (math.sin(math.pi / 4) / (math.pi / 4))
    assert 2 * np.mean(frame * rows) / 4e4 == pytest.approx(over_square, rel=0.01)


def test_a_focal_series_rises_in_defocus_and_is_the_same_again():
    wave = np.exp(1j * noise_object(0.05))
    frames, c1 = focal_series(wave, SAMPLING, HrtemOptics(), 100.0, Mtf(), seed=5)
    assert frames.shape == (3, *SHAPE)
    assert (np.diff(c1) > 0).all()
    assert c1 - scherzer_c1_nm(80.0, 5.0) == pytest.approx([-10, 0, 10], abs=4.0)
    again, _ = focal_series(wave, SAMPLING, HrtemOptics(), 100.0, Mtf(), seed=5)
    np.testing.assert_array_equal(frames, again)
    assert (focal_series(wave, SAMPLING, HrtemOptics(), 100.0, Mtf(), seed=6)[1] != c1).all()
