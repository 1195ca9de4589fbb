import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.stats import binom

from aecontrol.errors import BadInput
from simulators.specimens import MARGIN_NM
from simulators.specimens.sheets import Graphene, Mos2, SulphurVacancies

PERFECT = SulphurVacancies(background_fraction=0.0, n_clusters=0)


@settings(max_examples=25, deadline=None)
@given(width=st.floats(2, 9), height=st.floats(2, 9), degrees=st.floats(-180, 180))
def test_lattice_fills_the_field_and_its_margin_at_any_size_and_rotation(width, height, degrees):
    specimen = Mos2(size_nm=(width, height), rotation_deg=degrees, vacancies=PERFECT).build(0)
    xy = specimen.positions_A[:, :2]
    margin = 10 * MARGIN_NM
    assert xy.min() >= -margin
    assert np.all(xy.max(axis=0) <= (10 * width + margin, 10 * height + margin))
    grid = np.stack(np.meshgrid(np.arange(-8, 10 * width + 8, 1.0), np.arange(-8, 10 * height + 8, 1.0)), -1)
    assert cKDTree(xy).query(grid.reshape(-1, 2))[0].max() < 3.16 / math.sqrt(3) + 0.01  # centre of a hexagon
    area = (width + 2 * MARGIN_NM) * (height + 2 * MARGIN_NM)
    expected = 3 * area * 100 / (3.16**2 * math.sqrt(3) / 2)
    assert len(specimen) == pytest.approx(expected, abs=4 * (width + height + 4) * 100 / 31.6)


def test_mos2_has_the_published_bonds_and_turns_from_x_towards_y():
    flat = Mos2(size_nm=(6, 6), rotation_deg=0.0, vacancies=PERFECT).build(0)
    sulphur = flat.positions_A[flat.site == "S"]
    metal = flat.positions_A[flat.site == "Mo"]
    inner = np.all((metal[:, :2] > 0) & (metal[:, :2] < 60), axis=1)
    assert cKDTree(sulphur).query(metal[inner], k=6)[0] == pytest.approx(2.404, abs=1e-3)
    assert np.ptp(sulphur[:, 2]) == pytest.approx(3.13)
    assert np.bincount(np.unique(flat.column_id[flat.site == "S"], return_counts=True)[1])[2] > 300
    turned = Mos2(size_nm=(6, 6), rotation_deg=20.0, vacancies=PERFECT).build(0)
    bond = lattice_direction(turned) - lattice_direction(flat)
    assert (bond - 20.0 + 30.0) % 60.0 - 30.0 == pytest.approx(0.0, abs=1e-6)


def lattice_direction(specimen):
    metal = specimen.positions_A[specimen.site == "Mo", :2]
    middle = metal[np.argmin(np.sum((metal - 30.0) ** 2, axis=1))]
    step = metal[np.argsort(np.sum((metal - middle) ** 2, axis=1))[1]] - middle
    return math.degrees(math.atan2(step[1], step[0]))


def test_vacancies_cluster_as_configured():
    vacancies = SulphurVacancies(background_fraction=0.01, n_clusters=3, cluster_sigma_nm=2.0, peak_fraction=0.3)
    specimen = Mos2(size_nm=(30, 30), vacancies=vacancies).build(4)
    sulphur = specimen.site == "S"
    assert specimen.alive[~sulphur].all()
    missing = int(np.count_nonzero(~specimen.alive))
    density = np.count_nonzero(sulphur) / 32.0**2
    in_clusters = 3 * 0.3 * 2 * math.pi * 2.0**2 * density
    assert 0.01 * np.count_nonzero(sulphur) < missing < 0.012 * np.count_nonzero(sulphur) + 1.1 * in_clusters
    gone = specimen.positions_A[sulphur & ~specimen.alive, :2]
    neighbours = cKDTree(gone).query_ball_point(gone, 10.0, return_length=True)
    scattered = cKDTree(np.random.default_rng(0).random((missing, 2)) * 320)
    assert neighbours.mean() > 2 * scattered.query_ball_point(scattered.data, 10.0, return_length=True).mean()


def test_chance_is_capped_and_every_s_can_be_missing():
    vacancies = SulphurVacancies(background_fraction=1.0, n_clusters=2, peak_fraction=1.0)
    specimen = Mos2(size_nm=(4, 4), vacancies=vacancies).build(0)
    assert not specimen.alive[specimen.site == "S"].any()
    assert set(specimen.targets("vacancy")[1]) == {"S0"}
    assert set(specimen.targets("atom")[1]) == {"Mo"}


def test_targets_are_the_incomplete_columns_inside_the_field():
    specimen = Mos2(size_nm=(20, 15)).build(2)
    where, labels = specimen.targets("vacancy")
    expected = {}
    for atom in np.flatnonzero(~specimen.alive):
        x, y = specimen.positions_A[atom, :2] / 10
        if 0 <= x < 20 and 0 <= y < 15:
            key = (round(x, 6), round(y, 6))
            expected[key] = "S0" if key in expected else "S1"
    assert {(round(x, 6), round(y, 6)): label for (x, y), label in zip(where, labels, strict=True)} == expected
    with pytest.raises(BadInput, match="'dislocation'"):
        specimen.targets("dislocation")


def test_seed_decides_the_defects_and_nothing_else():
    config = Mos2(size_nm=(10, 10))
    one, again, other = config.build(1), config.build(1), config.build(2)
    assert np.array_equal(one.alive, again.alive)
    assert np.array_equal(one.positions_A, other.positions_A)
    assert not np.array_equal(one.alive, other.alive)


def test_graphene_bonds_and_defects():
    config = Graphene(size_nm=(30, 30), divacancy_fraction=0.001)
    specimen = config.build(5)
    tree = cKDTree(specimen.positions_A)
    inner = np.all((specimen.positions_A[:, :2] > 0) & (specimen.positions_A[:, :2] < 300), axis=1)
    assert tree.query(specimen.positions_A[inner], k=4)[0][:, 1:] == pytest.approx(2.46 / math.sqrt(3), abs=1e-6)
    n = len(specimen)
    for kind, fraction in (("vacancy", 1e-3), ("nitrogen", 2e-3), ("silicon", 5e-4)):
        low, high = binom.interval(0.999, n, fraction)
        assert low - 3 <= np.count_nonzero(specimen.defect == kind) <= high  # a few give way to divacancies
    assert set(specimen.atomic_numbers[specimen.defect == "silicon"]) == {14}
    pairs = specimen.defect == "divacancy"
    assert not specimen.alive[pairs].any()
    for number in np.unique(specimen.defect_id[pairs & inner]):
        both = specimen.positions_A[specimen.defect_id == number]
        assert np.linalg.norm(both[0] - both[1]) == pytest.approx(2.46 / math.sqrt(3), abs=1e-6)
    where, labels = specimen.targets("vacancy")
    assert set(labels) == {"V1", "V2"}
    assert len(where) == np.count_nonzero(~specimen.alive & inner)


def test_a_field_of_50_nm_builds_quickly():
    Mos2().build(0)  # imports ASE
    began = time.process_time()
    Mos2(size_nm=(50, 50)).build(1)
    assert time.process_time() - began < 3.0
