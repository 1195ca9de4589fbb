"""Drift: a shift is measured or refused, followed, charged, and never guessed."""

from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.aftermath import known_truth
from aecontrol.config import parse
from aecontrol.drift import measure_shift
from aecontrol.errors import BadInput
from aecontrol.events import DriftMeasured, Resumed
from aecontrol.folding import fold
from aecontrol.machine import preflight
from aecontrol.report import write_report
from aecontrol.scoring import match
from aecontrol.session import Session, read_events
from aecontrol.state import State
from aecontrol.types import Budget, DriftPlan, ScanRegion
from aecontrol.verify import compare_ledgers, verify_session
from drivers.faults import FaultyColumn
from simulators.setup import ColumnSetup

from .parts import CAPABILITIES, REFERENCE, DriftingColumn, configuration
from .test_session import TAME, resume, run

AMPLE = Budget(electrons=10**7, peak_fluence_e_per_A2=50_000.0)
OPTICS = {"voltage_kV": 80.0, "semi_angle_mrad": 30.0, "source_fwhm_nm": 0.08}
ANNULUS = {"HAADF": {"inner_mrad": 86.0, "outer_mrad": 200.0}}
CONFIGS = Path(__file__).parents[2] / "configs"


# ---------------------------------------------------------------- measuring


def scene(kind: str):
    """Noiseless images of a simulated specimen: (centre, width in nm, pixels) -> [n, n], 99 % of it below 1."""
    size = {"size_nm": [12.0, 12.0]}
    sheet = {"kind": "mos2", "rotation_deg": 7.0, **size}
    specimen = {
        "defects": {**sheet, "vacancies": {"background_fraction": 0.1, "n_clusters": 0}},
        "lattice": {**sheet, "vacancies": {"background_fraction": 0.0, "n_clusters": 0}},
        "atoms": {"kind": "single_atoms", **size},
    }[kind]
    column = ColumnSetup(specimen=specimen, optics=OPTICS, detectors=ANNULUS).column(1)

    def draw(center, fov_nm, n):
        region = ScanRegion(center_nm=center, fov_nm=(fov_nm, fov_nm), shape=(n, n), dwell_time_s=1e-6)
        image = np.asarray(column.noiseless(region)["HAADF"], float)
        return np.clip(image, 0.0, None) / np.percentile(image, 99)

    return draw


def campaign(kind: str, counts: float, limit_nm: float, trials: int, seed: int = 0) -> tuple[int, int, float]:
    """Measure known shifts of 4 nm frames; returns how many were accepted, how many of these wrongly, and the error
    relative to the claimed standard deviation, root mean square."""
    random, draw = np.random.default_rng(seed), scene(kind)
    pixel, accepted, wrong, pulls = 4.0 / 128, 0, 0, []
    for _ in range(trials):
        center, angle = random.uniform(3.5, 8.5, 2), random.uniform(0, 2 * np.pi)
        shift = 0.85 * limit_nm * np.sqrt(random.random()) * np.array([np.cos(angle), np.sin(angle)])
        before, after = (random.poisson(counts * draw(tuple(c), 4.0, 128)) for c in (center, center - shift))
        found = measure_shift(before, after, (pixel, pixel), limit_nm)
        if not found.reason:
            error = np.array([found.dx_nm, found.dy_nm]) - shift
            accepted += 1
            wrong += bool(np.hypot(*error) > 0.5 * pixel + 3.0 * found.sigma_nm)
            pulls.append(error / found.sigma_nm)
    return accepted, wrong, float(np.sqrt(np.mean(np.square(pulls)))) if pulls else 0.0


@pytest.mark.parametrize(
    ("kind", "counts", "limit_nm", "least"),
    [
        ("defects", 5, 0.15, 0.9),
        ("defects", 20, 0.15, 0.9),
        ("lattice", 5, 0.15, 0.9),  # a lattice of 0.316 nm: within less than half of it there is one answer
        ("lattice", 20, 0.4, 0.0),  # and here there are several
        ("defects", 20, 0.4, 0.3),  # unless the defects tell them apart
        ("atoms", 5, 0.4, 0.7),
    ],
)
def test_accepted_shifts_are_true_and_their_errors_as_claimed(kind, counts, limit_nm, least):
    accepted, wrong, pull = campaign(kind, counts, limit_nm, 12)
    print(f"{kind}, {counts} counts, {limit_nm} nm: {accepted}/12 accepted, {wrong} wrong, pull {pull:.2f}")
    assert wrong == 0
    if least:
        assert accepted >= least * 12
        assert 0.5 < pull < 1.6
    else:
        assert accepted == 0


def test_unrelated_frames_are_refused():
    random, draw, accepted = np.random.default_rng(1), scene("atoms"), 0
    for _ in range(30):
        one, other = ((6.0, 6.0) + s * random.uniform(1.0, 3.0, 2) for s in (1, -1))
        before, after = (random.poisson(20 * draw(tuple(c), 4.0, 128)) for c in (one, other))
        accepted += measure_shift(before, after, (4.0 / 128, 4.0 / 128), 0.4).accepted
    assert accepted == 0


@pytest.mark.slow
@pytest.mark.parametrize("counts", [5, 20])
@pytest.mark.parametrize(("kind", "limit_nm"), [(k, x) for k in ("defects", "lattice", "atoms") for x in (0.15, 0.4)])
def test_fewer_than_one_in_a_hundred_accepted_shifts_is_wrong(kind, limit_nm, counts):
    accepted, wrong, pull = campaign(kind, counts, limit_nm, 400, seed=7)
    print(f"{kind}, {counts} counts, {limit_nm} nm: {accepted}/400 accepted, {wrong} wrong, pull {pull:.2f}")
    assert wrong < max(1.0, 0.01 * accepted)


def blobs(shift=(0.0, 0.0), n=96) -> np.ndarray:
    """Blobs at random places of a plane, seen in pixels 1..n after it moved by (x, y) pixels."""
    x, y = np.random.default_rng(3).uniform(-60, n + 60, (2, 300))
    grid = np.arange(n)[:, None]
    gx, gy = (np.exp(-((grid - at - s) ** 2) / 8.0) for at, s in ((x, shift[0]), (y, shift[1])))
    return gy @ gx.T


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), st.floats(5, 1000), st.integers(0, 2**32 - 1))
def test_a_known_shift_is_recovered_between_pixels(shift, counts, seed):
    random = np.random.default_rng(seed)
    before, after = (random.poisson(counts * blobs(s)) for s in ((0.0, 0.0), shift))
    found = measure_shift(before, after, (0.02, 0.03), 0.24)
    assert not found.reason
    off = np.hypot(found.dx_nm - 0.02 * shift[0], found.dy_nm - 0.03 * shift[1])
    assert off < 5.0 * found.sigma_nm + 0.001
    assert found.sigma_nm < 0.02


def test_what_cannot_be_told_is_refused_with_its_reason():
    random = np.random.default_rng(0)
    noise = [random.poisson(5.0, (96, 96)) for _ in range(2)]
    seen = random.poisson(50 * blobs()), random.poisson(50 * blobs((9.0, 0.0)))
    spoiled = seen[1].astype(float)
    spoiled[3, 3] = np.nan
    stripes = 50 * (1 + np.sin(np.arange(96) / 2.0)) * np.ones((96, 1))
    for before, after, limit_nm, reason in (
        (*noise, 0.1, "hardly correlate"),
        (np.zeros((96, 96)), seen[0], 0.1, "no contrast"),
        (seen[0], spoiled, 0.1, "not numbers"),
        (seen[0], seen[1][:90], 0.1, "differ in shape"),
        (seen[0], seen[1], 0.5, "too little overlap"),
        (seen[0], seen[1], 0.1, "beyond the limit"),  # it is 0.18 nm
        (seen[0], random.poisson(50 * blobs((4.9, 0.0))), 0.1, "at the edge"),
        (random.poisson(stripes), random.poisson(stripes), 0.15, "fits about as well"),
    ):
        found = measure_shift(before, after, (0.02, 0.02), limit_nm)
        assert reason in found.reason, (reason, found)
        assert not found.accepted


# ---------------------------------------------------------------- following


def measured(folder: Path) -> list[DriftMeasured]:
    return [event for event in read_events(folder) if isinstance(event, DriftMeasured)]


def farthest_off(state: State, column: DriftingColumn) -> float:
    """Farthest that any sub-scan was sent from where the specimen really was."""
    keys = enumerate(state.keys.values())
    return max(float(np.hypot(*(k.region.shift_nm - column.moved_nm(n)))) for n, k in keys if k.step > 0)


def test_a_moving_specimen_is_followed_and_every_measurement_is_charged(tmp_path):
    column = DriftingColumn(step_nm=(0.04, -0.03))
    config = configuration(TAME, column, AMPLE, drift=REFERENCE)
    state = run(tmp_path / "s", config)
    assert len(state.scans) == 6
    assert farthest_off(state, column) < 0.02  # it moved by 0.65 nm
    assert [k.step for k in state.keys.values()] == [-1, -2, 0, -3, 1, -4, 2, -5, 3, -6, 4, -7, 5, -8, 6]
    assert state.charged.electrons == column.meter
    assert list(compare_ledgers(tmp_path / "s", state)) == []
    assert all(scan.observation.region.center_nm == state.candidates[scan.candidate].center_nm for scan in state.scans)
    for (x, y), fluence in column.tiles.items():
        assert fluence <= state.tile_map.fluence[y + 2, x + 2]
    page = write_report(tmp_path / "s").read_text()
    assert "How it drifted" in page
    assert "8 measurements, 0 of them refused" in page


def test_without_a_plan_the_same_specimen_runs_away_and_has_no_bound(tmp_path):
    column = DriftingColumn(step_nm=(0.04, -0.03))
    state = run(tmp_path / "s", configuration(TAME, column, Budget(electrons=10**7)))
    assert farthest_off(state, column) == pytest.approx(0.3)
    with pytest.raises(BadInput, match="drifts without a bound"):
        run(tmp_path / "t", configuration(TAME, column, AMPLE))


@pytest.mark.parametrize("every", [2, 3])
def test_measured_as_often_as_planned_and_foreseen_in_between(tmp_path, every):
    column = DriftingColumn(step_nm=(0.02, 0.01))
    plan = REFERENCE.model_copy(update={"every": every})
    state = run(tmp_path / "s", configuration(TAME, column, AMPLE, drift=plan))
    steps = [k.step for k in state.keys.values()]
    assert steps == ([-1, -2, 0, 1, -3, 2, 3, -4, 4, 5, -5, 6] if every == 2 else [-1, -2, 0, 1, 2, -3, 3, 4, 5, -4, 6])
    assert farthest_off(state, column) < 0.03


@pytest.mark.parametrize("shown", ["noise", "jump", "nan"])
def test_two_refusals_in_a_row_pause_and_nothing_is_exposed_on_a_guess(tmp_path, shown):
    column = DriftingColumn(blind=(5, 6) if shown == "noise" else ())
    faulty = FaultyColumn(column, {5: "nan", 6: "nan"}) if shown == "nan" else column
    if shown == "jump":
        column.moved_nm = lambda n: np.array([0.01 * n + 0.25 * (n >= 5), 0.0])
    config = configuration(TAME, faulty, AMPLE, drift=REFERENCE)
    config = config if shown != "nan" else drifting(config, column)
    state = run(tmp_path / "s", config)
    assert state.phase == "paused"
    word = {"noise": "nm away", "jump": "beyond the limit", "nan": "unusable frame"}[shown]
    assert "could not be measured 2 times" in state.paused
    assert word in state.paused
    assert [k.step for k in state.keys.values()] == [-1, -2, 0, -3, 1, -4, -5]
    refused = measured(tmp_path / "s")[-2:]
    assert not any(event.accepted for event in refused)
    assert state.charged.electrons == column.meter
    assert "refused, nothing was assumed" in write_report(tmp_path / "s").read_text()
    column.moved_nm = lambda n: np.array([0.01 * n, 0.0])
    state = resume(tmp_path / "s", config)
    assert state.stopped.cause == "rule"
    assert [k.step for k in state.keys.values()][7:9] == [-6, 2]


def drifting(config, column):
    """A driver that says that it drifts, whatever its column is wrapped in."""
    driver = type(config.driver)(config.driver.column)
    driver.drifts = True
    return type(config)(config.tables, driver, config.perceiver, config.policy, {}, config.base)


def test_after_every_pause_the_first_exposure_is_a_measurement(tmp_path):
    """Wherever a run was interrupted, time has passed: no sub-scan is exposed before the specimen is found again."""
    column = DriftingColumn()
    config = configuration(TAME, column, AMPLE, drift=REFERENCE.model_copy(update={"every": 100}))
    random, left = np.random.default_rng(2), 7

    def interrupt(state, event):
        nonlocal left
        left -= 1
        if left == 0:
            left = int(random.integers(2, 20))
            raise KeyboardInterrupt

    session = Session.create(config, tmp_path / "s")
    while session.run(interrupt).phase != "stopped":
        session.close()
        session = Session.reopen(tmp_path / "s", config)
    session.close()
    events = read_events(tmp_path / "s")
    known, resumed = True, 0
    for before, event in pairwise(events):
        resumed += isinstance(event, Resumed)
        known = (known or isinstance(before, DriftMeasured)) and not isinstance(event, Resumed)
        assert event.kind != "reserved" or event.step < 0 or known
    assert resumed > 5
    assert farthest_off(fold(events), column) < 0.15
    fired = [r.step for r in fold(events).keys.values() if r.state in ("POST", "INDET")]
    assert len(fired) == len(set(fired)), "an intent fired twice"


def test_windows_on_the_reference_pay_for_its_scans_too(tmp_path):
    tight = Budget(electrons=10**7, peak_fluence_e_per_A2=1_500.0)
    column = DriftingColumn()
    state = run(tmp_path / "s", configuration(TAME, column, tight, drift=REFERENCE))
    assert state.stopped.cause == "budget"
    assert 0 < len(state.scans) < 6
    assert state.tile_map.fluence.max() <= 1_500.0


def test_a_plan_that_cannot_measure_is_refused():
    table = REFERENCE.model_dump()
    with pytest.raises(ValueError, match=r"8 times drift\.limit_nm"):
        DriftPlan(**{**table, "limit_nm": 0.3})
    with pytest.raises(ValueError, match="32 rows"):
        DriftPlan(**{**table, "shape": (31, 64)})
    plan = configuration(TAME, DriftingColumn(), AMPLE, drift=REFERENCE).plan
    with pytest.raises(BadInput, match="reference region cannot be taken"):
        preflight(plan.model_copy(update={"budget": Budget(electrons=1000)}), CAPABILITIES)
    with pytest.raises(BadInput, match="on a record"):
        preflight(plan, CAPABILITIES.model_copy(update={"pixel_size_nm": 0.02}))
    with pytest.raises(BadInput, match=r"drift\.margin_nm"):
        preflight(plan.model_copy(update={"drift": REFERENCE.model_copy(update={"margin_nm": 1.1})}), CAPABILITIES)


# ---------------------------------------------------------------- the shipped configuration, shorter


def vacancies(folder: Path, **changes) -> tuple[int, int, float, State]:
    """Finds, true ones and their root mean square distance to the truth, nm."""
    raw = tomllib.loads((CONFIGS / "mos2_drift.toml").read_text())
    raw["driver"]["specimen"]["size_nm"], raw["drift"]["center_nm"] = [20.0, 20.0], [10.0, 10.0]
    raw["driver"]["specimen"]["vacancies"]["background_fraction"] = 0.05
    raw["policy"], raw["budget"]["electrons"] = {"kind": "serpentine"}, 350_000_000
    raw["driver"]["scan"] |= changes.pop("scan", {})
    if not changes.pop("follow", True):
        raw.pop("drift")
    config = parse(raw, CONFIGS)
    state = run(folder, config)
    truth = known_truth(folder, config).targets
    found = np.array([(atom.x_nm, atom.y_nm) for atom in state.found()])
    ours, theirs = match(found, truth, 0.1)
    off = float(np.sqrt(((found[ours] - truth[theirs]) ** 2).sum(axis=1).mean()))
    return len(found), len(ours), off, state


@pytest.mark.slow
def test_following_the_drift_finds_what_a_still_specimen_shows(tmp_path):
    still = {"drift_nm_per_s": [0.0, 0.0], "drift_wander_nm_per_s": 0.0}
    runs = {
        "still": vacancies(tmp_path / "still", scan=still),
        "followed": vacancies(tmp_path / "followed"),
        "not followed": vacancies(tmp_path / "lost", follow=False),
    }
    for name, (found, true, off, state) in runs.items():
        drift = sum(r.charge.electrons for r in state.keys.values() if r.step < 0) / state.charged.electrons
        moved = np.hypot(*state.drift.shift_nm)
        print(
            f"{name}: {true} of {found} finds true, off by {1000 * off:.1f} pm rms; {moved:.2f} nm, {drift:.3f} of dose"
        )
    assert runs["followed"][1] >= 0.95 * runs["still"][1]
    assert runs["followed"][2] < 0.03
    assert runs["not followed"][1] < 0.5 * runs["not followed"][0]
    assert np.hypot(*runs["followed"][3].drift.shift_nm) > 0.7
    assert verify_session(tmp_path / "followed")["differences"] == []
