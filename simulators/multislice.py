"""The accurate road: frozen-phonon multislice of atoms in a box, through abTEM (optional extra ``multislice``).

Any annulus, bright field included, any thickness. Three things differ from abTEM's defaults, each worth several per
cent of a dark-field signal: the potential is exact at any atom position (see ``potential``), it is exponentiated on a
finer grid, and the probe's tails beyond the periodic box are put back: a box of side L holds all but about 1 / (3 k0 L)
of the beam (k0 = aperture radius), and the rest is taken to see the average of the box.

``python -m simulators.multislice tables --out FILE`` makes the single-atom tables of the fast renderer.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.units import nm_to_angstrom

from .cache import kept
from .optics import Optics, interaction_constant, wavelength_A
from .potential import FOLDS, fast_size, require_abtem, transmissions
from .single_atoms import tables_of, write_tables
from .specimens import Specimen
from .streams import stream

if TYPE_CHECKING:
    import abtem

Array = NDArray[np.float64]
Annuli = Mapping[str, tuple[float, float]]

SLICE_A = 2.0
"""Thickest slice, angstrom."""
LAST_STEP_A = 1e-3
"""Way behind the last slice, which must not be 0: an exit wave is that in the plane of the last atoms."""
MARGIN_A = 8.0
"""Atoms this far around the scanned box are kept, and further by the beam's spread in the specimen."""
GAP_A = 2.0
"""Space between the kept atoms and their periodic images."""
LEAST_BOX_A = 20.0
BAND_MARGIN = 1.05
"""The waves' band limit over the largest angle wanted; abTEM's limit is soft over its last 3 %."""
TAIL_PROBES = 4
"""Further probe positions per phonon configuration that measure the average of the box."""
BATCH_PIXELS = 2**22
STEPS_PER_S = 6e7
"""Wave pixels through one slice per second, one core of the machine that this was written on."""
MAX_HOURS = 4.0
MAX_ANGLE_MRAD = 400.0
MIN_SOURCE_CONFIGURATIONS = 8
MAX_SLICE_PIXELS = 2.5e8
"""Transmission functions of one configuration: 2 GB."""
METHOD = "1"
"""Raise it when results change: part of the key of stored images."""


@dataclass(frozen=True)
class Block:
    """Atoms in a box that repeats in x and y: ``positions_A`` [n, 3], ``numbers`` [n], ``rms_u_A`` [n] per axis."""

    positions_A: Array
    numbers: NDArray[np.int64]
    rms_u_A: Array
    extent_A: tuple[float, float]

    @property
    def layers(self) -> int:
        """Number of slices, at most SLICE_A apart; atoms go to the nearest, so planes of a crystal stay whole."""
        return math.ceil(round(float(np.ptp(self.positions_A[:, 2])) / SLICE_A, 6)) + 1

    @property
    def layer_A(self) -> float:
        """Distance between slices, angstrom."""
        return float(np.ptp(self.positions_A[:, 2])) / (self.layers - 1) if self.layers > 1 else SLICE_A

    def pixels(self, voltage_kV: float, largest_mrad: float) -> tuple[int, int]:
        """Grid (x, y) whose band limit (two thirds of its highest frequency) holds ``largest_mrad``."""
        frequency = BAND_MARGIN * 1.5 * largest_mrad * 1e-3 / wavelength_A(voltage_kV)
        return fast_size(2.0 * frequency * self.extent_A[0]), fast_size(2.0 * frequency * self.extent_A[1])

    def shaken(self, seed: int, configuration: int) -> Array:
        """Positions [n, 3] with a random thermal displacement along x and y; along the beam it has no effect."""
        moved = self.positions_A.copy()
        random = stream(seed, "phonons", configuration)
        moved[:, :2] += self.rms_u_A[:, None] * random.standard_normal((len(moved), 2))
        return moved

    def slices(self, voltage_kV: float, pixels: tuple[int, int], positions_A: Array) -> list[Any]:
        """abTEM transmission functions of the box, one a slice, with the atoms at ``positions_A``."""
        from abtem.potentials.iam import TransmissionFunction

        step = self.layer_A
        layer = np.rint((self.positions_A[:, 2] - self.positions_A[:, 2].min()) / step).astype(np.int64)
        sigma = interaction_constant(voltage_kV)
        made = transmissions(positions_A, self.numbers, self.extent_A, pixels, layer, self.layers, sigma)
        steps = [step] * (self.layers - 1) + [LAST_STEP_A]
        return [
            TransmissionFunction(one[None], slice_thickness=after, extent=self.extent_A, energy=voltage_kV * 1e3)
            for one, after in zip(made, steps, strict=True)
        ]


def largest_angle_mrad(optics: Optics, detectors: Annuli) -> float:
    """The angle that the waves must hold: two semi-angles beyond the outermost detector edge.

    Electrons pass through angles beyond the detector on their way to it, most of all those of a Laue zone. For 5 nm of
    SrTiO3 [001] at 200 kV, 70-110 mrad, a grid that ends at 110 mrad loses 13 % of the signal, this one 0.2 %.
    """
    return max(outer for _, outer in detectors.values()) + 2.0 * optics.semi_angle_mrad


def scan_block(
    block: Block, optics: Optics, detectors: Annuli, probe_A: Array, configurations: int, seed: int, first: int = 0
) -> Array:
    """Fraction of the beam on each annulus (inner, outer mrad) at ``probe_A`` [m, 2], [configurations, annuli, m].

    The source of ``optics`` is a displacement of all atoms and its defocus spread another C1, different ones for each
    configuration. Averaged over its first axis this is the image. ``first`` is the number of the first configuration,
    so that a scan can be done in parts. Raises BadInput without abTEM or when the job is too large.
    """
    require_abtem()
    pixels = block.pixels(optics.voltage_kV, largest_angle_mrad(optics, detectors))
    check_cost(len(probe_A) + TAIL_PROBES, configurations, block.layers, pixels)
    offsets = source_offsets_A(optics.source_sigma_A, configurations)
    defoci_nm = optics.c1_nm + defocus_offsets_nm(optics.defocus_spread_nm, configurations)
    result = np.empty((configurations, len(detectors), len(probe_A)))
    for i in range(configurations):
        defocused = optics.model_copy(update={"c1_nm": float(defoci_nm[i])})
        probe, lost = _probe(defocused, block.extent_A, pixels)
        positions = block.shaken(seed, first + i)
        positions[:, :2] += offsets[i]
        elsewhere = stream(seed, "tail-probes", first + i).random((TAIL_PROBES, 2)) * block.extent_A
        where = np.concatenate([probe_A, elsewhere])
        slices = block.slices(optics.voltage_kV, pixels, positions)
        seen = _detected(probe, slices, list(detectors.values()), where)
        average = seen[:, len(probe_A) :].mean(axis=1, keepdims=True)
        result[i] = (1.0 - lost) * seen[:, : len(probe_A)] + lost * average
    return result


def exit_wave(
    block: Block, voltage_kV: float, largest_mrad: float, seed: int | None = None
) -> tuple[NDArray[np.complex64], tuple[float, float]]:
    """Plane wave behind the last atoms of ``block``, [rows, columns] = [y, x], and its pixel's (x, y) size, angstrom.

    Beams up to ``largest_mrad`` are kept. One thermal configuration of ``seed``; without it the atoms are at rest.
    Raises BadInput without abTEM or when the job is too large.
    """
    require_abtem()
    import abtem

    pixels = block.pixels(voltage_kV, largest_mrad)
    check_cost(1, 1, block.layers, pixels)
    positions = block.positions_A if seed is None else block.shaken(seed, 0)
    plane = abtem.PlaneWave(energy=voltage_kV * 1e3, extent=block.extent_A, gpts=pixels).build(lazy=False)
    wave = _through(plane, block.slices(voltage_kV, pixels, positions)).array
    return np.asarray(wave.T, dtype=np.complex64), (block.extent_A[0] / pixels[0], block.extent_A[1] / pixels[1])


def check_cost(probes: int, configurations: int, layers: int, pixels: tuple[int, int]) -> None:
    """Raises BadInput for a multislice that would take more than MAX_HOURS of one core or too much memory."""
    area = pixels[0] * pixels[1]
    per_configuration = layers * (probes + 2.0 * FOLDS**2) * area
    hours = configurations * per_configuration / STEPS_PER_S / 3600.0
    if hours > MAX_HOURS or layers * area > MAX_SLICE_PIXELS:
        raise BadInput(
            f"{probes} probe positions x {configurations} phonon configurations x {layers} slices of {pixels[0]} x "
            f"{pixels[1]} points take about {hours:.3g} core hours and {8e-9 * layers * area:.2g} GB; the limits are "
            f"{MAX_HOURS:g} h and {8e-9 * MAX_SLICE_PIXELS:g} GB",
            "scan fewer positions or a smaller field, or use fewer phonon configurations or a smaller outer angle",
        )


def source_offsets_A(sigma_A: float, n: int) -> Array:
    """``n`` points [n, 2] that stand for a round Gaussian of ``sigma_A`` per axis: equal weights, exact variance."""
    order = np.arange(n)
    radius = np.sqrt(-2.0 * np.log1p(-(order + 0.5) / n))
    azimuth = order * math.pi * (3.0 - math.sqrt(5.0))
    points = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth)], axis=1)
    points -= points.mean(axis=0)
    return np.asarray(points * (sigma_A / points.std(axis=0))) if n > 1 else points


def defocus_offsets_nm(spread_nm: float, n: int) -> Array:
    """``n`` equally likely defoci [n] of a Gaussian spread, nm, in an order that goes with no other."""
    if spread_nm == 0.0:
        return np.zeros(n)
    from scipy.special import ndtri

    offsets = ndtri((np.arange(n) + 0.5) / n)
    return np.asarray(spread_nm * offsets / max(float(offsets.std()), 1e-12))[stream(0, "defoci").permutation(n)]


def _probe(optics: Optics, extent_A: tuple[float, float], pixels: tuple[int, int]) -> tuple[abtem.Probe, float]:
    """abTEM's probe, and the share of a true probe that its box loses because the aperture's edge is soft."""
    import abtem

    settings = {"energy": optics.voltage_kV * 1e3, "semiangle_cutoff": optics.semi_angle_mrad}
    grid = {"extent": extent_A, "gpts": pixels}
    aberrations = {
        "C10": nm_to_angstrom(optics.c1_nm),
        "C12": nm_to_angstrom(optics.a1_nm),
        "phi12": math.radians(optics.a1_deg),
        "C23": nm_to_angstrom(optics.a2_nm),
        "phi23": math.radians(optics.a2_deg),
        "C21": nm_to_angstrom(optics.b2_nm),
        "phi21": math.radians(optics.b2_deg),
        "C30": optics.c3_um * 1e4,
        "C50": optics.c5_mm * 1e7,
    }
    plain = np.abs(np.fft.fft2(abtem.Probe(**settings, **grid).build(lazy=False).array))
    aperture = plain / plain.max()
    return abtem.Probe(**settings, **grid, aberrations=aberrations), 1.0 - float(np.sum(aperture**2) / np.sum(aperture))


def _detected(
    probe: abtem.Probe, slices: list[Any], annuli: list[tuple[float, float]], probe_A: Array
) -> NDArray[np.float64]:
    """Fraction of the beam on each annulus at each of ``probe_A``, [annuli, positions]."""
    import abtem

    detectors = [abtem.AnnularDetector(inner, outer) for inner, outer in annuli]
    batch = max(1, BATCH_PIXELS // slices[0].array[0].size)
    seen = np.empty((len(annuli), len(probe_A)))
    for start in range(0, len(probe_A), batch):
        waves = probe.build(scan=abtem.CustomScan(probe_A[start : start + batch]), lazy=False)
        waves = _through(waves, slices)
        for row, detector in zip(seen, detectors, strict=True):
            row[start : start + batch] = detector.detect(waves).array
    return seen


def _through(waves: abtem.Waves, slices: list[Any]) -> abtem.Waves:
    from abtem.antialias import AntialiasAperture
    from abtem.multislice import FresnelPropagator, conventional_multislice_step

    propagator, aperture = FresnelPropagator(), AntialiasAperture()
    for one in slices:
        waves = conventional_multislice_step(waves, one, propagator, aperture)
    return waves


class MultisliceRenderer:
    """Renders specimens by frozen-phonon multislice. Slow: seconds to hours an image, and it says so beforehand."""

    def __init__(
        self,
        optics: Optics,
        detectors: Annuli,
        phonon_configurations: int = 16,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        """``detectors``: name -> (inner, outer) mrad, any annuli. Finished images are kept in ``folder``, if given, and
        found again when atoms, optics, detectors, positions, configurations, seed and abTEM are the same.

        Raises BadInput for angles out of order, no detector and too few phonon configurations.
        """
        for name, (inner, outer) in detectors.items():
            if not 0.0 <= inner < outer <= MAX_ANGLE_MRAD:
                raise BadInput(
                    f"detector {name!r} spans {inner} to {outer} mrad", f"0 <= inner < outer <= {MAX_ANGLE_MRAD:g}"
                )
        least = MIN_SOURCE_CONFIGURATIONS if optics.source_fwhm_nm > 0.0 else 1
        if not detectors or phonon_configurations < least:
            raise BadInput(
                f"{len(detectors)} detectors and {phonon_configurations} phonon configurations are too few",
                f"give at least one detector and {least} configurations (each samples one point of the source)",
            )
        self.optics, self.detectors = optics, dict(detectors)
        self.phonon_configurations, self.seed, self.folder = phonon_configurations, seed, folder

    def render(self, specimen: Specimen, probe_nm: Array) -> dict[str, NDArray[np.float32]]:
        """Fraction of the beam on each detector at ``probe_nm`` [..., 2], name -> [...], from the atoms alive there.

        Raises BadInput without abTEM, with no atom near the positions, and when the job is too large.
        """
        require_abtem()
        probe_A = nm_to_angstrom(1.0) * np.asarray(probe_nm, dtype=np.float64).reshape(-1, 2)
        blur_A = nm_to_angstrom(self.optics.blur_nm)
        block, corner = cut_out(specimen, probe_A, self.optics.semi_angle_mrad, blur_A)
        probe_A = probe_A - corner
        stored = self.folder and self.folder / f"{self._key(block, probe_A)}.npy"

        def compute() -> NDArray[np.float32]:
            seen = scan_block(block, self.optics, self.detectors, probe_A, self.phonon_configurations, self.seed)
            return np.asarray(seen.mean(axis=0), dtype=np.float32)

        images = kept(stored, _load_images, compute, np.save) if stored else compute()
        shape = np.asarray(probe_nm).shape[:-1]
        return {name: image.reshape(shape) for name, image in zip(self.detectors, images, strict=True)}

    def _key(self, block: Block, probe_A: Array) -> str:
        settings = (
            self.optics.model_dump(mode="json"),
            list(self.detectors.values()),
            self.phonon_configurations,
            self.seed,
        )
        return content_key(settings, block, probe_A)


def _load_images(path: Path) -> NDArray[np.float32]:
    return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)


def content_key(settings: object, block: Block, probe_A: Array | None = None) -> str:
    """sha256 of everything that a stored result depends on: settings, atoms, positions, method and abTEM version."""
    import abtem

    digest = hashlib.sha256(repr((METHOD, abtem.__version__, settings, block.extent_A)).encode())
    for array in (block.positions_A, block.numbers, block.rms_u_A, probe_A):
        if array is not None:
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cut_out(specimen: Specimen, probe_A: Array, semi_angle_mrad: float, blur_A: float = 0.0) -> tuple[Block, Array]:
    """The atoms that matter at ``probe_A`` in a box of their own, and the box's corner [2]. ``blur_A``: how far
    aberrations spread the probe.

    Raises BadInput when there is no position or no atom.
    """
    if not probe_A.size or not np.isfinite(probe_A).all():
        raise BadInput(f"{len(probe_A)} probe positions, or some that are not finite", "give at least one position, nm")
    margin = MARGIN_A + blur_A + nm_to_angstrom(specimen.thickness_nm) * math.tan(semi_angle_mrad * 1e-3)
    low, high = probe_A.min(axis=0) - margin, probe_A.max(axis=0) + margin
    short = np.maximum(0.0, LEAST_BOX_A - GAP_A - (high - low))
    low, high = low - short / 2.0, high + short / 2.0
    flat = specimen.positions_A[:, :2]
    inside = specimen.alive & np.all((flat >= low) & (flat <= high), axis=1)
    if not inside.any():
        raise BadInput(
            f"no atom within {margin:.0f} A of the scanned box {probe_A.min(axis=0)} to {probe_A.max(axis=0)} A",
            "scan where the specimen is",
        )
    corner = low - GAP_A / 2.0
    positions = specimen.positions_A[inside] - np.append(corner, 0.0)
    width, height = high - low + GAP_A
    block = Block(positions, specimen.atomic_numbers[inside], specimen.rms_u_A[inside], (float(width), float(height)))
    return block, corner


def main() -> None:
    """Make the tables of single atoms."""
    parser = argparse.ArgumentParser(prog="python -m simulators.multislice", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    tables = actions.add_parser("tables", help="how single atoms scatter, for the fast renderer")
    tables.add_argument("--out", type=Path, default=Path(__file__).parent / "tables" / "single_atoms.npz")
    write_tables(parser.parse_args().out, tables_of())


if __name__ == "__main__":
    main()
