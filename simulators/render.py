"""Fast dark-field images: the linear incoherent model ("level 0").

I(r) = sum_j w_j (P * G)(r - r_j): the fraction of the beam scattered to the detector at probe position r, with P the
probe, w_j = s Z^n a cross-section and G a Gaussian of variance u^2 + r0^2 (thermal motion, width of the potential).

Method: atoms are spread on a grid with a cubic B-spline, convolved in Fourier space with the exact band-limited kernel
(divided by the transfer of both splines), and interpolated at the true probe positions with the same spline. No
position is ever rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from aecontrol.units import nm_to_angstrom

from .optics import Optics, lorentz_factor, transfer, wavelength_A
from .specimens import Specimen

Array = NDArray[np.float64]
CHANNELS = ("HAADF",)
MARGIN_A = 10.0
"""Atoms within this distance of the scanned box are rendered, angstrom; about 1 % of a probe lies further out."""
POTENTIAL_WIDTH_A = 0.125
"""r0: makes the full width of a single atom at 80 kV, 30 mrad and no source size the 0.77 angstrom of multislice."""
GRID_PER_PERIOD = 4.0
"""Grid points per shortest period of the image; the splines are then wrong by at most 6e-4 of a peak (2e-4 with the
default source)."""
MAX_GRID_POINTS = 2**25
"""Larger images are rendered in halves, to bound memory."""
DEFAULT_EXPONENT = 1.7
LINEAR_THICKNESS_NM = 4.0
MIN_INNER_OVER_SEMI_ANGLE = 2.5
_REFERENCE_KV = 80.0
_REFERENCE_PEAKS = {  # (inner, outer) mrad: exponent n, {Z: peak fraction}
    (86.0, 200.0): (1.75, {42: 0.01785, 16: 0.00330}),
    (60.0, 200.0): (1.69, {42: 0.03516, 16: 0.00688}),
}
_REFERENCE_RMS_U_A = {42: 0.06, 16: 0.07}


@dataclass(frozen=True)
class Validity:
    """How far an image can be trusted. ``linear_ok``: thin enough (4 nm) and detector far enough out (2.5 semi-angles)
    for the linear model; ``calibrated``: the absolute scale was fitted to multislice at these settings, else it is a
    Rutherford extrapolation and intensities are qualitative; ``note`` says why not."""

    linear_ok: bool
    calibrated: bool
    thickness_nm: float
    zone_axis: bool
    note: str


@dataclass(frozen=True)
class Rendered:
    """Noiseless image: fraction of the incident beam per channel, shaped like the probe positions."""

    channels: Mapping[str, NDArray[np.float32]]
    validity: Validity


def scattering_strength(optics: Optics, exponent: float | None = None) -> tuple[float, float, bool]:
    """(s, n, calibrated) of the cross-section s Z^n, angstrom^2 per atom.

    Calibrated for 80 kV, 30 mrad and detectors 86-200 mrad (n = 1.75) or 60-200 mrad (n = 1.69): s is the geometric
    mean that gives the single-atom peaks of Mo and S computed by frozen-phonon multislice (abTEM 1.0.11, no source
    size, statistical error about 3 %). For another exponent s keeps that mean. Elsewhere s is
    scaled as unscreened Rutherford scattering, gamma^2 lambda^4 (1/inner^2 - 1/outer^2), from 86-200 mrad: qualitative.
    """
    angles = (optics.detector_inner_mrad, optics.detector_outer_mrad)
    known = optics.voltage_kV == _REFERENCE_KV and angles in _REFERENCE_PEAKS
    base = angles if known else (86.0, 200.0)
    n, peaks = _REFERENCE_PEAKS[base]
    n = exponent if exponent is not None else (n if known else DEFAULT_EXPONENT)
    logs = []
    for number, peak in peaks.items():
        spread = _REFERENCE_RMS_U_A[number] ** 2 + POTENTIAL_WIDTH_A**2
        logs.append(math.log(peak / _reference_peak_density(spread)) - n * math.log(number))
    scale = math.exp(sum(logs) / len(logs))
    if not known:
        scale *= _rutherford(optics.voltage_kV, *angles) / _rutherford(_REFERENCE_KV, *base)
    return scale, n, known and exponent is None and optics.semi_angle_mrad == 30.0


@lru_cache(maxsize=8)
def _reference_peak_density(variance_A2: float) -> float:
    """Peak of the calibration probe widened by ``variance_A2``, 1/angstrom^2."""
    sharp = Optics(voltage_kV=_REFERENCE_KV, semi_angle_mrad=30.0, source_fwhm_nm=0.0)
    otf, step = transfer(sharp, variance_A2)
    return float(otf.sum() * step**2)


def _rutherford(voltage_kV: float, inner_mrad: float, outer_mrad: float) -> float:
    solid = inner_mrad**-2 - outer_mrad**-2
    return lorentz_factor(voltage_kV) ** 2 * wavelength_A(voltage_kV) ** 4 * solid


class HaadfRenderer:
    """Renders atoms seen through one set of optics. Keeps the kernels it has used, so reuse the object."""

    def __init__(self, optics: Optics, exponent: float | None = None) -> None:
        """``exponent``: n of Z^n, by default the calibrated value for these optics, else 1.7; sensible 1.5 to 2.0."""
        self.optics = optics
        self._scale, self.exponent, self.calibrated = scattering_strength(optics, exponent)
        self._kernel = lru_cache(maxsize=16)(self._make_kernel)
        self.grid_A = 1.0 / (GRID_PER_PERIOD * optics.band_limit_per_A)

    def cross_sections_A2(self, atomic_numbers: NDArray[np.int64]) -> Array:
        """s Z^n for each atom, angstrom^2."""
        return np.asarray(self._scale * np.asarray(atomic_numbers, dtype=np.float64) ** self.exponent)

    def render(
        self, specimen: Specimen, probe_nm: Array, rotation_rad: float = 0.0, zone_axis: bool = True
    ) -> Rendered:
        """Image of the atoms that are alive at the true probe positions ``probe_nm`` [..., 2], any layout.

        ``rotation_rad`` is a hint that makes it fast: the turn of a frame in which the positions fill an upright box.
        """
        alive = specimen.alive
        image = self.image(
            specimen.positions_A[alive, :2],
            specimen.atomic_numbers[alive],
            specimen.rms_u_A[alive],
            nm_to_angstrom(1.0) * np.asarray(probe_nm),
            rotation_rad,
        )
        heights = specimen.positions_A[:, 2]
        thickness_nm = float(np.ptp(heights)) / nm_to_angstrom(1.0) if len(heights) else 0.0
        return Rendered({CHANNELS[0]: image}, self.validity(thickness_nm, zone_axis))

    def validity(self, thickness_nm: float, zone_axis: bool) -> Validity:
        """What may be claimed of an image of a specimen this thick."""
        thin = thickness_nm <= LINEAR_THICKNESS_NM or not zone_axis
        far_out = self.optics.detector_inner_mrad >= MIN_INNER_OVER_SEMI_ANGLE * self.optics.semi_angle_mrad
        reasons = [
            text
            for bad, text in (
                (not thin, f"thicker than {LINEAR_THICKNESS_NM} nm on a zone axis"),
                (not far_out, f"inner angle below {MIN_INNER_OVER_SEMI_ANGLE} semi-angles"),
                (not self.calibrated, "absolute scale not calibrated for these optics: qualitative"),
            )
            if bad
        ]
        return Validity(thin and far_out, self.calibrated, thickness_nm, zone_axis, "; ".join(reasons))

    def image(
        self,
        positions_A: Array,
        atomic_numbers: NDArray[np.int64],
        rms_u_A: Array,
        probe_A: Array,
        rotation_rad: float = 0.0,
    ) -> NDArray[np.float32]:
        """The image of atoms ``positions_A`` [n, 2] at ``probe_A`` [..., 2], both (x, y) in angstrom."""
        c, s = math.cos(rotation_rad), math.sin(rotation_rad)
        turn = np.array([[c, -s], [s, c]])  # row vectors into the frame turned by rotation_rad
        probe = np.asarray(probe_A, dtype=np.float64).reshape(-1, 2) @ turn
        atoms = np.asarray(positions_A, dtype=np.float64) @ turn
        weights = self.cross_sections_A2(atomic_numbers)
        # A round probe looks the same in every frame, so that one kernel serves all rotations.
        kernel_turn = 0.0 if self.optics.a1_nm == 0.0 else rotation_rad
        values = self._upright(atoms, weights, np.asarray(rms_u_A), probe, kernel_turn)
        return values.reshape(probe_A.shape[:-1])

    def _upright(
        self, atoms: Array, weights: Array, rms_u_A: Array, probe: Array, rotation_rad: float
    ) -> NDArray[np.float32]:
        """Values [m] at ``probe`` [m, 2] that fill an upright box."""
        from scipy import fft, ndimage

        low, high = probe.min(axis=0), probe.max(axis=0)
        near = np.all((atoms > low - MARGIN_A) & (atoms < high + MARGIN_A), axis=1)
        if not near.any():
            return np.zeros(len(probe), dtype=np.float32)
        origin = low - MARGIN_A
        span = np.ceil((high - low) / (4.0 * self.grid_A)) * 4 + math.ceil(2.0 * MARGIN_A / self.grid_A) + 4
        rows, cols = (fft.next_fast_len(int(extent), real=True) for extent in span[::-1])
        if rows * cols > MAX_GRID_POINTS and len(probe) > 1:
            halves = np.array_split(probe, 2)
            return np.concatenate([self._upright(atoms, weights, rms_u_A, half, rotation_rad) for half in halves])
        atoms = (atoms[near] - origin) / self.grid_A
        weights, thermal = weights[near] / self.grid_A**2, rms_u_A[near]
        spectrum = np.zeros((rows, cols // 2 + 1), dtype=np.complex64)
        for rms in np.unique(thermal):
            same = thermal == rms
            spread = spread_on_grid(atoms[same], weights[same], (rows, cols)).astype(np.float32)
            spectrum += fft.rfft2(spread, workers=1) * self._kernel(rows, cols, float(rms), rotation_rad)
        field = fft.irfft2(spectrum, (rows, cols), workers=1)
        where = (probe - origin) / self.grid_A
        values = ndimage.map_coordinates(field, where.T[::-1], order=3, mode="grid-wrap", prefilter=False)
        return np.asarray(values, dtype=np.float32)

    def _make_kernel(self, rows: int, cols: int, rms_u_A: float, rotation_rad: float) -> NDArray[np.float32]:
        """Transfer of probe, source and atom on a half grid of frequencies, over that of the two B-splines."""
        from scipy import ndimage

        # The table's frequency step, 1 / (160 angstrom), is fine enough for linear interpolation.
        table, step = transfer(self.optics, rms_u_A**2 + POTENTIAL_WIDTH_A**2)
        middle = table.shape[0] // 2
        edge = self.optics.band_limit_per_A * self.grid_A
        fy, fx = np.fft.fftfreq(rows), np.fft.rfftfreq(cols)
        iy, ix = np.flatnonzero(np.abs(fy) < edge), np.flatnonzero(fx < edge)
        ky, kx = fy[iy, None] / self.grid_A, fx[None, ix] / self.grid_A
        c, s = math.cos(rotation_rad), math.sin(rotation_rad)
        where = np.stack([s * kx + c * ky, c * kx - s * ky]) / step + middle
        values = ndimage.map_coordinates(table, where, order=1, mode="constant")
        kernel = np.zeros((rows, len(fx)), dtype=np.float32)
        kernel[np.ix_(iy, ix)] = values / (np.sinc(fy[iy, None]) * np.sinc(fx[None, ix])) ** 8
        return kernel


def spread_on_grid(where: Array, weights: Array, shape: tuple[int, int]) -> Array:
    """Spread ``weights`` [n] at ``where`` [n, 2] (x, y in grid units) on a periodic grid with a cubic B-spline."""
    base = np.floor(where).astype(np.int64)
    t = where - base
    taps = (
        np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=0) / 6.0
    )  # [4, n, 2]: the spline at -1, 0, 1, 2 from the base point
    offset = np.arange(-1, 3)[:, None]
    row = (base[:, 1] + offset) % shape[0]
    col = (base[:, 0] + offset) % shape[1]
    index = row[:, None, :] * shape[1] + col[None, :, :]
    values = (weights * taps[:, :, 1])[:, None, :] * taps[None, :, :, 0]
    flat = np.bincount(index.ravel(), weights=values.ravel(), minlength=shape[0] * shape[1])
    return np.asarray(flat, dtype=np.float64).reshape(shape)
