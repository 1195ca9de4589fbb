"""Atom finders against hand labels: precision, recall and F1 on real images of Pt atoms, by confidence threshold.

    python tests/benchmarks/atom_finding.py [--data FILE.npz] [--weights FILE]

By default the two committed images; ``--data`` is the whole labelled set (arrays img_NNN and xy_NNN in one npz). A find
is right when paired one to one with a label within 0.2 nm. The network has never seen a real image; the texture of its
simulated supports was set by the power spectra of img_021 and img_034, so the other images are the held-out ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from aecontrol.perception.finder import AtomFinder, Found

COMMITTED = Path(__file__).parents[1] / "data" / "pt_single_atoms"
SEEN = ("021", "034")
PIXEL_NM = 15 / 512
GATE_NM = 0.2
LABEL_OFFSET_PX = 0.5  # the set's labels count from the centre of pixel [0, 0]
LOWEST = 0.1

Floats = NDArray[np.float64]


def images(data: Path | None) -> dict[str, tuple[NDArray[np.generic], Floats]]:
    """Name -> (image [rows, cols], labels [n, 2] px from the image's corner)."""
    if data is None:
        committed = {name: np.load(COMMITTED / f"img_{name}.npz") for name in SEEN}
        return {name: (archive["image"], archive["xy_px"]) for name, archive in committed.items()}
    archive = np.load(data)
    names = [key[4:] for key in archive if key.startswith("img_")]
    return {name: (archive[f"img_{name}"], archive[f"xy_{name}"] + LABEL_OFFSET_PX) for name in names}


def tally(found: Found, labels: Floats, threshold: float) -> NDArray[np.int64]:
    """Pairs, finds and labels."""
    sure = found.confidence >= threshold
    at = np.stack([found.x_px, found.y_px], 1)[sure]
    distance = PIXEL_NM * np.hypot(*(at[:, None] - labels[None]).transpose(2, 0, 1))
    rows, cols = linear_sum_assignment(np.minimum(distance, 2 * GATE_NM))
    return np.array([(distance[rows, cols] <= GATE_NM).sum(), sure.sum(), len(labels)])


def line(name: str, counts: NDArray[np.int64]) -> str:
    """One row of the table."""
    pairs, finds, labels = counts
    return (
        f"{name:>10} {pairs / max(finds, 1):9.3f} {pairs / labels:6.3f} {2 * pairs / (finds + labels):6.3f}"
        f" {finds:6d} {labels:6d}"
    )


def main() -> None:
    """Print the table by threshold, then by image at the threshold that is best on the two images looked at."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    pictures = images(arguments.data)
    finder = AtomFinder(arguments.weights)
    found = {name: finder.find(image, (PIXEL_NM, PIXEL_NM), LOWEST) for name, (image, _) in pictures.items()}
    thresholds = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
    counts = {t: {name: tally(found[name], pictures[name][1], t) for name in pictures} for t in thresholds}
    print(f"{'':>10} precision recall     F1  finds labels")
    for which, names in (("seen", SEEN), ("unseen", tuple(n for n in pictures if n not in SEEN))):
        if names:
            print(f"{which}:")
            for t in thresholds:
                print(line(f"{t}", np.sum([counts[t][name] for name in names], axis=0)))

    def seen_f1(t: float) -> float:
        pairs, finds, labels = np.sum([counts[t][name] for name in SEEN], axis=0)
        return float(2 * pairs / (finds + labels))

    best = max(thresholds, key=seen_f1)
    print(f"by image at {best}, best on the images looked at:")
    for name in pictures:
        print(line(name, counts[best][name]))


if __name__ == "__main__":
    main()
