"""Both shipped drivers pass the contract that third parties can import."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from aecontrol.dose import bound_charge
from aecontrol.errors import BadInput
from aecontrol.registry import build_part
from aecontrol.types import ScanRegion
from drivers.contract import MicroscopeContract, a_key

CONFIGS = Path(__file__).parents[2] / "configs"


def driver(name):
    return build_part("driver", tomllib.loads((CONFIGS / name).read_text())["driver"], "driver")


class TestSimulated(MicroscopeContract):
    def open(self, folder):
        return driver("short.toml").build(folder / "instrument", CONFIGS, seed=3)

    def test_what_is_delivered_is_what_the_column_counts(self, tmp_path):
        microscope = self.open(tmp_path)
        region = self.a_region(microscope)
        outcome = microscope.expose(a_key("a"), region, bound_charge(region, microscope.capabilities()))
        assert microscope.truth("vacancy").electrons_delivered == outcome.measured.electrons

    def test_another_seed_is_another_specimen(self, tmp_path):
        one = self.open(tmp_path / "one").truth("vacancy").targets
        other = driver("short.toml").build(tmp_path / "other", CONFIGS, seed=4).truth("vacancy").targets
        assert one.shape != other.shape or not np.allclose(one, other)

    def test_truth_holds_what_the_beam_did_and_an_ideal_image_costs_nothing(self, tmp_path):
        microscope = self.open(tmp_path)
        region = self.a_region(microscope)
        ideal = microscope.noiseless(region)["HAADF"]
        before = microscope.truth("vacancy")
        assert (before.electrons_delivered, before.changes) == (0, ())
        assert ideal.shape == region.shape
        assert len(before.atoms) > 1000
        assert any("[A]" in note for note in microscope.capabilities().notes)


class TestOpenBeam(MicroscopeContract):
    """Several detectors, a beam that is on between lines and parked at the end, and a specimen that breaks."""

    def open(self, folder):
        table = tomllib.loads((CONFIGS / "short.toml").read_text())["driver"]
        table["scan"] = {"flyback_blanked": False, "blanker_latency_s": 1e-3}
        table["detectors"]["BF"] = {"inner_mrad": 0.0, "outer_mrad": 30.0}
        table["damage"] = {"critical_fluence_e_per_A2": {"S": 2e3}, "radiolysis_removes": 1.0}
        return build_part("driver", table, "driver").build(folder / "instrument", CONFIGS, seed=3)

    def test_everything_the_beam_did_is_in_the_truth(self, tmp_path):
        microscope = self.open(tmp_path)
        region = self.a_region(microscope)
        bound = bound_charge(region, microscope.capabilities())
        atoms = len(microscope.truth("atom").atoms)
        outcome = microscope.expose(a_key("a"), region, bound)
        truth = microscope.truth("atom")
        assert truth.electrons_delivered == outcome.measured.electrons <= bound.electrons
        assert 0 < len(truth.changes) == atoms - len(truth.atoms)
        assert {change.kind for change in truth.changes} == {"removed"}
        assert all(np.array_equal(truth.sites[change.site, :2], change.position_nm) for change in truth.changes)
        assert {truth.sites[change.site, 2] for change in truth.changes} == {16.0}
        assert (truth.sites[:, 2] > 0).sum() == atoms
        frame = microscope.fetch(a_key("a"))
        assert set(frame.channels) == {"HAADF", "BF"}
        dwell = region.pixels * region.dwell_time_s
        share = dwell / (dwell + (region.shape[0] - 1) * microscope.capabilities().flyback_s + 1e-3)
        assert frame.electrons_per_pixel == pytest.approx(outcome.measured.electrons * share / region.pixels)


class TestRecorded(MicroscopeContract):
    def open(self, folder):
        return driver("pt_single_atoms.toml").build(folder / "instrument", CONFIGS, seed=0)

    def test_a_pixel_is_charged_once_and_the_dose_is_not_invented(self, tmp_path):
        microscope = self.open(tmp_path)
        region = self.a_region(microscope)
        bound = bound_charge(region, microscope.capabilities())
        first = microscope.expose(a_key("a"), region, bound).measured
        second = microscope.expose(a_key("b"), region, bound).measured
        assert (first.pixels, second.pixels) == (region.pixels, 0)
        assert first.electrons is None

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"rotation_rad": 0.1}, "turned"),
            ({"shape": (16, 24)}, "multiples"),
            ({"center_nm": (1.2, 1.15)}, "between two"),
        ],
    )
    def test_what_the_record_cannot_answer_is_refused(self, tmp_path, change, word):
        microscope = self.open(tmp_path)
        region = self.a_region(microscope, (20, 20))
        wrong = ScanRegion(**{**region.model_dump(), **change})
        outcome = microscope.expose(a_key("a"), wrong, bound_charge(wrong, microscope.capabilities()))
        assert outcome.state == "VOID"
        assert word in outcome.reason


def test_a_record_without_a_scale_or_a_file_is_bad_input(tmp_path):
    np.save(tmp_path / "plain.npy", np.random.default_rng(0).poisson(5.0, (64, 64)).astype(np.float32))
    part = build_part("driver", {"kind": "recorded", "path": "plain.npy"}, "driver")
    with pytest.raises(BadInput, match="pixel size"):
        part.build(tmp_path / "i", tmp_path, 0)
    with pytest.raises(BadInput, match=r"nowhere\.npy"):
        build_part("driver", {"kind": "recorded", "path": "nowhere.npy"}, "driver").build(tmp_path / "i", tmp_path, 0)
