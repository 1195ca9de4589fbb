"""`aecontrol simulate` as its user meets it: files, truth inside them, and clear errors."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from aecontrol.errors import BadInput, StorageFault
from aecontrol.image_sets import ImageSet, write_image_set
from aecontrol.registry import build_part
from aecontrol.simulate import gallery, simulate

CONFIGS = Path(__file__).parents[2] / "configs"


def table(name, **changes):
    raw = tomllib.loads((CONFIGS / name).read_text())["simulation"]
    for path, value in changes.items():
        place = raw
        *way, last = path.split("__")
        for key in way:
            place = place.setdefault(key, {})
        place[last] = value
    return raw


def produced(raw, workers=1):
    return list(build_part("simulation", raw, "simulation").produce("cpu", workers, lambda done, total: None))


def small_mos2(**changes):
    quick = {"specimen__size_nm": [7.0, 7.0], "view__fov_nm": [4.0, 4.0], "view__shape": [128, 128]}
    return table("simulate_mos2.toml", **(quick | changes))


def test_the_command_writes_images_and_truth_that_agree(aecontrol, tmp_path):
    out = tmp_path / "mos2.npz"
    code, printed, _ = aecontrol("simulate", CONFIGS / "simulate_mos2.toml", "--out", out, "--json")
    assert code == 0
    said = json.loads(printed)
    assert (said["file"], said["shape"]) == (str(out), [512, 512])
    with np.load(out) as file:
        found = {name: file[name] for name in file.files}
    assert said["atoms"] == len(found["atoms_xyz_nm"]) == len(found["atomic_numbers"])
    assert found["pixel_size_nm"] == pytest.approx([8 / 512] * 2)
    metadata = json.loads(str(found["metadata"]))
    assert metadata["validity"]["HAADF"]["linear_ok"]
    assert any("[A]" in line for line in metadata["assumptions"])
    for name in ("HAADF", "MAADF", "BF"):
        expected = found[f"noiseless_{name}"] * found["electrons_per_pixel"]
        assert found[name].mean() == pytest.approx(expected.mean() + 0.01, rel=0.02)
    # light is where the atoms are: pixels under living Mo are the brightest kind
    living = found["atoms_px"][found["atoms_alive"] & (found["atomic_numbers"] == 42)]
    inside = living[np.all((living > 8) & (living < 504), axis=1)].astype(int)
    dark = found["noiseless_HAADF"]
    assert dark[inside[:, 1], inside[:, 0]].min() > 3 * np.median(dark)
    # where a label says vacancy, a site is vacant, and the other way round
    vacant = found["atoms_px"][found["atoms_defect"] == "vacancy"]
    gone = vacant[np.all(np.abs(vacant - 256) < 250, axis=1)]
    assert len(gone) > 10
    assert (found["labels_defect"][gone[:, 1].astype(int), gone[:, 0].astype(int)] == "vacancy").all()
    rows, cols = np.nonzero(found["labels_defect"] == "vacancy")
    apart = np.hypot(cols[:, None] + 0.5 - vacant[:, 0], rows[:, None] + 0.5 - vacant[:, 1]).min(axis=1)
    assert apart.max() * 8 / 512 <= 0.12
    # pixels and specimen frame are one rotation apart
    turn = np.deg2rad(10.0)
    centred = (found["atoms_px"] - 256) * found["pixel_size_nm"]
    back = centred @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + 10.0
    assert back == pytest.approx(found["atoms_xyz_nm"][:, :2], abs=1e-9)


def test_a_series_shows_damage_that_grows_with_dose_and_shrinks_with_cold():
    def series(**changes):
        raw = table("simulate_llzo_series.toml", view__shape=[64, 64], view__dwell_time_s=1.8e-6 * 16, **changes)
        (images,) = produced(raw)
        truth = {name: images.arrays[name] for name in images.arrays if name.startswith(("atoms_", "events_"))}
        inside = np.all(np.abs(truth["atoms_px"] - 32) < 30, axis=1)
        ideal = images.arrays["noiseless_HAADF"]
        change = [np.abs(frame - ideal[0]).mean() for frame in ideal]
        times = truth["events_time_s"]
        ends = np.array(json.loads(json.dumps(images.metadata))["electrons_delivered"])
        assert images.channels["HAADF"].shape == (3, 64, 64)
        assert inside.any()
        assert ends > 0
        return change, len(times), images

    warm, warm_events, images = series()
    cold, cold_events, _ = series(damage__temperature_K=100.0)
    nothing, none_at_all, _ = series(damage__preset="perovskite")
    assert 0.0 == warm[0] < warm[1] < warm[2]
    assert 0.0 == cold[0] < cold[1] < cold[2]
    assert cold[1] < 0.5 * warm[1]
    assert cold[2] < 0.5 * warm[2]
    assert cold_events < 0.5 * warm_events
    assert (nothing, none_at_all) == ([0.0, 0.0, 0.0], 0)
    still = images.arrays["atoms_alive_before_frame"].sum(axis=1)
    assert still[0] > still[1] > still[2]


def test_a_scan_by_multislice_takes_any_detector_and_pays_like_any_other():
    pytest.importorskip("abtem", reason="abTEM is not installed: pip install -e '.[multislice]'")
    annuli = {"HAADF": {}, "ABF": {"inner_mrad": 15.0, "outer_mrad": 30.0, "dark_counts": 0.0}}
    raw = small_mos2(phonon_configurations=1, optics__source_fwhm_nm=0.0, detectors=annuli)
    raw["view"] = {"fov_nm": [0.4, 0.4], "shape": [5, 5], "dwell_time_s": 1e-2}
    (images,) = produced(raw)
    assert 0.6 < images.arrays["noiseless_ABF"].mean() < 0.75  # three quarters of the disc, less what scatters away
    assert images.channels["ABF"].mean() == pytest.approx(
        images.arrays["noiseless_ABF"].mean() * images.arrays["electrons_per_pixel"], rel=0.03
    )
    assert "multislice" in images.metadata["validity"]["ABF"]["note"]
    assert images.metadata["electrons_delivered"] == pytest.approx(25 * images.arrays["electrons_per_pixel"])


def test_a_focal_series_shows_atoms_where_its_truth_says(tmp_path):
    pytest.importorskip("abtem", reason="abTEM is not installed: pip install -e '.[multislice]'")
    raw = table("simulate_tem.toml", fov_nm=[2.0, 1.5], electrons_per_A2=1e6, focal_jitter_nm=0.0)
    (images,) = produced(raw)
    assert images.channels["TEM"].shape[0] == 3
    assert np.all(np.diff(images.arrays["c1_nm"]) > 0)
    scherzer = images.channels["TEM"][1].astype(float)
    rows, cols = scherzer.shape
    assert cols * images.pixel_size_nm[0] == pytest.approx(2.0, abs=0.02)
    assert rows * images.pixel_size_nm[1] == pytest.approx(1.5, abs=0.02)
    # atoms are dark at Scherzer focus: a picture of dots at the listed places fits best without any shift
    at = images.arrays["atoms_px"][images.arrays["atoms_alive"]]
    y, x = np.mgrid[:rows, :cols] + 0.5
    sigma = 0.03 / images.pixel_size_nm[0]
    shifts = np.arange(-3.0, 3.5, 0.5)

    def fit(dx, dy):
        dots = sum(np.exp(-((x - px - dx) ** 2 + (y - py - dy) ** 2) / (2 * sigma**2)) for px, py in at)
        return -np.corrcoef(dots.ravel(), scherzer.ravel())[0, 1]

    def best(line):  # the vertex of a parabola through the three best
        values = np.array([line(shift) for shift in shifts])
        a, b, _ = np.polyfit(shifts[(near := np.argmax(values)) - 1 : near + 2], values[near - 1 : near + 2], 2)
        return -b / (2 * a)

    assert best(lambda dx: fit(dx, 0.0)) == pytest.approx(0.0, abs=0.3)
    assert best(lambda dy: fit(0.0, dy)) == pytest.approx(0.0, abs=0.3)


def test_a_pixels_electrons_are_those_of_its_dwell_time_alone():
    (images,) = produced(small_mos2(scan={"flyback_blanked": False, "blanker_latency_s": 1e-2}))
    expected = images.arrays["noiseless_BF"].mean() * images.arrays["electrons_per_pixel"]
    assert images.channels["BF"].mean() == pytest.approx(expected, rel=0.005)
    assert images.metadata["electrons_delivered"] > 1.2 * images.arrays["electrons_per_pixel"] * 128**2


def test_without_dose_nothing_happens():
    raw = table("simulate_llzo_series.toml", view__shape=[8, 8], view__dwell_time_s=1e-8)
    (images,) = produced(raw)
    assert len(images.arrays["events_atom"]) == 0


def test_training_shards_are_the_same_from_one_or_several_workers(tmp_path):
    raw = table("simulate_training.toml", frames=6, frames_per_shard=3, size_px=32)
    alone, together = produced(raw), produced(raw, workers=2)
    assert len(alone) == len(together) == 2
    for one, other in zip(alone, together, strict=True):
        assert one.channels["HAADF"].shape == (3, 32, 32)
        assert np.array_equal(one.channels["HAADF"], other.channels["HAADF"])
        assert np.array_equal(one.arrays["atoms_px"], other.arrays["atoms_px"])
    assert not np.array_equal(alone[0].channels["HAADF"], alone[1].channels["HAADF"])
    frames = alone[0].arrays["atoms_frame"]
    assert set(frames) == {0, 1, 2}
    for frame in range(3):  # counts follow the atoms: brightest where heavy columns are
        image = alone[0].channels["HAADF"][frame].astype(float)
        at = alone[0].arrays["atoms_px"][frames == frame].astype(int)
        at = at[np.all((at >= 0) & (at < 32), axis=1)]
        assert image[at[:, 1], at[:, 0]].mean() > image.mean()


@pytest.mark.parametrize("frames", [1, 2])
def test_hspy_opens_with_calibrated_axes(tmp_path, frames):
    reader = pytest.importorskip("rsciio.hspy", reason="RosettaSciIO (the files extra) reads and writes .hspy")
    (images,) = produced(small_mos2(frames=frames))
    path = tmp_path / "series.hspy"
    write_image_set(path, images)
    (signal,) = reader.file_reader(str(path))
    assert signal["data"].shape == (3, *((2,) if frames == 2 else ()), 128, 128)
    assert np.array_equal(signal["data"][0], images.channels["HAADF"])
    axes = {axis["name"]: axis for axis in signal["axes"]}
    assert list(axes) == ["channel", *(("frame",) if frames == 2 else ()), "y", "x"]
    assert (axes["x"]["units"], axes["x"]["scale"]) == ("nm", pytest.approx(4 / 128))
    kept = signal["original_metadata"]["aecontrol"]
    assert json.loads(kept["settings"])["settings"]["optics"]["voltage_kV"] == 80.0
    assert np.allclose(kept["atoms_xyz_nm"], images.arrays["atoms_xyz_nm"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optics__semi_angle_mrad": 0.0}, "semi_angle_mrad = 0.0"),
        ({"view__fov_nm": [0.0, 4.0]}, "fov_nm.0 = 0.0"),
        ({"view__shape": [0, 128]}, "shape.0 = 0"),
        ({"view__shape": [16000, 16000]}, "pixels are more than"),
        ({"beam_current_pA": 1e30}, "beam_current_pA = 1e+30"),
        ({"specimen__vacancies": {"clusters": 3}}, "n_clusters"),
        ({"beam_current_pA": -1.0}, "beam_current_pA = -1.0"),
        ({"view__center_nm": [50.0, 1.0]}, "outside the specimen's field"),
        ({"specimen__kind": "unobtainium"}, "unobtainium"),
        ({"detectors__HAADF": {"inner_mrad": 90.0, "outer_mrad": 80.0}}, "inner_mrad must be less"),
        ({"detectors__MAADF": {"inner_mrad": 60.0, "outer_mrad": 90.0}}, "overlap"),
        ({"contrast": {"level": "table"}, "detectors__HAADF": {"outer_mrad": 300.0}}, "beyond the tables"),
        ({"damage": {"preset": "butter"}}, "butter"),
        ({"frames": 0}, "frames = 0"),
        ({"aperture": 3}, "aperture: unknown key"),
        ({"beam_current_pA": float("nan")}, "beam_current_pA"),
    ],
)
def test_bad_input_names_the_value_and_the_mend(changes, words):
    with pytest.raises(BadInput) as error:
        produced(small_mos2(**changes))
    assert words in str(error.value)


@pytest.mark.parametrize(("name", "words"), [("x.png", "endings"), ("no/such/x.npz", "does not exist")])
def test_a_place_that_cannot_be_written_is_refused_before_rendering(tmp_path, name, words):
    with pytest.raises(BadInput, match="ending" if words == "endings" else words):
        simulate(CONFIGS / "simulate_mos2.toml", tmp_path / name, "cpu", 1, lambda done, total: None)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        Path(args[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    images = ImageSet({"HAADF": np.zeros((2, 2))}, (0.1, 0.1))
    with pytest.raises(StorageFault, match="No space left"):
        write_image_set(tmp_path / "x.npz", images)
    assert list(tmp_path.iterdir()) == []


def test_the_gallery_draws_a_specimen(tmp_path):
    (path,) = gallery(tmp_path, "hbn", "cpu", lambda done, total: None)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="unobtainium"):
        gallery(tmp_path, "unobtainium", "cpu", lambda done, total: None)
