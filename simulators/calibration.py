"""The linear image model fitted to a short multislice of the very specimen: weights by element and one width.

In a thick crystal the weights hold the channelling, which no table of single atoms can; they are good for that
specimen, thickness, optics and detector and for nothing else. The fit is made once and kept on disk.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from .cache import cache_folder, kept
from .elements import SYMBOLS
from .multislice import Block, content_key, cut_out, scan_block
from .optics import Optics
from .scattering import Annulus, Calibration, objects, radial_probe
from .specimens import Specimen
from .streams import stream

Array = NDArray[np.float64]
SIDE_A = 8.0
"""Side of the square in the middle of a specimen without a period in which the fit is made, angstrom."""
BOX_A = 18.0
"""Least side of the block of whole periods in which the fit is made otherwise: every cell of it is seen."""
CONFIGURATIONS = 10
POSITIONS = 36
"""Phonon configurations, and probe positions of each, others for each."""
NEAR_A = 0.35
"""Standard deviation per axis of the positions that are placed near atoms."""
REACH_A = 12.0
MAX_WIDTH_A = 0.6
PRIOR = 0.02
"""Pull of each weight towards that of a single atom, for elements that the square hardly holds: a column of weight 1
that is seen this brightly, relative to the brightest place, counts as much as the prior."""


def calibrate(specimen: Specimen, optics: Optics, annulus: Annulus, folder: Path | None = None) -> Calibration:
    """Fit to multislice of the middle of ``specimen``, or what an earlier fit of the same left in ``folder``.

    ``annulus``: (inner, outer) mrad. The source of ``optics`` is left out of both sides, so the fit holds for any.
    Takes some thirty CPU seconds at 5 nm. Raises BadInput without abTEM, for a probe that is not round, and where there
    are no atoms.
    """
    if not optics.round:
        raise BadInput("a calibrated model needs a round probe", "set a1_nm, a2_nm and b2_nm to 0")
    sharp = optics.model_copy(update={"source_fwhm_nm": 0.0})
    block, low, high = _sample(specimen, sharp)
    settings = (
        specimen.thickness_nm,
        sharp.model_dump(mode="json"),
        annulus,
        CONFIGURATIONS,
        POSITIONS,
        PRIOR,
        low.tolist(),
        high.tolist(),
    )
    stored = (folder or cache_folder()) / f"{content_key(settings, block)}.json"

    def fit() -> Calibration:
        probe, seen = [], []
        for i in range(CONFIGURATIONS):
            probe.append(_places(block, low, high, i))
            seen.append(scan_block(block, sharp, {"annulus": annulus}, probe[-1], 1, 0, first=i)[0, 0])
        found = _fitted(block, sharp, annulus, np.concatenate(probe), np.concatenate(seen))
        return found.model_copy(update={"thickness_nm": specimen.thickness_nm})

    return kept(
        stored,
        lambda path: Calibration.model_validate_json(path.read_text()),
        fit,
        _write,
    )


def _write(path: Path, found: Calibration) -> None:
    path.write_text(found.model_dump_json(indent=1))


def _sample(specimen: Specimen, sharp: Optics) -> tuple[Block, Array, Array]:
    """Atoms in a box, and the corners of the part of it that may be scanned: all of a block of whole periods, or the
    middle of a cut-out that has none."""
    middle = nm_to_angstrom(0.5) * np.asarray(specimen.size_nm)
    if specimen.period_A is None:
        corners = middle + 0.5 * SIDE_A * np.array([[-1.0, -1.0], [1.0, 1.0]])
        block, corner = cut_out(specimen, corners, sharp.semi_angle_mrad)
        return block, corners[0] - corner, corners[1] - corner
    sides = np.linalg.norm(specimen.period_A, axis=1)
    axes = specimen.period_A / sides[:, None]
    extent = sides * np.ceil(BOX_A / sides)
    # whole periods from the middle on; the odd start keeps atoms off the seam
    where = (specimen.positions_A[:, :2] - middle) @ axes.T + 0.5 * extent + 0.137
    inside = specimen.alive & np.all((where >= 0.0) & (where < extent), axis=1)
    positions = np.column_stack([where[inside], specimen.positions_A[inside, 2]])
    width, height = (float(side) for side in extent)
    block = Block(positions, specimen.atomic_numbers[inside], specimen.rms_u_A[inside], (width, height))
    return block, np.zeros(2), extent


def _places(block: Block, low: Array, high: Array, turn: int) -> Array:
    """Probe positions [POSITIONS, 2]: a third anywhere, the others near atoms, each element in turn.

    A column's signal differs by a tenth from one phonon configuration to the next, so it has to be seen often, and not
    always the same column.
    """
    random = stream(0, "calibration-probes", turn)
    flat = block.positions_A[:, :2]
    inside = np.flatnonzero(np.all((flat > low) & (flat < high), axis=1))
    where = low + random.random((POSITIONS, 2)) * (high - low)
    numbers = np.unique(block.numbers[inside])
    for j in range(POSITIONS // 3, POSITIONS if len(inside) else 0):
        atom = random.choice(inside[block.numbers[inside] == numbers[j % len(numbers)]])
        where[j] = flat[atom] + NEAR_A * random.standard_normal(2)
    return np.asarray(np.clip(where, low, high))


def _fitted(block: Block, sharp: Optics, annulus: Annulus, probe_A: Array, seen: Array) -> Calibration:
    """Weights, background and width by least squares; each weight is drawn a little to that of a single atom."""
    from scipy.optimize import minimize_scalar

    single = objects(sharp, annulus)
    numbers = np.unique(block.numbers)
    strengths = np.array([single.strength_A2(int(number)) for number in numbers])
    distances = [_distances(block, block.numbers == number, probe_A) for number in numbers]
    motion = [float(np.mean(block.rms_u_A[block.numbers == number] ** 2)) for number in numbers]
    radii = np.linspace(0.0, REACH_A, 601)
    prior = PRIOR * float(np.ptp(seen)) * np.eye(len(numbers), len(numbers) + 1)

    def fit(width_A: float) -> tuple[Array, float]:
        columns = []
        for strength, variance, (where, distance) in zip(strengths, motion, distances, strict=True):
            light = np.interp(distance, radii, radial_probe(sharp, variance + width_A**2, radii))
            columns.append(strength * np.bincount(where, weights=light, minlength=len(probe_A)))
        design = np.column_stack([*columns, np.ones(len(seen))])
        system, right = np.concatenate([design, prior]), np.concatenate([seen, prior[:, :-1].sum(axis=1)])
        found = np.linalg.lstsq(system, right, rcond=None)[0]
        return np.asarray(found), float(np.mean((design @ found - seen) ** 2))

    width = float(minimize_scalar(lambda w: fit(w)[1], bounds=(0.0, MAX_WIDTH_A), method="bounded").x)
    found, squared = fit(width)
    return Calibration(
        weights_A2={
            SYMBOLS[int(number)]: float(factor * strength)
            for number, factor, strength in zip(numbers, found[:-1], strengths, strict=True)
        },
        width_A=width,
        background=float(found[-1]),
        thickness_nm=angstrom_to_nm(float(np.ptp(block.positions_A[:, 2]))),
        voltage_kV=sharp.voltage_kV,
        semi_angle_mrad=sharp.semi_angle_mrad,
        detector_mrad=annulus,
        residual=math.sqrt(squared) / float(np.ptp(seen)),
    )


def _distances(block: Block, chosen: NDArray[np.bool_], probe_A: Array) -> tuple[NDArray[np.int64], Array]:
    """Every pair of a probe position and a chosen atom (or periodic image of one) within REACH_A: index of the
    position, distance."""
    flat = block.positions_A[chosen, :2]
    where, distance = [], []
    for image in np.ndindex(3, 3):
        shifted = flat + (np.array(image) - 1) * np.asarray(block.extent_A)
        apart = np.hypot(*(probe_A[:, None, :] - shifted).transpose(2, 0, 1))
        near = apart < REACH_A
        where.append(np.nonzero(near)[0])
        distance.append(apart[near])
    return np.concatenate(where), np.concatenate(distance)
