"""What every driver must pass. A driver's own test is only its set-up::

    class TestMyDriver(MicroscopeContract):
        def open(self, folder):
            return MyDriver(...).build(folder, Path("."), seed=0)

pytest collects the inherited tests. They expose a few small regions of ``region_shape`` pixels at the field's corner.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from aecontrol.dose import bound_charge
from aecontrol.durable import npy_bytes, sha256_hex
from aecontrol.errors import AecontrolError, InstrumentFault
from aecontrol.protocols import Microscope
from aecontrol.types import ScanRegion


def a_key(name: str) -> str:
    """A well-formed key."""
    return hashlib.sha256(name.encode()).hexdigest()


class MicroscopeContract:
    """Inherit, implement ``open``, and pytest runs the rest."""

    region_shape = (8, 12)
    dwell_time_s = 1e-6

    def open(self, folder: Path) -> Microscope:
        """The driver under test, its ledger in ``folder``."""
        raise AecontrolError("a contract test implements open()")

    def a_region(self, microscope: Microscope, corner_px: tuple[int, int] = (0, 0)) -> ScanRegion:
        """A small region that the driver can expose, ``corner_px`` (x, y) pixels from the field's corner."""
        pixel = microscope.capabilities().pixel_size_nm or 0.05
        rows, cols = self.region_shape
        center = ((corner_px[0] + cols / 2) * pixel, (corner_px[1] + rows / 2) * pixel)
        return ScanRegion(
            center_nm=center, fov_nm=(cols * pixel, rows * pixel), shape=(rows, cols), dwell_time_s=self.dwell_time_s
        )

    def test_a_key_fires_once_and_repeats_its_outcome(self, tmp_path: Path) -> None:
        """The same key again gives the same answer, from a reopened ledger too."""
        microscope = self.open(tmp_path)
        region = self.a_region(microscope)
        bound = bound_charge(region, microscope.capabilities())
        first = microscope.expose(a_key("a"), region, bound)
        assert first.state == "POST"
        assert first.measured is not None
        assert first.measured.pixels <= bound.pixels
        assert (first.measured.electrons or 0) <= (bound.electrons or 0)
        assert microscope.expose(a_key("a"), region, bound) == first
        assert microscope.cancel(a_key("a")) == first
        microscope.close()
        again = self.open(tmp_path)
        assert again.expose(a_key("a"), region, bound) == first
        again.close()

    def test_the_frame_arrives_whole(self, tmp_path: Path) -> None:
        """Shape, channels and digests are as announced, until it is acknowledged."""
        microscope = self.open(tmp_path)
        region = self.a_region(microscope, (3, 5))
        outcome = microscope.expose(a_key("a"), region, bound_charge(region, microscope.capabilities()))
        for _ in range(2):
            data = microscope.fetch(a_key("a"))
            assert set(data.channels) == set(microscope.capabilities().channels)
            for name, array in data.channels.items():
                assert array.shape == region.shape
                assert sha256_hex(npy_bytes(array)) == outcome.digests[name]
        microscope.acknowledge(a_key("a"))
        microscope.acknowledge(a_key("a"))
        assert refused(lambda: microscope.fetch(a_key("a")))
        microscope.close()

    def test_a_cancelled_key_never_fires(self, tmp_path: Path) -> None:
        """CANCEL of an unknown key is a tombstone, across a restart."""
        microscope = self.open(tmp_path)
        assert microscope.cancel(a_key("late")).state == "VOID"
        microscope.close()
        again = self.open(tmp_path)
        region = self.a_region(again)
        assert again.expose(a_key("late"), region, bound_charge(region, again.capabilities())).state == "VOID"
        assert refused(lambda: again.fetch(a_key("late")))
        again.close()

    def test_outside_the_field_nothing_fires(self, tmp_path: Path) -> None:
        """One pixel too far is VOID with a reason."""
        microscope = self.open(tmp_path)
        region = self.a_region(microscope)
        field = microscope.capabilities().field_nm
        outside = region.model_copy(update={"center_nm": (field[0], field[1])})
        outcome = microscope.expose(a_key("out"), outside, bound_charge(outside, microscope.capabilities()))
        assert outcome.state == "VOID"
        assert outcome.reason
        microscope.close()

    def test_one_key_for_two_commands_latches(self, tmp_path: Path) -> None:
        """KEY_REUSE stops everything until a person has looked, across a restart."""
        microscope = self.open(tmp_path)
        region, other = self.a_region(microscope), self.a_region(microscope, (16, 16))
        bound = bound_charge(region, microscope.capabilities())
        microscope.expose(a_key("a"), region, bound)
        assert refused(lambda: microscope.expose(a_key("a"), other, bound))
        microscope.close()
        again = self.open(tmp_path)
        assert again.expose(a_key("b"), other, bound).state == "VOID"
        again.close()

    def test_the_same_shots_give_the_same_frames(self, tmp_path: Path) -> None:
        """A fresh instrument, and one reopened half way, deliver bit-identical frames for the same keys in order."""
        frames = []
        for folder, restart in ((tmp_path / "straight", False), (tmp_path / "reopened", True)):
            folder.mkdir()
            microscope = self.open(folder)
            for number in range(2):
                if restart and number:
                    microscope.close()
                    microscope = self.open(folder)
                region = self.a_region(microscope, (4 * number, 0))
                microscope.expose(a_key(str(number)), region, bound_charge(region, microscope.capabilities()))
            frames.append(microscope.fetch(a_key("1")).channels)
            microscope.close()
        for name in frames[0]:
            assert np.array_equal(frames[0][name], frames[1][name])


def refused(call: object) -> bool:
    """True when calling raises InstrumentFault."""
    assert callable(call)
    try:
        call()
    except InstrumentFault:
        return True
    return False
