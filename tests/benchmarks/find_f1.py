"""Atom finding on simulated crystals: precision, recall and F1 by material and dose, three of them never trained on.

    python -m tests.benchmarks.find_f1 [--weights FILE] [--seeds 3] [--counts 10 50 200] [--no-refine]

Images come from the microscope simulator's own renderer (probe with aberrations), not from the training scenes; seeds,
turns, tilts, thicknesses and doses are others. ``counts``: expected counts of the weakest kind of column that is to be
found. A find is right when paired one to one with a column within 0.05 nm; a rim of 0.2 nm is left out. Columns of
oxygen alone (SrTiO3, CaTiO3) are neither asked for nor held against a finder.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.perception.finder import AtomFinder
from aecontrol.perception.learn_atoms import match
from aecontrol.types import ScanRegion
from simulators.setup import ColumnSetup
from simulators.specimens import Specimen

Floats = NDArray[np.float64]
SIZE_NM, PIXELS = 8.0, 400
TRAINED = ("mos2", "graphene", "srtio3")
UNSEEN = ("ws2", "hbn", "catio3")


def specimen_table(material: str, rng: np.random.Generator) -> dict[str, Any]:
    """A specimen with some vacancies, turned at random; perovskites with a random tilt of their octahedra."""
    table: dict[str, Any] = {
        "kind": material,
        "size_nm": [SIZE_NM + 2, SIZE_NM + 2],
        "rotation_deg": float(rng.uniform(0, 360)),
    }
    if material in ("mos2", "ws2"):
        table["vacancies"] = {"background_fraction": 0.03, "n_clusters": 0}
    if material in ("srtio3", "catio3"):
        table["thickness_nm"] = float(rng.uniform(4, 8))
    if material == "srtio3":
        table["tilt_deg"] = [float(a) for a in rng.uniform(0, 5, 3)]
    return table


def truth(specimen: Specimen, corner_nm: Floats, fluence: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Columns [n, 2] nm from the frame's corner, their relative brightness [n] and whether they are asked for."""
    alive = specimen.alive
    _, column = np.unique(specimen.column_id[alive], return_inverse=True)
    number = np.bincount(column)
    bright = specimen.atomic_numbers[alive].astype(float) ** 1.7
    xy = np.stack([np.bincount(column, specimen.positions_A[alive, k] / 10) / number for k in (0, 1)], 1) - corner_nm
    heavy = np.bincount(column, specimen.atomic_numbers[alive] != 8) > 0
    return xy, np.bincount(column, bright), heavy


def scene(material: str, counts: float, seed: int) -> tuple[NDArray[np.float32], Floats, NDArray[np.bool_], float]:
    """Image in counts, all columns [n, 2] nm, which are asked for, and the pixel size, nm."""
    rng = np.random.default_rng([seed, 77])
    setup = ColumnSetup.model_validate(
        {
            "specimen": specimen_table(material, rng),
            "optics": {"c1_nm": float(rng.normal(0, 1)), "a1_nm": 1.0, "a1_deg": float(rng.uniform(0, 180))},
        }
    )
    column = setup.column(1000 + seed)
    pixel = SIZE_NM / PIXELS
    center = (SIZE_NM / 2 + 1, SIZE_NM / 2 + 1)
    region = ScanRegion(center_nm=center, fov_nm=(SIZE_NM, SIZE_NM), shape=(PIXELS, PIXELS), dwell_time_s=1e-6)
    (ideal,) = column.noiseless(region).values()
    ideal = np.maximum(np.asarray(ideal, dtype=np.float64), 0)
    xy, bright, asked = truth(column.snapshot(), np.array([1.0, 1.0]), ideal)
    # the renderer's image is linear in the columns: their brightness in pixels of the image by least squares
    integral = _integrals(ideal, xy / pixel, bright)
    weakest = min(integral[asked & (np.round(bright, 3) == kind)].mean() for kind in _kinds(bright[asked]))
    image = rng.poisson(ideal * counts / weakest).astype(np.float32)
    return image, xy, asked, pixel


def _kinds(bright: Floats) -> Floats:
    """Kinds of columns that make at least half a per cent."""
    kinds, number = np.unique(np.round(bright, 3), return_counts=True)
    return kinds[number >= 0.005 * len(bright)]


def _integrals(image: Floats, xy_px: Floats, bright: Floats) -> Floats:
    """Integrated intensity of every column: least squares of the image on Gaussians, one amplitude a kind of column and
    a constant."""
    kinds = np.unique(np.round(bright, 3))
    rows, cols = image.shape
    y, x = np.arange(rows) + 0.5, np.arange(cols) + 0.5
    best: tuple[float, Floats] | None = None
    for sigma in np.arange(1.5, 4.6, 0.25):
        basis = [np.ones(image.size)]
        for kind in kinds:
            at = xy_px[np.round(bright, 3) == kind]
            gx = np.exp(-0.5 * ((x - at[:, :1]) / sigma) ** 2)
            gy = np.exp(-0.5 * ((y - at[:, 1:]) / sigma) ** 2)
            basis.append((gy.T @ gx).ravel() / (2 * math.pi * sigma**2))
        design = np.stack(basis, 1)
        level, rest, *_ = np.linalg.lstsq(design, image.ravel(), rcond=None)
        misfit = float(rest[0]) if len(rest) else float(((design @ level - image.ravel()) ** 2).sum())
        if best is None or misfit < best[0]:
            best = misfit, level[1:]
    assert best is not None
    return np.asarray(best[1][np.searchsorted(kinds, np.round(bright, 3))])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--counts", type=float, nargs="+", default=[10.0, 50.0, 200.0])
    arguments = parser.parse_args()
    finder = AtomFinder(arguments.weights)
    print(f"{'material':>10} {'counts':>6} precision recall     F1  rms pm columns")
    for material in (*TRAINED, *UNSEEN):
        for counts in arguments.counts:
            sums = np.zeros(4)
            for seed in range(arguments.seeds):
                image, xy, asked, pixel = scene(material, counts, seed)
                found = finder.find(image, (pixel, pixel))
                at = np.stack([found.x_px, found.y_px], 1) * pixel
                sums += match(at, xy, np.array([SIZE_NM, SIZE_NM]), 0.05, asked)
            hits, finds, there, squares = sums
            rms = 1e3 * math.sqrt(squares / max(2 * hits, 1))
            star = "*" if material in UNSEEN else " "
            print(
                f"{material + star:>10} {counts:6.0f} {hits / max(finds, 1):9.4f} {hits / there:6.4f} "
                f"{2 * hits / (finds + there):6.4f} {rms:7.1f} {there:7.0f}",
                flush=True,
            )
    print("* never trained on")


if __name__ == "__main__":
    main()
