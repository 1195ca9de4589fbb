"""Windowed inference is inference: the same map as from the whole image, wherever the windows are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.perception.ensemble import Ensemble
from aecontrol.perception.windows import BLEND_PX, heat, spans


class Level:
    """A network that answers ``logit`` everywhere and remembers what it was shown."""

    multiple, reach_px = 8, 20

    def __init__(self, logit):
        self.logit, self.shapes = logit, []

    def __call__(self, x):
        self.shapes.append(tuple(x.shape))
        return torch.full_like(x, self.logit).expand(-1, 2, -1, -1)


class Centred:
    """A network that subtracts the mean of all it is shown: no receptive field bounds it."""

    multiple, reach_px = 4, 10

    def __call__(self, x):
        return x - x.mean()


@pytest.fixture(scope="module")
def net():
    return Ensemble("atoms", None, "cpu").members[0]


def whole(net, image):
    """The heat map in one piece, by hand."""
    h, w = image.shape
    padded = np.pad(image, ((0, -h % net.multiple), (0, -w % net.multiple)))
    with torch.inference_mode():
        return torch.sigmoid(net(torch.from_numpy(padded)[None, None]))[0, :, :h, :w].numpy()


@given(
    length=st.integers(1, 3000),
    window=st.integers(1, 700),
    halo=st.integers(0, 90),
    multiple=st.sampled_from([1, 4, 8, 16]),
)
@settings(max_examples=200, deadline=None)
def test_windows_cover_every_pixel_once_and_only_where_no_cut_is_felt(length, window, halo, multiple):
    windows = spans(length, window, halo, multiple)
    total = np.zeros(length)
    for span in windows:
        assert span.start % multiple == 0
        assert span.weight.shape == (span.stop - span.start,)
        assert len(windows) == 1 or len(span.weight) <= max(window, 3 * (2 * halo + BLEND_PX + multiple)) + 2 * multiple
        total[span.start : span.stop] += span.weight
        felt = np.zeros(len(span.weight), bool)
        felt[: halo if span.start > 0 else 0] = True
        felt[len(felt) - (halo if span.stop < length else 0) :] = True
        assert not span.weight[felt].any()
    assert np.abs(total - 1).max() < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (7, 900), (640, 643), (1500, 300)])
def test_a_constant_map_stays_constant(shape):
    net = Level(0.5)
    maps = heat(net, np.zeros(shape, np.float32), window_px=256)
    assert maps.shape == (2, *shape)
    assert np.ptp(maps) < 1e-6
    assert all(h % 8 == 0 and w % 8 == 0 and max(h, w) <= 272 for _, _, h, w in net.shapes)  # memory is bounded


@pytest.mark.parametrize("shape", [(1024, 1024), (517, 603), (90, 2050)])
def test_windowed_equals_whole_for_the_shipped_network(net, shape):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    together, apart = whole(net, image), heat(net, image, window_px=256)
    assert np.abs(together - apart).max() < 1e-5
    assert np.ptp(together) > 0.05  # there is something to see


def test_the_network_sees_as_far_as_it_says(net):
    """What a pixel changes ends at the stated reach, whatever its place on the coarser grids, and not much before, for
    a reach too wide costs time."""
    image = torch.randn(1, 1, 160, 160, generator=torch.Generator().manual_seed(0))
    furthest = 0
    with torch.inference_mode():
        before = net(image)
        for row in range(80, 80 + net.multiple):
            for col in range(80, 80 + net.multiple):
                changed = image.clone()
                changed[0, 0, row, col] += 100.0
                _, _, rows, cols = torch.nonzero(net(changed) != before, as_tuple=True)
                furthest = max(furthest, int((rows - row).abs().max()), int((cols - col).abs().max()))
    assert 0.75 * net.reach_px <= furthest <= net.reach_px


def test_no_seam_is_left_where_windows_disagree():
    """A slope under a network that centres each window: the windows' answers differ by a step, the blend by none."""
    image = np.tile(np.linspace(-2, 2, 800, dtype=np.float32), (300, 1))
    row = heat(Centred(), image, window_px=256)[0, 150]
    steps = np.abs(np.diff(np.log(row / (1 - row))))
    assert steps.max() < 3.5 * 1.0 / BLEND_PX  # the means differ by about 1; a Hann ramp is at most pi/2 / length steep


def test_progress_is_told_of_every_window():
    told = []
    heat(Level(0.0), np.zeros((900, 300), np.float32), window_px=256, progress=lambda *step: told.append(step))
    assert told == [(k + 1, len(told)) for k in range(len(told))]
    assert len(told) > 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_map():
    image = np.random.default_rng(0).normal(size=(600, 700)).astype(np.float32)
    on_gpu = heat(Ensemble("atoms", None, "cuda").members[0], image, "cuda", window_px=256)
    assert np.abs(on_gpu - heat(Ensemble("atoms", None, "cpu").members[0], image)).max() < 1e-3
