"""A recorded image as a microscope: it reveals only what was scanned, and charges each pixel once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput, InstrumentFault, RecordCannotAnswer
from aecontrol.types import ScanRegion

_ALIGNED_NM = 1e-6  # rounding of a region that was computed to lie on the grid; a picometre is 1e-3


@dataclass(frozen=True)
class Pulse:
    """What one exposure delivered: ``channels`` name -> [rows, cols]; ``electrons`` None, for a record does not say;
    ``pixels`` revealed for the first time; ``seconds`` they take; ``started_s`` on the record's own clock."""

    channels: dict[str, NDArray[np.generic]]
    electrons: int | None
    pixels: int
    seconds: float
    started_s: float
    flags: tuple[str, ...] = ()


class RecordedColumn:
    """A column whose specimen is one recorded image; scans read its pixels.

    A region must lie on the record's own pixel grid: not turned, inside the field, corners on pixel corners, pixels a
    whole number of record pixels wide and high. Coarser pixels read every k-th pixel of every k-th line, from k // 2:
    as a beam that visits fewer points, nothing is averaged. Revealed pixels can be read again at no cost. What it
    answers depends only on the shots before, so a rebuilt column continues as the old one would have.

    ``channels``: detector channel -> image [rows, cols], all of one shape. ``atoms_px`` [n, 2]: true atoms (x, y) in
    px from the image's corner, the centre of pixel [row, col] at (col + 1/2, row + 1/2); only the scorer sees them.
    ``shape`` (rows, cols) and ``pixel_size_nm`` are the record's; ``clock_s`` advances by the dwell of revealed pixels.
    Raises BadInput when the channels or the pixel size cannot be a microscope image.
    """

    def __init__(
        self,
        channels: Mapping[str, NDArray[np.generic]],
        pixel_size_nm: float,
        atoms_px: NDArray[np.float64] | None = None,
        atom_label: str = "atom",
    ) -> None:
        shapes = {image.shape for image in channels.values()}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or 0 in shape:
            listed = {name: image.shape for name, image in channels.items()}
            raise BadInput(f"channels of shapes {listed}", "give images [rows, columns] of one and the same size")
        if not (np.isfinite(pixel_size_nm) and pixel_size_nm > 0):
            raise BadInput(f"pixel size {pixel_size_nm} nm", "give the recorded pixel size, a positive number of nm")
        self._channels = dict(channels)
        self.shape: tuple[int, int] = (shape[0], shape[1])
        self.pixel_size_nm = float(pixel_size_nm)
        self._atoms_nm = None if atoms_px is None else np.asarray(atoms_px, float).reshape(-1, 2) * self.pixel_size_nm
        self._atom_label = atom_label
        self._revealed = np.zeros(self.shape, bool)
        self._shots = 0
        self.clock_s = 0.0

    @property
    def field_nm(self) -> tuple[float, float]:
        """Width and height of the record, nm."""
        return self.shape[1] * self.pixel_size_nm, self.shape[0] * self.pixel_size_nm

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the detector channels."""
        return tuple(self._channels)

    def check(self, region: ScanRegion) -> None:
        """Raises RecordCannotAnswer when the record does not hold what ``region`` asks for. Reveals nothing."""
        self._slices(region)

    def new_pixels(self, region: ScanRegion) -> int:
        """Pixels that ``region`` would reveal for the first time. Reveals nothing; raises as :meth:`check`."""
        seen = self._revealed[self._slices(region)]
        return int(seen.size - np.count_nonzero(seen))

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Read ``region`` as the ``ordinal``-th shot (0, 1, ...); non-finite pixels are flagged 'nan'.

        Raises RecordCannotAnswer as :meth:`check`, InstrumentFault when a shot is repeated.
        """
        pixels, started_s = self._reveal(ordinal, region)
        where = self._slices(region)
        channels = {name: image[where].copy() for name, image in self._channels.items()}
        flags = () if all(np.isfinite(image).all() for image in channels.values()) else ("nan",)
        return Pulse(channels, None, pixels, self.clock_s - started_s, started_s, flags)

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """Count ``region`` as revealed by an earlier process, as the ``ordinal``-th shot. Raises as :meth:`fire`."""
        self._reveal(ordinal, region)

    def targets(self, kind: str) -> tuple[NDArray[np.float64], tuple[str, ...]] | None:
        """Labelled objects: positions [n, 2] (x, y) nm and labels; None for any kind but 'atom', or without labels."""
        if kind != "atom" or self._atoms_nm is None:
            return None
        return self._atoms_nm.copy(), (self._atom_label,) * len(self._atoms_nm)

    def _reveal(self, ordinal: int, region: ScanRegion) -> tuple[int, float]:
        if ordinal < self._shots:
            raise InstrumentFault(f"shot {ordinal} asked of a record that has seen {self._shots}", "shots go in order")
        pixels, started_s = self.new_pixels(region), self.clock_s
        self._revealed[self._slices(region)] = True
        self._shots = ordinal + 1
        self.clock_s += pixels * region.dwell_time_s
        return pixels, started_s

    def _slices(self, region: ScanRegion) -> tuple[slice, slice]:
        if region.rotation_rad != 0.0:
            raise RecordCannotAnswer(
                f"a scan turned by {region.rotation_rad:g} rad, a record only holds 0", "set rotation_rad = 0"
            )
        column = self._line(region, 0, "x", region.shape[1], self.shape[1])
        row = self._line(region, 1, "y", region.shape[0], self.shape[0])
        return row, column

    def _line(self, region: ScanRegion, axis: int, name: str, count: int, available: int) -> slice:
        """The record's indices along one axis, or why there are none."""
        fov, pixel = region.fov_nm[axis], self.pixel_size_nm
        low = region.center_nm[axis] - fov / 2
        end = low + fov
        if low < -_ALIGNED_NM or end > available * pixel + _ALIGNED_NM:
            raise RecordCannotAnswer(
                f"a scan from {name} = {low:.6g} to {end:.6g} nm, the record ends at 0 and {available * pixel:.6g} nm",
                "keep the region inside the field",
            )
        pitch = round(fov / count / pixel)
        if pitch < 1 or abs(pitch * count * pixel - fov) > _ALIGNED_NM:
            raise RecordCannotAnswer(
                f"{count} pixels of {fov / count:.6g} nm along {name}; the record's are {pixel:.6g} nm wide",
                f"choose pixels 1, 2, 3, ... times {pixel:.9g} nm wide",
            )
        first = round(low / pixel)
        if abs(first * pixel - low) > _ALIGNED_NM:
            raise RecordCannotAnswer(
                f"a scan that begins at {name} = {low:.9g} nm, between the record's pixels of {pixel:.9g} nm",
                f"begin at {first * pixel:.9g} nm: move the centre by {first * pixel - low:+.9g} nm",
            )
        return slice(first + pitch // 2, first + pitch * count, pitch)
