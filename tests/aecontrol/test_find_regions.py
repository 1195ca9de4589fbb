"""`aecontrol find --what regions` from outside: table, masks and picture say the same, and bad input is refused."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

PIXEL = 0.08
RADIUS_NM = 2.0
AT_NM = (4.3, 6.1)


@pytest.fixture
def disc(tmp_path):
    """A particle on a film: a half ball."""
    side = np.stack(np.meshgrid(np.arange(160), np.arange(140)), -1) * PIXEL + PIXEL / 2 - AT_NM
    height = np.sqrt(np.maximum(RADIUS_NM**2 - (side**2).sum(-1), 0))
    np.save(tmp_path / "disc.npy", np.random.default_rng(0).poisson(20 + 40 * height))
    return tmp_path / "disc.npy"


def test_table_masks_picture_and_json_agree_and_are_right(aecontrol, disc, tmp_path):
    code, out, _ = aecontrol("find", disc, "--what", "regions", "--pixel-size-nm", PIXEL, "--no-refine", "--json")
    assert code == 0
    result = json.loads(out)
    folder = tmp_path / "disc_find"
    assert json.loads((folder / "regions.json").read_text()) == result
    (row,) = csv.DictReader((folder / "regions.csv").read_text().splitlines())
    (region,) = result["regions"]
    assert list(row) == ["class", "label", "x_nm", "y_nm", "area_nm2", "length_nm", "confidence", "at_rim"]
    assert (row["class"], row["length_nm"], row["at_rim"]) == ("particle", "", "False")
    assert (float(row["x_nm"]), float(row["area_nm2"])) == (region["x"], region["area_nm2"])
    assert (region["x"], region["y"]) == pytest.approx(AT_NM, abs=0.15)
    assert region["area_nm2"] == pytest.approx(np.pi * RADIUS_NM**2, rel=0.2)
    masks = np.load(folder / "masks.npz")
    assert set(masks) == {"pixel_size_nm", "particle", "boundary"}
    assert masks["particle"].shape == tuple(result["shape"])
    assert (masks["particle"] == region["label"]).sum() * PIXEL**2 == pytest.approx(region["area_nm2"], rel=0.03)
    assert set(result["not_judged"]) == {"wall"}
    with Image.open(folder / "overlay.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


def test_people_get_a_summary(aecontrol, disc):
    code, out, _ = aecontrol("find", disc, "--what", "regions", "--pixel-size-nm", 0.2)
    assert code == 0
    for said in ("particles", "median area", "not judged: pixels of 0.2 nm", "disc_find/masks.npz"):
        assert said in out


def test_the_same_image_gives_the_same_files(aecontrol, disc, tmp_path):
    for out in ("one", "two"):
        assert aecontrol("find", disc, "--what", "regions", "--pixel-size-nm", 0.2, "--out", out)[0] == 0
    for name in ("regions.csv", "masks.npz", "overlay.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_constant_image_holds_no_region_and_says_so(aecontrol, tmp_path):
    np.save(tmp_path / "a.npy", np.full((64, 64), 7))
    code, out, _ = aecontrol("find", "a.npy", "--what", "regions", "--pixel-size-nm", 0.2, "--json")
    assert code == 0
    assert json.loads(out)["regions"] == []
    assert "7 everywhere" in json.loads(out)["warnings"][0]


@pytest.mark.parametrize(
    ("spoil", "arguments", "says"),
    [
        (lambda image: image, ("--pixel-size-nm", PIXEL, "--what", "trees"), "what"),
        (lambda image: image, (), "--pixel-size-nm"),
        (lambda image: image, ("--pixel-size-nm", 2), "0.5 nm"),
        (lambda image: image, ("--pixel-size-nm", PIXEL, "--weights", "none"), "cannot be read"),
        (lambda image: image, ("--pixel-size-nm", PIXEL, "--channel", "BF"), "one image"),
        (lambda image: image[:, :1], ("--pixel-size-nm", PIXEL), "nm"),
        (lambda image: np.stack([image] * 2), ("--pixel-size-nm", PIXEL), "one frame: 0 to 1"),
        (lambda image: np.full((64, 64), np.nan), ("--pixel-size-nm", PIXEL), "no finite pixel"),
        (lambda image: image.astype(complex), ("--pixel-size-nm", PIXEL), "real numbers"),
    ],
)
def test_bad_input_is_refused_with_a_reason(aecontrol, disc, tmp_path, spoil, arguments, says):
    np.save(tmp_path / "bad.npy", spoil(np.load(disc)))
    code, _, said = aecontrol("find", "bad.npy", "--what", "regions", *arguments)
    assert code == 2
    assert says in said
    assert "mend:" in said
    assert not (tmp_path / "bad_find").exists()
