"""High-resolution TEM images: an exit wave seen through an imperfect lens and recorded by a camera.

The wave is psi_i = FT^-1{psi A exp(-i chi) E_s}, with chi as in ``optics`` (C1 > 0 enters with a plus sign). The image
is the sum of |psi_i|^2 over a Gaussian spread of defocus, Delta = Cc dE / E. That of a weak phase object exp(i sigma V)
is delta + 2 sigma FT(V) sin(chi) E in frequency: at Scherzer's defocus, C1 = -1.2 sqrt(C3 lambda), atoms are dark.

Waves and images are [rows, columns] = [y, x]; ``sampling_A`` is the pixel's (x, y) size.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Model, NonNegative, Positive
from aecontrol.units import angstrom_to_nm, nm_to_angstrom

from .optics import Optics, wavelength_A
from .optics import aberration_phase as phase_at
from .streams import stream

Array = NDArray[np.float64]
SPREAD_REACH = 4.0
"""The defocus spread is cut at this many standard deviations."""
MAX_NODES = 200


class HrtemOptics(Model):
    """The imaging lens. Defaults: a corrected instrument at 80 kV, defocus and C3 for positive phase contrast."""

    voltage_kV: Positive = Field(80.0, description="beam voltage, kV")
    c1_nm: float = Field(-5.5, description="defocus C1 (plus sign in chi), nm")
    a1_nm: NonNegative = Field(0.0, description="two-fold astigmatism, nm")
    a1_deg: float = Field(0.0, description="azimuth of the two-fold astigmatism, degrees")
    c3_um: float = Field(5.0, description="spherical aberration C3, micrometre")
    cc_mm: NonNegative = Field(1.2, description="chromatic aberration, mm")
    energy_spread_eV: NonNegative = Field(0.25, description="standard deviation of the beam energy, eV")
    convergence_mrad: NonNegative = Field(0.2, description="illumination semi-angle alpha_i of E_s, mrad")
    aperture_mrad: Positive = Field(45.0, description="objective aperture (semi-angle), mrad")

    @property
    def wavelength_A(self) -> float:
        """Electron wavelength, angstrom."""
        return wavelength_A(self.voltage_kV)

    @property
    def focal_spread_nm(self) -> float:
        """Delta, the standard deviation of the defocus, nm."""
        return self.cc_mm * 1e6 * self.energy_spread_eV / (self.voltage_kV * 1e3)


class Mtf(Model):
    """Modulation transfer of a camera, (1 - c) / (1 + (q / q0)^(2 p)) + c, with q in cycles per pixel."""

    q0_per_px: Positive = Field(0.25, description="frequency where the first term has fallen to a half, cycles/pixel")
    power: Positive = Field(1.2, description="p, how sharply it falls")
    floor: float = Field(0.1, ge=0.0, lt=1.0, description="c, what is left at high frequency")

    def at(self, q: Array) -> Array:
        """The transfer at ``q`` cycles per pixel."""
        return np.asarray((1.0 - self.floor) / (1.0 + (q / self.q0_per_px) ** (2.0 * self.power)) + self.floor)


def scherzer_c1_nm(voltage_kV: float, c3_um: float) -> float:
    """Scherzer's defocus -1.2 sqrt(C3 lambda), nm. Raises BadInput for a negative C3, which has none."""
    if c3_um < 0.0:
        raise BadInput(f"C3 = {c3_um} um has no Scherzer focus", "give c3_um >= 0 or set c1_nm yourself")
    return angstrom_to_nm(-1.2 * math.sqrt(c3_um * 1e4 * wavelength_A(voltage_kV)))


def aberration_phase(optics: HrtemOptics, kx: Array, ky: Array, c1_nm: float | None = None) -> Array:
    """chi in rad at the frequency (kx, ky), 1/angstrom: 2 pi / lambda times (C1 and A1, then C3) of the angle."""
    lens = Optics(
        voltage_kV=optics.voltage_kV,
        c1_nm=optics.c1_nm if c1_nm is None else c1_nm,
        a1_nm=optics.a1_nm,
        a1_deg=optics.a1_deg,
        c3_um=optics.c3_um,
    )
    return phase_at(lens, optics.wavelength_A * np.hypot(kx, ky), np.arctan2(ky, kx))


def spatial_envelope(optics: HrtemOptics, k: Array, c1_nm: float | None = None) -> Array:
    """E_s = exp(-(pi alpha_i / lambda)^2 (C3 lambda^3 k^3 + C1 lambda k)^2) at |k|, 1/angstrom."""
    angle = optics.wavelength_A * k
    c1 = nm_to_angstrom(optics.c1_nm if c1_nm is None else c1_nm)
    slope = optics.c3_um * 1e4 * angle**3 + c1 * angle
    return np.asarray(np.exp(-((math.pi * optics.convergence_mrad * 1e-3 / optics.wavelength_A * slope) ** 2)))


def temporal_envelope(optics: HrtemOptics, k: Array) -> Array:
    """E_t = exp(-(pi lambda Delta k^2)^2 / 2) at |k|, 1/angstrom."""
    phase = math.pi * optics.wavelength_A * nm_to_angstrom(optics.focal_spread_nm) * k**2
    return np.asarray(np.exp(-0.5 * phase**2))


def ctf(optics: HrtemOptics, kx: Array, ky: Array) -> Array:
    """Contrast transfer sin(chi) E_s E_t inside the aperture, 0 outside, at the frequency (kx, ky), 1/angstrom."""
    k = np.hypot(kx, ky)
    envelope = spatial_envelope(optics, k) * temporal_envelope(optics, k)
    inside = k * optics.wavelength_A <= optics.aperture_mrad * 1e-3
    return np.asarray(np.sin(aberration_phase(optics, kx, ky)) * envelope * inside)


def image_intensity(exit_wave: NDArray[np.complex64], sampling_A: tuple[float, float], optics: HrtemOptics) -> Array:
    """Noiseless image [rows, columns] of ``exit_wave`` [rows, columns]; a wave of 1 gives 1.

    Raises BadInput when the wave is sampled too coarsely for the intensity behind the aperture (twice its angle), or
    when the defocus spread is too wide for the aperture.
    """
    limit = optics.aperture_mrad * 1e-3 / optics.wavelength_A
    if max(sampling_A) > 0.25 / limit:
        raise BadInput(
            f"pixels of {max(sampling_A):.3g} A cannot hold an image through {optics.aperture_mrad} mrad",
            f"sample at {0.25 / limit:.3g} A or finer, or close the aperture",
        )
    rows, columns = exit_wave.shape
    ky = np.asarray(np.fft.fftfreq(rows, sampling_A[1]))[:, None]
    kx = np.asarray(np.fft.fftfreq(columns, sampling_A[0]))[None, :]
    radius = np.hypot(kx, ky)
    spectrum = np.fft.fft2(exit_wave) * (radius <= limit)
    image = np.zeros((rows, columns))
    for offset_nm, weight in _defocus_nodes(optics, limit):
        c1_nm = optics.c1_nm + offset_nm
        turned = np.exp(-1j * aberration_phase(optics, kx, ky, c1_nm)) * spatial_envelope(optics, radius, c1_nm)
        image += weight * np.abs(np.fft.ifft2(spectrum * turned)) ** 2
    return image


def _defocus_nodes(optics: HrtemOptics, limit_per_A: float) -> list[tuple[float, float]]:
    """(offset nm, weight) of an even grid over the Gaussian spread, fine enough for all beams inside the aperture.

    A grid of step h (in standard deviations) repeats at the phase 2 pi / h, so that has to lie beyond the largest one.
    """
    if optics.focal_spread_nm == 0.0:
        return [(0.0, 1.0)]
    phase = math.pi * optics.wavelength_A * nm_to_angstrom(optics.focal_spread_nm) * limit_per_A**2
    count = 2 * math.ceil(SPREAD_REACH * (phase + SPREAD_REACH) / (2.0 * math.pi)) + 1
    if count > MAX_NODES:
        raise BadInput(
            f"a focal spread of {optics.focal_spread_nm:.3g} nm needs {count} defocus values, more than {MAX_NODES}",
            "lower cc_mm, energy_spread_eV or aperture_mrad",
        )
    at = np.linspace(-SPREAD_REACH, SPREAD_REACH, count)
    weights = np.exp(-0.5 * at**2)
    return list(zip(at * optics.focal_spread_nm, weights / weights.sum(), strict=True))


def record(
    intensity: Array,
    electrons_per_pixel: float,
    mtf: Mtf,
    read_noise: float,
    gain: float,
    random: np.random.Generator,
) -> NDArray[np.float32]:
    """A camera frame [rows, columns], in counts: shot noise, blurred with the signal by ``mtf``, times ``gain``.

    ``intensity`` is the image at the pixel centres, 1 where nothing scatters; a pixel sees its mean over its square.
    ``read_noise`` (standard deviation, counts) is added after the blur.
    """
    qy, qx = (np.asarray(np.fft.fftfreq(n)) for n in intensity.shape)
    over_pixel = np.sinc(qy)[:, None] * np.sinc(qx)[None, :]
    expected = np.maximum(0.0, np.fft.ifft2(np.fft.fft2(intensity) * over_pixel).real)
    electrons = random.poisson(electrons_per_pixel * expected)
    transfer = mtf.at(np.hypot(qy[:, None], qx[None, :]))
    seen = np.fft.ifft2(np.fft.fft2(electrons) * transfer).real
    return np.asarray(gain * seen + read_noise * random.standard_normal(seen.shape), dtype=np.float32)


def fit_mtf(vacuum_frames: NDArray[np.float32], gain: float) -> tuple[Mtf, float]:
    """The camera's MTF and read noise (counts) from evenly lit frames [frames, rows, columns] of known ``gain``.

    Fits log of the noise power gain^2 n MTF(q)^2 + read_noise^2 in rings of q up to the corner of the spectrum, each
    weighed by its number of samples. It takes noise to be blurred like the signal. Raises BadInput for a single frame
    or empty ones.
    """
    from scipy.optimize import least_squares

    frames = np.asarray(vacuum_frames, dtype=np.float64)
    if frames.ndim != 3 or len(frames) < 2 or frames.mean() <= 0.0:
        raise BadInput(f"vacuum frames of shape {frames.shape}, mean {frames.mean():.3g}", "give 2 or more lit frames")
    power, q, count = _noise_power(frames)
    shot = gain * float(frames.mean())  # gain^2 times the electrons per pixel

    def misfit(parameters: Array) -> Array:
        q0, p, c, read = parameters
        transfer = (1.0 - c) / (1.0 + (q / q0) ** (2.0 * p)) + c
        return np.asarray(np.sqrt(count) * (np.log(shot * transfer**2 + read**2) - np.log(power)))

    bounds = ([1e-3, 0.1, 0.0, 0.0], [5.0, 10.0, 0.99, math.sqrt(shot)])
    q0, p, c, read = least_squares(misfit, (0.3, 1.0, 0.05, 0.01 * math.sqrt(shot)), bounds=bounds).x
    return Mtf(q0_per_px=float(q0), power=float(p), floor=float(c)), float(read)


def _noise_power(frames: Array) -> tuple[Array, Array, Array]:
    """Mean noise power per pixel in rings, the rings' q (cycles per pixel) and their number of samples."""
    n, rows, columns = frames.shape
    noise = frames - frames.mean(axis=0)  # what is fixed in the frames is no noise
    power = np.mean(np.abs(np.fft.fft2(noise)) ** 2, axis=0) / (rows * columns) * n / (n - 1)
    q = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns)[None, :])
    ring = np.round(q * min(rows, columns) / 2.0).astype(np.int64).ravel()
    count = np.bincount(ring)
    kept = count > 0
    kept[0] = False
    mean_q = np.bincount(ring, weights=q.ravel())[kept] / count[kept]
    return np.bincount(ring, weights=power.ravel())[kept] / count[kept], mean_q, count[kept].astype(np.float64)


def focal_series(
    exit_wave: NDArray[np.complex64],
    sampling_A: tuple[float, float],
    optics: HrtemOptics,
    electrons_per_pixel: float,
    mtf: Mtf,
    seed: int,
    steps_nm: tuple[float, ...] = (-10.0, 0.0, 10.0),
    jitter_nm: float = 1.0,
) -> tuple[NDArray[np.float32], Array]:
    """Frames [defoci, rows, columns] in increasing C1, and their C1 in nm: ``steps_nm`` about Scherzer focus.

    Each defocus is off by a Gaussian of ``jitter_nm`` (assumed, not measured); gain 1 and no read noise. ``c1_nm`` of
    ``optics`` is not used.
    """
    middle = scherzer_c1_nm(optics.voltage_kV, optics.c3_um)
    jitter = jitter_nm * stream(seed, "focal-jitter").standard_normal(len(steps_nm))
    c1_nm = np.sort(middle + np.asarray(steps_nm) + jitter)
    frames = []
    for step, value in enumerate(c1_nm):
        image = image_intensity(exit_wave, sampling_A, optics.model_copy(update={"c1_nm": float(value)}))
        frames.append(record(image, electrons_per_pixel, mtf, 0.0, 1.0, stream(seed, "camera", step)))
    return np.stack(frames), c1_nm
