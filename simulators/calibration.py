"""The linear image model fitted to a short multislice of one unit cell: weights by species and one blur.

I(r) = background + sum_j w_j (P * G)(r - r_j), summed over every atom of the thickness, with P the probe and G a
Gaussian of variance u^2 + blur^2. In a thick crystal the weights hold the channelling, which Z^n cannot; they are good
for the perfect crystal, thickness, optics and detector they were fitted to and for nothing else.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Model, NonNegative, Positive
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from .elements import SYMBOLS
from .multislice import Block, content_key, scan_block
from .optics import PROBE_EXTENT_A, Optics, probe_intensity
from .potential import require_abtem
from .streams import stream

Array = NDArray[np.float64]
BOX_A = 18.0
"""Least side of the box of repeated cells."""
POSITIONS = 48
"""Probe positions of each phonon configuration, others for each."""
NEAR_A = 0.35
"""Standard deviation per axis of the positions that are placed near atoms."""
MAX_BLUR_A = 0.6


class Calibration(Model):
    """A linear model that stands for multislice of one crystal at one thickness, seen by one detector."""

    weights_A2: dict[str, float] = Field(description="cross-section of one atom of each element, angstrom^2")
    blur_A: NonNegative = Field(description="standard deviation per axis that widens the probe further, angstrom")
    background: float = Field(description="fraction of the beam that is there everywhere")
    thickness_nm: Positive = Field(description="thickness of whole cells, nm")
    voltage_kV: Positive = Field(description="beam voltage, kV")
    semi_angle_mrad: Positive = Field(description="convergence semi-angle, mrad")
    inner_mrad: NonNegative = Field(description="inner angle of the detector, mrad")
    outer_mrad: Positive = Field(description="outer angle of the detector, mrad")
    residual: NonNegative = Field(description="root mean square misfit over the range, phonon noise included")


def calibrate(
    cell: Block,
    cell_height_A: float,
    thickness_nm: float,
    optics: Optics,
    annulus: tuple[float, float],
    configurations: int = 12,
    seed: int = 0,
    folder: Path | None = None,
) -> Calibration:
    """Fit the linear model to multislice of ``cell``, repeated every ``cell_height_A`` up to ``thickness_nm``.

    ``annulus``: (inner, outer) mrad. The source of ``optics`` is left out of both sides, so the fit holds for any.
    Results are kept in ``folder``, if given, as json. Raises BadInput without abTEM and for less than one cell.
    """
    require_abtem()
    layers = round(nm_to_angstrom(thickness_nm) / cell_height_A)
    if layers < 1:
        raise BadInput(
            f"{thickness_nm} nm is less than half a cell of {angstrom_to_nm(cell_height_A):.3g} nm",
            "give a thickness of at least one cell",
        )
    sharp = optics.model_copy(update={"source_fwhm_nm": 0.0})
    crystal = repeated(cell, cell_height_A, layers)
    settings = (sharp.model_dump(mode="json"), annulus, configurations, seed, POSITIONS)
    stored = folder and folder / f"{content_key(settings, crystal)}.json"
    if stored and stored.exists():
        return Calibration.model_validate_json(stored.read_text())
    probe, seen = _sampled(crystal, sharp, annulus, configurations, seed)
    weights, background, blur, residual = _fitted(cell, layers, sharp, probe, seen)
    found = Calibration(
        weights_A2=weights,
        blur_A=blur,
        background=background,
        thickness_nm=angstrom_to_nm(layers * cell_height_A),
        voltage_kV=optics.voltage_kV,
        semi_angle_mrad=optics.semi_angle_mrad,
        inner_mrad=annulus[0],
        outer_mrad=annulus[1],
        residual=residual,
    )
    if stored:
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_text(found.model_dump_json(indent=1))
    return found


def repeated(cell: Block, cell_height_A: float, layers: int) -> Block:
    """``cell`` repeated ``layers`` times along the beam and sideways to at least BOX_A."""
    across = [math.ceil(BOX_A / side) for side in cell.extent_A]
    indices = np.indices((across[0], across[1], layers)).reshape(3, -1).T
    sides = np.array([*cell.extent_A, cell_height_A])
    shifts = indices[:, None, :] * sides
    copies = len(shifts)
    extent = (across[0] * cell.extent_A[0], across[1] * cell.extent_A[1])
    where = (shifts + cell.positions_A).reshape(-1, 3)
    return Block(where, np.tile(cell.numbers, copies), np.tile(cell.rms_u_A, copies), extent)


def modelled(calibration: Calibration, cell: Block, cell_height_A: float, optics: Optics, probe_A: Array) -> Array:
    """The linear model of the periodic crystal at ``probe_A`` [m, 2]: fraction of the beam [m]."""
    layers = round(nm_to_angstrom(calibration.thickness_nm) / cell_height_A)
    numbers = np.unique(cell.numbers)
    columns = _columns(cell, layers, optics, probe_A, calibration.blur_A)
    weights = np.array([calibration.weights_A2[SYMBOLS[int(number)]] for number in numbers])
    return np.asarray(columns @ weights + calibration.background)


def _sampled(
    crystal: Block, optics: Optics, annulus: tuple[float, float], configurations: int, seed: int
) -> tuple[Array, Array]:
    """Positions [n, 2] and what is seen there. Each phonon configuration sees its own positions, all over the box.

    A third lie anywhere, the others near an atom, each species in turn: a column's signal differs by a tenth from
    configuration to configuration, so it has to be seen often, and not always the same column.
    """
    numbers = np.unique(crystal.numbers)
    where, seen = [], []
    for i in range(configurations):
        random = stream(seed, "calibration-probes", i)
        probe = random.random((POSITIONS, 2)) * crystal.extent_A
        for j in range(POSITIONS // 3, POSITIONS):
            atom = random.choice(np.flatnonzero(crystal.numbers == numbers[j % len(numbers)]))
            probe[j] = crystal.positions_A[atom, :2] + NEAR_A * random.standard_normal(2)
        where.append(probe)
        seen.append(scan_block(crystal, optics, {"annulus": annulus}, probe, 1, seed, first=i)[0, 0])
    return np.concatenate(where), np.concatenate(seen)


def _fitted(
    cell: Block, layers: int, optics: Optics, probe_A: Array, seen: Array
) -> tuple[dict[str, float], float, float, float]:
    """Weights, background, blur and misfit over the range, by least squares."""
    from scipy.optimize import minimize_scalar

    def fit(blur_A: float) -> tuple[Array, float]:
        design = np.column_stack([_columns(cell, layers, optics, probe_A, blur_A), np.ones(len(seen))])
        found = np.linalg.lstsq(design, seen)[0]
        return np.asarray(found), float(np.mean((design @ found - seen) ** 2))

    blur = float(minimize_scalar(lambda b: fit(b)[1], bounds=(0.0, MAX_BLUR_A), method="bounded").x)
    found, squared = fit(blur)
    symbols = [SYMBOLS[int(number)] for number in np.unique(cell.numbers)]
    weights = {symbol: float(weight) for symbol, weight in zip(symbols, found, strict=False)}
    return weights, float(found[-1]), blur, math.sqrt(squared) / float(np.ptp(seen))


def _columns(cell: Block, layers: int, optics: Optics, probe_A: Array, blur_A: float) -> Array:
    """Sum of the widened probe over the atoms of each species, [positions, species], 1/angstrom^2: a Fourier series."""
    width, height = cell.extent_A
    reach = [math.floor(optics.band_limit_per_A * side) for side in cell.extent_A]
    kx, ky = (np.arange(-n, n + 1) / side for n, side in zip(reach, cell.extent_A, strict=True))
    pixels = 2 * (math.ceil(PROBE_EXTENT_A * optics.band_limit_per_A) + 2)
    axis = (np.arange(pixels) - pixels // 2) * (PROBE_EXTENT_A / pixels)
    cosines = [np.cos(2.0 * math.pi * k[:, None] * axis) for k in (kx, ky)]
    sines = [np.sin(2.0 * math.pi * k[:, None] * axis) for k in (kx, ky)]
    probe = probe_intensity(optics, pixels)
    transfer = cosines[1] @ probe @ cosines[0].T - sines[1] @ probe @ sines[0].T  # [ky, kx]; real, the probe is even
    squared = kx**2 + ky[:, None] ** 2
    ahead_x = np.exp(2j * math.pi * kx[:, None] * probe_A[:, 0])
    ahead_y = np.exp(2j * math.pi * ky[:, None] * probe_A[:, 1])
    columns = []
    for number in np.unique(cell.numbers):
        chosen = cell.numbers == number
        x, y = cell.positions_A[chosen, :2].T
        variance = float(np.mean(cell.rms_u_A[chosen] ** 2)) + blur_A**2
        structure = np.exp(-2j * math.pi * ky[:, None] * y) @ np.exp(-2j * math.pi * x[:, None] * kx)
        series = structure * transfer * np.exp(-2.0 * math.pi**2 * variance * squared) * (layers / (width * height))
        columns.append(np.einsum("kl,km,lm->m", series, ahead_y, ahead_x, optimize=True).real)
    return np.stack(columns, axis=1)
