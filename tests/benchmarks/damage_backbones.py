"""How well features of pretrained networks, and of networks that have learnt nothing, tell where a specimen is damaged;
and whether one dense pass over a frame does as well as one pass for each patch.

    python -m tests.benchmarks.damage_backbones [--weights random-control] [--resnet18 FILE] [--seeds 101 102 103]
    python -m tests.benchmarks.damage_backbones --choose --seeds 1 2 3

Each cell: area under the ROC curve of damaged patches (5 % of their matter or more) against clear ones / share of the
damaged patches above 99 % of the patches of an undamaged repeat that differs by the same nuisances; means over seeds
and three lattices. 'nb': the map averaged over 3 x 3 patches with binomial weights. Differences are paired by frame,
with the 95 % interval of a bootstrap over frames. ``--choose`` prints all layers, sizes and distances of dense passes;
what is reported was chosen so, on seeds below 100. ``--resnet18``: a file of ImageNet weights, which no package has.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.damage_frames import Condition, Frames, frames

LATTICES = ("llzo", "srtio3", "mos2")
DAMAGED = 0.05
CONDITIONS = {
    "5 counts": Condition(5, 0.1),
    "20": Condition(20, 0.1),
    "20, all": Condition(20, 0.3, 0.1, 2.0, 0.1),
    "20, isolated": Condition(20, 0.1, isolated=True),
}
AS_PUBLISHED = {"layer": 4}
CENTRED = {"layer": 4, "centred": True}
ENLARGED = {"layer": 4, "input_size": 64, "bfloat16": True}
EARLY = {"layer": 2, "distance": "whitened", "bfloat16": True}
FAST = {"layer": 2, "distance": "pointwise", "bfloat16": True}
SHALLOW = {"layer": 1, "input_size": 40, "bfloat16": True}
"""What suits networks that have learnt nothing best."""
CHOSEN = {"layer": 3, "input_size": 40, "distance": "pointwise", "bfloat16": True}
RESAMPLES = 4000

Floats = NDArray[np.float64]


def variants(choose: bool, weights: str, resnet: Path | None) -> Iterator[dict]:
    """Settings of the metrics compared: as published, the usual choices, and those found best on other seeds; of the
    control mostly the dense passes."""
    control = weights == "random-control"
    for backbone in ("efficientnet_lite0", *(["resnet18"] if resnet or control else [])):
        which = {"backbone": backbone, "weights": weights}
        if choose:
            for size, layer, distance in product((20, 40), (0, 1, 2, 3, 4), ("cosine", "whitened", "pointwise")):
                how = {"input_size": size, "layer": layer, "distance": distance}
                yield {**which, **how, "dense": True, "bfloat16": True}
        else:
            for how in (AS_PUBLISHED, CHOSEN, FAST, SHALLOW, EARLY, CENTRED, ENLARGED):
                passes = (True,) if control and how is not AS_PUBLISHED else (False, True)
                yield from ({**which, **how, "dense": dense} for dense in passes)


@cache
def drawn(lattice: str, seed: int, condition: Condition) -> Frames:
    """A pair, kept for all metrics."""
    return frames(lattice, seed, condition)


def neighbours(scores: Floats) -> Floats:
    """The map averaged over 3 x 3 patches."""
    from scipy.ndimage import convolve1d

    for axis in (0, 1):
        scores = convolve1d(scores, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    return scores


def power(pair: Frames, damaged: Floats, repeat: Floats) -> tuple[float, float]:
    """Area under the curve, and detection at 1 % of false alarms."""
    from sklearn.metrics import roc_auc_score

    hit = pair.fraction >= DAMAGED
    counted = hit | pair.clear
    area = float(roc_auc_score(hit[counted], damaged[counted]))
    return area, float((damaged[hit] > np.quantile(repeat, 0.99)).mean())


def measured(settings: dict, seeds: list[int], path: Path | None) -> tuple[str, dict[str, Floats]]:
    """Label of a metric, and for it and its average over neighbours: power [conditions, pairs, 2]."""
    from aecontrol.perception.damage.features import FeatureSettings, build_metric

    metric = build_metric(FeatureSettings(**settings), path=path)
    found: dict[str, list] = {"": [], " nb": []}
    for condition in CONDITIONS.values():
        rows: dict[str, list] = {"": [], " nb": []}
        for seed in seeds:
            for lattice in LATTICES:
                pair = drawn(lattice, seed, condition)
                maps = metric(pair.first, pair.later), metric(pair.first, pair.repeat)
                rows[""].append(power(pair, *maps))
                rows[" nb"].append(power(pair, *(neighbours(m) for m in maps)))
        for name, row in rows.items():
            found[name].append(row)
    return metric.settings.label, {name: np.array(rows) for name, rows in found.items()}


def interval(differences: Floats) -> tuple[float, float, float]:
    """Mean of paired differences [n] and its 95 % bootstrap interval."""
    means = np.random.default_rng(0).choice(differences, (RESAMPLES, len(differences))).mean(axis=1)
    return float(differences.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def main() -> None:
    """Print the table, each line when it is known."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--weights", choices=("imagenet", "random-control"), default="imagenet")
    parser.add_argument("--resnet18", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"seeds {arguments.seeds}, lattices {LATTICES}\n{'':<78}"
        + "".join(f"{name:>16}" for name in (*CONDITIONS, "mean"))
    )
    last: tuple[dict, dict[str, Floats]] = ({}, {})
    for settings in variants(arguments.choose, arguments.weights, arguments.resnet18):
        path = arguments.resnet18 if settings["backbone"] == "resnet18" else None
        label, found = measured(settings, arguments.seeds, path)
        for name, table in found.items():
            cells = [*table.mean(axis=1), table.mean(axis=(0, 1))]
            print(f"{label + name:<78}" + "".join(f"{a:>10.3f} /{d:4.2f}" for a, d in cells), flush=True)
        if last[0] == {**settings, "dense": False}:
            for k, what in enumerate(("AUC", "detection")):
                gain = found[""][..., k].mean(axis=0) - last[1][""][..., k].mean(axis=0)
                print("    dense - by patch, {}: {:+.3f} [{:+.3f}, {:+.3f}]".format(what, *interval(gain)), flush=True)
        last = (settings, found)


if __name__ == "__main__":
    main()
