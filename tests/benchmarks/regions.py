"""Regions found in specimens that training never saw, and in real images; and the time it takes.

    python tests/benchmarks/regions.py [--weights FILE] [--seeds N] [--data FOLDER --out FOLDER]

Specimens are built atom by atom and rendered with a probe; training scenes are sums of Gaussians and share no code with
them. Particles are judged by pixels. Boundaries and walls are judged as lines, within 0.5 nm: precision is the share of
the found middle pixels that lie that close to a true line, recall the share of the true line that lies that close to a
found region. Walls are read from columns that ``AtomFinder`` found (``--atoms`` for other weights), and from the true
columns. ``--data``: folder with the real images named below; their overlays go to ``--out``. They have no labels.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from aecontrol.canvas import draw_png
from aecontrol.files import read_image
from aecontrol.perception.finder import AtomFinder
from aecontrol.perception.regions import RegionFinder
from aecontrol.region_figure import draw_regions
from simulators.column import SimulatedColumn
from simulators.scan import nominal_positions_nm
from simulators.setup import ColumnSetup
from simulators.simulation import View

NEAR_NM = 0.5
LINE_NM = 0.05
PARTICLES = {"kind": "nanoparticle", "size_nm": [17, 17], "n_particles": 5, "diameter_nm": [1.5, 5]}
WALLS = {"kind": "ferroelectric", "size_nm": [16, 16], "thickness_nm": 4.0, "domain_width_nm": 6.0}
SHEET = {"kind": "graphene", "size_nm": [12, 12]}
SPECIMENS: dict[str, tuple[str, dict[str, Any], float, int, tuple[float, ...]]] = {
    "Au on C": ("particle", PARTICLES, 14, 160, (1e-7, 1e-5)),
    "CeO2 on C": ("particle", {**PARTICLES, "crystal": "CeO2"}, 14, 160, (1e-7, 1e-5)),
    "Pt on C, 6 nm film": ("particle", {**PARTICLES, "crystal": "Pt", "film_nm": 6.0}, 14, 300, (1e-7, 1e-5)),
    "graphene, 10 deg": ("boundary", {**SHEET, "boundary": {"misorientation_deg": 10}}, 10, 320, (1e-5, 1e-4)),
    "graphene, 21.8 deg": ("boundary", {**SHEET, "boundary": {"misorientation_deg": 21.8}}, 10, 320, (1e-5, 1e-4)),
    "graphene, perfect": ("boundary", SHEET, 10, 320, (1e-5, 1e-4)),
    "SrTiO3, perfect": ("boundary", {"kind": "srtio3", "size_nm": [12, 12]}, 10, 320, (1e-7, 1e-5)),
    "BiFeO3, 180 deg": ("wall", {**WALLS, "pattern": "stripes_180"}, 14, 466, (1e-6, 1e-5)),
    "BiFeO3, 109 deg": ("wall", {**WALLS, "pattern": "stripes_109"}, 14, 466, (1e-6, 1e-5)),
    "PbTiO3, 180 deg": ("wall", {**WALLS, "crystal": "PbTiO3", "pattern": "stripes_180"}, 14, 466, (1e-6, 1e-5)),
    "SrTiO3, no wall": ("wall", {"kind": "srtio3", "size_nm": [16, 16]}, 14, 466, (1e-6, 1e-5)),
}
"""Name -> class looked for, specimen, field of view (nm), pixels a side, dwell times (s; 30 pA)."""
REAL = {
    "Au_NP_Velox_HAADF.emd": None,
    "graphene_flower_HRTEM.tif": 0.024,  # not stated in the file: 0.246 nm between hexagons are 10.2 px
    "PTO_SRO_supercrystal_HAADF.hspy": None,
}

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TrueColumns:
    """The columns of a specimen in px of a frame, without errors."""

    x_px: NDArray[np.float64]
    y_px: NDArray[np.float64]
    intensity: NDArray[np.float64]


def true_columns(column: SimulatedColumn, side_nm: float, pixel_nm: float) -> TrueColumns:
    """Heavy columns inside the central frame; intensity by the heaviest element."""
    specimen = column.snapshot()
    heavy = specimen.atomic_numbers > 10
    _, first = np.unique(specimen.column_id[heavy], return_index=True)
    at = 0.1 * specimen.positions_A[heavy][first, :2] - (np.asarray(specimen.size_nm) - side_nm) / 2
    inside = np.all((at > 0) & (at < side_nm), axis=1)
    numbers = specimen.atomic_numbers[heavy][first][inside].astype(np.float64)
    return TrueColumns(at[inside, 0] / pixel_nm, at[inside, 1] / pixel_nm, numbers**1.7)


def line_rates(found: Mask, true: Mask, pixel_nm: float) -> NDArray[np.float64]:
    """Pixels: found near a true line, found, of the true line near what was found, of the true line."""
    from skimage.morphology import skeletonize

    middle = skeletonize(found)
    to_true = distance_transform_edt(~true) if true.any() else np.full(true.shape, np.inf)
    to_found = distance_transform_edt(~middle) if middle.any() else np.full(true.shape, np.inf)
    near = NEAR_NM / pixel_nm
    return np.array([(middle & (to_true <= near)).sum(), middle.sum(), (true & (to_found <= near)).sum(), true.sum()])


def rates(finder: RegionFinder, atoms: AtomFinder, name: str, dwell_s: float, seeds: int) -> list[str]:
    """One line of the table, two for walls."""
    kind, specimen, side, n, _ = SPECIMENS[name]
    counts: dict[str, Any] = {}
    for seed in range(100, 100 + seeds):
        turned = {} if kind == "particle" else {"rotation_deg": float(seed * 37 % 90)}
        column = ColumnSetup.model_validate({"specimen": {**specimen, **turned}}).column(seed)
        region = View(fov_nm=(side, side), shape=(n, n), dwell_time_s=dwell_s).region(column.field_nm)
        image = column.preview(seed, region)["HAADF"]
        pixel = side / n
        labels = column.snapshot().labels(nominal_positions_nm(region))
        sources: dict[str, Any] = {"": None}
        if kind == "wall":
            sources = {
                "found columns": atoms.find(image, (pixel, pixel)),
                "true columns": true_columns(column, side, pixel),
            }
        for source, columns in sources.items():
            got = finder.find(image, (pixel, pixel), columns)
            found = got.labels(kind) > 0 if kind in got.maps else np.zeros((n, n), dtype=bool)
            if kind == "particle":
                true = labels["particle"] >= 0
                both = (found & true).sum()
                one = np.array([both, found.sum(), both, true.sum()])
            else:
                distance = labels.get(f"distance_to_{kind}_nm", np.full((n, n), np.inf))
                one = line_rates(found, np.asarray(distance) < LINE_NM, pixel)
            counts[source] = counts.get(source, 0) + one
    return [_line(f"{name} {source}", dwell_s, *values) for source, values in counts.items()]


def _line(name: str, dwell_s: float, right: float, found: float, met: float, there: float) -> str:
    precision, recall = right / max(found, 1), met / max(there, 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    if not there:
        return f"{name:34s} {1e6 * dwell_s:7.1f}  nothing is there; found {found:.0f} px"
    return f"{name:34s} {1e6 * dwell_s:7.1f} {precision:10.3f} {recall:7.3f} {f1:7.3f}"


def seconds(finder: RegionFinder) -> float:
    """CPU seconds of one thread for 512 x 512 px of 0.03 nm, particles and boundaries; median of 9."""
    import torch

    torch.set_num_threads(1)
    image = np.random.default_rng(0).poisson(5, (512, 512))
    times = []
    for _ in range(10):
        start = time.process_time()
        finder.find(image, (0.03, 0.03))
        times.append(time.process_time() - start)
    return float(np.median(times[1:]))


def main() -> None:
    """Print the tables; draw the overlays of the real images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--atoms", type=Path, help="weights of the atom finder")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("region_overlays"))
    arguments = parser.parse_args()
    finder, atoms = RegionFinder(arguments.weights), AtomFinder(arguments.atoms)
    print(f"{'specimen':34s} {'us/px':>7s} {'precision':>10s} {'recall':>7s} {'F1':>7s}")
    for name, (*_, dwells) in SPECIMENS.items():
        for dwell_s in dwells:
            print("\n".join(rates(finder, atoms, name, dwell_s, arguments.seeds)), flush=True)
    print(f"512 x 512 px of 0.03 nm: {seconds(finder):.3f} CPU s on one thread")
    for name, pixel in REAL.items() if arguments.data else ():
        path = next(arguments.data.rglob(name))
        picture = read_image(path)
        size = (pixel or picture.pixel_size_nm or 0.0,) * 2
        columns = atoms.find(picture.array, size)
        found = finder.find(picture.array, size, columns)
        print(f"{name}: {len(columns)} columns; {found.table()}; not judged: {dict(found.not_judged)}")
        arguments.out.mkdir(parents=True, exist_ok=True)
        png = draw_png(lambda picture=picture, found=found: draw_regions(picture.array, found))
        if isinstance(png, bytes):
            (arguments.out / f"{path.stem}.png").write_bytes(png)


if __name__ == "__main__":
    main()
