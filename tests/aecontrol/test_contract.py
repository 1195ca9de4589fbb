"""The shell around any column passes the driver contract."""

from __future__ import annotations

from pathlib import Path

from drivers.contract import MicroscopeContract

from .parts import CountingColumn, Driver


class TestInstrument(MicroscopeContract):
    def open(self, folder: Path):
        return Driver(CountingColumn()).build(folder / "instrument", Path("."), 0)
