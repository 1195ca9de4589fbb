"""What the learned metric shows of a place that is damaged evenly, over what is true there: the metric's gain.

    python -m tests.benchmarks.damage_gain [--seeds 100 101 102] [--metric learned]

Ladders as sessions take them: one place of a simulated specimen, 4 x 4 nm in 160 x 160 pixels, scanned six times, each
frame compared with the first, the rim left out. Every element breaks, radiolysis displaces or removes. True: share of
the matter (weighed by scattering power) in the same patches that was broken between the middles of the two exposures,
as the simulator has it. Gain of a ladder: least squares of shown on true; the standard deviation of its logarithm over
all ladders is what a session's fit is told (``GAIN_SD`` of the meter).
"""

from __future__ import annotations

import argparse

import numpy as np

from aecontrol.perception.damage.meter import Meter, build_meter
from aecontrol.perception.damage.reading import PATCH_PX
from aecontrol.registry import build_part
from aecontrol.true_damage import SCATTERING_POWER
from aecontrol.types import ScanRegion
from simulators.setup import ColumnSetup

SPECIMENS = {
    "mos2": {"kind": "mos2", "size_nm": (8.0, 8.0)},
    "ws2": {"kind": "ws2", "size_nm": (8.0, 8.0)},
    "hbn": {"kind": "hbn", "size_nm": (8.0, 8.0)},
    "graphene": {"kind": "graphene", "size_nm": (8.0, 8.0)},
    "srtio3": {"kind": "srtio3", "size_nm": (8.0, 8.0), "thickness_nm": 5.0},
    "catio3": {"kind": "catio3", "size_nm": (8.0, 8.0), "thickness_nm": 5.0},
    "llzo": {"kind": "llzo", "size_nm": (8.0, 8.0), "thickness_nm": 5.2},
}
ELEMENTS = ("Mo", "W", "S", "B", "N", "C", "Sr", "Ti", "Ca", "O", "Li", "La", "Zr")
FOV_NM, PIXELS, FRAMES = 4.0, 160, 6


def ladder(kind: str, counts: float, leaving: float, seed: int, meter: Meter) -> tuple[list[float], list[float]]:
    """Shown and true damage of every frame against the first."""
    setup = ColumnSetup(
        specimen={**SPECIMENS[kind]},
        beam_current_pA=10.0,
        optics={"voltage_kV": 80.0, "semi_angle_mrad": 30.0, "source_fwhm_nm": 0.08},
        damage={
            "displacement_threshold_eV": {},
            "excitation_barn": {},
            "critical_fluence_e_per_A2": dict.fromkeys(ELEMENTS, 1.0),
            "radiolysis_removes": leaving,
        },
    )
    place = ScanRegion(center_nm=(4.0, 4.0), fov_nm=(FOV_NM, FOV_NM), shape=(PIXELS, PIXELS), dwell_time_s=1e-5)
    peak = float(np.quantile(setup.column(seed).noiseless(place)["HAADF"], 0.98))
    per_pixel = counts / peak
    dwell = per_pixel / (10e-12 / 1.602176634e-19)
    fluence = per_pixel / (100.0 * FOV_NM**2 / PIXELS**2)
    damage = setup.damage.model_copy(update={"critical_fluence_e_per_A2": dict.fromkeys(ELEMENTS, 4.0 * fluence)})
    column = setup.model_copy(update={"damage": damage}).column(seed)
    region = place.model_copy(update={"dwell_time_s": dwell})
    frames, broken = [], []
    born = column.snapshot()
    rim = FOV_NM / PIXELS * PATCH_PX
    away = np.abs(born.positions_A[:, :2] / 10.0 - 4.0).max(axis=1)
    inside = (away < FOV_NM / 2 - rim) & born.alive
    weight = born.atomic_numbers[inside] ** SCATTERING_POWER
    for shot in range(FRAMES):
        frames.append(column.fire(shot, region).channels["HAADF"])
        now = column.snapshot()
        gone = ~now.alive | (np.abs(now.positions_A - born.positions_A).max(axis=1) > 0.0)
        broken.append(float((weight * gone[inside]).sum() / weight.sum()))
    middle = [0.5 * (a + b) for a, b in zip([0.0, *broken], broken, strict=False)]
    shown, true = [], []
    for later in range(1, FRAMES):
        reading = meter.read(frames[0], frames[later], (FOV_NM / PIXELS, FOV_NM / PIXELS), 0.1)
        inner = np.zeros_like(reading.valid)
        inner[1:-1, 1:-1] = reading.valid[1:-1, 1:-1]
        if not reading.reason and inner.any():
            shown.append(float(reading.score[inner].mean()))
            true.append(middle[later] - middle[0])
    return shown, true


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--metric", default="learned")
    parser.add_argument("--specimens", nargs="+", default=list(SPECIMENS))
    parser.add_argument("--counts", type=float, nargs="+", default=[20.0, 100.0])
    o = parser.parse_args()
    build_part("specimen", {"kind": "mos2"}, "specimen")  # fails early where nothing is installed
    meter, gains = build_meter(o.metric, "cpu"), []
    for kind in o.specimens:
        for counts in o.counts:
            for leaving in (0.0, 0.5, 1.0):
                for seed in o.seeds:
                    shown, true = ladder(kind, counts, leaving, seed, meter)
                    gain = float(np.dot(shown, true) / np.dot(true, true)) if shown else float("nan")
                    gains.append((kind, gain))
                    pairs = "  ".join(f"{a:.3f}/{b:.3f}" for a, b in zip(shown, true, strict=True))
                    print(
                        f"{kind} {counts:g} counts, {leaving:g} leave, seed {seed}: gain {gain:.2f}  {pairs}",
                        flush=True,
                    )
    for kind in (*o.specimens, "all"):
        these = np.log([gain for name, gain in gains if kind in (name, "all") and gain > 0.0])
        print(
            f"{kind}: median gain {np.exp(np.median(these)):.3f}, sd of its logarithm {these.std():.3f} ({len(these)})"
        )


if __name__ == "__main__":
    main()
