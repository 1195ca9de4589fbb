import math
import time

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.spatial import cKDTree
from scipy.stats import binom

from aecontrol.errors import BadInput
from simulators.specimens.grains import Edge, TiltBoundary
from simulators.specimens.sheets import Antisites, Graphene, Hbn, Hole, Mos2, SulphurVacancies, Ws2

NO_VACANCIES = SulphurVacancies(background_fraction=0.0, n_clusters=0)
PERFECT = Graphene(
    monovacancy_fraction=0.0, divacancy_fraction=0.0, nitrogen_fraction=0.0, silicon_fraction=0.0, size_nm=(12.0, 12.0)
)


def changed(config, **update):
    return type(config).model_validate({**config.model_dump(), **update})


def inner(specimen, margin_A=0.0):
    where, size = specimen.positions_A[:, :2], 10 * np.asarray(specimen.size_nm)
    return np.all((where > margin_A) & (where < size - margin_A), axis=1)


def ring_sizes_around(specimen, center_A, reach_A=7.0):
    """Sizes of the rings near a place: a shortest cycle basis of the atoms there, bonds from distances alone."""
    atoms = specimen.positions_A[specimen.alive, :2]
    atoms = atoms[np.sum((atoms - center_A) ** 2, axis=1) < reach_A**2]
    graph = networkx.Graph([tuple(pair) for pair in cKDTree(atoms).query_pairs(1.8)])
    for atom in [atom for atom, degree in graph.degree if degree < 2]:
        graph.remove_node(atom)
    return sorted(len(ring) for ring in networkx.minimum_cycle_basis(graph))


def test_ws2_and_bn_have_the_published_lattices():
    ws2 = Ws2(size_nm=(6, 6), vacancies=NO_VACANCIES).build(0)
    metal, sulphur = ws2.positions_A[ws2.site == "W"], ws2.positions_A[ws2.site == "S"]
    core = metal[np.all((metal[:, :2] > 0) & (metal[:, :2] < 60), axis=1)]
    assert cKDTree(metal).query(core, k=7)[0][:, 1:] == pytest.approx(3.153)
    assert cKDTree(sulphur).query(core, k=6)[0] == pytest.approx(math.hypot(3.153 / math.sqrt(3), 1.57))
    bn = Hbn(size_nm=(6, 6), boron_vacancy_fraction=0.0, nitrogen_vacancy_fraction=0.0).build(0)
    boron, nitrogen = bn.positions_A[bn.site == "B"], bn.positions_A[bn.site == "N"]
    core = boron[np.all((boron[:, :2] > 0) & (boron[:, :2] < 60), axis=1)]
    assert cKDTree(nitrogen).query(core, k=3)[0] == pytest.approx(2.504 / math.sqrt(3))
    assert cKDTree(boron).query(core, k=7)[0][:, 1:] == pytest.approx(2.504)


def test_bn_loses_boron_and_nitrogen_at_their_own_rates():
    bn = Hbn(size_nm=(30, 30), boron_vacancy_fraction=0.05, nitrogen_vacancy_fraction=0.01).build(3)
    for symbol, fraction in (("B", 0.05), ("N", 0.01)):
        low, high = binom.interval(0.999, np.count_nonzero(bn.site == symbol), fraction)
        assert low <= np.count_nonzero(~bn.alive & (bn.site == symbol)) <= high
    assert set(bn.targets("vacancy")[1]) == {"V1"}


@pytest.mark.parametrize(("layer", "gone"), [("top", np.min), ("bottom", np.max)])
def test_the_chosen_layer_loses_its_s_first_and_no_column_changes_its_count(layer, gone):
    config = Mos2(size_nm=(12, 12), vacancies=SulphurVacancies(background_fraction=0.2))
    either = config.build(2)
    chosen = changed(config, vacancies={"background_fraction": 0.2, "layer": layer}).build(2)
    assert chosen.targets("vacancy")[1] == either.targets("vacancy")[1]
    heights = chosen.positions_A[:, 2]
    sulphur = chosen.site == "S"
    left = np.bincount(chosen.column_id, weights=chosen.alive & sulphur)
    single = sulphur & (left[chosen.column_id] == 1)
    assert np.all(heights[single & ~chosen.alive] == gone(heights[sulphur]))
    assert set(np.round(either.positions_A[~either.alive, 2], 3)) == {0.0, 3.13}


def test_a_line_of_vacancies_is_straight_along_a_zigzag_row_and_in_one_layer():
    lines = SulphurVacancies(background_fraction=0.0, n_clusters=0, n_lines=5, line_length_nm=2.0)
    specimen = Mos2(size_nm=(30, 30), rotation_deg=11.0, vacancies=lines).build(4)
    assert set(specimen.defect[~specimen.alive]) == {"line"}
    whole = 0
    for number in np.unique(specimen.defect_id[~specimen.alive]):
        atoms = specimen.positions_A[specimen.defect_id == number]
        assert np.ptp(atoms[:, 2]) == 0.0
        step = atoms[:, :2] - atoms[0, :2]
        far = step[np.argmax(np.hypot(*step.T))]
        assert abs(np.degrees(np.arctan2(far[1], far[0])) - 11.0 + 30.0) % 60.0 == pytest.approx(30.0)
        assert step @ (-far[1], far[0]) == pytest.approx(0.0, abs=1e-6)
        whole += len(atoms) == 7  # 2 nm hold seven S atoms 0.316 nm apart
        assert np.hypot(*far) == pytest.approx(3.16 * (len(atoms) - 1))
    assert whole >= 2  # the others cross, or run out of the sheet


def test_antisites_swap_a_metal_atom_and_two_s():
    config = Mos2(size_nm=(20, 20), antisites=Antisites(metal_on_s2_fraction=0.02, s2_on_metal_fraction=0.03))
    plain, specimen = changed(config, antisites={}).build(6), config.build(6)
    for name, symbol, count, heights in (("Mo_S2", "Mo", 1, {1.565}), ("S2_Mo", "S", 2, {0.0, 3.13})):
        atoms = specimen.defect == name
        assert set(specimen.site[atoms]) == {symbol}
        assert set(np.unique(specimen.column_id[atoms], return_counts=True)[1]) == {count}
        assert set(np.round(specimen.positions_A[atoms, 2], 4)) == heights
    change = np.count_nonzero(specimen.defect == "S2_Mo") // 2 - np.count_nonzero(specimen.defect == "Mo_S2")
    assert len(specimen) == len(plain) + change
    seen = dict(zip(map(tuple, np.round(specimen.targets("atom")[0], 6)), specimen.targets("atom")[1], strict=True))
    before = dict(zip(map(tuple, np.round(plain.targets("atom")[0], 6)), plain.targets("atom")[1], strict=True))
    assert {(before[at], label) for at, label in seen.items() if before[at] != label} == {("S2", "Mo"), ("Mo", "S2")}


@pytest.mark.parametrize(
    ("update", "name", "expected"),
    [
        ({"divacancy_fraction": 1.5e-4, "reconstruct": True}, "5-8-5", [5, 5, 8]),
        ({"stone_wales_fraction": 1.5e-4}, "stone-wales", [5, 5, 7, 7]),
    ],
)
def test_a_rebuilt_defect_has_its_rings_and_sound_bonds(update, name, expected):
    specimen = changed(PERFECT, **update, size_nm=(24.0, 24.0)).build(3)
    atoms = specimen.positions_A[specimen.alive, :2]
    pairs = cKDTree(atoms).query_pairs(1.8, output_type="ndarray")
    lengths = np.linalg.norm(atoms[pairs[:, 0]] - atoms[pairs[:, 1]], axis=1)
    assert 1.3 < lengths.min() < 1.40  # something is strained
    assert 1.44 < lengths.max() < 1.55
    assert len(pairs) == len(cKDTree(atoms).query_pairs(2.0))  # nothing between bonds and second neighbours
    named = specimen.defect == name
    centers = [specimen.positions_A[specimen.defect_id == k, :2].mean(axis=0) for k in set(specimen.defect_id[named])]
    alone = [c for c in centers if np.sort(np.linalg.norm(np.subtract(centers, c), axis=1))[1] > 18 and within(c, 240)]
    assert len(alone) >= 3
    for center in alone[:3]:
        assert [size for size in ring_sizes_around(specimen, center) if size != 6] == expected


def within(place, side, margin=0.0):
    return bool(np.all((place > margin) & (place < side - margin)))


def test_ring_of_every_atom_balances_and_marks_what_was_rebuilt():
    specimen = changed(PERFECT, divacancy_fraction=6e-4, stone_wales_fraction=6e-4, reconstruct=True).build(8)
    ring = specimen.arrays["ring"]
    members = {"5-8-5": {5: 6, 8: 8}, "stone-wales": {5: 10, 7: 6}}  # atoms at their strangest ring, by counting
    for name, counts in members.items():
        numbers = set(specimen.defect_id[specimen.defect == name])
        assert len(numbers) >= 2
        for number in numbers:
            own = ring[(specimen.defect == name) & (specimen.defect_id == number)]
            assert dict(zip(*np.unique(own, return_counts=True), strict=True)) == counts
    assert np.all(ring[~specimen.alive] == -1)
    assert set(ring[specimen.alive & (specimen.defect == "") & inner(specimen)]) == {6}
    assert set(specimen.targets("vacancy")[1]) == {"V2"}


def test_a_bare_vacancy_is_in_a_ring_of_twelve():
    specimen = changed(PERFECT, monovacancy_fraction=5e-4, size_nm=(20.0, 20.0)).build(1)
    gone = specimen.positions_A[~specimen.alive, :2]
    alone = [at for at in gone if np.sort(np.linalg.norm(gone - at, axis=1))[1] > 8 and within(at, 200)]
    assert len(alone) >= 3
    for center in alone:
        nearest = np.argsort(np.linalg.norm(specimen.positions_A[:, :2] - center, axis=1))[1:13]
        assert set(specimen.arrays["ring"][nearest]) == {12}  # three hexagons became one ring


@settings(max_examples=12, deadline=None)
@given(
    misorientation=st.floats(3, 57),
    direction=st.floats(0, 180),
    rotation=st.floats(0, 60),
    offset=st.floats(-1, 1),
)
def test_a_grain_boundary_keeps_three_sound_bonds_an_atom_and_turns_one_side(
    misorientation, direction, rotation, offset
):
    line = TiltBoundary(misorientation_deg=misorientation, direction_deg=direction, offset_nm=offset)
    specimen = changed(PERFECT, size_nm=(9.0, 7.0), rotation_deg=rotation, boundary=line).build(0)
    core = inner(specimen)
    near = cKDTree(specimen.positions_A).query(specimen.positions_A[core], k=5)[0][:, 1:]
    assert near[:, :3].min() > 1.2
    assert near[:, :3].max() < 1.7
    assert near[:, 3].min() > 1.9
    labels = specimen.labels(specimen.positions_A[core, :2] / 10)
    ring = specimen.arrays["ring"][core]
    assert set(ring) <= {4, 5, 6, 7, 8}
    assert np.all(labels["distance_to_boundary_nm"][ring != 6] < 1.5)
    away = labels["distance_to_boundary_nm"] > 1.5
    for grain, degrees in ((0, rotation), (1, rotation + misorientation)):
        atoms = specimen.positions_A[core][away & (labels["grain"] == grain), :2]
        if len(atoms) > 20:
            assert bond_phase(atoms) == pytest.approx(np.exp(6j * np.radians(degrees)), abs=1e-6)


def bond_phase(atoms):
    """Mean six-fold phase of the steps to second neighbours, which run along the lattice vectors."""
    steps = np.array([atoms[j] - atoms[i] for i, j in cKDTree(atoms).query_pairs(2.6)])
    steps = steps[np.hypot(*steps.T) > 2.3]
    return np.mean(np.exp(6j * np.arctan2(steps[:, 1], steps[:, 0])))


def test_labels_of_the_boundary_are_distances_from_the_line():
    line = TiltBoundary(direction_deg=0.0, offset_nm=1.0)
    specimen = changed(PERFECT, size_nm=(8.0, 6.0), boundary=line).build(0)
    labels = specimen.labels(np.array([[[1.0, 4.0], [7.0, 4.5]], [[2.0, 1.0], [5.0, 6.0]]]))
    assert labels["distance_to_boundary_nm"] == pytest.approx(np.array([[0.0, 0.5], [3.0, 2.0]]))
    assert labels["grain"][0, 1] == labels["grain"][1, 1] == 1
    assert labels["grain"][1, 0] == 0
    assert set(specimen.defect) == {"", "boundary"}


def test_holes_and_edges_are_empty_and_their_rims_are_named():
    config = changed(
        PERFECT, size_nm=(14.0, 10.0), nitrogen_fraction=0.02, hole=Hole(radius_nm=2.0, center_nm=(4.0, 5.0))
    )
    specimen = changed(config, edge=Edge(direction_deg=-90.0, offset_nm=3.0)).build(1)  # vacuum at x > 10 nm
    where = specimen.positions_A[:, :2] / 10
    from_hole, from_edge = np.linalg.norm(where - (4.0, 5.0), axis=1) - 2.0, 10.0 - where[:, 0]
    assert min(from_hole.min(), from_edge.min()) >= 0.0
    assert where[:, 0].max() > 9.8
    rim = specimen.defect == "edge"
    degree = cKDTree(where).query_ball_point(where, 0.16, return_length=True) - 1
    assert set(degree[rim]) == {2}  # nothing hangs by one bond
    assert np.minimum(from_hole, from_edge)[rim].max() < 0.3
    assert np.all(degree[inner(specimen) & ~rim] == 3)
    assert specimen.alive.all()
    assert np.count_nonzero(specimen.defect == "nitrogen") > 20
    with pytest.raises(BadInput, match="no atom"):
        changed(PERFECT, hole=Hole(radius_nm=30.0)).build(0)


def test_new_kinds_of_defect_leave_the_others_where_they_were():
    plain = Graphene(size_nm=(15, 15)).build(4)
    more = Graphene(size_nm=(15, 15), stone_wales_fraction=3e-4).build(4)
    turned = more.defect == "stone-wales"
    assert turned.any()
    assert np.array_equal(plain.defect[~turned], more.defect[~turned])
    background = Mos2(size_nm=(15, 15)).build(4)
    lined = Mos2(size_nm=(15, 15), vacancies=SulphurVacancies(n_lines=2)).build(4)
    assert np.all(lined.defect[~lined.alive & background.alive] == "line")
    assert not lined.alive[~background.alive].any()


@pytest.mark.parametrize(
    "config",
    [
        Ws2(size_nm=(8, 8), vacancies=SulphurVacancies(n_lines=2), antisites=Antisites(metal_on_s2_fraction=0.05)),
        Hbn(size_nm=(8, 8), boron_vacancy_fraction=0.05),
        changed(PERFECT, stone_wales_fraction=1e-3, divacancy_fraction=1e-3, reconstruct=True, boundary=TiltBoundary()),
    ],
    ids=lambda config: config.kind,
)
def test_the_seed_decides(config):
    one, again, other = config.build(1), config.build(1), config.build(2)
    for name in ("positions_A", "atomic_numbers", "alive", "column_id", "defect", "defect_id"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert len(one) != len(other) or not np.array_equal(one.defect, other.defect)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Mos2, {"vacancies": {"layer": "middle"}}),
        (Mos2, {"antisites": {"metal_on_s2_fraction": 1.5}}),
        (Ws2, {"vacancies": {"line_length_nm": 0.0}}),
        (Hbn, {"boron_vacancy_fraction": float("nan")}),
        (Graphene, {"boundary": {"misorientation_deg": 60.0}}),
        (Graphene, {"hole": {"radius_nm": -1.0}}),
        (Graphene, {"relaxed": True}),
    ],
)
def test_impossible_settings_are_refused(kind, wrong):
    with pytest.raises(ValidationError):
        kind.model_validate(wrong)


@pytest.mark.slow
def test_graphene_of_200_nm_builds_in_ten_seconds():
    config = Graphene(size_nm=(200, 200), stone_wales_fraction=5e-4, reconstruct=True)
    began = time.process_time()
    assert len(config.build(1)) > 1_500_000
    assert time.process_time() - began < 10.0
