"""Which metric finds the patches whose atoms the beam removed or displaced, and how well.

    python -m tests.benchmarks.damage_localisation [--seeds 100 101 102 103 104] [--conditions WORD...]
        [--metrics WORD...] [--meters NAME...] [--series] [--patchwise] [--weights FILE] [--csv FILE]

Frames of 400 x 400 pixels of 0.025 nm: 400 patches, three lattices, pairs from the simulator's own renderer (see
``damage_frames``). A patch counts as damaged from 5 % of its matter on, as undamaged when no atom in it or within
0.1 nm of it was touched; what lies between is not judged. "any": every patch in which an atom was hit against all
others. AUC, average precision ("AP") and rank correlation with the damaged fraction over damaged patches ("rank") are
of one frame, then averaged. "found": share of the damaged patches beyond the score that 1 % of the patches of undamaged
repeats exceed, repeats that differ in all else as the damaged frames do, by lattice. "behind": AUC of the best metric
of ours less that of this one, with the 95 % interval of a bootstrap over frames, in pairs.

Then the AUC of each metric by seed. ``--meters``: the share of undamaged patches with p < 0.01 by these meters, with
registration and null; ``--series``: frames in which everything is damaged more and more; ``--patchwise``: the same
network with its encoder run on each patch by itself.

Seeds below 100 chose what is reported with seeds from 100 on.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from aecontrol.errors import BadInput
from aecontrol.perception.damage.classical import Metric, pooled
from aecontrol.perception.damage.features import NAMED, FeatureMetric, FeatureSettings, build_metric
from aecontrol.perception.damage.learned import LearnedDamage
from aecontrol.perception.damage.meter import METRICS, build_meter
from aecontrol.perception.damage.pair import Pair
from aecontrol.perception.damage.siamese import standardised
from tests.benchmarks.damage_backbones import AS_PUBLISHED, CENTRED, EARLY
from tests.benchmarks.damage_frames import PATCH, PIXEL_NM, SPECIMENS, Condition, Frames, frames, series

DAMAGED = 0.05
COUNTS = (5.0, 20.0, 100.0)
ALL = {"shift_px": 0.3, "gain": 0.1, "defocus_nm": 2.0, "lines_px": 0.1}
CONDITIONS = {
    **{f"{n:g} counts, shift {s:g} px": Condition(n, s) for n in COUNTS for s in (0.0, 0.1, 0.3)},
    **{f"{n:g} counts, gain 10 %": Condition(n, gain=0.1) for n in COUNTS},
    **{f"{n:g} counts, defocus 2 nm": Condition(n, defocus_nm=2.0) for n in COUNTS},
    **{f"{n:g} counts, all nuisances": Condition(n, **ALL) for n in COUNTS},
    **{f"{n:g} counts, isolated": Condition(n, 0.1, isolated=True) for n in COUNTS},
}
OURS = ("learned",)
DOSES = (0.0, 0.03, 0.07, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8)

Floats = NDArray[np.float64]
Table = dict[str, dict[str, Floats]]
"""Measure -> metric -> values [lattices, seeds]."""


def as_pair(first: Floats, later: Floats) -> Pair:
    """Two frames, as they lie."""
    return Pair.of(first, later, np.ones(first.shape, dtype=bool))


def of_frames(features: FeatureMetric) -> Metric:
    """A metric of two frames as one of pairs."""
    return lambda pair: features(pair.first, pair.later)


def compared(weights: Path | None, words: list[str]) -> dict[str, Metric]:
    """Every metric that can be asked for by name, backbones as they are usually used, and ours also averaged over 3 x 3
    patches; of these, those whose names hold one of ``words``."""
    metrics: dict[str, Metric] = {}
    for name in (*METRICS, *NAMED, "learned"):
        try:
            meter = build_meter(name, "cpu", weights if name == "learned" else None)
        except BadInput as error:
            print(f"left out: {name}: {error}")
            continue
        metrics[name] = meter.metric
        if name == "learned":
            metrics["learned-pooled"] = pooled(meter.metric)
    for kind in ("imagenet", "random-control"):
        for what, how in (("native", AS_PUBLISHED), ("early, whitened", EARLY), ("centred", CENTRED)):
            settings = FeatureSettings(backbone="efficientnet_lite0", weights=kind, dense=True, **how)
            try:
                metrics[f"efficientnet, {kind}, {what}"] = of_frames(build_metric(settings))
            except BadInput as error:
                print(f"left out: efficientnet, {kind}, {what}: {error}")
    return {name: metric for name, metric in metrics.items() if any(word in name for word in words)}


def patchwise(learned: LearnedDamage) -> Metric:
    """The same network, its encoder run on every patch by itself in place of the whole frame."""

    def cut(pair: Pair) -> Floats:
        rows, cols = (n // PATCH for n in pair.first.shape)
        frame = np.stack([pair.first, pair.later])[None, :, : rows * PATCH, : cols * PATCH].astype(np.float32)
        net = learned.network
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            seen, noise = standardised(torch.from_numpy(frame))
            tiles = (
                seen[0].unflatten(2, (rows, PATCH)).unflatten(4, (cols, PATCH)).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
            )
            compared = net.compared(tiles, noise.expand(len(tiles), -1))
            grid = compared.reshape(rows, cols, -1).movedim(2, 0)[None]
            return np.asarray(net.judged(grid, noise)[0, 0].double().numpy())

    return cut


def measured(metrics: Mapping[str, Metric], condition: Condition, seeds: list[int]) -> Table:
    """All measures of all metrics in one condition."""
    names = ("AUC", "any", "AP", "rank", "found")
    table: Table = {name: {m: np.zeros((len(SPECIMENS), len(seeds))) for m in metrics} for name in names}
    for i, lattice in enumerate(SPECIMENS):
        pairs = [frames(lattice, seed, condition) for seed in seeds]
        seen = [(as_pair(pair.first, pair.later), as_pair(pair.first, pair.repeat)) for pair in pairs]
        for name, metric in metrics.items():
            scores = [metric(damaged) for damaged, _ in seen]
            limit = float(np.quantile([metric(repeat) for _, repeat in seen], 0.99))
            for j, (pair, score) in enumerate(zip(pairs, scores, strict=True)):
                for measure, value in _judged(pair, score, limit).items():
                    table[measure][name][i, j] = value
    return table


def _judged(pair: Frames, score: Floats, limit: float) -> dict[str, float]:
    """The measures of one frame."""
    damaged = pair.fraction >= DAMAGED
    judged = damaged | pair.clear
    return {
        "AUC": roc_auc_score(damaged[judged], score[judged]),
        "any": roc_auc_score((pair.fraction > 0).ravel(), score.ravel()),
        "AP": average_precision_score(damaged[judged], score[judged]),
        "rank": float(spearmanr(pair.fraction[pair.fraction > 0], score[pair.fraction > 0]).statistic),
        "found": float((score[damaged] > limit).mean()),
    }


def behind(ours: Floats, other: Floats) -> str:
    """Mean difference and its 95 % interval, frames drawn anew in pairs."""
    difference = (ours - other).ravel()
    draws = np.random.default_rng(0).integers(len(difference), size=(4000, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
    return f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def show(title: str, table: Table, writer: list[list[object]]) -> None:
    """Print one condition, best metric first."""
    mean = {measure: {name: float(v.mean()) for name, v in by.items()} for measure, by in table.items()}
    best = max((n for n in mean["AUC"] if n.startswith(OURS)), key=lambda n: mean["AUC"][n])
    print(f"\n{title}\n{'':34}  AUC    any    AP     rank   found  behind {best!r}, 95 %")
    for name in sorted(mean["AUC"], key=lambda n: -mean["AUC"][n]):
        values = [mean[measure][name] for measure in mean]
        gap = "" if name == best else behind(table["AUC"][best], table["AUC"][name])
        print(f"{name:34} " + " ".join(f"{v:6.3f}" for v in values) + f"  {gap}", flush=True)
        writer.append([title, name, *(round(v, 5) for v in values), gap])


def show_seeds(tables: Mapping[str, Table], seeds: list[int]) -> None:
    """AUC of each metric by seed, mean over the lattices."""
    for title, table in tables.items():
        print(f"\nAUC by seed, {title}\n{'':34} " + " ".join(f"{s:6d}" for s in seeds))
        for name, values in table["AUC"].items():
            print(f"{name:34} " + " ".join(f"{v:6.3f}" for v in values.mean(0)))


def false_flags(meters: list[str], seeds: list[int], weights: Path | None) -> None:
    """Share of undamaged patches with p < 0.01, by meter: registration and null included."""
    print("\nundamaged patches with p < 0.01, %: in undamaged repeats; in damaged frames, away from the damage")
    for name in meters:
        meter = build_meter(name, "cpu", weights if name == "learned" else None)
        for title in [f"{n:g} counts, {what}" for n in COUNTS for what in ("shift 0.1 px", "all nuisances")]:
            shares, beside = [], []
            for lattice in SPECIMENS:
                for seed in seeds:
                    pair = frames(lattice, seed, CONDITIONS[title])
                    reading = meter.read(pair.first, pair.repeat, (PIXEL_NM, PIXEL_NM), 0.05)
                    shares.append((reading.p[reading.valid] < 0.01).mean())
                    reading = meter.read(pair.first, pair.later, (PIXEL_NM, PIXEL_NM), 0.05)
                    beside.append((reading.p[reading.valid & pair.clear] < 0.01).mean())
            print(f"{name:12} {title:28} {100 * np.mean(shares):5.2f} {100 * np.mean(beside):5.2f}", flush=True)


def dose_series(metrics: Mapping[str, Metric], seeds: list[int]) -> None:
    """Mean score of frames in which everything is damaged more and more: rank correlation with the damaged fraction, by
    frame; its slope over repeats without damage, against the spread of such frames."""
    print("\nseries, 20 counts: rank correlation of frames with damage; change over 8 undamaged frames / their spread")
    for name, metric in metrics.items():
        ranks, drifts = [], []
        for lattice in SPECIMENS:
            for seed in seeds:
                images, truth = series(lattice, seed, 20.0, DOSES)
                scores = [metric(as_pair(images[0], image)).mean() for image in images[1:]]
                ranks.append(spearmanr(scores, [t.mean() for t in truth[1:]]).statistic)
                still, _ = series(lattice, seed, 20.0, (0.0,) * len(DOSES))
                flat = np.array([metric(as_pair(still[0], image)).mean() for image in still[1:]])
                slope = np.polyfit(np.arange(len(flat)), flat, 1)[0]
                drifts.append(abs(slope) * (len(flat) - 1) / flat.std(ddof=1))
        print(f"{name:34} {np.mean(ranks):6.3f} (least {np.min(ranks):.3f})  {np.median(drifts):.2f}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), help="those whose names hold a word")
    parser.add_argument("--meters", nargs="*", default=[])
    parser.add_argument("--metrics", nargs="+", default=[""], help="those whose names hold a word")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--patchwise", action="store_true")
    parser.add_argument("--series", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    metrics = compared(options.weights, options.metrics)
    if options.patchwise:
        metrics["learned, patch by patch"] = patchwise(LearnedDamage(options.weights))
    chosen = {t: c for t, c in CONDITIONS.items() if any(word in t for word in options.conditions)}
    rows: list[list[object]] = [["condition", "metric", "AUC", "any", "AP", "rank", "found", "behind"]]
    tables = {}
    for title, condition in chosen.items():
        tables[title] = measured(metrics, condition, options.seeds)
        show(title, tables[title], rows)
    overall = {
        measure: {name: np.stack([t[measure][name] for t in tables.values()]) for name in metrics}
        for measure in next(iter(tables.values()))
    }
    show("mean of all conditions", overall, rows)
    show_seeds(tables, options.seeds)
    if options.series:
        dose_series(metrics, options.seeds)
    if options.meters:
        false_flags(options.meters, options.seeds, options.weights)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
