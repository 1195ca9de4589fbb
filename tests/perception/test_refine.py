"""The joint fit against the Cramer-Rao bound, real probes' tails, columns that starts lack, and symmetries."""

from __future__ import annotations

import numpy as np
import pytest

from aecontrol.perception import bound, refine

PIXEL, BLUR, APART = 0.0125, 0.042, 0.24


def strained_lattice(rng, size):
    """[n, 2] nm: a square lattice with 10 pm of disorder and 4 % of its columns missing, beyond the rims too."""
    line = np.arange(-0.11, size + 0.2, APART)
    at = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    return (at + rng.normal(0, 0.01, at.shape))[rng.random(len(at)) > 0.04]


def expected(at, counts, pixels, parts=((1.0, BLUR, BLUR),)):
    """Counts per pixel of columns whose spot is a sum of Gaussians (share, sigma along x, along y)."""
    centre = (np.arange(pixels) + 0.5) * PIXEL
    image = np.zeros((pixels, pixels))
    for share, sx, sy in parts:
        gx, gy = (
            PIXEL * np.exp(-0.5 * ((centre - at[:, k : k + 1]) / s) ** 2) / (np.sqrt(2 * np.pi) * s)
            for k, s in ((0, sx), (1, sy))
        )
        image += (gy * (share * counts)[:, None]).T @ gx
    return image


def fitted(image, at, rng):
    """The fit from starts 10 pm off, and its positions [n, 2] and standard errors, nm."""
    start = (at + rng.normal(0, 0.01, at.shape)) / PIXEL
    fit = refine.refine(image, start[:, 0], start[:, 1], (PIXEL, PIXEL))
    return fit, PIXEL * np.stack([fit.x, fit.y], 1), PIXEL * np.stack([fit.sigma_x, fit.sigma_y], 1)


@pytest.mark.parametrize(("counts", "most"), [(30.0, 1.15), (3000.0, 1.05)])
def test_bright_and_dim_columns_reach_the_joint_bound_and_say_so(counts, most):
    rng = np.random.default_rng(3)
    at = strained_lattice(rng, 4.0)
    n = counts * np.where(rng.random(len(at)) < 0.5, 1.0, 3.0)
    background = 0.05 * n.mean() * (PIXEL / APART) ** 2
    image = rng.poisson(expected(at, n, 320) + background)
    _, found, sigma = fitted(image, at, rng)
    inside = ((at > 0.3) & (at < 3.7)).all(1)
    bounds = []
    for x, y in ((1.2, 1.4), (2.0, 2.6), (2.8, 1.1)):
        near, error = bound.joint(at, n, background, bound.gaussian(BLUR), PIXEL, (x, y), 0.6, 0.15)
        bounds += [(n[j], *e[:2]) for j, e in zip(near, error, strict=True) if np.hypot(*(at[j] - [x, y])) < 0.3]
    level, limits = np.array(bounds)[:, 0], np.array(bounds)[:, 1:]
    # the joint bound hardly depends on where a column is, but on its counts
    limit = np.where(n == counts, *(np.sqrt((limits[level == m] ** 2).mean()) for m in (counts, 3 * counts)))
    ratio = ((found[: len(at)] - at) / limit[:, None])[inside]
    assert len(ratio) > 180
    # 360 values or more: the sampling error of an RMS is 3.7 %, that of a mean 5 %
    assert 0.9 < np.sqrt((ratio**2).mean()) < most + 0.07
    assert np.abs(ratio.mean(0)).max() < 0.2
    covered = np.abs((found[: len(at)] - at)[inside] / sigma[: len(at)][inside])
    assert 0.62 < (covered < 1).mean() < 0.74
    assert 0.92 < (covered < 1.96).mean() < 0.98


def test_tails_and_astigmatism_of_a_probe_do_not_pull_dim_columns_to_bright_ones():
    rng = np.random.default_rng(5)
    bright = np.stack(np.meshgrid(*(np.arange(0.1, 4.0, 0.36),) * 2), -1).reshape(-1, 2)
    at = np.concatenate([bright, bright + np.array([0.15, 0.02])])
    n = np.repeat([1e4, 1e3], len(bright))
    spot = ((0.75, 0.046, 0.043), (0.15, 0.10, 0.085), (0.1, 0.16, 0.16))
    image = rng.poisson(expected(at, n, 320, spot) + 0.2)
    fit, found, sigma = fitted(image, at, rng)
    dim = np.arange(len(bright), len(at))[((bright > 0.4) & (bright < 3.5)).all(1)]
    error = found[dim] - at[dim]
    # 1.2 standard errors without wings; the sampling error is 0.11
    assert np.abs(error.mean(0)).max() < 0.5 * np.median(sigma[dim])
    assert fit.tail > 0.1


def test_what_the_starts_lack_is_found_in_the_residual_and_frees_its_neighbours():
    rng = np.random.default_rng(7)
    at = strained_lattice(rng, 3.0)
    image = rng.poisson(expected(at, np.full(len(at), 500.0), 240) + 0.05)
    middle = int(np.argmin(np.hypot(*(at - 1.5).T)))
    lacking = np.delete(at, middle, 0)
    fit, found, _ = fitted(image, lacking, rng)
    added = found[len(lacking) :]
    assert fit.added == len(added) >= 1
    assert np.hypot(*(added - at[middle]).T).min() < 0.01
    inside = ((added > 0.1) & (added < 2.9)).all(1)
    assert inside.sum() == 1  # the others shine in from beyond the rim
    whole = fitted(image, at, rng)[1]
    neighbours = np.hypot(*(lacking - at[middle]).T) < 1.5 * APART
    assert np.abs(found[: len(lacking)] - np.delete(whole[: len(at)], middle, 0))[neighbours].max() < 0.002


def test_a_few_chance_counts_are_no_columns():
    """Isolated columns on 0.2 counts a pixel: Poisson noise that a Gaussian test would take for columns."""
    rng = np.random.default_rng(11)
    at = np.stack(np.meshgrid(*(np.arange(0.5, 6.2, 0.9),) * 2), -1).reshape(-1, 2)
    for _ in range(3):
        image = rng.poisson(expected(at, np.full(len(at), 300.0), 512) + 0.01)
        assert fitted(image, at, rng)[0].added == 0


def test_a_start_on_nothing_is_insignificant():
    rng = np.random.default_rng(13)
    at = np.array([[0.6, 0.6], [1.2, 0.7], [0.7, 1.3]])
    image = rng.poisson(expected(at, np.full(3, 1000.0), 144) + 0.3)
    start = np.concatenate([at, [[1.3, 1.3]]]) / PIXEL
    fit = refine.refine(image, start[:, 0], start[:, 1], (PIXEL, PIXEL))
    assert (fit.significance[:3] > 15).all()
    assert fit.significance[3] < 4
    assert np.hypot(fit.x[3] - start[3, 0], fit.y[3] - start[3, 1]) * PIXEL < refine.TRUST_NM + 1e-9


def test_tiles_do_not_show_and_axes_are_alike(monkeypatch):
    rng = np.random.default_rng(17)
    at = strained_lattice(rng, 4.0)
    image = rng.poisson(expected(at, np.full(len(at), 150.0), 320) + 0.2)
    start = at / PIXEL
    whole = refine.refine(image, start[:, 0], start[:, 1], (PIXEL, PIXEL))
    turned = refine.refine(image.T, start[:, 1], start[:, 0], (PIXEL, PIXEL))
    monkeypatch.setattr(refine, "TILE_NM", 2.2)
    tiled = refine.refine(image, start[:, 0], start[:, 1], (PIXEL, PIXEL))
    n, inside = len(at), ((at > 0.2) & (at < 3.8)).all(1)
    assert np.abs(turned.y - whole.x)[:n][inside].max() < 0.01
    off = np.abs(tiled.x[:n] - whole.x[:n])[inside] / whole.sigma_x[:n][inside]
    assert np.median(off) < 0.1
    assert off.max() < 0.5
    assert np.median(tiled.intensity[:n] / whole.intensity[:n]) == pytest.approx(1, rel=0.02)


def test_half_precision_does_not_overflow():
    rng = np.random.default_rng(9)
    at = np.array([[0.3, 0.3], [0.55, 0.32]])
    image = (60 * rng.poisson(expected(at, np.full(2, 300.0), 70) + 1)).astype(np.float16)
    half, double = (fitted(im, at, np.random.default_rng(0))[0] for im in (image, image.astype(np.float64)))
    np.testing.assert_array_equal(half.x, double.x)
    np.testing.assert_array_equal(half.intensity, double.intensity)
