"""The page that a laboratory reads to put its own microscope behind the bridge.

A backend is the one thing that touches vendor software. It runs in a process of its own; the bridge's server talks to
it, keeps the ledger, checks every limit and decides *whether* to expose. A backend only carries out. It needs no
locks (one call at a time, except :meth:`Backend.blank` and :meth:`Backend.state`), no network, no ledger.

Three rules matter more than everything else:

1. The beam must never be on without an end. Load the pulse length into the hardware before you unblank; if the
   hardware cannot do that, stop the scan from a timer that does not depend on the caller.
2. :meth:`Backend.blank` may come at any moment from another thread. It must act at once, and the ``fire`` that is
   running must then return what it has delivered until then, flagged 'partial'.
3. Never fire twice. When vendor software fails in the middle, raise; nobody will call again for the same exposure.

``drivers/backends/template.py`` is a backend to start from, ``drivers/backends/recorded.py`` a complete small one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from aecontrol.types import Capabilities, InstrumentState, ScanRegion


class Pulse(Protocol):
    """What one hardware-timed exposure delivered. ``drivers.backends.base.Shot`` is a plain one."""

    @property
    def channels(self) -> Mapping[str, NDArray[np.generic]]:
        """Detector channel -> array [rows, cols]; for spectra [rows, cols, energies]. C order, any real dtype."""

    @property
    def electrons(self) -> int | None:
        """Electrons that left the gun towards the specimen, rounded up; None when a record does not say."""

    @property
    def pixels(self) -> int:
        """Pixels exposed (of a record: revealed for the first time)."""

    @property
    def seconds(self) -> float:
        """Duration, s."""

    @property
    def started_s(self) -> float:
        """Instrument clock at the first pixel, s. Never runs backwards."""

    @property
    def flags(self) -> tuple[str, ...]:
        """What is wrong with the frame: 'partial' (stopped early), 'saturated', or words of your own."""


class Backend(Protocol):
    """One microscope. Lengths are nm, times s, arrays [slow, fast] = [row, col]."""

    def describe(self) -> Capabilities:
        """What the instrument is and can do. Asked once; the answer must not change afterwards. State the probe
        current that you measured, and a tolerance that you would sign."""

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Expose ``region``, given in the instrument's frame (origin at the top-left corner of the field, +x along the
        fast axis at no rotation, +y down; ``shift_nm`` is zero here). Blocks until the beam is blanked.

        ``region.signal`` says whether images of all detectors or a spectrum for every pixel are wanted; a region of
        one pixel is a spectrum at a point. ``ordinal`` counts the exposures of this specimen: 0, 1, 2 ... Limits were
        checked before. Raises any exception when something broke: the exposure then counts at its upper bound.
        """

    def blank(self) -> None:
        """Blank the beam now and end the running ``fire`` early. Any thread, any time, safe to repeat."""

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """The bridge was restarted and finds ``region`` in its ledger as an earlier exposure. A real instrument has
        nothing to do; a simulated or recorded one brings its specimen up to date."""

    def state(self) -> InstrumentState:
        """What the instrument says of itself now. Quick (a few ms), any thread: it is asked many times a second. A word
        in ``interlock`` makes the bridge blank the beam and refuse exposures until it is gone."""

    def close(self) -> None:
        """Blank, park and release. Safe to repeat."""


@runtime_checkable
class MovesStage(Protocol):
    """A backend whose stage can be moved. Needed only when ``stage_range_nm`` is set."""

    def move_stage(self, to_nm: tuple[float, float]) -> None:
        """Move the stage so that the field's top-left corner lies at ``to_nm`` of the specimen frame, which is the
        field as it was when the ledger was opened: the specimen's point p is then found at p - to_nm. The beam is
        blanked. Blocks until the stage has settled; :meth:`Backend.state` then says ``stage_nm`` = ``to_nm``."""


@runtime_checkable
class Parks(Protocol):
    """A backend that can put the idle beam somewhere, as an instrument without a blanker must."""

    def park(self, at_nm: tuple[float, float]) -> None:
        """Rest the beam at this point of the field whenever no exposure runs."""


class Blanker(Protocol):
    """A second, independent path to the blanker, opened by the watchdog in a process of its own: another vendor
    connection, a DAQ line, a relay. ``blank`` must work when the bridge and the backend's process hang."""

    def blank(self) -> None:
        """Blank the beam now. Safe to repeat. Raises when it could not."""

    def close(self) -> None:
        """Release the path; the beam stays as it is."""


class BackendConfig(Protocol):
    """[backend] of a bridge's configuration: a frozen pydantic model with a literal ``kind``, named by an entry point
    of the group ``aecontrol.backends``."""

    def open(self, base: Path, seed: int) -> Backend:
        """Connect to the instrument. Relative paths start at ``base``. Raises BadInput for what cannot work."""

    def open_blanker(self, base: Path) -> Blanker | None:
        """The watchdog's own path to the blanker; None when the only one is through the backend's process, which the
        bridge then uses through a second connection, and says so."""
