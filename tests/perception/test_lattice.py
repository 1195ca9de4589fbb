"""Lattices against the simulator's own positions, and against lattices built here."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from aecontrol.perception.lattice import LatticeHint, find_lattice, follow_phases, seed_lattice

from .mos2_frames import CLUSTER, FULL_DOSE, columns_in_frame, scan_region, seen_atoms, shoot, specimen


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.floats(-180, 180), st.sampled_from([192, 256]))
def test_angle_and_sites_are_the_simulators(rotation_deg: float, pixels: int) -> None:
    shot = shoot(specimen(1, CLUSTER, rotation_deg=rotation_deg), scan_region(pixels=pixels), FULL_DOSE / 2, 1)
    lattice = find_lattice(shot.image, shot.region.pixel_size_nm, LatticeHint(), seen_atoms(shot, 1))
    assert lattice is not None
    sites = lattice.sites(shot.region.fov_nm)
    for site, monitored in (("Mo", False), ("S", True)):
        true, _ = columns_in_frame(shot, site)
        distance, _ = cKDTree(true).query(sites.xy_nm[sites.monitored == monitored])
        assert math.sqrt((distance**2).mean()) < 0.005
        assert distance.max() < 0.02
    # From the specimen's definition: nearest neighbours within a sublattice lie along the rotation, modulo 60 degrees.
    off = math.degrees(lattice.angle_rad) - rotation_deg
    assert abs((off + 30) % 60 - 30) < 0.05
    assert lattice.matched > 0.98


def test_the_angle_names_one_orientation_of_the_motif() -> None:
    # Turned by 60 degrees the lattice is the same but Mo and S change sides, and the angle must say so.
    angles = []
    for rotation in (3.0, 63.0):
        shot = shoot(specimen(2, CLUSTER, rotation_deg=rotation), scan_region(), FULL_DOSE, 2)
        lattice = seed_lattice(shot.image, shot.region.pixel_size_nm, LatticeHint())
        assert lattice is not None
        angles.append(math.degrees(lattice.angle_rad))
    assert abs((angles[1] - angles[0] - 60 + 60) % 120 - 60) < 0.3


@pytest.mark.parametrize(("strain", "bend_nm"), [(0.0, 0.0), (0.04, 0.0), (0.02, 0.06)])
def test_strain_and_bending_do_not_break_site_prediction(strain: float, bend_nm: float) -> None:
    random = np.random.default_rng(3)
    a = 0.316
    vectors = np.array([[a, 0], [-a / 2, a * math.sqrt(3) / 2]]) @ np.array([[1 + strain, 0.01], [0, 1 - strain / 2]])
    n, m = np.meshgrid(np.arange(-45, 46), np.arange(-45, 46))
    cells = np.column_stack([n.ravel(), m.ravel()]) @ vectors + 4.0
    both = [cells, cells + (vectors[0] + 2 * vectors[1]) / 3]

    def bent(xy: np.ndarray) -> np.ndarray:
        return xy + bend_nm * np.column_stack([np.sin(xy[:, 1] * 0.8), np.cos(xy[:, 0] * 0.8)])

    true = [bent(xy) for xy in both]
    true = [xy[((xy > 0) & (xy < 8)).all(1)] for xy in true]
    x = (np.arange(256) + 0.5) / 32
    image = sum(
        weight * np.exp(-0.5 * ((x - xy[:, 1:]) / 0.045) ** 2).T @ np.exp(-0.5 * ((x - xy[:, :1]) / 0.045) ** 2)
        for xy, weight in zip(true, (15.0, 6.0), strict=True)
    )
    noisy = random.poisson(image).astype(float)
    atoms = np.concatenate(true) + random.normal(0, 0.006, (len(true[0]) + len(true[1]), 2))
    lattice = find_lattice(noisy, (1 / 32, 1 / 32), LatticeHint(), atoms)
    assert lattice is not None
    sites = lattice.sites((8.0, 8.0), -0.2)
    for xy, monitored in zip(true, (False, True), strict=True):
        distance, _ = cKDTree(xy).query(sites.xy_nm[sites.monitored == monitored])
        assert distance.max() < 0.03


def test_coarse_overviews_follow_a_bent_lattice_by_its_phases() -> None:
    shot = shoot(specimen(1, CLUSTER, size_nm=30), scan_region(30.0, 320, 15.0), 3e3, 1)
    seed = seed_lattice(shot.image, shot.region.pixel_size_nm, LatticeHint())
    assert seed is not None
    # Stretched about the middle of the field: 0.06 nm off at its edges, as a bent scan would be.
    origin = 15.0 + (seed.origin_nm - 15.0) * 1.004
    stretched = replace(seed, vectors_nm=seed.vectors_nm * 1.004, origin_nm=origin)
    sites = follow_phases(stretched, shot.image, shot.region.pixel_size_nm, 5.0).sites((30.0, 30.0), -1.0)
    true, _ = columns_in_frame(shot, "S")
    distance, _ = cKDTree(true).query(sites.xy_nm[sites.monitored])
    assert np.sqrt((distance**2).mean()) < 0.012


def test_an_oblique_lattice_is_found_from_its_hint() -> None:
    hint = LatticeHint(a_nm=0.40, b_nm=0.32, gamma_deg=100.0, offset=(0.5, 0.4))
    turn = np.array([[math.cos(0.7), math.sin(0.7)], [-math.sin(0.7), math.cos(0.7)]])
    gamma = math.radians(100)
    vectors = np.array([[0.41, 0], [0.32 * math.cos(gamma), 0.32 * math.sin(gamma)]]) @ turn
    n, m = np.meshgrid(np.arange(-60, 61), np.arange(-60, 61))
    bright = np.column_stack([n.ravel(), m.ravel()]) @ vectors + [3.0, 2.9]
    dim = bright + np.array([0.5, 0.4]) @ vectors
    x, y = (np.arange(240) + 0.5) / 30, (np.arange(200) + 0.5) / 30
    image = sum(
        weight * np.exp(-0.5 * ((y - xy[:, 1:]) / 0.045) ** 2).T @ np.exp(-0.5 * ((x - xy[:, :1]) / 0.045) ** 2)
        for xy, weight in ((bright, 12.0), (dim, 5.0))
    )
    lattice = seed_lattice(np.random.default_rng(5).poisson(image).astype(float), (1 / 30, 1 / 30), hint)
    assert lattice is not None
    sites = lattice.sites((8.0, 200 / 30), -0.2)
    for xy, monitored in ((bright, False), (dim, True)):
        distance, _ = cKDTree(xy).query(sites.xy_nm[sites.monitored == monitored])
        assert distance.max() < 0.03


@pytest.mark.parametrize("seed", range(12))
def test_noise_has_no_lattice(seed: int) -> None:
    random = np.random.default_rng(seed)
    for image in (random.poisson(5.0, (256, 256)), random.poisson(0.05, (200, 256)), random.normal(size=(192, 192))):
        assert seed_lattice(image.astype(float), (0.031, 0.031), LatticeHint()) is None


def test_too_coarse_or_too_small_frames_have_no_lattice() -> None:
    shot = shoot(specimen(1, CLUSTER), scan_region(pixels=48), FULL_DOSE, 1)
    assert seed_lattice(shot.image, shot.region.pixel_size_nm, LatticeHint()) is None
    shot = shoot(specimen(1, CLUSTER), scan_region(fov_nm=1.0, pixels=32), FULL_DOSE, 1)
    assert seed_lattice(shot.image, shot.region.pixel_size_nm, LatticeHint()) is None
