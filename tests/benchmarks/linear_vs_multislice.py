"""How well the fast linear images follow the stored frozen-phonon multislice in tests/data/multislice.

python -m tests.benchmarks.linear_vs_multislice [--write]      SrTiO3 needs abTEM
Bars: MoS2 (tables of single atoms) corr >= 0.998, NRMSE <= 2 %; SrTiO3 [001] 5 nm (one calibration) 0.998 and 1 %.
NRMSE is over the range of the reference, without any scale or offset of our own; its floor is the reference's noise.
--write stores the calibrations that the tests use.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulators.calibration import calibrate
from simulators.optics import Optics
from simulators.render import Renderer
from simulators.scattering import Calibration, Contrast
from simulators.specimens.perovskites import SrTiO3

FOLDER = Path(__file__).parents[1] / "data" / "multislice"
STO = SrTiO3(size_nm=(6.0, 6.0), thickness_nm=5.08, rotation_deg=0.0)
SETTINGS = {
    "srtio3_80kV": Optics(voltage_kV=80.0, semi_angle_mrad=30.0, source_fwhm_nm=0.0),
    "srtio3_200kV": Optics(voltage_kV=200.0, semi_angle_mrad=21.4, source_fwhm_nm=0.0),
}


def compare(model: NDArray[np.generic], reference: NDArray[np.float64]) -> tuple[float, float]:
    """Pearson correlation, and root mean square difference over the reference's range."""
    difference = np.asarray(model, dtype=np.float64) - reference
    corr = float(np.corrcoef(np.asarray(model, dtype=np.float64), reference)[0, 1])
    return corr, float(np.sqrt(np.mean(difference**2)) / np.ptp(reference))


def mos2(level: str) -> dict[str, tuple[float, float, float, NDArray[np.generic], NDArray[np.float64]]]:
    """By annulus: corr, NRMSE, floor, our line and the reference, through Mo, 2S, Mo, 1S, Mo."""
    with np.load(FOLDER / "mos2_80kV.npz") as file:
        stored = {name: file[name] for name in file.files}
    shifts = [np.asarray(stored["extent_A"]) * (i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    where = np.concatenate([stored["positions_A"][:, :2] + shift for shift in shifts])
    annuli = dict(zip(("86-200", "60-200"), zip(stored["inner_mrad"], stored["outer_mrad"], strict=True), strict=True))
    renderer = Renderer(Optics(source_fwhm_nm=0.0), annuli, Contrast(level=level))  # type: ignore[arg-type]
    numbers, rms = np.tile(stored["numbers"].astype(np.int64), 9), np.tile(stored["rms_u_A"], 9)
    images = renderer.images(where, numbers, rms, stored["probe_A"])
    found = {}
    for row, name in enumerate(annuli):
        reference = stored["images"][row]
        floor = float(np.sqrt(np.mean(stored["standard_error"][row] ** 2)) / np.ptp(reference))
        found[name] = (*compare(images[name], reference), floor, images[name], reference)
    return found


def srtio3(name: str, calibration: Calibration) -> tuple[float, float, float]:
    """Corr, NRMSE and floor over the quarter of a cell that is stored."""
    with np.load(FOLDER / f"{name}.npz") as file:
        reference, probe_A = file["images"][0], file["probe_A"]
        floor = float(np.sqrt(np.mean(file["standard_error"][0] ** 2)) / np.ptp(reference))
    specimen = STO.build(0)
    metal = specimen.positions_A[specimen.atomic_numbers == 38, :2]
    corner = metal[np.argmin(np.hypot(*(metal - 30.0).T))]
    annulus = (calibration.detector_mrad[0], calibration.detector_mrad[1])
    renderer = Renderer(SETTINGS[name], {"HAADF": annulus}, calibrations={"HAADF": calibration})
    image = renderer.render(specimen, 0.1 * (corner + probe_A)).channels["HAADF"]
    return (*compare(image, reference), floor)


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    for level in ("table", "power"):
        for name, (corr, nrmse, floor, *_) in mos2(level).items():
            print(f"MoS2 80 kV {name} mrad, {level}: corr {corr:.5f}, NRMSE {nrmse:.2%} (floor {floor:.2%})")
    for name, optics in SETTINGS.items():
        with np.load(FOLDER / f"{name}.npz") as file:
            annulus = (float(file["inner_mrad"][0]), float(file["outer_mrad"][0]))
        with tempfile.TemporaryDirectory() as empty:
            began = time.process_time()
            calibration = calibrate(STO.build(0), optics, annulus, Path(empty))
            seconds = time.process_time() - began
        corr, nrmse, floor = srtio3(name, calibration)
        print(
            f"SrTiO3 5 nm, {name.removeprefix('srtio3_')}, {annulus[0]:g}-{annulus[1]:g} mrad, calibrated in "
            f"{seconds:.0f} CPU s: corr {corr:.5f}, NRMSE {nrmse:.2%} (floor {floor:.2%})"
        )
        if write:
            (FOLDER / f"{name}_calibration.json").write_text(calibration.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main()
