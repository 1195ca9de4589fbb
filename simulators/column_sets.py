"""Specimens as the atom finder sees them: projected columns, each with its brightness and its width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from aecontrol.registry import build_part
from aecontrol.units import angstrom_to_nm

from .column import SpecimenConfig
from .specimens import Specimen
from .specimens.base import SINGLE_LAYER_NM
from .specimens.particles import OFF_AXIS
from .streams import stream

Floats = NDArray[np.float64]
FIELD_NM = 9.0
"""Side of the specimens that patches are cut from."""
MERGE_NM = 0.07
"""Of two columns closer than this only the brighter is one to be found."""


DIM = 0.15
"""Columns below this part of the brightest (oxygen beside lead) do not set the scale of brightness."""


@dataclass(frozen=True)
class Columns:
    """n projected columns: ``xy`` [n, 2] nm, ``weight`` [n] (brightness, see ``_unresolved``),
    ``spread`` [n, 2] standard deviation along x and y, nm (thermal motion, and the scatter of the atoms along the
    column), ``listed`` [n]: is a column of its own, and not texture."""

    xy: Floats
    weight: Floats
    spread: Floats
    listed: NDArray[np.bool_]

    def __getitem__(self, keep: NDArray[np.bool_]) -> Columns:
        return Columns(self.xy[keep], self.weight[keep], self.spread[keep], self.listed[keep])


def of_material(material: str, seed: int) -> Columns:
    """Columns of a specimen of ``material`` with defects, thickness and brightness ratios of ``seed``."""
    rng = stream(seed, f"columns of {material}")
    if material == "random":
        return _random_crystal(rng)
    table = {"kind": material, "size_nm": [FIELD_NM, FIELD_NM], **_settings(material, rng)}
    specimen = cast(SpecimenConfig, build_part("specimen", table, "specimen")).build(int(rng.integers(2**31)))
    return _unresolved(_project(specimen, rng), rng)


def _settings(material: str, rng: np.random.Generator) -> dict[str, Any]:
    """Keys of the specimen's table: as many defects as a net should know, a few nm of thickness (for speed)."""
    turn = float(rng.uniform(0, 360))
    angles = [float(a) for a in rng.uniform(0, 12, 3)]
    thick = {"thickness_nm": float(rng.uniform(1.0, 4.0)), "rotation_deg": turn}
    sulphur = {"background_fraction": float(rng.uniform(0, 0.2)), "n_clusters": int(rng.integers(0, 3))}
    by_material: dict[str, dict[str, Any]] = {
        "mos2": {"vacancies": sulphur, "rotation_deg": turn},
        "ws2": {"vacancies": sulphur, "rotation_deg": turn},
        "graphene": {
            "monovacancy_fraction": float(rng.uniform(0, 0.03)),
            "divacancy_fraction": float(rng.uniform(0, 0.01)),
            "stone_wales_fraction": float(rng.uniform(0, 0.005)),
            "rotation_deg": turn,
        },
        "hbn": {"boron_vacancy_fraction": float(rng.uniform(0, 0.05)), "rotation_deg": turn},
        "srtio3": {**thick, "tilt_deg": angles, "strontium_vacancy_fraction": float(rng.uniform(0, 0.1))},
        "catio3": {**thick, "zone": str(rng.choice(["001", "110"]))},
        "ferroelectric": {
            "crystal": str(rng.choice(["PbTiO3", "BiFeO3"])),
            "pattern": str(rng.choice(["stripes_180", "vortex"])),
            "thickness_nm": thick["thickness_nm"],
            "rotation_deg": turn,
            "domain_width_nm": 5.0,
        },
        "pillars": {**thick, "n_pillars": 2, "diameter_nm": [2.0, 4.0]},
        "llzo": thick,
        "nanoparticle": {"n_particles": 2, "diameter_nm": [2.0, 4.5], "zone_axis_fraction": 0.8, "film_nm": 1.0},
    }
    return by_material.get(material, {})


def _project(specimen: Specimen, rng: np.random.Generator) -> Columns:
    """Brightness Z^gamma summed over a column's atoms, gamma 1.5 to 1.9; channelling in thick crystals weighs the
    sublattices otherwise than Z alone, hence a random factor for each."""
    alive = specimen.alive
    _, column = np.unique(specimen.column_id[alive], return_inverse=True)
    site, xy = specimen.site[alive], specimen.positions_A[alive, :2] * angstrom_to_nm(1.0)
    rms = specimen.rms_u_A[alive] * angstrom_to_nm(1.0)
    bright = specimen.atomic_numbers[alive].astype(float) ** rng.uniform(1.5, 1.9)
    channelling = 0.0 if specimen.thickness_nm <= SINGLE_LAYER_NM else 0.25
    for name in np.unique(site):
        bright[site == name] *= np.exp(rng.normal(0, channelling))
    weight = np.bincount(column, bright).astype(np.float64)
    mean = np.stack([np.bincount(column, bright * xy[:, k]) / weight for k in (0, 1)], 1)
    square = np.stack([np.bincount(column, bright * ((xy[:, k] - mean[column, k]) ** 2 + rms**2)) for k in (0, 1)], 1)
    # carbon films and crystals off their zone axis shine, but have no columns to be found one by one
    film = (specimen.atomic_numbers[alive] == 6) & (specimen.thickness_nm > SINGLE_LAYER_NM)
    texture = np.bincount(column, film | (site == OFF_AXIS)) > 0
    return Columns(mean, weight, np.sqrt(square / weight[:, None]), ~texture)


def _unresolved(columns: Columns, rng: np.random.Generator) -> Columns:
    """Brightness in units of the median listed column that is not dim; of columns that no probe separates the brightest
    is listed."""
    from scipy.spatial import cKDTree

    listed = columns.listed.copy()
    if not listed.any():
        return replace(columns, weight=columns.weight / max(float(columns.weight.max(initial=0.0)), 1e-9))
    for first, second in cKDTree(columns.xy).query_pairs(MERGE_NM):
        if listed[first] and listed[second]:
            listed[first if columns.weight[first] < columns.weight[second] else second] = False
    bright = columns.weight[listed & (columns.weight > DIM * columns.weight[listed].max())]
    return replace(columns, listed=listed, weight=columns.weight / np.median(bright))


def _random_crystal(rng: np.random.Generator) -> Columns:
    """An invented crystal: any cell with one to four columns, vacancies, partly vacant columns, a little disorder. So
    that the net learns what a column is, and not which crystals there are."""
    a, b, gamma = rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.6), np.radians(rng.uniform(60, 120))
    cell = np.array([[a, 0.0], [b * np.cos(gamma), b * np.sin(gamma)]])
    basis = np.zeros((1, 2))
    for _ in range(int(rng.integers(0, 12))):  # as many as fit, up to four
        new = rng.random(2)
        apart = (new - basis + 0.5) % 1 - 0.5
        if len(basis) < 4 and np.hypot(*(apart @ cell).T).min() > 0.13:
            basis = np.vstack([basis, new])
    reach = int(np.ceil(FIELD_NM / min(a, b) / np.sin(gamma)))
    i, j = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    xy = ((np.stack([i, j], 1)[:, None] + basis) @ cell).reshape(-1, 2) + FIELD_NM / 2
    kind = np.tile(np.arange(len(basis)), len(i))
    inside = ((xy > -1) & (xy < FIELD_NM + 1)).all(1)
    xy, kind = xy[inside], kind[inside]
    bright = np.exp(rng.uniform(np.log(0.15), 0, len(basis)))[kind]
    partly = rng.random(len(xy)) < rng.uniform(0, 0.1)
    bright[partly] *= rng.uniform(0.4, 0.7)
    there = rng.random(len(xy)) > rng.uniform(0, 0.08)
    xy = xy + rng.normal(0, rng.uniform(0, 0.012), xy.shape)
    spread = np.full_like(xy, rng.uniform(0.004, 0.012))
    return _unresolved(Columns(xy, bright, spread, np.ones(len(xy), bool))[there], rng)
