"""Random patches of crystals with known atom positions, to train and test atom finding: every specimen class, through
probes with aberrations, at any dose.

A patch is drawn in Fourier space: the sum of its columns' phase factors (exact at any position; each column with its
own width) times the probe's transfer. That costs two small matrix products, so that a new scene is drawn for every
training patch. Ranges are choices, wide on purpose.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.types import Model, PositiveInt
from aecontrol.units import angstrom_to_nm

from .column_sets import FIELD_NM, Columns, of_material
from .optics import Optics, transfer
from .scenes import GATE_NM, MARGIN_NM, Scene, blobs, cut_edge, detect, log_uniform, ramp, texture
from .streams import stream

Floats = NDArray[np.float64]
Material = Literal[
    "mos2",
    "ws2",
    "graphene",
    "hbn",
    "srtio3",
    "catio3",
    "ferroelectric",
    "pillars",
    "llzo",
    "nanoparticle",
    "random",
]
TRAINING: tuple[Material, ...] = (
    "mos2",
    "mos2",
    "graphene",
    "graphene",
    "srtio3",
    "ferroelectric",
    "pillars",
    "llzo",
    "nanoparticle",
    "random",
    "random",
    "random",
)
HELD_OUT: tuple[Material, ...] = ("mos2", "graphene", "srtio3", "ws2", "hbn", "catio3")
"""Materials of the model card; the last three are not trained on."""
EVIDENT, HIDDEN = 3.0, 1.5
"""Significance from which on a column must be found, and below which it must not (between them both are right)."""
LEAST_RATIO = 0.1
"""A column dimmer than this part of the brightest within ``RATIO_NM`` need not be found (oxygen beside strontium)."""
RATIO_NM = 0.35
PROBES, SPECIMENS, INVENTED = 48, 8, 500
"""Different probes, specimens of each material, and invented crystals."""


class CrystalScenes(Model):
    """Crystals seen end on: monolayers, perovskites, garnet, particles, invented ones; with vacancies and strain."""

    kind: Literal["crystals"] = "crystals"
    gate_nm: ClassVar[float] = GATE_NM
    materials: tuple[Material, ...] = Field(TRAINING, min_length=1, description="drawn with equal chance each")
    size_px: PositiveInt = Field(96, description="rows and columns of a scene (fewer when its pixels are coarse)")
    pixel_nm: tuple[float, float] = Field((0.02, 0.042), description="smallest and largest pixel, nm")
    coarse_fraction: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="part with pixels up to 0.1 nm")
    counts: tuple[float, float] = Field(
        (5.0, 1e4), description="range of the median column's expected counts; low ones, which teach most, are commoner"
    )
    strain: Annotated[float, Field(ge=0, le=0.2)] = Field(0.08, description="largest change of scale")
    clean: bool = Field(False, description="without contamination, edges, scan jitter and read noise")

    def render(self, seed: int, index: int) -> Scene:
        """Scene ``index`` of stream ``seed``; the same numbers give the same scene in any process. Cannot fail."""
        rng = stream(seed, "crystal scene", index)
        pixel = log_uniform(rng, *self.pixel_nm)
        side = self.size_px * pixel
        if rng.random() < self.coarse_fraction:
            pixel = log_uniform(rng, self.pixel_nm[1], 0.1)
        n = round(side / pixel)
        material = self.materials[rng.integers(len(self.materials))]
        variant = int(rng.integers(INVENTED if material == "random" else SPECIMENS))
        columns = _window(_specimen(material, variant), n * pixel, self.strain, rng)
        if not self.clean:
            columns = _edge(columns, n * pixel, rng)
        return self._scene(rng, columns, n, pixel, _dose(rng, *self.counts))

    def held_out(self) -> dict[str, CrystalScenes]:
        """Named conditions for a model card: crystals, three of them never trained on, by the median's counts."""
        fixed: dict[str, object] = {"size_px": 128, "pixel_nm": (0.03, 0.03), "coarse_fraction": 0.0}
        return {
            f"{material}, {counts} counts": self.model_copy(
                update={**fixed, "materials": (material,), "counts": (counts, counts)}
            )
            for material in HELD_OUT
            for counts in (15, 60, 1000)
        }

    def _scene(self, rng: np.random.Generator, columns: Columns, n: int, pixel: float, counts: float) -> Scene:
        otf, step = _probe(int(rng.integers(PROBES)))
        jitter = 0.0 if self.clean or rng.random() < 0.3 else rng.uniform(0, 0.015) / pixel
        image, peak = paint(columns, counts, otf, step, n, pixel, rng.normal(0, jitter, (2, n)))
        level = counts * peak
        background = np.full((n, n), level * rng.uniform(0.0, 0.08))
        if not self.clean:
            background += level * log_uniform(rng, 0.01, 0.6) * ramp(rng, n)
            if rng.random() < 0.3:  # contamination: light atoms in blobs
                mottle = 1 + rng.uniform(0, 0.3) * texture(rng, n, 0.05 / pixel, white=1.0)
                background += level * log_uniform(rng, 0.05, 1.0) * blobs(rng, n, 0.5 / pixel) * np.maximum(mottle, 0)
        expected = image + background
        wanted, hidden = _visible(columns, counts * columns.weight, expected, peak, pixel)
        seen = columns[~hidden]
        return Scene(
            detect(rng, expected, self.clean),
            (pixel, pixel),
            seen.xy / pixel,
            counts * seen.weight,
            wanted[~hidden],
        )


def _dose(rng: np.random.Generator, low: float, high: float) -> float:
    return float(low * (high / low) ** (rng.random() ** 2))


@lru_cache(maxsize=1024)
def _specimen(material: str, variant: int) -> Columns:
    return of_material(material, variant)


@lru_cache(maxsize=PROBES)
def _probe(variant: int) -> tuple[NDArray[np.complex64], float]:
    return sampled(lens(variant))


def sampled(optics: Optics) -> tuple[NDArray[np.complex64], float]:
    """Transfer of a probe and its step in 1/nm."""
    otf, step = transfer(optics, folds=2)
    return otf.astype(np.complex64), step / angstrom_to_nm(1.0)


def lens(variant: int) -> Optics:
    """Voltage, angle, defocus, astigmatism, coma, source size of ``variant``; drawn anew until 0.2 nm is resolved."""
    rng = stream(variant, "probe of a scene")
    while True:
        voltage = float(rng.choice([60.0, 80.0, 100.0, 200.0, 300.0]))
        optics = Optics(
            voltage_kV=voltage,
            semi_angle_mrad=float(rng.uniform(24, 36) if voltage <= 100 else rng.uniform(17, 28)),
            c1_nm=float(rng.normal(0, 2.0)),
            a1_nm=float(abs(rng.normal(0, 1.2))),
            a1_deg=float(rng.uniform(0, 180)),
            b2_nm=float(abs(rng.normal(0, 25.0))),
            b2_deg=float(rng.uniform(0, 360)),
            a2_nm=float(abs(rng.normal(0, 25.0))),
            a2_deg=float(rng.uniform(0, 120)),
            source_fwhm_nm=float(rng.uniform(0.05, 0.13)),
        )
        otf, step = transfer(optics, folds=2)
        if otf.real.sum() * step**2 > 1 / (2 * math.pi * 0.8**2):  # peak of a Gaussian of 0.8 angstrom
            return optics


def _window(columns: Columns, side: float, strain: float, rng: np.random.Generator) -> Columns:
    """Columns about a random place, turned and strained, those near a frame of ``side`` nm kept."""
    room = max(FIELD_NM / 2 - side / 2 - MARGIN_NM, 0.0)
    centre = FIELD_NM / 2 + rng.uniform(-room, room, 2)
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    bend = np.eye(2) * (1 + rng.uniform(-strain, strain)) + rng.uniform(-strain / 3, strain / 3, (2, 2))
    xy = (columns.xy - centre) @ (bend @ turn).T + side / 2
    near = ((xy > -MARGIN_NM) & (xy < side + MARGIN_NM)).all(1)
    placed = replace(columns, xy=xy)[near]
    disorder = rng.choice([0.0, rng.uniform(0, 0.012)])
    return replace(placed, xy=placed.xy + rng.normal(0, disorder, placed.xy.shape))


def _edge(columns: Columns, side: float, rng: np.random.Generator) -> Columns:
    keep = cut_edge(rng, columns.xy, side)
    return columns if keep is None else columns[keep]


def paint(
    columns: Columns,
    counts: float,
    otf: NDArray[np.complex64],
    step: float,
    n: int,
    pixel: float,
    jitter: Floats,
) -> tuple[Floats, float]:
    """Expected counts [n, n], and the peak of a column of one count. ``jitter`` [2, n]: displacement of the lines along
    x and y, px, to first order."""
    pad = math.ceil(MARGIN_NM / pixel)
    size = n + 2 * pad + n % 2
    fx, fy = (np.asarray(f, dtype=np.float64) for f in (np.fft.rfftfreq(size), np.fft.fftfreq(size)))
    at = columns.xy / pixel - 0.5 + pad
    width = columns.spread / pixel

    def phases(frequency: Floats, axis: int) -> NDArray[np.complex64]:
        turn = np.asarray(-2 * np.pi * np.outer(frequency, at[:, axis]), dtype=np.float32)
        damp = np.exp(np.asarray(-2 * np.pi**2 * np.outer(frequency**2, width[:, axis] ** 2), dtype=np.float32))
        factors = np.empty(turn.shape, dtype=np.complex64)
        factors.real, factors.imag = damp * np.cos(turn), damp * np.sin(turn)
        return factors

    probe = _transfer_at(otf, step, fy / pixel, fx / pixel)
    spectrum = np.dot(phases(fy, 1) * (counts * columns.weight).astype(np.float32), phases(fx, 0).T) * probe
    image = np.fft.irfft2(spectrum, (size, size))
    if jitter.any():  # lines displaced by the scan: first order along x and y
        along = [np.fft.irfft2(spectrum * 2j * np.pi * f, (size, size)) for f in (fx[None, :], fy[:, None])]
        image[pad : pad + n] += (
            jitter[0][:, None] * along[0][pad : pad + n] + jitter[1][:, None] * along[1][pad : pad + n]
        )
    peak = float(2 * probe.real.sum() - probe[:, [0, -1]].real.sum()) / size**2
    return np.maximum(image[pad : pad + n, pad : pad + n], 0.0).astype(np.float64), peak


def _transfer_at(otf: NDArray[np.complex64], step: float, fy: Floats, fx: Floats) -> NDArray[np.complex64]:
    """The transfer at frequencies (1/nm), conjugated: an atom sees the probe from the other side."""
    from scipy.ndimage import map_coordinates

    middle = otf.shape[0] // 2
    where = np.stack(np.meshgrid(fy / step + middle, fx / step + middle, indexing="ij"))
    parts = [map_coordinates(part, where, order=1, mode="constant") for part in (otf.real, otf.imag)]
    return np.asarray(parts[0] - 1j * parts[1], dtype=np.complex64)


def _visible(
    columns: Columns, counts: Floats, expected: Floats, peak: float, pixel: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which columns must be found, and which must not.

    By the median significance of N counts on B (G. Cowan et al., Eur. Phys. J. C 71, 1554 (2011), eq. 97),
    Z^2 = 2 ((N + B) ln(1 + N / B) - N), with B what else falls on the 4 pi sigma^2 = 2 / peak pixels that matter to a
    matched filter.
    """
    from scipy.spatial import cKDTree

    n = expected.shape[0]
    at = np.clip(np.floor(columns.xy / pixel).astype(int), 0, n - 1)
    other = np.maximum(expected[at[:, 1], at[:, 0]] - counts * peak, 0.0) * 2 / peak + 0.1
    significance = np.sqrt(2 * np.maximum((counts + other) * np.log1p(counts / other) - counts, 0.0))
    inside = ((columns.xy > 0) & (columns.xy < n * pixel)).all(1)
    significance = np.where(inside, significance, 2 * EVIDENT)  # its heat reaches into the frame
    brightest = np.zeros(len(counts))
    if len(counts):
        pairs = cKDTree(columns.xy).query_pairs(RATIO_NM, output_type="ndarray")
        np.maximum.at(brightest, pairs[:, 0], counts[pairs[:, 1]])
        np.maximum.at(brightest, pairs[:, 1], counts[pairs[:, 0]])
    wanted = columns.listed & (significance >= EVIDENT) & (counts > LEAST_RATIO * brightest)
    return wanted, ~columns.listed | (significance < HIDDEN)
