"""Fast images: the linear incoherent model, any number of detectors from one pass over the atoms.

I(r) = vacuum + sum_j (P * O_j)(r - r_j): the fraction of the beam that reaches a detector at probe position r, P the
probe (source size included) and O_j the object function of atom j (:mod:`simulators.scattering`) widened by its thermal
motion.

Method (a non-uniform Fourier transform there and back): atoms are spread on a grid with a bell four points wide,
multiplied in Fourier space with the exact band-limited kernel (divided by the transfer of both bells), and interpolated
at the true probe positions with the same bell. No position is ever rounded. Runs on the processor or a GPU (torch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput
from aecontrol.units import nm_to_angstrom

from .elements import check_numbers
from .optics import Optics, transfer
from .potential import fast_size
from .scattering import (
    LINEAR_THICKNESS_NM,
    MIN_INNER_OVER_SEMI_ANGLE,
    Annulus,
    Calibration,
    Contrast,
    Objects,
    objects,
)
from .specimens import Specimen

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]
Images = dict[str, NDArray[np.float32]]
HAADF: Mapping[str, Annulus] = {"HAADF": (86.0, 200.0)}
MARGIN_A = 10.0
"""Atoms within this distance of the scanned box are rendered, angstrom, and further by the blur of aberrations; about
1 % of a probe lies further out."""
GRID_PER_PERIOD = 3.3
"""Grid points per shortest period of the image."""
BELL_BETA = 9.0
"""Shape of the bell: suited to this GRID_PER_PERIOD."""
FORGOTTEN = 1e-4
"""Share of the image's spectrum beyond its band, which is dropped."""
MAX_GRID_POINTS = 2**24
"""Larger images are rendered in halves, to bound memory."""
PIXELS_AT_ONCE = 2**15
"""Interpolated together on a processor, so that its caches hold them."""


@dataclass(frozen=True)
class Validity:
    """How far an image can be trusted. ``linear_ok``: thin enough (4 nm on a zone axis, or calibrated at this
    thickness) and a detector for which the linear model holds (inner angle from 2.5 semi-angles, or bright field that
    takes in the whole bright disc); ``calibrated``: the absolute scale was fitted to multislice at these settings;
    ``note`` says why not; ``level`` names the model."""

    linear_ok: bool
    calibrated: bool
    thickness_nm: float
    zone_axis: bool
    note: str
    level: str = "power"


@dataclass(frozen=True)
class Rendered:
    """Noiseless images: fraction of the incident beam per channel, shaped like the probe positions."""

    channels: Mapping[str, NDArray[np.float32]]
    validity: Mapping[str, Validity]


class Renderer:
    """Renders atoms seen through one set of optics. Keeps the kernels it has used, so reuse the object."""

    def __init__(
        self,
        optics: Optics,
        detectors: Mapping[str, Annulus] = HAADF,
        contrast: Contrast | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
        device: str = "cpu",
    ) -> None:
        """``detectors``: name -> (inner, outer) angle, mrad; ``calibrations``: of some of them; ``device``: where torch
        computes. Raises BadInput for angles out of order or tables that are not shipped."""
        self.optics, self.device = optics, device
        self.detectors = {name: check_annulus(name, annulus) for name, annulus in detectors.items()}
        self.calibrations = dict(calibrations or {})
        self.objects: dict[str, Objects] = {
            name: objects(optics, annulus, contrast, self.calibrations.get(name))
            for name, annulus in self.detectors.items()
        }
        self.margin_A = MARGIN_A + nm_to_angstrom(optics.blur_nm)
        self.band_per_A = _band_limit(optics)
        self.grid_A = 1.0 / (GRID_PER_PERIOD * self.band_per_A)
        self._probe_table = lru_cache(maxsize=8)(self._make_probe_table)
        self._atom_table = lru_cache(maxsize=32)(self._make_atom_table)

    @property
    def vacuum(self) -> dict[str, float]:
        """Fraction of the beam that each detector takes without a specimen."""
        return {name: found.vacuum for name, found in self.objects.items()}

    def render(self, specimen: Specimen, probe_nm: Array, rotation_rad: float = 0.0) -> Rendered:
        """Images of the atoms that are alive at the true probe positions ``probe_nm`` [..., 2], any layout.

        ``rotation_rad`` is a hint that makes it fast: the turn of a frame in which the positions fill an upright box.
        """
        alive = specimen.alive
        images = self.images(
            specimen.positions_A[alive, :2],
            specimen.atomic_numbers[alive],
            specimen.rms_u_A[alive],
            nm_to_angstrom(1.0) * np.asarray(probe_nm),
            rotation_rad,
        )
        for name, vacuum in self.vacuum.items():
            images[name] += np.float32(vacuum)
        return Rendered(images, self.validity(specimen.thickness_nm, specimen.zone_axis))

    def validity(self, thickness_nm: float, zone_axis: bool) -> dict[str, Validity]:
        """What may be claimed of images of a specimen this thick, by channel."""
        return {name: self._channel_validity(name, thickness_nm, zone_axis) for name in self.detectors}

    def _channel_validity(self, name: str, thickness_nm: float, zone_axis: bool) -> Validity:
        found, (inner, outer) = self.objects[name], self.detectors[name]
        alpha = self.optics.semi_angle_mrad
        calibration = self.calibrations.get(name)
        if calibration is not None:
            thin = abs(thickness_nm - calibration.thickness_nm) <= 0.1 * calibration.thickness_nm + 0.01
            thickness_note = f"calibrated at {calibration.thickness_nm:g} nm, not {thickness_nm:.1f} nm"
        else:
            thin = thickness_nm <= LINEAR_THICKNESS_NM or not zone_axis
            thickness_note = f"thicker than {LINEAR_THICKNESS_NM} nm on a zone axis"
        bright = inner < alpha
        far_out = (inner == 0.0 and outer >= alpha) if bright else inner >= MIN_INNER_OVER_SEMI_ANGLE * alpha
        angle_note = (
            "the bright disc is not taken in whole: phase contrast, needs multislice"
            if bright
            else f"inner angle below {MIN_INNER_OVER_SEMI_ANGLE} semi-angles"
        )
        reasons = [text for bad, text in ((not thin, thickness_note), (not far_out, angle_note)) if bad]
        reasons += [found.note] if found.note else []
        return Validity(thin and far_out, found.calibrated, thickness_nm, zone_axis, "; ".join(reasons), found.level)

    def images(
        self,
        positions_A: Array,
        atomic_numbers: NDArray[np.int64],
        rms_u_A: Array,
        probe_A: Array,
        rotation_rad: float = 0.0,
    ) -> Images:
        """What the atoms at ``positions_A`` [n, 2] add to the vacuum, at ``probe_A`` [..., 2] (angstrom), by channel.

        Raises BadInput for elements without data or positions that are not finite.
        """
        probe = np.asarray(probe_A, dtype=np.float64).reshape(-1, 2)
        if not math.isfinite(float(probe.sum())):
            raise BadInput("a probe position is not finite")
        check_numbers(np.asarray(atomic_numbers))
        c, s = math.cos(rotation_rad), math.sin(rotation_rad)
        turn = np.array([[c, -s], [s, c]])  # row vectors: (x, y) @ turn are coordinates along the scan's axes
        probe = probe @ turn if rotation_rad else probe
        atoms = np.asarray(positions_A, dtype=np.float64)
        if not math.isfinite(float(atoms.sum())):
            raise BadInput("an atom's position is not finite")
        atoms = atoms @ turn if rotation_rad else atoms
        # A round probe looks the same in every frame, so that one kernel serves all rotations.
        kernel_turn = 0.0 if self.optics.round else rotation_rad
        values = self._upright(atoms, np.asarray(atomic_numbers), np.asarray(rms_u_A), probe, kernel_turn)
        return {name: value.reshape(np.shape(probe_A)[:-1]) for name, value in values.items()}

    def _upright(
        self, atoms: Array, numbers: NDArray[np.int64], rms_u_A: Array, probe: Array, rotation_rad: float
    ) -> Images:
        """Values [m] by channel at ``probe`` [m, 2] that fill an upright box."""
        import torch

        if not len(probe):
            return {name: np.zeros(0, dtype=np.float32) for name in self.detectors}
        # One axis at a time: a reduction over the short axis of a long array is slow.
        low, high = (np.array([pick(probe[:, 0]), pick(probe[:, 1])]) for pick in (np.min, np.max))
        near = np.ones(len(atoms), dtype=np.bool_)
        for axis in (0, 1):
            near &= (atoms[:, axis] > low[axis] - self.margin_A) & (atoms[:, axis] < high[axis] + self.margin_A)
        if not near.any():
            return {name: np.zeros(len(probe), dtype=np.float32) for name in self.detectors}
        origin = low - self.margin_A
        extent = np.ceil((high - low) / (4.0 * self.grid_A)) * 4 + math.ceil(2.0 * self.margin_A / self.grid_A) + 4
        rows, cols = (fast_size(side, 2, (2, 3, 5)) for side in extent[::-1])
        if rows * cols > MAX_GRID_POINTS and len(probe) > 1:
            parts = [self._upright(atoms, numbers, rms_u_A, half, rotation_rad) for half in np.array_split(probe, 2)]
            return {name: np.concatenate([part[name] for part in parts]) for name in self.detectors}
        where = (atoms[near] - origin) / self.grid_A
        spectra = self._spectra(where, numbers[near], rms_u_A[near], (rows, cols), rotation_rad)
        at = torch.as_tensor((probe - origin) / self.grid_A, device=self.device)
        return {
            name: interpolate(torch.fft.irfft2(spectrum, s=(rows, cols)), at).cpu().numpy()
            for name, spectrum in spectra.items()
        }

    def _spectra(
        self, where: Array, numbers: NDArray[np.int64], rms_u_A: Array, shape: tuple[int, int], rotation_rad: float
    ) -> dict[str, torch.Tensor]:
        """Half spectra [rows, cols // 2 + 1] of the images of atoms at ``where`` (grid units), by channel."""
        import torch

        band = _Band.of(shape, self.grid_A, self.band_per_A)
        probe = self._probe_table(shape, rotation_rad)
        total = {name: torch.zeros(probe.shape, dtype=torch.complex64, device=self.device) for name in self.detectors}
        kinds = numbers + 1e-3 * np.round(rms_u_A, 6)  # element and thermal motion in one number
        for kind in np.unique(kinds):
            same = np.flatnonzero(kinds == kind)
            spread = spread_on_grid(torch.as_tensor(where[same], device=self.device), shape)
            atoms = band.cut(torch.fft.rfft2(spread))
            for name in self.detectors:
                total[name] += atoms * self._atom_table(name, int(kind), float(rms_u_A[same[0]]), shape)
        return {name: band.fill(value * probe, shape) for name, value in total.items()}

    def _make_atom_table(self, name: str, number: int, rms_u_A: float, shape: tuple[int, int]) -> torch.Tensor:
        """Transfer of one element's object function and thermal motion inside the band."""
        import torch

        found = self.objects[name]
        squared = torch.as_tensor(_Band.of(shape, self.grid_A, self.band_per_A).squared_per_A2, device=self.device)
        table = torch.zeros_like(squared)
        for amplitude, width in zip(found.amplitudes_A2[number], found.widths_A, strict=True):
            if amplitude:
                table += amplitude * torch.exp(-2.0 * math.pi**2 * (width**2 + rms_u_A**2) * squared)
        return table

    def _make_probe_table(self, shape: tuple[int, int], rotation_rad: float) -> torch.Tensor:
        """Transfer of probe and source inside the band, over that of the two bells, per grid cell area."""
        import torch
        from scipy import ndimage

        band = _Band.of(shape, self.grid_A, self.band_per_A)
        # The table's frequency step, 1 / (160 angstrom), is fine enough for linear interpolation.
        table, step = transfer(self.optics)
        middle = table.shape[0] // 2
        ky, kx = band.fy[:, None] / self.grid_A, band.fx[None, :] / self.grid_A
        c, s = math.cos(rotation_rad), math.sin(rotation_rad)
        where = np.stack([s * kx + c * ky, c * kx - s * ky]) / step + middle
        # An atom sees the probe from the other side: the image is the probe mirrored, in Fourier space conjugated.
        values = np.conj(
            ndimage.map_coordinates(table.real, where, order=1, mode="constant")
            + 1j * ndimage.map_coordinates(table.imag, where, order=1, mode="constant")
        )
        values /= (bell_transfer(band.fy)[:, None] * bell_transfer(band.fx)[None, :]) ** 2 * self.grid_A**2
        return torch.as_tensor(values.astype(np.complex64), device=self.device)


@dataclass(frozen=True)
class _Band:
    """The frequencies of a half spectrum that an image can hold: the first and last rows, the first columns."""

    fy: Array
    fx: Array
    squared_per_A2: NDArray[np.float32]
    last: int

    @staticmethod
    @lru_cache(maxsize=16)
    def of(shape: tuple[int, int], grid_A: float, band_per_A: float) -> _Band:
        rows, cols = shape
        limit = band_per_A * grid_A
        last = min(math.ceil(limit * rows), rows // 2)
        right = min(math.ceil(limit * cols), cols // 2 + 1)
        fy = np.concatenate([np.arange(last), np.arange(-last, 0)]) / rows
        fx = np.arange(right) / cols
        squared = ((fy[:, None] ** 2 + fx[None, :] ** 2) / grid_A**2).astype(np.float32)
        return _Band(fy, fx, squared, last)

    def cut(self, spectrum: torch.Tensor) -> torch.Tensor:
        """The band of a half spectrum."""
        import torch

        right = len(self.fx)
        return torch.cat([spectrum[: self.last, :right], spectrum[-self.last :, :right]])

    def fill(self, band: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """A half spectrum that is zero outside ``band``."""
        import torch

        spectrum = torch.zeros((shape[0], shape[1] // 2 + 1), dtype=band.dtype, device=band.device)
        right = len(self.fx)
        spectrum[: self.last, :right] = band[: self.last]
        spectrum[-self.last :, :right] = band[self.last :]
        return spectrum


def check_annulus(name: str, annulus: Annulus) -> Annulus:
    """The annulus, if it is one. Raises BadInput."""
    inner, outer = annulus
    if not 0.0 <= inner < outer:
        raise BadInput(
            f"detector {name}: inner angle {inner} mrad, outer angle {outer} mrad", "use 0 <= inner < outer, in mrad"
        )
    return float(inner), float(outer)


@lru_cache(maxsize=16)
def _band_limit(optics: Optics) -> float:
    """Frequency, 1/angstrom, that leaves out FORGOTTEN of the spectrum of probe and source."""
    otf, step = transfer(optics)
    middle = otf.shape[0] // 2
    k = (np.arange(otf.shape[0]) - middle) * step
    radius = np.hypot(k[:, None], k[None, :]).ravel()
    order = np.argsort(radius)
    beyond = 1.0 - np.cumsum(np.abs(otf).ravel()[order]) / np.abs(otf).sum()
    return float(radius[order][np.argmax(beyond <= FORGOTTEN)])


def bell(x: Array) -> Array:
    """exp(beta (sqrt(1 - (x/2)^2) - 1)) for |x| < 2, else 0: nearly the narrowest in space and frequency at once
    (A. H. Barnett, J. Magland and L. af Klinteberg, SIAM J. Sci. Comput. 41, C479 (2019))."""
    inside = np.maximum(1.0 - (np.asarray(x) / 2.0) ** 2, 0.0)
    return np.where(np.abs(x) < 2.0, np.exp(BELL_BETA * (np.sqrt(inside) - 1.0)), 0.0)


def bell_transfer(frequency: Array) -> Array:
    """Fourier transform of :func:`bell` at ``frequency`` (cycles per grid step), by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    return np.asarray(
        np.cos(2.0 * math.pi * np.multiply.outer(frequency, 2.0 * nodes)) @ (2.0 * weights * bell(2.0 * nodes))
    )


@lru_cache(maxsize=1)
def _bell_polynomials() -> tuple[Array, Array, Array]:
    """Power series in t, the distance from the base point: the two right taps' sum R(t), and the places of the two
    bilinear samples that stand for the four taps, from the base point. The left taps' sum is R(1 - t)."""
    t = 0.5 - 0.5 * np.cos(math.pi * (np.arange(200) + 0.5) / 200)
    taps = [bell(t - place) for place in (-1.0, 0.0, 1.0, 2.0)]
    left, right = taps[0] + taps[1], taps[2] + taps[3]
    fits = (np.polynomial.Polynomial.fit(t, values, 10).convert().coef for values in (right, taps[3] / right, left))
    sum_right, share, sum_left = (np.asarray(fit, dtype=np.float64) for fit in fits)
    return sum_right, share, sum_left


def _polynomial(coefficients: Array, t: torch.Tensor) -> torch.Tensor:
    value = t * 0.0 + float(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value.mul_(t).add_(float(coefficient))
    return value


def spread_on_grid(where: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Ones at ``where`` [n, 2] (x, y in grid units, float64), spread on a periodic grid with the bell."""
    import torch

    base = where.floor()
    t = where - base
    base = base.long()
    offset = torch.arange(-1, 3, device=where.device)
    distance = t[None] - offset[:, None, None]
    inside = (1.0 - (distance / 2.0) ** 2).clamp_(min=0.0)
    taps = torch.exp(BELL_BETA * (inside.sqrt() - 1.0)).float()  # [4, n, 2]
    row, col = (base[:, 1] + offset[:, None]) % shape[0], (base[:, 0] + offset[:, None]) % shape[1]
    index = row[:, None, :] * shape[1] + col[None, :, :]
    values = taps[:, None, :, 1] * taps[None, :, :, 0]
    grid = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=where.device)
    return grid.index_add_(0, index.reshape(-1), values.reshape(-1)).view(shape)


def interpolate(field: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """``field`` [rows, cols] at ``where`` [m, 2] (x, y in grid units, float64), summed with the bell's sixteen taps.

    Its weights are positive, so four bilinear samples at shifted places give all sixteen (after Sigg and Hadwiger, GPU
    Gems 2, chapter 20). ``where`` must keep one grid point's distance from the edges.
    """
    import torch

    at_once = PIXELS_AT_ONCE if field.device.type == "cpu" else len(where)
    scale = 2.0 / torch.tensor([field.shape[1] - 1, field.shape[0] - 1], dtype=torch.float32, device=field.device)
    sum_right, share, sum_left = _bell_polynomials()
    result = torch.empty(len(where), dtype=torch.float32, device=field.device)
    for first in range(0, len(where), at_once):
        part = where[first : first + at_once]
        base = part.floor()
        t = (part - base).float()
        shift = base.float() * scale - 1.0
        right, left = _polynomial(sum_right, t), _polynomial(sum_left, t)
        high = shift + (_polynomial(share, t) + 1.0) * scale
        low = shift - _polynomial(share, 1.0 - t) * scale
        value = torch.zeros(len(part), dtype=torch.float32, device=field.device)
        for y, weight_y in ((low[:, 1], left[:, 1]), (high[:, 1], right[:, 1])):
            for x, weight_x in ((low[:, 0], left[:, 0]), (high[:, 0], right[:, 0])):
                place = torch.stack([x, y], dim=-1)[None, None]
                sample = torch.nn.functional.grid_sample(field[None, None], place, align_corners=True)
                value.addcmul_(sample.view(-1) * weight_x, weight_y)
        result[first : first + at_once] = value
    return result
