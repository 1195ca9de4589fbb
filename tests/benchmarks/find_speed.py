"""Time and memory of `aecontrol find`'s work on simulated MoS2, beside the bars, on one thread and on two.

    python tests/benchmarks/find_speed.py [--device cuda] [--skip-large]

CPU seconds are of the process on one thread; wall seconds, which the bars are for, are what a user waits on two (both
medians of 7 after a warm-up; the large frame once). The large frame runs in child processes, whose peak memory
(resident set, interpreter and libraries included) is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

PIXEL_NM = 0.0125
SPOT_NM = 0.042
LATTICE_NM = 0.316
COUNTS = (300.0, 100.0)
"""Mo and S2, per column."""
REPEATS = 7


def sheet(side_px: int, seed: int = 0) -> NDArray[np.uint16]:
    """Counts of a MoS2-like honeycomb, 5 pm of disorder, 2 % of the columns missing, turned by 12 degrees."""
    rng = np.random.default_rng(seed)
    size = side_px * PIXEL_NM
    steps = np.arange(-int(2 * size / LATTICE_NM), int(2 * size / LATTICE_NM))
    i, j = (a.ravel() for a in np.meshgrid(steps, steps))
    turn = np.deg2rad(12.0)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    image = np.full((side_px, side_px), 0.02)
    reach = int(5 * SPOT_NM / PIXEL_NM)
    for counts, shift in zip(COUNTS, (0.0, LATTICE_NM / np.sqrt(3)), strict=True):
        at = LATTICE_NM * np.stack([i + 0.5 * j, np.sqrt(0.75) * j], 1) + [0.0, shift]
        at = at @ rotation.T + 0.3 * size + rng.normal(0, 0.005, at.shape)
        at = at[((at > -0.2) & (at < size + 0.2)).all(1)] / PIXEL_NM
        for x, y in at[rng.random(len(at)) > 0.02]:
            left, top = max(0, int(x) - reach), max(0, int(y) - reach)
            cols, rows = np.arange(left, min(side_px, int(x) + reach)), np.arange(top, min(side_px, int(y) + reach))
            gx, gy = (np.exp(-0.5 * ((a + 0.5 - c) * PIXEL_NM / SPOT_NM) ** 2) for a, c in ((cols, x), (rows, y)))
            peak = counts * PIXEL_NM**2 / (2 * np.pi * SPOT_NM**2)
            image[top : top + len(rows), left : left + len(cols)] += peak * gy[:, None] * gx
    return rng.poisson(image).astype(np.uint16)


def work(device: str) -> tuple[Callable[[NDArray[np.uint16], bool], int], Callable[[NDArray[np.uint16]], dict]]:
    """The finder alone, and the whole of the command but files and picture."""
    from aecontrol.find import find_atoms
    from aecontrol.find_request import Request, Scale
    from aecontrol.perception.device import resolve
    from aecontrol.perception.finder import AtomFinder

    device = resolve(device)
    finder = AtomFinder(None, device)

    def find(image: NDArray[np.uint16], refined: bool) -> int:
        return len(finder.find(image, (PIXEL_NM, PIXEL_NM), refined=refined))

    def command(image: NDArray[np.uint16]) -> dict:
        return find_atoms(image, Scale(PIXEL_NM, "given"), Request(), device, lambda done, total: None)[1]

    return find, command


def timed(call: Callable[[], object], clock: Callable[[], float], threads: int) -> tuple[float, object]:
    """Median of the seconds of ``clock`` after a warm-up, and the last answer."""
    import torch

    torch.set_num_threads(threads)
    seconds, answer = [], None
    for _ in range(REPEATS + 1):
        start = clock()
        answer = call()
        seconds.append(clock() - start)
    return statistics.median(seconds[1:]), answer


def small(device: str) -> None:
    """512 x 512, about 900 columns."""
    image = sheet(512)
    find, command = work(device)
    for name, call, bar in (
        ("network and decoding", lambda: find(image, False), "<= 0.1"),
        ("with refinement", lambda: find(image, True), "<= 0.35, aim 0.15"),
        ("with sites and quality", lambda: command(image)["quality"]["atoms"], ""),
    ):
        cpu, atoms = timed(call, time.process_time, 1)
        wall, _ = timed(call, time.perf_counter, 2)
        print(f"512 x 512   {name:<24} {atoms:>6} atoms  CPU {cpu:7.3f} s  wall {wall:7.3f} s  bar {bar}", flush=True)


def large(device: str, refined: bool, threads: int) -> None:
    """In a child: 4096 x 4096 once, and the peak memory; one JSON line."""
    import torch

    image = sheet(4096)
    find, _ = work(device)
    torch.set_num_threads(threads)
    find(image[:512, :512], refined)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu, wall = time.process_time(), time.perf_counter()
    atoms = find(image, refined)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"atoms": atoms, "cpu": cpu, "wall": wall, "before_GB": before / 2**20, "peak_GB": peak / 2**20}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--child", choices=("find", "refine"), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        large(arguments.device, arguments.child == "refine", arguments.threads)
        return
    small(arguments.device)
    for part, name in (("find", "network and decoding"), ("refine", "with refinement")):
        if arguments.skip_large:
            continue
        one, two = (_child(arguments.device, part, threads) for threads in (1, 2))
        print(
            f"4096 x 4096 {name:<24} {two['atoms']:>6} atoms  CPU {one['cpu']:7.2f} s  wall {two['wall']:7.2f} s  "
            f"bar <= 30; peak {two['peak_GB']:.2f} GiB, {two['before_GB']:.2f} before the frame, bar < 1.40",
            flush=True,
        )


def _child(device: str, part: str, threads: int) -> dict:
    command = [sys.executable, __file__, "--device", device, "--child", part, "--threads", str(threads)]
    # the array library's own threads, too, are settled when it starts
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    answer: dict = json.loads(told)
    return answer


if __name__ == "__main__":
    main()
