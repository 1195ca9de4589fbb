"""The atom finder against hand labels: precision, recall and F1 on real images of platinum atoms, image by image.

    python tests/benchmarks/atom_finding.py [--data FOLDER] [--weights FILE] [--figures FOLDER]

``--data`` is the folder of the two public sets (default: ``../shared/data/single_atom`` beside the checkout); without
it, only Pt/NC is judged, from the copy that the finder is trained with. A find is right when paired one to one with a
label: within 0.2 nm on Pt/NC, and on Pt-porphyrin, whose pixel size is not known and is estimated from each image,
within 7 px. Eight images of Pt/NC are trained on and set its confidence threshold; the other six took no part. No image
of Pt-porphyrin is trained on; those of even number set its threshold, the others are held out. It is judged by its
labels put right, and as filed (see ``porphyrin_labels``).

``--figures`` writes one overlay an image. How far any finder can come with these labels: ``label_limit.py``.
"""

from __future__ import annotations

import argparse
import io
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from aecontrol.perception.finder import AtomFinder
from aecontrol.perception.labelled import read_labelled
from aecontrol.perception.scale import estimate
from tests.benchmarks.pictures import small
from tests.benchmarks.porphyrin_labels import mended

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "single_atom"
TRAINING = ROOT / "configs" / "train_atoms.toml"
GATE_NM, GATE_PX = 0.2, 7.0
BARS = {"Pt/NC": 0.85, "Pt-porphyrin": 0.75}
THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)

Floats = NDArray[np.float64]
Labelled = Mapping[str, tuple[Floats, Floats]]


@dataclass(frozen=True)
class Judged:
    """Finds of one image, [n, 2] px and their confidence, and its labels [m, 2]; ``gate_px`` may part a pair."""

    image: Floats
    finds: Floats
    confidence: Floats
    labels: Floats
    gate_px: float

    def pairs(self, threshold: float) -> tuple[NDArray[np.int64], Floats]:
        """Rows [k, 2] (find, label) of pairs, and the finds [n, 2] that are sure enough."""
        sure = self.finds[self.confidence >= threshold]
        return paired(sure, self.labels, self.gate_px), sure

    def counts(self) -> NDArray[np.int64]:
        """Pairs, finds and labels [threshold, 3]."""
        found = [self.pairs(t) for t in THRESHOLDS]
        return np.array([(len(pairs), len(sure), len(self.labels)) for pairs, sure in found])


def paired(finds: Floats, labels: Floats, gate_px: float) -> NDArray[np.int64]:
    """Rows [k, 2] (find, label): as many pairs within the gate as can be, the shortest."""
    distance = np.hypot(*(finds[:, None] - labels[None]).transpose(2, 0, 1))
    rows = np.stack(linear_sum_assignment(np.where(distance <= gate_px, distance, 1e3 * gate_px)), 1)
    return np.asarray(rows[distance[rows[:, 0], rows[:, 1]] <= gate_px])


def f1(counts: NDArray[np.int64]) -> Floats:
    """F1 of pairs, finds and labels along the last axis."""
    return np.asarray(2 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1))


def find(finder: AtomFinder, pictures: Labelled, pixel_nm: float | None, gate_px: float) -> dict[str, Judged]:
    """Every image's finds, the network's own positions: hand labels are good to 3 px, no fit can be judged by them."""
    judged = {}
    for name, (image, labels) in pictures.items():
        pixel = pixel_nm or estimate(image).pixel_size_nm
        found = finder.find(image, (pixel, pixel), THRESHOLDS[0], refined=False)
        judged[name] = Judged(image, np.stack([found.x_px, found.y_px], 1), found.confidence, labels, gate_px)
    return judged


def line(name: str, counts: NDArray[np.int64], remark: str = "") -> str:
    """One row of the table."""
    pairs, finds, labels = counts
    rates = f"{pairs / max(finds, 1):9.3f} {pairs / max(labels, 1):6.3f} {f1(counts):6.3f}"
    return f"{name:>22} {rates} {finds:6d} {labels:6d}  {remark}".rstrip()


def table(title: str, judged: Mapping[str, Judged], used: Collection[str], how: str, bar: float) -> float:
    """Print all images, and the sums over those ``used`` (which is ``how``; they set the threshold) and those not.
    Returns the threshold."""
    counts = {name: j.counts() for name, j in judged.items()}
    chosen = int(np.argmax(f1(np.sum([counts[n] for n in used], axis=0))))
    print(f"\n{title}, threshold {THRESHOLDS[chosen]}\n{'':>22} precision recall     F1  finds labels")
    for name in sorted(counts, key=lambda n: (n not in used, n.rjust(20))):
        print(line(name, counts[name][chosen], how if name in used else "held out"))
    held_out = np.sum([counts[n] for n in counts if n not in used], axis=0)
    print(line(f"all {how}", np.sum([counts[n][chosen] for n in used], axis=0)))
    print(line("all held out", held_out[chosen]))
    score = f1(held_out)
    print(
        f"F1 {score[chosen]:.3f} on held-out images, bar {bar}: {'met' if score[chosen] >= bar else 'MISSED'}", end=""
    )
    print(f"; at the threshold that would have been best {score.max():.3f}")
    return THRESHOLDS[chosen]


def draw(name: str, judged: Judged, threshold: float, folder: Path) -> None:
    """The image with its labels and finds, as PNG."""
    from matplotlib.figure import Figure

    pairs, finds = judged.pairs(threshold)
    height, width = judged.image.shape
    figure = Figure(figsize=(7, 7.4))
    axes = figure.add_axes((0, 0, 1, 0.95))
    low, high = np.percentile(judged.image, [1, 99.8])
    axes.imshow(judged.image, cmap="gray", vmin=low, vmax=high, extent=(0, width, height, 0), interpolation="bilinear")
    missed = np.delete(judged.labels, pairs[:, 1], axis=0)
    wrong = np.delete(finds, pairs[:, 0], axis=0)
    for at, marker, colour, text in (
        (judged.labels[pairs[:, 1]], "o", "lime", "label, found"),
        (missed, "o", "gold", "label, not found"),
        (wrong, "s", "red", "found, no label"),
    ):
        axes.scatter(
            at[:, 0], at[:, 1], s=70, marker=marker, facecolors="none", edgecolors=colour, linewidths=0.9, label=text
        )
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    figure.legend(loc="upper center", ncols=3, frameon=False, title=None)
    folder.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=70)
    (folder / f"{name}.png").write_bytes(small(picture.getvalue()))


def main() -> None:
    """Judge both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--figures", type=Path)
    arguments = parser.parse_args()
    finder = AtomFinder(arguments.weights)
    source = next(s for s in tomllib.loads(TRAINING.read_text())["scenes"] if s["kind"] == "labelled")
    trained, pixel = tuple(source["images"]), source["pixel_nm"]
    here = arguments.data.is_dir()
    pictures = read_labelled(arguments.data / "PtNC_HAADF_labelled.npz" if here else ROOT / source["file"])
    nc = find(finder, pictures, pixel, GATE_NM / pixel)
    drawn = [(nc, table("Pt/NC", nc, trained, "trained on", BARS["Pt/NC"]))]
    if here:
        filed = read_labelled(arguments.data / "PtPorphyrin_HAADF_labelled.npz")
        right = find(finder, mended(filed), None, GATE_PX)
        even = [name for name in right if int(name.removeprefix("Ptporph")) % 2 == 0]
        as_filed = {n: Judged(j.image, j.finds, j.confidence, filed[n][1], GATE_PX) for n, j in right.items()}
        drawn.append((right, table("Pt-porphyrin, labels put right", right, even, "tuned on", BARS["Pt-porphyrin"])))
        table("Pt-porphyrin, labels as filed", as_filed, even, "tuned on", BARS["Pt-porphyrin"])
    else:
        print(f"\nPt-porphyrin NOT JUDGED: {arguments.data} is not there")
    for judged, threshold in drawn if arguments.figures else ():
        for name, j in judged.items():
            draw(name, j, threshold, arguments.figures)


if __name__ == "__main__":
    main()
