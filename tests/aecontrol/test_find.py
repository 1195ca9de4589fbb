"""`aecontrol find` from outside: what it writes is right, and whatever it is given, it says what it did with it."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from aecontrol.perception.mend import mend_pixels
from aecontrol.perception.quality import noise_gain

PIXEL = 0.02
SPACING = 0.3


def square_lattice(side=128, counts=400.0, background=0.2):
    """Expected counts of columns ``SPACING`` apart, turned by 8 degrees, and their positions [n, 2] in px."""
    turn = np.deg2rad(8.0)
    i, j = np.meshgrid(np.arange(-20, 40), np.arange(-20, 40))
    at = np.stack([i, j], -1).reshape(-1, 2) @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    at = at * SPACING / PIXEL + [3.3, 4.1]
    at = at[((at > -10) & (at < side + 10)).all(1)]
    sigma = 0.045 / PIXEL
    pixel = np.arange(side) + 0.5
    gx, gy = (np.exp(-0.5 * ((pixel - at[:, [k]]) / sigma) ** 2) for k in (0, 1))
    return background + counts / (2 * np.pi * sigma**2) * gy.T @ gx, at[((at > 0) & (at < side)).all(1)]


@pytest.fixture(scope="module")
def frame():
    ideal, at = square_lattice()
    return np.random.default_rng(0).poisson(ideal).astype(np.uint16), at


@pytest.fixture
def find(aecontrol):
    """Run `aecontrol find FILE ... --json` in an empty folder; the exit code, and the result or what was said."""

    def run(file, *arguments):
        code, out, err = aecontrol("find", file, "--device", "cpu", "--json", *arguments)
        return code, json.loads(out) if code == 0 else err

    return run


def saved(path, array):
    np.save(path, array)
    return path


def test_tables_picture_and_json_agree_and_are_right(find, frame, tmp_path):
    image, at = frame
    np.savez(tmp_path / "lattice.npz", image=image, pixel_size_nm=PIXEL)
    code, result = find("lattice.npz")
    assert code == 0
    assert (result["pixel_size_nm"], result["unit"], result["scale"]) == (PIXEL, "nm", {"source": "file"})
    folder = tmp_path / "lattice_find"
    assert json.loads((folder / "atoms.json").read_text()) == result
    rows = list(csv.DictReader((folder / "atoms.csv").read_text().splitlines()))
    assert list(rows[0])[:5] == ["x_nm", "y_nm", "label", "grain", "confidence"]
    for row, atom in zip(rows, result["atoms"], strict=True):
        assert [float(row[f"{k}_nm"]) for k in ("x", "y", "sigma_x", "sigma_y")] == [
            atom[k] for k in ("x", "y", "sigma_x", "sigma_y")
        ]
    found = np.array([(atom["x"], atom["y"]) for atom in result["atoms"]]) / PIXEL
    inner = at[((at > 6) & (at < 122)).all(1)]
    distance = np.hypot(*(inner[:, None] - found[None]).transpose(2, 0, 1)).min(1)
    assert np.median(distance) * PIXEL < 0.005
    assert distance.max() * PIXEL < 0.03
    with Image.open(folder / "overlay.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 700


def test_the_quality_names_dose_precision_and_spacing(find, frame, tmp_path):
    saved(tmp_path / "a.npy", frame[0])
    quality = find("a.npy", "--pixel-size-nm", PIXEL)[1]["quality"]
    assert quality["gain_basis"] == "the image holds counts"
    assert quality["counts_per_column"]["A"] == pytest.approx(400, rel=0.05)
    assert quality["spacing"]["median"] == pytest.approx(SPACING, rel=0.02)
    assert quality["precision"] == pytest.approx(0.045 / np.sqrt(400), rel=0.35)  # the bright limit, and background
    assert quality["areas"] == []


def test_without_refinement_what_was_not_measured_is_null(find, frame, tmp_path):
    saved(tmp_path / "a.npy", frame[0])
    code, result = find("a.npy", "--pixel-size-nm", PIXEL, "--no-refine", "--out", "there")
    assert code == 0
    assert len(result["atoms"]) >= len(frame[1]) * 0.95
    assert all(atom["sigma_x"] is None and atom["intensity"] is None for atom in result["atoms"])
    assert result["quality"]["precision"] is None
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == [
        "atoms.csv", "atoms.json", "overlay.png", "vacancies.csv",
    ]  # fmt: skip


def test_an_unknown_pixel_size_is_estimated_and_results_stay_in_pixels(find, frame, tmp_path):
    image, at = frame
    saved(tmp_path / "a.npy", image)
    code, result = find("a.npy")
    assert code == 0
    assert (result["unit"], result["scale"]["source"]) == ("px", "estimated")
    assert "not a calibration" in result["scale"]["how"]
    assert result["pixel_size_nm"] == pytest.approx(PIXEL, rel=0.3)  # spots of 0.045 nm are taken for 0.05 nm
    found = np.array([(atom["x"], atom["y"]) for atom in result["atoms"]])
    inner = at[((at > 6) & (at < 122)).all(1)]
    assert np.hypot(*(inner[:, None] - found[None]).transpose(2, 0, 1)).min(1).max() < 1.5
    assert result["crystal"]["sublattices"][0]["spacing"] == pytest.approx(SPACING / PIXEL, rel=0.02)


def test_the_same_image_gives_the_same_files(find, frame, tmp_path):
    saved(tmp_path / "a.npy", frame[0])
    for out in ("one", "two"):
        find("a.npy", "--pixel-size-nm", PIXEL, "--out", out)
    for name in ("atoms.csv", "vacancies.csv", "overlay.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_people_get_a_summary(aecontrol, tmp_path, frame):
    saved("a.npy", frame[0])
    code, out, _ = aecontrol("find", "a.npy", "--pixel-size-nm", str(PIXEL), "--device", "cpu")
    assert code == 0
    for word in ("atoms", "counts per column", "standard error", "nearest neighbour", "a_find/overlay.png"):
        assert word in out


def test_a_misfit_and_a_saturated_part_are_pointed_at(find, tmp_path):
    ideal, _ = square_lattice(side=256)
    rng = np.random.default_rng(1)
    wrong = ideal.copy()
    wrong[100:130, 40:70] += 8.0 * (np.indices((30, 30)).sum(0) % 10 < 5)  # stripes, which are no columns
    image = np.minimum(rng.poisson(wrong), 30)
    image[200:212, 200:212] = 30
    saved(tmp_path / "a.npy", image.astype(np.uint8))
    quality = find("a.npy", "--pixel-size-nm", PIXEL)[1]["quality"]

    def covers(area, x, y):
        return (
            area["x"] <= x * PIXEL <= area["x"] + area["width"] and area["y"] <= y * PIXEL <= area["y"] + area["height"]
        )

    assert any(covers(area, 55, 115) and "misfit" in area["reason"] for area in quality["areas"])
    saturated = [area for area in quality["areas"] if area["reason"] == "saturated"]
    assert any(covers(area, 206, 206) for area in saturated)
    assert any("saturated" in said for said in quality["warnings"])
    clean = [area for area in quality["areas"] if covers(area, 200, 40)]
    assert clean == []


def test_help_imports_nothing_heavy():
    probe = (
        "import sys, aecontrol.cli as c\n"
        "sys.argv = ['aecontrol', *sys.argv[1:]]\n"
        "try:\n    c.main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'torch', 'ase', 'matplotlib', 'scipy', 'skimage', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", probe, "find", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--no-refine" in done.stdout


# ---------------------------------------------------------------- bad input

BAD = {
    "all NaN": (lambda image: np.full((64, 64), np.nan), "no finite pixel"),
    "an area of NaN": (lambda image: np.where(np.indices(image.shape)[0] < 30, np.nan, image), "not finite"),
    "one blob of NaN": (lambda image: blotted(image, 5), r"all around it are dead"),
    "a stack": (lambda image: np.stack([image] * 3), "one frame: 0 to 2"),
    "one pixel wide": (lambda image: image[:, :1], "nm a side is needed"),
    "one pixel": (lambda image: image[:1, :1], "nm a side is needed"),
    "complex": (lambda image: image.astype(complex), "real numbers"),
    "text": (lambda image: np.array([["a", "b"]]), "real numbers"),
    "no pixels": (lambda image: image[:0], "empty image"),
    "a spectrum": (lambda image: image[0], "two-dimensional"),
    "beyond all numbers": (lambda image: image * 1e200, "limit is 1e\\+15"),
}


def blotted(image, side):
    image = image.astype(float)
    image[40 : 40 + side, 40 : 40 + side] = np.nan
    return image


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused_with_a_reason(find, frame, tmp_path, name):
    spoil, says = BAD[name]
    saved(tmp_path / "bad.npy", spoil(frame[0]))
    code, said = find("bad.npy", "--pixel-size-nm", PIXEL)
    assert code == 2
    assert re.search(says, said)
    assert "mend:" in said
    assert not (tmp_path / "bad_find").exists()


@pytest.mark.parametrize(
    ("content", "name", "arguments", "says"),
    [
        (b"", "a.npy", (), "empty"),
        (b"hello", "a.dm3", (), "could not be read"),
        (b"hello", "a.xyz", (), "no reader"),
        (None, "a.npy", (), "no file"),
        ("noise", "a.npy", (), "give --pixel-size-nm"),
        ("image", "a.npy", ("--pixel-size-nm", "0.5"), "up to 0.13 nm"),
        ("image", "a.npy", ("--pixel-size-nm", "nan"), "pixel_size_nm"),
        ("image", "a.npy", ("--pixel-size-nm", "-0.02"), "pixel_size_nm"),
        ("image", "a.npy", ("--pixel-size-nm", "0.02", "--threshold", "1.5"), "threshold"),
        ("image", "a.npy", ("--pixel-size-nm", "0.02", "--frame", "4"), "no frame 4"),
        ("image", "a.npy", ("--pixel-size-nm", "0.02", "--channel", "BF"), "one image"),
        ("image", "a.npy", ("--pixel-size-nm", "0.02", "--weights", "none"), "cannot be read"),
        ("image", "a.npy", ("--pixel-size-nm", "0.02", "--out", "a.npy"), "is a file"),
        ("image", "a.npy", ("--pixel-size-nm", "0.02", "--no-refine", "--out", "a.npy/b"), "cannot be made"),
        ("image", "a.npy", ("--pixel-size-nm", "0.02", "--device", "abacus"), "abacus"),
    ],
)
def test_a_wrong_file_or_argument_is_named(find, frame, tmp_path, content, name, arguments, says):
    if content in ("image", "noise"):
        saved(tmp_path / name, frame[0] if content == "image" else np.random.default_rng(0).poisson(9, (64, 64)))
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    code, said = find(name, *arguments)
    assert code == 2
    assert says in said


def test_a_constant_image_holds_no_atoms_and_says_so(find, tmp_path):
    saved(tmp_path / "a.npy", np.full((64, 64), 7, np.uint16))
    code, result = find("a.npy", "--pixel-size-nm", PIXEL)
    assert code == 0
    assert result["atoms"] == []
    assert "7 everywhere" in result["quality"]["warnings"][0]


def test_a_frame_of_a_stack_is_found_as_the_frame_alone(find, frame, tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([frame[0] * 0, frame[0]]), photometric="minisblack")
    saved(tmp_path / "alone.npy", frame[0])
    _, stack = find("stack.tif", "--pixel-size-nm", PIXEL, "--frame", 1)
    _, alone = find("alone.npy", "--pixel-size-nm", PIXEL)
    assert stack["atoms"] == alone["atoms"]
    assert "stack_frame1_find" in stack["files"]["overlay.png"]


def test_a_screenshot_in_greys_is_read_and_one_in_colour_refused(find, frame, tmp_path):
    pytest.importorskip("rsciio.image")
    grey = np.clip(frame[0] * 4, 0, 255).astype(np.uint8)
    opaque = np.full_like(grey, 255)
    Image.fromarray(np.dstack([grey, grey, grey, opaque])).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([grey, grey[::-1], grey])).save(tmp_path / "colour.png")
    tifffile.imwrite(tmp_path / "colour.tif", np.dstack([grey, grey[::-1], grey]), photometric="rgb")
    code, result = find("grey.png", "--pixel-size-nm", PIXEL)
    assert code == 0
    assert len(result["atoms"]) > 0.9 * len(frame[1])
    for name in ("colour.png", "colour.tif"):
        code, said = find(name, "--pixel-size-nm", PIXEL)
        assert code == 2
        assert "colour" in said


def test_dead_and_hot_pixels_do_not_change_what_is_found(find, frame, tmp_path):
    rng = np.random.default_rng(2)
    bad = frame[0].astype(np.uint16) + 1000
    rows, cols = rng.integers(0, 128, (2, 24))
    bad[rows[:12], cols[:12]], bad[rows[12:], cols[12:]] = 65535, 0
    saved(tmp_path / "bad.npy", bad)
    saved(tmp_path / "good.npy", frame[0] + 1000)
    _, mended = find("bad.npy", "--pixel-size-nm", PIXEL)
    _, good = find("good.npy", "--pixel-size-nm", PIXEL)
    assert mended["quality"]["mended_pixels"] == 24
    assert "24 dead or hot pixels" in mended["quality"]["warnings"][0]
    assert len(mended["atoms"]) == len(good["atoms"])
    at = [np.array([(a["x"], a["y"]) for a in result["atoms"]]) for result in (mended, good)]
    assert np.hypot(*(at[0][:, None] - at[1][None]).transpose(2, 0, 1)).min(1).max() < 0.02


@pytest.mark.parametrize("kind", ["negative", "bool", "float16", "a few NaN", "gain and offset"])
def test_unusual_but_honest_images_are_found_like_any(find, frame, tmp_path, kind):
    image, at = frame
    few = image.astype(float)
    few[[10, 50], [20, 60]] = np.nan
    unusual = {
        "negative": image - 30.0,
        "bool": image > 5,
        "float16": image.astype(np.float16),
        "a few NaN": few,
        "gain and offset": (100 * image + 5000).astype(np.int32),
    }[kind]
    saved(tmp_path / "a.npy", unusual)
    code, result = find("a.npy", "--pixel-size-nm", PIXEL)
    assert code == 0
    assert len(result["atoms"]) == pytest.approx(len(at), rel=0.1)
    if kind == "negative":
        assert any("negative" in said for said in result["quality"]["warnings"])
    if kind == "gain and offset":
        assert result["quality"]["counts_per_column"]["A"] == pytest.approx(400, rel=0.2)


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("mean", [0.003, 0.1, 2.0, 300.0])
def test_no_pixel_of_shot_noise_is_called_hot_or_dead(mean):
    image = np.random.default_rng(3).poisson(mean, (1024, 1024))
    assert not mend_pixels(image, 0.0125)[1].any()


@pytest.mark.parametrize("pixel_nm", [0.008, 0.02, 0.035])
def test_the_sharpest_spots_are_not_mended(pixel_nm):
    """Noise-free columns of the least blur, 0.025 nm, wherever they lie in their pixel, and a bright one alone."""
    sigma = 0.025 / pixel_nm
    at = np.random.default_rng(4).uniform(0.1, 0.9, (300, 2)) * 2.5 / pixel_nm
    pixel = np.arange(int(2.5 / pixel_nm)) + 0.5
    gx, gy = (np.exp(-0.5 * ((pixel - at[:, [k]]) / sigma) ** 2) for k in (0, 1))
    image = (np.random.default_rng(5).uniform(10, 1000, 300)[:, None] * gy).T @ gx
    image += np.random.default_rng(6).normal(0, 1.0, image.shape)
    assert not mend_pixels(image, pixel_nm)[1].any()


@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.0), (1.0, 500.0), (37.0, 1200.0)])
def test_the_gain_is_read_off_the_noise(gain, offset):
    ideal, _ = square_lattice(side=256)
    image = gain * np.random.default_rng(7).poisson(ideal) + offset
    told, basis = noise_gain(image)
    assert told == pytest.approx(gain, rel=0.1)
    assert (basis == "the image holds counts") == (offset == 0)


@pytest.mark.parametrize("row", [np.arange(64.0), np.arange(64.0) ** 2, np.random.default_rng(0).poisson(10, 64)])
def test_an_image_of_equal_rows_has_no_noise_to_read_a_gain_off(row):
    assert noise_gain(np.tile(row, (64, 1))) == (None, "the image holds no noise")
