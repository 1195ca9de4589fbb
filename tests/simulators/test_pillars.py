import math
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.ndimage import distance_transform_edt, label
from scipy.spatial import cKDTree
from scipy.stats import binom

from aecontrol.errors import BadInput
from simulators.specimens.pillars import Pillars


@pytest.fixture(scope="module")
def specimen():
    return Pillars(size_nm=(24, 20), thickness_nm=5, n_pillars=4, diameter_nm=(3, 7), rotation_deg=12).build(2)


def neighbours(specimen, of, count):
    """Distances [n, count] inside one phase from its atoms ``of`` that are far from the interface and the surfaces."""
    xyz, z = specimen.positions_A, specimen.positions_A[:, 2]
    far = specimen.labels(xyz[:, :2] / 10)["distance_to_interface_nm"] > 2.0
    far &= np.all((xyz[:, :2] > 0) & (xyz[:, :2] < [240, 200]), axis=1) & (z > 4.5) & (z < z.max() - 4.5)
    assert np.count_nonzero(of & far) > 200
    return cKDTree(xyz).query(xyz[of & far], k=count + 1)[0][:, 1:]


def test_both_phases_have_their_own_lattice_and_stand_cube_on_cube(specimen):
    pillar = specimen.arrays["phase"] == 1
    assert neighbours(specimen, pillar, 6) == pytest.approx(4.177 / 2)
    assert neighbours(specimen, specimen.site == "B", 6) == pytest.approx(3.88 / 2)
    assert neighbours(specimen, specimen.site == "A", 12) == pytest.approx(3.88 / math.sqrt(2))
    for here, edge in ((specimen.site == "Ni", 4.177), (specimen.site == "B", 3.88)):
        xy = specimen.positions_A[here, :2]
        phase = np.exp(2j * math.pi * xy @ (np.array([math.cos(math.radians(12)), math.sin(math.radians(12))]) / edge))
        assert abs((phase**2).mean()) > 0.999  # all on planes edge / 2 apart, in the asked direction


def test_no_atoms_touch_and_no_hole_is_left_at_the_boundaries(specimen):
    tree = cKDTree(specimen.positions_A)
    assert tree.query(specimen.positions_A, k=2)[0][:, 1].min() > 1.75
    metal = ~np.isin(specimen.site, ("O",))
    for kind in (metal, ~metal):
        assert cKDTree(specimen.positions_A[kind]).query(specimen.positions_A[kind], k=2)[0][:, 1].min() > 2.35
    grid = np.stack(np.meshgrid(np.arange(0, 240, 1.0), np.arange(0, 200, 1.0), [20.0, 25.0]), -1).reshape(-1, 3)
    assert tree.query(grid)[0].max() < 3.3
    assert cKDTree(specimen.positions_A[:, :2]).query(grid[:, :2])[0].max() < 2.5


def test_composition_is_that_of_the_two_oxides(specimen):
    pillar, numbers = specimen.arrays["phase"] == 1, specimen.atomic_numbers
    assert set(numbers[pillar]) == {28, 8}
    assert np.count_nonzero(numbers[pillar] == 28) == pytest.approx(np.count_nonzero(numbers[pillar] == 8), rel=0.06)
    assert set(numbers[~pillar]) == {57, 38, 25, 8}
    a_sites = numbers[specimen.site == "A"]
    low, high = binom.interval(0.999, len(a_sites), 0.7)
    assert low <= np.count_nonzero(a_sites == 57) <= high
    assert np.count_nonzero(numbers[~pillar] == 8) == pytest.approx(3 * np.count_nonzero(numbers == 25), rel=0.02)
    filled = np.count_nonzero(pillar) * 4.177**3 / 8 / 50.0  # area, A^2
    inside = specimen.labels(np.stack(np.meshgrid(np.arange(-1, 25, 0.1), np.arange(-1, 21, 0.1)), -1))["phase"]
    assert 0.8 < filled / inside.sum() < 1.0  # some NiO gives way at the interface


@pytest.mark.parametrize("width_nm", [0.5, 2.0])
def test_the_interface_is_as_wide_as_asked(width_nm):
    specimen = Pillars(
        size_nm=(30, 30), thickness_nm=0.4, n_pillars=1, diameter_nm=(14, 14), interface_width_nm=width_nm
    ).build(0)
    where = specimen.positions_A[specimen.site == "B", :2] / 10
    labels = specimen.labels(where)
    outside = np.where(labels["phase"] == 1, -1, 1) * labels["distance_to_interface_nm"]
    edges = np.array([-1.5, -0.75, -0.25, 0.25, 0.75, 1.5]) * width_nm
    cell_nm2 = 0.388**2
    for low, high in pairwise(edges):
        area = math.pi * ((7 + high) ** 2 - (7 + low) ** 2)
        share = np.count_nonzero((outside >= low) & (outside < high)) * cell_nm2 / area
        d = np.linspace(low, high, 200)
        expected = np.average(0.5 * (1 + np.tanh(2 * d / width_nm)), weights=7 + d)
        assert share == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(area / cell_nm2) + 0.05)


def test_pillars_keep_apart_and_have_the_asked_sizes():
    specimen = Pillars(size_nm=(40, 40), thickness_nm=0.4, n_pillars=6, diameter_nm=(4, 6), gap_nm=3.0).build(5)
    fine = np.arange(-5, 45, 0.1)
    inside = specimen.labels(np.stack(np.meshgrid(fine, fine), -1))["phase"]
    numbered, count = label(inside)
    assert count == 6
    diameters = 2 * np.sqrt(np.bincount(numbered.ravel())[1:] * 0.01 / math.pi)
    assert np.all((diameters > 3.95) & (diameters < 6.05))
    for one in range(1, 7):
        others = distance_transform_edt(~((numbered > 0) & (numbered != one))) * 0.1
        assert others[numbered == one].min() > 2.8


def test_without_pillars_it_is_lsmo_and_impossible_settings_are_refused():
    assert set(Pillars(size_nm=(4, 4), thickness_nm=1, n_pillars=0).build(0).atomic_numbers) == {57, 38, 25, 8}
    with pytest.raises(BadInput, match="do not fit"):
        Pillars(size_nm=(12, 12), n_pillars=9, diameter_nm=(6, 6)).build(0)
    with pytest.raises(ValidationError, match="smallest first"):
        Pillars(diameter_nm=(5, 3))
    with pytest.raises(ValidationError):
        Pillars(interface_width_nm=0)
