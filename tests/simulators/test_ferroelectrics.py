import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.optimize import curve_fit
from scipy.spatial import cKDTree

from simulators.specimens.ferroelectrics import Ferroelectric

KINDS = [
    ("PbTiO3", "stripes_180"),
    ("PbTiO3", "vortex"),
    ("BiFeO3", "stripes_180"),
    ("BiFeO3", "stripes_109"),
    ("BiFeO3", "stripes_71"),
    ("BiFeO3", "vortex"),
]


def built(crystal, pattern, **settings):
    settings = {"size_nm": (16, 16), "thickness_nm": 3} | settings
    return Ferroelectric(crystal=crystal, pattern=pattern, **settings).build(0)


def shifts(specimen):
    """B atoms with eight A round them, and their shifts from the centre of those, by neighbour search [n, 3]."""
    a, b = specimen.positions_A[specimen.site == "A"], np.flatnonzero(specimen.site == "B")
    distance, near = cKDTree(a).query(specimen.positions_A[b], k=8)
    whole = distance[:, -1] < 1.15 * distance[:, 0] + 0.4
    centre = a[near].mean(axis=1)
    whole &= np.linalg.norm(specimen.positions_A[b] - centre, axis=1) < 0.6
    return b[whole], specimen.positions_A[b[whole]] - centre[whole]


@pytest.mark.parametrize(("crystal", "pattern"), KINDS)
def test_the_label_is_the_shift_that_the_atoms_show(crystal, pattern):
    specimen = built(crystal, pattern, rotation_deg=20)
    b, shift = shifts(specimen)
    assert len(b) > 5000
    assert specimen.arrays["polarisation_nm"][b] == pytest.approx(0.1 * shift[:, :2], abs=1e-7)
    assert np.isnan(specimen.arrays["polarisation_nm"][specimen.site != "B"]).all()
    far = specimen.labels(specimen.positions_A[b, :2] / 10)["distance_to_wall_nm"] > 3.0
    if pattern != "stripes_71":  # where the wall is not seen edge on
        expected = 0.1565 if crystal == "PbTiO3" else 0.25
        assert np.linalg.norm(shift[far], axis=1) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(("crystal", "pattern"), KINDS)
def test_field_labels_agree_with_the_atoms(crystal, pattern):
    specimen = built(crystal, pattern, rotation_deg=-35)
    b = np.flatnonzero(specimen.site == "B")
    z = specimen.positions_A[b, 2]
    b = b[np.abs(z - (z.min() + z.max()) / 2) < 4.5]  # labels of places are those at half height
    labels = specimen.labels(specimen.positions_A[b, :2] / 10)
    assert labels["polarisation_nm"] == pytest.approx(specimen.arrays["polarisation_nm"][b], abs=0.006)
    away = labels["distance_to_wall_nm"] > 0.6
    core = pattern == "vortex"
    agree = labels["domain"][away] == specimen.arrays["domain"][b][away]
    assert agree.mean() > (0.95 if core else 0.999)


@pytest.mark.parametrize(
    ("crystal", "pattern", "angle", "plane"),
    [
        ("PbTiO3", "stripes_180", 180, (1, 0, 0)),
        ("BiFeO3", "stripes_180", 180, (1, -1, 0)),
        ("BiFeO3", "stripes_109", 109.47, (1, 0, 0)),
        ("BiFeO3", "stripes_71", 70.53, (1, 0, 1)),
    ],
)
def test_walls_turn_the_shift_by_their_angle_and_carry_no_charge(crystal, pattern, angle, plane):
    specimen = built(crystal, pattern, rotation_deg=0, domain_width_nm=8, wall_width_cells=1)
    b, shift = shifts(specimen)
    domain, place = specimen.arrays["domain"][b], specimen.positions_A[b] - [80.0, 80.0, 0.0]
    full = np.linalg.norm(shift, axis=1) > 0.999 * np.linalg.norm(shift, axis=1).max()
    one, two = (shift[full & (domain == d)].mean(axis=0) for d in (0, 1))
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert math.degrees(math.acos(max(-1.0, cosine))) == pytest.approx(angle, abs=0.5)
    # the wall plane, fitted to the places where the flipping part is small
    flipped = (one - two) / np.linalg.norm(one - two)
    at_wall = place[np.abs(shift @ flipped) < 0.5 * np.abs(shift @ flipped).max()]
    one_wall = at_wall[np.linalg.norm(at_wall[:, :2], axis=1) < 30.0]
    normal = np.linalg.svd(one_wall - one_wall.mean(axis=0))[2][2]
    assert abs(normal @ flipped) < 0.02
    assert abs(normal @ plane) / np.linalg.norm(plane) > 0.999


@pytest.mark.parametrize("width_cells", [2.0, 4.0])
def test_walls_have_the_asked_profile(width_cells):
    specimen = built(
        "PbTiO3", "stripes_180", size_nm=(14, 6), domain_width_nm=12, wall_width_cells=width_cells, rotation_deg=0
    )
    b, shift = shifts(specimen)
    near = np.abs(specimen.positions_A[b, 0] - 70.0) < 50.0
    profile, _ = curve_fit(
        lambda x, height, width, x0: height * np.tanh((x - x0) / width),
        specimen.positions_A[b[near], 0],
        shift[near, 1],
        p0=(0.1, 10.0, 70.0),
    )
    assert np.abs(profile) == pytest.approx([0.0377 * 4.152, width_cells * 3.904, 70.0], rel=1e-3)


def test_walls_are_as_far_apart_as_asked():
    specimen = built("BiFeO3", "stripes_109", size_nm=(40, 4), domain_width_nm=9, rotation_deg=0)
    x = np.arange(0.005, 40, 0.01)
    labels = specimen.labels(np.column_stack([x, np.full_like(x, 2.0)]))
    crossings = x[1:][np.diff(labels["domain"]) != 0]
    assert crossings == pytest.approx([2, 11, 20, 29, 38], abs=0.02)
    assert labels["distance_to_wall_nm"] == pytest.approx(
        np.abs(x[:, None] - [2, 11, 20, 29, 38]).min(axis=1), abs=0.02
    )
    assert np.sign(labels["polarisation_nm"][:, 1]) == pytest.approx(np.where(labels["domain"], -1, 1))


@pytest.mark.parametrize("crystal", ["PbTiO3", "BiFeO3"])
def test_the_shift_turns_once_round_the_vortex(crystal):
    specimen = built(crystal, "vortex", rotation_deg=40, size_nm=(16, 10))

    def turns(center, radius):
        angle = np.linspace(0, 2 * math.pi, 400)
        ring = np.asarray(center) + radius * np.column_stack([np.cos(angle), np.sin(angle)])
        p = specimen.labels(ring)["polarisation_nm"]
        steps = np.diff(np.unwrap(np.arctan2(p[:, 1], p[:, 0])))
        return steps.sum() / (2 * math.pi)

    assert turns((8, 5), 4.0) == pytest.approx(1.0)
    assert turns((8, 5), 0.5) == pytest.approx(1.0)
    assert turns((12, 5), 2.0) == pytest.approx(0.0, abs=1e-9)
    b, shift = shifts(specimen)
    radial = specimen.positions_A[b, :2] - [80.0, 50.0]
    assert np.einsum("ij,ij->i", shift[:, :2], radial) == pytest.approx(0.0, abs=1e-3 * 250)
    assert np.linalg.norm(shift[np.linalg.norm(radial, axis=1) < 2.5, :2], axis=1).max() < 0.06
    domains = specimen.labels(np.array([[12, 5], [8, 9], [4, 5], [8, 1]]) + 0.01)["domain"]
    assert len(set(domains)) == 4


@pytest.mark.parametrize(("crystal", "pattern"), KINDS)
def test_no_atoms_are_too_close_and_formula_units_are_whole(crystal, pattern):
    specimen = built(crystal, pattern, size_nm=(12, 12))
    tree = cKDTree(specimen.positions_A)
    assert tree.query(specimen.positions_A, k=2)[0][:, 1].min() > 1.6
    sizes = np.bincount(specimen.unit)
    whole = sizes[specimen.unit] == 5
    counts = {site: np.count_nonzero(whole & (specimen.site == site)) for site in "ABO"}
    assert counts["A"] == counts["B"] == counts["O"] / 3 > 0.8 * len(specimen) / 5


def test_bulk_pbtio3_has_the_bonds_of_its_structure():
    """P4mm with z = 0.5377 (Ti), 0.1118 and 0.6174 (O), c = 4.152: Ti-O 1.77, 2.38 and four of 1.98 angstrom."""
    specimen = built("PbTiO3", "stripes_180", size_nm=(10, 4), domain_width_nm=12, wall_width_cells=0.5)
    b = np.flatnonzero(specimen.site == "B")
    far = specimen.labels(specimen.positions_A[b, :2] / 10)["distance_to_wall_nm"] > 2.0
    xyz = specimen.positions_A[b]
    far &= np.all((xyz > [5, 5, 5]) & (xyz < [95, 35, xyz[:, 2].max() - 4]), axis=1)
    bonds = cKDTree(specimen.positions_A[specimen.site == "O"]).query(xyz[far], k=6)[0]
    side = math.hypot(3.904 / 2, (0.6174 - 0.5377) * 4.152)
    long, short = (1.1118 - 0.5377) * 4.152, (0.5377 - 0.1118) * 4.152
    assert bonds == pytest.approx(np.tile([short, side, side, side, side, long], (len(bonds), 1)), abs=2e-3)


def test_impossible_settings_are_refused():
    for wrong, message in (
        ({"crystal": "PbTiO3", "pattern": "stripes_71"}, "no stripes_71"),
        ({"crystal": "PbTiO3", "pattern": "vortex", "b_shift_nm": 0.02}, "BiFeO3 only"),
        ({"domain_width_nm": 2.0}, "wider"),
        ({"b_shift_nm": 0.2}, "less than or equal"),
    ):
        with pytest.raises(ValidationError, match=message):
            Ferroelectric(**wrong)
