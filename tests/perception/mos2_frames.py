"""Simulated MoS2 frames with their truth, for the perception tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aecontrol.types import ScanRegion
from simulators.detector import Detector
from simulators.optics import Optics
from simulators.render import Renderer
from simulators.scan import ScanModel
from simulators.specimens import Specimen
from simulators.specimens.sheets import Mos2, SulphurVacancies

RENDERER = Renderer(Optics())
FULL_DOSE = 3e4
"""e/A^2 at which a full S2 column of these optics integrates to about 125 counts."""

CLUSTER = SulphurVacancies(background_fraction=0.002, n_clusters=1, cluster_sigma_nm=2.0, peak_fraction=0.25)
HEAVY = SulphurVacancies(background_fraction=0.25, n_clusters=0)


@dataclass(frozen=True)
class Shot:
    image: NDArray[np.float64]
    region: ScanRegion
    specimen: Specimen
    electrons_per_pixel: float


def scan_region(
    fov_nm: float = 8.0, pixels: int = 256, center_nm: float = 6.0, rotation_rad: float = 0.0
) -> ScanRegion:
    return ScanRegion(
        center_nm=(center_nm, center_nm),
        fov_nm=(fov_nm, fov_nm),
        shape=(pixels, pixels),
        dwell_time_s=1e-5,
        rotation_rad=rotation_rad,
    )


def specimen(seed: int, vacancies: SulphurVacancies, size_nm: float = 12.0, rotation_deg: float = 7.0) -> Specimen:
    return Mos2(size_nm=(size_nm, size_nm), rotation_deg=rotation_deg, vacancies=vacancies).build(seed)


def shoot(sample: Specimen, region: ScanRegion, fluence: float, seed: int, jitter_nm: float = 0.005) -> Shot:
    positions = ScanModel(line_jitter_nm=jitter_nm).positions_nm(region, 0.0, seed, 1)
    fraction = RENDERER.render(sample, positions, region.rotation_rad).channels["HAADF"]
    electrons = fluence * 100 * region.area_nm2 / region.pixels
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    image, _ = Detector().read(fraction, electrons, random)
    return Shot(image.astype(float), region, sample, electrons)


def in_frame(xy_nm: NDArray[np.float64], region: ScanRegion) -> NDArray[np.float64]:
    """Specimen positions [n, 2] as positions from the frame's corner, by complex numbers (shares no code)."""
    z = (xy_nm[:, 0] + 1j * xy_nm[:, 1]) - complex(*region.center_nm)
    z = z * np.exp(-1j * region.rotation_rad) + complex(*region.fov_nm) / 2
    return np.column_stack([z.real, z.imag])


def columns_in_frame(shot: Shot, site: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """True positions of the columns of a sublattice from the frame's corner, and the atoms left in each."""
    mine = shot.specimen.site == site
    _, first, inverse = np.unique(shot.specimen.column_id[mine], return_index=True, return_inverse=True)
    left = np.bincount(inverse, weights=shot.specimen.alive[mine]).astype(np.int64)
    return in_frame(shot.specimen.positions_A[mine][first, :2] / 10, shot.region), left


def seen_atoms(shot: Shot, seed: int, blur_nm: float = 0.006) -> NDArray[np.float64]:
    """What a good atom finder would report: occupied columns in the frame, each a little off."""
    positions = []
    for site in ("Mo", "S"):
        xy, left = columns_in_frame(shot, site)
        positions.append(xy[left > 0])
    xy = np.concatenate(positions)
    xy = xy[((xy > 0.03) & (xy < np.array(shot.region.fov_nm) - 0.03)).all(1)]
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    return xy + random.normal(0, blur_nm, xy.shape)
