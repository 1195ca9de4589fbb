"""The accurate road against closed forms, the shipped tables, stored frozen-phonon images and its own promises."""

import builtins
from pathlib import Path

import numpy as np
import pytest

from aecontrol.errors import BadInput
from simulators import multislice
from simulators.calibration import calibrate, modelled
from simulators.elements import thermal_rms_A
from simulators.hrtem import HrtemOptics, image_intensity
from simulators.multislice import Block, MultisliceRenderer, exit_wave, scan_block, source_offsets_A
from simulators.optics import PROBE_EXTENT_A, Optics, probe_intensity
from simulators.potential import fast_size
from simulators.specimens import assemble

FIXTURES = Path(__file__).parents[1] / "data" / "multislice"
TABLES = Path(multislice.__file__).parent / "tables" / "single_atoms.npz"
SHARP = Optics(source_fwhm_nm=0.0)
needs_abtem = pytest.mark.usefixtures("abtem")


@pytest.fixture
def abtem():
    return pytest.importorskip("abtem", reason="abTEM is not installed: pip install -e '.[multislice]'")


def one_atom(number, where, side=20.0):
    return Block(np.array([[*where, 0.0]]), np.array([number]), np.zeros(1), (side, side))


def carbon(where, size_nm=(3.0, 3.0)):
    where = np.asarray(where, dtype=float)
    return assemble(where, np.full(len(where), 6), size_nm)


@pytest.fixture(scope="module")
def tables():
    with np.load(TABLES) as file:
        return dict(file)


def annulus(tables, key, number, inner, outer):
    """Signal of one atom against radius from the cumulative table; the angles must be edges."""
    table = tables[key][list(tables["numbers"]).index(number)].astype(float)
    edges = list(tables["edges_mrad"])
    return table[:, edges.index(outer)] - (table[:, edges.index(inner)] if inner else 0.0)


def test_the_tables_hold_fractions_that_grow_with_the_angle(tables):
    keys = ("60kV_30mrad", "80kV_30mrad", "100kV_30mrad", "200kV_21.4mrad", "300kV_21.4mrad")
    for key in keys:
        assert tables[key].shape == (40, 71, 45)
        assert (np.diff(tables[key], axis=2) >= 0.0).all()
        assert tables[key][..., 0].max() == 0.0
        assert tables[key].max() < 1.0 + 3e-5
        far = tables[key][0, -1]  # hydrogen, 7 angstrom away: the probe itself, an even disc
        angle = float(key.split("_")[1].removesuffix("mrad"))
        np.testing.assert_allclose(far, np.minimum(1.0, (tables["edges_mrad"] / angle) ** 2), atol=2e-3)


@needs_abtem
@pytest.mark.parametrize(("symbol", "number"), [("C", 6), ("S", 16)])
def test_a_light_atom_scatters_as_in_the_born_approximation(tables, symbol, number):
    """Summed over positions it is the mean over the beams of (gamma f)^2; some 4 % is beyond 7 A or second order."""
    from abtem.parametrizations import LobatoParametrization

    signal = annulus(tables, "80kV_30mrad", number, 90.0, 200.0)
    radii = tables["radii_A"]
    found = np.trapezoid(signal * 2 * np.pi * radii, radii)
    angle = np.linspace(0.09, 0.2, 300)[:, None, None]
    beam = 0.03 * np.sqrt((np.arange(20) + 0.5) / 20)[:, None]
    azimuth = np.linspace(0.0, np.pi, 40)
    q = np.hypot(angle - beam * np.cos(azimuth), beam * np.sin(azimuth)) / 0.0417572
    gamma = 1 + 80.0 / 510.99895
    factor = gamma * LobatoParametrization().scattering_factor(symbol)(q**2)
    born = np.trapezoid(np.mean(factor**2, axis=(1, 2)) * 2 * np.pi * angle[:, 0, 0], angle[:, 0, 0])
    assert 0.92 < found / born < 0.98


@needs_abtem
@pytest.mark.parametrize("number", [16, 42])
@pytest.mark.parametrize("where", [(10.0, 10.0), (10.023, 10.014), (9.97, 10.031)])
def test_multislice_of_one_atom_agrees_with_its_table_wherever_it_lies_between_grid_points(tables, number, where):
    radii = np.array([0, 1, 3, 5])
    probe = np.array(where) + np.column_stack([0.1 * radii, 0.0 * radii])
    angles = {"outer": (85.0, 200.0), "inner": (60.0, 200.0), "bright": (0.0, 60.0)}
    seen = scan_block(one_atom(number, where), SHARP, angles, probe, 1, 0)[0]
    for row, (inner, outer) in zip(seen, angles.values(), strict=True):
        expected = annulus(tables, "80kV_30mrad", number, inner, outer)[radii]
        np.testing.assert_allclose(row, expected, rtol=0.015)


@needs_abtem
def test_the_probe_is_that_of_the_optics_module():
    optics = Optics(c1_nm=4.0, a1_nm=2.0, a1_deg=20.0, c3_um=3.0, source_fwhm_nm=0.0)
    pixels = 480
    probe, lost = multislice._probe(optics, (PROBE_EXTENT_A,) * 2, (pixels, pixels))
    wave = probe.build(lazy=False).array.T  # its middle is the box's
    theirs = (1.0 - lost) * np.abs(wave) ** 2 / np.sum(np.abs(wave) ** 2)
    ours = probe_intensity(optics, pixels)
    assert np.abs(theirs - ours).max() < 0.01 * ours.max()
    assert np.abs(theirs - ours.T).max() > 0.05 * ours.max()


@needs_abtem
def test_all_detectors_together_see_the_whole_beam_and_abf_sees_no_weak_phase_in_focus():
    where = np.array([[9.0, 9.0], [10.42, 9.0], [9.71, 10.23]])
    block = Block(np.column_stack([where, np.zeros(3)]), np.full(3, 6), np.full(3, 0.06), (20.0, 20.0))
    angles = {"bright": (0.0, 15.0), "abf": (15.0, 30.0), "middle": (30.0, 80.0), "haadf": (80.0, 200.0)}
    probe = np.concatenate([where, where.mean(axis=0, keepdims=True), [[3.0, 3.0]]])
    seen = scan_block(block, SHARP, angles, probe, 2, 0).mean(axis=0)
    assert seen.sum(axis=0) == pytest.approx(1.0, abs=1e-3)
    out_of_focus = scan_block(block, SHARP.model_copy(update={"c1_nm": 8.0}), angles, probe, 2, 0).mean(axis=0)
    # what is scattered out of the disc (second order) goes from its edge; the phase itself shows only out of focus
    assert np.ptp(seen[0]) < 0.3 * np.ptp(out_of_focus[0])


def test_atoms_shake_by_their_own_amount_across_the_beam_and_the_same_way_again():
    rms = np.repeat([0.05, 0.1], 20000)
    block = Block(np.zeros((40000, 3)), np.full(40000, 6), rms, (20.0, 20.0))
    moved = block.shaken(3, 1)
    assert moved.reshape(2, -1, 3).std(axis=1) == pytest.approx(np.array([[0.05, 0.05, 0], [0.1, 0.1, 0]]), rel=0.02)
    np.testing.assert_array_equal(block.shaken(3, 1), moved)
    assert (block.shaken(3, 2)[:, :2] != moved[:, :2]).all()


@pytest.mark.parametrize("n", [8, 16, 50])
def test_source_points_have_the_variance_of_the_source(n):
    points = source_offsets_A(0.34, n)
    assert points.mean(axis=0) == pytest.approx([0, 0], abs=1e-12)
    assert points.std(axis=0) == pytest.approx([0.34, 0.34])
    assert abs(np.mean(points[:, 0] * points[:, 1])) < 0.2 * 0.34**2


def test_grid_sizes_have_small_prime_factors():
    for n in range(1, 3000, 7):
        size = fast_size(n)
        assert n <= size < 1.1 * n + 8
        for prime in (2, 3, 5, 7):
            while size % prime == 0:
                size //= prime
        assert size == 1


@needs_abtem
def test_a_specimen_may_lie_anywhere_and_finished_images_are_found_again(tmp_path, monkeypatch):
    atoms = np.array([[10.0, 12.0, 0.0], [11.4, 12.0, 0.0], [60.0, 60.0, 0.0]])
    probe = np.array([[[1.0, 1.2], [1.07, 1.2]]])
    angles = {"HAADF": (80.0, 180.0), "BF": (0.0, 15.0)}
    renderer = MultisliceRenderer(SHARP, angles, phonon_configurations=2, folder=tmp_path)
    images = renderer.render(carbon(atoms), probe)
    assert {name: (image.shape, image.dtype.name) for name, image in images.items()} == {
        "HAADF": ((1, 2), "float32"),
        "BF": ((1, 2), "float32"),
    }
    assert images["HAADF"][0, 0] > 1.5 * images["HAADF"][0, 1] > 0.0
    shifted = renderer.render(carbon(atoms + np.array([3.1, 1.7, 0.0])), probe + np.array([0.31, 0.17]))
    assert shifted["HAADF"] == pytest.approx(images["HAADF"], rel=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(multislice, "scan_block", lambda *_: pytest.fail("computed again"))
        np.testing.assert_array_equal(renderer.render(carbon(atoms), probe)["BF"], images["BF"])
    other = MultisliceRenderer(SHARP, angles, phonon_configurations=2, seed=1, folder=tmp_path)
    assert other._key(*keyed(atoms)) != renderer._key(*keyed(atoms))


def keyed(atoms):
    probe = np.array([[10.0, 12.0]])
    block, corner = multislice.cut_out(carbon(atoms), probe, 30.0)
    return block, probe - corner


def test_what_cannot_be_done_is_said_before_any_work(monkeypatch):
    with pytest.raises(BadInput, match=r"'x' spans 90.* to 60"):
        MultisliceRenderer(SHARP, {"x": (90.0, 60.0)})
    with pytest.raises(BadInput, match="2 phonon configurations are too few"):
        MultisliceRenderer(Optics(), {"x": (60.0, 90.0)}, phonon_configurations=2)
    pytest.importorskip("abtem", reason="abTEM is not installed: pip install -e '.[multislice]'")
    renderer = MultisliceRenderer(SHARP, {"x": (60.0, 90.0)}, phonon_configurations=1)
    specimen = carbon([[10.0, 10.0, 0.0]])
    with pytest.raises(BadInput, match="no atom within"):
        renderer.render(specimen, np.array([[9.0, 9.0]]))
    with pytest.raises(BadInput, match="at least one position"):
        renderer.render(specimen, np.empty((0, 2)))
    large = np.stack(np.meshgrid(np.linspace(0, 9, 512), np.linspace(0, 9, 512)), axis=-1)
    with pytest.raises(BadInput, match=r"take about .* core hours"):
        MultisliceRenderer(SHARP, {"x": (60.0, 200.0)}, phonon_configurations=64).render(specimen, large)
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "abtem":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BadInput, match=r"not installed\n.*\.\[multislice\]"):
        renderer.render(specimen, np.array([[1.0, 1.0]]))


@needs_abtem
def test_an_atom_is_dark_at_its_own_place_in_the_tem_image():
    wave, sampling = exit_wave(one_atom(42, (6.0, 13.0)), 80.0, 90.0)
    image = image_intensity(wave, sampling, HrtemOptics(aperture_mrad=40.0))
    row, column = np.unravel_index(image.argmin(), image.shape)
    assert column * sampling[0] == pytest.approx(6.0, abs=0.15)
    assert row * sampling[1] == pytest.approx(13.0, abs=0.15)
    assert image.min() < 0.9


@pytest.mark.parametrize("name", ["mos2_80kV", "srtio3_80kV", "srtio3_200kV"])
def test_the_stored_images_are_reproducible_to_their_stated_error(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        images, halves, error = file["images"], file["halves"], file["standard_error"]
    for image, half, sigma in zip(images, halves.swapaxes(0, 1), error, strict=True):
        assert sigma.mean() < 0.006 * np.ptp(image)
        assert np.sqrt(np.mean((half[0] - half[1]) ** 2) / np.mean(4.0 * sigma**2)) == pytest.approx(1.0, abs=0.6)


@needs_abtem
def test_a_calibrated_linear_model_of_a_monolayer_follows_stored_multislice(tmp_path):
    a, half = 3.16, 3.16 * 3**0.5 / 2
    metal, sulphur = np.array([[0.0, 0.0], [a / 2, half]]), np.array([[0.0, 2 * half / 3], [a / 2, 5 * half / 3]])
    where = np.concatenate([metal, sulphur, sulphur])
    heights = np.repeat([1.565, 0.0, 3.13], 2)
    numbers = np.repeat([42, 16, 16], 2)
    cell = Block(np.column_stack([where, heights]), numbers, thermal_rms_A(numbers), (a, 2 * half))
    found = calibrate(cell, 3.13, 0.313, SHARP, (86.0, 200.0), configurations=4, folder=tmp_path)
    assert calibrate(cell, 3.13, 0.313, SHARP, (86.0, 200.0), configurations=4, folder=tmp_path) == found
    with np.load(FIXTURES / "mos2_80kV.npz") as file:
        expected = file["images"][0]
    along = np.linspace(-1.0, 12.0, 131)
    perfect = along < 5.5  # the vacancy is beyond
    model = modelled(found, cell, 3.13, SHARP, np.column_stack([0.0 * along, along]))[perfect]
    assert np.corrcoef(model, expected[perfect])[0, 1] > 0.995
    assert np.sqrt(np.mean((model - expected[perfect]) ** 2)) < 0.03 * np.ptp(expected)


@pytest.mark.slow
@needs_abtem
def test_a_calibrated_linear_model_follows_five_nanometres_of_strontium_titanate():
    a = 3.905
    where = a * np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    numbers = np.array([38, 22, 8, 8, 8])
    cell = Block(where, numbers, thermal_rms_A(numbers), (a, a))
    with np.load(FIXTURES / "srtio3_80kV.npz") as file:
        expected, probe = file["images"][0], file["probe_A"]
    found = calibrate(cell, a, 5.08, SHARP, (86.0, 200.0))
    model = modelled(found, cell, a, SHARP, probe)
    assert np.corrcoef(model, expected)[0, 1] >= 0.998
    assert np.sqrt(np.mean((model - expected) ** 2)) <= 0.01 * np.ptp(expected)
