"""Columns drawn as a sparse matrix, and normal equations from blocks, against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest

from aecontrol.perception.drawn import Drawn
from aecontrol.perception.grains import find_grains
from aecontrol.perception.normal_blocks import System

SHAPE, PIXEL, BLUR, TAIL = (40, 52), (0.025, 0.03), 0.05, 0.2


def columns() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.uniform([-0.05, -0.05], [1.35, 1.25], (600, 2)), rng.uniform(1, 3, 600)


def test_drawn_columns_are_the_sum_of_their_gaussians() -> None:
    xy, amplitude = columns()
    x, y = ((np.arange(n) + 0.5) * p for n, p in zip(SHAPE[::-1], PIXEL, strict=True))
    square = (x[None, None] - xy[:, :1, None]) ** 2 + (y[None, :, None] - xy[:, 1:, None]) ** 2
    area = PIXEL[0] * PIXEL[1]
    core, tail = (area * np.exp(-0.5 * square / s**2) / (2 * np.pi * s**2) for s in (BLUR, 2 * BLUR))
    whole = np.tensordot(amplitude, (1 - TAIL) * core + TAIL * tail, 1)
    # windows end at 3.3 standard deviations, where a tenth of the tail's light is still to come
    drawn = Drawn(xy, SHAPE, PIXEL, BLUR, TAIL).draw(amplitude)
    assert np.abs(drawn - whole).max() < 0.06 * whole.max()
    bare = Drawn(xy, SHAPE, PIXEL, BLUR, 0.0).draw(amplitude)
    assert np.abs(bare - np.tensordot(amplitude, core, 1)).max() < 0.01 * whole.max()


def test_sums_over_windows_are_the_adjoint_and_the_slopes() -> None:
    xy, amplitude = columns()
    image = np.random.default_rng(4).normal(size=SHAPE)
    spots = Drawn(xy, SHAPE, PIXEL, BLUR, 0.0)
    assert spots.project(image) @ amplitude == pytest.approx(float((spots.draw(amplitude) * image).sum()), rel=1e-10)
    single = [Drawn(at[None], SHAPE, PIXEL, BLUR, 0.0) for at in xy[:5]]
    squares = [float((s.draw(np.ones(1)) ** 2 * image).sum()) for s in single]
    np.testing.assert_allclose(spots.squares(image)[:5], squares, rtol=1e-10)
    force, known = spots.pulls(image, np.ones(SHAPE))
    for axis in (0, 1):
        step = 1e-6 * np.eye(2)[axis]
        ahead, behind = (Drawn(xy + s * step, SHAPE, PIXEL, BLUR, 0.0) for s in (1, -1))
        slope = (ahead.project(image) - behind.project(image)) / 2e-6
        assert np.median(np.abs(force[:, axis] - slope)) < 1e-6 * np.abs(slope).max()
    assert (known > 0).mean() > 0.9


def test_block_sums_give_the_fields_back() -> None:
    rng = np.random.default_rng(5)
    hats = [
        np.maximum(0, 1 - np.abs((np.arange(n)[:, None] + 0.5) / n * (k - 1) - np.arange(k)))
        for n, k in ((96, 3), (120, 4))
    ]
    core, other = rng.random((96, 120)), rng.normal(size=(96, 120))
    truth = rng.normal(size=(2, 3, 4))
    fields = hats[0] @ truth @ hats[1].T
    residual = fields[0] + core * fields[1] + 0.7 * other
    found = System.of(np.ones_like(core), residual, [core, other], (hats[0], hats[1])).solve()
    assert found[-1] == pytest.approx(0.7, abs=0.01)
    fit = hats[0] @ found[:-1].reshape(2, 3, 4) @ hats[1].T
    assert np.abs(fit[0] + core * fit[1] - residual + 0.7 * other).mean() < 0.1 * np.abs(residual).mean()


def test_strays_all_over_a_wide_frame_cost_no_memory() -> None:
    import tracemalloc

    i, j = (a.ravel() for a in np.meshgrid(np.arange(30.0), np.arange(30.0)))
    strays = np.random.default_rng(6).uniform(-3000, 3000, (40, 2))
    xy = np.concatenate([np.stack([i, j], 1), strays, strays + np.array([0.9, 0.0])])
    tracemalloc.start()
    grains = find_grains(xy, np.ones(len(xy)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [len(g.atoms) for g in grains] == [900]
    assert peak < 50e6
