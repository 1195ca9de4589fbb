"""Electron optics: wavelength, interaction constant and the focused probe. Lengths here are angstrom.

Symbols: E beam energy (eV), m electron rest energy (eV), lambda wavelength, alpha aperture semi-angle, chi aberration
phase. C1 > 0 enters chi with a plus sign, so C1 is minus abTEM's ``defocus``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aecontrol.types import Model, NonNegative, Positive
from aecontrol.units import nm_to_angstrom

REST_ENERGY_EV = 510998.95
"""Electron rest energy (CODATA 2018), eV."""
HC_EV_A = 12398.419843320026
"""Planck constant times speed of light, eV angstrom."""
FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))
PROBE_EXTENT_A = 40.0
"""Side of the box on which a probe is tabulated: tails beyond 20 angstrom (about 0.5 %) fold back into it."""
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
    """The probe-forming lens and the annular dark-field detector."""

    voltage_kV: Positive = Field(80.0, description="beam voltage, kV")
    semi_angle_mrad: Positive = Field(30.0, description="convergence semi-angle, mrad")
    c1_nm: float = Field(0.0, description="defocus C1 (plus sign in chi, so minus abTEM's defocus), nm")
    a1_nm: NonNegative = Field(0.0, description="two-fold astigmatism, nm")
    a1_deg: float = Field(0.0, description="azimuth of the two-fold astigmatism, degrees")
    c3_um: float = Field(0.0, description="spherical aberration C3, micrometre")
    source_fwhm_nm: NonNegative = Field(0.08, description="effective source size (full width at half maximum), nm")
    detector_inner_mrad: Positive = Field(86.0, description="inner angle of the dark-field detector, mrad")
    detector_outer_mrad: Positive = Field(200.0, description="outer angle of the dark-field detector, mrad")

    @model_validator(mode="after")
    def _angles_in_order(self) -> Optics:
        if not self.semi_angle_mrad < self.detector_inner_mrad < self.detector_outer_mrad:
            raise ValueError(
                "angles must satisfy semi_angle_mrad < detector_inner_mrad < detector_outer_mrad, got "
                f"{self.semi_angle_mrad}, {self.detector_inner_mrad}, {self.detector_outer_mrad}"
            )
        return self

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


def aberration_phase(optics: Optics, angle: Array, azimuth: Array) -> Array:
    """chi in rad at polar ``angle`` (rad) and ``azimuth`` (rad), for C1, A1 and C3."""
    c1, a1 = nm_to_angstrom(optics.c1_nm), nm_to_angstrom(optics.a1_nm)
    two_fold = c1 + a1 * np.cos(2.0 * (azimuth - math.radians(optics.a1_deg)))
    path = 0.5 * angle**2 * two_fold + 0.25 * optics.c3_um * 1e4 * angle**4
    return np.asarray(2.0 * math.pi / optics.wavelength_A * path)


def transfer(optics: Optics, extra_variance_A2: float = 0.0, folds: int = WAVE_FOLDS) -> tuple[Array, float]:
    """Fourier transform of the probe intensity, including the source, and its frequency step.

    Returns ``(otf, step)``: ``otf`` [n, n] real, axes (ky, kx), zero frequency at ``[n // 2, n // 2]`` where it is 1;
    ``step`` in 1/angstrom. It is real because C1, A1 and C3 are even in k. ``extra_variance_A2`` (per axis) widens the
    source Gaussian, or narrows it when negative; the variance left is never below zero. ``folds``: see WAVE_FOLDS.
    """
    otf, step = _coherent_transfer(optics, folds)
    frequency = (np.arange(otf.shape[0]) - otf.shape[0] // 2) * step
    variance = max(0.0, optics.source_sigma_A**2 + extra_variance_A2)
    blur = np.exp(-2.0 * math.pi**2 * variance * frequency**2)
    return otf * blur[:, None] * blur[None, :], step


@lru_cache(maxsize=16)
def _coherent_transfer(optics: Optics, folds: int) -> tuple[Array, float]:
    # The smallest grid on which |psi|^2 does not alias: sampling just below lambda / (4 alpha).
    n = 2 * folds * (math.ceil(PROBE_EXTENT_A * optics.band_limit_per_A) + 2)
    step = 1.0 / (folds * PROBE_EXTENT_A)
    wave = _aperture_wave(optics, n, step)
    intensity = np.abs(np.fft.ifft2(wave)) ** 2
    otf = np.fft.fftshift(np.fft.fft2(intensity).real)
    return otf / otf[n // 2, n // 2], step


def _aperture_wave(optics: Optics, n: int, step: float) -> NDArray[np.complex128]:
    """Aperture times exp(-i chi) on an unshifted [n, n] frequency grid; the edge is softened over one pixel."""
    frequency = np.fft.fftfreq(n, 1.0 / (n * step))
    ky, kx = frequency[:, None], frequency[None, :]
    radius = np.hypot(kx, ky)
    cutoff = optics.semi_angle_mrad * 1e-3 / optics.wavelength_A
    aperture = np.clip((cutoff - radius) / step + 0.5, 0.0, 1.0)
    phase = aberration_phase(optics, radius * optics.wavelength_A, np.arctan2(ky, kx))
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
    padded = np.zeros((size, size))
    start = size // 2 - n // 2
    padded[start : start + n, start : start + n] = otf
    if pixels < size:  # only empty frequencies beyond the band are cut
        cut = size // 2 - pixels // 2
        padded = padded[cut : cut + pixels, cut : cut + pixels]
    intensity = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(padded)).real)
    intensity = np.maximum(intensity, 0.0)  # removes rounding of order 1e-19
    return np.asarray(intensity / intensity.sum())
