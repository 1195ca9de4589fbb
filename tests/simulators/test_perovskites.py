import math
import time
from importlib.metadata import entry_points

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from scipy.stats import binom

from aecontrol.errors import BadInput
from simulators.specimens.perovskites import CaTiO3, CaTiO3OnLsat, SrTiO3
from simulators.specimens.tilts import ARMS, fit_tilts

THICK = {
    "srtio3": {"oxygen_vacancy_fraction": 0.1, "tilt_deg": (3, 0, 5)},
    "catio3": {},
    "catio3_lsat": {},
    "ferroelectric": {},
    "pillars": {"n_pillars": 2, "diameter_nm": (2, 2)},
    "llzo": {},
}


def inside(specimen, margin_A=0.0):
    """Atoms of the field whose neighbours are all there."""
    xy, z = specimen.positions_A[:, :2], specimen.positions_A[:, 2]
    flat = np.all((xy > margin_A) & (xy < 10 * np.array(specimen.size_nm) - margin_A), axis=1)
    return flat & (z > z.min() + 4.5) & (z < z.max() - 4.5)


def octahedra(specimen):
    """B atoms with a whole octahedron, and the vectors to their six nearest O [n, 6, 3], by neighbour search."""
    b, oxygen = np.flatnonzero((specimen.site == "B") & inside(specimen)), specimen.positions_A[specimen.site == "O"]
    return b, oxygen[cKDTree(oxygen).query(specimen.positions_A[b], k=6)[1]] - specimen.positions_A[b][:, None]


def aligned_deg(bonds, axes):
    """Best-fit rotation vector of one octahedron about its ``axes`` [3, 3] (rows), by scipy."""
    ideal = np.concatenate([axes, -axes])
    nearest = ideal[np.argmax(bonds @ ideal.T, axis=1)]
    return np.degrees(Rotation.align_vectors(bonds, nearest)[0].as_rotvec()) @ axes.T


def closest_A(specimen):
    at = specimen.positions_A[specimen.alive]
    return cKDTree(at).query(at, k=2)[0][:, 1].min()


def test_cubic_srtio3_has_its_bonds_columns_and_formula_units():
    specimen = SrTiO3(size_nm=(4, 3), thickness_nm=4, rotation_deg=25).build(0)
    assert specimen.thickness_nm == pytest.approx(0.3905 * 9.5)
    _, bonds = octahedra(specimen)
    assert np.linalg.norm(bonds, axis=2) == pytest.approx(3.905 / 2)
    assert np.ptp(specimen.arrays["tilt_deg"][specimen.site == "B"]) == pytest.approx(0.0, abs=1e-9)
    strontium = specimen.positions_A[(specimen.site == "A") & inside(specimen)]
    oxygen = specimen.positions_A[specimen.site == "O"]
    assert cKDTree(oxygen).query(strontium, k=12)[0] == pytest.approx(3.905 / math.sqrt(2))
    for column in np.unique(specimen.column_id):
        atoms = specimen.column_id == column
        assert np.ptp(specimen.positions_A[atoms, :2], axis=0) == pytest.approx(0.0, abs=1e-9)
        assert sorted(specimen.site[atoms]) in (["A"] * 10, ["B"] * 10 + ["O"] * 10, ["O"] * 10)
    whole = np.bincount(specimen.unit)[specimen.unit] == 5
    assert whole[inside(specimen)].all()
    order = np.lexsort((specimen.site[whole], specimen.unit[whole]))
    assert set(map(tuple, specimen.site[whole][order].reshape(-1, 5))) == {("A", "B", "O", "O", "O")}
    units = specimen.positions_A[whole][order].reshape(-1, 5, 3)
    assert np.linalg.norm(units - units[:, 1:2], axis=2).max() == pytest.approx(3.905 * math.sqrt(3) / 2)  # A from B


def test_the_lattice_turns_from_x_towards_y():
    specimen = SrTiO3(size_nm=(4, 4), thickness_nm=0.4, rotation_deg=30).build(0)
    titanium = specimen.positions_A[specimen.site == "B", :2]
    steps = titanium - titanium[np.argmin(np.linalg.norm(titanium - 20.0, axis=1))]
    wanted = 3.905 * np.array([math.cos(math.radians(30)), math.sin(math.radians(30))])
    assert np.linalg.norm(steps - wanted, axis=1).min() < 1e-9


@pytest.mark.parametrize(
    ("tilt_deg", "signs", "recovered", "mismatch_A", "bonds_A"),
    [
        ((0, 0, 5), "00-", (0, 0, 4.98), 0.015, (1.9525, 1.9599)),
        ((5, 5, 5), "---", (4.94, 4.94, 4.94), None, None),
        ((9, 9, 9), "--+", (8.37, 9.05, 8.74), 0.117, None),
    ],
)
def test_glazer_tilts_give_the_published_checks(tilt_deg, signs, recovered, mismatch_A, bonds_A):
    specimen = SrTiO3(size_nm=(3, 3), thickness_nm=2, rotation_deg=0, tilt_deg=tilt_deg, tilt_signs=signs).build(0)
    b, bonds = octahedra(specimen)
    measured = np.array([aligned_deg(octahedron, np.eye(3)) for octahedron in bonds])
    assert specimen.arrays["tilt_deg"][b] == pytest.approx(measured, abs=1e-6)
    for tilts in np.abs(measured):  # alpha and beta change places between the sublattices of '--+'
        assert min(np.abs(tilts - order).max() for order in (recovered, np.array(recovered)[[1, 0, 2]])) < 0.006
    if mismatch_A is not None:
        assert np.nanmax(specimen.arrays["mismatch_nm"]) == pytest.approx(0.1 * mismatch_A, abs=5e-5)
    if bonds_A is not None:
        lengths = np.linalg.norm(bonds, axis=2)
        nearest = np.abs(lengths[..., None] - bonds_A).min(axis=2)
        assert nearest.max() < 5e-5
        assert np.ptp(lengths) == pytest.approx(bonds_A[1] - bonds_A[0], abs=1e-4)


def test_glazer_signs_say_how_neighbours_turn():
    specimen = SrTiO3(size_nm=(3, 3), thickness_nm=2, tilt_deg=(4, 6, 8), tilt_signs="0-+").build(0)
    b, _ = octahedra(specimen)
    tilts, tree = specimen.arrays["tilt_deg"], cKDTree(specimen.positions_A[b])
    pairs = tree.query_pairs(4.0, output_type="ndarray")
    along = np.abs(specimen.positions_A[b[pairs[:, 1]]] - specimen.positions_A[b[pairs[:, 0]]]).argmax(axis=1)
    product = np.sign(tilts[b[pairs[:, 0]]] * tilts[b[pairs[:, 1]]])
    assert set(along) == {0, 1, 2}
    assert np.abs(tilts[b, 0]).max() < 0.5
    assert (product[:, 1] == -1).all()
    assert np.array_equal(product[:, 2], np.where(along == 2, 1, -1))


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.floats(-25, 25)] * 3), st.tuples(*[st.floats(-0.3, 0.3)] * 3))
def test_fit_returns_the_rotation_of_a_rigid_octahedron_whatever_b_does(tilt, off_centre):
    bonds = Rotation.from_rotvec(tilt, degrees=True).apply(1.95 * ARMS) - np.array(off_centre)
    assert fit_tilts(bonds[None])[0] == pytest.approx(tilt, abs=1e-6)


def test_catio3_has_the_published_bonds_tilts_and_density():
    for zone in ("110", "001"):
        specimen = CaTiO3(size_nm=(4, 4), thickness_nm=3, zone=zone).build(0)
        b, bonds = octahedra(specimen)
        lengths = np.sort(np.linalg.norm(bonds, axis=2), axis=1)
        assert lengths == pytest.approx(np.tile([1.950, 1.950, 1.955, 1.955, 1.959, 1.959], (len(b), 1)), abs=6e-4)
        assert closest_A(specimen) == pytest.approx(1.950, abs=6e-4)
        tilts = np.abs(specimen.arrays["tilt_deg"][b])
        kinds, counts = np.unique(tilts.round(2), axis=0, return_counts=True)
        assert kinds == pytest.approx(np.array([[7.31, 9.16, 8.88], [9.16, 7.31, 8.88]]), abs=0.006)
        assert counts.min() > 0.4 * len(b)
        around = cKDTree(specimen.positions_A).query_ball_point(specimen.positions_A[b], 9.0, return_length=True)
        middle = np.all(np.abs(specimen.positions_A[b] - specimen.positions_A.mean(axis=0)) < [9, 9, 5], axis=1)
        atoms_per_A3 = 20 / (5.3796 * 5.4423 * 7.6401)
        assert around[middle].mean() == pytest.approx(atoms_per_A3 * 4 / 3 * math.pi * 9.0**3, rel=0.03)


def test_catio3_sublattices_are_those_of_the_space_group():
    """The operations of Pbnm, written out, give the same distances from Ti and Ca."""
    edges = np.array([5.3796, 5.4423, 7.6401])
    x, y, z = np.array([[-0.00676, 0.03602, 0.25], [0.0714, 0.4838, 0.25], [0.7108, 0.2888, 0.0371]]).T
    orbit = [(x, y, z), (-x, -y, z + 0.5), (x + 0.5, -y + 0.5, -z), (-x + 0.5, y + 0.5, -z + 0.5)]
    points = np.array(orbit + [tuple(-value for value in point) for point in orbit])  # [8, 3, site]
    cells = np.mgrid[-1:2, -1:2, -1:2].reshape(3, -1).T
    calcium, *oxygen = [
        ((np.unique((points[:, :, site] % 1).round(6) % 1, axis=0)[:, None] + cells) * edges).reshape(-1, 3)
        for site in range(3)
    ]
    wanted = np.sort(np.linalg.norm(np.concatenate(oxygen) - calcium[13], axis=1))[:8]
    specimen = CaTiO3(size_nm=(4, 4), thickness_nm=3).build(0)
    found = cKDTree(specimen.positions_A[specimen.site == "O"])
    mine = specimen.positions_A[(specimen.site == "A") & inside(specimen)]
    assert found.query(mine, k=8)[0] == pytest.approx(np.tile(wanted, (len(mine), 1)), abs=1e-3)


def test_the_110_projection_has_the_asked_axes():
    specimen = CaTiO3(size_nm=(4, 4), thickness_nm=3, rotation_deg=0).build(0)
    titanium = np.unique(specimen.positions_A[specimen.site == "B", :2].round(2), axis=0)
    x, y = np.unique(titanium[:, 0]), np.unique(titanium[:, 1])
    assert np.diff(x) == pytest.approx(5.4423 / 2, abs=0.011)
    assert np.diff(y) == pytest.approx(7.6401 / 2, abs=0.011)
    heights = np.unique(specimen.positions_A[specimen.site == "B", 2].round(2))
    assert np.diff(heights) == pytest.approx(5.3796 / 2, abs=0.011)
    kinds = {"".join(sorted(set(specimen.site[specimen.column_id == c]))) for c in np.unique(specimen.column_id)}
    assert kinds == {"AO", "B", "O"}
    labels = specimen.targets("atom")[1]
    assert set(labels) == {"Ca", "Ti", "O"}
    assert labels.count("Ti") == pytest.approx(labels.count("Ca"), rel=0.1)
    assert labels.count("O") == pytest.approx(labels.count("Ti"), rel=0.15)


def test_labels_are_rotations_in_the_frame_of_the_projection():
    """Read in the specimen's own axes x || [1-10], y || [001], z || -[110], the finished octahedra turn as labelled."""
    axes = np.array([[1, -1, 0], [0, 0, math.sqrt(2)], [-1, -1, 0]]) / math.sqrt(2)  # rows: x, y, z in pc
    specimen = CaTiO3(size_nm=(3, 3), thickness_nm=3, rotation_deg=0).build(0)
    b, bonds = octahedra(specimen)
    measured = [aligned_deg(octahedron, axes.T) for octahedron in bonds[:20]]
    assert specimen.arrays["tilt_deg"][b[:20]] == pytest.approx(np.array(measured), abs=0.05)


@pytest.fixture(scope="module")
def interface():
    return CaTiO3OnLsat(size_nm=(6, 16), thickness_nm=3, rotation_deg=0, decay_nm=1.5).build(3)


def test_the_interface_tilts_rise_from_zero_on_both_sides(interface):
    both = CaTiO3OnLsat(
        size_nm=(4, 16), thickness_nm=3, decay_nm=1.5, tilt_deg=(0, 0, 8), tilt_signs="00+",
        substrate_tilt_deg=(0, 0, 4), substrate_tilt_signs="00-",
    ).build(0)  # fmt: skip
    for specimen, deep in ((both, {1: 8.0, 0: 4.0}), (interface, {1: None, 0: 0.0})):
        titanium = (specimen.site == "B") & inside(specimen)
        distance = specimen.labels(specimen.positions_A[titanium, :2] / 10)["distance_to_interface_nm"]
        tilts = np.abs(specimen.arrays["tilt_deg"][titanium])
        phase = specimen.arrays["phase"][titanium]
        assert np.array_equal(phase, specimen.labels(specimen.positions_A[titanium, :2] / 10)["phase"])
        for side, limit in deep.items():
            gamma, at = tilts[phase == side, 2], distance[phase == side]
            expected = (gamma[at > 6].mean() if limit is None else limit) * (1 - np.exp(-at / 1.5))
            assert gamma == pytest.approx(expected, rel=0.04, abs=0.05)  # an O heeds its neighbour too
    labels = np.abs(interface.arrays["tilt_deg"][(interface.arrays["phase"] == 1) & (interface.site == "B")])
    assert labels.max(axis=0) == pytest.approx([8.2, 8.2, 8.7], abs=0.5)


def test_interface_labels_are_read_off_the_finished_structure(interface):
    axes = np.array([[1, -1, 0], [0, 0, math.sqrt(2)], [-1, -1, 0]]) / math.sqrt(2)
    b, bonds = octahedra(interface)
    chosen = np.random.default_rng(0).choice(len(b), 60, replace=False)
    measured = [aligned_deg(bonds[i], axes.T) for i in chosen]
    assert interface.arrays["tilt_deg"][b[chosen]] == pytest.approx(np.array(measured), abs=0.15)  # scipy: unit bonds


def test_the_interface_has_its_composition_lattice_and_no_atoms_too_close(interface):
    assert closest_A(interface) > 1.85
    film = interface.arrays["phase"] == 1
    assert set(interface.atomic_numbers[film & (interface.site == "A")]) == {20}
    assert set(interface.atomic_numbers[film & (interface.site == "B")]) == {22}
    for site, number, share in (("A", 57, 0.18), ("B", 73, 0.41)):
        here = interface.atomic_numbers[~film & (interface.site == site)]
        low, high = binom.interval(0.999, len(here), share)
        assert low <= np.count_nonzero(here == number) <= high
    assert set(interface.atomic_numbers[~film]) == {57, 38, 13, 73, 8}
    rows = np.unique(interface.positions_A[interface.site == "B", 1].round(3))
    steps = np.diff(rows).round(3)
    assert steps[rows[1:] < 80.0] == pytest.approx(3.868, abs=2e-3)
    assert steps[rows[:-1] > 84.0] == pytest.approx(3.79, abs=2e-3)
    assert np.count_nonzero(film) == pytest.approx(len(film) / 2, rel=0.05)


@pytest.mark.parametrize(("spacing_nm", "degrees"), [(0.37, 33.0), (0.40, -70.0)])
def test_the_interface_fills_the_field_at_any_rotation(spacing_nm, degrees):
    specimen = CaTiO3OnLsat(size_nm=(9, 30), thickness_nm=0.5, rotation_deg=degrees, film_spacing_nm=spacing_nm).build(
        0
    )
    grid = np.stack(np.meshgrid(np.arange(-8, 98, 1.5), np.arange(-8, 308, 1.5)), -1).reshape(-1, 2)
    assert cKDTree(specimen.positions_A[:, :2]).query(grid)[0].max() < 2.5
    far = specimen.positions_A[:, :2] / 10
    assert far.min() > -1.1
    assert np.all(far.max(axis=0) < (10.1, 31.1))
    normal = np.array([-math.sin(math.radians(degrees)), math.cos(math.radians(degrees))])
    spot = np.array([[4.5, 15.0]]) + np.array([[-2.0], [0.0], [1.5]]) * normal
    assert specimen.labels(spot)["distance_to_interface_nm"] == pytest.approx([2.0, 0.0, 1.5], abs=0.2)
    assert list(specimen.labels(spot)["phase"][[0, 2]]) == [0, 1]


def test_vacancies_are_listed_and_as_many_as_asked():
    config = SrTiO3(size_nm=(6, 6), thickness_nm=4, oxygen_vacancy_fraction=0.03, strontium_vacancy_fraction=0.1)
    specimen = config.build(1)
    for site, fraction in (("O", 0.03), ("A", 0.1), ("B", 0.0)):
        here = specimen.site == site
        low, high = binom.interval(0.999, np.count_nonzero(here), fraction)
        assert low <= np.count_nonzero(~specimen.alive & here) <= high
    assert np.array_equal(~specimen.alive, specimen.defect == "vacancy")
    perfect = SrTiO3(size_nm=(6, 6), thickness_nm=4).build(1)
    assert np.array_equal(specimen.positions_A, perfect.positions_A)
    assert len(perfect.targets("vacancy")[0]) == 0 < len(specimen.targets("vacancy")[0])


def test_impossible_settings_are_refused():
    for wrong in (
        {"oxygen_vacancy_fraction": 1.1},
        {"tilt_signs": "+-"},
        {"tilt_deg": (0, 0, 40)},
        {"thickness_nm": 0},
    ):
        with pytest.raises(ValidationError):
            SrTiO3(**wrong)
    with pytest.raises(ValidationError):
        CaTiO3(zone="111")
    with pytest.raises(ValidationError):
        CaTiO3OnLsat(decay_nm=float("nan"))
    with pytest.raises(BadInput, match="more than"):
        SrTiO3(size_nm=(200, 200), thickness_nm=100).build(0)


@pytest.mark.parametrize("kind", THICK)
def test_every_thick_crystal_is_found_by_name_and_decided_by_its_seed(kind):
    (entry,) = [point for point in entry_points(group="aecontrol.specimens") if point.name == kind]
    config = entry.load()(kind=kind, size_nm=(6, 5), thickness_nm=2.6, **THICK[kind])
    one, again, other = config.build(1), config.build(1), config.build(2)
    for name in ("positions_A", "atomic_numbers", "alive", "column_id", "unit"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert one.thickness_nm == pytest.approx(2.6, abs=0.45)
    random = kind not in ("catio3", "ferroelectric")
    same = len(one) == len(other) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("positions_A", "atomic_numbers", "alive")
    )
    assert same != random


def test_two_hundred_thousand_atoms_take_seconds():
    began = time.process_time()
    specimen = CaTiO3OnLsat(size_nm=(16, 16), thickness_nm=7).build(1)
    assert len(specimen) > 180_000
    assert time.process_time() - began < 3.0
