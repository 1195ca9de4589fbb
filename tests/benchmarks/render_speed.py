"""How fast images are made. Run it on an idle machine with OMP_NUM_THREADS=1; figures are processor seconds.

python tests/benchmarks/render_speed.py            512 x 512 of 20 000 atoms (bars 60 ms noiseless, 90 ms with noise),
                                                   4096 x 4096 of 10^6 atoms (bar 20 s), memory of that world (bar 1 GB)
python tests/benchmarks/render_speed.py --prism    256 x 256 with noise against abTEM's PRISM (bar: 5 000 times)
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import resource
import statistics
import time

import numpy as np

from aecontrol.types import ScanRegion
from simulators.column import SimulatedColumn
from simulators.damage import Damage
from simulators.detector import Detector
from simulators.optics import Optics
from simulators.render import Renderer
from simulators.scan import ScanModel
from simulators.specimens.sheets import Mos2, SulphurVacancies
from simulators.streams import stream

REPEATS = 15
COUNTS = 5.0
"""Mean counts per pixel where noise is added."""
PRISM_GRID = (600, 560)
"""Points without large prime factors: abTEM is 3.5 times slower on the grid that its sampling would give."""


def square(side_nm: float, pixels: int) -> ScanRegion:
    """A frame over a whole field."""
    return ScanRegion(
        center_nm=(side_nm / 2, side_nm / 2), fov_nm=(side_nm, side_nm), shape=(pixels, pixels), dwell_time_s=1e-6
    )


def timed(renderer: Renderer, specimen: object, region: ScanRegion, noise: bool, repeats: int) -> list[float]:
    """Processor seconds of each frame, at fresh scan positions and with fresh noise; the first one makes kernels."""
    seconds = []
    detector = Detector(dark_counts=0.0)
    for repeat in range(repeats + 1):
        probe = ScanModel().positions_nm(region, 0.0, 0, repeat)
        random = stream(0, "noise", repeat)
        began = time.process_time()
        image = renderer.render(specimen, probe).channels["HAADF"]  # type: ignore[arg-type]
        if noise:
            detector.read(image, COUNTS / float(image.mean()), random)
        seconds.append(time.process_time() - began)
    return seconds


def small_frame() -> None:
    """512 x 512 over 24.7 nm, two elements."""
    side_nm = 24.7
    specimen = Mos2(size_nm=(side_nm, side_nm)).build(0)
    inside = np.all((specimen.positions_A[:, :2] >= 0) & (specimen.positions_A[:, :2] < 10 * side_nm), axis=1)
    renderer, region = Renderer(Optics()), square(side_nm, 512)
    for noise, bar_ms in ((False, 60), (True, 90)):
        first, *rest = timed(renderer, specimen, region, noise, REPEATS)
        what = f"with Poisson noise, {COUNTS:g} counts a pixel" if noise else "noiseless"
        print(
            f"512 x 512, {np.count_nonzero(inside & specimen.alive)} atoms in the field, {what}: "
            f"median {1e3 * statistics.median(rest):.1f} ms (first {1e3 * first:.0f} ms); bar {bar_ms} ms"
        )


def large_world() -> None:
    """4096 x 4096 over 10^6 atoms, and the memory of a column that holds them."""
    side_nm = 171.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    column = SimulatedColumn(
        Mos2(size_nm=(side_nm, side_nm), vacancies=SulphurVacancies(n_clusters=0)),
        Optics(), ScanModel(), {"HAADF": Detector()}, Damage(), 30.0, 0,
    )  # fmt: skip
    specimen = column.snapshot()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"world of {len(specimen)} sites: peak {(memory - before) / 1024:.0f} MB above what the interpreter had "
        f"({before / 1024:.0f} MB); bar 1000 MB"
    )
    small = ScanRegion(center_nm=(80.0, 80.0), fov_nm=(5.0, 5.0), shape=(160, 160), dwell_time_s=1.5e-5)
    column.fire(0, small)
    began = time.process_time()
    column.fire(1, small)
    print(f"sub-scan of 160 x 160 in it, exposed, damaged and read: {time.process_time() - began:.3f} s")
    seconds = timed(Renderer(Optics()), specimen, square(side_nm, 4096), True, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"4096 x 4096 of {int(specimen.alive.sum())} atoms with noise: {seconds[-1]:.1f} s; bar 20 s; "
        f"peak memory of the process {peak / 1024:.0f} MB"
    )


def against_prism() -> None:
    """The same MoS2 monolayer, 4.1 x 3.9 nm, through abTEM's PRISM (interpolation 4) and through this renderer."""
    import abtem
    import ase.build

    abtem.config.set({"diagnostics.progress_bar": False})
    cell = abtem.orthogonalize_cell(ase.build.mx2("MoS2", a=3.18, thickness=3.19, vacuum=2.0)) * (13, 7, 1)
    potential = abtem.Potential(cell, gpts=PRISM_GRID, slice_thickness=1.0)
    extent = tuple(float(side) for side in np.diag(cell.cell)[:2])
    scan = abtem.GridScan(start=(0, 0), end=extent, gpts=(256, 256))
    began = time.process_time()
    waves = abtem.SMatrix(potential=potential, energy=80e3, semiangle_cutoff=30.0, interpolation=4)
    theirs = np.asarray(waves.scan(scan=scan, detectors=abtem.AnnularDetector(86, 200)).compute().array)
    prism_s = time.process_time() - began
    side_nm = extent[1] / 10
    specimen = Mos2(size_nm=(side_nm, side_nm), vacancies=SulphurVacancies(background_fraction=0, n_clusters=0)).build(
        0
    )
    _, *rest = timed(Renderer(Optics(source_fwhm_nm=0.0)), specimen, square(side_nm, 256), True, REPEATS)
    ours_s = statistics.median(rest)
    print(f"PRISM, 256 x 256, grid {PRISM_GRID}: {prism_s:.1f} s (mean signal {theirs.mean():.5f})")
    print(f"this renderer, 256 x 256, with Poisson noise at {COUNTS:g} counts: {1e3 * ours_s:.2f} ms")
    print(f"ratio {prism_s / ours_s:.0f}; bar 5000")


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prism", action="store_true")
    if parser.parse_args().prism:
        against_prism()
        return
    small_frame()
    large_world()


if __name__ == "__main__":
    main()
