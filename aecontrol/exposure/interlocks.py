"""Limits that belong to the instrument: the controller can neither read them away nor raise them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from aecontrol.dose import bound_charge
from aecontrol.types import Budget, Capabilities, Charge, Model, NonNegative, Positive, PositiveInt, ScanRegion
from aecontrol.units import electrons_per_second

DUTY_WINDOW_S = 600.0


class InterlockLimits(Model):
    """The instrument owner's limits, on top of what the instrument can do; null means no such limit."""

    budget: Budget = Field(Budget(), description="for everything that the ledger has ever charged")
    max_electrons_per_shot: PositiveInt | None = Field(None, description="electrons that one exposure may deliver")
    max_seconds_per_shot: Positive | None = Field(None, description="duration of one exposure, s")
    max_frame_bytes: PositiveInt = Field(1 << 30, description="size of one exposure's frames, bytes")
    max_shots_per_minute: PositiveInt | None = Field(None, description="exposures within any 60 s")
    max_beam_on_share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of any ten minutes in which the beam may be on"
    )
    max_shift_nm: NonNegative = Field(
        100.0, description="farthest that a controller may claim the specimen to have drifted, nm"
    )
    drift_nm: NonNegative | None = Field(
        None,
        description="how far the specimen may drift unnoticed, nm; a fluence budget needs it where it drifts",
    )
    max_current_deviation: Annotated[float, Field(gt=0)] = Field(
        0.1, description="relative deviation of the measured dose from current x time that latches"
    )


def tile_bounds(capabilities: Capabilities, limits: InterlockLimits) -> Capabilities:
    """The instrument as its own fluence map sees it: drift, where its owner bounds it, is one more error."""
    if not capabilities.drifts or limits.drift_nm is None:
        return capabilities
    return capabilities.held(limits.drift_nm)


def frame_bytes(region: ScanRegion, capabilities: Capabilities) -> int:
    """Upper bound of what the frames of ``region`` take on a disk (8 bytes a number)."""
    if region.signal == "spectra":
        return 8 * region.pixels * (capabilities.spectra.size if capabilities.spectra else 0)
    return 8 * region.pixels * len(capabilities.channels)


def over_shot_limits(
    region: ScanRegion,
    bound: Charge,
    capabilities: Capabilities,
    limits: InterlockLimits,
    stage_nm: tuple[float, float] = (0.0, 0.0),
) -> str | None:
    """Why this one exposure must not be made, whatever was made before; or None.

    The controller's bound must cover what this instrument computes for itself: otherwise its ledger would hold less
    than what is delivered.
    """
    if capabilities.drifts and limits.drift_nm is None and limits.budget.peak_fluence_e_per_A2 is not None:
        return "a fluence budget cannot be kept where the specimen drifts: limits.drift_nm says nothing"
    own = bound_charge(region, tile_bounds(capabilities, limits))
    if own.electrons is not None and (bound.electrons is None or bound.electrons < own.electrons):
        return f"the bound of {bound.electrons} electrons is below the {own.electrons} that it can deliver"
    if bound.pixels < own.pixels:
        return f"the bound of {bound.pixels} pixels is below its {own.pixels}"
    if own.peak_fluence_e_per_A2 is not None:
        peak = bound.peak_fluence_e_per_A2
        if peak is None or peak < own.peak_fluence_e_per_A2 * (1 - 1e-9):
            return f"the bound of {peak} e/A^2 in one tile is below the {own.peak_fluence_e_per_A2:.6g} possible"
    drift = math.hypot(region.shift_nm[0] + stage_nm[0], region.shift_nm[1] + stage_nm[1])
    checks: Sequence[tuple[str, float, float | None]] = (
        ("electrons in one exposure", bound.electrons or 0, limits.max_electrons_per_shot),
        ("s in one exposure", max(bound.seconds, own.seconds), limits.max_seconds_per_shot),
        ("bytes in one exposure's frames", frame_bytes(region, capabilities), limits.max_frame_bytes),
        ("nm of drift", drift, limits.max_shift_nm),
    )
    for name, value, limit in checks:
        if limit is not None and value > limit:
            return f"{value:.6g} {name}; the instrument's limit is {limit:.6g}"
    return None


def over_rates(recent: Sequence[tuple[float, float]], now_s: float, seconds: float, limits: InterlockLimits) -> str:
    """Why an exposure of ``seconds`` would come too soon after the ``recent`` ones (start s, duration s), or ''."""
    if limits.max_shots_per_minute is not None:
        lately = sum(1 for start, _ in recent if now_s - start < 60.0)
        if lately >= limits.max_shots_per_minute:
            return f"{lately} exposures in the last minute; the instrument's limit is {limits.max_shots_per_minute}"
    if limits.max_beam_on_share is not None:
        on = seconds + sum(length for start, length in recent if now_s - start < DUTY_WINDOW_S)
        if on > limits.max_beam_on_share * DUTY_WINDOW_S:
            return (
                f"the beam would be on for {on:.6g} s of ten minutes; the instrument's limit is "
                f"{limits.max_beam_on_share * DUTY_WINDOW_S:.6g} s"
            )
    return ""


def dose_disagreement(
    region: ScanRegion, measured: Charge, capabilities: Capabilities, limits: InterlockLimits
) -> str | None:
    """Why the measured electrons cannot be what the declared current delivers in that time, or None. A pulse that ended
    early is held against its time alone."""
    if capabilities.beam_current_pA is None or measured.electrons is None:
        return None
    rate = electrons_per_second(capabilities.beam_current_pA)
    most = rate * (measured.seconds + capabilities.blanker_latency_s) * (1 + limits.max_current_deviation) + 1
    whole = measured.pixels >= region.pixels
    least = rate * region.pixels * region.dwell_time_s * (1 - limits.max_current_deviation) - 1 if whole else 0.0
    if least <= measured.electrons <= most:
        return None
    return (
        f"{measured.electrons} electrons were metered, {capabilities.beam_current_pA:g} pA for "
        f"{measured.seconds:.6g} s make {least:.0f} to {most:.0f}"
    )
