"""A backend to start from: copy this file, rename the two classes and the ``kind``, and fill in the methods.

Read ``drivers/backend.py`` first: it says what each method owes. Then

1. name the configuration in your own package's ``pyproject.toml``::

       [project.entry-points."aecontrol.backends"]
       my_microscope = "my_package.my_microscope:MyMicroscopeBackend"

2. write ``[backend]`` with ``kind = "my_microscope"`` into the bridge's configuration.

Import vendor software inside methods, never at the top: the bridge's watchdog loads this module too, and must stay
light. The hints below say where the calls of some vendors go; check each against the manual of your version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from aecontrol.errors import InstrumentFault
from aecontrol.types import Capabilities, InstrumentState, Model, ScanRegion
from drivers.backend import Blanker, Pulse


class MyMicroscopeBackend(Model):
    """[backend] kind = "my_microscope": what a user has to say about this instrument."""

    kind: Literal["my_microscope"] = "my_microscope"
    address: str = Field("127.0.0.1", description="where the vendor's server answers")

    def open(self, base: Path, seed: int) -> MyMicroscope:
        """Connect. ``base`` is the folder of the configuration, ``seed`` is for simulated instruments only."""
        # AutoScript: client = TemMicroscopeClient(); client.connect(self.address)
        # PyJEM:      TEM3.connect(), then TEM3.Detector3, TEM3.Scan3, TEM3.Def3
        # DAQ card:   reserve the analogue outputs of the scan and the digital line of the blanker
        return MyMicroscope(self)

    def open_blanker(self, base: Path) -> Blanker | None:
        """The watchdog's own path to the blanker, best a line that needs no vendor software at all."""
        # A relay or a DAQ line: return an object with blank() and close(). None: through the backend's process only.
        return None


class MyMicroscope:
    """A :class:`~drivers.backend.Backend`."""

    def __init__(self, settings: MyMicroscopeBackend) -> None:
        self._settings = settings

    def describe(self) -> Capabilities:
        """Measure the probe current with the Faraday cup or the screen; state the tolerance that you would sign."""
        # Capabilities(identity="vendor, model, serial number", simulated=False, unit="electrons", field_nm=...,
        #              channels=("HAADF",), beam_current_pA=..., current_tolerance=..., blanker_latency_s=...)
        raise InstrumentFault("describe is not written yet")

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Load the scan with its end into the hardware, unblank, wait, blank, read."""
        # 1. centre, field of view, rotation and size of the scan: nm here, metres or DAC units there; y, x order there?
        # 2. a scan of exactly one frame, with the blanker tied to the end of the scan; never "live" or "continuous"
        # 3. wait for its end, for at most a little longer than it can take; then blank in any case
        # 4. electrons = current before or after the pulse x seconds with the beam on, rounded up
        # return Shot(channels={"HAADF": array}, electrons=..., pixels=region.pixels, seconds=..., started_s=...)
        raise InstrumentFault("fire is not written yet")

    def blank(self) -> None:
        """Blank, then stop the scan, so that ``fire`` returns at once with what it has and the flag 'partial'."""
        # AutoScript: client.optics.blanker.blank(); client.acquisition.stop()
        # PyJEM:      Def3().SetBeamBlank(1)
        # DAQ card:   set the digital line, then stop the task; the line first
        raise InstrumentFault("blank is not written yet")

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """A real specimen remembers by itself."""

    def state(self) -> InstrumentState:
        """Blanker, vacuum, high voltage, stage. Answer in a few ms: read vendor values in a thread of your own."""
        # interlock="gun valve closed" makes the bridge blank the beam and refuse exposures until it is gone
        raise InstrumentFault("state is not written yet")

    def close(self) -> None:
        """Blank, park, disconnect."""
        raise InstrumentFault("close is not written yet")
