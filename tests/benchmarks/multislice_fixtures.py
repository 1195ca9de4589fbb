"""Makes the multislice images that tests compare with: ``python -m tests.benchmarks.multislice_fixtures [NAME]``.

Frozen phonons, no source, no aberrations, abTEM. Set OMP_NUM_THREADS=1.
Each file in tests/data/multislice holds, for the box of atoms ``positions_A`` [n, 3], ``numbers`` [n], ``rms_u_A`` [n]
that repeats every ``extent_A`` in x and y: ``probe_A`` [m, 2]; ``inner_mrad``, ``outer_mrad`` [annuli]; ``images``
[annuli, m], the fraction of the beam; ``standard_error`` [annuli, m] over phonon configurations; ``halves``
[2, annuli, m], the means of the even and of the odd configurations; and ``about``, how it was made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from simulators.elements import thermal_rms_A
from simulators.multislice import Block, largest_angle_mrad, scan_block
from simulators.optics import Optics
from simulators.streams import stream

FOLDER = Path(__file__).parents[1] / "data" / "multislice"
SEED = 7
HAADF = [(86.0, 200.0), (60.0, 200.0)]
MOS2_CONFIGURATIONS = 72
A_MOS2, A_STO = 3.16, 3.905
STO_CELLS, STO_LAYERS, STO_STEPS, STO_CONFIGURATIONS = 6, 13, 16, 32


def mos2() -> None:
    """Line Mo, 2S, hollow, Mo, 1S, hollow, Mo through a single upper-S vacancy in 3.2 x 3.3 nm of MoS2."""
    from ase.build import mx2
    from ase.build.supercells import make_supercell

    cell = mx2("MoS2", "2H", a=A_MOS2, thickness=3.13)
    atoms = make_supercell(cell, [[1, 0, 0], [1, 2, 0], [0, 0, 1]], wrap=True) * (10, 6, 1)
    width, height = atoms.cell[0, 0], atoms.cell[1, 1]
    where = atoms.positions
    metal = where[atoms.numbers == 42]
    first = metal[np.argmin(np.hypot(*(metal[:, :2] - (width / 2, height / 2)).T))]
    gap = A_MOS2 / np.sqrt(3.0)
    up = 1.0 if (np.hypot(*(where[:, :2] - first[:2] - (0.0, gap)).T) < 0.1).any() else -1.0  # where the sulphur lies
    vacant = np.array([first[0], first[1] + 4 * up * gap])
    column = np.flatnonzero(np.hypot(*(where[:, :2] - vacant).T) < 0.1)
    assert len(column) == 2
    assert set(atoms.numbers[column]) == {16}
    keep = np.arange(len(atoms)) != column[np.argmin(where[column, 2])]  # the beam meets the lower z first
    line = first[1] + up * np.linspace(-1.0, 12.0, 131)
    block = Block(where[keep], atoms.numbers[keep], thermal_rms_A(atoms.numbers[keep]), (width, height))
    probe = np.column_stack([np.full(len(line), first[0]), line])
    optics = Optics(voltage_kV=80.0, semi_angle_mrad=30.0, source_fwhm_nm=0.0)
    seen = scan_block(block, optics, named(HAADF), probe, MOS2_CONFIGURATIONS, SEED)
    write("mos2_80kV", block, optics, HAADF, probe, seen)


def strontium_titanate(voltage_kV: float, semi_angle_mrad: float, annuli: list[tuple[float, float]]) -> None:
    """A quarter of the unit cell of SrTiO3 [001], 13 cells (5.08 nm) thick, in steps of 0.244 angstrom."""
    basis = A_STO * np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    cells = A_STO * np.stack(np.mgrid[:STO_CELLS, :STO_CELLS, :STO_LAYERS], axis=-1).reshape(-1, 1, 3)
    where = (cells + basis).reshape(-1, 3)
    numbers = np.tile([38, 22, 8, 8, 8], STO_CELLS**2 * STO_LAYERS)
    block = Block(where, numbers, thermal_rms_A(numbers), (STO_CELLS * A_STO,) * 2)
    n = STO_STEPS // 2 + 1
    x, y = (steps.ravel() for steps in np.meshgrid(np.arange(n), np.arange(n)))
    below = np.flatnonzero(x <= y)  # the rest follows from the mirror at x = y
    mirrored = np.searchsorted(below, np.maximum(x, y) * n + np.minimum(x, y))
    steps = np.column_stack([x, y]) * (A_STO / STO_STEPS)
    optics = Optics(voltage_kV=voltage_kV, semi_angle_mrad=semi_angle_mrad, source_fwhm_nm=0.0)
    seen = []
    for i in range(STO_CONFIGURATIONS):  # every time in other cells: all steps in one would share its columns' noise
        cells = A_STO * stream(SEED, "cells", i).integers(0, STO_CELLS, (len(below), 2))
        seen.append(scan_block(block, optics, named(annuli), steps[below] + cells, 1, SEED, first=i)[0][:, mirrored])
    write(f"srtio3_{voltage_kV:g}kV", block, optics, annuli, steps, np.stack(seen))


def named(annuli: list[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The annuli by their angles."""
    return {f"{inner:g}-{outer:g}": (inner, outer) for inner, outer in annuli}


def write(
    name: str, block: Block, optics: Optics, annuli: list[tuple[float, float]], probe_A: np.ndarray, seen: np.ndarray
) -> None:
    """Store what was ``seen`` [configurations, annuli, positions] at ``probe_A``."""
    import abtem

    error = seen.std(axis=0, ddof=1) / np.sqrt(len(seen))
    about = {
        "command": f"python -m tests.benchmarks.multislice_fixtures {name}",
        "abtem": abtem.__version__,
        "optics": optics.model_dump(mode="json"),
        "phonon_configurations": len(seen),
        "seed": SEED,
        "grid": block.pixels(optics.voltage_kV, largest_angle_mrad(optics, named(annuli))),
        "slices": block.layers,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        positions_A=block.positions_A,
        numbers=block.numbers.astype(np.int16),
        rms_u_A=block.rms_u_A,
        extent_A=np.array(block.extent_A),
        probe_A=probe_A,
        inner_mrad=np.array([inner for inner, _ in annuli]),
        outer_mrad=np.array([outer for _, outer in annuli]),
        images=seen.mean(axis=0),
        standard_error=error,
        halves=np.stack([seen[::2].mean(axis=0), seen[1::2].mean(axis=0)]),
        about=np.array(json.dumps(about)),
    )
    print(f"{name}: brightest {seen.mean(axis=0).max(axis=1)}, mean standard error {error.mean(axis=1)}")


MADE: dict[str, Callable[[], None]] = {
    "mos2_80kV": mos2,
    "srtio3_80kV": lambda: strontium_titanate(80.0, 30.0, HAADF),
    "srtio3_200kV": lambda: strontium_titanate(200.0, 21.4, [(70.0, 110.0)]),
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or MADE:
        MADE[wanted]()
