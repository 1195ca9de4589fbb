"""The simulated column: a specimen larger than the field, a beam, a detector and a clock, as one object that fires.

Its state is a pure function of the settings, the seed and the list of exposures: a column that *absorbs* what an
earlier process fired is bit for bit in the state that firing would have left. The beam is blanked between lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aecontrol.types import ScanRegion
from aecontrol.units import angstrom_to_nm, electrons_per_second, nm_to_angstrom

from .damage import Damage, DamagedSpecimen, Event
from .optics import Optics
from .render import CHANNELS, HaadfRenderer, Validity
from .scan import Detector, ScanModel
from .specimens import TARGET_KINDS, Specimen
from .streams import stream

Array = NDArray[np.float64]
CURRENT_FLUCTUATION = 0.01
CURRENT_LIMIT = 0.04
"""Largest relative deviation of the true current from the declared one; inside the 5 % that controllers assume."""
SATURATED_SHARE = 0.005
"""Share of saturated pixels from which a frame is flagged."""
LINE_BLOCKS = 64
"""Damage shows from the next of this many line blocks of a frame on; the meter is read after each block."""
TILE_NM = 1.0
TILE_MARGIN = 2

LineBlockHook = Callable[[int, int], None]


class SpecimenConfig(Protocol):
    """The configuration of any specimen."""

    def build(self, seed: int) -> Specimen:
        """The specimen of ``seed``; safe to repeat."""


@dataclass(frozen=True)
class Pulse:
    """What one exposure delivered. ``channels`` name -> float32 [rows, cols] detector output; ``electrons`` delivered,
    exactly; ``pixels`` exposed; ``seconds`` from the first pixel to the last, flybacks included; ``started_s`` column
    clock at the first pixel; ``flags`` what is wrong with the frame ('saturated'); ``validity`` of the image model."""

    channels: Mapping[str, NDArray[np.float32]]
    electrons: int
    pixels: int
    seconds: float
    started_s: float
    flags: tuple[str, ...]
    validity: Validity


class SimulatedColumn:
    """See the module. ``on_line_block(ordinal, electrons so far in this pulse)`` is called after each line block and
    may raise: then only what was delivered until there is on the meter and in the specimen."""

    def __init__(
        self,
        specimen: SpecimenConfig,
        optics: Optics,
        scan: ScanModel,
        detector: Detector,
        damage: Damage,
        beam_current_pA: float,
        seed: int,
        on_line_block: LineBlockHook | None = None,
    ) -> None:
        self._born = specimen.build(seed)
        self._body = DamagedSpecimen(self._born, damage, optics, seed)
        self._scan, self._detector = scan, detector
        self._renderer = HaadfRenderer(optics)
        self._electrons_per_second = electrons_per_second(beam_current_pA)
        self._seed = seed
        self.on_line_block = on_line_block
        self.clock_s = 0.0
        self._meter = 0
        width, height = self.field_nm
        self._tiles = np.zeros((math.ceil(height) + 2 * TILE_MARGIN, math.ceil(width) + 2 * TILE_MARGIN))

    @property
    def field_nm(self) -> tuple[float, float]:
        """Width and height of the reachable field, nm."""
        return self._born.size_nm

    @property
    def channels(self) -> tuple[str, ...]:
        """Detector channels."""
        return CHANNELS

    @property
    def meter(self) -> int:
        """All electrons ever delivered, counted as they are delivered."""
        return self._meter

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Expose ``region`` as shot ``ordinal``. Blocks; not repeatable: every call delivers again."""
        started_s = self.clock_s
        before = self._body.alive.copy(), self._body.positions_A.copy()
        electrons, points_nm, events = self._deliver(ordinal, region)
        fraction = self._image(region, points_nm, before, events)
        random = stream(self._seed, "scan-noise", ordinal)
        signal, saturated = self._detector.read(fraction, electrons / region.pixels, random)
        thickness_nm = angstrom_to_nm(float(np.ptp(self._born.positions_A[:, 2])))
        return Pulse(
            channels={CHANNELS[0]: signal},
            electrons=electrons,
            pixels=region.pixels,
            seconds=self._scan.frame_s(region),
            started_s=started_s,
            flags=("saturated",) if saturated >= SATURATED_SHARE else (),
            validity=self._renderer.validity(thickness_nm, zone_axis=True),
        )

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """Account in full for a shot that an earlier process fired: fluence, atoms, clock and meter, but no image."""
        self._deliver(ordinal, region, watched=False)

    def idle(self, seconds: float) -> None:
        """Let time pass with the beam blanked."""
        self.clock_s += seconds

    def targets(self, kind: str) -> tuple[Array, tuple[str, ...]] | None:
        """True objects of ``kind`` ('vacancy', 'atom') as the column was made: positions [n, 2] nm and labels; None
        for a kind that this specimen does not know."""
        return self._born.targets(kind) if kind in TARGET_KINDS else None

    def snapshot(self) -> Specimen:
        """The specimen as it is now."""
        return self._born.changed(self._body.alive, self._body.positions_A)

    def fluence_at_atoms(self) -> Array:
        """Fluence at every site of the specimen [n], probe tails included, e/A^2."""
        return self._body.fluence.at(self._born.positions_A[:, :2])

    def tile_fluence(self) -> Array:
        """Electrons whose probe position fell into each 1 nm tile, per area [ny, nx], e/A^2. Tile (0, 0) begins 2 nm
        to the left of and above the field; probe tails are not spread over the neighbours."""
        return self._tiles / nm_to_angstrom(TILE_NM) ** 2

    # ------------------------------------------------------------ inside

    def _deliver(self, ordinal: int, region: ScanRegion, watched: bool = True) -> tuple[int, Array, list[Event]]:
        """Put the beam on: electrons, true positions [rows, cols, 2] nm and what changed."""
        electrons = self._electrons(ordinal, region)
        points_nm = self._scan.positions_nm(region, self.clock_s, self._seed, ordinal)
        rows = region.shape[0]
        block = _block_lines(rows)
        done = 0
        try:
            while done < rows:
                last = min(done + block, rows)
                so_far = electrons * last // rows
                self._meter += so_far - electrons * done // rows
                done = last
                if watched and self.on_line_block is not None:
                    self.on_line_block(ordinal, so_far)
        finally:
            delivered = points_nm[:done]
            self._count_tiles(delivered, electrons / region.pixels)
            events = self._body.expose(nm_to_angstrom(1.0) * delivered, electrons / region.pixels)
            self.clock_s += self._scan.frame_s(region) * done / rows
        return electrons, points_nm, events

    def _electrons(self, ordinal: int, region: ScanRegion) -> int:
        """Whole electrons of the shot: the true current wanders about the declared one."""
        wander = CURRENT_FLUCTUATION * stream(self._seed, "beam-current", ordinal).standard_normal()
        current = 1.0 + min(max(wander, -CURRENT_LIMIT), CURRENT_LIMIT)
        return round(self._electrons_per_second * current * region.pixels * region.dwell_time_s)

    def _count_tiles(self, points_nm: Array, electrons_per_point: float) -> None:
        tile = np.floor(points_nm.reshape(-1, 2) / TILE_NM).astype(np.int64) + TILE_MARGIN
        ny, nx = self._tiles.shape
        inside = np.all((tile >= 0) & (tile < (nx, ny)), axis=1)
        flat = tile[inside, 1] * nx + tile[inside, 0]
        self._tiles += electrons_per_point * np.bincount(flat, minlength=nx * ny).reshape(ny, nx)

    def _image(
        self, region: ScanRegion, points_nm: Array, before: tuple[NDArray[np.bool_], Array], events: list[Event]
    ) -> NDArray[np.float32]:
        """Fraction of the beam scattered at each pixel; a change shows from the line block after it on.

        The undamaged image comes first and what has changed is then added block by block, so that not even rounding in
        a line depends on what happens after it.
        """
        rows, cols = region.shape
        block = _block_lines(rows)
        old_alive, old_A = before
        alive, new_A = old_alive.copy(), old_A.copy()
        probe_A = nm_to_angstrom(1.0) * points_nm
        image = self._atoms(np.flatnonzero(old_alive), old_A, probe_A, region.rotation_rad)
        changed: set[int] = set()
        coming = 0
        for line in range(block, rows, block):
            while coming < len(events) and events[coming].point // cols < line:
                self._body.apply(events[coming], alive, new_A)
                changed.add(events[coming].atom)
                coming += 1
            if not changed:
                continue
            atoms = np.array(sorted(changed))
            lines = probe_A[line : line + block]
            image[line : line + block] += self._atoms(atoms[alive[atoms]], new_A, lines, region.rotation_rad)
            image[line : line + block] -= self._atoms(atoms[old_alive[atoms]], old_A, lines, region.rotation_rad)
        return image

    def _atoms(self, atoms: NDArray[np.int64], positions_A: Array, probe_A: Array, turn: float) -> NDArray[np.float32]:
        """Image of some ``atoms`` (indices) at ``positions_A`` of all."""
        numbers, rms = self._born.atomic_numbers[atoms], self._born.rms_u_A[atoms]
        return self._renderer.image(positions_A[atoms, :2], numbers, rms, probe_A, turn)


def _block_lines(rows: int) -> int:
    return math.ceil(rows / LINE_BLOCKS)
