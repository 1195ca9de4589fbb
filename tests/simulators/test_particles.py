import itertools
import math

import numpy as np
import pytest
from ase.data import atomic_masses
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.spatial import ConvexHull, cKDTree
from scipy.stats import kstest

from aecontrol.errors import BadInput
from simulators.specimens.crystallites import crystallite, random_turn
from simulators.specimens.particles import Nanoparticle, SingleAtoms
from simulators.specimens.scatter import amorphous_carbon, scatter
from simulators.streams import stream

SMALL = Nanoparticle(size_nm=(14.0, 14.0), n_particles=3, diameter_nm=(2.0, 3.0), film_nm=1.0)


def changed(config, **update):
    return type(config).model_validate({**config.model_dump(), **update})


def test_carbon_has_its_density_its_distances_and_no_lattice():
    box = np.array([90.0, 70.0, 30.0])
    atoms = amorphous_carbon(box, stream(3, "specimen"))
    core = np.all((atoms > 10) & (atoms < box - 10), axis=1)
    mass_g = atomic_masses[6] / 6.02214076e23
    assert len(atoms) * mass_g / (box.prod() * 1e-24) == pytest.approx(2.0, rel=0.02)
    assert np.count_nonzero(core) * mass_g / ((box - 20).prod() * 1e-24) == pytest.approx(2.0, rel=0.03)
    assert cKDTree(atoms).query(atoms, k=2)[0][:, 1].min() >= 1.3
    image = np.histogram2d(atoms[:, 0], atoms[:, 1], bins=(180, 140))[0]
    power = np.abs(np.fft.fft2(image)) ** 2 / len(atoms)
    power[0, 0] = 0.0
    assert power.max() < 2 * math.log(power.size)  # noise: a lattice would give peaks of about the number of atoms


@settings(max_examples=20, deadline=None)
@given(d=st.sampled_from([2, 3]), apart=st.floats(0.3, 3.0), share=st.floats(0.0, 0.2), seed=st.integers(0, 99))
def test_scattered_points_keep_their_distance_in_the_box(d, apart, share, seed):
    box = np.array([9.0, 14.0, 11.0])[:d]
    n = int(share * box.prod() / (math.pi * apart**d / (4 if d == 2 else 6)))
    random = stream(seed, "specimen")
    points = scatter(n, box, apart, lambda count: box * (1.2 * random.random((count, d)) - 0.1))
    assert points.shape == (n, d)
    assert np.all((points >= 0) & (points <= box))
    assert n < 2 or cKDTree(points).query(points, k=2)[0][:, 1].min() >= apart


def test_more_points_than_fit_are_refused():
    random = stream(0, "specimen")
    with pytest.raises(BadInput, match="do not fit"):
        scatter(500, np.array([10.0, 10.0]), 1.0, lambda count: 10 * random.random((count, 2)))
    with pytest.raises(BadInput, match="of 60 points fit"):  # all drawn in one corner
        scatter(60, np.array([10.0, 10.0]), 1.0, lambda count: 2 * random.random((count, 2)))


@pytest.mark.parametrize("shape", ["truncated_octahedron", "octahedron", "sphere"])
@pytest.mark.parametrize(("material", "metal", "a"), [("Au", 79, 4.078), ("CeO2", 58, 5.411)])
def test_a_crystal_has_its_lattice_and_its_size(material, metal, a, shape):
    _, positions, numbers = crystallite(material, shape, 60.0, stream(1, "particle"))
    heavy = positions[numbers == metal]
    deep = heavy[np.linalg.norm(heavy, axis=1) < 15]
    assert cKDTree(heavy).query(deep, k=13)[0][:, 1:] == pytest.approx(a / math.sqrt(2))
    drawn = [crystallite(material, shape, 60.0, stream(seed, "particle"))[2] for seed in range(24)]
    volumes = [np.count_nonzero(found == metal) * a**3 / 4 for found in drawn]
    assert np.mean(volumes) == pytest.approx(math.pi / 6 * 60.0**3, rel=0.05)  # whole planes of atoms come and go
    if material == "CeO2":
        oxygen = positions[numbers == 8]
        assert cKDTree(oxygen).query(deep, k=8)[0] == pytest.approx(a * 3**0.5 / 4)
        assert len(oxygen) / len(heavy) == pytest.approx(2.0, rel=0.06)


@pytest.mark.parametrize(
    ("shape", "families"), [("octahedron", [(1, 1, 1)]), ("truncated_octahedron", [(1, 1, 1), (0, 0, 1)])]
)
def test_facets_are_low_index_planes(shape, families):
    _, positions, _ = crystallite("Au", shape, 80.0, stream(2, "particle"))
    hull = ConvexHull(positions)
    corners = positions[hull.simplices]
    areas = 0.5 * np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    normals = np.sort(np.abs(hull.equations[:, :3]), axis=1)
    share = [areas[np.linalg.norm(normals - np.divide(f, np.linalg.norm(f)), axis=1) < 1e-6].sum() for f in families]
    assert min(share) / areas.sum() > 0.1
    assert sum(share) / areas.sum() > 0.85  # the rest: steps along the edges


def test_random_turns_are_rotations_and_favour_no_direction():
    random = stream(0, "particle")
    turns = np.array([random_turn(random) for _ in range(500)])
    assert np.einsum("nij,nkj->nik", turns, turns) == pytest.approx(np.broadcast_to(np.eye(3), (500, 3, 3)), abs=1e-12)
    assert np.linalg.det(turns) == pytest.approx(1.0)
    for row, column in itertools.product(range(3), range(3)):
        assert kstest(turns[:, row, column], "uniform", (-1, 2)).pvalue > 1e-3


def nearest_low_index_angle(atoms):
    """Angle between the beam and the nearest <100>, <110> or <111> of a face-centred crystal, from its bonds alone."""
    middle = np.argmin(np.linalg.norm(atoms - atoms.mean(axis=0), axis=1))
    bonds = atoms[cKDTree(atoms).query(atoms[middle], k=13)[1][1:]] - atoms[middle]
    bonds /= np.linalg.norm(bonds, axis=1)[:, None]
    cosine = bonds @ bonds.T
    axes = list(bonds)
    axes += [bonds[i] + bonds[j] for i, j in itertools.combinations(range(12), 2) if abs(cosine[i, j]) < 0.01]
    axes += [
        bonds[i] + bonds[j] + bonds[k]
        for i, j, k in itertools.combinations(range(12), 3)
        if min(cosine[i, j], cosine[j, k], cosine[i, k]) > 0.49
    ]
    return min(math.degrees(math.acos(min(1.0, abs(axis[2]) / np.linalg.norm(axis)))) for axis in axes)


@pytest.mark.parametrize("crystal", ["Au", "CeO2"])
def test_columns_of_crystals_on_axis_are_the_targets(crystal):
    specimen = changed(SMALL, crystal=crystal, n_particles=4, zone_axis_fraction=1.0, mistilt_deg=(0.0, 0.0)).build(5)
    metal = {"Au": "Au", "CeO2": "Ce"}[crystal]
    heavy = specimen.site == metal
    where, labels = specimen.targets("atom")
    assert set(labels) == {metal}
    flat = specimen.positions_A[heavy, :2] / 10
    order = cKDTree(where).query(flat)
    assert order[0].max() < 1e-6  # every metal atom lies in a target column, at its place
    assert set(order[1]) == set(range(len(where)))
    assert cKDTree(where).query(where, k=2)[0][:, 1].min() > 0.05
    for number in range(4):
        mine = specimen.arrays["particle"] == number
        assert nearest_low_index_angle(specimen.positions_A[mine & heavy]) < 1e-3
        assert set(specimen.arrays["zone_axis"][mine]) == {1}
    assert len(np.unique(specimen.column_id[specimen.site == "C"])) == np.count_nonzero(specimen.site == "C")


def test_crystals_off_axis_have_no_columns_and_tilt_as_asked():
    specimen = changed(SMALL, zone_axis_fraction=1.0, mistilt_deg=(4.0, 4.0)).build(5)
    assert len(specimen.targets("atom")[0]) == 0
    assert not specimen.zone_axis
    for number in range(3):
        atoms = specimen.positions_A[specimen.arrays["particle"] == number]
        assert nearest_low_index_angle(atoms) == pytest.approx(4.0, abs=1e-6)
    assert len(np.unique(specimen.column_id)) == len(specimen)
    free = changed(SMALL, zone_axis_fraction=0.0, n_particles=6, diameter_nm=(2.0, 2.0)).build(2)
    for number in range(6):
        mine = free.arrays["particle"] == number
        assert (free.arrays["zone_axis"][mine][0] == 1) == (nearest_low_index_angle(free.positions_A[mine]) <= 1.0)


def test_particles_lie_whole_apart_and_above_the_film_and_the_mask_knows_them():
    specimen = SMALL.build(7)
    particle = specimen.arrays["particle"]
    film = specimen.positions_A[particle == -1]
    assert set(specimen.site[particle == -1]) == {"C"}
    tree = cKDTree(film)
    for number in range(3):
        atoms = specimen.positions_A[particle == number]
        assert np.all((atoms[:, :2] > 0) & (atoms[:, :2] < 140))
        assert set(specimen.labels(atoms[:, :2] / 10)["particle"]) == {number}
        others = specimen.positions_A[(particle != number) & (particle >= 0)]
        assert cKDTree(others[:, :2]).query(atoms[:, :2])[0].min() >= 3.0
        assert 2.0 <= tree.query(atoms)[0].min() < 5.0
        diameter = (len(atoms) * 4.078**3 / 4 * 6 / math.pi) ** (1 / 3)
        assert 19.0 < diameter < 31.0
    grid = np.stack(np.meshgrid(np.arange(0, 14, 0.05), np.arange(0, 14, 0.05)), -1)
    mask = specimen.labels(grid)["particle"]
    for number in range(3):
        outline = ConvexHull(specimen.positions_A[particle == number, :2] / 10)
        expected = outline.volume + 0.1 * outline.area  # in a plane: area and perimeter
        assert np.count_nonzero(mask == number) * 0.05**2 == pytest.approx(expected, rel=0.05)


def test_particles_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="does not fit"):
        changed(SMALL, diameter_nm=(18.0, 18.0)).build(0)
    with pytest.raises(BadInput, match="side by side"):
        changed(SMALL, n_particles=60, diameter_nm=(3.0, 3.0)).build(0)


def test_single_atoms_have_their_density_distance_and_are_the_targets():
    config = SingleAtoms(size_nm=(12.0, 10.0), density_per_nm2=0.5, min_distance_nm=0.4, film_nm=1.0)
    specimen = config.build(1)
    platinum = specimen.positions_A[specimen.site == "Pt"]
    assert len(platinum) == 14 * 12 * 0.5
    assert cKDTree(platinum[:, :2]).query(platinum[:, :2], k=2)[0][:, 1].min() >= 4.0
    assert cKDTree(specimen.positions_A[specimen.site == "C"]).query(platinum)[0].min() >= 2.0
    where, labels = specimen.targets("atom")
    inside = np.all((platinum[:, :2] >= 0) & (platinum[:, :2] < (120, 100)), axis=1)
    assert len(where) == np.count_nonzero(inside)
    assert cKDTree(where).query(platinum[inside, :2] / 10)[0].max() < 1e-9
    assert set(labels) == {"Pt"}
    close = [
        cKDTree(p).query_ball_point(p, 12.0, return_length=True).mean()
        for p in (
            changed(config, cluster_fraction=share, n_clusters=4, cluster_sigma_nm=0.8, density_per_nm2=0.25)
            .build(1)
            .positions_A[: len(platinum) // 2, :2]
            for share in (0.0, 0.7)
        )
    ]
    assert close[1] > 1.5 * close[0]
    with pytest.raises(BadInput, match="do not fit"):
        changed(config, density_per_nm2=8.0).build(0)


@pytest.mark.parametrize("config", [SMALL, SingleAtoms(size_nm=(6.0, 6.0), film_nm=1.0)], ids=lambda c: c.kind)
def test_the_seed_decides(config):
    one, again, other = config.build(1), config.build(1), config.build(2)
    assert np.array_equal(one.positions_A, again.positions_A)
    assert np.array_equal(one.column_id, again.column_id)
    assert one.positions_A.shape != other.positions_A.shape or not np.array_equal(one.positions_A, other.positions_A)
    fewer = {"n_particles": 2} if config is SMALL else {"density_per_nm2": 0.1}
    film = one.positions_A[one.site == "C", :2]
    assert np.array_equal(changed(config, **fewer).build(1).positions_A[-len(film) :, :2], film)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Nanoparticle, {"diameter_nm": (5.0, 3.0)}),
        (Nanoparticle, {"crystal": "Xx"}),
        (Nanoparticle, {"mistilt_deg": (-1.0, 0.0)}),
        (Nanoparticle, {"n_particles": 0}),
        (SingleAtoms, {"min_distance_nm": 0.0}),
        (SingleAtoms, {"film_nm": 0.0}),
    ],
)
def test_impossible_settings_are_refused(kind, wrong):
    with pytest.raises(ValidationError):
        kind.model_validate(wrong)
