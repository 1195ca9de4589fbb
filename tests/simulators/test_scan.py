import math

import numpy as np
import pytest
from scipy.stats import chi2, poisson

from aecontrol.types import ScanRegion
from simulators.detector import Detector
from simulators.scan import ScanModel, nominal_positions_nm
from simulators.streams import stream

IDEAL = ScanModel(line_jitter_nm=0.0)
REGION = ScanRegion(center_nm=(5.0, 4.0), fov_nm=(3.0, 2.0), shape=(40, 20), dwell_time_s=1e-4, rotation_rad=0.7)


def test_ideal_scan_puts_pixel_centres_half_a_pixel_inside_the_regions_corners():
    first, line_end, last, line_start = (np.array(corner) for corner in REGION.corners_nm())
    fast, slow = (line_end - first) / 20, (line_start - first) / 40
    for positions in (IDEAL.positions_nm(REGION, 3.0, 0, 0), nominal_positions_nm(REGION)):
        assert positions[0, 0] == pytest.approx(first + (fast + slow) / 2)
        assert positions[-1, -1] == pytest.approx(last - (fast + slow) / 2)
        assert positions[7, 3] == pytest.approx(first + 3.5 * fast + 7.5 * slow)


def test_line_times_and_steady_drift():
    scan = ScanModel(line_jitter_nm=0.0, drift_nm_per_s=(0.3, -0.2), flyback_s=5e-3)
    assert scan.frame_s(REGION) == pytest.approx(800 * 1e-4 + 39 * 5e-3)
    moved = scan.positions_nm(REGION, 10.0, 0, 0) - IDEAL.positions_nm(REGION, 10.0, 0, 0)
    late = 10.0 + 17 * (20e-4 + 5e-3) + 6 * 1e-4
    assert moved[17, 6] == pytest.approx([0.3 * late, -0.2 * late])


def test_wandering_drift_is_a_pure_function_of_time_with_the_stated_velocity_spread():
    scan = ScanModel(drift_wander_nm_per_s=0.05, drift_wander_s=20.0)
    assert np.array_equal(scan.drift_nm(np.array([7.0]), 3)[0], scan.drift_nm(np.linspace(0, 70, 11), 3)[1])
    assert scan.drift_nm(np.zeros(1), 3) == pytest.approx(0.0)
    step = 1e-3
    velocity = np.array(
        [
            (scan.drift_nm(np.array([0.0, 20.0]) + step, s) - scan.drift_nm(np.array([0.0, 20.0]), s)) / step
            for s in range(400)
        ]
    )  # [seed, time, axis]
    assert velocity.std() == pytest.approx(0.05, rel=0.08)
    correlation = np.mean(velocity[:, 0] * velocity[:, 1]) / np.mean(velocity**2)
    assert correlation == pytest.approx(math.exp(-1.0), abs=0.12)


def test_line_jitter_moves_whole_lines_with_the_stated_spread_and_correlation():
    region = REGION.model_copy(update={"shape": (4000, 3)})
    scan = ScanModel(line_jitter_nm=0.01, line_jitter_correlation=0.6)
    shift = scan.positions_nm(region, 0.0, 1, 5) - IDEAL.positions_nm(region, 0.0, 1, 5)
    assert np.ptp(shift, axis=1) == pytest.approx(0.0, abs=1e-12)
    line = shift[:, 0]
    assert line.std(axis=0) == pytest.approx([0.01, 0.01], rel=0.08)
    for axis in (0, 1):
        assert np.corrcoef(line[:-1, axis], line[1:, axis])[0, 1] == pytest.approx(0.6, abs=0.05)
    assert not np.array_equal(scan.positions_nm(region, 0.0, 1, 6), scan.positions_nm(region, 0.0, 1, 5))


def test_flyback_swing_shear_and_rotation_error_act_along_their_axes():
    flat = REGION.model_copy(update={"rotation_rad": 0.0})
    ideal = IDEAL.positions_nm(flat, 0.0, 0, 0)
    swing = IDEAL.model_copy(update={"swing_nm": 0.2, "swing_decay_s": 3e-4}).positions_nm(flat, 0.0, 0, 0) - ideal
    assert swing[5, :, 0] == pytest.approx(0.2 * np.exp(-np.arange(20) / 3))
    assert not swing[..., 1].any()
    shear = IDEAL.model_copy(update={"shear": 0.1}).positions_nm(flat, 0.0, 0, 0) - ideal
    assert shear[..., 0] == pytest.approx(0.1 * (ideal[..., 1] - 4.0))
    turned = IDEAL.model_copy(update={"rotation_error_deg": 3.0}).positions_nm(REGION, 0.0, 0, 0)
    expected = nominal_positions_nm(REGION.model_copy(update={"rotation_rad": 0.7 + math.radians(3.0)}))
    assert turned == pytest.approx(expected)


def test_counts_are_poisson_and_noiseless_parts_give_back_the_fraction():
    fraction = np.full((400, 250), 0.02)
    counts, saturated = Detector(dark_counts=0.5).read(fraction, 100.0, stream(0, "noise"))
    assert counts.dtype == np.float32
    assert saturated == 0.0
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.02)
    histogram = np.bincount(counts.astype(int).ravel(), minlength=9)[:9]
    expected = poisson.pmf(np.arange(9), 2.5) * counts.size
    assert np.sum((histogram - expected) ** 2 / expected) < chi2.ppf(0.9999, 9)
    many = Detector(dark_counts=0.0, efficiency=0.5).read(fraction, 1e9, stream(0, "noise"))[0]
    assert many / 1e9 == pytest.approx(0.5 * fraction, rel=2e-3)


def test_gain_offset_read_noise_and_saturation():
    fraction = np.full((300, 300), 0.1)
    detector = Detector(dark_counts=0.0, gain=3.0, offset=50.0, read_noise=4.0)
    signal = detector.read(fraction, 100.0, stream(1, "noise"))[0]
    assert signal.mean() == pytest.approx(3 * 10 + 50, rel=0.01)
    assert signal.var() == pytest.approx(9 * 10 + 16, rel=0.03)
    clipped, share = detector.model_copy(update={"saturation": 80.0}).read(fraction, 100.0, stream(1, "noise"))
    assert share == pytest.approx(np.mean(signal >= 80.0))
    assert clipped == pytest.approx(np.minimum(signal, 80.0))
