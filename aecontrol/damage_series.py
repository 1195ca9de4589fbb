"""`aecontrol damage`: how much the frames of a series differ from the first by damage, where, and what that says."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.damage_request import Request, read_series
from aecontrol.durable import write_durable
from aecontrol.errors import BadInput
from aecontrol.image_sets import Progress
from aecontrol.judged import Judged, Series

if TYPE_CHECKING:
    from aecontrol.perception.damage.meter import Comparison, Meter
    from aecontrol.perception.damage.reading import DamageReading
    from aecontrol.response import Response

Floats = NDArray[np.float64]

OTHERS = (
    "learned",
    "glr",
    "glr-pooled",
    "ssim",
    "mse",
    "ncc",
    "ssim-default",
    "psnr",
    "resnet18",
    "efficientnet_lite0",
    "resnet18-random-control",
)
"""Metrics of the table. The last one has learnt nothing: what it sees needs no network."""
_COLUMNS = ("frame", "fluence_e_per_A2", "metric", "sha256", "valid", "score", "null_sd", "flagged_fraction", "note")


def judge(paths: Sequence[Path], request: Request, out: Path | None, device: str, progress: Progress) -> dict[str, Any]:
    """Judge the series in ``paths`` and write maps, figures and tables to the folder ``out`` (None: one named after the
    series in the working directory).

    Returns ``contract``, what `--json` prints; ``conclusions``, sentences; and ``files``. Raises BadInput and
    StorageFault.
    """
    from aecontrol.damage_figure import draw_curve, draw_maps
    from aecontrol.damage_words import conclusions
    from aecontrol.perception.damage.meter import build_meter

    series = read_series(paths, request)
    meter = build_meter(request.metric, device, request.weights)
    folder = out or Path(f"{paths[0].stem}_damage")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{str(folder)!r} is a file", "give another --out")
    others, missing = _others(meter, device)
    judged, rows, registered = _judged(series, meter, others, progress)
    words = conclusions(judged)
    written: dict[str, bytes] = {
        "registered.npz": _archive(registered, series),
        "metrics.csv": _table(rows, missing),
        "conclusions.txt": ("\n".join(words) + "\n").encode(),
        "maps.png": draw_maps(judged, registered["frames"]),
        "curve.png": draw_curve(judged),
    }
    maps = {f"map_{k:04d}.npy": reading for k, reading in enumerate(judged.readings, start=1)}
    written |= {name: _npy(reading.score) for name, reading in maps.items()}
    contract = _contract(meter, judged, folder)
    written["damage.json"] = (json.dumps(contract, indent=1) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"the folder {str(folder)!r} cannot be made: {error}", "give another --out") from error
    for name, data in written.items():
        write_durable(folder / name, data)
    return {"contract": contract, "conclusions": words, "files": [str(folder / name) for name in written]}


def _others(meter: Meter, device: str) -> tuple[list[Meter], dict[str, str]]:
    """Meters of the table beside the asked one, and why some are missing."""
    from aecontrol.perception.damage.meter import build_meter

    found, missing = [], {}
    for name in OTHERS:
        if name == meter.name:
            continue
        try:
            found.append(build_meter(name, device))
        except BadInput as error:
            missing[name] = error.what
    return found, missing


def _judged(
    series: Series, meter: Meter, others: Sequence[Meter], progress: Progress
) -> tuple[Judged, list[dict[str, Any]], dict[str, Floats]]:
    """All frames compared with the first one: readings of ``meter``, rows of the table of all metrics, and the
    registered frames with their valid pixels. A frame is looked for where the last one was found."""
    from aecontrol.perception.damage.meter import compare, drawn_repeats

    first = series.frames[0]
    fluence = np.asarray((np.arange(len(series.frames)) + 0.5) * (series.dose or 1.0), dtype=np.float64)
    frames, valid = [first.astype(np.float64)], [np.ones(first.shape, dtype=bool)]
    readings, rows, at = [], [], (0, 0)
    meters = (meter, *others)
    for k, later in enumerate(series.frames[1:], start=1):
        comparison = compare(first, later, series.pixel_size_nm, series.limit_nm, at)
        repeats = drawn_repeats(comparison)
        for n, each in enumerate(meters):
            reading = each.judge(comparison, repeats)
            rows.append(_row(k, float(fluence[k]) if series.dose else None, reading))
            progress((k - 1) * len(meters) + n + 1, (len(series.frames) - 1) * len(meters))
            if each is meter:
                readings.append(reading)
        moved, seen = _laid(comparison, later)
        frames.append(moved)
        valid.append(seen)
        if comparison.pair is not None:
            at = (round(comparison.registration.shift_px[0]), round(comparison.registration.shift_px[1]))
    judged = Judged(series, tuple(readings), fluence)
    laid = {"frames": np.stack(frames).astype(np.float32), "valid": np.stack(valid)}
    response, plausible = _response(judged, meter)
    return replace(judged, response=response, plausible=plausible), rows, laid


def _laid(comparison: Comparison, later: NDArray[np.generic]) -> tuple[Floats, NDArray[np.bool_]]:
    """The later frame in its own units on the pixels of the first, and where it is valid; as it lay, and nowhere, where
    it could not be registered."""
    if comparison.pair is None:
        return later.astype(np.float64), np.zeros(later.shape, dtype=bool)
    moved = comparison.registration.apply(later.astype(np.float64))
    return np.where(comparison.pair.valid, moved, np.nan), comparison.pair.valid


def _response(judged: Judged, meter: Meter) -> tuple[Response | None, float]:
    """How damage follows fluence, where the dose is known and at least two doses were compared; and the p-value of the
    law behind it."""
    from aecontrol.response import Evidence

    valid = [(k, r) for k, r in enumerate(judged.readings, start=1) if r.valid.any()]
    if judged.series.dose is None or len(valid) < 2:
        return None, 1.0
    from aecontrol.fit_response import criticise, fit_response

    evidence = []
    for k, reading in valid:
        count = int(reading.valid.sum())
        first, later = np.full(count, judged.fluence[0]), np.full(count, judged.fluence[k])
        score, sd = reading.score[reading.valid], reading.sd[reading.valid]
        evidence.append(Evidence(0, first, later, score, sd, frame="first"))
    guess = float(judged.fluence[-1])
    response = fit_response(evidence, ("specimen",), guess, gain_sd=meter.gain_sd, metric_sd=meter.metric_sd)
    return response, criticise(response, evidence)


def _contract(meter: Meter, judged: Judged, folder: Path) -> dict[str, Any]:
    return {
        "backbone": meter.name,
        "sha256": meter.sha256,
        "frames": [
            {
                "index": k,
                "valid": not reading.reason,
                "shift_px": [round(float(shift), 4) for shift in reading.shift_px],
                "score": _number(reading.mean_score),
                "flagged_fraction": _flagged(reading),
                "map": str(folder / f"map_{k:04d}.npy"),
            }
            for k, reading in enumerate(judged.readings, start=1)
        ],
    }


def _row(frame: int, fluence: float | None, reading: DamageReading) -> dict[str, Any]:
    """A line of the table: one frame by one metric."""
    return {
        "frame": frame,
        "fluence_e_per_A2": fluence,
        "metric": reading.metric,
        "sha256": reading.sha256,
        "valid": not reading.reason,
        "score": _number(reading.mean_score),
        "null_sd": _number(float(np.median(reading.sd[reading.valid]))) if reading.valid.any() else None,
        "flagged_fraction": _flagged(reading),
        "note": reading.reason,
    }


def _flagged(reading: DamageReading) -> float | None:
    """Share of the valid patches that are flagged; None where nothing is valid."""
    return _number(float(reading.flagged[reading.valid].mean())) if reading.valid.any() else None


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _table(rows: Sequence[dict[str, Any]], missing: dict[str, str]) -> bytes:
    """CSV of every frame by every metric; metrics that are not there are named last."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    writer.writerows({"metric": name, "note": f"not available: {why}"} for name, why in missing.items())
    return stream.getvalue().encode()


def _archive(registered: dict[str, Floats], series: Series) -> bytes:
    stream = io.BytesIO()
    scale = {} if series.pixel_nm is None else {"pixel_size_nm": np.array(series.pixel_nm)}
    arrays: dict[str, Any] = {**registered, **scale}
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _npy(array: Floats) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array.astype(np.float32))
    return stream.getvalue()


def summary_lines(result: dict[str, Any]) -> Iterator[str]:
    """The result for people."""
    for frame in result["contract"]["frames"]:
        if frame["valid"]:
            dx, dy = frame["shift_px"]
            yield (
                f"frame {frame['index']}: score {frame['score']:.4g}, {frame['flagged_fraction']:.1%} of the patches "
                f"flagged, moved by x {dx + 0.0:.2f}, y {dy + 0.0:.2f} px"
            )
        else:
            yield f"frame {frame['index']}: nothing may be concluded"
    yield from result["conclusions"]
    yield from result["files"]
