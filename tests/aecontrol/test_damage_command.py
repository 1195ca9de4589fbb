"""`aecontrol damage` from outside: what it writes is right, and bad input is said to be so."""

from __future__ import annotations

import csv
import json
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from aecontrol.damage_series import _response
from aecontrol.damage_words import conclusions
from aecontrol.judged import Judged, Series
from aecontrol.perception.damage.meter import build_meter
from aecontrol.perception.damage.reading import DamageReading
from aecontrol.registry import build_part
from tests.perception.damage_frames import Crystal, counts


@pytest.fixture
def damage(aecontrol):
    """Run `aecontrol damage ...` in an empty folder: exit code, stdout and stderr."""
    return partial(aecontrol, "damage")


def series(side=140):
    """Three frames that drift; of the last one a disc is damaged."""
    crystal = Crystal.square(side)
    worse = crystal.without(60, 80, 25)
    return np.stack(
        [
            counts(c.shows(at), 40, k)
            for k, (c, at) in enumerate(((crystal, (0, 0)), (crystal, (4, 1)), (worse, (8, 3))))
        ]
    )


def test_a_series_gets_maps_a_table_and_a_verdict(damage, tmp_path, monkeypatch):
    monkeypatch.setattr("aecontrol.damage_series.OTHERS", ("ssim", "psnr", "resnet18"))
    frames = series()
    np.savez(tmp_path / "s.npz", frames=frames, pixel_size_nm=0.02)
    code, out, _ = damage("s.npz", "--metric", "glr", "--dose-per-frame", "100", "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result) == {"backbone", "sha256", "frames"}
    still, worse = result["frames"]
    assert set(still) == {"index", "valid", "shift_px", "score", "flagged_fraction", "map"}
    assert (still["index"], worse["index"], still["valid"], worse["valid"]) == (1, 2, True, True)
    assert still["shift_px"] == pytest.approx([4, 1], abs=0.1)
    assert worse["shift_px"] == pytest.approx([8, 3], abs=0.1)  # beyond the limit from the first, not from the second
    assert still["flagged_fraction"] == 0.0
    assert worse["flagged_fraction"] > 0.03
    assert worse["score"] > still["score"]
    disc = np.load(worse["map"])
    assert disc.shape == (7, 7)
    assert np.unravel_index(np.nanargmax(disc), disc.shape) in {(3, 2), (4, 2), (3, 3), (4, 3)}
    folder = tmp_path / "s_damage"
    laid = np.load(folder / "registered.npz")
    assert np.corrcoef(laid["frames"][1][20:100, 20:100].ravel(), frames[0][20:100, 20:100].ravel())[0, 1] > 0.8
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(row["metric"], row["frame"]) for row in rows} >= {(m, f) for m in ("glr", "ssim", "psnr") for f in "12"}
    said = (folder / "conclusions.txt").read_text()
    assert "only the slope may be used" in said or "Critical fluence" in said
    for name in ("maps.png", "curve.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_curve_that_does_not_follow_the_law_is_said_not_to():
    glr, fluence = build_meter("glr", "cpu"), 100.0 * (np.arange(9) + 0.5)
    grid, noise = np.ones((6, 6)), np.random.default_rng(0)
    frames = Series("s", np.zeros((9, 120, 120)), 0.02, 100.0, 0.1)

    def told(damaged):
        readings = [
            DamageReading(
                score=damage * grid + noise.normal(0, 0.02, grid.shape),
                sd=0.02 * grid,
                p=grid,
                valid=grid > 0,
                shift_px=(0.0, 0.0),
                residual_px=0.01,
                reason="",
                metric="glr",
            )
            for damage in damaged[1:] - damaged[0]
        ]
        judged = Judged(frames, tuple(readings), fluence)
        response, plausible = _response(judged, glr)
        return " ".join(conclusions(replace(judged, response=response, plausible=plausible)))

    still = told(np.zeros(9))
    assert "Frame 8 shows no change" in still
    assert "all together do" not in still
    law = told(1.0 - np.exp(-fluence / 400.0))
    assert "does not describe the curve" not in law
    assert "No single patch of frame 8" in law
    assert "does not describe the curve" in told(1.0 - np.exp(-((fluence / 600.0) ** 6)))


def test_bad_series_are_refused_with_value_limit_and_mend(damage, tmp_path):
    frames = series(60)
    np.save(tmp_path / "one.npy", frames[0])
    np.save(tmp_path / "small.npy", frames[0][:50])
    hole = frames.copy()
    hole[1, 2, 3] = np.nan
    np.save(tmp_path / "hole.npy", hole)
    np.savez(tmp_path / "fine.npz", image=frames[0], pixel_size_nm=0.01)
    np.savez(tmp_path / "coarse.npz", image=frames[0], pixel_size_nm=0.02)
    (tmp_path / "empty").mkdir()
    for arguments, why in (
        (("one.npy",), "1 frame"),
        (("one.npy", "small.npy"), "frames of different shape"),
        (("hole.npy",), "frame 1 has 1 pixels that are not numbers"),
        (("fine.npz", "coarse.npz"), "pixel sizes differ: 0.01"),
        (("empty",), "holds no file"),
        (("none.npy",), "no file"),
        (("one.npy", "one.npy", "--metric", "best"), "metric 'best' is not known"),
        (("one.npy", "one.npy", "--weights", "nowhere"), "nowhere"),
        (("one.npy", "one.npy", "--dose-per-frame", "-1"), "dose_per_frame"),
    ):
        code, out, err = damage(*arguments)
        assert code == 2, arguments
        assert why in err, arguments
        assert "mend:" in err
        assert not out


def test_what_no_pixel_size_or_no_patch_leaves_open_is_refused(damage, tmp_path):
    np.save(tmp_path / "plain.npy", series())
    code, _, err = damage("plain.npy", "--limit-nm", "1")
    assert code == 2
    assert "--limit-nm 1 is in nm" in err
    assert "--pixel-size-nm" in err
    np.save(tmp_path / "colour.npy", np.zeros((64, 64, 3)))
    code, _, err = damage("colour.npy")
    assert code == 2
    assert "64 frames of 64 x 3 px; a patch is 20 x 20 px; images in colour are not read" in err


def test_frames_without_overlap_are_told_apart_from_undamaged_ones(damage, tmp_path, monkeypatch):
    monkeypatch.setattr("aecontrol.damage_series.OTHERS", ())
    first = series(60)[0]
    other = counts(np.random.default_rng(1).random((60, 60)), 40, 3)
    np.save(tmp_path / "s.npy", np.stack([first, other]))
    code, out, _ = damage("s.npy", "--metric", "glr", "--pixel-size-nm", "0.02", "--json")
    assert code == 0
    (frame,) = json.loads(out)["frames"]
    assert (frame["valid"], frame["score"], frame["flagged_fraction"]) == (False, None, None)
    said = (tmp_path / "s_damage" / "conclusions.txt").read_text()
    assert "nothing may be concluded" in said
    assert "nothing is known of damage" in said


@pytest.mark.slow
def test_a_garnet_is_damaged_more_by_more_dose_and_less_when_cold():
    def scores(name):
        raw = tomllib.loads((Path(__file__).parents[2] / "configs" / name).read_text())["simulation"]
        (images,) = build_part("simulation", raw, "simulation").produce("cpu", 1, lambda done, total: None)
        first, *later = images.channels["HAADF"]
        meter = build_meter("learned", "cpu")
        return [meter.read(first, frame, images.pixel_size_nm, 0.12).mean_score for frame in later]

    warm, cold = scores("damage_llzo.toml"), scores("damage_llzo_cold.toml")
    assert warm[1] > warm[0] > cold[0]
    assert warm[1] > cold[1] > cold[0]
