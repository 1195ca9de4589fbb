"""The linear model against stored multislice, which shares no code with it, and the limits that it states."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from aecontrol.errors import BadInput
from simulators import calibration as calibration_module
from simulators.calibration import calibrate
from simulators.multislice import Block, scan_block
from simulators.optics import Optics
from simulators.render import Renderer
from simulators.scattering import Calibration, Contrast, objects
from simulators.specimens.perovskites import SrTiO3
from simulators.specimens.sheets import Mos2, SulphurVacancies

from ..benchmarks.linear_vs_multislice import FOLDER, SETTINGS, STO, mos2, srtio3

ALONG = np.linspace(-1.0, 12.0, 131)
GAP = 3.16 / 3**0.5


def columns(line):
    """Signal on Mo, on two S and on one S of the stored line."""
    return [line[np.argmin(np.abs(ALONG - place))] for place in (0.0, GAP, 4 * GAP)]


def test_tables_follow_multislice_of_a_monolayer():
    corr, nrmse, floor, *_ = mos2("table")["86-200"]
    assert corr >= 0.998
    assert nrmse <= 0.02
    assert floor < 0.007


def test_the_linear_model_does_not_pretend_to_interference_along_the_beam():
    """Two S on top of each other scatter 2.2 times as much to 60-200 mrad as one: that is beyond a linear model, and
    ours keeps its factor of two (less the neighbours' light) at any inner angle rather than bend Z^n to fit."""
    lines = mos2("table")
    for name, reference_ratio in (("86-200", 1.8), ("60-200", 2.2)):
        *_, ours, reference = lines[name]
        _, two, one = columns(ours)
        assert 1.85 < two / one < 2.0
        _, two, one = columns(reference)
        assert two / one == pytest.approx(reference_ratio, abs=0.1)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_calibration_repairs_a_thick_crystal(name):
    calibration = Calibration.model_validate_json((FOLDER / f"{name}_calibration.json").read_text())
    corr, nrmse, _ = srtio3(name, calibration)
    assert corr >= 0.998
    assert nrmse <= 0.01
    # without it the model is far off, and says so
    bare = Renderer(SETTINGS[name], {"HAADF": calibration.detector_mrad}).validity(STO.build(0).thickness_nm, True)
    assert not bare["HAADF"].linear_ok
    fitted = Renderer(SETTINGS[name], {"HAADF": calibration.detector_mrad}, calibrations={"HAADF": calibration})
    assert fitted.validity(5.0, True)["HAADF"].linear_ok
    assert not fitted.validity(8.0, True)["HAADF"].linear_ok


def test_a_calibration_serves_its_own_settings_only():
    text = (FOLDER / "srtio3_80kV_calibration.json").read_text()
    calibration = Calibration.model_validate_json(text)
    with pytest.raises(BadInput, match="calibration is for"):
        Renderer(Optics(voltage_kV=200.0, semi_angle_mrad=21.4), calibrations={"HAADF": calibration})
    # an element that the calibrated place did not hold scatters as a single atom
    fitted, single = (
        Renderer(SETTINGS["srtio3_80kV"], calibrations=given).objects["HAADF"] for given in ({"HAADF": calibration}, {})
    )
    assert fitted.strength_A2(16) == pytest.approx(single.strength_A2(16))
    assert fitted.strength_A2(38) == calibration.weights_A2["Sr"] != pytest.approx(single.strength_A2(38), rel=0.05)


@pytest.mark.slow
def test_a_calibration_is_made_once_and_found_again(tmp_path, monkeypatch):
    pytest.importorskip("abtem", reason="abTEM is not installed: pip install -e '.[multislice]'")
    monkeypatch.setattr(calibration_module, "CONFIGURATIONS", 3)
    specimen = Mos2(size_nm=(6, 6), vacancies=SulphurVacancies(background_fraction=0.0, n_clusters=0)).build(0)
    found = calibrate(specimen, Optics(source_fwhm_nm=0.0), (86.0, 200.0), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(found.model_copy(update={"background": 0.123}).model_dump_json())
    assert calibrate(specimen, Optics(), (86.0, 200.0), tmp_path).background == 0.123  # any source: the same fit
    path.write_text("{ half a file")
    assert calibrate(specimen, Optics(), (86.0, 200.0), tmp_path) == found
    # a sheet needs no channelling: the weights are those of single atoms
    single = Renderer(Optics()).objects["HAADF"]
    assert found.weights_A2["Mo"] == pytest.approx(single.strength_A2(42), rel=0.1)
    with pytest.raises(BadInput, match="round"):
        calibrate(specimen, Optics(a1_nm=1.0), (86.0, 200.0), tmp_path)


def test_the_period_of_a_crystal_is_one():
    for specimen in (SrTiO3(size_nm=(5, 5), thickness_nm=0.8).build(0), STO.build(0)):
        where = specimen.positions_A[:, :2]
        inner = np.all(np.abs(where - where.mean(axis=0)) < 12.0, axis=1)
        for step in specimen.period_A:
            assert cKDTree(where).query(where[inner] + step)[0].max() < 1e-6


@pytest.mark.parametrize(
    ("optics", "within"),
    [
        (Optics(source_fwhm_nm=0.0), 0.002),
        (Optics(b2_nm=150.0, b2_deg=30.0, source_fwhm_nm=0.0), 0.01),
        (Optics(a1_nm=3.0, a1_deg=20.0, c1_nm=2.0, source_fwhm_nm=0.0), 0.04),
        (Optics(c3_um=20.0, c1_nm=-6.0, source_fwhm_nm=0.0), 0.04),
    ],
    ids=["ideal", "coma", "astigmatism", "spherical"],
)
def test_aberrated_atoms_follow_multislice_as_far_as_the_note_says(optics, within):
    pytest.importorskip("abtem", reason="abTEM is not installed: pip install -e '.[multislice]'")
    where = np.array([15.03, 14.96])
    block = Block(np.array([[*where, 0.0]]), np.array([42]), np.zeros(1), (30.0, 30.0))
    probe = where + np.random.default_rng(0).uniform(-2.0, 2.0, (40, 2))
    probe[0] = where
    detectors = {"HAADF": (86.0, 200.0)}
    reference = scan_block(block, optics, detectors, probe, 1, 0)[0, 0]
    ours = Renderer(optics, detectors).images(where[None], np.array([42]), np.zeros(1), probe)["HAADF"]
    assert np.abs(ours - reference).max() < within * reference.max()


@pytest.mark.slow
def test_tables_for_other_optics_are_made_once_and_lie_between_their_neighbours(tmp_path, monkeypatch):
    pytest.importorskip("abtem", reason="abTEM is not installed: pip install -e '.[multislice]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def metal(voltage_kV):
        found = objects(Optics(voltage_kV=voltage_kV), (86.0, 200.0), Contrast(level="table"))
        assert found.calibrated
        return found.strength_A2(42)

    assert metal(80.0) > metal(90.0) > metal(100.0)
    (path,) = (tmp_path / "aecontrol").iterdir()
    before = path.stat().st_mtime_ns
    assert metal(90.0) > metal(100.0)
    assert path.stat().st_mtime_ns == before
