"""How strongly, and how sharply, one atom scatters to one detector: the object functions of the linear image model.

The image of an atom is taken as probe (x) object, the object a sum of Gaussians: amplitudes a_i (angstrom^2, their sum
is the scattering cross-section to the detector) and widths s_i. Three levels share that form.

- ``power``: one Gaussian, a = s Z^n.
- ``table``: fitted to multislice images of single atoms (``tables/single_atoms.npz``), any annulus, also bright field.
- ``calibrated``: one amplitude per element and one width, fitted to multislice of one specimen and thickness.

Thermal motion, source size and aberrations are convolutions that the renderer adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.types import Model, NonNegative, Positive

from .cache import cache_folder, kept
from .elements import NUMBERS, SYMBOLS
from .optics import Optics, lorentz_factor, transfer, wavelength_A

Array = NDArray[np.float64]
Annulus = tuple[float, float]
TABLE_FILE = Path(__file__).parent / "tables" / "single_atoms.npz"
WIDTHS_A = (0.02, 0.06, 0.1, 0.15, 0.22, 0.32, 0.5, 0.8, 1.3)
"""Widths of the Gaussians that the table's images are fitted with, angstrom."""
POTENTIAL_WIDTH_A = 0.06
"""r0 of the power law: makes an atom's image at 80 kV and 30 mrad as wide (0.74 angstrom) as multislice does."""
DEFAULT_EXPONENT = 1.7
ABERRATED = (
    "the tables are of aberration-free probes: within 4 % of an atom's peak for a dark field from 2.5 semi-angles on, "
    "a tenth for rings nearer in"
)
LINEAR_THICKNESS_NM = 4.0
MIN_INNER_OVER_SEMI_ANGLE = 2.5
_REFERENCE = (80.0, 30.0, (86.0, 200.0))


class Contrast(Model):
    """How scattering is modelled. ``auto``: tables where they are shipped for the optics, else the power law;
    ``table``: at any optics (tables that are not shipped are computed by the extra ``multislice`` and kept on disk);
    ``calibrated``: fitted to multislice of the very specimen (extra ``multislice``; the fit is kept on disk)."""

    level: Literal["auto", "table", "power", "calibrated"] = Field(
        "auto", description="source of the scattering strengths"
    )
    exponent: Annotated[float, Field(ge=1.0, le=2.5)] | None = Field(
        None, description="n of Z^n for level 'power'; null: the calibrated value, else 1.7"
    )


class Calibration(Model):
    """Scattering of one specimen at one thickness, fitted to multislice: see :mod:`simulators.calibration`."""

    weights_A2: dict[str, float] = Field(description="cross-section of one atom by element, angstrom^2")
    width_A: NonNegative = Field(description="standard deviation per axis of the common Gaussian object, angstrom")
    background: float = Field(description="fraction of the beam that is detected everywhere")
    thickness_nm: NonNegative = Field(description="thickness of the specimen, nm")
    voltage_kV: Positive = Field(description="beam voltage, kV")
    semi_angle_mrad: Positive = Field(description="convergence semi-angle, mrad")
    detector_mrad: tuple[NonNegative, Positive] = Field(description="inner and outer angle of the detector, mrad")
    residual: NonNegative = Field(description="root mean square misfit over the range, phonon noise included")


@dataclass(frozen=True)
class Objects:
    """Object functions of all elements for one detector. ``amplitudes_A2`` [max Z + 1, k] and ``widths_A`` [k];
    ``vacuum`` the fraction of the beam detected without a specimen; ``calibrated``: the absolute scale comes from
    multislice at these very settings; ``note`` says otherwise why not, ``level`` which model it is."""

    amplitudes_A2: Array
    widths_A: Array
    vacuum: float
    calibrated: bool
    level: str
    note: str = ""

    def strength_A2(self, number: int) -> float:
        """Cross-section of one element to the detector (negative where it removes electrons from it)."""
        return float(self.amplitudes_A2[number].sum())


def objects(
    optics: Optics, annulus: Annulus, contrast: Contrast | None = None, calibration: Calibration | None = None
) -> Objects:
    """The object functions that ``contrast`` asks for. Raises BadInput when it asks for tables that are not shipped."""
    contrast = contrast or Contrast()
    if calibration is not None:
        return _calibrated(optics, annulus, calibration)
    if contrast.level == "calibrated":
        raise BadInput("contrast.level = 'calibrated' without a calibration", "give the renderer calibrations")
    if contrast.level == "table" and annulus[1] > _reach_mrad():
        raise BadInput(
            f"a detector out to {annulus[1]:g} mrad is beyond the tables of single atoms",
            f"use at most {_reach_mrad():g} mrad, or contrast.level = 'power'",
        )
    shipped = _table_key(optics) in table_settings() and annulus[1] <= _reach_mrad()
    if contrast.level == "table" or (contrast.level == "auto" and shipped):
        found = _from_table(optics.voltage_kV, optics.semi_angle_mrad, annulus)
        return found if optics.ideal else replace(found, calibrated=False, note=ABERRATED)
    return _power(optics, annulus, contrast.exponent)


def table_settings() -> tuple[str, ...]:
    """Beam voltages and semi-angles that tables are shipped for, e.g. '80kV_30mrad'."""
    return tuple(key for key in _tables() if key.endswith("mrad") and "kV" in key)


@cache
def _tables() -> Mapping[str, NDArray[np.generic]]:
    return _load(TABLE_FILE)


def _load(path: Path) -> Mapping[str, NDArray[np.generic]]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _made_tables(optics: Optics) -> Mapping[str, NDArray[np.generic]]:
    """Tables for other optics, computed with abTEM (a minute) once and kept by a hash of what they depend on."""
    from .single_atoms import content_key, tables_of, write_tables

    settings = ((optics.voltage_kV, optics.semi_angle_mrad),)
    path = cache_folder() / f"single_atoms_{content_key(settings)}.npz"
    return kept(path, _load, lambda: tables_of(settings), write_tables)


def _reach_mrad() -> float:
    """Largest detector angle that the tables know, mrad."""
    return float(_tables()["edges_mrad"][-1])


def _table_key(optics: Optics) -> str:
    return f"{optics.voltage_kV:g}kV_{optics.semi_angle_mrad:g}mrad"


@lru_cache(maxsize=32)
def _from_table(voltage_kV: float, semi_angle_mrad: float, annulus: Annulus) -> Objects:
    """Fit of every element's image of one atom, minus the empty image, by probe (x) Gaussians (least squares)."""
    sharp = Optics(voltage_kV=voltage_kV, semi_angle_mrad=semi_angle_mrad, source_fwhm_nm=0.0)
    tables = _tables() if _table_key(sharp) in table_settings() else _made_tables(sharp)
    within = tables[_table_key(sharp)].astype(np.float64)  # [element, radius, edge]: share of the beam inside an angle
    edges = tables["edges_mrad"].astype(np.float64)
    # What an atom changes is smooth in the angle, the bright disc is not: it is taken out before interpolation.
    changed = within - np.minimum(1.0, (edges / semi_angle_mrad) ** 2)
    inner, outer = (_inside(changed, edges, angle) for angle in annulus)
    images = outer - inner
    radii = tables["radii_A"].astype(np.float64)
    design = np.stack([radial_probe(sharp, width**2, radii) for width in WIDTHS_A], axis=1)
    weight = np.sqrt(radii + 0.05)  # rings, not radii, are what an image is made of
    amplitudes = np.zeros((max(SYMBOLS) + 1, len(WIDTHS_A)))
    ridge = 1e-7 * np.linalg.norm(design * weight[:, None]) * np.eye(len(WIDTHS_A))
    system = np.concatenate([design * weight[:, None], ridge])
    right = np.concatenate([(images * weight).T, np.zeros((len(WIDTHS_A), len(images)))])
    amplitudes[tables["numbers"].astype(int)] = np.linalg.lstsq(system, right, rcond=None)[0].T
    return Objects(amplitudes, np.array(WIDTHS_A), _empty(sharp, annulus), True, "table")


def _inside(changed: Array, edges: Array, angle_mrad: float) -> Array:
    """What an atom changes of the share of the beam inside ``angle_mrad``, interpolated between the table's edges."""
    from scipy.interpolate import PchipInterpolator

    return np.asarray(PchipInterpolator(edges, changed, axis=-1)(angle_mrad))


def radial_probe(optics: Optics, extra_variance_A2: float, radii_A: Array) -> Array:
    """Density of a round probe, widened by a Gaussian, at ``radii_A`` from its centre, 1/angstrom^2."""
    assert optics.round
    otf, step = transfer(optics, extra_variance_A2)
    middle = otf.shape[0] // 2
    line = otf.real.sum(axis=0) * step  # on the x axis, the inverse transform along ky is a sum
    frequency = (np.arange(len(line)) - middle) * step
    return np.asarray(np.cos(2.0 * math.pi * np.outer(radii_A, frequency)) @ line * step)


def _power(optics: Optics, annulus: Annulus, exponent: float | None) -> Objects:
    """s Z^n, s the geometric mean over all elements of the tables: at these optics where tables are shipped for them,
    else of 80 kV, 30 mrad, 86-200 mrad scaled as unscreened Rutherford scattering. What a detector has of the bright
    disc, it loses a part of, as all that is scattered leaves the disc.
    """
    n = DEFAULT_EXPONENT if exponent is None else exponent
    numbers = _tables()["numbers"].astype(int)
    if _table_key(optics) in table_settings() and annulus[1] <= _reach_mrad():
        strengths = _from_table(optics.voltage_kV, optics.semi_angle_mrad, annulus).amplitudes_A2[numbers].sum(axis=1)
        scale, note = 1.0, "Z^n: elements deviate from it by tens of per cent"
    else:
        strengths = _from_table(*_REFERENCE).amplitudes_A2[numbers].sum(axis=1)
        alpha = optics.semi_angle_mrad
        gained = _rutherford(optics.voltage_kV, max(annulus[0], alpha), annulus[1])
        lost = _empty(optics, annulus) * _rutherford(optics.voltage_kV, alpha, math.inf)
        scale = (gained - lost) / _rutherford(_REFERENCE[0], *_REFERENCE[2])
        note = "absolute scale not calibrated for these optics: qualitative"
    sign = math.copysign(1.0, float(strengths.sum()))
    scale *= sign * math.exp(float(np.mean(np.log(np.abs(strengths)) - n * np.log(numbers))))
    amplitudes = scale * np.arange(max(SYMBOLS) + 1, dtype=np.float64)[:, None] ** n
    return Objects(amplitudes, np.array([POTENTIAL_WIDTH_A]), _empty(optics, annulus), False, "power", note)


def _empty(optics: Optics, annulus: Annulus) -> float:
    """Fraction of the beam in ``annulus`` without a specimen: the part of the bright disc that it covers."""
    inner, outer = (min(1.0, (angle / optics.semi_angle_mrad) ** 2) for angle in annulus)
    return outer - inner


def _calibrated(optics: Optics, annulus: Annulus, calibration: Calibration) -> Objects:
    made_for = (calibration.voltage_kV, calibration.semi_angle_mrad, tuple(calibration.detector_mrad))
    asked_for = (optics.voltage_kV, optics.semi_angle_mrad, tuple(annulus))
    if made_for != asked_for:
        raise BadInput(
            f"the calibration is for {made_for} (kV, mrad, detector mrad), not {asked_for}",
            "calibrate with the optics and the detector that are used",
        )
    single = objects(optics, annulus)  # for elements that the fitted place did not hold
    amplitudes = single.amplitudes_A2.sum(axis=1, keepdims=True)
    for symbol, weight in calibration.weights_A2.items():
        amplitudes[NUMBERS[symbol]] = weight
    return Objects(amplitudes, np.array([calibration.width_A]), calibration.background, True, "calibrated")


def _rutherford(voltage_kV: float, inner_mrad: float, outer_mrad: float) -> float:
    """Unscreened Rutherford scattering into a ring, gamma^2 lambda^4 (1/inner^2 - 1/outer^2), in arbitrary units."""
    if outer_mrad <= inner_mrad:
        return 0.0
    solid = inner_mrad**-2 - outer_mrad**-2
    return lorentz_factor(voltage_kV) ** 2 * wavelength_A(voltage_kV) ** 4 * solid
