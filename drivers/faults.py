"""Faults on purpose: wrap a column or a microscope and say which call goes wrong, and how.

Used by the test campaigns, and by anybody who wants to see what a session does when an instrument misbehaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import InstrumentFault
from aecontrol.exposure import Outcome
from aecontrol.protocols import FrameData
from aecontrol.types import Capabilities, Charge, ScanRegion

from .backend import Pulse
from .instrument import Column

ColumnFault = Literal["nan", "constant", "saturated", "break", "crash"]
CallFault = Literal["before", "after"]


class Crash(BaseException):
    """The process dies here: nothing that follows in it may run, so no handler for errors may catch it."""


@dataclass(frozen=True)
class FaultyPulse:
    """A pulse whose frame was spoiled."""

    channels: Mapping[str, NDArray[np.generic]]
    electrons: int | None
    pixels: int
    seconds: float
    started_s: float
    flags: tuple[str, ...]


class FaultyColumn:
    """A column whose ``faults`` (shot number -> fault) go wrong.

    'nan' and 'constant' spoil the frame, 'saturated' flags it, 'break' fires and then fails without telling what was
    delivered, 'crash' fires and then ends the process.
    """

    def __init__(self, column: Column, faults: Mapping[int, ColumnFault]) -> None:
        self._column, self._faults = column, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._column, name)

    def fire(self, ordinal: int, region: ScanRegion) -> Pulse:
        """Fire, then spoil what the fault says."""
        fault = self._faults.get(ordinal)
        pulse = self._column.fire(ordinal, region)
        if fault is None:
            return pulse
        if fault == "break":
            raise InstrumentFault(f"shot {ordinal} broke off (injected)")
        if fault == "crash":
            raise Crash
        channels = dict(pulse.channels)
        if fault in ("nan", "constant"):
            spoil = np.nan if fault == "nan" else 0.0
            channels = {name: np.full(array.shape, spoil, np.float32) for name, array in channels.items()}
        flags = (*pulse.flags, "saturated") if fault == "saturated" else pulse.flags
        return FaultyPulse(channels, pulse.electrons, pulse.pixels, pulse.seconds, pulse.started_s, flags)

    def absorb(self, ordinal: int, region: ScanRegion) -> None:
        """As the column does."""
        self._column.absorb(ordinal, region)

    def targets(self, kind: str) -> tuple[NDArray[np.float64], tuple[str, ...]] | None:
        """As the column does."""
        return self._column.targets(kind)


class FaultyMicroscope:
    """A microscope whose calls fail: ``faults`` maps (verb, number of the call) to 'before' (the request is lost) or
    'after' (it is carried out and the reply is lost). Verbs: expose, cancel, fetch."""

    def __init__(self, microscope: Any, faults: Mapping[tuple[str, int], CallFault]) -> None:
        self._microscope, self._faults = microscope, faults
        self._calls = {"expose": 0, "cancel": 0, "fetch": 0}

    def capabilities(self) -> Capabilities:
        """As the microscope says."""
        capabilities: Capabilities = self._microscope.capabilities()
        return capabilities

    def expose(self, key: str, region: ScanRegion, bound: Charge) -> Outcome:
        """May lose the request or the reply."""
        outcome: Outcome = self._call("expose", key, region, bound)
        return outcome

    def cancel(self, key: str) -> Outcome:
        """May lose the request or the reply."""
        outcome: Outcome = self._call("cancel", key)
        return outcome

    def fetch(self, key: str) -> FrameData:
        """May lose the request or the reply."""
        frame: FrameData = self._call("fetch", key)
        return frame

    def acknowledge(self, key: str) -> None:
        """As the microscope does."""
        self._microscope.acknowledge(key)

    def blank(self) -> None:
        """As the microscope does."""
        self._microscope.blank()

    def close(self) -> None:
        """As the microscope does."""
        self._microscope.close()

    def _call(self, verb: str, *arguments: Any) -> Any:
        number = self._calls[verb]
        self._calls[verb] += 1
        fault = self._faults.get((verb, number))
        if fault == "before":
            raise InstrumentFault(f"{verb} number {number}: the request was lost (injected)")
        result = getattr(self._microscope, verb)(*arguments)
        if fault == "after":
            raise InstrumentFault(f"{verb} number {number}: the reply was lost (injected)")
        return result
