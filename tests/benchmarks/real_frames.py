"""Real crystals without labels: how many columns are found, and how well they lie on one lattice.

    python tests/benchmarks/real_frames.py [--data FOLDER] [--figures FOLDER]

``--data`` is the folder of public images (default: ``../shared/data`` beside the checkout; some are GPL-3 data and stay
there). None is trained or tuned on. Printed for every frame: columns found, how many a frame full of this crystal would
hold, the share of them on a lattice, missing ones, and for every sublattice the columns, the distance to the next of
the kind and "rms": of the columns per axis from where their neighbours put them (what the finder's errors and the
crystal's own strain make together). Cells can be checked against the material's: SrTiO3 0.3905 nm, PbTiO3/SrRuO3 0.39
to 0.41 nm, MoS2 0.316 nm; a file's own scale may be wrong.

``--figures`` writes one overlay a frame, to be looked at: every wrong mark counts.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from aecontrol.errors import BadInput
from aecontrol.files import read_image
from aecontrol.find import find_atoms
from aecontrol.find_figure import draw_overlay
from aecontrol.find_request import Request, Scale
from aecontrol.perception.scale import estimate
from tests.benchmarks.pictures import small

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
FRAMES = {
    "perovskite/STO_HAADF_TIA_1.ser": "SrTiO3 [001]",
    "perovskite/perovskite_noisy_Acquisition_18.emd": "perovskite, noisy",
    "ferroelectric/PTO_SRO_supercrystal_HAADF.hspy": "PbTiO3/SrRuO3",
    "2d/MoS2_Se_implanted_HAADF.dm3": "MoS2 with Se",
    "2d/MoS2_HAADF_Exp-000-2.npz": "MoS2",
    "2d/MoS2_HAADF_Exp-001-5.npz": "MoS2, contaminated",
}


def judge(path: Path) -> tuple[Any, dict[str, Any]]:
    """The image (mended) and what is found in it, by the file's pixel size, else by an estimated one."""
    picture = read_image(path)
    if picture.pixel_size_nm is None:
        estimated = estimate(picture.array)
        scale = Scale(estimated.pixel_size_nm, "estimated", estimated.how)
    else:
        scale = Scale(picture.pixel_size_nm, "file")
    return find_atoms(picture.array, scale, Request(), "cpu", lambda done, total: None)


def lines(title: str, result: dict[str, Any]) -> list[str]:
    """Rows of the table."""
    unit, fine = result["unit"], (1000.0, "pm") if result["unit"] == "nm" else (1.0, "px")
    crystal, atoms = result["crystal"], result["atoms"]
    on = sum(atom["grain"] >= 0 for atom in atoms) / max(len(atoms), 1)
    cells = [[math.hypot(*vector) for vector in grain["vectors"]] for grain in crystal["grains"]]
    cell = " x ".join(f"{length:.4g}" for length in cells[0]) + f" {unit}" if cells else crystal["note"]
    scale = f"{result['pixel_size_nm']:.5f} nm/px ({result['scale']['source']})"
    rows = [
        f"{title}: {len(atoms)} columns ({_full(result)}), {100 * on:.1f} % of them on {len(cells)} lattice(s), "
        f"{len(result['vacancies'])} missing; cell {cell}; {scale}"
    ]
    for s in crystal["sublattices"]:
        rows.append(
            f"    {s['label']:>3} {s['count']:6d} columns, next of the kind at {s['spacing']:.4g} {unit}, "
            f"rms {s['rms'] * fine[0]:.3g} {fine[1]}, vacant {s['vacant']}, depleted {s['depleted']}"
        )
    return rows


def _full(result: dict[str, Any]) -> str:
    """How many columns the frame would hold, were it full of the first grain's crystal."""
    if not result["crystal"]["grains"]:
        return "no crystal"
    grain = result["crystal"]["grains"][0]
    (a, b), (c, d) = grain["vectors"]
    per_px = result["pixel_size_nm"] if result["unit"] == "nm" else 1.0
    area = math.prod(result["shape"]) * per_px**2
    return f"full: {area * len(grain['basis']) / abs(a * d - b * c):.0f}"


def main() -> None:
    """Judge every frame that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--figures", type=Path)
    arguments = parser.parse_args()
    for name, title in FRAMES.items():
        if not (arguments.data / name).is_file():
            print(f"{title}: NOT JUDGED, {arguments.data / name} is not there")
            continue
        try:
            image, result = judge(arguments.data / name)
        except BadInput as error:
            print(f"{title}: {error}")
            continue
        print("\n".join(lines(title, result)), flush=True)
        if arguments.figures:
            arguments.figures.mkdir(parents=True, exist_ok=True)
            picture = small(draw_overlay(title, image, result))
            (arguments.figures / f"{Path(name).stem}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
