"""Projected potential of atoms on a grid, exact at any position, for multislice.

abTEM's own grids spread each atom over its four neighbouring points and do not undo it: at 0.06 angstrom a sulphur atom
half-way between points then scatters a quarter less to 86-200 mrad at 80 kV than one on a point, and thermal motion is
blamed for it. Here the potential is summed in Fourier space, V(k) = sum_j f_j(k) exp(-2 pi i k . r_j), with abTEM's
Lobato scattering factors, so a moved atom is exactly the moved potential.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

from .elements import SYMBOLS

Array = NDArray[np.float64]
FOLDS = 3
"""The potential is exponentiated on a grid this many times finer than that of the waves."""


def require_abtem() -> None:
    """Raises BadInput that says how to install abTEM when it cannot be imported."""
    try:
        import abtem  # noqa: F401
    except ImportError:
        raise BadInput(
            "multislice needs abTEM, which is not installed", "pip install -c constraints.txt -e '.[multislice]'"
        ) from None


def fast_size(at_least: float, multiple: int = 4, primes: tuple[int, ...] = (2, 3, 5, 7)) -> int:
    """The next multiple of ``multiple`` with no other prime factors: other sizes transform several times slower."""
    size = multiple * math.ceil(at_least / multiple)
    while True:
        rest = size
        for prime in primes:
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += multiple


def projected_potential(
    positions_A: Array, numbers: NDArray[np.int64], extent_A: tuple[float, float], pixels: tuple[int, int]
) -> NDArray[np.float32]:
    """Potential of ``positions_A`` [n, 2] (x, y) summed along the beam, V angstrom, periodic in ``extent_A``.

    Returns [pixels x, pixels y], the origin at [0, 0]; both pixel counts must be even. Frequencies up to those of the
    grid are kept.
    """
    from scipy import fft

    kx: Array = np.asarray(np.fft.fftfreq(pixels[0], extent_A[0] / pixels[0]), dtype=np.float64)
    ky: Array = np.asarray(np.fft.rfftfreq(pixels[1], extent_A[1] / pixels[1]), dtype=np.float64)
    total = np.zeros((len(kx), len(ky)), dtype=np.complex64)
    for number in np.unique(numbers):
        x, y = positions_A[numbers == number].T
        along_x = np.exp(-2j * math.pi * kx[:, None] * x).astype(np.complex64)
        along_y = np.exp(-2j * math.pi * y[:, None] * ky).astype(np.complex64)
        total += (along_x @ along_y) * _scattering_factor(int(number), kx, ky)
    area = extent_A[0] * extent_A[1] / (pixels[0] * pixels[1])
    return np.asarray(fft.irfft2(total, s=pixels) / area, dtype=np.float32)


def _scattering_factor(number: int, kx: Array, ky: Array) -> NDArray[np.float32]:
    """Fourier transform of one atom's projected potential, V angstrom^3, on the grid of ``kx`` and ``ky``."""
    from abtem.parametrizations import LobatoParametrization

    factor = LobatoParametrization().projected_scattering_factor(SYMBOLS[number])
    return np.asarray(factor(kx[:, None] ** 2 + ky**2), dtype=np.float32)


def transmissions(
    positions_A: Array,
    numbers: NDArray[np.int64],
    extent_A: tuple[float, float],
    pixels: tuple[int, int],
    layer: NDArray[np.int64],
    layers: int,
    interaction: float,
) -> NDArray[np.complex64]:
    """exp(i ``interaction`` V) of each of ``layers`` slices, [layers, pixels x, pixels y], within abTEM's band limit.

    ``layer`` [n] is the slice of each atom. It is made on a grid ``FOLDS`` times finer and then cut in frequency:
    what one atom scatters beyond the grid would otherwise fold back and add several per cent to a dark-field signal.
    """
    from abtem.antialias import antialias_aperture
    from scipy import fft

    fine = (FOLDS * pixels[0], FOLDS * pixels[1])
    rows, columns = (fft.fftfreq(n, 1.0 / n).astype(int) for n in pixels)
    kept = np.ix_(rows, columns)  # negative frequencies count from the end
    band = antialias_aperture(pixels, (extent_A[0] / pixels[0], extent_A[1] / pixels[1]), np)
    result = np.empty((layers, *pixels), dtype=np.complex64)
    wave = np.empty(fine, dtype=np.complex64)
    for i in range(layers):
        here = layer == i
        phase = interaction * projected_potential(positions_A[here, :2], numbers[here], extent_A, fine)
        wave.real, wave.imag = np.cos(phase), np.sin(phase)  # several times faster than a complex exponential
        spectrum = fft.fft2(wave)
        result[i] = fft.ifft2(spectrum[kept] * (band / FOLDS**2), overwrite_x=True)
    return result
