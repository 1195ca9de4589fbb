"""The simulated column: a specimen larger than any scan, which remembers every electron it was given.

Its state (fluence at every atom, which atoms are left, the clock, the meter) is a pure function of the seed and of the
shots in order, whether they were fired here or are absorbed from an earlier process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aecontrol.types import ScanRegion
from aecontrol.units import electrons_per_second, nm_to_angstrom

from .damage import Damage, thresholds
from .optics import Optics
from .render import CHANNELS, HaadfRenderer, Validity
from .scan import Detector, ScanModel
from .specimens import SYMBOLS, Specimen
from .streams import stream

Array = NDArray[np.float64]
CURRENT_SPREAD, CURRENT_LIMIT = 0.01, 0.04
"""The true current differs from the declared one by 1 % rms, never by more than 4 % (an assumption)."""
SATURATED_SHARE = 1e-3
"""A frame with more saturated pixels than this is flagged."""
BLOCK_ROWS = 8
"""Rows after which losses within a frame take effect."""


class SpecimenConfig(Protocol):
    """A specimen's configuration."""

    def build(self, seed: int) -> Specimen:
        """The specimen."""


@dataclass(frozen=True)
class Pulse:
    """What one exposure delivered; see the driver's protocol. ``validity``: how far the image can be trusted."""

    channels: dict[str, NDArray[np.float32]]
    electrons: int
    pixels: int
    seconds: float
    started_s: float
    flags: tuple[str, ...]
    validity: Validity


class SimulatedColumn:
    """A beam of ``beam_current_pA`` over one specimen. ``on_block`` is called while a pulse is half delivered (after
    each block of lines has been counted by the meter): a fault injector may raise there."""

    channels = CHANNELS

    def __init__(
        self,
        specimen: SpecimenConfig,
        optics: Optics,
        scan: ScanModel,
        detector: Detector,
        damage: Damage,
        beam_current_pA: float,
        seed: int,
        on_block: Callable[[], None] = lambda: None,
    ) -> None:
        self._specimen = specimen.build(seed)
        self._original = self._specimen
        self._optics, self._scan, self._detector, self._seed = optics, scan, detector, seed
        self._rate = electrons_per_second(beam_current_pA)
        self._renderer = HaadfRenderer(optics)
        symbols = np.array([SYMBOLS[int(number)] for number in range(max(SYMBOLS) + 1) if number in SYMBOLS])
        order = np.array([number for number in range(max(SYMBOLS) + 1) if number in SYMBOLS])
        of_atom = symbols[np.searchsorted(order, self._specimen.atomic_numbers)]
        self._knock_on, self._radiolysis = damage.rates_A2(of_atom, optics.voltage_kV)
        self._limits = thresholds(seed, len(self._specimen))
        self._on_block = on_block
        self.fluence_e_per_A2: Array = np.zeros(len(self._specimen))
        self.clock_s = 0.0
        self.meter = 0
        nx, ny = (math.ceil(side) + 2 for side in self._specimen.size_nm)
        self.tiles_e_per_A2: Array = np.zeros((ny, nx))

    @property
    def field_nm(self) -> tuple[float, float]:
        """Width and height of the field, nm."""
        return self._specimen.size_nm

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Expose ``region``; atoms lost on the way are missing from the lines that follow."""
        started = self.clock_s
        positions = self._positions(ordinal, region)
        per_pixel = self._electrons_per_pixel(ordinal, region)
        electrons = self._deliver(ordinal, region, positions, per_pixel)
        fluence = self._fluence(positions, per_pixel, region.rotation_rad)
        lost = self._alive & ~self._survivors(self.fluence_e_per_A2 + fluence)
        rows = len(positions)
        if not lost.any():
            rendered = self._renderer.render(self._specimen, positions, region.rotation_rad)
            image, validity = rendered.channels[CHANNELS[0]], rendered.validity
        else:
            image, validity = self._render_losing(positions, per_pixel, region.rotation_rad, lost)
        self._settle(fluence, region)
        random = stream(self._seed, "scan-noise", ordinal)
        signal, saturated = self._detector.read(image, per_pixel, random)
        flags = ("saturated",) if saturated > SATURATED_SHARE else ()
        return Pulse(
            {CHANNELS[0]: signal},
            electrons,
            rows * positions.shape[1],
            self._scan.frame_s(region),
            started,
            flags,
            validity,
        )

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """Account for a shot of an earlier process in full, without an image."""
        positions = self._positions(ordinal, region)
        per_pixel = self._electrons_per_pixel(ordinal, region)
        self._deliver(ordinal, region, positions, per_pixel)
        self._settle(self._fluence(positions, per_pixel, region.rotation_rad), region)

    def idle(self, seconds: float) -> None:
        """Let time pass with the beam blanked."""
        self.clock_s += seconds

    def targets(self, kind: str) -> tuple[Array, tuple[str, ...]]:
        """Target objects as the specimen was when the column was made; see :meth:`Specimen.targets`."""
        return self._original.targets(kind)

    def snapshot(self) -> Specimen:
        """The specimen as it is now."""
        return self._specimen

    # ------------------------------------------------------------ inside

    @property
    def _alive(self) -> NDArray[np.bool_]:
        return self._specimen.alive

    def _positions(self, ordinal: int, region: ScanRegion) -> Array:
        return self._scan.positions_nm(region, self.clock_s, self._seed, ordinal)

    def _electrons_per_pixel(self, ordinal: int, region: ScanRegion) -> float:
        draw = CURRENT_SPREAD * float(stream(self._seed, "current", ordinal).standard_normal())
        return self._rate * (1 + max(-CURRENT_LIMIT, min(CURRENT_LIMIT, draw))) * region.dwell_time_s

    def _deliver(self, ordinal: int, region: ScanRegion, positions: Array, per_pixel: float) -> int:
        """Count what leaves the gun, block by block, on the meter and on the tiles where it lands."""
        rows, cols = region.shape
        electrons = 0
        for first in range(0, rows, BLOCK_ROWS):
            block = positions[first : first + BLOCK_ROWS]
            total = math.floor(per_pixel * cols * (first + len(block))) - electrons
            electrons += total
            self.meter += total
            tile = np.clip(np.floor(block).astype(int) + 1, 0, np.array(self.tiles_e_per_A2.shape[::-1]) - 1)
            flat = tile[..., 1] * self.tiles_e_per_A2.shape[1] + tile[..., 0]
            share = np.bincount(flat.ravel(), minlength=self.tiles_e_per_A2.size) * (total / flat.size / 100.0)
            self.tiles_e_per_A2 += share.reshape(self.tiles_e_per_A2.shape)
            self._on_block()
        return electrons

    def _fluence(self, positions: Array, per_pixel: float, rotation_rad: float) -> Array:
        """Fluence [n] that a scan adds at every atom, e/A^2: probe with tails, at the true positions."""
        fluence = np.zeros(len(self._specimen))
        probe = nm_to_angstrom(1.0) * positions.reshape(-1, 2)
        near, values = self._renderer.dose(self._specimen.positions_A[:, :2], probe, per_pixel, rotation_rad)
        fluence[near] = values
        return fluence

    def _survivors(self, fluence: Array) -> NDArray[np.bool_]:
        survivors: NDArray[np.bool_] = self._alive & (self._knock_on * fluence < self._limits[0])
        return survivors & (self._radiolysis * fluence < self._limits[1])

    def _settle(self, fluence: Array, region: ScanRegion) -> None:
        self.fluence_e_per_A2 = self.fluence_e_per_A2 + fluence
        self._specimen = self._specimen.changed(self._survivors(self.fluence_e_per_A2), self._specimen.positions_A)
        self.clock_s += self._scan.frame_s(region)

    def _render_losing(
        self, positions: Array, per_pixel: float, rotation_rad: float, lost: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], Validity]:
        """The image, block by block of lines, without the atoms of ``lost`` from the block after their loss."""
        gone = np.zeros_like(lost)
        so_far = self.fluence_e_per_A2.copy()
        image = np.empty(positions.shape[:2], dtype=np.float32)
        for first in range(0, len(positions), BLOCK_ROWS):
            block = positions[first : first + BLOCK_ROWS]
            left = self._specimen.changed(self._alive & ~gone, self._specimen.positions_A)
            rendered = self._renderer.render(left, block, rotation_rad)
            image[first : first + BLOCK_ROWS] = rendered.channels[CHANNELS[0]]
            so_far += self._fluence(block, per_pixel, rotation_rad)
            gone = lost & ~self._survivors(so_far)
        return image, rendered.validity
