"""Simulations that are written to files: images and series with their truth, and training sets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aecontrol.errors import BadInput
from aecontrol.image_sets import ImageSet, Progress
from aecontrol.types import Count, Model, NonNegative, Positive, PositiveInt, ScanRegion
from aecontrol.units import angstrom_to_nm, fluence_e_per_A2

from .cache import cache_folder
from .column import SimulatedColumn
from .materials import assumptions
from .render import Images
from .scan import nominal_positions_nm
from .setup import ColumnSetup
from .specimens import Specimen
from .streams import stream

Arrays = dict[str, NDArray[np.generic]]
ATOMS_MARGIN_NM = 0.3
"""Atoms this far outside the frame are listed too: they shine into it."""
DEFECT_NM, OCTAHEDRON_NM = 0.12, 0.3
"""A place belongs to a defect, or to an octahedron, this far from it."""
MAX_PIXELS = 2**25
Range = tuple[Positive, Positive]
Side = Annotated[int, Field(gt=0, le=16384)]
"""Pixels along one side of a frame."""


class View(Model):
    """Where and how a simulation scans."""

    center_nm: tuple[float, float] | None = Field(None, description="centre (x, y), nm; null: the middle of the field")
    fov_nm: tuple[Positive, Positive] | None = Field(None, description="width and height, nm; null: the whole field")
    shape: tuple[Side, Side] = Field((512, 512), description="(rows, columns)")
    rotation_deg: float = Field(0.0, description="turn of the fast axis from +x towards +y, degrees")
    dwell_time_s: Positive = Field(1e-5, description="dwell time per pixel, s")

    def region(self, field_nm: tuple[float, float]) -> ScanRegion:
        """As a region of a field. Raises BadInput when it leaves the field."""
        width, height = field_nm
        if self.shape[0] * self.shape[1] > MAX_PIXELS:
            raise BadInput(
                f"view.shape: {self.shape[0]} x {self.shape[1]} pixels are more than {MAX_PIXELS}", "scan fewer pixels"
            )
        region = ScanRegion(
            center_nm=self.center_nm or (width / 2, height / 2),
            fov_nm=self.fov_nm or field_nm,
            rotation_rad=math.radians(self.rotation_deg),
            shape=self.shape,
            dwell_time_s=self.dwell_time_s,
        )
        corners = region.corners_nm()
        if not all(-1e-6 <= x <= width + 1e-6 and -1e-6 <= y <= height + 1e-6 for x, y in corners):
            raise BadInput(
                f"view: corners {[(round(x, 3), round(y, 3)) for x, y in corners]} nm lie outside the specimen's "
                f"field of {width:g} x {height:g} nm",
                "move the centre, make fov_nm smaller or the specimen's size_nm larger",
            )
        return region


class ScanSimulation(ColumnSetup):
    """kind = "scan": one frame, or a series of the same place that the beam damages as it goes."""

    kind: Literal["scan"] = "scan"
    seed: Count = Field(0, description="of specimen, noise and damage")
    view: View = View()
    phonon_configurations: Count = Field(
        0, description="0: the fast linear model; else multislice with that many frozen phonons (extra 'multislice')"
    )
    frames: PositiveInt = Field(1, description="frames of the same place, one after the other")
    interval_s: NonNegative = Field(0.0, description="time between two frames with the beam blanked, s")

    def produce(self, device: str, workers: int, progress: Progress) -> Iterator[ImageSet]:
        """The frames, what each ideally shows before it is taken, labels, atoms and what the beam did to them."""
        if workers > 1:
            raise BadInput(f"--workers {workers}: a series cannot be taken by several workers", "leave --workers out")
        column = self.column(self.seed, device)
        region = self.view.region(column.field_nm)
        seen, ideal, alive, electrons = [], [], [], []
        for frame in range(self.frames):
            if frame:
                column.idle(self.interval_s)
            alive.append(column.snapshot().alive)
            before = column.meter
            images, noisy = self._frame(column, frame, region)
            ideal.append(images)
            seen.append(noisy)
            electrons.append((column.meter - before) * region.dwell_time_s / self.scan.beam_on_s(region))
            progress(frame + 1, self.frames)
        arrays = labels_of_places(column.snapshot(), region)
        arrays |= {f"noiseless_{name}": _stacked([image[name] for image in ideal]) for name in column.channels}
        arrays |= atoms_in(column.snapshot(), region, alive)
        arrays |= events_of(column)
        arrays["electrons_per_pixel"] = np.array(electrons if self.frames > 1 else electrons[0])
        yield ImageSet(
            channels={name: _stacked([image[name] for image in seen]) for name in column.channels},
            pixel_size_nm=region.pixel_size_nm,
            arrays=arrays,
            metadata={
                "title": f"simulated {self.specimen['kind']}, seed {self.seed}",
                "settings": self.model_dump(mode="json"),
                "region": region.model_dump(mode="json"),
                "validity": self._validity(column),
                "assumptions": list(assumptions(self.damage, column.snapshot().elements)),
                "fluence_e_per_A2_per_frame": fluence_e_per_A2(electrons[0] * region.pixels, region.area_nm2),
                "electrons_delivered": column.meter,
                "units": "positions nm; fluence e/A^2; noiseless images are fractions of the beam",
            },
        )

    def _frame(self, column: SimulatedColumn, frame: int, region: ScanRegion) -> tuple[Images, Mapping[str, Any]]:
        """The ideal images, and what the detectors make of them; the beam has been there afterwards."""
        if not self.phonon_configurations:
            return column.noiseless(region), column.fire(frame, region).channels
        from .multislice import MultisliceRenderer

        annuli = {name: detector.annulus for name, detector in self.detectors.items()}
        paint = MultisliceRenderer(self.optics, annuli, self.phonon_configurations, self.seed, cache_folder()).render
        ideal = paint(column.snapshot(), nominal_positions_nm(region))
        noisy = column.preview(frame, region, paint)
        column.absorb(frame, region)
        return ideal, noisy

    def _validity(self, column: SimulatedColumn) -> dict[str, dict[str, Any]]:
        """What may be claimed of each channel."""
        if self.phonon_configurations:
            note = (
                f"multislice, {self.phonon_configurations} phonon configurations; damage shows from the next frame on"
            )
            return {name: {"linear_ok": True, "calibrated": True, "note": note} for name in self.detectors}
        return {name: vars(validity) for name, validity in column.validity().items()}


TRAINING_LABELS = ("atoms_px", "atomic_numbers", "atoms_column", "atoms_site", "atoms_alive", "atoms_defect")


class TrainingSet(Model):
    """kind = "training": many small frames at random places, turns, doses and samplings, in shards with labels.

    Every frame is of a specimen, optics and detectors of its own choice among ``columns``; each is rendered before the
    beam has done anything to it. Specimens are drawn anew for each shard, so ``frames_per_shard`` decides what is seen.
    """

    kind: Literal["training"] = "training"
    seed: Count = Field(0, description="of everything")
    columns: Annotated[tuple[ColumnSetup, ...], Field(min_length=1)] = Field(description="drawn with equal chance")
    frames: PositiveInt = Field(64, description="frames in all")
    frames_per_shard: PositiveInt = Field(64, description="frames in one file")
    size_px: Side = Field(128, description="rows and columns of a frame")
    pixel_nm: Range = Field((0.01, 0.03), description="range of pixel sizes, nm (drawn log-uniformly)")
    dwell_time_s: Range = Field((1e-6, 1e-4), description="range of dwell times, s (drawn log-uniformly)")
    specimens: PositiveInt = Field(4, description="different specimens (seeds) per column and shard")

    @model_validator(mode="after")
    def _ranges(self) -> TrainingSet:
        for name in ("pixel_nm", "dwell_time_s"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the smaller number comes first, got {low}, {high}")
        if not self._channels():
            raise ValueError("columns: no detector is common to all; name their detectors alike")
        return self

    def _channels(self) -> list[str]:
        """Detectors that every column has."""
        return sorted(set.intersection(*(set(column.detectors) for column in self.columns)))

    def _check_room(self) -> None:
        """Raises BadInput when the largest frame does not fit, turned, into the field of every specimen."""
        side = math.sqrt(2.0) * self.size_px * self.pixel_nm[1]
        for index, setup in enumerate(self.columns):
            field_nm = _column(setup, self.seed, "cpu").field_nm
            if side > min(field_nm):
                raise BadInput(
                    f"columns.{index}: a turned frame of {self.size_px} pixels of {self.pixel_nm[1]} nm needs "
                    f"{side:.2f} nm, the specimen's field is {field_nm[0]:g} x {field_nm[1]:g} nm",
                    "make size_px or pixel_nm smaller, or the specimen's size_nm larger",
                )

    def produce(self, device: str, workers: int, progress: Progress) -> Iterator[ImageSet]:
        """The shards in order. With several workers they are made by dask in processes of their own; the frames are the
        same."""
        self._check_room()
        shards = math.ceil(self.frames / self.frames_per_shard)
        if workers <= 1:
            for index in range(shards):
                yield self.shard(index, device)
                progress(index + 1, shards)
            return
        try:
            from dask.base import compute
            from dask.delayed import delayed
        except ImportError:
            raise BadInput(
                f"--workers {workers} needs dask, which is not installed",
                "pip install -c constraints.txt -e '.[bench]', or leave --workers out",
            ) from None
        for first in range(0, shards, workers):
            batch = [delayed(self.shard)(index, device) for index in range(first, min(first + workers, shards))]
            yield from compute(*batch, scheduler="processes", num_workers=workers)  # type: ignore[no-untyped-call]
            progress(first + len(batch), shards)

    def shard(self, index: int, device: str) -> ImageSet:
        """Shard ``index``: channels [frames, size, size] and, atom by atom, the frame, position (px) and element."""
        first = index * self.frames_per_shard
        made = [self._frame(k, index, device) for k in range(first, min(first + self.frames_per_shard, self.frames))]
        counts = [len(atoms["atomic_numbers"]) for _, atoms, _ in made]
        arrays: Arrays = {"atoms_frame": np.repeat(np.arange(len(made)), counts)}
        for key in made[0][1]:
            arrays[key] = np.concatenate([atoms[key] for _, atoms, _ in made])
        for key in made[0][2]:
            arrays[f"frame_{key}"] = np.array([facts[key] for _, _, facts in made])
        return ImageSet(
            channels={name: np.stack([channels[name] for channels, _, _ in made]) for name in self._channels()},
            pixel_size_nm=(math.nan, math.nan),  # each frame has its own: frame_pixel_nm
            arrays=arrays,
            metadata={"title": f"training shard {index}", "shard": index, "settings": self.model_dump(mode="json")},
        )

    def _frame(self, index: int, shard: int, device: str) -> tuple[Mapping[str, Any], Arrays, dict[str, Any]]:
        random = stream(self.seed, "training", index)
        which = int(random.integers(len(self.columns)))
        seed = self.seed + 1_000_003 * (shard * self.specimens + int(random.integers(self.specimens)))
        column = _column(self.columns[which], seed, device)
        pixel, dwell = (_log_uniform(random, *bounds) for bounds in (self.pixel_nm, self.dwell_time_s))
        side = self.size_px * pixel
        room = np.asarray(column.field_nm) - math.sqrt(2.0) * side
        center = 0.5 * (np.asarray(column.field_nm) - room) + random.random(2) * room
        region = ScanRegion(
            center_nm=(float(center[0]), float(center[1])),
            fov_nm=(side, side),
            rotation_rad=float(random.uniform(-math.pi, math.pi)),
            shape=(self.size_px, self.size_px),
            dwell_time_s=dwell,
        )
        channels = column.preview(index, region)
        atoms = atoms_in(column.snapshot(), region, None)
        facts: dict[str, Any] = {"pixel_nm": pixel, "dwell_time_s": dwell, "column": which, "specimen_seed": seed}
        facts |= {"rotation_rad": region.rotation_rad, "center_nm": region.center_nm}
        kept = {key: atoms[key] for key in TRAINING_LABELS}
        return channels, kept, facts


_MADE: dict[str, SimulatedColumn] = {}


def _column(setup: ColumnSetup, seed: int, device: str) -> SimulatedColumn:
    """The column of a setup and seed; the last few are kept, for a specimen is dearer than a frame of it."""
    key = f"{setup.model_dump_json()} {seed} {device}"
    if key not in _MADE:
        while len(_MADE) >= 4:
            del _MADE[next(iter(_MADE))]
        _MADE[key] = setup.column(seed, device)
    return _MADE[key]


def labels_of_places(specimen: Specimen, region: ScanRegion) -> Arrays:
    """Every field label at the commanded pixel centres: ``labels_NAME`` [rows, cols, ...], and what sites near by say:
    ``labels_defect`` (its class, '' for none) and ``labels_tilt_deg`` (of the nearest octahedron)."""
    points_nm = nominal_positions_nm(region)
    found: Arrays = {f"labels_{name}": values for name, values in specimen.labels(points_nm).items()}
    faulty = np.flatnonzero(specimen.defect != "")
    if len(faulty):
        found["labels_defect"] = _nearest(specimen, faulty, specimen.defect, points_nm, DEFECT_NM, "")
    if "tilt_deg" in specimen.arrays:
        tilt = np.asarray(specimen.arrays["tilt_deg"], dtype=np.float64)
        known = np.flatnonzero(np.isfinite(tilt).all(axis=1))
        found["labels_tilt_deg"] = _nearest(specimen, known, tilt, points_nm, OCTAHEDRON_NM, math.nan)
    return found


def _nearest(
    specimen: Specimen,
    sites: NDArray[np.int64],
    values: NDArray[Any],
    points_nm: NDArray[np.float64],
    reach_nm: float,
    missing: Any,
) -> NDArray[np.generic]:
    """At each point the value of the nearest of ``sites``, ``missing`` where none lies within ``reach_nm``."""
    from scipy.spatial import cKDTree

    tree = cKDTree(angstrom_to_nm(1.0) * specimen.positions_A[sites, :2])
    distance, place = tree.query(points_nm, distance_upper_bound=reach_nm)
    far = ~np.isfinite(distance)
    found = values[sites[np.where(far, 0, place)]]
    found[far] = missing
    return np.asarray(found)


def atoms_in(specimen: Specimen, region: ScanRegion, alive_by_frame: list[NDArray[np.bool_]] | None) -> Arrays:
    """The sites in and just around ``region`` as the specimen is now: positions in the specimen frame (nm) and in
    pixels of the frame (the centre of pixel [0, 0] at (0.5, 0.5)), element, column, site, defect, and labels."""
    xyz_nm = angstrom_to_nm(1.0) * specimen.positions_A
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    along = (xyz_nm[:, :2] - np.asarray(region.center_nm)) @ np.array([[c, -s], [s, c]])
    near = np.flatnonzero(np.all(np.abs(along) <= 0.5 * np.asarray(region.fov_nm) + ATOMS_MARGIN_NM, axis=1))
    found: Arrays = {
        "atoms_xyz_nm": xyz_nm[near],
        "atoms_px": (along[near] + 0.5 * np.asarray(region.fov_nm)) / np.asarray(region.pixel_size_nm),
        "atomic_numbers": specimen.atomic_numbers[near],
        "atoms_alive": specimen.alive[near],
        "atoms_column": specimen.column_id[near],
        "atoms_site": specimen.site[near],
        "atoms_defect": specimen.defect[near],
        "atoms_index": near,
    }
    found |= {f"atoms_{name}": values[near] for name, values in specimen.arrays.items()}
    if alive_by_frame is not None:
        found["atoms_alive_before_frame"] = np.stack([alive[near] for alive in alive_by_frame])
    return found


def events_of(column: SimulatedColumn) -> Arrays:
    """What the beam changed: site (as in ``atoms_index``), kind, fluence and time of every event."""
    events = column.truth().events
    return {
        "events_atom": np.array([event.atom for event in events], dtype=np.int64),
        "events_kind": np.array([event.kind for event in events], dtype="<U9"),
        "events_fluence_e_per_A2": np.array([event.fluence_e_per_A2 for event in events], dtype=np.float64),
        "events_time_s": np.array([event.time_s for event in events], dtype=np.float64),
    }


def _stacked(images: list[NDArray[np.float32]]) -> NDArray[np.generic]:
    return np.stack(images) if len(images) > 1 else images[0]


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(random.uniform(math.log(low), math.log(high))))
