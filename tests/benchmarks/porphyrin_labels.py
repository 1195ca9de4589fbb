"""Puts the labels of the Pt-porphyrin images right: python tests/benchmarks/porphyrin_labels.py FILE.npz MENDED.npz

In the public set (github.com/Sjeon1/HAADF_Atom_Detection, commit 2a4f96bc) label file k has two parts, made in two
sessions: its first rows mark atoms of image k, the rest atoms of image k - 1. Seen in the images: at the first rows,
image k is brighter than its surroundings and image k - 1 is not; at the others it is the other way round. The change
from one to the other is what is looked for here. The labels of image k are then the head of file k and the tail of
file k + 1 (they do not overlap); the last image's tail is not in the set, so that image is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPOT_PX = 2.2
REACH_PX = 3  # a label may miss its atom by as much

Floats = NDArray[np.float64]
Labelled = dict[str, tuple[Floats, Floats]]
"""Name -> (image, labels [n, 2])."""


def contrast(image: Floats) -> Floats:
    """Highest value near each pixel of the image in the band of a spot, over the band's local spread, median 0."""
    from scipy.ndimage import gaussian_filter, maximum_filter

    band = gaussian_filter(image, SPOT_PX) - gaussian_filter(image, 3 * SPOT_PX)
    highest = maximum_filter(band / np.sqrt(gaussian_filter(band**2, 40)), 2 * REACH_PX + 1)
    return np.asarray(highest - np.median(highest))


def heads(maps: list[Floats], labels: list[Floats]) -> list[int]:
    """For each file the number of its first rows that belong to its own image."""

    def at(k: int, xy: Floats) -> Floats:
        return maps[k][xy[:, 1].astype(int), xy[:, 0].astype(int)]

    counts = [len(labels[0])]
    for k in range(1, len(labels)):
        gain = at(k, labels[k]) - at(k - 1, labels[k])
        counts.append(int(np.argmax(np.concatenate([[0.0], np.cumsum(gain)]))))
    return counts


def mended(filed: Mapping[str, tuple[Floats, Floats]]) -> Labelled:
    """All images but the last, with the labels that are theirs."""
    names = sorted(filed, key=lambda name: int(name.removeprefix("Ptporph")))
    labels = [filed[name][1] for name in names]
    own = heads([contrast(filed[name][0]) for name in names], labels)
    return {
        name: (filed[name][0], np.concatenate([labels[k][: own[k]], labels[k + 1][own[k + 1] :]]))
        for k, name in enumerate(names[:-1])
    }


def main() -> None:
    """Write the mended set as an npz of the same kind."""
    with np.load(Path(sys.argv[1])) as archive:
        names = [key[4:] for key in archive if key.startswith("img_")]
        filed = {name: (archive[f"img_{name}"].astype(float), archive[f"xy_{name}"]) for name in names}
    arrays = {}
    for name, (image, xy) in mended(filed).items():
        arrays[f"img_{name}"], arrays[f"xy_{name}"] = image.astype(np.uint16), xy
    np.savez_compressed(sys.argv[2], **arrays)


if __name__ == "__main__":
    main()
