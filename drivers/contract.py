"""What every driver must pass, as functions: for ``aecontrol check-driver`` on a real instrument, and for pytest.

A driver's own test is only its set-up::

    class TestMyDriver(MicroscopeContract):
        def open(self, folder):
            return MyDriver(...).build(folder, Path("."), seed=0)

pytest collects the inherited tests. A check exposes a few regions of ``region_shape`` pixels at the field's corner.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from aecontrol.dose import bound_charge
from aecontrol.durable import npy_bytes, sha256_hex
from aecontrol.errors import AecontrolError, BadInput, InstrumentFault
from aecontrol.exposure import Outcome
from aecontrol.protocols import Microscope
from aecontrol.types import Charge, ScanRegion


def a_key(name: str) -> str:
    """A well-formed key."""
    return hashlib.sha256(name.encode()).hexdigest()


@dataclass
class Bench:
    """One instrument under test. ``reopen`` opens it anew on the same ledger; ``salt`` makes the keys of this run its
    own; ``exposures`` counts what was asked for."""

    reopen: Callable[[], Microscope]
    salt: str = ""
    region_shape: tuple[int, int] = (8, 12)
    dwell_time_s: float = 1e-6
    microscope: Microscope = field(init=False)
    exposures: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.microscope = self.reopen()

    def again(self) -> None:
        """Close the instrument and open it anew."""
        self.microscope.close()
        self.microscope = self.reopen()

    def region(self, corner_px: tuple[int, int] = (0, 0)) -> ScanRegion:
        """A small region that the driver can expose, ``corner_px`` (x, y) pixels from the field's corner."""
        pixel = self.microscope.capabilities().pixel_size_nm or 0.05
        rows, cols = self.region_shape
        center = ((corner_px[0] + cols / 2) * pixel, (corner_px[1] + rows / 2) * pixel)
        return ScanRegion(
            center_nm=center, fov_nm=(cols * pixel, rows * pixel), shape=(rows, cols), dwell_time_s=self.dwell_time_s
        )

    def key(self, name: str) -> str:
        """A key of this run."""
        return a_key(f"{self.salt}{name}")

    def bound(self, region: ScanRegion) -> Charge:
        """The most that ``region`` can cost."""
        return bound_charge(region, self.microscope.capabilities())

    def expose(self, name: str, region: ScanRegion) -> Outcome:
        """Ask for ``region`` under the key ``name``."""
        self.exposures += 1
        return self.microscope.expose(self.key(name), region, self.bound(region))


def must(holds: object, what: str) -> None:
    """Raises AecontrolError that says ``what`` must hold."""
    if not holds:
        raise AecontrolError(what)


# ---------------------------------------------------------------- on any instrument, the user's own included


def a_key_fires_once_and_repeats_its_outcome(bench: Bench) -> None:
    """The same key again gives the same answer, from a reopened driver too."""
    region = bench.region()
    first, bound = bench.expose("once", region), bench.bound(region)
    must(first.state == "POST" and first.measured is not None, f"a small exposure was not made: {first}")
    assert first.measured is not None
    must(first.measured.pixels <= bound.pixels, f"{first.measured.pixels} pixels, at most {bound.pixels} were bound")
    electrons = first.measured.electrons or 0
    must(electrons <= (bound.electrons or 0), f"{electrons} electrons, at most {bound.electrons} were bound")
    must(bench.expose("once", region) == first, "the same key again has another outcome")
    must(bench.microscope.cancel(bench.key("once")) == first, "CANCEL of a settled key has another outcome")
    bench.again()
    must(bench.expose("once", region) == first, "the same key after a restart has another outcome")


def the_frame_arrives_whole(bench: Bench) -> None:
    """Shape, channels and digests are as announced, until it is acknowledged."""
    microscope, region = bench.microscope, bench.region((3, 5))
    outcome = bench.expose("whole", region)
    for _ in range(2):
        data = microscope.fetch(bench.key("whole"))
        named = set(microscope.capabilities().channels)
        must(set(data.channels) == named, f"channels {sorted(data.channels)}, announced were {sorted(named)}")
        for name, array in data.channels.items():
            must(array.shape == region.shape, f"{name} is {array.shape}, asked for was {region.shape}")
            must(sha256_hex(npy_bytes(array)) == outcome.digests[name], f"{name} does not match its digest")
    microscope.acknowledge(bench.key("whole"))
    microscope.acknowledge(bench.key("whole"))
    must(refused(lambda: microscope.fetch(bench.key("whole"))), "an acknowledged frame is still offered")


def a_cancelled_key_never_fires(bench: Bench) -> None:
    """CANCEL of an unknown key is a tombstone, across a restart."""
    must(bench.microscope.cancel(bench.key("late")).state == "VOID", "an unknown key was not tombstoned")
    bench.again()
    must(bench.expose("late", bench.region()).state == "VOID", "a cancelled key fired")
    must(refused(lambda: bench.microscope.fetch(bench.key("late"))), "a cancelled key has a frame")


def what_is_out_of_limits_never_fires(bench: Bench) -> None:
    """One pixel beyond the field, a dwell time beyond the range, too small a bound: VOID, with a reason."""
    region, known = bench.region(), bench.microscope.capabilities()
    outside = region.model_copy(update={"center_nm": known.field_nm})
    slow = region.model_copy(update={"dwell_time_s": 2.0 * known.dwell_time_range_s[1]})
    fast = region.model_copy(update={"dwell_time_s": 0.5 * known.dwell_time_range_s[0]})
    for name, wrong in (("outside", outside), ("slow", slow), ("fast", fast)):
        outcome = bench.expose(name, wrong)
        must(outcome.state == "VOID" and outcome.reason, f"{name}: {outcome.state}, {outcome.reason!r}")
    bound = bench.bound(region)
    small = bound.model_copy(update={"pixels": bound.pixels - 1})
    outcome = bench.microscope.expose(bench.key("small"), region, small)
    must(outcome.state == "VOID", f"an exposure beyond its own bound: {outcome.state}")


POLITE = (
    a_key_fires_once_and_repeats_its_outcome,
    the_frame_arrives_whole,
    a_cancelled_key_never_fires,
    what_is_out_of_limits_never_fires,
)
"""Checks that leave an instrument as it was, but for the dose of two small exposures."""


# ---------------------------------------------------------------- on an instrument of its own


def one_key_for_two_commands_latches(bench: Bench) -> None:
    """KEY_REUSE stops everything until a person has looked, across a restart."""
    region, other = bench.region(), bench.region((16, 16))
    bench.expose("reused", region)
    must(refused(lambda: bench.expose("reused", other)), "one key was taken for two commands")
    bench.again()
    must(bench.expose("after", other).state == "VOID", "a latched instrument fired")


def the_same_shots_give_the_same_frames(straight: Bench, reopened: Bench) -> None:
    """A fresh instrument, and one reopened half way, deliver bit-identical frames for the same keys in order."""
    frames = []
    for bench in (straight, reopened):
        for number in range(2):
            if bench is reopened and number:
                bench.again()
            bench.expose(f"shot {number}", bench.region((4 * number, 0)))
        frames.append(bench.microscope.fetch(bench.key("shot 1")).channels)
    for name in frames[0]:
        must(np.array_equal(frames[0][name], frames[1][name]), f"{name} differs after a restart")


def check_driver(reopen: Callable[[], Microscope], max_electrons: int) -> Sequence[tuple[str, str]]:
    """Run the polite checks: (what was checked, what is wrong or ''). Never asks for more than ``max_electrons``;
    raises BadInput before the first exposure when that is too little."""
    bench = Bench(reopen, salt=uuid.uuid4().hex)
    need = 2 * (bench.bound(bench.region()).electrons or 0)
    if need > max_electrons:
        raise BadInput(f"the checks need {need} electrons, {max_electrons} are allowed", "raise --max-electrons")
    results = []
    for check in POLITE:
        try:
            check(bench)
            wrong = ""
        except AecontrolError as error:
            wrong = error.what
        results.append((check.__name__.replace("_", " "), wrong))
    bench.microscope.close()
    return results


class MicroscopeContract:
    """Inherit, implement ``open``, and pytest runs the rest."""

    region_shape = (8, 12)
    dwell_time_s = 1e-6

    def open(self, folder: Path) -> Microscope:
        """The driver under test, its ledger in ``folder``."""
        raise AecontrolError("a contract test implements open()")

    def bench(self, folder: Path) -> Bench:
        """A fresh instrument in ``folder``."""
        folder.mkdir(exist_ok=True)
        return Bench(lambda: self.open(folder), region_shape=self.region_shape, dwell_time_s=self.dwell_time_s)

    def a_region(self, microscope: Microscope, corner_px: tuple[int, int] = (0, 0)) -> ScanRegion:
        """A small region that ``microscope`` can expose."""
        bench = Bench(lambda: microscope, region_shape=self.region_shape, dwell_time_s=self.dwell_time_s)
        return bench.region(corner_px)

    def test_a_key_fires_once_and_repeats_its_outcome(self, tmp_path: Path) -> None:
        """See the check."""
        self._run(a_key_fires_once_and_repeats_its_outcome, tmp_path)

    def test_the_frame_arrives_whole(self, tmp_path: Path) -> None:
        """See the check."""
        self._run(the_frame_arrives_whole, tmp_path)

    def test_a_cancelled_key_never_fires(self, tmp_path: Path) -> None:
        """See the check."""
        self._run(a_cancelled_key_never_fires, tmp_path)

    def test_what_is_out_of_limits_never_fires(self, tmp_path: Path) -> None:
        """See the check."""
        self._run(what_is_out_of_limits_never_fires, tmp_path)

    def test_one_key_for_two_commands_latches(self, tmp_path: Path) -> None:
        """See the check."""
        self._run(one_key_for_two_commands_latches, tmp_path)

    def test_the_same_shots_give_the_same_frames(self, tmp_path: Path) -> None:
        """See the check."""
        straight = self.bench(tmp_path / "straight")
        reopened = self.bench(tmp_path / "reopened")
        the_same_shots_give_the_same_frames(straight, reopened)
        straight.microscope.close()
        reopened.microscope.close()

    def _run(self, check: Callable[[Bench], None], folder: Path) -> None:
        bench = self.bench(folder)
        try:
            check(bench)
        finally:
            bench.microscope.close()


def refused(call: Callable[[], object]) -> bool:
    """True when calling raises InstrumentFault."""
    try:
        call()
    except InstrumentFault:
        return True
    return False
