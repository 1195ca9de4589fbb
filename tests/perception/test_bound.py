"""The Cramer-Rao bound against published figures, finite differences of the likelihood, and simulated fits."""

from __future__ import annotations

import numpy as np
import pytest

from aecontrol.perception import bound


@pytest.mark.parametrize(
    ("counts", "pixel", "background", "expected"),
    [
        (100, 0.01, 0.01, 0.00436),
        (100, 0.01, 0.5, 0.00757),
        (1000, 0.01, 0.5, 0.00153),
        (1000, 0.02, 2.0, 0.00152),
        (50, 0.02, 0.2, 0.00743),
    ],
)
def test_isolated_columns_have_the_tabulated_bound(counts, pixel, background, expected):
    """Independent figures for a Gaussian of 0.04 nm in a window of 2.6 times that each way."""
    at, window = np.array([[0.003, -0.002]]), {"radius_nm": 0.01, "margin_nm": 0.094}
    _, error = bound.joint(at, np.array([float(counts)]), background, bound.gaussian(0.04), pixel, (0.0, 0.0), **window)
    assert error[0, :2] == pytest.approx(expected, rel=0.01)


def expected_image(theta, pixel=0.0125, size=72):
    """Means of two columns (counts, x, y each) and a background."""
    at = (np.arange(size) + 0.5) * pixel
    image = np.full((size, size), theta[-1])
    for n, x, y in theta[:-1].reshape(-1, 3):
        gx, gy = (np.exp(-((at - c) ** 2) / (2 * 0.042**2)) / np.sqrt(2 * np.pi) / 0.042 for c in (x, y))
        image += n * pixel**2 * gy[:, None] * gx
    return image


def test_overlapping_columns_match_the_curvature_of_the_likelihood():
    theta = np.array([300.0, 0.40, 0.45, 120.0, 0.53, 0.45, 0.3])
    steps = 1e-4 * np.array([300.0, 0.04, 0.04, 120.0, 0.04, 0.04, 0.3])
    slopes = [(expected_image(theta + e) - expected_image(theta - e)) / (2 * e.sum()) for e in np.diag(steps)]
    mean = expected_image(theta)
    fisher = np.array([[(a * b / mean).sum() for a in slopes] for b in slopes])
    reference = np.sqrt(np.diag(np.linalg.inv(fisher)))
    columns = theta[:-1].reshape(-1, 3)
    near, error = bound.joint(
        columns[:, 1:], columns[:, 0], 0.3, bound.gaussian(0.042), 0.0125, (0.45, 0.45), radius_nm=0.2, margin_nm=0.25
    )
    assert list(near) == [0, 1]
    assert error[:, :2].ravel() == pytest.approx(reference[[1, 2, 4, 5]], rel=2e-3)
    assert error[:, 2] == pytest.approx(reference[[0, 3]], rel=5e-3)
    alone = bound.joint(
        columns[:1, 1:], columns[:1, 0], 0.3, bound.gaussian(0.042), 0.0125, (0.45, 0.45), radius_nm=0.2, margin_nm=0.25
    )[1]
    assert error[0, 0] > 1.05 * alone[0, 0]  # a neighbour along x costs precision along x
    assert error[0, 1] == pytest.approx(alone[0, 1], rel=0.1)


def test_the_quick_estimate_matches_the_joint_bound_of_a_lattice():
    at = 0.25 * np.stack(np.meshgrid(np.arange(-4.0, 5), np.arange(-4.0, 5)), -1).reshape(-1, 2)
    for counts, per_nm2 in ((50.0, 200.0), (2000.0, 500.0)):
        near, error = bound.joint(
            at, np.full(len(at), counts), per_nm2 * 0.0125**2, bound.gaussian(0.045), 0.0125, (0.0, 0.0)
        )
        middle = error[np.argmin(np.hypot(*at[near].T)), :2].mean()
        quick = bound.expected_error_nm(np.array([counts]), per_nm2, 0.045, 0.0125, 0.25)
        assert quick[0] == pytest.approx(middle, rel=0.05)
