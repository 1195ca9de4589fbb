"""What may be concluded from a judged series, and what not, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from aecontrol.judged import Judged
    from aecontrol.perception.damage.reading import DamageReading

EVERYWHERE = 0.6
"""From this share of flagged patches on the whole frame has changed."""
TOGETHER = 4.0
"""Standard errors from which the mean of patches, none of which is flagged, is said to differ."""
IMPLAUSIBLE = 0.01
"""p-value of the law below which a curve is said not to follow it."""
POOR_PX = 0.15
"""Registration that may be off by more than this is mentioned."""


def conclusions(judged: Judged) -> list[str]:
    """All that may be said of a series, most important first."""
    valid = [(k, reading) for k, reading in enumerate(judged.readings, start=1) if not reading.reason]
    said = list(_refused(judged))
    if not valid:
        return [*said, "No frame could be compared with the first one, so nothing is known of damage."]
    return [
        *_seen(valid, judged.series.limit_nm),
        *said,
        *_dose(judged, len(valid)),
        *_caveats(valid),
        *_lower_bound(valid),
        "The null was drawn from the first frame with shot noise alone, at the fitted focus, dose and shift; noise "
        "that is not shot noise, charging, or contamination counts as change.",
    ]


def _refused(judged: Judged) -> Iterator[str]:
    """Frames that nothing may be concluded from, those of one reason together."""
    by_reason: dict[str, list[int]] = {}
    for k, reading in enumerate(judged.readings, start=1):
        if reading.reason:
            by_reason.setdefault(reading.reason, []).append(k)
    for reason, frames in by_reason.items():
        which = f"Frame {frames[0]}" if len(frames) == 1 else f"Frames {', '.join(map(str, frames))}"
        yield f"{which}: nothing may be concluded: {reason}."


def _seen(valid: list[tuple[int, DamageReading]], limit_nm: float) -> Iterator[str]:
    for k, reading in valid:
        flagged = float(reading.flagged[reading.valid].mean())
        unit = "of its matter as estimated" if reading.metric == "learned" else f"in units of {reading.metric}"
        if flagged:
            yield (
                f"Frame {k} differs from the first in {flagged:.1%} of its patches by more than noise, focus, dose and "
                f"shift explain; score {reading.mean_score:.3g} {unit}, the mean over all patches."
            )
        elif (errors := reading.mean_score / _error(reading)) > TOGETHER:
            yield (
                f"No single patch of frame {k} differs from the first by more than noise, focus, dose and shift "
                f"explain, but all together do: score {reading.mean_score:.3g} {unit}, {errors:.0f} times its error by "
                "noise."
            )
        else:
            yield (
                f"Frame {k} shows no change in any patch beyond noise, focus, dose and shift; how small a change would "
                "have been noticed was not measured."
            )


def _error(reading: DamageReading) -> float:
    """Standard error of the mean score by noise."""
    return float(np.sqrt((reading.sd[reading.valid] ** 2).sum())) / int(reading.valid.sum())


def _dose(judged: Judged, compared: int) -> Iterator[str]:
    """What follows about dose, and what does not."""
    if judged.series.dose is None:
        yield "The dose is not known (--dose-per-frame), so the curve is against the number of the frame."
        return
    response = judged.response
    if response is None:
        yield f"Only {compared} dose was compared: no curve, and no critical fluence, follows from it."
        return
    if judged.plausible < IMPLAUSIBLE:
        yield (
            f"Damage of 1 - exp(-F / F_c) does not describe the curve (p = {judged.plausible:.1g}; of curves that it "
            "does describe, one in twelve is told so): do not rely on the numbers that follow."
        )
    critical = np.array(response.critical_fluence_e_per_A2[0])
    low, middle, high = np.quantile(critical, (0.05, 0.5, 0.95))
    tested = response.tested_e_per_A2[0]
    if tested > high:
        yield f"Critical fluence {middle:.3g} e/A^2 (90 %: {low:.3g} to {high:.3g}), reached within the series."
        return
    slope = 1000.0 * np.quantile(np.array(response.amplitude) / critical, (0.05, 0.5, 0.95))
    yield (
        f"The series ends at {tested:.4g} e/A^2, not surely beyond the critical fluence, so only the slope may be "
        f"used: the score rises by {slope[1]:.3g} per 1000 e/A^2 (90 %: {slope[0]:.3g} to {slope[2]:.3g})."
    )


def _caveats(valid: list[tuple[int, DamageReading]]) -> Iterator[str]:
    everywhere = [k for k, r in valid if float(r.flagged[r.valid].mean()) > EVERYWHERE]
    if everywhere:
        yield (
            f"Frame(s) {', '.join(map(str, everywhere))}: the whole frame has changed. What all patches share (loss of "
            "brightness, blur) cannot be told from dose and focus and is taken out, so the score is a lower bound; "
            "another zone axis or another place would look the same."
        )
    worst = max(reading.residual_px for _, reading in valid)
    if worst > POOR_PX:
        yield f"Registration may be off by {worst:.2f} px (standard deviation), rows included; the null allows for it."


def _lower_bound(valid: list[tuple[int, DamageReading]]) -> Iterator[str]:
    """What no score can show, unless it was said already."""
    if not any(float(r.flagged[r.valid].mean()) > EVERYWHERE for _, r in valid):
        yield (
            "Damage that all patches share looks like focus and dose and is taken out: where the whole frame is "
            "damaged alike, the score is a lower bound."
        )
