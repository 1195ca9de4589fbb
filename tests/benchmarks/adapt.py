"""What adaptation to a session's own frames gains where the shipped weights see badly: an unsteady scan, or a slow
detector, as in no training scene.

    python -m tests.benchmarks.adapt [--weights FILE] [--material mos2] [--counts 1000] [--jitter-nm 0.05]
        [--afterglow 0] [--oracle] [--frames 4]

Frames of 7.7 nm are drawn by the training scenes' simulator (other seeds, no nuisances), finely. Every line is then
displaced along itself by a random whole number of fine pixels (normal, ``--jitter-nm``; training knows up to 0.015 nm),
pixels are summed to 0.03 nm, and the share ``--afterglow`` of the electrons is counted later by a time of 8 pixels on
average: counts stay Poisson. The ensemble is adapted to ``--frames`` of them without their truth, and judged with the
truth on as many others, which adaptation never saw. ``--oracle``: the same with the true labels in place of its own,
which no session has: the most that this training could gain.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from aecontrol.perception.adapt import Adaptation, adapt
from aecontrol.perception.finder import AtomFinder
from aecontrol.perception.guards import GATE_NM, look
from aecontrol.perception.learn_atoms import Scene, match
from aecontrol.perception.own_frames import Block, Frame, label
from simulators.crystal_scenes import CrystalScenes

FINE_NM, BINS, FINE_PX = 0.01, 3, 768
DECAY_PX = 8


def unsteady(scene: Scene, jitter_nm: float, afterglow: float, rng: np.random.Generator) -> Block:
    """The scene on pixels ``BINS`` times as large, its lines displaced and smeared."""
    rows = scene.image.reshape(-1, BINS, scene.image.shape[1])
    moved = [np.roll(line, round(rng.normal(0, jitter_nm / FINE_NM)), axis=1) for line in rows]
    image = np.stack(moved).sum(1).reshape(len(rows), -1, BINS).sum(2)
    counts = image.astype(np.int64).ravel()
    late = rng.binomial(counts, afterglow)
    seen = counts - late
    for lag in range(1, 5 * DECAY_PX):
        now = rng.binomial(late, 1 - np.exp(-1 / DECAY_PX))
        late -= now
        seen[lag:] += now[:-lag]
    image = seen.reshape(image.shape)
    pixel = BINS * FINE_NM
    return Block(image.astype(np.float32), (pixel, pixel), scene.positions_px / BINS, scene.wanted)


def judge(finder: AtomFinder, frames: list[Block]) -> str:
    """Precision, recall and F1 of the networks alone against the truth."""
    hits = finds = there = 0
    for frame in frames:
        found, pixel = look(finder, frame.image, frame.pixel_size_nm), np.array(frame.pixel_size_nm)
        at, size = np.stack([found.x_px, found.y_px], 1) * pixel, np.array(frame.image.shape[::-1]) * pixel
        got = match(at, frame.positions_px * pixel, size, GATE_NM, frame.wanted)
        hits, finds, there = hits + got[0], finds + got[1], there + got[2]
    return f"precision {hits / max(finds, 1):.4f}, recall {hits / there:.4f}, F1 {2 * hits / (finds + there):.4f}"


def main() -> None:
    """Print the figures before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--material", default="mos2")
    parser.add_argument("--counts", type=float, default=1000.0)
    parser.add_argument("--jitter-nm", type=float, default=0.05)
    parser.add_argument("--afterglow", type=float, default=0.0)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--steps", type=int, default=Adaptation().steps)
    parser.add_argument("--rounds", type=int, default=Adaptation().rounds)
    parser.add_argument("--oracle", action="store_true", help="also with true labels")
    options = parser.parse_args()
    fixed = {"size_px": FINE_PX, "pixel_nm": (FINE_NM, FINE_NM), "coarse_fraction": 0.0, "clean": True}
    dose = (options.counts, options.counts)
    scenes = CrystalScenes.model_validate({**fixed, "materials": (options.material,), "counts": dose})
    rng = np.random.default_rng(9)
    truths = [
        unsteady(scenes.render(9, k), options.jitter_nm, options.afterglow, rng) for k in range(2 * options.frames)
    ]
    own, others = truths[: options.frames], truths[options.frames :]
    frames = [Frame(str(k), block.image, block.pixel_size_nm) for k, block in enumerate(own)]
    settings = Adaptation(steps=options.steps, rounds=options.rounds)
    print(f"before: {judge(AtomFinder(options.weights), others)}", flush=True)

    def told(frame: Frame, _: AtomFinder) -> Block:
        name, corner = frame.name.split("[")
        top, left = (int(number) for number in corner[:-1].split(","))
        whole = own[int(name)]
        image = np.asarray(frame.image, dtype=np.float32)
        return Block(image, frame.pixel_size_nm, whole.positions_px - [left, top], whole.wanted)

    for what, teach in (("own labels", label), ("true labels", told))[: 1 + options.oracle]:
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            card = adapt(frames, Path(folder) / "out", settings, options.weights, teach=teach)
            used = time.process_time() - started
            print(f"{what}: accepted {card['accepted']} {card['reason']} ({used:.0f} s of one core)")
            print(f"  examination before: {card['before']}")
            for number, entry in enumerate(card["rounds"]):
                print(f"  round {number}: {entry['marks']}, {entry['atoms_taught']} atoms taught; {entry['refused']}")
            if card["accepted"]:
                print(f"  after: {judge(AtomFinder(Path(folder) / 'out' / 'atoms.safetensors'), others)}", flush=True)


if __name__ == "__main__":
    main()
