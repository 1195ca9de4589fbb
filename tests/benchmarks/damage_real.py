"""What the damage metrics say of real frames: halves of one frame with and without synthetic damage, and a tilt series.

    python tests/benchmarks/damage_real.py [--shared ../shared] [--metrics glr learned ...]

Halves: the counts of a real frame are dealt out to two frames by chance, which gives two exposures of half the dose
that nothing has happened between (binomial thinning of Poisson counts is exact; where the recorded noise is not that of
counts, it is not, and the share of false flags says so). In the second half, columns in 2 discs are then removed: their
pixels are filled from the surroundings (biharmonic inpainting of the smoothed frame) before the dealing. Printed for
each frame and metric: share of undamaged patches with p < 0.01, area under the ROC curve, and damaged patches found.

Tilt series: the same particle at 11 tilts. Its geometry changes and nothing is damaged: a metric of damage must refuse
to compare the frames, or call the change one of the whole frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, maximum_filter
from skimage.restoration import inpaint_biharmonic
from sklearn.metrics import roc_auc_score

from aecontrol.files import read_image, read_stack
from aecontrol.perception.damage.meter import build_meter
from aecontrol.perception.damage.pair import in_counts
from aecontrol.perception.damage.reading import PATCH_PX

Floats = NDArray[np.float64]
FRAMES = {
    "MoS2": ("2d/MoS2_HAADF_Exp-000-2.npz", None, 0.02),
    "SrTiO3": ("perovskite/STO_HAADF_TIA_1.ser", None, 0.02),
}
"""File, key, and the pixel size where the file does not say, nm."""
SIDE_PX = 400
DISC_PX = 22.0
COLUMN_PX = 4


def main() -> None:
    """Print what is seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--metrics", nargs="+", default=["glr", "ssim", "psnr", "learned"])
    asked = parser.parse_args()
    for name, (file, key, pixel) in FRAMES.items():
        picture = read_image(asked.shared / "data" / file, key)
        scale = picture.pixel_size_nm or pixel
        counts = np.maximum(np.rint(in_counts(_middle(picture.array))), 0.0)
        print(f"{name}: {file}, {counts.shape}, {scale:.4g} nm/px, {counts.mean():.3g} counts a pixel")
        for metric in asked.metrics:
            print(f"  {metric:10}", _halves(counts, scale, metric))
    stack = read_stack(asked.shared / "data/series/IDP_HAADF_tilt_series.npz", "frames").array
    for metric in asked.metrics:
        readings = [build_meter(metric, "cpu").read(stack[0], later, (13.08, 13.08), 131.0) for later in stack[1:]]
        told = [r.reason or f"{r.flagged[r.valid].mean():.0%} flagged, score {r.mean_score:.3g}" for r in readings]
        print(f"tilt series, {metric}:", *(f"  {k}: {said}" for k, said in enumerate(told, 1)), sep="\n")


def _middle(image: NDArray[np.generic]) -> Floats:
    """The middle of an image, at most ``SIDE_PX`` a side."""
    cut = tuple(slice((n - min(n, SIDE_PX)) // 2, (n + min(n, SIDE_PX)) // 2) for n in image.shape)
    return np.asarray(image[cut], dtype=np.float64)


def _halves(counts: Floats, pixel_nm: float, metric: str) -> str:
    """One line on the halves of a frame, undamaged and damaged."""
    random = np.random.default_rng(0)
    first = random.binomial(counts.astype(np.int64), 0.5)
    meter = build_meter(metric, "cpu")
    pixel = (pixel_nm, pixel_nm)
    still = meter.read(first, counts - first, pixel, 6 * pixel_nm)
    if still.reason:
        return f"refused: {still.reason}"
    hole = _columns_in_discs(counts, random)
    level = gaussian_filter(counts, 1.5)
    filled = inpaint_biharmonic(level / level.max(), hole) * level.max()
    later = np.where(hole, random.poisson(np.maximum(0.5 * filled, 0.0)), counts - first)
    damaged = meter.read(first, later, pixel, 6 * pixel_nm)
    rows, cols = damaged.valid.shape
    share = hole[: rows * PATCH_PX, : cols * PATCH_PX].reshape(rows, PATCH_PX, cols, PATCH_PX).mean(axis=(1, 3))
    hit, spared = damaged.valid & (share > 0.1), damaged.valid & (maximum_filter(share, 3) == 0)
    truth = np.r_[np.ones(hit.sum()), np.zeros(spared.sum())]
    auc = roc_auc_score(truth, np.r_[(damaged.score / damaged.sd)[hit], (damaged.score / damaged.sd)[spared]])
    false, beside, found = (
        (reading.p[where] < 0.01).mean() for reading, where in ((still, still.valid), (damaged, spared), (damaged, hit))
    )
    return f"false at 1 %: {false:.3f}, beside damage {beside:.3f}; AUC {auc:.3f}, found {found:.2f} of {hit.sum()}"


def _columns_in_discs(counts: Floats, random: np.random.Generator) -> NDArray[np.bool_]:
    """The pixels of the columns whose centres lie in 2 discs at random places."""
    level = gaussian_filter(counts, 1.5)
    peak = (level == maximum_filter(level, 2 * COLUMN_PX + 1)) & (level > np.quantile(level, 0.7))
    down, across = np.mgrid[: counts.shape[0], : counts.shape[1]]
    inside = np.zeros(counts.shape, dtype=bool)
    for y, x in random.uniform(2 * DISC_PX, min(counts.shape) - 2 * DISC_PX, (2, 2)):
        inside |= np.hypot(down - y, across - x) < DISC_PX
    return np.asarray(maximum_filter(peak & inside, 2 * COLUMN_PX + 1))


if __name__ == "__main__":
    main()
