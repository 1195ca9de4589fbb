"""The simulated column: a specimen larger than the field, a beam, detectors and a clock, as one object that fires.

Its state is a pure function of the settings, the seed and the list of exposures: a column that *absorbs* what an
earlier process fired is bit for bit in the state that firing would have left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aecontrol.protocols import Change
from aecontrol.types import ScanRegion
from aecontrol.units import angstrom_to_nm, electrons_per_second, nm_to_angstrom

from .cells import CellIndex
from .damage import Damage, DamagedSpecimen, Event
from .detector import Detector, check_detectors
from .optics import Optics
from .render import Images, Renderer, Validity
from .scan import BeamPath, ScanModel, nominal_positions_nm
from .scattering import Contrast
from .specimens import TARGET_KINDS, Specimen
from .streams import stream

Array = NDArray[np.float64]
State = tuple[NDArray[np.bool_], Array]
CURRENT_FLUCTUATION = 0.01
CURRENT_LIMIT = 0.04
"""Largest relative deviation of the true current from the declared one; inside the 5 % that controllers assume."""
SATURATED_SHARE = 0.005
"""Share of saturated pixels from which a frame is flagged."""
LINE_BLOCKS = 64
"""Damage shows from the next of this many line blocks of a frame on; the meter is read after each block."""
TILE_NM = 1.0
TILE_MARGIN = 2
CELL_A = 20.0
DISPLACED_A = 10.0
"""Atoms are looked for this far from where they were born."""

LineBlockHook = Callable[[int, int], None]
Paint = Callable[[Specimen, Array], Images]
"""Images of a specimen at probe positions [..., 2] nm, by channel."""


class BeamStopped(Exception):
    """Raised by a line block hook: the beam is blanked here, and the frame ends with this block."""


class SpecimenConfig(Protocol):
    """The configuration of any specimen."""

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``; safe to repeat."""


@dataclass(frozen=True)
class Pulse:
    """What one exposure delivered. ``channels`` name -> float32 [rows, cols] detector output; ``electrons`` delivered,
    exactly; ``pixels`` exposed; ``seconds`` from the first pixel until the beam was blanked; ``started_s`` column clock
    at the first pixel; ``flags`` what is wrong with the frame ('saturated'; 'partial': lines not scanned are 0);
    ``validity`` of the image model by channel."""

    channels: Mapping[str, NDArray[np.float32]]
    electrons: int
    pixels: int
    seconds: float
    started_s: float
    flags: tuple[str, ...]
    validity: Mapping[str, Validity]


@dataclass(frozen=True)
class ColumnTruth:
    """What is really there, for scoring only. ``specimen`` as it is now, labels and all; ``electrons`` delivered;
    ``events``: what the beam changed, each with fluence and time."""

    specimen: Specimen
    electrons: int
    events: tuple[Event, ...]


class SimulatedColumn:
    """See the module. ``on_line_block(ordinal, electrons so far in this pulse)`` is called after each line block,
    which is then on the meter, and may raise: then only what was delivered until there is on the meter and in the
    specimen. :class:`BeamStopped` ends the frame early, anything else breaks it off."""

    def __init__(
        self,
        specimen: SpecimenConfig,
        optics: Optics,
        scan: ScanModel,
        detectors: Mapping[str, Detector],
        damage: Damage,
        beam_current_pA: float,
        seed: int,
        contrast: Contrast | None = None,
        on_line_block: LineBlockHook | None = None,
        device: str = "cpu",
    ) -> None:
        check_detectors(detectors)
        annuli = {name: detector.annulus for name, detector in detectors.items()}
        self._born = specimen.build(seed)
        calibrations = None
        if contrast is not None and contrast.level == "calibrated":
            from .calibration import calibrate

            calibrations = {name: calibrate(self._born, optics, annulus) for name, annulus in annuli.items()}
        self._renderer = Renderer(optics, annuli, contrast, calibrations, device)
        self._index = CellIndex(self._born.positions_A[:, :2], CELL_A)
        self._body = DamagedSpecimen(self._born, damage, optics, seed)
        self._scan, self._detectors = scan, dict(detectors)
        self._electrons_per_second = electrons_per_second(beam_current_pA)
        self._seed = seed
        self.on_line_block = on_line_block
        self.clock_s = 0.0
        self._charge = 0.0
        self._meter = 0
        self._events: list[Event] = []
        width, height = self.field_nm
        self._tiles = np.zeros((math.ceil(height) + 2 * TILE_MARGIN, math.ceil(width) + 2 * TILE_MARGIN))

    @property
    def field_nm(self) -> tuple[float, float]:
        """Width and height of the reachable field, nm."""
        return self._born.size_nm

    @property
    def channels(self) -> tuple[str, ...]:
        """Detector channels."""
        return tuple(self._detectors)

    def validity(self) -> dict[str, Validity]:
        """What may be claimed of the images of this specimen, by channel."""
        return self._renderer.validity(self._born.thickness_nm, self._born.zone_axis)

    @property
    def meter(self) -> int:
        """All electrons ever delivered, counted as they are delivered."""
        return self._meter

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Expose ``region`` as shot ``ordinal``. Blocks; not repeatable: every call delivers again."""
        started_s, charge = self.clock_s, self._charge
        before = self._body.alive.copy(), self._body.positions_A.copy()
        meter = self._meter
        points_nm, events, rows = self._deliver(ordinal, region)
        images = self._images(region, points_nm, before, events)
        channels, flags = self._read(ordinal, region, images, self._electrons(ordinal, region), charge)
        if rows < region.shape[0]:
            flags = (*flags, "partial")
            for image in channels.values():
                image[rows:] = 0.0
        return Pulse(
            channels=channels,
            electrons=self._meter - meter,
            pixels=rows * region.shape[1],
            seconds=self._scan.frame_s(region) if rows == region.shape[0] else self.clock_s - started_s,
            started_s=started_s,
            flags=flags,
            validity=self.validity(),
        )

    def preview(self, ordinal: int, region: ScanRegion, paint: Paint | None = None) -> Images:
        """The frame that firing now would give if the beam harmed nothing, noise and all; nothing is exposed. For
        simulations only. ``paint`` stands in for the linear model (fractions of the beam, vacuum included)."""
        points_nm = self._scan.positions_nm(region, self.clock_s, self._seed, ordinal, self._charge)
        if paint is None:
            images = self._atoms(None, self._body.alive, self._body.positions_A, points_nm, region.rotation_rad)
        else:
            vacuum = self._renderer.vacuum
            images = {
                name: np.asarray(image - np.float32(vacuum[name]), dtype=np.float32)
                for name, image in paint(self.snapshot(), points_nm).items()
            }
        return self._read(ordinal, region, images, self._electrons(ordinal, region), self._charge)[0]

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """Account in full for a shot that an earlier process fired: fluence, atoms, clock and meter, but no image."""
        self._deliver(ordinal, region, watched=False)

    def idle(self, seconds: float) -> None:
        """Let time pass with the beam blanked."""
        self._events += self._body.idle(self.clock_s, self.clock_s + seconds)
        self.clock_s += seconds
        self._charge = float(self._scan.charging.after(self._charge, seconds, beam_on=False))

    def targets(self, kind: str) -> tuple[Array, tuple[str, ...]] | None:
        """True objects of ``kind`` ('vacancy', 'atom') as the column was made: positions [n, 2] nm and labels; None
        for a kind that this specimen does not know."""
        return self._born.targets(kind) if kind in TARGET_KINDS else None

    def snapshot(self) -> Specimen:
        """The specimen as it is now."""
        return self._born.changed(self._body.alive, self._body.positions_A)

    def truth(self) -> ColumnTruth:
        """What is really there now, for scoring only."""
        return ColumnTruth(self.snapshot(), self._meter, tuple(self._events))

    def atoms_nm(self) -> Array:
        """Positions [n, 2] of the atoms left, nm."""
        return angstrom_to_nm(1.0) * self._body.positions_A[self._body.alive, :2]

    def sites(self) -> Array:
        """Every site as born [n, 3]: (x, y) in nm and the atomic number of what sat there, 0 for a vacant one."""
        born = self._born
        number = np.where(born.alive, born.atomic_numbers, 0)
        return np.column_stack([angstrom_to_nm(1.0) * born.positions_A[:, :2], number])

    def changes(self) -> tuple[Change, ...]:
        """What the beam has done so far, each where its atom was born."""
        where = angstrom_to_nm(1.0) * self._born.positions_A
        return tuple(
            Change(
                (float(where[event.atom, 0]), float(where[event.atom, 1])),
                event.kind,
                event.fluence_e_per_A2,
                math.nan if event.time_s is None else event.time_s,
                event.atom,
            )
            for event in self._events
        )

    def noiseless(self, region: ScanRegion) -> Images:
        """What ideal detectors on an ideal scan of ``region`` would see now, fraction of the beam by channel. Nothing
        is exposed; for scoring only."""
        points_nm = nominal_positions_nm(region)
        images = self._atoms(None, self._body.alive, self._body.positions_A, points_nm, region.rotation_rad)
        return {name: image + np.float32(self._renderer.vacuum[name]) for name, image in images.items()}

    def fluence_at_atoms(self) -> Array:
        """Fluence at every site of the specimen [n], probe tails included, e/A^2."""
        return self._body.fluence.at(self._born.positions_A[:, :2])

    def tile_fluence(self) -> Array:
        """Electrons whose probe position fell into each 1 nm tile, per area [ny, nx], e/A^2. Tile (0, 0) begins 2 nm
        to the left of and above the field; probe tails are not spread over the neighbours."""
        return self._tiles / nm_to_angstrom(TILE_NM) ** 2

    # ------------------------------------------------------------ inside

    def _deliver(self, ordinal: int, region: ScanRegion, watched: bool = True) -> tuple[Array, list[Event], int]:
        """Put the beam on: true positions [rows, cols, 2] nm of the whole region, what changed, lines delivered."""
        electrons = self._electrons(ordinal, region)
        points_nm = self._scan.positions_nm(region, self.clock_s, self._seed, ordinal, self._charge)
        path = self._scan.beam_path(region, points_nm, self.clock_s, electrons / self._scan.beam_on_s(region))
        rows = region.shape[0]
        block = block_lines(rows)
        by_line = path.electrons_by_line(electrons)
        done = 0
        try:
            while done < rows:
                last = min(done + block, rows)
                self._meter += by_line[last] - by_line[done]
                done = last
                if watched and self.on_line_block is not None:
                    self.on_line_block(ordinal, by_line[done])
        except BeamStopped:
            pass
        finally:
            delivered = path.lines(done)
            self._count_tiles(delivered)
            points_A = nm_to_angstrom(1.0) * delivered.points_nm
            events = self._body.expose(points_A, delivered.electrons, delivered.times_s)
            self._events += events
            whole = self._scan.frame_s(region)
            seconds = whole if done == rows else float(np.append(self._scan.line_starts_s(region), whole)[done])
            self.clock_s += seconds
            self._charge = float(self._scan.charging.after(self._charge, seconds, beam_on=True))
            self.idle(self._scan.pause_s)
        return points_nm, events, done

    def _read(
        self, ordinal: int, region: ScanRegion, images: Images, electrons: int, charge: float
    ) -> tuple[Images, tuple[str, ...]]:
        """What the detectors make of what the atoms scatter, and what is wrong with it."""
        charging = self._scan.charging
        gain = 1.0 + charging.gain * charging.after(charge, self._scan.line_starts_s(region), beam_on=True)
        per_pixel = electrons / self._scan.beam_on_s(region) * region.dwell_time_s
        channels, worst = {}, 0.0
        for name, detector in self._detectors.items():
            fraction = (images[name] + np.float32(self._renderer.vacuum[name])) * gain[:, None]
            random = stream(self._seed, f"scan-noise {name}", ordinal)
            channels[name], saturated = detector.read(fraction, per_pixel, random)
            worst = max(worst, saturated)
        return channels, ("saturated",) if worst >= SATURATED_SHARE else ()

    def _electrons(self, ordinal: int, region: ScanRegion) -> int:
        """Whole electrons of the shot: the true current wanders about the declared one."""
        wander = CURRENT_FLUCTUATION * stream(self._seed, "beam-current", ordinal).standard_normal()
        current = 1.0 + min(max(wander, -CURRENT_LIMIT), CURRENT_LIMIT)
        return round(self._electrons_per_second * current * self._scan.beam_on_s(region))

    def _count_tiles(self, path: BeamPath) -> None:
        tile = np.floor(path.points_nm / TILE_NM).astype(np.int64) + TILE_MARGIN
        ny, nx = self._tiles.shape
        inside = (tile[:, 0] >= 0) & (tile[:, 0] < nx) & (tile[:, 1] >= 0) & (tile[:, 1] < ny)
        flat = tile[inside, 1] * nx + tile[inside, 0]
        self._tiles += np.bincount(flat, weights=path.electrons[inside], minlength=nx * ny).reshape(ny, nx)

    def _images(self, region: ScanRegion, points_nm: Array, before: State, events: list[Event]) -> Images:
        """What the atoms add at each pixel, by channel; a change shows from the line block after it on.

        The undamaged image comes first and what has changed is then added block by block, so that not even rounding in
        a line depends on what happens after it.
        """
        rows = region.shape[0]
        block = block_lines(rows)
        turn = region.rotation_rad
        old_alive, old_A = before
        images = self._atoms(None, old_alive, old_A, points_nm, turn)
        if not events:
            return images
        per_line = self._scan.points_per_line(region)
        alive, new_A = old_alive.copy(), old_A.copy()
        changed: set[int] = set()
        coming = 0
        for line in range(block, rows, block):
            while coming < len(events) and events[coming].point // per_line < line:
                self._body.apply(events[coming], alive, new_A)
                changed.add(events[coming].atom)
                coming += 1
            if not changed:
                continue
            atoms = np.array(sorted(changed))
            lines = points_nm[line : line + block]
            now = self._atoms(atoms, alive, new_A, lines, turn)
            then = self._atoms(atoms, old_alive, old_A, lines, turn)
            for name, image in images.items():
                image[line : line + block] += now[name] - then[name]
        return images

    def _atoms(
        self,
        atoms: NDArray[np.int64] | None,
        alive: NDArray[np.bool_],
        positions_A: Array,
        points_nm: Array,
        turn: float,
    ) -> Images:
        """Images of the ``atoms`` (indices; None: all within reach) that are ``alive``, at ``positions_A`` of all."""
        probe_A = nm_to_angstrom(1.0) * points_nm
        if atoms is None:
            reach = self._renderer.margin_A + DISPLACED_A
            flat = probe_A.reshape(-1, 2)
            low, high = ([pick(flat[:, axis]) for axis in (0, 1)] for pick in (np.min, np.max))
            atoms = self._index.box(np.asarray(low) - reach, np.asarray(high) + reach)
        atoms = atoms[alive[atoms]]
        numbers, rms = self._born.atomic_numbers[atoms], self._born.rms_u_A[atoms]
        return self._renderer.images(positions_A[atoms, :2], numbers, rms, probe_A, turn)


def block_lines(rows: int) -> int:
    """Lines in each block of a frame of ``rows`` lines."""
    return math.ceil(rows / LINE_BLOCKS)
