"""Ensembles that go on learning on a session's own frames, round by round, and are refused when they learnt wrongly.

After A. Ghosh et al., npj Comput. Mater. 7, 100 (2021), doi:10.1038/s41524-021-00569-7, with two differences: each
network is taught by the others and by the joint fit of the counts (:mod:`.own_frames`), never by itself; and what is
learnt is examined (:mod:`.guards`) before anybody may use it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from zlib import crc32

import numpy as np
from pydantic import Field

from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.registry import build_part
from aecontrol.types import Count, Model, Positive, PositiveInt

from .finder import AtomFinder
from .guards import Exam, HeldOut, refusals
from .learn_atoms import AtomLessons, Scenes, Source
from .own_frames import BLOCK_NM, Block, Frame, OwnScenes, blocks_of, label
from .train import Progress, Training, fit

if TYPE_CHECKING:
    from torch import nn

HELD_OUT = 4
"""Every so many-th block is held out."""
FEWEST = 5
"""Blocks with fewer certain atoms are left out."""
ANCHOR = {"crystals": 3.0, "single_atoms": 1.0}
"""Simulated scenes and their shares of the half of all patches that is simulated."""
EXAM_SEED = crc32(b"examination")
"""Stream of the simulated scenes of the examination; training draws from others."""


class Adaptation(Model):
    """How an ensemble is adapted."""

    seed: Count = Field(0, description="of crops, of the frames that each network sees, and of the examination")
    rounds: PositiveInt = Field(2, description="times that frames are labelled anew and learnt")
    steps: PositiveInt = Field(100, description="optimiser steps a network and round")
    batch: PositiveInt = Field(8, description="patches a step, half of them simulated")
    patch_px: PositiveInt = Field(96, multiple_of=8, description="side of a patch")
    learning_rate: Positive = Field(1e-3, description="highest learning rate")
    exam_scenes: PositiveInt = Field(40, description="simulated scenes of the examination")


def adapt(
    frames: Sequence[Frame],
    out_dir: Path,
    settings: Adaptation | None = None,
    parent: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    command: str = "",
    teach: Callable[[Frame, AtomFinder], Block] = label,
) -> dict[str, Any]:
    """Adapt the ensemble in ``parent`` (None: the shipped one) to ``frames`` and write ``atoms.json``, the card, to the
    new or empty folder ``out_dir``; the adapted ``atoms.safetensors`` beside it only when they pass every guard.

    Every round, each network learns from what the *others* and the fit hold to be in its own random choice of the
    training blocks, mixed half and half with simulated scenes. Rounds end when a guard refuses or nothing is gained.
    Returns the card; ``accepted`` says whether there are weights, ``reason`` why not. Raises BadInput when the folder
    holds weights, or the frames or members are too few.
    """
    settings = settings or Adaptation()
    if (out_dir / "atoms.safetensors").exists():
        raise BadInput(f"{out_dir} holds weights already", "give another --out")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        school = _School(frames, Path(folder), settings, _read(parent), device, teach)
        rounds, data = school.teach_all(progress)
    marks = [r["marks"] for r in rounds if r["accepted"]]
    card = {
        "model": "aecontrol atom finder, adapted to a session's own frames",
        "accepted": data is not None,
        "reason": "" if data is not None else "; ".join(rounds[0]["refused"]),
        "sha256": None if data is None else hashlib.sha256(data).hexdigest(),
        "parent_sha256": hashlib.sha256(school.parent).hexdigest(),
        "command": command,
        "adaptation": settings.model_dump(mode="json"),
        "frames": {f.name: hashlib.sha256(np.ascontiguousarray(f.image).tobytes()).hexdigest() for f in frames},
        "blocks_learnt": [block.name for block in school.learnt],
        "blocks_held_out": [block.name for block in school.held_out],
        "before": school.before.marks.model_dump(),
        "after": marks[-1] if marks else None,
        "rounds": rounds,
        "seconds": round(time.perf_counter() - started, 1),
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    if data is not None:
        write_durable(out_dir / "atoms.safetensors", data)
    write_durable(out_dir / "atoms.json", (json.dumps(card, indent=1) + "\n").encode())
    return card


def _read(weights: Path | None) -> bytes:
    try:
        source = weights or files(__package__).joinpath("weights/atoms.safetensors")
        return source.read_bytes()
    except OSError as error:
        raise BadInput(f"{weights} cannot be read: {error}", "give weights of `aecontrol train atoms`") from error


class _School:
    """The rounds: who teaches whom what, and the examination."""

    def __init__(
        self,
        frames: Sequence[Frame],
        folder: Path,
        settings: Adaptation,
        parent: bytes,
        device: str,
        teach: Callable[[Frame, AtomFinder], Block],
    ) -> None:
        from . import nets

        self.folder, self.settings, self.parent, self.device, self.teach = folder, settings, parent, device, teach
        self.kind = nets.settings_of(parent)
        if self.kind["members"] < 2:
            raise BadInput("an ensemble of 1 network", "two or more are needed, that one may teach another")
        blocks = [block for frame in frames for block in blocks_of(frame)]
        if len(blocks) < HELD_OUT:
            raise BadInput(
                f"{len(frames)} frames of {len(blocks)} blocks of {BLOCK_NM} nm",
                f"{HELD_OUT} blocks are needed: give more or larger frames",
            )
        self.held_out = blocks[HELD_OUT - 1 :: HELD_OUT]
        self.learnt = [block for k, block in enumerate(blocks) if k % HELD_OUT != HELD_OUT - 1]
        self.anchor = tuple(
            Source(cast(Scenes, build_part("scenes", {"kind": kind}, "scenes")), share)
            for kind, share in ANCHOR.items()
        )
        finder = self._finder(parent)
        known = [label(block, finder) for block in self.held_out]
        pieces = [
            HeldOut.read(block, settings.seed + k) for k, block in enumerate(known) if block.wanted.sum() >= FEWEST
        ]
        if not pieces:
            raise BadInput("in no held-out block are enough atoms certain", "adapt to better frames first")
        scenes = [
            source.scenes.render(EXAM_SEED, k) for source in self.anchor for k in range(settings.exam_scenes // 2)
        ]
        self.exam = Exam(pieces, scenes)
        self.before = self.exam.sit(finder)

    def _finder(self, data: bytes, members: Sequence[int] | None = None) -> AtomFinder:
        """A finder with some members (None: all) of an ensemble."""
        from . import nets

        if members is not None:
            nets_ = nets.load(data, trainable=True)[0]
            data = self._saved([nets_[k] for k in members])
        path = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        path.write_bytes(data)
        return AtomFinder(path, self.device)

    def _saved(self, members: Sequence[nn.Module]) -> bytes:
        from . import nets

        return nets.save(members, self.kind["network"], self.kind["size"], self.kind["outputs"])

    def teach_all(self, progress: Progress | None) -> tuple[list[dict[str, Any]], bytes | None]:
        """What each round taught and how it was marked; the last accepted weights, None without any."""
        rounds: list[dict[str, Any]] = []
        accepted, best, now = None, self.before, self.parent
        for number in range(self.settings.rounds):
            now, taught = self._round(number, now, progress)
            after = self.exam.sit(self._finder(now))
            refused = refusals(self.before, after)
            if not refused and not after.marks.misfit < best.marks.misfit:
                refused = ["this round gained nothing more"]
            rounds.append({**taught, "marks": after.marks.model_dump(), "accepted": not refused, "refused": refused})
            if refused:
                break
            accepted, best = now, after
        return rounds, accepted

    def _round(self, number: int, data: bytes, progress: Progress | None) -> tuple[bytes, dict[str, Any]]:
        """The ensemble after every member learnt from the others, and how much it was taught."""
        from . import nets

        members, sure, doubtful = nets.load(data, trainable=True)[0], 0, 0
        learnt = []
        for k, net in enumerate(members):
            teachers = self._finder(data, [j for j in range(len(members)) if j != k])
            scenes = self._lessons(number, k, teachers)
            sure += sum(int(block.wanted.sum()) for block in scenes.blocks)
            doubtful += sum(int((~block.wanted).sum()) for block in scenes.blocks)
            training = self._training(number, k)
            sources = (*self.anchor, Source(cast(Scenes, scenes), sum(ANCHOR.values())))
            step = _shown(progress, number * len(members) + k, self.settings.rounds * len(members), self.settings.steps)
            folder = self.folder / f"{number}-{k}"
            learnt += fit(training, AtomLessons(training, sources), folder, self.device, step, (net,))
        return self._saved([net.cpu() for net in learnt]), {"atoms_taught": sure, "places_left_open": doubtful}

    def _lessons(self, number: int, k: int, teachers: AtomFinder) -> OwnScenes:
        """A random choice, with repetition, of the training blocks, as ``teachers`` see them: members that all learn
        from the same blocks would soon be one."""
        rng = np.random.default_rng(np.random.SeedSequence(self.settings.seed, spawn_key=(number, k)))
        chosen = np.unique(rng.integers(len(self.learnt), size=len(self.learnt)), return_counts=True)
        blocks = []
        for index, times in zip(*chosen, strict=True):
            block = self.teach(self.learnt[index], teachers)
            blocks += [block] * int(times) if block.wanted.sum() >= FEWEST else []
        if not blocks:
            raise BadInput("in no block are enough atoms certain", "adapt to better frames first")
        return OwnScenes(blocks)

    def _training(self, number: int, k: int) -> Training:
        s = self.settings
        return Training(
            seed=s.seed + 1000 * (number * self.kind["members"] + k) + 1,
            network=self.kind["network"],
            size=self.kind["size"],
            steps=s.steps,
            batch=s.batch,
            patch_px=s.patch_px,
            learning_rate=s.learning_rate,
            checkpoint_steps=s.steps,
        )


def _shown(progress: Progress | None, part: int, parts: int, steps: int) -> Progress | None:
    """Progress of one part as that of all."""
    if progress is None:
        return None
    return lambda step, _, loss: progress(part * steps + step, parts * steps, loss)
