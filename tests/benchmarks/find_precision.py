"""Precision of atom finding against the joint Cramer-Rao bound, on strained scenes with shifted columns and vacancies.

    python tests/benchmarks/find_precision.py [--crystals NAME ...] [--counts N ...] [--seed N] [--peers VENVS]

Scenes of 512 x 512 pixels of 0.0125 nm with a Gaussian spot and with the renderer's probe. One line a kind of column:
its counts; plain and robust RMS error, reported standard error and mean error over the bound; recall; the share of
errors within the 68 % and 95 % intervals that were reported; CPU ms a column (one thread). For refinement from starts
10 pm off the truth ("refine") and for the finder end to end ("find"). The default seed is none of those on which the
fit was tuned (100 to 103, and 300 to 303).

``--peers``: a folder with environments ``atomap`` and ``ai`` (atomai), which find on the same images in the same run.
atomap fits its 2-D Gaussians from the starts of "refine"; atomai's U-Net is trained there first, on scenes of all four
crystals, both probes and the same doses with other seeds (once, 160 cycles of 8 patches: the weights stay in the
folder), and finds end to end. Its network shifts columns by up to 3 pm in the axes of the array, also in mirrored
images (its locator alone, on the true mask, by 0.04 pm): to its benefit its mean error in each image is taken off, and
printed in a line of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline
from scipy.spatial import cKDTree

from aecontrol.perception import bound
from aecontrol.perception.finder import AtomFinder
from aecontrol.perception.refine import refine
from simulators.optics import Optics
from simulators.render import Renderer

Floats = NDArray[np.float64]
PIXEL, SIZE, BLUR = 0.0125, 512, 0.042
RIM, GATE = 0.3, 0.05
"""nm: what is near the rim is not judged; farther is another column."""
# cell (nm), columns (fractional), relative intensity
CRYSTALS = {
    "MoS2": ((0.318, 0.55079), [(0, 0), (0.5, 0.5), (0.5, 1 / 6), (0, 2 / 3)], [1, 1, 0.32, 0.32]),
    "WS2": ((0.3153, 0.5461), [(0, 0), (0.5, 0.5), (0.5, 1 / 6), (0, 2 / 3)], [1, 1, 0.12, 0.12]),
    "graphene": ((0.246, 0.42608), [(0, 1 / 6), (0.5, 1 / 3), (0.5, 2 / 3), (0, 5 / 6)], [1, 1, 1, 1]),
    "SrTiO3": ((0.3905, 0.3905), [(0, 0), (0.5, 0.5)], [1, 0.57]),
}
DOSES = (30.0, 100.0, 300.0, 1000.0, 10000.0)
PROBES = ("Gaussian", "renderer")
SEED = 4200


@dataclass(frozen=True)
class Scene:
    """An image and the truth in it: positions [n, 2] (x, y) nm and counts [n] of all columns, also beyond the rim."""

    name: str
    image: NDArray[np.float32]
    at: Floats
    counts: Floats
    background: float
    profile: bound.Profile


def columns(crystal: str, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Positions and relative intensities: smooth strain of up to 1 %, 5 % of columns 10 to 30 pm off, 2 % missing."""
    cell, basis, weights = CRYSTALS[crystal]
    extent, turn = SIZE * PIXEL, rng.uniform(0, np.pi)
    reach = int(extent / min(cell)) + 4
    origin = np.stack(np.meshgrid(*(np.arange(-reach, reach),) * 2), -1).reshape(-1, 1, 2)
    at = ((origin + np.array(basis)) * cell).reshape(-1, 2)
    at = at @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) + extent / 2
    weight = np.tile(weights, len(origin))
    phase = rng.uniform(0, 2 * np.pi, 2)
    at = at + 0.01 * np.sin(2 * np.pi * at[:, ::-1] / extent + phase)
    shifted = rng.random(len(at)) < 0.05
    angle, far = rng.uniform(0, 2 * np.pi, len(at)), rng.uniform(0.01, 0.03, len(at))
    at = at + (shifted * far * np.stack([np.cos(angle), np.sin(angle)])).T
    keep = ((at > -0.3) & (at < extent + 0.3)).all(1) & (rng.random(len(at)) > 0.02)
    return at[keep], weight[keep]


def renderer_probe() -> bound.Profile:
    """The spot of one molybdenum atom in the renderer, astigmatic and a little defocused."""
    renderer = Renderer(Optics(a1_nm=1.0, a1_deg=20.0, c1_nm=1.0))
    at = np.arange(-80, 81) * 0.0125
    grid = np.stack(np.meshgrid(10 * at, 10 * at), -1)
    spot = renderer.images(np.zeros((1, 2)), np.array([42]), np.array([0.06]), grid)["HAADF"].astype(float)
    spline = RectBivariateSpline(at, at, spot / spot.sum() / 0.0125**2)

    def profile(x: Floats, y: Floats) -> Floats:
        near = np.maximum(abs(x), abs(y)) < 0.99
        values = np.zeros(np.shape(x))
        values[near] = spline(y[near], x[near], grid=False)
        return values

    return profile


def scene(crystal: str, counts: float, probe: str, seed: int) -> Scene:
    """A scene in which the brightest columns hold ``counts``."""
    rng = np.random.default_rng(seed)
    at, weight = columns(crystal, rng)
    profile = bound.gaussian(BLUR) if probe == "Gaussian" else renderer_probe()
    reach = int((6 * BLUR if probe == "Gaussian" else 0.6) / PIXEL)
    background = 0.05 * counts * weight.sum() / SIZE**2
    mean = np.full((SIZE + 2 * reach + 60,) * 2, background)
    margin = reach + 30
    offset = np.arange(-reach, reach + 1)
    for (x, y), w in zip(at, weight, strict=True):
        col, row = int(np.floor(x / PIXEL)) + offset, int(np.floor(y / PIXEL)) + offset
        dx, dy = np.meshgrid((col + 0.5) * PIXEL - x, (row + 0.5) * PIXEL - y)
        mean[row[0] + margin : row[-1] + margin + 1, col[0] + margin : col[-1] + margin + 1] += (
            counts * w * PIXEL**2 * profile(dx.ravel(), dy.ravel()).reshape(dx.shape)
        )
    inside = slice(margin, margin + SIZE)
    image = rng.poisson(np.maximum(mean[inside, inside], 0)).astype(np.float32)
    return Scene(f"{crystal} {counts:g} {probe}", image, at, counts * weight, background, profile)


def bounds(s: Scene, seed: int, places: int = 6) -> dict[float, float]:
    """RMS bound per axis (nm) by counts, over columns near random places."""
    rng = np.random.default_rng(seed)
    found: dict[float, list[float]] = {}
    for centre in rng.uniform(1.0, SIZE * PIXEL - 1.0, (places, 2)):
        near, error = bound.joint(s.at, s.counts, s.background, s.profile, PIXEL, (centre[0], centre[1]))
        for j, (sx, sy, _) in zip(near, error, strict=True):
            if np.hypot(*(s.at[j] - centre)) < 0.3:
                found.setdefault(float(np.round(s.counts[j], 6)), []).append((sx**2 + sy**2) / 2)
    return {n: float(np.sqrt(np.mean(v))) for n, v in found.items()}


def offset(s: Scene, at: Floats) -> Floats:
    """[2] mean error (nm) of positions ``at`` [n, 2] nm over all columns."""
    distance, which = cKDTree(at).query(s.at)
    inside = ((s.at > RIM) & (s.at < SIZE * PIXEL - RIM)).all(1) & (distance < GATE)
    return np.asarray((at[which[inside]] - s.at[inside]).mean(0))


def judge(s: Scene, at: Floats, sigma: Floats | None, limits: dict[float, float]) -> Iterator[str]:
    """Lines of the table for positions ``at`` [n, 2] nm and their standard errors."""
    extent = SIZE * PIXEL
    distance, which = cKDTree(at).query(s.at)
    back = cKDTree(s.at).query(at)[1]
    inside = ((s.at > RIM) & (s.at < extent - RIM)).all(1)
    paired = (distance < GATE) & (back[which] == np.arange(len(s.at)))
    for counts, limit in sorted(limits.items()):
        there = inside & np.isclose(s.counts, counts)
        got = there & paired
        if not got.any():
            yield f"{counts:8.0f} none found"
            continue
        error = at[which[got]] - s.at[got]
        plain = np.sqrt((error**2).mean()) / limit
        robust = 1.4826 * np.median(np.abs(error)) / limit
        said = coverage = f"{'':6} {'':6}"
        if sigma is not None:
            ratio = np.abs(error / sigma[which[got]])
            coverage = f"{(ratio < 1).mean():6.3f} {(ratio < 1.96).mean():6.3f}"
            said = f"{np.sqrt((sigma[which[got]] ** 2).mean()) / limit:6.3f}"
        bias = np.abs(error.mean(0)).max() / limit
        recall = got.sum() / there.sum()
        yield f"{counts:8.0f} {plain:6.3f} {robust:6.3f} {said:6.6} {bias:6.3f} {recall:7.4f} {coverage}"


def peer(folder: Path, name: str, s: Scene, start_px: Floats) -> tuple[Floats, float] | None:
    """Positions (nm) and CPU seconds of a peer in its own environment; None where it fails."""
    model = folder / "precision_unet"
    if name == "atomai" and not model.with_suffix(".npz").exists():
        training(model.with_suffix(".npz"))
    with tempfile.TemporaryDirectory() as scratch:
        np.save(f"{scratch}/image.npy", s.image)
        inside = ((start_px > 8) & (start_px < SIZE - 8)).all(1)  # atomap stops at masks beyond the rim
        np.save(f"{scratch}/start.npy", start_px[inside] - 0.5)
        script = Path(__file__).with_name("find_peers.py")
        python = folder / {"atomap": "atomap", "atomai": "ai"}[name] / "bin" / "python"
        command = [str(python), str(script), name, scratch, *([str(model)] if name == "atomai" else [])]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            print(f"{s.name:24} {name:8} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            return None
        if done.stdout.strip():
            print(f"{s.name:24} {name:8} {done.stdout.strip().splitlines()[-1]}", flush=True)
        result = np.load(f"{scratch}/found.npz")
        return (result["at_px"] + 0.5) * PIXEL, float(result["cpu_s"])


def training(path: Path) -> None:
    """Write patches of 128 pixels for atomai: images, each scaled to [0, 1], and masks of discs of one blur."""
    images: list[NDArray[np.float32]] = []
    masks: list[NDArray[np.float32]] = []
    px = (np.arange(SIZE) + 0.5) * PIXEL
    grid = np.stack(np.meshgrid(px, px), -1)
    for k, (crystal, counts, probe) in enumerate((c, n, p) for c in CRYSTALS for n in DOSES for p in PROBES):
        s = scene(crystal, counts, probe, 900 + k)
        mask = (cKDTree(s.at).query(grid)[0] < BLUR).astype(np.float32)
        for stack, whole in ((images, s.image), (masks, mask)):
            stack.extend(whole.reshape(4, 128, 4, 128).swapaxes(1, 2).reshape(16, 1, 128, 128))
    order = np.random.default_rng(0).permutation(len(images))
    scaled = [(images[i] - images[i].min()) / np.ptp(images[i]) for i in order]
    np.savez(path, images=np.array(scaled), masks=np.array(masks)[order])


def report(s: Scene, seed: int, finder: AtomFinder, peers: Path | None) -> None:
    """Print all methods' lines for one scene."""
    limits = bounds(s, seed)
    near = ((s.at > -0.03) & (s.at < SIZE * PIXEL + 0.03)).all(1)
    start = (s.at[near] + np.random.default_rng(seed).normal(0, 0.01, (near.sum(), 2))) / PIXEL
    results: list[tuple[str, Floats, Floats | None, float]] = []
    clock = time.process_time()
    fit = refine(s.image, start[:, 0], start[:, 1], (PIXEL, PIXEL))
    results.append(("refine", *_nm(fit.x, fit.y, fit.sigma_x, fit.sigma_y), time.process_time() - clock))
    clock = time.process_time()
    found = finder.find(s.image, (PIXEL, PIXEL))
    results.append(("find", *_nm(found.x_px, found.y_px, found.sigma_x, found.sigma_y), time.process_time() - clock))
    for name in ("atomap", "atomai") if peers else ():
        assert peers is not None
        if (answer := peer(peers, name, s, start)) is not None:
            at = answer[0]
            if name == "atomai":
                shift = offset(s, at)
                print(f"{s.name:24} {name:8} mean error ({shift[0]:+.4f}, {shift[1]:+.4f}) nm taken off", flush=True)
                at = at - shift
            results.append((name, at, None, answer[1]))
    for name, at, sigma, cpu in results:
        for line in judge(s, at, sigma, limits):
            print(f"{s.name:24} {name:8} {line} {1e3 * cpu / len(at):8.3f}", flush=True)


def _nm(x: Floats, y: Floats, sigma_x: Floats, sigma_y: Floats) -> tuple[Floats, Floats]:
    return PIXEL * np.stack([x, y], 1), PIXEL * np.stack([sigma_x, sigma_y], 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", nargs="+", default=list(CRYSTALS), choices=CRYSTALS)
    parser.add_argument("--counts", nargs="+", type=float, default=DOSES, help="of the brightest columns")
    parser.add_argument("--probes", nargs="+", default=PROBES, choices=PROBES)
    parser.add_argument("--seed", type=int, default=SEED, help="of the first crystal")
    parser.add_argument("--peers", type=Path, metavar="VENVS")
    arguments = parser.parse_args()
    finder = AtomFinder()
    finder.find(np.random.default_rng(0).poisson(5.0, (64, 64)), (0.03, 0.03))  # loads the network
    print(
        f"{'scene':24} {'method':8} {'counts':>8} {'RMS':>6} {'robust':>6} {'sigma':>6} {'bias':>6} {'recall':>7} "
        f"{'68 %':>6} {'95 %':>6} {'ms':>8}"
    )
    for probe in arguments.probes:
        for crystal in arguments.crystals:
            seed = arguments.seed + list(CRYSTALS).index(crystal)
            for counts in arguments.counts:
                report(scene(crystal, counts, probe, seed), seed, finder, arguments.peers)


if __name__ == "__main__":
    main()
