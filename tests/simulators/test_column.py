import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.registration import phase_cross_correlation

from aecontrol.types import ScanRegion
from aecontrol.units import electrons_per_second
from simulators.column import CURRENT_LIMIT, BeamStopped, SimulatedColumn, block_lines
from simulators.damage import Damage
from simulators.detector import Detector
from simulators.optics import Optics
from simulators.render import Renderer
from simulators.scan import Charging, ScanModel, nominal_positions_nm
from simulators.specimens.sheets import Mos2, SulphurVacancies

CURRENT_PA = 50.0
FRAGILE = Damage(critical_fluence_e_per_A2={"S": 2e3}, radiolysis_removes=0.5)


def column(damage=FRAGILE, seed=1, detector=None, **settings_of_scan):
    scan = ScanModel(**{"drift_nm_per_s": (0.01, 0.02), "swing_nm": 0.02} | settings_of_scan)
    detectors = {"HAADF": detector or Detector()} if isinstance(detector, Detector | None) else detector
    return SimulatedColumn(Mos2(size_nm=(8, 6)), Optics(), scan, detectors, damage, CURRENT_PA, seed)


def region(center=(4.0, 3.0), fov=(3.0, 2.0), shape=(24, 36), dwell=2e-5, rotation=0.0):
    return ScanRegion(center_nm=center, fov_nm=fov, shape=shape, dwell_time_s=dwell, rotation_rad=rotation)


def state(column):
    now = column.snapshot()
    return (
        column.fluence_at_atoms().tobytes(),
        now.alive.tobytes(),
        now.positions_A.tobytes(),
        column.tile_fluence().tobytes(),
        column.clock_s,
        column.meter,
    )


REGIONS = st.builds(
    region,
    center=st.tuples(st.floats(2.5, 5.5), st.floats(2.0, 4.0)),
    shape=st.sampled_from([(8, 12), (24, 36), (70, 20)]),
    rotation=st.floats(-3, 3),
)


@settings(max_examples=10, deadline=None)
@given(shots=st.lists(st.tuples(REGIONS, st.booleans()), min_size=1, max_size=4))
def test_absorbing_a_shot_leaves_exactly_what_firing_it_leaves(shots):
    fired, mixed = column(), column()
    for ordinal, (where, absorb) in enumerate(shots):
        pulse = fired.fire(ordinal, where)
        again = mixed.absorb(ordinal, where) if absorb else mixed.fire(ordinal, where)
        if again is not None:
            assert np.array_equal(again.channels["HAADF"], pulse.channels["HAADF"])
            assert (again.electrons, again.started_s) == (pulse.electrons, pulse.started_s)
        for one in (fired, mixed):
            one.idle(0.5)
    assert state(fired) == state(mixed)


def test_pulse_reports_what_was_delivered():
    simulated = column()
    first, second = simulated.fire(0, region()), simulated.fire(1, region())
    nominal = electrons_per_second(CURRENT_PA) * 24 * 36 * 2e-5
    for pulse in (first, second):
        assert pulse.electrons == pytest.approx(nominal, rel=CURRENT_LIMIT + 1e-6)
        assert pulse.pixels == 24 * 36
        assert pulse.seconds == pytest.approx(24 * 36 * 2e-5 + 23 * 200e-6)
        assert pulse.channels["HAADF"].shape == (24, 36)
        assert pulse.flags == ()
        assert pulse.validity["HAADF"].linear_ok
    assert first.electrons != second.electrons
    assert second.started_s == pytest.approx(first.seconds)
    assert simulated.meter == first.electrons + second.electrons
    assert simulated.tile_fluence().sum() * 100 == pytest.approx(simulated.meter, rel=1e-9)


def test_noise_depends_on_the_ordinal_alone():
    still = Damage(displacement_threshold_eV={}, excitation_barn={})
    one, other = column(still), column(still)
    other.absorb(0, region(center=(5.0, 3.0)))
    other.clock_s = 0.0
    assert np.array_equal(one.fire(7, region()).channels["HAADF"], other.fire(7, region()).channels["HAADF"])
    other.clock_s = 0.0
    assert not np.array_equal(one.fire(8, region()).channels["HAADF"], other.fire(9, region()).channels["HAADF"])


class Broken(Exception):
    pass


def test_a_pulse_that_breaks_off_has_delivered_its_first_lines_and_no_more():
    simulated, whole = column(line_jitter_nm=0.0), column(line_jitter_nm=0.0)

    def cut(ordinal, electrons):
        if electrons > 0.4 * full:
            raise Broken(ordinal)

    full = whole.fire(0, region()).electrons
    simulated.on_line_block = cut
    with pytest.raises(Broken):
        simulated.fire(0, region())
    assert 0.4 * full < simulated.meter < 0.45 * full
    assert simulated.tile_fluence().sum() * 100 == pytest.approx(simulated.meter, abs=1.0)
    assert np.any(whole.fluence_at_atoms() - simulated.fluence_at_atoms() > 100.0)
    assert np.all(simulated.fluence_at_atoms() <= whole.fluence_at_atoms() * (1 + 1e-9) + 1e-6)
    simulated.on_line_block = None
    assert simulated.fire(1, region()).started_s == pytest.approx(10 * (36 * 2e-5 + 200e-6))


@settings(max_examples=10, deadline=None)
@given(where=REGIONS, share=st.floats(0.0, 1.0))
def test_a_stopped_frame_is_the_beginning_of_the_whole_one(where, share):
    whole, stopped = column(), column()
    blocks = -(-where.shape[0] // block_lines(where.shape[0]))
    last = min(int(share * blocks), blocks - 1)
    calls = []

    def stop(ordinal, electrons):
        calls.append(electrons)
        if len(calls) == last + 1:
            raise BeamStopped

    stopped.on_line_block = stop
    full, part = whole.fire(0, where), stopped.fire(0, where)
    rows = part.pixels // where.shape[1]
    assert rows == min((last + 1) * block_lines(where.shape[0]), where.shape[0])
    assert np.array_equal(part.channels["HAADF"][:rows], full.channels["HAADF"][:rows])
    assert not part.channels["HAADF"][rows:].any()
    assert part.electrons == stopped.meter == calls[-1]
    assert ("partial" in part.flags) == (rows < where.shape[0])
    assert part.seconds == pytest.approx(stopped.clock_s)
    assert stopped.tile_fluence().sum() * 100 == pytest.approx(stopped.meter, abs=1.0)


def test_damage_shows_in_later_lines_only():
    strong = region(shape=(60, 40), fov=(3.0, 3.0), dwell=1e-2)  # so many electrons that the noise is below 1 %
    fragile = Damage(critical_fluence_e_per_A2={"S": 4e6}, radiolysis_removes=1.0)
    safe = Damage(displacement_threshold_eV={}, excitation_barn={})
    damaged, intact = (
        column(damage, drift_nm_per_s=(0.0, 0.0), swing_nm=0.0, line_jitter_nm=0.0) for damage in (fragile, safe)
    )
    frames = [one.fire(0, strong).channels["HAADF"] for one in (damaged, intact)]
    assert np.array_equal(frames[0][0], frames[1][0])  # noise and all: a line cannot know what comes
    points = nominal_positions_nm(strong)
    born, left = (Renderer(Optics()).render(one.snapshot(), points).channels["HAADF"] for one in (intact, damaged))
    final = (left - born) * damaged.meter / strong.pixels
    seen = np.sum((frames[0] - frames[1]) * final) / np.sum(final**2)
    # an atom is hit while the beam passes over it, so about half of its loss is seen in the same frame, not all
    assert 0.2 < seen < 0.8


def test_truth_is_that_of_the_start_and_the_snapshot_is_that_of_now():
    simulated = column()
    before = simulated.targets("vacancy")
    simulated.fire(0, region(dwell=2e-4))
    assert np.array_equal(simulated.targets("vacancy")[0], before[0])
    assert len(simulated.snapshot().targets("vacancy")[0]) > len(before[0])
    assert simulated.targets("dislocation") is None


def test_events_are_in_the_truth_with_fluence_and_time():
    simulated = column()
    pulse = simulated.fire(0, region(dwell=2e-4))
    truth = simulated.truth()
    assert truth.electrons == pulse.electrons
    assert len(truth.events) > 20
    changed = {event.atom for event in truth.events}
    born = Mos2(size_nm=(8, 6)).build(1)
    now = truth.specimen
    moved = np.any(now.positions_A != born.positions_A, axis=1) | (now.alive != born.alive)
    assert set(np.flatnonzero(moved)) == changed
    times = [event.time_s for event in truth.events]
    assert times == sorted(times)
    assert 0.0 <= times[0] <= times[-1] <= pulse.seconds
    at_end = simulated.fluence_at_atoms()
    assert all(0.0 < event.fluence_e_per_A2 <= at_end[event.atom] * 1.001 for event in truth.events)


def test_channels_of_one_exposure_share_its_electrons():
    safe = Damage(displacement_threshold_eV={}, excitation_barn={})
    detectors = {
        "HAADF": Detector(dark_counts=0.0),
        "MAADF": Detector(inner_mrad=40.0, outer_mrad=86.0, dark_counts=0.0),
        "BF": Detector(inner_mrad=0.0, outer_mrad=30.0, dark_counts=0.0),
    }
    several, single = column(safe, detector=detectors), column(safe, detector=detectors["HAADF"])
    pulse = several.fire(0, region(dwell=1e-3))
    assert tuple(pulse.channels) == several.channels == ("HAADF", "MAADF", "BF")
    assert np.array_equal(pulse.channels["HAADF"], single.fire(0, region(dwell=1e-3)).channels["HAADF"])
    assert sum(channel.sum() for channel in pulse.channels.values()) <= pulse.electrons
    ideal = several.noiseless(region())
    bright, dark = (pulse.channels[name] for name in ("BF", "HAADF"))
    assert bright.mean() / pulse.electrons * pulse.pixels == pytest.approx(ideal["BF"].mean(), rel=0.01)
    assert dark.mean() / pulse.electrons * pulse.pixels == pytest.approx(ideal["HAADF"].mean(), rel=0.05)


def test_the_way_back_and_the_parked_beam_are_paid_for():
    open_beam = {"flyback_blanked": False, "blanker_latency_s": 5e-3, "flyback_s": 1e-3, "line_jitter_nm": 0.0}
    simulated = column(drift_nm_per_s=(0.0, 0.0), swing_nm=0.0, **open_beam)
    pulse = simulated.fire(0, region())
    seconds = 24 * 36 * 2e-5 + 23 * 1e-3 + 5e-3
    assert pulse.electrons == pytest.approx(electrons_per_second(CURRENT_PA) * seconds, rel=CURRENT_LIMIT)
    assert simulated.tile_fluence().sum() * 100 == pytest.approx(pulse.electrons, rel=1e-9)
    last_pixel = np.floor(nominal_positions_nm(region())[-1, -1]).astype(int) + 2
    assert np.unravel_index(simulated.tile_fluence().argmax(), simulated.tile_fluence().shape) == tuple(
        last_pixel[::-1]
    )
    # electrons on the way back scatter, but no pixel is being read: counts are those of the dwell time alone
    blanked = column(drift_nm_per_s=(0.0, 0.0), swing_nm=0.0, line_jitter_nm=0.0).fire(0, region())
    assert pulse.channels["HAADF"].mean() == pytest.approx(blanked.channels["HAADF"].mean(), rel=0.1)


@pytest.mark.parametrize("blanked", [True, False])
def test_what_broke_off_is_on_the_meter_in_the_specimen_and_on_the_clock_alike(blanked):
    scan = {"flyback_s": 1e-3, "flyback_blanked": blanked, "blanker_latency_s": 2e-3, "line_jitter_nm": 0.0}
    simulated = column(drift_nm_per_s=(0.0, 0.0), swing_nm=0.0, **scan)

    def cut(ordinal, electrons):
        raise Broken(electrons)

    simulated.on_line_block = cut
    with pytest.raises(Broken):
        simulated.fire(0, region())  # one line of 24
    line_s = 36 * 2e-5 + (0.0 if blanked else 1e-3)
    assert simulated.meter == pytest.approx(electrons_per_second(CURRENT_PA) * line_s, rel=CURRENT_LIMIT)
    assert simulated.tile_fluence().sum() * 100 == pytest.approx(simulated.meter, abs=1.0)
    assert simulated.clock_s == pytest.approx(36 * 2e-5 + 1e-3)


def test_a_charging_specimen_moves_brightens_and_recovers():
    charging = Charging(offset_nm=(0.3, 0.0), gain=0.5, decay_s=0.05)
    scan = ScanModel(line_jitter_nm=0.0, charging=charging)
    first = scan.positions_nm(region(), 0.0, 0, 0) - nominal_positions_nm(region())
    lines_s = scan.line_starts_s(region())
    assert first[:, 0, 0] == pytest.approx(0.3 * (1 - np.exp(-lines_s / 0.05)))
    assert np.all(first[:, :, 1] == 0.0)
    simulated = column(Damage(displacement_threshold_eV={}, excitation_barn={}), charging=charging)

    def brightness(ordinal):
        pulse = simulated.fire(ordinal, region(dwell=2e-4))
        return pulse.channels["HAADF"].sum() / pulse.electrons

    cold, hot = brightness(0), brightness(1)
    simulated.idle(2.0)
    rested = brightness(2)
    assert hot > 1.1 * cold
    assert rested == pytest.approx(cold, rel=0.03)


@pytest.mark.parametrize(
    ("detectors", "word"),
    [
        ({}, "no detector"),
        ({"metadata": Detector()}, "capital"),
        ({"HAADF": Detector(), "MAADF": Detector(inner_mrad=60.0, outer_mrad=90.0)}, "overlap"),
    ],
)
def test_impossible_sets_of_detectors_are_refused(detectors, word):
    with pytest.raises(ValueError, match=word):
        column(detector=detectors)


def test_saturation_is_flagged():
    assert column(detector=Detector(saturation=20.0)).fire(0, region()).flags == ("saturated",)


def test_drift_between_two_frames_is_recovered_at_twenty_counts_a_pixel():
    velocity = np.array([0.012, -0.008])  # nm/s: some pixels between frames, well below half a lattice constant
    harmless = Damage(displacement_threshold_eV={}, excitation_barn={})
    vacancies = SulphurVacancies(background_fraction=0.1, n_clusters=0)
    misses = []
    for seed in range(4):
        simulated = SimulatedColumn(
            Mos2(size_nm=(8, 8), vacancies=vacancies), Optics(), ScanModel(drift_nm_per_s=tuple(velocity)),
            {"HAADF": Detector()}, harmless, 100.0, seed,
        )  # fmt: skip
        where = region(center=(4.0, 4.0), fov=(5.0, 5.0), shape=(256, 256), dwell=2e-5)
        first = simulated.fire(0, where)
        simulated.idle(3.0)
        second = simulated.fire(1, where)
        mean = first.channels["HAADF"].mean()
        assert 15 < mean < 25
        window = np.hanning(256)[:, None] * np.hanning(256)
        frames = [(pulse.channels["HAADF"] - mean) * window for pulse in (first, second)]
        (dy, dx), *_ = phase_cross_correlation(*frames, upsample_factor=100, normalization=None)
        # the picture of the specimen moves by what the probe has drifted
        pixels = velocity * (second.started_s - first.started_s) / (5.0 / 256)
        misses.append(np.array([dx, dy]) - pixels)
    assert np.abs(pixels).min() > 0.5
    assert np.sqrt(np.mean(np.square(misses))) <= 0.1
