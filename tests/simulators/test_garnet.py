import math
import time

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.spatial import cKDTree

from aecontrol.errors import BadInput
from simulators.specimens.garnet import Llzo

A = 12.9682


@pytest.fixture(scope="module")
def specimen():
    return Llzo(size_nm=(6 * A / 10, 5 * A / 10), thickness_nm=4 * A / 10, rotation_deg=0).build(1)


def inside(specimen, margin_A):
    xyz = specimen.positions_A
    far = np.all((xyz[:, :2] > margin_A) & (xyz[:, :2] < 10 * np.array(specimen.size_nm) - margin_A), axis=1)
    return far & (xyz[:, 2] > 4) & (xyz[:, 2] < xyz[:, 2].max() - 4)


def near(specimen, symbol, other, count):
    here = specimen.positions_A[(specimen.site == symbol) & inside(specimen, 0.0)]
    return cKDTree(specimen.positions_A[specimen.site == other]).query(here, k=count)[0]


def test_the_framework_has_the_published_bonds(specimen):
    assert near(specimen, "Zr", "O", 6) == pytest.approx(2.106, abs=6e-4)
    shells = near(specimen, "La", "O", 9)
    assert shells[:, :4] == pytest.approx(2.523, abs=6e-4)
    assert shells[:, 4:8] == pytest.approx(2.583, abs=6e-4)
    assert shells[:, 8].min() > 3.0


def test_a_cell_holds_what_it_should_and_weighs_what_it_should():
    specimen = Llzo(size_nm=(8 * A / 10, 8 * A / 10), thickness_nm=3 * A / 10, rotation_deg=0).build(0)
    flat = np.all((specimen.positions_A[:, :2] >= -0.01) & (specimen.positions_A[:, :2] < 8 * A - 0.01), axis=1)
    cells = 8 * 8 * 3
    count = {symbol: np.count_nonzero(flat & (specimen.site == symbol)) / cells for symbol in ("O", "La", "Zr", "Li")}
    assert (count["O"], count["La"], count["Zr"]) == (96, 24, 16)
    assert count["Li"] == pytest.approx(56, abs=0.3)
    grams = 56 * 6.94 + 24 * 138.905 + 16 * 91.224 + 96 * 15.999
    assert grams * 1.66054 / A**3 == pytest.approx(5.115, abs=2e-3)
    mass = sum(count[symbol] * mass for symbol, mass in (("Li", 6.94), ("La", 138.905), ("Zr", 91.224), ("O", 15.999)))
    assert mass * 1.66054 / A**3 == pytest.approx(5.115, abs=3e-3)


def test_lithium_keeps_its_distances_and_is_random(specimen):
    lithium = specimen.positions_A[specimen.site == "Li"]
    assert cKDTree(lithium).query(lithium, k=2)[0][:, 1].min() > 2.0
    assert cKDTree(specimen.positions_A).query(specimen.positions_A, k=2)[0][:, 1].min() > 1.8
    four = near(specimen, "Li", "O", 4)
    tetrahedral = np.ptp(four, axis=1) < 1e-6
    assert 0.1 < tetrahedral.mean() < 0.5
    assert four[tetrahedral] == pytest.approx(1.90, abs=0.03)
    images = {
        tuple(
            np.unique(
                (lithium[np.all(np.abs(lithium - corner - A / 2) < A / 2, axis=1)] - corner).round(2), axis=0
            ).ravel()
        )
        for corner in A * np.mgrid[0:5, 0:4, 0:3].reshape(3, -1).T
    }
    assert len(images) == 60  # no two cells alike


def test_columns_are_seen_end_on_and_units_are_eighths_of_a_cell(specimen):
    for column in np.unique(specimen.column_id)[::40]:
        atoms = specimen.column_id == column
        assert np.ptp(specimen.positions_A[atoms, :2], axis=0) == pytest.approx(0.0, abs=2e-3)
    together = cKDTree(specimen.positions_A[:, :2]).query_pairs(0.01, output_type="ndarray")
    assert (specimen.column_id[together[:, 0]] == specimen.column_id[together[:, 1]]).all()
    order = np.argsort(specimen.unit, kind="stable")
    starts = np.searchsorted(specimen.unit[order], np.arange(specimen.unit.max() + 1))
    low = np.minimum.reduceat(specimen.positions_A[order], starts)
    high = np.maximum.reduceat(specimen.positions_A[order], starts)
    assert (high - low).max() < A / 2 + 1e-6
    sizes = np.bincount(specimen.unit)
    deep = np.all((low[:, :2] > 0) & (high[:, :2] < 10 * np.array(specimen.size_nm)), axis=1)
    assert sizes[deep].mean() == pytest.approx(24, abs=0.4)


def test_zirconium_rows_turn_with_the_crystal():
    specimen = Llzo(size_nm=(5, 5), thickness_nm=1.3, rotation_deg=30).build(0)
    zirconium = specimen.positions_A[specimen.site == "Zr", :2] - 25.0
    step = A / 2 * np.array([math.cos(math.radians(30)), math.sin(math.radians(30))])
    assert np.linalg.norm(zirconium, axis=1).min() < 1e-9
    assert np.linalg.norm(zirconium - step, axis=1).min() < 1e-9


def test_grain_is_one_and_too_much_is_refused(specimen):
    assert specimen.material == "llzo"
    assert not specimen.labels(np.ones((4, 3, 2)))["grain"].any()
    with pytest.raises(BadInput, match="more than"):
        Llzo(size_nm=(200, 200), thickness_nm=100).build(0)
    with pytest.raises(ValidationError):
        Llzo(thickness_nm=-1)


def test_four_hundred_thousand_atoms_take_seconds():
    began = time.process_time()
    assert len(Llzo(size_nm=(24, 24), thickness_nm=6.5).build(1)) > 350_000
    assert time.process_time() - began < 4.0
