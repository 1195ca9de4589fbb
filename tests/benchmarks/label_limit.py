"""How far any finder can come with the hand labels of the real images: what the images themselves say about them.

    python tests/benchmarks/label_limit.py [--data FOLDER]

No network of ours: peaks of a matched filter (difference of Gaussians over its local spread). Printed are

- evidence for labels: how often the filter's highest value within the gate of a label exceeds that of a random place
  far from all labels (0.5: labels are no better than random places, 1: every label stands out);
- labels for evidence: unlabelled peaks as strong as the median label, for every label as strong;
- F1 of the peaks at the best threshold, chosen on the same images: all that brightness can tell;
- F1 of a classifier that sees 21 measures of each peak (contrast at seven widths, level, roundness, next peak), judged
  on images that it was not fitted to, and what became of its doubts: of the peaks that it gives 0.2 to 0.8, the mean
  of what it gives and the share that is labelled. Where they agree, it knows what it does not know;
- for Pt-porphyrin, whose labels were made in two sessions, the share of the labels made in the first.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, maximum_filter
from scipy.spatial import cKDTree
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aecontrol.perception.labelled import read_labelled
from tests.benchmarks.atom_finding import GATE_NM, GATE_PX, SHARED, f1, paired
from tests.benchmarks.porphyrin_labels import mended

Floats = NDArray[np.float64]
Labelled = Mapping[str, tuple[Floats, Floats]]

PIXEL_NM = 15 / 512
SPOT_PX = 2.5
FAINTEST = 0.6
FOLDS = 5


def response(image: Floats, width: float = SPOT_PX) -> Floats:
    """The image in the band of a spot over the band's local spread."""
    band = gaussian_filter(image, width) - gaussian_filter(image, 2 * width)
    return np.asarray(band / np.sqrt(gaussian_filter(band**2, 40) + 1e-3 * (band**2).mean()))


def peaks(image: Floats) -> tuple[Floats, Floats]:
    """Positions [n, 2] and measures [n, 21] of all local maxima of the response; the first measure is the response."""
    at = response(image)
    rows, cols = np.nonzero((maximum_filter(at, 7) == at) & (at > FAINTEST))
    maps = [at]
    for width in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0):
        band = gaussian_filter(image, width) - gaussian_filter(image, 1.6 * width)
        maps += [band / band.std(), band / np.sqrt(gaussian_filter(band**2, 40) + 1e-3 * (band**2).mean())]
    maps += [(gaussian_filter(image, width) - image.mean()) / image.std() for width in (3, 8, 20)]
    across, down, mixed = (gaussian_filter(image, SPOT_PX, order) for order in ((0, 2), (2, 0), (1, 1)))
    maps += [(across + down) / across.std(), np.hypot(across - down, 2 * mixed) / across.std()]
    xy = np.stack([cols, rows], 1) + 0.5
    apart = np.minimum(cKDTree(xy).query(xy, 2)[0][:, 1], 40.0)
    return xy, np.column_stack([*(m[rows, cols] for m in maps), apart])


def evidence(pictures: Labelled, gate_px: float) -> tuple[float, float]:
    """Share of (label, random place) whose label has the higher response nearby; the median label's response."""
    rng = np.random.default_rng(0)
    reach = int(gate_px)
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= gate_px
    labelled: list[Floats] = []
    empty: list[Floats] = []
    for image, xy in pictures.values():
        highest = maximum_filter(response(image), footprint=disc)
        places = rng.uniform(reach, np.array(image.shape[::-1]) - reach, (600, 2))
        for values, at in ((labelled, xy), (empty, places[cKDTree(xy).query(places)[0] > 2 * gate_px])):
            col, row = np.clip(at.astype(int), 0, np.array(image.shape[::-1]) - 1).T
            values.append(highest[row, col])
    ours, theirs = np.concatenate(labelled), np.sort(np.concatenate(empty))
    return float((np.searchsorted(theirs, ours) / len(theirs)).mean()), float(np.median(ours))


def classified(measures: list[Floats], labelled: list[NDArray[np.bool_]]) -> list[Floats]:
    """Probability of every peak of every image, by classifiers fitted to the images of the other folds."""
    out: list[Floats] = [np.zeros(0)] * len(measures)
    for fold in range(FOLDS):
        rest = [k for k in range(len(measures)) if k % FOLDS != fold]
        net = MLPClassifier((24,), activation="tanh", alpha=3.0, learning_rate_init=1e-2, max_iter=25, random_state=0)
        classifier = make_pipeline(StandardScaler(), net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early on purpose
            classifier.fit(np.concatenate([measures[k] for k in rest]), np.concatenate([labelled[k] for k in rest]))
        for k in range(fold, len(measures), FOLDS):
            out[k] = classifier.predict_proba(measures[k])[:, 1]
    return out


def best(
    finds: list[Floats], scores: list[Floats], labels: list[Floats], gate_px: float, cuts: Floats
) -> NDArray[np.int64]:
    """Pairs, finds and labels at the cut of the scores with the best F1 of all images together."""
    table = np.zeros((len(cuts), 3), dtype=np.int64)
    for xy, score, marks in zip(finds, scores, labels, strict=True):
        for row, cut in enumerate(cuts):
            table[row] += (len(paired(xy[score >= cut], marks, gate_px)), (score >= cut).sum(), len(marks))
    return np.asarray(table[f1(table).argmax()])


def told(name: str, counts: NDArray[np.int64]) -> str:
    """One result."""
    pairs, finds, labels = counts
    return f"    {name}: F1 {f1(counts):.3f} (precision {pairs / finds:.3f}, recall {pairs / labels:.3f})"


def judge(title: str, pictures: Labelled, gate_px: float) -> None:
    """Print all of it for one set."""
    labels = [xy for _, xy in pictures.values()]
    found = [peaks(image) for image, _ in pictures.values()]
    finds, measures = [xy for xy, _ in found], [m for _, m in found]
    share, median = evidence(pictures, gate_px)
    strong = [xy[m[:, 0] >= median] for xy, m in found]
    bare = sum(len(xy) - len(paired(xy, marks, gate_px)) for xy, marks in zip(strong, labels, strict=True))
    print(f"{title}: {sum(map(len, labels))} labels in {len(labels)} images, {sum(map(len, finds))} peaks")
    print(f"    labels stand out of random places: {share:.3f}")
    print(f"    as strong as the median label: {bare / (sum(map(len, labels)) / 2):.2f} unlabelled peaks a label")
    print(told("brightness alone", best(finds, [m[:, 0] for m in measures], labels, gate_px, np.arange(1.5, 6, 0.1))))
    truth = [
        np.isin(np.arange(len(xy)), paired(xy, marks, gate_px)[:, 0]) for xy, marks in zip(finds, labels, strict=True)
    ]
    probability = classified(measures, truth)
    print(told("classifier, other images", best(finds, probability, labels, gate_px, np.arange(0.05, 0.95, 0.05))))
    p, t = np.concatenate(probability), np.concatenate(truth)
    doubt = (p > 0.2) & (p < 0.8)
    print(
        f"    its doubts: {doubt.sum()} peaks given {p[doubt].mean():.2f}, labelled {t[doubt].mean():.2f}", flush=True
    )


def main() -> None:
    """Judge both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        raise SystemExit(f"{arguments.data} is not there: give --data")
    judge("Pt/NC", read_labelled(arguments.data / "PtNC_HAADF_labelled.npz"), GATE_NM / PIXEL_NM)
    filed = read_labelled(arguments.data / "PtPorphyrin_HAADF_labelled.npz")
    right = mended(filed)
    judge("Pt-porphyrin, labels put right", right, GATE_PX)
    first = sum(len(set(map(tuple, xy)) & set(map(tuple, filed[name][1]))) for name, (_, xy) in right.items())
    print(f"    made in the first session: {first} of {sum(len(xy) for _, xy in right.values())} labels")


if __name__ == "__main__":
    main()
