"""One run: the only loop that touches the world. Everything it does is an event in the journal first or next.

::

    while command := next_command(state):           # pure
        for event in effects.perform(command):      # the only place that touches the world
            journal.append(event)                   # durable before the next effect
            state = apply(state, event)             # pure
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecontrol import __version__
from aecontrol.commands import (
    Command,
    Decide,
    Expose,
    Fetch,
    Finish,
    FitResponse,
    FollowPlan,
    Identify,
    Learn,
    MeasureDamage,
    MeasureDrift,
    Perceive,
    Reembed,
    Refuse,
    Reserve,
    Settle,
)
from aecontrol.config import SessionConfig, parse
from aecontrol.durable import FolderLock, sha256_hex, write_durable
from aecontrol.errors import BadInput, StorageFault
from aecontrol.events import (
    Decided,
    Indeterminate,
    InstrumentReady,
    ModelUpdated,
    Paused,
    Perceived,
    Posted,
    Recorded,
    Reembedded,
    Refused,
    Resumed,
    SessionEvent,
    SessionStarted,
    Voided,
    decode_event,
)
from aecontrol.exposure import Outcome
from aecontrol.folding import apply, begin, fold
from aecontrol.journal import Journal, read_journal
from aecontrol.machine import next_command, preflight
from aecontrol.measuring import fit, load_array, measure_damage, measure_drift, meter_of, store_array
from aecontrol.protocols import Embedding, FrameData, Microscope, Perceiver, Reading
from aecontrol.state import State
from aecontrol.types import Frame, Observation, ScanRegion
from aecontrol.units import fluence_e_per_A2

log = logging.getLogger(__name__)
Observer = Callable[[State, SessionEvent], None]
_FREE_BYTES = 64 << 20  # room kept for the journal and the report


class Session:
    """A session folder and the state that its journal describes. ``create`` or ``reopen``, then ``run``."""

    def __init__(self, folder: Path, config: SessionConfig, lock: FolderLock, journal: Journal, state: State) -> None:
        self.folder, self.config, self.state = folder, config, state
        self._lock, self._journal = lock, journal

    @classmethod
    def create(cls, config: SessionConfig, folder: Path) -> Session:
        """A new session: its folder and first event are durable when this returns, nothing heavy is imported yet.
        Raises BadInput when the folder is in use or holds a session already."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{folder} cannot be made: {error}", "give another folder with --out") from error
        lock = FolderLock(folder)
        try:
            if (folder / "session.sqlite").exists():
                raise BadInput(f"{folder} already holds a session", "`aecontrol resume` it, or give another folder")
            for name in ("frames", "models", "instrument"):
                (folder / name).mkdir(exist_ok=True)
            started = SessionStarted(
                session=uuid.uuid4().hex,
                seed=config.tables.session.seed,
                config=dict(config.raw),
                base=str(config.base),
                plan=config.plan,
                version=__version__,
                created_unix_s=time.time(),
            )
            write_durable(folder / "config.toml", config.text.encode())
            journal = Journal(folder / "session.sqlite")
            journal.append(started.model_dump_json())
        except BaseException:
            lock.release()
            raise
        return cls(folder, config, lock, journal, begin(started))

    @classmethod
    def reopen(cls, folder: Path, config: SessionConfig | None = None) -> Session:
        """An existing session, ready to go on. ``config``: parts to use in place of those that the journal names.
        Raises BadInput or StorageFault when there is none, it is in use, or its journal is damaged."""
        if not (folder / "session.sqlite").is_file():
            raise BadInput(f"{folder} holds no session", "give the folder that `aecontrol run` made")
        lock = FolderLock(folder)
        try:
            journal = Journal(folder / "session.sqlite")
            if not journal.bodies:
                raise BadInput(f"{folder} was made but its session never began", "delete it and run again")
            events = [decode_event(body) for body in journal.bodies]
            session = cls(folder, config or config_of(events), lock, journal, fold(events))
            if session.state.phase != "stopped":
                session._record(Resumed())
        except BaseException:
            lock.release()
            raise
        return session

    def run(self, observer: Observer | None = None, device: str = "auto") -> State:
        """Go on until the session stops or pauses; returns the final state.

        ``observer`` is told of every event after it is durable. Raises InstrumentFault or StorageFault when the world
        fails; what happened until then is in the journal, and ``reopen`` goes on from there.
        """
        effects: Effects | None = None
        try:
            while command := next_command(self.state):
                effects = effects or Effects(self.folder, self.config, device, self.state)
                for event in effects.perform(command, self.state):
                    self._record(event)
                    if observer:
                        observer(self.state, event)
        except KeyboardInterrupt:
            self._record(Paused(reason="interrupted by the user"))
            if observer:
                observer(self.state, Paused(reason="interrupted by the user"))
        finally:
            if effects:
                effects.close()
        return self.state

    def discard(self) -> None:
        """Remove a session that was refused before it reserved anything, so that the folder can be used again."""
        assert not self.state.keys
        for name in ("session.sqlite", "session.sqlite-wal", "session.sqlite-shm", "config.toml"):
            (self.folder / name).unlink(missing_ok=True)
        for name in ("frames", "models", "instrument"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def close(self) -> None:
        """Close the journal and let another run in."""
        self._journal.close()
        self._lock.release()

    def _record(self, event: SessionEvent) -> None:
        after = apply(self.state, event)  # first: an event that cannot follow must not enter the journal
        self._journal.append(event.model_dump_json())
        self.state = after


def read_events(folder: Path) -> list[SessionEvent]:
    """All events of a session, chain verified, read-only. Raises StorageFault."""
    events = [decode_event(body) for body in read_journal(folder / "session.sqlite")]
    if not events:
        raise StorageFault(f"{folder}: the journal is empty", "run again in a new folder")
    return events


def config_of(events: list[SessionEvent]) -> SessionConfig:
    """The configuration that a session was begun with."""
    started = events[0]
    assert isinstance(started, SessionStarted)
    return parse(started.config, Path(started.base))


class Effects:
    """Instrument, perceiver and policy of one process, and what each command does with them."""

    def __init__(self, folder: Path, config: SessionConfig, device: str, state: State) -> None:
        self._folder, self._config = folder, config
        seed = config.tables.session.seed
        self._microscope: Microscope = config.driver.build(folder / "instrument", config.base, seed)
        self._perceiver: Perceiver = config.perceiver.build(device)
        self._meter = meter_of(config.plan, device)
        if state.capabilities is not None:
            self._same_parts(state)
        self._embedding: Embedding | None = None
        self._reference: NDArray[np.float64] = np.empty((0, 0))
        self._arrived = time.perf_counter()

    def close(self) -> None:
        """Blank the beam and release the instrument."""
        self._microscope.close()

    def perform(self, command: Command, state: State) -> Iterator[SessionEvent]:
        """Do one command; yield what happened. The caller makes each event durable before it asks for the next."""
        match command:
            case Identify():
                yield self._identify(state)
            case FollowPlan():
                yield Decided(step=command.step, decision=command.scan, wall_s=0.0)
            case Decide():
                decision = self._config.policy.decide(command.history, command.candidates, state.seed)
                yield Decided(step=command.step, decision=decision, wall_s=time.perf_counter() - self._arrived)
            case Refuse():
                yield Refused(step=command.step, reason=command.reason)
            case Reserve():
                self._need_room(command.event.region)
                yield command.event
            case Expose():
                record = command.record
                yield _settled(self._microscope.expose(record.key, record.region, record.bound))
            case Settle():
                yield _settled(self._microscope.cancel(command.record.key))
            case Fetch():
                yield self._fetch(command)
            case Perceive():
                self._microscope.acknowledge(command.record.key)
                yield self._perceive(command, state)
            case MeasureDrift():
                self._microscope.acknowledge(command.record.key)
                yield measure_drift(self._folder, command, state)
            case MeasureDamage():
                self._microscope.acknowledge(command.record.key)
                assert self._meter is not None
                yield measure_damage(self._folder, command, state, self._meter)
            case FitResponse():
                assert self._meter is not None
                yield fit(self._folder, state, self._meter)
            case Learn():
                yield self._learn(command, state)
            case Reembed():
                yield self._reembed(command)
            case Finish():
                yield command.event

    def _same_parts(self, state: State) -> None:
        """A session goes on only with the instrument and the perception that it began with."""
        pairs = (
            ("instrument", state.capabilities, self._microscope.capabilities()),
            ("perception", state.perceiver, self._perceiver.version),
            ("metric of damage", state.metric, self._meter.version if self._meter else ""),
        )
        for name, then, now in pairs:
            if then != now:
                self._microscope.close()
                raise BadInput(
                    f"the {name} is not the one that this session began with (now {now})",
                    "resume with the same installation, weights and files; or begin a new session",
                )

    # ------------------------------------------------------------ one method a command

    def _identify(self, state: State) -> InstrumentReady:
        capabilities = self._microscope.capabilities()
        preflight(state.plan, capabilities)
        metric = self._meter.version if self._meter else ""
        return InstrumentReady(capabilities=capabilities, perceiver=self._perceiver.version, metric=metric)

    def _need_room(self, region: ScanRegion) -> None:
        need = region.pixels * 8 * 8 + _FREE_BYTES
        free = shutil.disk_usage(self._folder).free
        if free < need:
            raise StorageFault(
                f"{free >> 20} MiB are free in {self._folder}, {need >> 20} MiB are needed for the next frame",
                "free disk space, then resume; nothing was exposed",
            )

    def _fetch(self, command: Fetch) -> Recorded:
        key, region = command.record.key, command.record.region
        data = self._microscope.fetch(key)
        self._arrived = time.perf_counter()
        channels = {}
        for name, array in data.channels.items():
            channels[name] = store_array(self._folder, array)
            if channels[name].sha256 != command.record.digests[name]:
                raise StorageFault(f"channel {name} of {key[:12]} changed on its way", "resume; it will be read again")
        frame = Frame(
            region=region,
            channels=channels,
            electrons_per_pixel=data.electrons_per_pixel,
            started_s=data.started_s,
            flags=quality_flags(data, region),
        )
        return Recorded(key=key, frame=frame)

    def _perceive(self, command: Perceive, state: State) -> Perceived:
        key, frame = command.record.key, command.frame
        if not frame.usable:
            return Perceived(
                key=key, observations=(), note=f"unusable frame ({', '.join(frame.flags)}): kept, not read"
            )
        image = load_array(self._folder, next(iter(frame.channels.values())))
        if command.record.step == 0:
            readings = self._perceiver.read_overview(image, frame.region, state.candidates, frame.electrons_per_pixel)
            pairs = zip(state.candidates, readings, strict=True)
            return Perceived(key=key, observations=tuple(self._observe(r, w, frame) for w, r in pairs))
        reading = self._perceiver.read_scan(image, frame.region, frame.electrons_per_pixel)
        observation = self._observe(reading, frame.region, frame)
        if state.embedding is not None:
            trained = tuple(scan.observation for scan in state.scans[: state.trained_on])
            observation = self._embed(observation, state.embedding, trained)
        return Perceived(key=key, observations=(observation,), note=reading.note)

    def _learn(self, command: Learn, state: State) -> ModelUpdated:
        patches = np.concatenate([self._patches(o) for o in command.observations if o.patches is not None])
        seed = int(
            np.random.SeedSequence(state.seed, spawn_key=(zlib.crc32(b"model-init"), state.step)).generate_state(1)[0]
        )
        embedding = self._perceiver.fit_embedding(patches.astype(np.float32), seed)
        data = embedding.save()
        sha = sha256_hex(data)
        path = f"models/{sha}.safetensors"
        write_durable(self._folder / path, data)
        return ModelUpdated(
            parent=state.embedding,
            sha256=sha,
            path=path,
            method=type(embedding).__name__,
            frames=command.keys,
            seed=seed,
            patches=len(patches),
        )

    def _reembed(self, command: Reembed) -> Reembedded:
        trained = command.observations[: command.trained_on]
        return Reembedded(
            embedding=command.embedding,
            observations=tuple(self._embed(o, command.embedding, trained) for o in command.observations),
        )

    # ------------------------------------------------------------ helpers

    def _observe(self, reading: Reading, region: ScanRegion, frame: Frame) -> Observation:
        fidelity = None
        if frame.electrons_per_pixel is not None:
            fidelity = fluence_e_per_A2(frame.electrons_per_pixel * frame.region.pixels, frame.region.area_nm2)
        return Observation(
            region=region,
            value=reading.value,
            variance=reading.variance,
            fidelity_e_per_A2=fidelity,
            features={name: float(value) for name, value in reading.features.items()},
            found=reading.found_atoms(),
            atoms=None if reading.atoms is None else store_array(self._folder, reading.atoms),
            patches=None if reading.patches is None else store_array(self._folder, reading.patches),
            patch_atoms=None if reading.patch_atoms is None else store_array(self._folder, reading.patch_atoms),
            model=self._perceiver.version,
            note=reading.note,
        )

    def _patches(self, observation: Observation) -> NDArray[np.float32]:
        assert observation.patches is not None
        return load_array(self._folder, observation.patches).astype(np.float32)

    def _embed(self, observation: Observation, sha: str, trained: tuple[Observation, ...]) -> Observation:
        """The observation with its latents (and its value, where the target is defined on latents). ``trained``: the
        observations that the embedding was trained on; their latents are the reference of novelty."""
        if observation.patches is None or not observation.patches.shape[0]:
            return observation
        if self._embedding is None:
            data = (self._folder / f"models/{sha}.safetensors").read_bytes()
            if sha256_hex(data) != sha:
                raise StorageFault(f"models/{sha}.safetensors does not match its digest", "restore it from a copy")
            self._embedding = self._perceiver.load_embedding(data)
            known = [self._patches(o) for o in trained if o.patches is not None]
            self._reference = self._embedding.encode(np.concatenate(known))
        patches = self._patches(observation)
        z = self._embedding.encode(patches)
        update: dict[str, Any] = {
            "latents": store_array(self._folder, z),
            "latent": tuple(float(v) for v in z.mean(axis=0)),
            "embedding": sha,
        }
        value, variance = self._perceiver.value_from_latents(patches, z, self._reference)
        if value is not None:
            update |= {"value": value, "variance": variance}
        return observation.model_copy(update=update)


def quality_flags(data: FrameData, region: ScanRegion) -> tuple[str, ...]:
    """The instrument's flags and what the controller sees itself: 'nan', 'constant', 'partial' (wrong shape). Spectra
    have an axis of energies after rows and columns."""
    flags = list(data.flags)
    axes = 3 if region.signal == "spectra" else 2
    for array in data.channels.values():
        if array.shape[:2] != region.shape or array.ndim != axes:
            flags.append("partial")
        elif not np.isfinite(array).all():
            flags.append("nan")
        elif array.size > 1 and array.min() == array.max():
            flags.append("constant")
    return tuple(dict.fromkeys(flags))


def _settled(outcome: Outcome) -> Posted | Voided | Indeterminate:
    if outcome.state == "POST":
        assert outcome.measured is not None
        return Posted(key=outcome.key, measured=outcome.measured, digests=outcome.digests)
    if outcome.state == "VOID":
        return Voided(key=outcome.key, reason=outcome.reason)
    return Indeterminate(key=outcome.key, digests=outcome.digests, reason=outcome.reason)
