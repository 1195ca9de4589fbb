"""Vacancies in sub-scans and evidence in overviews, against what the simulator removed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from aecontrol.perception import targets
from aecontrol.perception.lattice import LatticeHint
from aecontrol.perception.targets import CrystalReading, missing_atom_evidence, read_crystal, report
from aecontrol.types import ATOM_LABELS, ScanRegion
from simulators.specimens.sheets import SulphurVacancies

from .mos2_frames import (
    CLUSTER,
    FULL_DOSE,
    HEAVY,
    Shot,
    columns_in_frame,
    in_frame,
    scan_region,
    seen_atoms,
    shoot,
    specimen,
)

HINT = LatticeHint()
BORDER_NM = 0.1


def read(shot: Shot, seed: int = 0) -> CrystalReading:
    reading = read_crystal(shot.image, shot.region.pixel_size_nm, seen_atoms(shot, seed), HINT, BORDER_NM)
    assert not isinstance(reading, str), reading
    return reading


def scores(shots: list[Shot]) -> tuple[float, float]:
    """Precision and recall of the reported vacancies, matched within 0.1 nm, rim left out."""
    hits = reported = there = 0
    for shot in shots:
        reading = read(shot)
        xy, left = columns_in_frame(shot, "S")
        inside = ((xy > BORDER_NM + 0.02) & (xy < np.array(shot.region.fov_nm) - BORDER_NM - 0.02)).all(1)
        found = reading.table[list(reading.found), :2]
        tree = cKDTree(xy[left < 2])
        hits += int((tree.query(found)[0] < 0.1).sum())
        reported += len(found)
        there += int((inside & (left < 2)).sum())
    return hits / reported, min(hits, there) / there


@pytest.mark.parametrize(
    ("vacancies", "fluence", "pixels", "recall"),
    [
        (CLUSTER, FULL_DOSE, 256, 0.95),
        (HEAVY, FULL_DOSE, 192, 0.97),
        (HEAVY, FULL_DOSE / 2.4, 256, 0.93),  # 50 counts in a full column, a quarter of all S missing
        (CLUSTER, 100 * FULL_DOSE, 256, 0.999),  # 1e4 counts
    ],
)
def test_precision_and_recall(vacancies: SulphurVacancies, fluence: float, pixels: int, recall: float) -> None:
    shots = [
        shoot(specimen(s, vacancies, rotation_deg=17.0 * s), scan_region(pixels=pixels), fluence, s) for s in range(4)
    ]
    precision, recalled = scores(shots)
    assert precision >= 0.94
    assert recalled >= recall


def test_posteriors_and_totals_are_honest_where_counts_are_few() -> None:
    probability, truth, off = [], [], []
    for seed in range(8):
        shot = shoot(specimen(seed, CLUSTER, rotation_deg=11.0 * seed), scan_region(), FULL_DOSE / 2.4, seed)
        reading = read(shot)
        xy, left = columns_in_frame(shot, "S")
        _, nearest = cKDTree(xy).query(reading.table[reading.judged, :2])
        probability.append(reading.table[reading.judged, 7])
        truth.append(left[nearest] < 2)
        off.append((reading.missing.sum() - (2 - left[nearest]).sum()) / math.sqrt(reading.value_variance))
    p, t = np.concatenate(probability), np.concatenate(truth)
    for low, high in ((0.02, 0.2), (0.2, 0.6), (0.6, 0.95)):
        mine = (p >= low) & (p < high)
        error = 3 * math.sqrt(p[mine].mean() * (1 - p[mine].mean()) / mine.sum())
        assert abs(t[mine].mean() - p[mine].mean()) < error + 0.03
    assert np.sqrt(np.mean(np.square(off))) < 2.0


def test_a_gain_changes_amplitudes_and_nothing_else() -> None:
    shot = shoot(specimen(3, CLUSTER), scan_region(), FULL_DOSE, 3)
    plain = read(shot)
    scaled = read(Shot(40.0 * shot.image, shot.region, shot.specimen, shot.electrons_per_pixel))
    assert scaled.found == plain.found
    assert scaled.table[:, 7] == pytest.approx(plain.table[:, 7], abs=0.02)
    assert scaled.table[:, 6] == pytest.approx(40 * plain.table[:, 6], rel=0.02, abs=40)


def test_labels_and_positions() -> None:
    shot = shoot(specimen(4, HEAVY), scan_region(), 4 * FULL_DOSE, 4)
    reading = read(shot)
    for site, labels in (("Mo", ("Mo",)), ("S", ("S0", "S1", "S2"))):
        xy, left = columns_in_frame(shot, site)
        mine = np.isin(reading.table[:, 2], [ATOM_LABELS.index(name) for name in labels])
        inner = mine & ((reading.table[:, :2] > 0.1) & (reading.table[:, :2] < 7.9)).all(1)
        distance, nearest = cKDTree(xy).query(reading.table[inner, :2])
        assert np.sqrt((distance**2).mean()) < 0.005
        if site == "S":
            named = reading.table[inner, 2].astype(int)
            assert np.mean(named == [ATOM_LABELS.index(f"S{n}") for n in left[nearest]]) > 0.995


def test_a_hole_in_the_sheet_is_not_full_of_vacancies() -> None:
    shot = shoot(specimen(5, SulphurVacancies(background_fraction=0.0, n_clusters=0)), scan_region(), FULL_DOSE, 5)
    positions = shot.specimen.positions_A[:, :2] / 10
    hole = np.hypot(*(positions - 6.0).T) < 1.5
    holed = shoot(
        shot.specimen.changed(shot.specimen.alive & ~hole, shot.specimen.positions_A), shot.region, FULL_DOSE, 5
    )
    reading = read(holed)
    far = np.hypot(*(reading.table[list(reading.found), :2] - 4.0).T)
    assert (far > 1.2).all()
    assert len(far) < 25  # what is torn at the rim; the hole itself holds 80 columns


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_a_wrong_crystal_are_refused(seed: int) -> None:
    random = np.random.default_rng(seed)
    noise = random.poisson(3.0, (256, 256)).astype(float)
    note = read_crystal(noise, (1 / 32, 1 / 32), random.uniform(0, 8, (1500, 2)), HINT, BORDER_NM)
    assert isinstance(note, str)
    shot = shoot(specimen(seed, CLUSTER), scan_region(), FULL_DOSE, seed)
    scattered = read_crystal(shot.image, shot.region.pixel_size_nm, random.uniform(0, 8, (1500, 2)), HINT, BORDER_NM)
    assert isinstance(scattered, str)
    assert "poor lattice" in scattered


@given(st.lists(st.floats(0, 1), max_size=60))
def test_reported_set_keeps_its_promise(probability: list[float]) -> None:
    p = np.array(probability)
    chosen = list(report(p))
    if chosen:
        assert (1 - p[chosen]).mean() <= targets.FALSE_DISCOVERY + 1e-9
        assert p[chosen].min() > 0.5
        assert p[chosen].min() >= np.delete(p, chosen).max(initial=0.0)


# ---------------------------------------------------------------- overview

CLUSTERED = SulphurVacancies()


def overview(seed: int, fluence: float, pixels: int = 320, rotation_rad: float = 0.0) -> Shot:
    size = 36.0  # turned by 0.4 rad it still lies inside the specimen
    return shoot(
        specimen(seed, CLUSTERED, size_nm=50.0, rotation_deg=20.0 * seed),
        scan_region(size, pixels, 25.0, rotation_rad),
        fluence,
        seed,
    )


def windows(fov_nm: float = 7.0) -> list[ScanRegion]:
    centres = np.arange(3) * fov_nm * 1.2 + 16.6
    return [
        ScanRegion(center_nm=(float(x), float(y)), fov_nm=(fov_nm, fov_nm), shape=(256, 256), dwell_time_s=1e-5)
        for y in centres
        for x in centres
    ]


def missing_in(shot: Shot, window: ScanRegion) -> int:
    gone = ~shot.specimen.alive & (shot.specimen.site == "S")
    xy = in_frame(shot.specimen.positions_A[gone, :2] / 10, window)
    return int(((xy >= 0) & (xy < np.array(window.fov_nm))).all(1).sum())


@pytest.mark.parametrize(
    ("fluence", "pixels", "resolved"), [(1000.0, 330, 1.0), (3000.0, 330, 1.0), (3000.0, 170, 0.0)]
)
def test_evidence_counts_missing_atoms(fluence: float, pixels: int, resolved: float) -> None:
    z, pairs = [], []
    for seed in range(4):
        shot = overview(seed, fluence, pixels, rotation_rad=0.4 * (seed % 2))
        evidence = missing_atom_evidence(shot.image, shot.region, windows(), HINT)
        for window, (value, variance, features) in zip(windows(), evidence, strict=True):
            assert value is not None
            assert variance is not None
            assert features["resolved"] == resolved
            truth = missing_in(shot, window)
            pairs.append((truth, value))
            z.append((value - truth) / math.sqrt(variance))
    assert abs(np.mean(z)) < 0.6
    assert 0.7 < np.std(z) < 1.4
    assert np.corrcoef(np.array(pairs).T)[0, 1] > (0.6 if resolved else 0.4)


def test_evidence_ignores_slow_ramps() -> None:
    shot = overview(1, 3000.0, 330)
    y, x = np.mgrid[0:1:330j, 0:1:330j]
    random = np.random.default_rng(0)
    ramp = random.poisson(shot.image.mean() * (0.3 * x + 0.2 * y))
    for image in (shot.image + ramp, shot.image * (0.85 + 0.3 * x)):
        evidence = missing_atom_evidence(image, shot.region, windows(), HINT)
        z = [(v - missing_in(shot, w)) / math.sqrt(s) for w, (v, s, _) in zip(windows(), evidence, strict=True)]  # type: ignore[operator,arg-type]
        assert abs(np.mean(z)) < 1.0
        assert np.std(z) < 1.7


def test_no_evidence_outside_of_the_overview() -> None:
    shot = overview(0, 1000.0)
    far = windows()[0].model_copy(update={"center_nm": (49.0, 49.0)})
    (outside,) = missing_atom_evidence(shot.image, shot.region, [far], HINT)
    assert outside[0] is None


def test_frame_transform_is_the_regions() -> None:
    region = ScanRegion(center_nm=(3.0, -2.0), fov_nm=(4.0, 2.0), shape=(10, 20), dwell_time_s=1e-6, rotation_rad=0.6)
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 2.0], [0.0, 2.0]])
    assert targets.to_specimen(corners, region) == pytest.approx(np.array(region.corners_nm()))
    assert targets.to_frame(targets.to_specimen(corners, region), region) == pytest.approx(corners)


def test_columns_at_the_edge_are_judged_as_honestly_as_others() -> None:
    wrong = right = 0
    for seed in range(5):
        shot = shoot(specimen(seed, HEAVY, rotation_deg=9.0 * seed), scan_region(4.0, 128), FULL_DOSE, seed)
        reading = read_crystal(shot.image, shot.region.pixel_size_nm, seen_atoms(shot, seed), HINT, 0.0)
        assert not isinstance(reading, str)
        found = reading.table[list(reading.found), :2]
        rim = ((found < 0.1) | (found > 3.9)).any(1)
        xy, left = columns_in_frame(shot, "S")
        hit = cKDTree(xy[left < 2]).query(found[rim])[0] < 0.1
        right, wrong = right + int(hit.sum()), wrong + int((~hit).sum())
    assert right > 30
    assert wrong <= 0.06 * right
