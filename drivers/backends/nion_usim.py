"""usim through Nion Swift's instrumentation: its start and end, its units and signs, and what it cannot scan at once.

Points and lengths are nm from the top-left corner of the square field, which is Nion's scan context at no rotation.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from aecontrol.types import ScanRegion, SpectrumAxis

Sample = Literal["flakes", "gold"]
"""usim's specimens that can be scanned in part; its third, amorphous one it draws at the same place of every scan."""
SAMPLE_INDEX: dict[Sample, int] = {"flakes": 0, "gold": 2}
Channel = Literal["HAADF", "MAADF", "X1", "X2"]
"""usim's detectors, in its own order."""
CONTEXT_PX = 256
"""Pixels along a side of the scan context; only its size in nm matters here."""


class Usim:
    """usim and the parts of Nion Swift's instrumentation that it needs. They are global: one in a process."""

    def __init__(self, sample: Sample, channels: tuple[Channel, ...], side_nm: float, current_pA: float) -> None:
        # a hardware source takes the thread's event loop when it is made; nothing runs on it
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        from nion.instrumentation import HardwareSource, camera_base, scan_base
        from nion.usim_device.DeviceConfiguration import AcquisitionContextConfiguration
        from nion.utils import Geometry

        self._geometry: Any = Geometry
        self._parts: tuple[Any, ...] = (scan_base, camera_base, HardwareSource)
        HardwareSource.run()
        camera_base.run(None)
        scan_base.run(None)
        self._context: Any = AcquisitionContextConfiguration(
            sample_index=SAMPLE_INDEX[sample], set_configuration_location=False
        )
        self._context.run()
        find = HardwareSource.HardwareSourceManager().get_hardware_source_for_hardware_source_id
        self._scan: Any = find(self._context.scan_module.device.scan_device_id)
        self._camera: Any = find(self._context.eels_camera_device_id)
        self._instrument: Any = self._context.instrument
        self._side_nm, self._channels = side_nm, channels
        self._frame: int | None = None
        self._skip = 0
        self._origin_m = self._instrument.stage_position_m
        self._instrument.SetVal("BeamCurrent", current_pA * 1e-12)
        self.set_blanked(True)
        self._set_context()

    def _set_context(self) -> None:
        """Make the field the scan context. Without it the probe goes to a fraction of whatever was scanned before."""
        self._parameters = self._scan.get_current_frame_parameters()
        self._parameters.fov_nm = self._side_nm
        self._parameters.center_nm = (0.0, 0.0)
        self._parameters.rotation_rad = 0.0
        self._parameters.pixel_size = (CONTEXT_PX, CONTEXT_PX)
        self._scan.set_current_frame_parameters(self._parameters)
        for index, name in enumerate(get_args(Channel)):
            self._scan.set_channel_enabled(index, name in self._channels)

    def set_blanked(self, blanked: bool) -> None:
        """Set Nion's blanker, which usim remembers but does not simulate in scans."""
        self._instrument.SetVal("C_Blank", float(blanked))

    def beam_current_pA(self) -> float:
        """The probe current that usim reports."""
        return float(self._instrument.GetVal("BeamCurrent")) * 1e12

    def place_probe(self, at_nm: tuple[float, float]) -> None:
        """Put the resting probe at a point of the field."""
        self._scan.probe_position = self._geometry.FloatPoint(y=at_nm[1] / self._side_nm, x=at_nm[0] / self._side_nm)

    def move_stage(self, to_nm: tuple[float, float]) -> None:
        """Bring the specimen's point ``to_nm`` to the field's corner; Nion's positive stage moves the image right and
        down."""
        shift = self._geometry.FloatPoint(y=to_nm[1] * 1e-9, x=to_nm[0] * 1e-9)
        self._instrument.stage_position_m = self._origin_m - shift

    def start_scan(self, region: ScanRegion) -> None:
        """Start one scan that ends by itself. Returns at once; read it with :meth:`read_scan`."""
        side, (px, _) = self._side_nm, region.pixel_size_nm
        rows, cols = region.shape
        parameters = self._scan.scan_settings.get_frame_parameters_from_dict(self._parameters.as_dict())
        parameters.pixel_time_us = region.dwell_time_s * 1e6
        parameters.subscan_pixel_size = (rows, cols)
        # (y, x), fractions of the context. usim takes the height for granted and assumes square pixels: a single row
        # of other pixels must be told to be as high as its pixels are wide
        height = region.fov_nm[1] if rows > 1 else px
        parameters.subscan_fractional_size = (height / side, region.fov_nm[0] / side)
        parameters.subscan_fractional_center = (region.center_nm[1] / side, region.center_nm[0] / side)
        parameters.subscan_rotation = -region.rotation_rad  # Nion's turns +x towards -y
        device = self._scan.scan_device
        device.set_frame_parameters(parameters)
        self._frame, self._skip = device.start_frame(False), 0

    def read_scan(self) -> tuple[dict[str, NDArray[np.float32]], int]:
        """Wait a few ms; the images so far, by detector, and the number of whole rows in them."""
        found, _, _, area, self._frame, self._skip = self._scan.scan_device.read_partial(self._frame, self._skip)
        (top, _), (height, _) = area
        names = get_args(Channel)
        return {names[one["properties"]["channel_id"]]: one["data"] for one in found}, top + height

    def start_spectrum(self, point: ScanRegion) -> None:
        """Start one exposure of the spectrometer's camera where the probe rests; read it with :meth:`read_spectrum`."""
        parameters = self._camera.get_current_frame_parameters()
        parameters.exposure_ms = point.dwell_time_s * 1e3
        parameters.binning = 1
        parameters.processing = "sum_project"
        self._camera.acquire_sequence_begin(parameters, 1)

    def read_spectrum(self) -> NDArray[np.float32]:
        """Wait for the spectrum [energies] that was started."""
        part = self._camera.acquire_sequence_continue()
        self._camera.acquire_sequence_end()
        return np.array(part.xdata.data[0], np.float32)

    def spectrum_axis(self) -> SpectrumAxis:
        """The spectrometer's energy axis."""
        camera = self._context.eels_camera_device
        energies = camera.get_dimensional_calibrations(None, None)[1]
        size = camera.get_expected_dimensions(1)[1]
        return SpectrumAxis(size=size, offset_eV=energies.offset, scale_eV=energies.scale)

    def cancel(self) -> None:
        """Stop what is running, from any thread; nothing once closed."""
        if self._loop.is_closed():
            return
        self._scan.scan_device.cancel()
        self._camera.acquire_sequence_cancel()

    def close(self) -> None:
        """End usim's threads and take it out of Nion Swift's registry. Safe to repeat."""
        if self._loop.is_closed():
            return
        self._context.stop()
        for part in self._parts:
            part.stop()
        self._loop.close()
        asyncio.set_event_loop(None)


def part_of(region: ScanRegion, row: int, col: int, rows: int, cols: int) -> ScanRegion:
    """The ``rows`` x ``cols`` pixels of ``region`` from (``row``, ``col``) on, as a region of their own."""
    px, py = region.pixel_size_nm
    dx, dy = (col + cols / 2) * px - region.fov_nm[0] / 2, (row + rows / 2) * py - region.fov_nm[1] / 2
    c, s = math.cos(region.rotation_rad), math.sin(region.rotation_rad)
    center = (region.center_nm[0] + c * dx - s * dy, region.center_nm[1] + s * dx + c * dy)
    return region.model_copy(update={"center_nm": center, "fov_nm": (cols * px, rows * py), "shape": (rows, cols)})


def pieces(region: ScanRegion) -> Iterator[tuple[int, int, int, int]]:
    """What usim can scan at once: (row, col, rows, cols) of blocks that make up ``region``. All of it where pixels are
    square and it is not long and turned; single rows of pixels that are not square; else the largest squares.

    usim draws square pixels only, and turns a canvas that is wider and higher than the scan by 0.41 of the longer
    side: of a long region turned by more than some 24 degrees it would silently leave out the corners.
    """
    rows, cols = region.shape
    px, py = region.pixel_size_nm
    high = rows if math.isclose(px, py, rel_tol=1e-6) else 1
    for row in range(0, rows, high):
        yield from _squares(row, 0, high, cols, region.rotation_rad)


def _squares(row: int, col: int, rows: int, cols: int, rotation_rad: float) -> Iterator[tuple[int, int, int, int]]:
    """The block as one where usim's canvas holds it turned; else its largest square, and the rest likewise."""
    while rows > 0 and cols > 0:
        c, s = abs(math.cos(rotation_rad)), abs(math.sin(rotation_rad))
        margin = math.ceil(max(rows, cols) * (math.sqrt(2.0) - 1.0))
        if s * cols + c * rows <= rows + margin and c * cols + s * rows <= cols + margin:
            yield row, col, rows, cols
            return
        side = min(rows, cols)
        yield row, col, side, side
        if cols > rows:
            col, cols = col + side, cols - side
        else:
            row, rows = row + side, rows - side
