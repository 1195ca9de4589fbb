"""The scale of an image without one: the width of spots that were drawn, and a refusal where there are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.errors import BadInput
from aecontrol.perception.scale import ISOLATED_SPOT_NM, LATTICE_SPOT_NM, estimate

SIDE = 224
BACKGROUND = 3.0


def isolated(rng: np.random.Generator, width: float):
    """Up to 30 sites, clear of each other."""
    sites: list[np.ndarray] = []
    for at in rng.uniform(0, SIDE, (60, 2)):
        if len(sites) < 30 and all(np.hypot(*(at - other)) > 6 * width for other in sites):
            sites.append(at)
    return np.array(sites)


def lattice(angle_deg: float, basis, spacing: float):
    """Sites of a lattice, ``spacing`` widths between cells, turned at random."""

    def sites(rng: np.random.Generator, width: float):
        turn = rng.uniform(0, np.pi)
        directions = turn + np.array([0.0, np.radians(angle_deg)])
        vectors = spacing * width * np.stack([np.cos(directions), np.sin(directions)], 1)
        cells = np.mgrid[-40:41, -40:41].reshape(2, -1).T
        xy = np.concatenate([(cells + site) @ vectors for site in basis]) + SIDE / 2
        return xy[((xy > -20) & (xy < SIDE + 20)).all(1)]

    return sites


KINDS = {
    "isolated": isolated,
    "hexagonal": lattice(60, [(0, 0)], 5),
    "square with centres": lattice(90, [(0, 0), (0.5, 0.5)], 7),
    "honeycomb": lattice(60, [(0, 0), (1 / 3, 1 / 3)], 7),
}


def scene(kind: str, width: float, signal_to_noise: float = 30, seed: int = 0):
    """Poisson counts of round spots; signal to noise as a matched filter sees one."""
    rng = np.random.default_rng(seed)
    xy = KINDS[kind](rng, width)
    at = np.arange(SIDE) + 0.5
    gx, gy = (np.exp(-0.5 * ((at - xy[:, [k]]) / width) ** 2) for k in (0, 1))
    peak = signal_to_noise * np.sqrt(BACKGROUND / np.pi) / width
    return rng.poisson(BACKGROUND + peak * (gy.T @ gx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "signal_to_noise"), [(2.0, 30), (3.1, 10), (4.6, 100)])
def test_the_width_of_spots_is_known_within_a_quarter(kind, width, signal_to_noise):
    scale = estimate(scene(kind, width, signal_to_noise))
    assert scale.spot_px == pytest.approx(width, rel=0.25)
    assumed = ISOLATED_SPOT_NM if kind == "isolated" else LATTICE_SPOT_NM
    assert scale.pixel_size_nm * scale.spot_px == pytest.approx(assumed)
    assert "not a calibration" in scale.how


def test_gain_and_offset_do_not_matter():
    image = scene("isolated", 3.0)
    assert estimate(1e-6 * image - 40.0).spot_px == pytest.approx(estimate(image).spot_px, rel=1e-6)


@pytest.mark.parametrize("kind", ["isolated", "honeycomb"])
def test_scan_lines_are_no_lattice(kind):
    """Lines of uneven brightness change the estimate little: their structure lies on the axes."""
    image = scene(kind, 3.1)
    lines = np.random.default_rng(1).normal(0, 0.3, (SIDE, 1)) * image.std()
    assert estimate(image + lines).spot_px == pytest.approx(3.1, rel=0.3)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.3, 30.0), st.booleans())
def test_noise_has_no_scale(seed, level, poisson):
    rng = np.random.default_rng(seed)
    noise = rng.poisson(level, (128, 160)) if poisson else rng.normal(level, 1.0, (128, 160))
    with pytest.raises(BadInput, match="no atoms stand out"):
        estimate(noise)


@pytest.mark.parametrize(
    "image",
    [np.full((64, 64), 7.0), np.zeros((20, 64)), np.zeros((2, 64, 64)), np.full((64, 64), np.nan)],
    ids=["constant", "small", "a stack", "not finite"],
)
def test_what_cannot_have_a_scale_is_refused(image):
    with pytest.raises(BadInput, match="pixel size"):
        estimate(image)
