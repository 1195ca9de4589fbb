"""Time of a map of damage from two frames of 512 x 512 px, 25 x 25 patches, beside scikit-image's map of SSIM.

    python tests/benchmarks/damage_speed.py [--device cuda]

Medians of 5 after a warm-up, in turns, so that a busy machine is busy for all alike: CPU seconds of one thread, or on a
GPU seconds of wall clock, frames sent and map fetched. Feature metrics read both frames. What is marked "scaled" was
timed on fewer patches and multiplied. Metrics alone: a reading also registers the frames and draws a null.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SIDE_PX = 512
BY_PATCH_PX = {20: 200, 64: 80, 224: 40}
"""Side of the frame that passes by patch are timed on, by the side that patches are enlarged to."""
REPEATS = 5
BAR = 2.0
"""Times the map of SSIM that the default backbone may take."""

Frame = NDArray[np.float64]
Job = Callable[[Frame, Frame], object]


def frames(seed: int = 0) -> tuple[Frame, Frame]:
    """Two noisy frames of a square lattice, 20 counts at its peaks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    rate = 2 + 18 * (np.cos(x / 4) * np.cos(y / 4)) ** 4
    return rng.poisson(rate).astype(float), rng.poisson(rate).astype(float)


def structural_similarity(first: Frame, later: Frame) -> object:
    """The map that all others are measured by, as scikit-image makes it when nothing is chosen."""
    from skimage.metrics import structural_similarity as ssim

    return ssim(first, later, data_range=float(np.ptp(first)), full=True)


def jobs(device: str) -> dict[str, tuple[Job, int]]:
    """What is timed, by name, and the side of the frames it is timed on."""
    from aecontrol.perception.damage.features import NAMED, FeatureSettings, build_metric
    from aecontrol.perception.damage.learned import LearnedDamage
    from aecontrol.perception.damage.meter import METRICS
    from aecontrol.perception.damage.pair import Pair

    found: dict[str, tuple[Job, int]] = {"SSIM map of scikit-image": (structural_similarity, SIDE_PX)}
    for name, metric in {**METRICS, "learned": LearnedDamage(None, device)}.items():
        found[name] = (lambda a, b, m=metric: m(Pair.of(a, b, np.ones(a.shape, dtype=bool))), SIDE_PX)
    for backbone in ("efficientnet_lite0", "resnet18"):
        # the time does not depend on what a network has learnt
        common = {"backbone": backbone, "weights": "random-control"}
        for layer in (1, 2, 3, 4):
            for bfloat16 in (False, True):
                settings = FeatureSettings(**common, layer=layer, dense=True, bfloat16=bfloat16)
                digits = "bf16" if bfloat16 else "fp32"
                found[f"{backbone} layer {layer} dense {digits}"] = (build_metric(settings, device), SIDE_PX)
        for size, side in BY_PATCH_PX.items():
            by_patch = build_metric(FeatureSettings(**common, input_size=size), device)
            found[f"{backbone} layer 4 by patch, {size} px, scaled"] = (by_patch, side)
    found["'efficientnet_lite0' as it goes by name"] = (build_metric(NAMED["efficientnet_lite0"], device), SIDE_PX)
    return found


def main() -> None:
    """Print the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    clock = time.perf_counter if device == "cuda" else time.process_time
    first, later = frames()
    work = jobs(device)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(REPEATS + 1):
        for name, (job, side) in work.items():
            start = clock()
            job(first[:side, :side], later[:side, :side])
            seconds[name].append((clock() - start) * (SIDE_PX // 20) ** 2 / (side // 20) ** 2)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    base = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:<52} {median:9.4f} s   {median / base:7.2f} x SSIM", flush=True)
    print(f"bar: the default backbone at most {BAR} x SSIM; on a GPU at most 0.005 s")


if __name__ == "__main__":
    main()
