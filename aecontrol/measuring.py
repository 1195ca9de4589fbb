"""What stored frames of reference places say: where the specimen has drifted, and what the beam has done to it.

Nothing here exposes anything; the same frames give the same answer, so that ``verify`` can ask again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aecontrol.commands import MeasureDamage, MeasureDrift
from aecontrol.drift import measure_shift
from aecontrol.durable import load_npy, npy_bytes, sha256_hex, write_durable
from aecontrol.errors import BadInput, StorageFault
from aecontrol.events import DamageMeasured, DriftMeasured, ResponseFitted
from aecontrol.state import State
from aecontrol.types import ArrayRef, Frame, Plan, ScanRegion

LEAST_PATCHES = 4
"""Fewer patches than this say nothing of a place."""


class Reading(Protocol):
    """What a meter says of two frames: see ``aecontrol.perception.damage.reading``."""

    @property
    def score(self) -> NDArray[np.float64]:
        """Excess over the null [rows, cols]."""

    @property
    def sd(self) -> NDArray[np.float64]:
        """Of an undamaged patch [rows, cols]."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Which patches may be used [rows, cols]."""

    @property
    def reason(self) -> str:
        """Why nothing may be concluded; empty when it may."""


class Meter(Protocol):
    """Compares two frames of one place: see ``aecontrol.perception.damage.meter``."""

    @property
    def version(self) -> str:
        """Changes whenever its numbers may."""

    @property
    def gain_sd(self) -> float | None:
        """Standard deviation of the logarithm of score over damaged fraction; None for a metric that does not estimate
        the fraction."""

    @property
    def metric_sd(self) -> float:
        """Standard deviation of what the score of a whole frame is off by, beyond noise and gain."""

    def read(
        self,
        first: NDArray[np.generic],
        later: NDArray[np.generic],
        pixel_size_nm: tuple[float, float],
        limit_nm: float,
    ) -> Reading:
        """Compare frames [rows, cols] that are shifted by at most ``limit_nm``. Deterministic; raises nothing for bad
        frames: the reading says why."""


Store = Callable[[NDArray[np.generic]], ArrayRef]


def load_array(folder: Path, ref: ArrayRef) -> NDArray[np.generic]:
    """An array beside the journal, digest checked. Raises StorageFault when it is missing or damaged."""
    try:
        data = (folder / ref.path).read_bytes()
    except OSError as error:
        raise StorageFault(f"{folder / ref.path} cannot be read: {error}", "restore it from a copy") from error
    if sha256_hex(data) != ref.sha256:
        raise StorageFault(f"{folder / ref.path} does not match its digest", "restore it from a copy")
    return load_npy(data, ref.path)


def store_array(folder: Path, array: NDArray[np.generic]) -> ArrayRef:
    """Put an array beside the journal; it is durable when this returns. Raises StorageFault."""
    data = npy_bytes(array)
    sha = sha256_hex(data)
    path = f"frames/{sha}.npy"
    if not (folder / path).exists():
        write_durable(folder / path, data)
    return ArrayRef(path=path, shape=array.shape, dtype=str(array.dtype), sha256=sha)


def measure_drift(folder: Path, command: MeasureDrift, state: State) -> DriftMeasured:
    """What a frame of the reference region says of where the specimen is. Raises StorageFault when a stored frame is
    missing or damaged."""
    assert state.plan.drift is not None
    key, frame, sent = command.record.key, command.frame, command.record.region.shift_nm
    if not frame.usable:
        why = f"unusable frame ({', '.join(frame.flags)})"
        return DriftMeasured(key=key, shift_nm=sent, sigma_nm=0.0, quality=0.0, accepted=False, reason=why)
    if command.reference is None:
        return DriftMeasured(key=key, shift_nm=sent, sigma_nm=0.0, quality=0.0, accepted=True)
    before, after = _image(folder, command.reference), _image(folder, frame)
    found = measure_shift(before, after, frame.region.pixel_size_nm, state.plan.drift.limit_nm)
    return DriftMeasured(
        key=key,
        shift_nm=(sent[0] + found.dx_nm, sent[1] + found.dy_nm) if found.accepted else sent,
        sigma_nm=found.sigma_nm if found.accepted else 0.0,
        quality=found.quality,
        accepted=found.accepted,
        reason=found.reason,
    )


def measure_damage(folder: Path, command: MeasureDamage, state: State, meter: Meter) -> DamageMeasured:
    """What a frame says of the damage since the first one of its place, in shares of the matter as far as the metric's
    gain is known. Raises StorageFault."""
    assert state.plan.damage is not None
    key, frame, first = command.record.key, command.frame, command.first
    nothing = DamageMeasured(key=key, first=first and first.key, metric=meter.version)
    if not frame.usable:  # the detector's fault, not the beam's
        return nothing.model_copy(update={"first": None, "reason": f"unusable frame ({', '.join(frame.flags)})"})
    if first is None or command.first_frame is None:
        return nothing.model_copy(update={"reason": "the first frame of its place"})
    before, after = _image(folder, command.first_frame), _image(folder, frame)
    try:
        reading = meter.read(before, after, frame.region.pixel_size_nm, state.plan.damage.limit_nm)
    except BadInput as error:  # frames that this metric cannot compare
        return nothing.model_copy(update={"reason": error.what})
    inner = np.zeros_like(reading.valid)
    # less of the beam's tails falls on the rim, and on halves of bond units only
    inner[1:-1, 1:-1] = reading.valid[1:-1, 1:-1]
    if reading.reason or inner.sum() < LEAST_PATCHES:
        few = f"{int(inner.sum())} patches inside the rim can be compared, {LEAST_PATCHES} are needed"
        return nothing.model_copy(update={"reason": reading.reason or few})
    row, col = np.nonzero(inner)
    places = _centres_nm(frame.region, row, col)
    shown = np.column_stack([reading.score[row, col], reading.sd[row, col]])
    scores = np.column_stack([places, shown / state.plan.damage.gain])
    return nothing.model_copy(
        update={
            "scores": store_array(folder, scores),
            "mean": float(scores[:, 2].mean()),
            "sd": float(np.sqrt((scores[:, 3] ** 2).sum())) / len(scores),
        }
    )


def meter_of(plan: Plan, device: str) -> Meter | None:
    """The meter that a plan asks for, ready; None where damage is not measured. Raises BadInput, also for a metric that
    does not estimate the damaged fraction: what it shows is no damage in nm^2 until everything is broken."""
    if plan.damage is None:
        return None
    from aecontrol.perception.damage.meter import build_meter
    from aecontrol.perception.device import resolve

    meter = build_meter(plan.damage.metric, resolve(device))
    if meter.gain_sd is None:
        raise BadInput(
            f"damage.metric = {plan.damage.metric!r} tells where damage is, not how much",
            "charge by the metric 'learned'; `aecontrol damage` compares them all on the stored frames",
        )
    return meter


def fit(folder: Path, state: State, meter: Meter) -> ResponseFitted:
    """The response that all measurements so far support. Raises StorageFault."""
    from aecontrol.fit_response import fit_response
    from aecontrol.perception.damage.reading import PATCH_PX

    harm = state.harm
    assert harm is not None
    evidence = []
    for event in harm.usable:
        assert event.scores is not None
        scores = np.asarray(load_array(folder, event.scores), np.float64)
        patch_nm2 = math.prod(state.keys[event.key].region.pixel_size_nm) * PATCH_PX**2
        evidence.append(harm.evidence(event, scores, patch_nm2, state.keys))
    response = fit_response(
        evidence,
        harm.response.phases,
        harm.plan.critical_fluence_e_per_A2,
        harm.plan.exponent,
        harm.plan.gain_sd or meter.gain_sd,
        meter.metric_sd / harm.plan.gain,
        seed=state.seed,
    )
    return ResponseFitted(response=response, measurements=len(evidence))


def _image(folder: Path, frame: Frame) -> NDArray[np.generic]:
    return load_array(folder, next(iter(frame.channels.values())))


def _centres_nm(region: ScanRegion, row: NDArray[np.intp], col: NDArray[np.intp]) -> NDArray[np.float64]:
    """Middles [n, 2] of patches in the specimen frame, nm."""
    from aecontrol.perception.damage.reading import PATCH_PX

    px, py = region.pixel_size_nm
    u, v = (col + 0.5) * PATCH_PX * px - region.fov_nm[0] / 2, (row + 0.5) * PATCH_PX * py - region.fov_nm[1] / 2
    c, s = np.cos(region.rotation_rad), np.sin(region.rotation_rad)
    x, y = region.center_nm
    return np.column_stack([x + c * u - s * v, y + s * u + c * v])
