import math
from dataclasses import fields, replace

import numpy as np
import pytest
from scipy.stats import binom, poisson

from aecontrol.errors import BadInput
from simulators.clocks import exit_surface
from simulators.damage import KNOCK_ON, Damage, DamagedSpecimen
from simulators.materials import Migration, Zone, preset
from simulators.optics import Optics
from simulators.specimens.base import assemble
from simulators.specimens.sheets import Graphene, Mos2, SulphurVacancies

OPTICS = Optics()
RADIOLYTIC = Damage(critical_fluence_e_per_A2={"S": 300.0}, radiolysis_removes=0.5)


def scattered(n, seed, span=40.0):
    return np.random.default_rng(seed).random((n, 2)) * span


def small_mos2():
    return Mos2(size_nm=(4, 4), vacancies=SulphurVacancies(background_fraction=0.0, n_clusters=0)).build(0)


BUSY = Damage(
    critical_fluence_e_per_A2={"S": 100.0, "Mo": 100.0},
    excitation_barn={"S": 3e5, "Mo": 2e5},
    radiolysis_removes={"S": 0.5},
    induction_exponent=1.5,
)
MOBILE = BUSY.model_copy(update={"migration": Migration(healing_per_s=0.5, hop_per_s=0.5, hop_barn=3e5)})


def units_of_mos2():
    """A sheet whose bond units are patches of some 7 atoms, with vacancies."""
    sheet = Mos2(size_nm=(4, 4), vacancies=SulphurVacancies(background_fraction=0.1, n_clusters=0)).build(0)
    patch = np.floor(sheet.positions_A[:, :2] / 4.0).astype(int)
    return replace(sheet, unit=patch[:, 0] * 100 + patch[:, 1])


def history(body, points, electrons, pieces):
    """Everything that happens when a scan is cut into pieces at some points, in terms of the whole scan."""
    times = 0.001 * np.arange(len(points))
    events = []
    for part in np.array_split(np.arange(len(points)), pieces):
        events += [
            replace(event, point=event.point + int(part[0]))
            for event in body.expose(points[part], electrons[part], times[part])
        ]
    return events


@pytest.mark.parametrize(("model", "seed"), [(BUSY, 0), (BUSY, 1), (MOBILE, 2)])
def test_cutting_a_scan_into_pieces_changes_nothing_at_all(model, seed):
    points = scattered(3000, seed)
    electrons = np.random.default_rng(seed).random(3000) * 100.0
    bodies = [DamagedSpecimen(units_of_mos2(), model, OPTICS, seed) for _ in range(3)]
    whole, *cut = (history(body, points, electrons, pieces) for body, pieces in zip(bodies, (1, 7, 100), strict=True))
    assert len(whole) > 200
    kinds = {"removed", "displaced"} | ({"healed", "hopped"} if model is MOBILE else set())
    assert {event.kind for event in whole} == kinds
    assert all(events == whole for events in cut)
    for body in bodies[1:]:
        assert np.array_equal(body.alive, bodies[0].alive)
        assert np.array_equal(body.positions_A, bodies[0].positions_A)


def test_working_an_exposure_off_in_halves_changes_nothing_at_all(monkeypatch):
    points, electrons = scattered(2000, 8), np.full(2000, 60.0)
    at_once = history(DamagedSpecimen(units_of_mos2(), MOBILE, OPTICS, 8), points, electrons, 1)
    monkeypatch.setattr("simulators.damage.MANY", 5000)
    assert history(DamagedSpecimen(units_of_mos2(), MOBILE, OPTICS, 8), points, electrons, 1) == at_once
    assert len(at_once) > 200


@pytest.mark.parametrize("model", [BUSY, MOBILE])
def test_the_order_in_which_atoms_are_listed_changes_nothing_at_all(model):
    specimen = units_of_mos2()
    order = np.random.default_rng(5).permutation(len(specimen))
    per_atom = {f.name: getattr(specimen, f.name) for f in fields(specimen)}
    shuffled = replace(
        specimen, **{name: value[order] for name, value in per_atom.items() if isinstance(value, np.ndarray)}
    )
    points, electrons = scattered(3000, 4), np.full(3000, 50.0)
    one, other = (history(DamagedSpecimen(s, model, OPTICS, 9), points, electrons, 2) for s in (specimen, shuffled))
    assert len(one) > 200
    assert [replace(event, atom=int(order[event.atom])) for event in other] == one


def test_a_further_process_or_fewer_atoms_change_no_draw_of_the_others():
    specimen, points = small_mos2(), scattered(4000, 2)
    with_molybdenum = RADIOLYTIC.model_copy(update={"excitation_barn": {"S": 1.0, "Mo": 1e5}})
    few = np.arange(len(specimen)) % 3 > 0
    cut = {f.name: getattr(specimen, f.name) for f in fields(specimen)}
    cut = replace(specimen, **{name: value[few] for name, value in cut.items() if isinstance(value, np.ndarray)})
    alone, beside, among_few = (
        DamagedSpecimen(s, model, OPTICS, 3).expose(points, 60.0)
        for s, model in ((specimen, RADIOLYTIC), (specimen, with_molybdenum), (cut, RADIOLYTIC))
    )
    assert [event for event in beside if specimen.site[event.atom] == "S"] == alone != beside
    index = np.flatnonzero(few)
    assert [replace(event, atom=int(index[event.atom])) for event in among_few] == [
        event for event in alone if few[event.atom]
    ]


def test_events_come_in_the_order_of_the_beam_and_stop_where_it_does():
    specimen = small_mos2()
    points = scattered(6000, 1)
    whole = DamagedSpecimen(specimen, RADIOLYTIC, OPTICS, 7)
    events = whole.expose(points, 60.0)
    assert [event.point for event in events] == sorted(event.point for event in events)
    cut = 2500
    expected = [event for event in events if event.point < cut]
    assert len(expected) > 10
    reversed_future = np.concatenate([points[:cut], points[cut:][::-1]])
    for other in (points[:cut], reversed_future):
        again = DamagedSpecimen(specimen, RADIOLYTIC, OPTICS, 7).expose(other, 60.0)
        assert [event for event in again if event.point < cut] == expected


@pytest.mark.parametrize(
    ("model", "exponent"),
    [
        (Damage(displacement_threshold_eV={}, excitation_barn={"S": 1e5}), 1.0),
        (Damage(critical_fluence_e_per_A2={"S": 1e3}, radiolysis_removes=1.0, induction_exponent=2.0), 2.0),
    ],
)
def test_removed_fraction_follows_the_law_for_a_hundred_thousand_atoms(model, exponent):
    n = 100_000
    pile = np.column_stack([np.full((n, 2), 20.0), np.linspace(0.0, 6.0, n)])  # all under one known fluence
    body = DamagedSpecimen(assemble(pile, np.full(n, 16), (4.0, 4.0)), model, OPTICS, 3)
    body.expose(np.array([[20.0, 20.0]]), 25.0 if exponent == 1.0 else 150.0)
    chance = 1 - math.exp(-((body.fluence.at(np.array([[20.0, 20.0]]))[0] / 1e3) ** exponent))
    low, high = binom.interval(0.99, n, chance)
    assert 0.005 < chance < 0.1
    assert low <= np.count_nonzero(~body.alive) <= high


def test_nothing_happens_beyond_the_reach_of_the_probe_or_below_threshold():
    specimen = small_mos2()
    body = DamagedSpecimen(specimen, RADIOLYTIC, OPTICS, 0)
    body.expose(np.array([[20.0, 20.0]]), 1e9)
    hit = np.any(body.positions_A != specimen.positions_A, axis=1) | ~body.alive
    offset = np.abs(specimen.positions_A[:, :2] - 20.0).max(axis=1)
    assert hit.any()
    assert offset[hit].max() <= body.fluence.reach_A
    assert hit[(offset < 8.0) & (specimen.site == "S")].all()
    sheet = Graphene(size_nm=(4, 4)).build(0)
    carbon = DamagedSpecimen(sheet, Damage(), OPTICS, 0)
    assert carbon.expose(scattered(500, 0), 1e6) == []  # 80 kV is safe for graphene


def test_knock_on_wins_over_later_radiolysis_of_the_same_atom():
    both = Damage(critical_fluence_e_per_A2={"S": 1e3}, excitation_barn={"S": 1e5}, radiolysis_removes=1.0)
    body = DamagedSpecimen(small_mos2(), both, OPTICS, 0)
    events = body.expose(scattered(4000, 2), 200.0)
    atoms = [event.atom for event in events]
    assert len(atoms) == len(set(atoms)) > 50
    assert {event.process for event in events} == {KNOCK_ON, 1}


def test_a_bond_unit_breaks_at_once_and_by_the_fluence_at_its_centroid():
    specimen = units_of_mos2()
    body = DamagedSpecimen(specimen, Damage(critical_fluence_e_per_A2={"S": 100.0, "Mo": 100.0}), OPTICS, 1)
    points = scattered(3000, 3)
    events = body.expose(points, 60.0)
    broken = {specimen.unit[event.atom]: event for event in events}
    assert len(broken) > 50
    for unit, event in broken.items():
        members = np.flatnonzero((specimen.unit == unit) & specimen.alive)
        mine = [e for e in events if specimen.unit[e.atom] == unit]
        assert sorted(e.atom for e in mine) == members.tolist()
        assert {(e.point, e.fluence_e_per_A2) for e in mine} == {(event.point, event.fluence_e_per_A2)}
    event = events[len(events) // 2]
    centroid = specimen.positions_A[specimen.unit == specimen.unit[event.atom], :2].mean(axis=0)[None]
    replay = DamagedSpecimen(specimen, Damage(), OPTICS, 1)
    replay.expose(points[: event.point], 60.0)
    assert replay.fluence.at(centroid)[0] < event.fluence_e_per_A2
    replay.expose(points[event.point : event.point + 1], 60.0)
    assert replay.fluence.at(centroid)[0] >= event.fluence_e_per_A2


def slab(height=lambda x: np.where(x < 20.0, 20.0, 32.0)):
    """A simple cubic crystal of S, 4 angstrom, with a terrace on its exit side."""
    x, y, z = np.meshgrid(*(np.arange(0.0, 41.0, 4.0),) * 3, indexing="ij")
    grid = np.column_stack([x.ravel(), y.ravel(), z.ravel()])
    grid = grid[grid[:, 2] <= height(grid[:, 0])]
    return assemble(grid, np.full(len(grid), 16), (4.0, 4.0))


def test_only_the_exit_surface_of_a_thick_specimen_sputters():
    specimen = slab()
    x, z = specimen.positions_A[:, 0], specimen.positions_A[:, 2]
    terrace = np.where(x < 20.0, 20.0, 32.0)
    away = np.abs(x - 18.0) > 9.0  # beside the step the neighbourhood sees both terraces
    surface = exit_surface(specimen)
    assert np.array_equal(surface[away], (z == terrace)[away])
    strong = {"displacement_threshold_eV": {}, "excitation_barn": {"S": 1e9}}
    body = DamagedSpecimen(specimen, Damage(**strong), OPTICS, 0)
    body.expose(scattered(2000, 0), 100.0)
    assert np.array_equal(~body.alive, surface)
    deep = DamagedSpecimen(specimen, Damage(bulk_threshold_eV={"S": 1.0}), Optics(voltage_kV=200), 0)
    deep.expose(scattered(2000, 0), 1e7)
    assert not deep.alive[~surface].any()


def test_temperature_changes_nothing_but_critical_fluence_and_velocity():
    points = scattered(3000, 1)
    fixed = {"velocity_variance_m2_s2": {}, "excitation_barn": {"S": 1e4}, "critical_fluence_e_per_A2": {"S": 2e3}}
    warm, cold = (
        DamagedSpecimen(small_mos2(), Damage(**fixed, temperature_K=t), Optics(voltage_kV=100), 2) for t in (300, 80)
    )
    events = warm.expose(points, 60.0)
    assert cold.expose(points, 60.0) == events
    assert {event.process for event in events} == {KNOCK_ON, 1}


def garnet():
    """A stand-in: blocks of 24 atoms of Li, La, Zr and O in a slab 2.6 nm thick, each block one bond unit."""
    x, y, z = (axis.ravel() for axis in np.meshgrid(*(np.arange(0.0, 40.0, 2.17),) * 2, np.arange(0, 26, 2.17)))
    numbers = np.array([3, 8, 3, 8, 57, 8, 40, 8])[np.arange(len(x)) % 8]
    block = np.floor(np.stack([x, y, z]) / 6.5).astype(int)
    return assemble(np.column_stack([x, y, z]), numbers, (4.0, 4.0), unit=block[0] + 100 * block[1] + 10**4 * block[2])


def test_llzo_suffers_more_with_each_frame_less_when_cold_and_not_without_dose():
    x = np.linspace(2.0, 38.0, 40)
    frame = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    harmed = {}
    for kelvin in (300.0, 100.0):
        body = DamagedSpecimen(garnet(), preset("llzo", kelvin), Optics(voltage_kV=200, semi_angle_mrad=21.4), 0)
        assert body.expose(frame, 0.0) == []
        counts = []
        for _ in range(3):
            body.expose(frame, 250.0)  # some 300 e/A^2
            changed = np.any(body.positions_A != body.specimen.positions_A, axis=1) | ~body.alive
            counts.append(np.count_nonzero(changed) / len(changed))
        assert 0.0 < counts[0] < counts[1] < counts[2]
        assert np.all(body.specimen.atomic_numbers[~body.alive & ~exit_surface(body.specimen)] == 3)
        harmed[kelvin] = counts
    assert all(warm > 2 * cold for warm, cold in zip(harmed[300.0], harmed[100.0], strict=True))


def moving(**rates):
    sheet = Mos2(size_nm=(8, 8), vacancies=SulphurVacancies(background_fraction=0.05, n_clusters=0)).build(1)
    model = Damage(displacement_threshold_eV={}, excitation_barn={}, migration=Migration(**rates))
    return DamagedSpecimen(sheet, model, OPTICS, 4)


def test_vacancies_hop_at_their_rate_to_neighbours_and_none_is_lost():
    body = moving(hop_per_s=1e6, hop_barrier_eV=0.3)
    missing = np.count_nonzero(~body.alive)
    events = body.idle(0.0, 0.2) + body.idle(0.2, 1.0)
    assert np.count_nonzero(~body.alive) == missing > 50
    mean = 1.0 * missing * 1e6 * math.exp(-0.3 / (8.617333e-5 * 300.0))
    low, high = poisson.interval(0.99, mean)
    assert mean > 500
    assert low <= len(events) / 2 <= high
    at = body.specimen.positions_A
    for left, filled in zip(events[::2], events[1::2], strict=True):
        assert left.time_s == filled.time_s
        assert 3.0 < np.linalg.norm(at[left.atom] - at[filled.atom]) < 3.8
    assert [event.time_s for event in events] == sorted(event.time_s for event in events)
    assert set(body.specimen.site[~body.alive]) == {"S"}


def test_the_beam_drives_hops_at_its_cross_section():
    body = moving(hop_barn=2e5)
    assert body.idle(0.0, 1e6) == []
    x = np.linspace(-18.0, 98.0, 60)
    frame = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    events = [event for _ in range(5) for event in body.expose(frame, 400.0, np.zeros(len(frame)))]
    fluence = body.fluence.at(body.specimen.positions_A[~body.alive, :2])
    low, high = poisson.interval(0.99, np.sum(2e5 * 1e-8 * fluence))
    assert low <= len(events) / 2 <= high
    assert len(events) > 200


def test_removed_atoms_come_back_at_the_rate_of_healing_and_to_their_places():
    model = Damage(displacement_threshold_eV={}, excitation_barn={"S": 1e9}, migration=Migration(healing_per_s=0.01))
    specimen = small_mos2()
    body = DamagedSpecimen(specimen, model, OPTICS, 4)
    with pytest.raises(BadInput, match="time"):
        body.expose(scattered(3000, 0), 60.0)
    gone = body.expose(scattered(3000, 0), 60.0, np.full(3000, 5.0))
    assert np.count_nonzero(~body.alive) == len(gone) > 500
    back = body.idle(5.0, 25.0)
    low, high = binom.interval(0.99, len(gone), 1 - math.exp(-0.2))
    assert low <= len(back) <= high
    assert {event.kind for event in back} == {"healed"}
    assert np.count_nonzero(~body.alive) == len(gone) - len(back)
    assert np.array_equal(body.positions_A, specimen.positions_A)
    again = body.expose(scattered(3000, 0), 6e3, np.full(3000, 25.0))
    once = {event.atom for event in gone}
    assert {event.atom for event in again} & once == {event.atom for event in back}


def test_a_zone_moves_thresholds_and_nothing_else():
    """Sites in a zone break at its factor times the fluence; all others, and everything drawn, stay bit for bit."""
    zone = Zone(center_nm=(1.0, 2.0), fov_nm=(2.0, 4.2), factor=0.125)
    zoned = RADIOLYTIC.model_copy(update={"zones": (zone, Zone(center_nm=(9.0, 9.0), fov_nm=(1.0, 1.0), factor=3.0))})
    points, electrons = scattered(4000, 3), np.full(4000, 30.0)
    plain, with_zones, cut = (DamagedSpecimen(small_mos2(), m, OPTICS, 5) for m in (RADIOLYTIC, zoned, zoned))
    keys = ("atom", "point", "fluence_e_per_A2")
    before = {e.atom: e for e in history(plain, points, electrons, 1)}
    after = history(with_zones, points, electrons, 1)
    assert history(cut, points, electrons, 50) == after
    inside = zone.covers(0.1 * small_mos2().positions_A[:, :2])
    broken = {e.atom: e for e in after}
    assert {a: [getattr(e, k) for k in keys] for a, e in broken.items() if not inside[a]} == {
        a: [getattr(e, k) for k in keys] for a, e in before.items() if not inside[a]
    }
    both = [a for a in before if a in broken and inside[a]]
    assert len(both) > 20
    assert all(broken[a].fluence_e_per_A2 == 0.125 * before[a].fluence_e_per_A2 for a in both)
    assert sum(map(bool, inside[list(broken)])) > sum(map(bool, inside[list(before)]))


def test_a_unit_breaks_at_once_across_the_edge_of_a_zone():
    sheet = units_of_mos2()
    everything = Damage(critical_fluence_e_per_A2={"S": 100.0, "Mo": 100.0}, excitation_barn={})
    zone = Zone(center_nm=(1.1, 2.0), fov_nm=(2.2, 8.0), factor=0.1)
    body = DamagedSpecimen(sheet, everything.model_copy(update={"zones": (zone,)}), OPTICS, 1)
    events = body.expose(scattered(1500, 4), 100.0)
    split = [
        u for u in np.unique(sheet.unit) if len(set(zone.covers(0.1 * sheet.positions_A[sheet.unit == u, :2]))) == 2
    ]
    points = {u: {e.point for e in events if sheet.unit[e.atom] == u} for u in split}
    assert sum(len(found) == 1 for found in points.values()) > 5
    assert all(len(found) <= 1 for found in points.values())
