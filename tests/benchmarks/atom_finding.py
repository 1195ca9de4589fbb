"""Atom finders against hand labels: precision, recall and F1 on real images of Pt atoms.

    python tests/benchmarks/atom_finding.py [--data FOLDER] [--weights FILE]

``--data`` is the folder of the two public sets (default: ``../shared/data/single_atom`` beside the checkout); without
it, the two committed images of Pt/NC are judged. A find is right when paired one to one with a label, on Pt/NC within
0.2 nm, on Pt-porphyrin, whose scale is not known and is estimated from each image, within 7 px. The confidence threshold
is the best on the training images, the figures to go by are those of the held-out images: Pt/NC is split as its authors
did, Pt-porphyrin by even and odd numbers. The Pt-porphyrin labels are put right first (see ``porphyrin_labels``); the
last line tells how many of them are filed with their own image, which bounds any finder that is judged as filed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from aecontrol.perception.finder import AtomFinder, Found
from aecontrol.perception.labelled import read_labelled
from aecontrol.perception.scale import estimate
from tests.benchmarks.porphyrin_labels import mended

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "tests" / "data" / "pt_single_atoms"
SHARED = ROOT.parent / "shared" / "data" / "single_atom"
PIXEL_NM = 15 / 512
TRAINED = ("021", "025", "034", "037", "045", "047", "049", "051")
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)

Floats = NDArray[np.float64]
Labelled = Mapping[str, tuple[Floats, Floats]]


def committed() -> Labelled:
    """The two images of Pt/NC that are kept with the tests."""
    archives = {name: np.load(COMMITTED / f"img_{name}.npz") for name in ("021", "034")}
    return {name: (archive["image"].astype(float), archive["xy_px"]) for name, archive in archives.items()}


def tally(found: Found, labels: Floats, gate_px: float) -> NDArray[np.int64]:
    """Pairs, finds and labels [threshold, 3]."""
    rows = []
    at = np.stack([found.x_px, found.y_px], 1)
    for threshold in THRESHOLDS:
        sure = at[found.confidence >= threshold]
        distance = np.hypot(*(sure[:, None] - labels[None]).transpose(2, 0, 1))
        i, j = linear_sum_assignment(np.minimum(distance, 2 * gate_px))
        rows.append(((distance[i, j] <= gate_px).sum(), len(sure), len(labels)))
    return np.array(rows)


def f1(counts: NDArray[np.int64]) -> Floats:
    """F1 of pairs, finds and labels along the last axis."""
    return np.asarray(2 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1))


def line(name: str, counts: NDArray[np.int64]) -> str:
    """One row of the table."""
    pairs, finds, labels = counts
    return f"{name:>16} {pairs / max(finds, 1):9.3f} {pairs / max(labels, 1):6.3f} {f1(counts):6.3f} {finds:6d} {labels:6d}"


def judge(
    title: str, pictures: Labelled, finder: AtomFinder, pixel_nm: float | None, gate_px: float, trained: set[str]
) -> None:
    """Print the table of one set: the threshold from the images in ``trained``, then all others one by one."""
    counts = {}
    for name, (image, labels) in pictures.items():
        pixel = pixel_nm or estimate(image).pixel_size_nm
        counts[name] = tally(finder.find(image, (pixel, pixel), THRESHOLDS[0]), labels, gate_px)
    train = np.sum([counts[n] for n in counts if n in trained], axis=0)
    best = int(np.argmax(f1(train)))
    held_out = [n for n in counts if n not in trained]
    print(f"{title}: threshold {THRESHOLDS[best]}\n{'':>16} precision recall     F1  finds labels")
    print(line("trained on", train[best]))
    if held_out:
        print(line("held out", np.sum([counts[n][best] for n in held_out], axis=0)))
    for name in held_out:
        print(line(name, counts[name][best]))


def main() -> None:
    """Judge both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    finder = AtomFinder(arguments.weights)
    if not arguments.data.is_dir():
        judge("Pt/NC, committed images", committed(), finder, PIXEL_NM, 0.2 / PIXEL_NM, set(TRAINED))
        return
    pictures = read_labelled(arguments.data / "PtNC_HAADF_labelled.npz")
    judge("Pt/NC", pictures, finder, PIXEL_NM, 0.2 / PIXEL_NM, set(TRAINED))
    filed = read_labelled(arguments.data / "PtPorphyrin_HAADF_labelled.npz")
    right = mended(filed)
    even = {name for name in right if int(name.removeprefix("Ptporph")) % 2 == 0}
    judge("Pt-porphyrin", right, finder, None, 7.0, even)
    own = sum(len(set(map(tuple, right[n][1])) & set(map(tuple, filed[n][1]))) for n in right)
    print(f"of {sum(len(xy) for _, xy in right.values())} labels {own} are filed with their own image")


if __name__ == "__main__":
    main()
