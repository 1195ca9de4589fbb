"""Nion Swift instrumentation, driven without its window: the usim microscope, through the interfaces of a real one.

Nion Swift is GPL-3 and an extra: it is imported here only, inside functions. What works, the traps and the limits of
usim are in ``aecontrol/docs/nion.md``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from aecontrol.errors import BadInput, InstrumentFault
from aecontrol.types import Capabilities, InstrumentState, Model, Positive, ScanRegion
from aecontrol.units import electrons_per_second

from .base import Shot
from .nion_usim import Channel, Sample, Usim, part_of, pieces

HANG_S = 5.0
"""So much longer than it should take may vendor software need for an exposure before the beam is blanked over it."""
NOTES = (
    "usim does not simulate its blanker in scans; the beam counts as on while pixels are scanned or a spectrum is "
    "exposed, at the declared current; time that usim spends on computing is not counted",
    "usim shows the same specimen on every channel, with noise that follows neither dose nor seed",
    "usim's specimen takes no damage and does not drift",
    "spectra are taken one by one at a parked probe; usim needs 15 to 70 ms for each, however short the dwell time",
    "regions with pixels that are not square, or long ones that are turned, are scanned in several pieces",
    "pixels that were not delivered are NaN",
)


class NionBackend(Model):
    """[backend] kind = "nion": Nion Swift's simulated microscope usim. One in a process at a time."""

    kind: Literal["nion"] = "nion"
    specimen: Sample = Field("flakes", description="which of usim's specimens")
    field_nm: Positive = Field(100.0, le=1000.0, description="side of the square field, centred on the scan centre, nm")
    channels: tuple[Channel, ...] = Field(("HAADF", "MAADF"), min_length=1, description="detectors to record")
    beam_current_pA: Positive = Field(200.0, description="probe current that usim is set to, pA")
    stage_range_nm: Positive = Field(200.0, le=500.0, description="farthest stage move along x or y, nm")

    @field_validator("channels")
    @classmethod
    def _different(cls, names: tuple[Channel, ...]) -> tuple[Channel, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"a detector is named twice in {names}")
        return names

    def open(self, base: Path, seed: int) -> NionInstrument:
        """Start usim in this process. ``base`` and ``seed`` are not used: it has no files, and its noise no seed.
        Raises BadInput when Nion Swift is not installed."""
        if importlib.util.find_spec("nion") is None or importlib.util.find_spec("nion.usim_device") is None:
            raise BadInput("the backend 'nion' needs Nion Swift's usim", "pip install aecontrol[nion] (GPL-3)")
        return NionInstrument(self)

    def open_blanker(self, base: Path) -> None:
        """usim lives in the backend's process: there is no second path to its blanker."""


class NionInstrument:
    """usim as a :class:`~drivers.backend.Backend` whose stage moves and whose idle beam can be parked."""

    def __init__(self, config: NionBackend) -> None:
        self._config = config
        self._usim = Usim(config.specimen, config.channels, config.field_nm, config.beam_current_pA)
        self._beam = Beam(self._usim.set_blanked, self._usim.cancel)
        self._busy = threading.Lock()
        self._opened_s = time.monotonic()
        self._stage_nm = (0.0, 0.0)
        self._parked_nm: tuple[float, float] | None = None
        self._capabilities = self._describe()

    def describe(self) -> Capabilities:
        """What usim is, with the notes that a reader of its images needs."""
        return self._capabilities

    def fire(self, ordinal: int, region: ScanRegion) -> Shot:
        """Expose ``region`` once. Pixels that :meth:`blank` prevented are NaN, and the flag is 'partial'. Raises
        InstrumentFault when something is running already."""
        with self._alone():
            self._beam.begin()
            started_s = self._clock()
            try:
                channels = self._spectra(region) if region.signal == "spectra" else self._images(region)
            except BaseException:
                self._beam.blank()  # and cancel: usim would go on with this scan when the next one is asked for
                raise
            seconds = min(self._beam.seconds, region.pixels * region.dwell_time_s)
            return Shot(
                channels=channels,
                electrons=math.ceil(electrons_per_second(self._config.beam_current_pA) * seconds),
                pixels=min(region.pixels, math.ceil(seconds / region.dwell_time_s - 1e-9)),
                seconds=seconds,
                started_s=started_s,
                flags=("partial",) if self._beam.cut.is_set() else (),
            )

    def blank(self) -> None:
        """Blank now; the exposure that is running ends within some 50 ms."""
        self._beam.blank()

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """Nothing to do: usim's specimen does not remember the beam."""

    def move_stage(self, to_nm: tuple[float, float]) -> None:
        """Move the field's top-left corner to ``to_nm`` of the specimen. Raises InstrumentFault during an exposure."""
        with self._alone():
            self._usim.move_stage(to_nm)
            self._stage_nm = to_nm

    def park(self, at_nm: tuple[float, float]) -> None:
        """Rest the probe at this point of the field. Raises InstrumentFault during an exposure."""
        with self._alone():
            self._usim.place_probe(at_nm)
            self._parked_nm = at_nm

    def state(self) -> InstrumentState:
        """What usim says of itself; it has no independent meter of electrons."""
        return InstrumentState(
            beam_on=self._beam.on,
            clock_s=self._clock(),
            stage_nm=self._stage_nm,
            parked_nm=self._parked_nm,
            beam_current_pA=self._usim.beam_current_pA(),
        )

    def close(self) -> None:
        """Blank, and end usim and its threads."""
        self._beam.blank()
        self._busy.acquire(timeout=HANG_S)
        self._usim.close()
        self._busy.release()

    # ------------------------------------------------------------ inside

    def _describe(self) -> Capabilities:
        config, side = self._config, self._config.field_nm
        version = importlib.metadata.version("nionswift-usim")
        return Capabilities(
            identity=f"Nion usim {version}, {config.specimen}, field {side:g} nm, {config.beam_current_pA:g} pA",
            simulated=True,
            unit="electrons",
            field_nm=(side, side),
            channels=config.channels,
            beam_current_pA=config.beam_current_pA,
            position_error_nm=0.0,
            dwell_time_range_s=(1e-7, 1.0),
            spectra=self._usim.spectrum_axis(),
            stage_range_nm=config.stage_range_nm,
            notes=NOTES,
        )

    def _clock(self) -> float:
        return time.monotonic() - self._opened_s

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises InstrumentFault at once when something else runs: Nion Swift answers that with a bare assertion."""
        if not self._busy.acquire(blocking=False):
            raise InstrumentFault("an exposure or a stage move is running already", "wait for it to end")
        try:
            yield
        finally:
            self._busy.release()

    def _images(self, region: ScanRegion) -> dict[str, NDArray[np.generic]]:
        """One array [rows, cols] a detector, scanned piece by piece (almost always a single one)."""
        images: dict[str, NDArray[np.generic]] = {
            name: np.full(region.shape, np.nan, np.float32) for name in self._config.channels
        }
        for row, col, rows, cols in pieces(region):
            piece = part_of(region, row, col, rows, cols)
            if not self._beam.open(piece, self._usim.start_scan):
                break
            whole = 0
            while whole < rows:
                data, whole = self._usim.read_scan()
                if self._beam.cut.is_set():  # what usim returns of a cancelled scan is not to be trusted
                    break
                for name, array in data.items():
                    images[name][row : row + whole, col : col + cols] = array[:whole]
            self._beam.close()
        return images

    def _spectra(self, region: ScanRegion) -> dict[str, NDArray[np.generic]]:
        """A spectrum [energies] for every pixel, taken with the probe at rest on the pixel's centre."""
        axis = self._usim.spectrum_axis()
        spectra = np.full((*region.shape, axis.size), np.nan, np.float32)
        for row, col in np.ndindex(*region.shape):
            point = part_of(region, row, col, 1, 1)
            self._usim.place_probe(point.center_nm)
            if not self._beam.open(point, self._usim.start_spectrum):
                break
            spectrum = self._usim.read_spectrum()
            self._beam.close()
            if self._beam.cut.is_set():  # a cancelled exposure returns the spectrum of the one before
                break
            spectra[row, col] = spectrum
        if self._parked_nm is not None:
            self._usim.place_probe(self._parked_nm)
        return {axis.channel: spectra}


class Beam:
    """The blanker: opened for a pulse that has an end, closed from any thread; and how long the beam was on."""

    def __init__(self, set_blanked: Callable[[bool], None], cancel: Callable[[], None]) -> None:
        self._set_blanked, self._cancel = set_blanked, cancel
        self._lock = threading.Lock()
        self._guard: threading.Timer | None = None
        self._since = self._planned_s = 0.0
        self.cut = threading.Event()
        self.on = False
        self.seconds = 0.0

    def begin(self) -> None:
        """A new exposure begins; what was blanked before is over."""
        with self._lock:
            self.cut.clear()
            self.seconds = 0.0

    def open(self, region: ScanRegion, start: Callable[[ScanRegion], None]) -> bool:
        """Unblank and ``start`` on ``region`` what ends by itself; False, and nothing started, once cut. A timer of its
        own blanks when the end does not come."""
        seconds = region.pixels * region.dwell_time_s
        with self._lock:
            if self.cut.is_set():
                return False
            self._guard = threading.Timer(seconds + HANG_S, self.blank)
            self._guard.daemon = True
            self._guard.start()
            self._since, self._planned_s = time.monotonic(), seconds
            self._set_blanked(False)
            self.on = True
            start(region)
            return True

    def close(self) -> None:
        """Blank after a pulse that was read to its end; nothing after a cut."""
        with self._lock:
            self._end(self._planned_s)

    def blank(self) -> None:
        """Blank at once, and cancel what is running."""
        with self._lock:
            self.cut.set()
            self._end(min(time.monotonic() - self._since, self._planned_s))
            self._cancel()

    def _end(self, seconds: float) -> None:
        self._set_blanked(True)
        if self.on:
            self.on = False
            self.seconds += seconds
        if self._guard is not None:
            self._guard.cancel()
