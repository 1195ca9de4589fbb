"""Electron optics: wavelength, interaction constant and the focused probe. Lengths here are angstrom.

Symbols: E beam energy (eV), m electron rest energy (eV), lambda wavelength, alpha aperture semi-angle, chi aberration
phase. C1 > 0 enters chi with a plus sign, so C1 is minus abTEM's ``defocus``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Model, NonNegative
from aecontrol.units import nm_to_angstrom

REST_ENERGY_EV = 510998.95
"""Electron rest energy (CODATA 2018), eV."""
HC_EV_A = 12398.419843320026
"""Planck constant times speed of light, eV angstrom."""
FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))
PROBE_EXTENT_A = 40.0
"""Side of the box on which a probe is tabulated: tails beyond 20 angstrom (about 0.5 %) fold back into it."""
MAX_BLUR_NM = 1.0
"""Probes that aberrations spread further are refused: images and fluence are computed in boxes that hold this much."""
WAVE_FOLDS = 4
"""The wave is computed on a box this many times larger. Softening the aperture's edge over one frequency step makes the
peak of the probe 1 % too high and its tails a third too weak on the smaller box; 0.3 % and a tenth on this one."""

Array = NDArray[np.float64]


def wavelength_A(voltage_kV: float) -> float:
    """Relativistic electron wavelength, angstrom: h c / sqrt(E (E + 2 m))."""
    energy = voltage_kV * 1e3
    return HC_EV_A / math.sqrt(energy * (energy + 2.0 * REST_ENERGY_EV))


def interaction_constant(voltage_kV: float) -> float:
    """Phase per projected potential, rad / (V angstrom): (2 pi / (lambda E)) (m + E) / (2 m + E)."""
    energy = voltage_kV * 1e3
    ratio = (REST_ENERGY_EV + energy) / (2.0 * REST_ENERGY_EV + energy)
    return 2.0 * math.pi / (wavelength_A(voltage_kV) * energy) * ratio


def lorentz_factor(voltage_kV: float) -> float:
    """Total over rest energy of the beam electron."""
    return 1.0 + voltage_kV * 1e3 / REST_ENERGY_EV


def velocity_ratio(voltage_kV: float) -> float:
    """Speed of the beam electron over that of light."""
    return math.sqrt(1.0 - lorentz_factor(voltage_kV) ** -2)


class Optics(Model):
    """The probe-forming lens. Aberrations follow the Krivanek-like notation of :func:`aberration_phase`."""

    voltage_kV: Annotated[float, Field(ge=10, le=1000)] = Field(80.0, description="beam voltage, kV")
    semi_angle_mrad: Annotated[float, Field(gt=0, le=100)] = Field(30.0, description="convergence semi-angle, mrad")
    c1_nm: float = Field(0.0, description="defocus C1 (plus sign in chi, so minus abTEM's defocus), nm")
    a1_nm: NonNegative = Field(0.0, description="two-fold astigmatism A1, nm")
    a1_deg: float = Field(0.0, description="azimuth of the two-fold astigmatism, degrees")
    a2_nm: NonNegative = Field(0.0, description="three-fold astigmatism A2, nm")
    a2_deg: float = Field(0.0, description="azimuth of the three-fold astigmatism, degrees")
    b2_nm: NonNegative = Field(0.0, description="axial coma B2 (its term in chi is theta^3 B2 / 3), nm")
    b2_deg: float = Field(0.0, description="azimuth of the coma, degrees")
    c3_um: float = Field(0.0, description="spherical aberration C3, micrometre")
    c5_mm: float = Field(0.0, description="fifth-order spherical aberration C5, mm")
    defocus_spread_nm: NonNegative = Field(
        0.0, description="standard deviation of C1 from chromatic aberration, Cc sigma(E) / E, nm"
    )
    source_fwhm_nm: NonNegative = Field(0.08, description="effective source size (full width at half maximum), nm")

    @property
    def wavelength_A(self) -> float:
        """Electron wavelength, angstrom."""
        return wavelength_A(self.voltage_kV)

    @property
    def band_limit_per_A(self) -> float:
        """Highest spatial frequency that the probe intensity can hold, 2 alpha / lambda, 1/angstrom."""
        return 2.0 * self.semi_angle_mrad * 1e-3 / self.wavelength_A

    @property
    def source_sigma_A(self) -> float:
        """Standard deviation of the effective source, angstrom."""
        return nm_to_angstrom(self.source_fwhm_nm) / FWHM_PER_SIGMA

    @property
    def blur_nm(self) -> float:
        """How far aberrations spread the probe, nm: |grad chi| lambda / 2 pi of the ray that they displace most."""
        alpha = self.semi_angle_mrad * 1e-3
        first = abs(self.c1_nm) + self.a1_nm + 3.0 * self.defocus_spread_nm
        second = self.a2_nm + self.b2_nm
        third, fifth = abs(self.c3_um) * 1e3, abs(self.c5_mm) * 1e6
        return alpha * first + alpha**2 * second + alpha**3 * third + alpha**5 * fifth

    @property
    def ideal(self) -> bool:
        """True without any aberration."""
        return self.round and self.c1_nm == self.c3_um == self.c5_mm == self.defocus_spread_nm == 0.0

    @property
    def round(self) -> bool:
        """True when the probe looks the same from every side."""
        return self.a1_nm == self.a2_nm == self.b2_nm == 0.0


def aberration_phase(optics: Optics, angle: Array, azimuth: Array, extra_c1_A: float = 0.0) -> Array:
    """chi in rad at polar ``angle`` (rad) and ``azimuth`` (rad).

    chi = (2 pi / lambda) [theta^2 (C1 + A1 cos 2(phi - phi_A1)) / 2
          + theta^3 (A2 cos 3(phi - phi_A2) + B2 cos(phi - phi_B2)) / 3 + C3 theta^4 / 4 + C5 theta^6 / 6].
    ``extra_c1_A`` is added to C1.
    """
    c1, a1, a2, b2 = (nm_to_angstrom(value) for value in (optics.c1_nm, optics.a1_nm, optics.a2_nm, optics.b2_nm))
    path = (
        0.5 * angle**2 * (c1 + extra_c1_A) + 0.25 * optics.c3_um * 1e4 * angle**4 + optics.c5_mm * 1e7 * angle**6 / 6.0
    )
    for size, order, turns, degrees in (
        (a1, 2, 2, optics.a1_deg),
        (a2, 3, 3, optics.a2_deg),
        (b2, 3, 1, optics.b2_deg),
    ):
        if size:
            path = path + size * angle**order / order * np.cos(turns * (azimuth - math.radians(degrees)))
    return np.asarray(2.0 * math.pi / optics.wavelength_A * path)


def transfer(
    optics: Optics, extra_variance_A2: float = 0.0, folds: int = WAVE_FOLDS
) -> tuple[NDArray[np.complex128], float]:
    """Fourier transform of the probe intensity, including source and defocus spread, and its frequency step.

    Returns ``(otf, step)``: ``otf`` [n, n] complex, axes (ky, kx), 1 at zero frequency, ``[n // 2, n // 2]``; ``step``
    in 1/angstrom. ``extra_variance_A2`` (per axis) widens the source Gaussian, or narrows it when negative;
    the variance left is never below zero. ``folds``: see WAVE_FOLDS. Raises BadInput when the aberrations spread the
    probe over more than its box.
    """
    otf, step = _coherent_transfer(optics, folds)
    frequency = (np.arange(otf.shape[0]) - otf.shape[0] // 2) * step
    variance = max(0.0, optics.source_sigma_A**2 + extra_variance_A2)
    blur = np.exp(-2.0 * math.pi**2 * variance * frequency**2)
    return otf * blur[:, None] * blur[None, :], step


@lru_cache(maxsize=8)
def _coherent_transfer(optics: Optics, folds: int) -> tuple[NDArray[np.complex128], float]:
    if optics.blur_nm > MAX_BLUR_NM:
        raise BadInput(
            f"these aberrations spread the probe over up to {optics.blur_nm:.2f} nm, more than {MAX_BLUR_NM} nm",
            "lower the aberrations or semi_angle_mrad",
        )
    # The smallest grid on which |psi|^2 does not alias: sampling just below lambda / (4 alpha).
    n = 2 * folds * (math.ceil(PROBE_EXTENT_A * optics.band_limit_per_A) + 2)
    step = 1.0 / (folds * PROBE_EXTENT_A)
    intensity = np.zeros((n, n))
    for extra_c1_A, weight in _defocus_nodes(optics):
        intensity += weight * np.abs(np.fft.ifft2(_aperture_wave(optics, n, step, extra_c1_A))) ** 2
    otf = np.fft.fftshift(np.fft.fft2(intensity))
    return otf / otf[n // 2, n // 2].real, step


def _defocus_nodes(optics: Optics) -> list[tuple[float, float]]:
    """(added C1 in angstrom, weight): seven Gauss-Hermite nodes of the defocus spread, one where there is none."""
    if optics.defocus_spread_nm == 0.0:
        return [(0.0, 1.0)]
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    spread = nm_to_angstrom(optics.defocus_spread_nm)
    return [(float(spread * x), float(w)) for x, w in zip(nodes, weights / weights.sum(), strict=True)]


def _aperture_wave(optics: Optics, n: int, step: float, extra_c1_A: float) -> NDArray[np.complex128]:
    """Aperture times exp(-i chi) on an unshifted [n, n] frequency grid; the edge is softened over one pixel."""
    frequency = np.fft.fftfreq(n, 1.0 / (n * step))
    ky, kx = frequency[:, None], frequency[None, :]
    radius = np.hypot(kx, ky)
    cutoff = optics.semi_angle_mrad * 1e-3 / optics.wavelength_A
    aperture = np.clip((cutoff - radius) / step + 0.5, 0.0, 1.0)
    phase = aberration_phase(optics, radius * optics.wavelength_A, np.arctan2(ky, kx), extra_c1_A)
    return np.asarray(aperture * np.exp(-1j * phase))


def probe_intensity(optics: Optics, pixels: int, extra_variance_A2: float = 0.0, folds: int = WAVE_FOLDS) -> Array:
    """The probe on a [pixels, pixels] grid over ``PROBE_EXTENT_A``, centred at ``[pixels // 2, pixels // 2]``.

    Values are the fraction of the beam in each cell: non-negative, sum 1. ``pixels`` must resolve the probe
    (``PROBE_EXTENT_A / pixels <= lambda / (4 alpha)``), else ValueError. Computed by exact trigonometric
    interpolation of the band-limited intensity.
    """
    otf, _ = transfer(optics, extra_variance_A2, folds)
    otf = otf[::folds, ::folds]  # sampling in frequency folds the tails back in space
    n = otf.shape[0]
    if PROBE_EXTENT_A / pixels > 1.0 / (2.0 * optics.band_limit_per_A):
        raise ValueError(
            f"{pixels} pixels over {PROBE_EXTENT_A} A cannot hold a probe of {optics.band_limit_per_A} 1/A"
        )
    size = max(n, pixels)
    padded = np.zeros((size, size), dtype=np.complex128)
    start = size // 2 - n // 2
    padded[start : start + n, start : start + n] = otf
    if pixels < size:  # only empty frequencies beyond the band are cut
        cut = size // 2 - pixels // 2
        padded = padded[cut : cut + pixels, cut : cut + pixels]
    intensity = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(padded)).real)
    intensity = np.maximum(intensity, 0.0)  # removes rounding of order 1e-19
    return np.asarray(intensity / intensity.sum())
