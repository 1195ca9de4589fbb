"""Seconds to render 512 x 512 pixels of 20 000 atoms; bar: 0.3 s on one idle core. Run it with OMP_NUM_THREADS=1."""

from __future__ import annotations

import statistics
import time

import numpy as np

from aecontrol.types import ScanRegion
from simulators.optics import Optics
from simulators.render import Renderer
from simulators.scan import ScanModel
from simulators.specimens.sheets import Mos2

BAR_S = 0.3
REPEATS = 15


def main() -> None:
    """Print the median over fresh scan positions, in wall and processor seconds."""
    side_nm = 23.4  # about 20 000 atoms of MoS2 in the field
    specimen = Mos2(size_nm=(side_nm, side_nm)).build(0)
    inside = np.all((specimen.positions_A[:, :2] >= 0) & (specimen.positions_A[:, :2] < 10 * side_nm), axis=1)
    region = ScanRegion(center_nm=(side_nm / 2,) * 2, fov_nm=(side_nm,) * 2, shape=(512, 512), dwell_time_s=1e-6)
    renderer = Renderer(Optics())
    wall, cpu = [], []
    for repeat in range(REPEATS + 1):
        probe = ScanModel().positions_nm(region, 0.0, 0, repeat)
        began = time.perf_counter(), time.process_time()
        renderer.render(specimen, probe)
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    atoms = int(np.count_nonzero(inside & specimen.alive))
    print(f"512 x 512 pixels, {atoms} atoms in the field, {int(specimen.alive.sum())} with its margin")
    print(f"first frame (kernels are made): {wall[0]:.3f} s wall, {cpu[0]:.3f} s CPU")
    print(
        f"then: median {statistics.median(wall[1:]):.3f} s wall, {statistics.median(cpu[1:]):.3f} s CPU; bar {BAR_S} s"
    )


if __name__ == "__main__":
    main()
