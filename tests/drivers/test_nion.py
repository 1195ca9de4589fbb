"""Nion Swift's usim as a backend: the right place, the right sign, the right spectrum, and an end at once.

The checks take anything that fires, so that a microscope behind a wire can be given the same ones.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.ndimage import map_coordinates

from aecontrol.dose import bound_charge
from aecontrol.errors import InstrumentFault
from aecontrol.types import ScanRegion
from aecontrol.units import electrons_per_second
from drivers.backend import Backend, MovesStage, Parks, Pulse
from drivers.backends import nion
from drivers.backends.nion import NionBackend, NionInstrument
from drivers.backends.nion_usim import part_of, pieces

pytest.importorskip("nion.instrumentation", reason="Nion Swift (extra 'nion', GPL-3) is not installed")

SIDE_NM = 100.0
LAYER = 0.3
"""Thickness of one of usim's flakes, in mean free paths."""
Array = NDArray[np.float64]


class Fires(Protocol):
    """What a check needs."""

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse: ...


@pytest.fixture(scope="module")
def usim() -> Iterator[NionInstrument]:
    backend = NionBackend(field_nm=SIDE_NM).open(Path(), 0)
    yield backend
    backend.close()


def a_region(
    center: tuple[float, float],
    fov: tuple[float, float],
    shape: tuple[int, int],
    turn: float = 0.0,
    dwell: float = 1e-6,
) -> ScanRegion:
    return ScanRegion(center_nm=center, fov_nm=fov, shape=shape, rotation_rad=turn, dwell_time_s=dwell)


WHOLE = a_region((SIDE_NM / 2, SIDE_NM / 2), (SIDE_NM, SIDE_NM), (400, 400))


def centres_nm(region: ScanRegion) -> tuple[Array, Array]:
    """x and y of every pixel's centre, by the definition in ScanRegion."""
    rows, cols = np.mgrid[: region.shape[0], : region.shape[1]]
    px, py = region.pixel_size_nm
    dx, dy = (cols + 0.5) * px - region.fov_nm[0] / 2, (rows + 0.5) * py - region.fov_nm[1] / 2
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    return region.center_nm[0] + c * dx - s * dy, region.center_nm[1] + s * dx + c * dy


def look(overview: Array, x_nm: Array, y_nm: Array) -> Array:
    """An overview of the whole field at points of it."""
    scale = overview.shape[0] / SIDE_NM
    return np.asarray(map_coordinates(overview, [y_nm * scale - 0.5, x_nm * scale - 0.5], order=1, mode="nearest"))


def r(one: Array, other: Array) -> float:
    """Correlation of two images."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def layers(spectra: Array) -> Array:
    """Flakes under each spectrum [..., energies]: log of all counts by those of the zero-loss peak."""
    energies = -20.0 + 0.5 * np.arange(spectra.shape[-1])
    return np.asarray(np.log(spectra.sum(-1) / spectra[..., abs(energies) < 3.0].sum(-1)) / LAYER)


# ---------------------------------------------------------------- checks of anything that fires


def check_registration(column: Fires, region: ScanRegion, name: str = "HAADF") -> None:
    """A sub-scan shows what the overview shows there, and not what it shows with x and y exchanged, nor, when it is
    turned, what lies at the opposite turn."""
    overview = np.asarray(column.fire(0, WHOLE).channels[name], float)
    image = np.asarray(column.fire(1, region).channels[name], float)
    x, y = centres_nm(region)
    assert image.shape == region.shape
    assert r(image, look(overview, x, y)) > 0.7
    assert r(image, look(overview, y, x)) < 0.5
    if region.rotation_rad:
        opposite = region.model_copy(update={"rotation_rad": -region.rotation_rad})
        assert r(image, look(overview, *centres_nm(opposite))) < 0.7


def check_points(column: Fires, points: int = 30, agreeing: int = 28) -> None:
    """Spectra at random points tell the same thickness as the overview does there."""
    overview = np.asarray(column.fire(0, WHOLE).channels["HAADF"], float)
    places = np.random.default_rng(4).uniform(5.0, SIDE_NM - 5.0, (points, 2))
    near = np.array([-0.2, 0.0, 0.2])
    told, seen = [], []
    for x, y in places:
        told.append(layers(a_spectrum(column, (x, y))))
        seen.append(np.median(look(overview, *np.meshgrid(x + near, y + near))))
    assert np.ptp(told) > 2
    assert np.sum(abs(np.array(told) - seen) < 0.5) >= agreeing


def a_spectrum(column: Fires, at_nm: tuple[float, float]) -> Array:
    """The spectrum [energies] at a point."""
    point = a_region(at_nm, (0.1, 0.1), (1, 1), dwell=1e-3).model_copy(update={"signal": "spectra"})
    return np.asarray(column.fire(2, point).channels["EELS"], float)[0, 0]


def check_spectrum_image(column: Fires, region: ScanRegion) -> None:
    """Each pixel of a spectrum image is the spectrum at its centre, to the counting noise."""
    found = np.asarray(
        column.fire(3, region.model_copy(update={"signal": "spectra", "dwell_time_s": 1e-3})).channels["EELS"], float
    )
    x, y = centres_nm(region)
    at = np.array([[a_spectrum(column, (x[i, j], y[i, j])) for j in range(x.shape[1])] for i in range(x.shape[0])])
    assert found.shape == at.shape
    assert np.ptp(layers(at)) > 0.9
    np.testing.assert_allclose(layers(found), layers(at), atol=0.02)


# ---------------------------------------------------------------- in process


def test_it_is_a_backend(usim: NionInstrument) -> None:
    backend: Backend = usim
    assert isinstance(backend, MovesStage)
    assert isinstance(backend, Parks)
    known = backend.describe()
    assert known.field_nm == (SIDE_NM, SIDE_NM)
    assert known.spectra is not None
    assert (known.spectra.size, known.spectra.offset_eV, known.spectra.scale_eV) == (1024, -20.0, 0.5)
    backend.park((30.0, 40.0))
    state = backend.state()
    assert not state.beam_on
    assert state.parked_nm == (30.0, 40.0)
    assert state.beam_current_pA == pytest.approx(known.beam_current_pA)


@pytest.mark.parametrize(
    "region",
    [
        a_region((52, 40), (20, 20), (64, 64)),
        a_region((52, 40), (30, 12), (32, 80)),
        a_region((60, 48), (24, 24), (16, 96)),
        a_region((52, 40), (30, 12), (48, 24)),
        a_region((52, 40), (24, 24), (64, 64), 0.6),
        a_region((52, 40), (14, 28), (96, 48), -0.4),
        a_region((56, 44), (28, 14), (64, 128), -1.2),
        a_region((52, 44), (40, 10), (40, 160), 1.57),
        a_region((52, 40), (24, 24), (16, 32), 0.6),
    ],
    ids=["off centre", "wide", "high pixels", "wide pixels", "turned", "long", "far turned", "canvas", "turned pixels"],
)
def test_a_region_is_scanned_where_it_lies(usim: NionInstrument, region: ScanRegion) -> None:
    check_registration(usim, region)


def test_every_channel_is_delivered_and_metered(usim: NionInstrument) -> None:
    region = a_region((52, 40), (20, 20), (33, 47), dwell=3e-6)
    pulse = usim.fire(0, region)
    bound = bound_charge(region, usim.describe())
    assert set(pulse.channels) == {"HAADF", "MAADF"}
    assert pulse.flags == ()
    assert pulse.pixels == bound.pixels
    assert pulse.electrons == math.ceil(electrons_per_second(200.0) * pulse.seconds)
    assert pulse.seconds == pytest.approx(33 * 47 * 3e-6)
    assert bound.electrons is not None
    assert pulse.electrons <= bound.electrons
    assert usim.fire(1, region).started_s >= pulse.started_s + pulse.seconds


def test_the_stage_brings_the_specimen_to_p_minus_to(usim: NionInstrument) -> None:
    before = np.asarray(usim.fire(0, WHOLE).channels["HAADF"], float)
    to_nm = (12.0, -7.0)
    usim.move_stage(to_nm)
    try:
        assert usim.state().stage_nm == to_nm
        after = np.asarray(usim.fire(1, WHOLE).channels["HAADF"], float)
        x, y = centres_nm(a_region((50, 50), (60, 60), (100, 100)))
        assert r(look(after, x - to_nm[0], y - to_nm[1]), look(before, x, y)) > 0.8
        assert r(look(after, x + to_nm[0], y + to_nm[1]), look(before, x, y)) < 0.5
        told = layers(a_spectrum(usim, (52.0 - to_nm[0], 40.0 - to_nm[1])))
    finally:
        usim.move_stage((0.0, 0.0))
    assert told == pytest.approx(layers(a_spectrum(usim, (52.0, 40.0))), abs=0.02)


def test_spectra_at_points_agree_with_the_overview(usim: NionInstrument) -> None:
    check_points(usim)


def test_a_spectrum_image_is_made_of_spectra_at_points(usim: NionInstrument) -> None:
    check_spectrum_image(usim, a_region((52, 40), (20, 12), (3, 5), 0.5))


@pytest.mark.parametrize(("signal", "dwell"), [("images", 1e-4), ("images", 0.5), ("spectra", 0.02), ("spectra", 1.0)])
def test_blank_ends_the_exposure_within_100_ms(usim: NionInstrument, signal: str, dwell: float) -> None:
    shape = (100, 160) if signal == "images" else (8, 8)
    region = a_region((50, 50), (40, 25), shape, dwell=dwell).model_copy(update={"signal": signal})
    blanked: list[float] = []

    def blank() -> None:
        usim.blank()
        blanked.append(time.monotonic())

    threading.Timer(0.3, blank).start()
    started = time.monotonic()
    pulse = usim.fire(0, region)
    assert time.monotonic() - blanked[0] < 0.1
    assert not usim.state().beam_on
    assert pulse.flags == ("partial",)
    assert pulse.seconds <= blanked[0] - started
    assert pulse.pixels == math.ceil(pulse.seconds / dwell - 1e-9) < region.pixels
    assert pulse.electrons == math.ceil(electrons_per_second(200.0) * pulse.seconds)
    for array in pulse.channels.values():
        whole = np.isfinite(array).reshape(region.pixels, -1).all(axis=1)
        assert array.shape[:2] == region.shape
        assert not whole[np.argmin(whole) :].any()
        assert pulse.pixels - region.shape[1] <= whole.sum() <= pulse.pixels
        assert dwell < 0.3 or not whole.any()
        assert np.all(array.reshape(region.pixels, -1)[whole].any(axis=1))
    after = usim.fire(1, a_region((50, 50), (20, 20), (16, 16)))
    assert after.flags == ()
    assert np.isfinite(after.channels["HAADF"]).all()


def test_a_second_exposure_is_refused_and_does_no_harm(usim: NionInstrument) -> None:
    region = a_region((50, 50), (40, 40), (64, 64), dwell=1e-4)
    found: list[Pulse] = []
    running = threading.Thread(target=lambda: found.append(usim.fire(0, region)))
    running.start()
    while not usim.state().beam_on:
        time.sleep(0.001)
    with pytest.raises(InstrumentFault, match="running already"):
        usim.fire(1, region)
    with pytest.raises(InstrumentFault, match="running already"):
        usim.move_stage((5.0, 0.0))
    running.join()
    assert found[0].flags == ()
    assert np.isfinite(found[0].channels["HAADF"]).all()


def test_a_pulse_that_hangs_is_blanked_by_its_own_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nion, "HANG_S", 0.05)
    blanked: list[bool] = []
    beam = nion.Beam(blanked.append, lambda: None)
    beam.begin()
    assert beam.open(a_region((0, 0), (1, 1), (2, 2)), lambda region: None)
    assert beam.cut.wait(2.0)
    assert blanked == [False, True]
    assert beam.seconds == pytest.approx(4e-6)
    assert not beam.open(a_region((0, 0), (1, 1), (2, 2)), lambda region: pytest.fail("started after a blank"))


sides = st.integers(1, 40)
lengths = st.floats(1.0, 30.0)


@given(st.tuples(sides, sides), st.tuples(lengths, lengths), st.floats(-7.0, 7.0), st.booleans())
def test_pieces_make_up_the_region_once_each(
    shape: tuple[int, int], fov: tuple[float, float], turn: float, square: bool
) -> None:
    if square:
        fov = (fov[0], fov[0] * shape[0] / shape[1])
    region = a_region((50, 50), fov, shape, turn)
    hits, x, y = np.zeros(shape, int), *np.zeros((2, *shape))
    for row, col, rows, cols in pieces(region):
        part = part_of(region, row, col, rows, cols)
        assert rows == 1 or math.isclose(*part.pixel_size_nm, rel_tol=1e-5)
        window = np.s_[row : row + rows, col : col + cols]
        hits[window] += 1
        x[window], y[window] = centres_nm(part)
    assert (hits == 1).all()
    np.testing.assert_allclose((x, y), centres_nm(region), atol=1e-9)


def test_a_detector_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="named twice"):
        NionBackend(channels=("HAADF", "HAADF"))
