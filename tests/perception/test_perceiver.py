"""The perceiver through its protocol: shipped weights, simulated frames, every target."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from aecontrol.perception.perceiver import AtomPerceiver, AtomReader
from aecontrol.perception.targets import (
    AtomCountTarget,
    LatentComponentTarget,
    NoveltyTarget,
    VacancyTarget,
)
from aecontrol.protocols import Perceiver
from aecontrol.types import ATOM_COLUMNS, ATOM_LABELS

from .mos2_frames import CLUSTER, FULL_DOSE, HEAVY, columns_in_frame, in_frame, scan_region, shoot, specimen


@dataclass(frozen=True)
class Peaks:
    x_px: NDArray[np.float64]
    y_px: NDArray[np.float64]
    confidence: NDArray[np.float64]
    sigma_x: NDArray[np.float64]
    sigma_y: NDArray[np.float64]
    intensity: NDArray[np.float64]


class PeakFinder:
    """A finder without a network: local maxima of the smoothed frame, confidence 0.9."""

    version = "peaks"

    def find(self, image: NDArray[Any], pixel_size_nm: tuple[float, float], threshold: float = 0.5) -> Any:
        from skimage.feature import peak_local_max

        smooth = gaussian_filter(np.asarray(image, float), 0.045 / pixel_size_nm[0])
        row, col = peak_local_max(smooth, min_distance=3, exclude_border=2).T
        one = np.ones(len(row))
        return Peaks(col + 0.5, row + 0.5, 0.9 * one, 0.3 * one, 0.3 * one, smooth[row, col])


def reader(**settings: Any) -> AtomReader:
    return AtomReader(AtomPerceiver(**settings), PeakFinder())


def test_shipped_perceiver_finds_vacancies_in_the_specimen_frame() -> None:
    perceiver = AtomPerceiver().build("cpu")
    assert isinstance(perceiver, AtomReader)
    shot = shoot(specimen(1, HEAVY), scan_region(rotation_rad=0.5), FULL_DOSE, 1)
    reading = perceiver.read_scan(shot.image, shot.region, shot.electrons_per_pixel)
    start = time.process_time()
    again = perceiver.read_scan(shot.image, shot.region, shot.electrons_per_pixel)
    seconds = time.process_time() - start
    assert again.atoms is not None
    assert reading.atoms is not None
    assert np.array_equal(again.atoms, reading.atoms)
    assert seconds < 4.0  # 0.7 s on one idle core
    true, _ = shot.specimen.targets("vacancy")
    inside = ((in_frame(true, shot.region) > 0.12) & (in_frame(true, shot.region) < 7.88)).all(1)
    found = np.array([(a.x_nm, a.y_nm) for a in reading.found_atoms()])
    assert (cKDTree(true).query(found)[0] < 0.03).mean() > 0.94
    assert (cKDTree(found).query(true[inside])[0] < 0.03).mean() > 0.94
    assert {a.label for a in reading.found_atoms()} <= {"S0", "S1"}
    gone = ~shot.specimen.alive & (shot.specimen.site == "S")
    missing = in_frame(shot.specimen.positions_A[gone, :2] / 10, shot.region)
    truth = ((missing > 0) & (missing < 8)).all(1).sum()
    assert reading.value == pytest.approx(truth, abs=5 * np.sqrt(reading.variance or 0) + 1)


def test_atom_table_and_patches_name_each_other() -> None:
    shot = shoot(specimen(2, CLUSTER), scan_region(), FULL_DOSE, 2)
    reading = reader(max_patches=120).read_scan(shot.image, shot.region, None)
    assert reading.atoms is not None
    assert reading.patches is not None
    assert reading.patch_atoms is not None
    assert reading.atoms.shape[1] == len(ATOM_COLUMNS)
    assert reading.patches.shape == (120, 16, 16)
    assert reading.patches.dtype == np.float32
    assert (np.diff(reading.patch_atoms) > 0).all()
    rows = reading.atoms[reading.patch_atoms]
    half = AtomPerceiver().patch_size_nm / 2
    xy = in_frame(reading.atoms[:, :2], shot.region)
    whole = ((xy >= half) & (xy <= 8 - half)).all(1)
    kept = set(reading.patch_atoms.tolist())
    assert {i for i in reading.found if whole[i]} <= kept
    names = {ATOM_LABELS[int(label)] for label in rows[:, 2]}
    assert {"Mo", "S2", "S1"} <= names
    # A patch shows its own column: bright on Mo, dimmer on S2, dark on a vacancy.
    centre = reading.patches[:, 7:9, 7:9].mean((1, 2))
    level = {name: np.median(centre[rows[:, 2] == ATOM_LABELS.index(name)]) for name in ("Mo", "S2", "S1")}
    assert level["Mo"] > 0.5 > level["S2"] > level["S1"]


def test_overview_evidence_follows_what_is_missing() -> None:
    shot = shoot(specimen(3, CLUSTER, size_nm=30.0), scan_region(28.0, 280, 15.0), 2000.0, 3)
    windows = [
        scan_region(6.0, 192, 15.0).model_copy(update={"center_nm": (x, y)})
        for x in (5.0, 15.0, 25.0)
        for y in (5.0, 15.0, 25.0)
    ]
    readings = reader().read_overview(shot.image, shot.region, windows, shot.electrons_per_pixel)
    gone = ~shot.specimen.alive & (shot.specimen.site == "S")
    truth = []
    for window in windows:
        xy = in_frame(shot.specimen.positions_A[gone, :2] / 10, window)
        truth.append(((xy >= 0) & (xy < 6)).all(1).sum())
    values = [r.value for r in readings]
    assert None not in values
    assert int(np.argmax(values)) == int(np.argmax(truth))  # type: ignore[arg-type]
    assert all(r.found == () and not r.note for r in readings)


@pytest.mark.parametrize("target", [VacancyTarget(), LatentComponentTarget(lattice=VacancyTarget().lattice)])
def test_noise_makes_it_abstain(target: Any) -> None:
    noise = np.random.default_rng(0).poisson(4.0, (256, 256))
    reading = reader(target=target).read_scan(noise, scan_region(), None)
    assert reading.value is None
    assert reading.atoms is None
    assert "lattice" in reading.note


def test_atom_count_reports_the_confident_ones() -> None:
    shot = shoot(specimen(2, CLUSTER), scan_region(), FULL_DOSE, 2)
    reading = reader(target=AtomCountTarget(label="Pt")).read_scan(shot.image, shot.region, None)
    assert reading.atoms is not None
    assert reading.value == pytest.approx(0.9 * len(reading.atoms))
    assert len(reading.found) == len(reading.atoms)
    assert {a.label for a in reading.found_atoms()} == {"Pt"}
    mo, _ = columns_in_frame(shot, "Mo")
    inside = ((mo > 0.2) & (mo < 7.8)).all(1)
    xy = in_frame(reading.atoms[:, :2], shot.region)
    assert cKDTree(xy).query(mo[inside])[0].max() < 0.06
    assert not reader(target=AtomCountTarget(confidence=0.95)).read_scan(shot.image, shot.region, None).found


def test_values_from_latents() -> None:
    random = np.random.default_rng(4)
    common = random.normal(size=(900, 2)) * [0.2, 1.0]
    rare = random.normal(size=(60, 2)) * 0.1 + [0.0, -6.0]
    reference = np.concatenate([common, rare])
    patches = np.zeros((60, 16, 16), np.float32)
    component = reader(target=LatentComponentTarget())
    low, low_variance = component.value_from_latents(patches, common[:60], reference)
    high, _ = component.value_from_latents(patches, rare, reference)
    assert high is not None
    assert low is not None
    assert high > 2 > 0.5 > low  # the long tail is the positive side
    assert low_variance == pytest.approx(common[:60, 1].var(ddof=1) / reference[:, 1].var() / 60)
    fixed = reader(target=LatentComponentTarget(component=0)).value_from_latents(patches, rare, reference)[0]
    assert fixed == pytest.approx(0.0, abs=0.5)
    novelty = reader(target=NoveltyTarget())
    usual, _ = novelty.value_from_latents(patches, common[:60], reference)
    new, _ = novelty.value_from_latents(patches, random.normal(size=(60, 2)) + 30.0, reference)
    assert usual == pytest.approx(0.0, abs=0.3)
    assert new is not None
    assert new > 3
    assert reader().value_from_latents(patches, common, reference) == (None, None)


def test_protocol_versions_and_settings() -> None:
    assert AtomPerceiver().target_kind == "vacancy"
    assert AtomPerceiver(target=AtomCountTarget()).target_kind == "atom"
    one: Perceiver = reader()
    assert isinstance(one.version, str)
    assert one.version == reader().version
    assert one.version != reader(max_patches=10).version
    with pytest.raises(ValidationError, match="Te"):
        AtomPerceiver.model_validate({"target": {"kind": "vacancy", "lattice": {"reference": "Te"}}})
    data = one.fit_embedding(np.random.default_rng(0).random((40, 8, 8)).astype(np.float32), 3).save()
    assert one.load_embedding(data).save() == data


@pytest.mark.parametrize(("target", "told"), [(AtomCountTarget(), True), (NoveltyTarget(), False)])
def test_overviews_of_other_targets(target: Any, told: bool) -> None:
    image = np.random.default_rng(1).poisson(2.0, (128, 128)).astype(float)
    image[40:42, 60:62] += 40
    region = scan_region(12.0, 128)
    windows = [scan_region(3.0, 64).model_copy(update={"center_nm": (x, 4.0)}) for x in (2.0, 5.9, 10.0)]
    readings = reader(target=target).read_overview(image, region, windows, None)
    if told:
        assert int(np.argmax([r.value or 0 for r in readings])) == 1
    else:
        assert all(r.value is None and "overview" in r.note for r in readings)
    broken = image.copy()
    broken[3, 3] = np.nan
    assert all(r.value is None and r.note for r in reader().read_overview(broken, region, windows, None))
