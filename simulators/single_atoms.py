"""How one static atom scatters a focused, aberration-free probe: the tables that the fast renderer is built on.

The atom is a phase object, T = exp(i sigma V) with V its projected Lobato potential (abTEM). The wave behind it is
psi + psi (T - 1). The first term is the probe itself, known in closed form on the infinite plane,
psi(r) = J1(2 pi k0 r) / (sqrt(pi) r) with k0 = alpha / lambda; only the second is put on a grid, and that one is as
narrow as the atom. So no probe is cut off or folded back, which in a periodic box of 40 angstrom costs 1 % of the peak.
No thermal motion and no source: both are convolutions with a Gaussian, exact for one atom.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .elements import NUMBERS
from .optics import interaction_constant, wavelength_A
from .potential import fast_size, projected_potential, require_abtem

Array = NDArray[np.float64]
Settings = tuple[tuple[float, float], ...]
METHOD = "1"
"""Raise it when results change: part of the key of stored tables."""
SETTINGS: Settings = ((60.0, 30.0), (80.0, 30.0), (100.0, 30.0), (200.0, 21.4), (300.0, 21.4))
"""Beam voltage (kV) and convergence semi-angle (mrad) of the tables that are shipped."""
RADII_A: Array = np.linspace(0.0, 7.0, 71)
EDGES_MRAD: Array = np.linspace(0.0, 220.0, 45)
BOX_A = 20.0
"""Side of the box that holds the atom; one of 28 changes the peaks of the annulus 86-200 mrad by less than 1e-3."""
OVERSAMPLING = 8.0
"""T is made on a grid that reaches this many times the last edge, so that what scatters further does not fold back.
Twelve instead changes the peaks of 86-200 mrad by less than 1e-3; two is 3 % too high for Mo at 80 kV."""
RESOLUTION = 2.0**-24
"""Tables are rounded to this fraction of the beam, so that they compress."""


def single_atom_tables(
    voltage_kV: float,
    semi_angle_mrad: float,
    numbers: Sequence[int],
    radii_A: Array = RADII_A,
    edges_mrad: Array = EDGES_MRAD,
    box_A: float = BOX_A,
    oversampling: float = OVERSAMPLING,
) -> NDArray[np.float32]:
    """Fraction of the beam inside polar angle ``edges_mrad`` with the probe ``radii_A`` away from the atom.

    Returns [elements, radii, edges] for the atomic ``numbers``; the parts at all angles make 1 within 2e-5. Raises
    BadInput without abTEM.
    """
    require_abtem()
    wavelength = wavelength_A(voltage_kV)
    cutoff = semi_angle_mrad * 1e-3 / wavelength
    edges = np.asarray(edges_mrad) * 1e-3 / wavelength
    pixels = fast_size(2.0 * (float(edges[-1]) + cutoff) * box_A)  # psi (T - 1) folds back beyond the last edge only
    fine = fast_size(2.0 * oversampling * float(edges[-1]) * box_A)
    step = 1.0 / box_A
    probes = _probes(np.asarray(radii_A), cutoff, pixels, box_A)
    ky, kx, near = _frequencies_inside(float(edges[-1]) + step, pixels, step)
    radius = np.hypot(ky, kx)
    wanted = _share_inside(edges, radius, step).astype(np.float32)
    in_aperture = _share_inside(np.minimum(edges, cutoff), radius, step).astype(np.float32)
    plain = np.minimum(1.0, (np.asarray(edges_mrad) / semi_angle_mrad) ** 2)
    shift = np.exp(2j * math.pi * kx * np.asarray(radii_A)[:, None]) / (math.sqrt(math.pi) * cutoff)
    shift = shift.astype(np.complex64)
    tables = np.empty((len(numbers), len(radii_A), len(edges)), dtype=np.float32)
    for i, number in enumerate(numbers):
        potential = projected_potential(np.zeros((1, 2)), np.array([number]), (box_A, box_A), (fine, fine))
        change = _coarser(np.exp(1j * interaction_constant(voltage_kV) * potential) - 1.0, pixels)
        scattered = _transform(probes * change, near) * (box_A / pixels) ** 2
        beside = np.abs(scattered) ** 2
        across = 2.0 * (shift * scattered).real
        inside = (beside @ wanted.T + across @ in_aperture.T) * step**2
        tables[i] = np.round((plain + inside) / RESOLUTION) * RESOLUTION
    return tables


def content_key(settings: Settings) -> str:
    """sha256 of everything that tables for ``settings`` depend on, but for abTEM's version."""
    grids = (_edges(settings).tolist(), RADII_A.tolist(), BOX_A, OVERSAMPLING)
    return hashlib.sha256(repr((METHOD, settings, sorted(NUMBERS.values()), grids)).encode()).hexdigest()


def _edges(settings: Settings) -> Array:
    """Every 5 mrad, and at the edge and half the edge of each bright disc, where the signal does not grow smoothly."""
    discs = [share * semi_angle_mrad for _, semi_angle_mrad in settings for share in (0.5, 1.0)]
    return np.unique(np.append(EDGES_MRAD, discs))


def tables_of(settings: Settings = SETTINGS) -> dict[str, NDArray[np.generic]]:
    """The tables of every element for each of ``settings`` (kV, mrad), ready to be written. Raises BadInput without
    abTEM."""
    require_abtem()
    import abtem

    numbers, edges = sorted(NUMBERS.values()), _edges(settings)
    about = {
        "what": "fraction of the beam inside edges_mrad, [element, radius, edge]; one static atom, no source",
        "command": "python -m simulators.multislice tables --out FILE",
        "abtem": abtem.__version__,
        "potential": "Lobato, one slice, summed in Fourier space",
        "box_A": BOX_A,
        "potential_reaches_mrad": OVERSAMPLING * float(EDGES_MRAD[-1]),
    }
    return {
        "numbers": np.array(numbers),
        "radii_A": RADII_A,
        "edges_mrad": edges,
        "about": np.array(json.dumps(about)),
        **{f"{kv:g}kV_{mrad:g}mrad": single_atom_tables(kv, mrad, numbers, edges_mrad=edges) for kv, mrad in settings},
    }


def write_tables(path: Path, tables: Mapping[str, NDArray[np.generic]]) -> None:
    """Write ``tables`` to ``path`` (npz)."""
    np.savez_compressed(path, **tables)  # type: ignore[arg-type]  # numpy's stub takes them for its own keyword


def _probes(radii_A: Array, cutoff: float, pixels: int, box_A: float) -> NDArray[np.float32]:
    """The probe's wave at ``radii_A`` along x from the corner of the box, [radii, pixels, pixels], 1/angstrom."""
    from scipy.special import j1

    axis = np.fft.fftfreq(pixels, 1.0 / box_A)
    reach = np.hypot(box_A / 2.0 + radii_A.max(), box_A / 2.0)
    table_at = np.linspace(0.0, reach, int(reach / 5e-4))
    argument = 2.0 * math.pi * cutoff * np.maximum(table_at, 1e-9)
    table = 2.0 * math.sqrt(math.pi) * cutoff * j1(argument) / argument
    waves = np.empty((len(radii_A), pixels, pixels), dtype=np.float32)
    for wave, radius in zip(waves, radii_A, strict=True):
        wave[...] = np.interp(np.hypot(axis[:, None], axis[None, :] - radius), table_at, table)
    return waves


def _coarser(field: NDArray[np.complex64], pixels: int) -> NDArray[np.complex64]:
    """``field`` without the frequencies that [pixels, pixels] points cannot hold, on those points."""
    from scipy import fft

    size = len(field)
    middle = slice(size // 2 - pixels // 2, size // 2 + pixels // 2)
    kept = fft.ifftshift(fft.fftshift(fft.fft2(field))[middle, middle])
    return np.asarray(fft.ifft2(kept) * (pixels / size) ** 2, dtype=np.complex64)


def _frequencies_inside(limit: float, pixels: int, step: float) -> tuple[Array, Array, NDArray[np.intp]]:
    """(ky, kx) of the pixels within ``limit`` of the axis and their places in the flattened grid."""
    axis = np.asarray(np.fft.fftfreq(pixels, 1.0 / (pixels * step)), dtype=np.float64)
    near = np.flatnonzero(np.hypot(axis[:, None], axis[None, :]) < limit)
    return axis[near // pixels], axis[near % pixels], near


def _share_inside(edges: Array, radius: Array, step: float) -> Array:
    """Share of each pixel (at ``radius`` from the axis) that lies inside each of ``edges``, [edges, pixels]."""
    return np.asarray(np.clip((edges[:, None] - radius) / step + 0.5, 0.0, 1.0) * (edges[:, None] > 0.0))


def _transform(waves: NDArray[np.complex64], near: NDArray[np.intp]) -> NDArray[np.complex64]:
    from scipy import fft

    found = np.empty((len(waves), len(near)), dtype=np.complex64)
    for wave, row in zip(waves, found, strict=True):
        row[...] = fft.fft2(wave).reshape(-1)[near]
    return found
