"""Pixels charged to reach 80 % of the labelled Pt atoms, against random, raster and an oracle, image by image.

    python tests/benchmarks/pt_pixels_to_recall.py [--data FILE.npz] [--seeds 10] [--level 0.8]

By default the two committed images, or the whole labelled set (arrays img_NNN and xy_NNN in one npz) where it is at
hand. Each image is one session of configs/pt_single_atoms.toml with the budget raised to the whole record, its overview
counted. Two measures:

  scanned   the atom's label lies in a scanned sub-scan window (perfect detection; the search alone)
  found     the atom finder reported it, within match_nm of the label (search and eyes together)

Random and raster take no overview and use the same windows and the same finder (a window's finds do not depend on when
it is scanned, so one full raster session gives every order). The policy draws no random number once an overview is
there, so its seeds are identical (checked on the first image); the mean over seeds is that of random.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from aecontrol.config import parse
from aecontrol.scoring import recall_curve, spent_at_recall
from aecontrol.session import Session
from aecontrol.state import State
from aecontrol.toml_file import read_toml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "pt_single_atoms.toml"
COMMITTED = ROOT / "tests" / "data" / "pt_single_atoms"
WHOLE_SET = ROOT.parent / "shared" / "data" / "single_atom" / "PtNC_HAADF_labelled.npz"
LABEL_OFFSET_PX = 0.5  # the set's labels count from the centre of pixel [0, 0]


def images(data: Path | None) -> dict[str, tuple[Any, Any]]:
    """Name -> (image [rows, cols], labels [n, 2] px from the image's corner)."""
    if data is None:
        files = {path.stem.removeprefix("img_"): np.load(path) for path in sorted(COMMITTED.glob("img_*.npz"))}
        return {name: (file["image"], file["xy_px"].astype(float)) for name, file in files.items()}
    store = np.load(data, allow_pickle=False)
    names = sorted(name.removeprefix("img_") for name in store.files if name.startswith("img_"))
    return {n: (store[f"img_{n}"], store[f"xy_{n}"].astype(float) + LABEL_OFFSET_PX) for n in names}


def session(work: Path, image: Any, labels: Any, policy: dict[str, Any] | None, overview: bool, seed: int) -> State:
    """One session on ``image`` until every window has been visited."""
    raw = read_toml(CONFIG)
    np.savez(work / "image.npz", image=image, xy_px=labels)
    raw["driver"]["path"] = str(work / "image.npz")
    raw["budget"] = {"pixels": 2 * image.size}
    raw["session"]["seed"] = seed
    raw.pop("compare", None)
    raw["policy"] = policy or raw["policy"]
    if not overview:
        raw.pop("overview")
    folder = Path(tempfile.mkdtemp(dir=work))
    run = Session.create(parse(raw, CONFIG.parent), folder)
    try:
        return run.run()
    finally:
        run.close()


class Curves:
    """Pixels needed to reach a recall, by both measures, for any order of windows."""

    def __init__(self, labels_nm: Any, match_nm: float, level: float) -> None:
        self.labels, self.match, self.level = labels_nm, match_nm, level

    def needed(self, spent: list[float], regions: list[Any], finds: list[Any]) -> tuple[float, float]:
        """(scanned, found): pixels when each recall first reached the level, inf if never."""
        centers = np.array([region.center_nm for region in regions])
        half = np.array([region.fov_nm for region in regions])[:, None] / 2
        inside = (np.abs(self.labels[None] - centers[:, None]) <= half).all(axis=2)
        scanned = np.logical_or.accumulate(inside).mean(axis=1)
        found = recall_curve(finds, self.labels, self.match)
        return spent_at_recall(spent, scanned, self.level), spent_at_recall(spent, found, self.level)


def steps(state: State) -> tuple[list[float], list[Any], list[Any]]:
    """Cumulative pixels, region and finds of every sub-scan of a session, in order."""
    scans = {scan.key: scan.observation for scan in state.scans}
    spent, total, regions, finds = [], 0, [], []
    for key, record in state.keys.items():
        total += record.charge.pixels
        if record.step == 0:
            continue
        spent.append(float(total))
        regions.append(record.region)
        found = scans[key].found if key in scans else ()
        finds.append(np.array([(a.x_nm, a.y_nm) for a in found], float).reshape(-1, 2))
    return spent, regions, finds


def oracle(labels: Any, regions: list[Any]) -> list[int]:
    """Windows by falling number of labels."""
    centers = np.array([region.center_nm for region in regions])
    half = np.array([region.fov_nm for region in regions])[:, None] / 2
    counts = (np.abs(labels[None] - centers[:, None]) <= half).all(axis=2).sum(axis=1)
    return [int(i) for i in np.argsort(-counts, kind="stable")]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=WHOLE_SET if WHOLE_SET.is_file() else None)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--level", type=float, default=0.8)
    options = parser.parse_args()
    raw = read_toml(CONFIG)
    pixel, match = raw["driver"]["pixel_size_nm"], raw["session"]["match_nm"]
    print("fraction of the field's pixels charged to reach the level; random is the mean over seeds")
    print(
        "image labels | scanned: policy random ratio raster oracle | found: policy random ratio raster | final recall"
    )
    ratios: dict[str, list[float]] = {"scanned": [], "found": []}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for number, (key, (image, labels)) in enumerate(images(options.data).items()):
            curves = Curves(labels * pixel, match, options.level)
            state = session(work, image, labels, None, overview=True, seed=0)
            own = steps(state)
            if number == 0:
                again = steps(session(work, image, labels, None, overview=True, seed=1))
                assert [r.center_nm for r in again[1]] == [r.center_nm for r in own[1]], "the seed matters after all"
            spent, regions, finds = steps(session(work, image, labels, {"kind": "raster"}, overview=False, seed=0))

            def in_order(
                order: Any, regions: Any = regions, finds: Any = finds, curves: Any = curves
            ) -> tuple[float, float]:
                pixels = np.cumsum([regions[i].pixels for i in order]).tolist()
                return curves.needed(pixels, [regions[i] for i in order], [finds[i] for i in order])

            policy = np.array(curves.needed(*own)) / image.size
            raster = np.array(curves.needed(spent, regions, finds)) / image.size
            rng = np.random.default_rng(0)
            orders = [rng.permutation(len(regions)) for _ in range(options.seeds)]
            random = np.mean([in_order(order) for order in orders], axis=0) / image.size
            best = in_order(oracle(curves.labels, regions))[0] / image.size
            ratio = policy / random
            for measure, value in zip(ratios, ratio, strict=True):
                ratios[measure].append(float(value))
            end = recall_curve([np.concatenate(own[2])], curves.labels, match)[-1]
            print(
                f"{key:>5} {len(labels):6d} | {policy[0]:15.3f} {random[0]:6.3f} {ratio[0]:5.2f} {raster[0]:6.3f} "
                f"{best:6.3f} | {policy[1]:13.3f} {random[1]:6.3f} {ratio[1]:5.2f} {raster[1]:6.3f} | {end:.2f}",
                flush=True,
            )
    for measure, values in ratios.items():
        reached = [v for v in values if np.isfinite(v)]
        missed = len(values) - len(reached)
        note = f"; {missed} images where the finder never reaches the level are left out" if missed else ""
        print(f"mean ratio to random, {measure}: {np.mean(reached):.3f} over {len(reached)} images{note}")


if __name__ == "__main__":
    main()
