"""Patches and embeddings: geometry against closed forms, learning against the simulator's own vacancies."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from aecontrol.errors import BadInput
from aecontrol.perception.embedding import (
    SMOOTH_NM,
    EmbeddingConfig,
    PcaEmbedding,
    VaeEmbedding,
    cut_patches,
    load,
)
from aecontrol.perception.lattice import LatticeHint
from aecontrol.perception.targets import read_crystal

from .mos2_frames import CLUSTER, FULL_DOSE, columns_in_frame, scan_region, seen_atoms, shoot, specimen

Patches = NDArray[np.float32]


def blobs(centres: NDArray[np.float64], sigma: float, pixels: int, size_nm: float) -> NDArray[np.float64]:
    x = (np.arange(pixels) + 0.5) * size_nm
    return sum(  # type: ignore[return-value]
        np.exp(-0.5 * ((x[None, :] - cx) ** 2 + (x[:, None] - cy) ** 2) / sigma**2) for cx, cy in centres
    )


def test_patches_turn_with_the_lattice_and_scale_to_the_levels() -> None:
    angle, size_nm, sigma = 0.4, 0.02, 0.045
    centre = np.array([1.313, 1.107])
    arm = 0.1 * np.array([math.cos(angle), math.sin(angle)])
    image = 7.0 + 50.0 * blobs(np.array([centre + arm]), sigma, 128, size_nm)
    broad = math.hypot(sigma, SMOOTH_NM)
    height = 50.0 * (sigma / broad) ** 2
    (patch,) = cut_patches(image, (size_nm, size_nm), centre[None], angle, 0.4, 32, (7.0, 7.0 + height))
    row, column = np.unravel_index(int(np.argmax(patch)), patch.shape)
    offset = ((np.array([column, row]) + 0.5) / 32 - 0.5) * 0.4
    assert offset == pytest.approx([0.1, 0.0], abs=0.0125)  # along the patch's own x axis
    expected = math.exp(-0.5 * ((offset[0] - 0.1) ** 2 + offset[1] ** 2) / broad**2)
    assert patch.max() == pytest.approx(expected, rel=0.03)
    assert (patch[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()


@pytest.fixture(scope="module")
def learning() -> tuple[Patches, NDArray[np.bool_]]:
    """Patches around S columns of six frames and which of them are short of an S."""
    patches, vacant = [], []
    for seed in range(6):
        shot = shoot(specimen(seed, CLUSTER, rotation_deg=31.0 * seed), scan_region(), FULL_DOSE, seed)
        pixel = shot.region.pixel_size_nm
        reading = read_crystal(shot.image, pixel, seen_atoms(shot, seed), LatticeHint(), 0.2)
        assert not isinstance(reading, str)
        where = reading.table[reading.judged, :2]
        levels = (reading.background, reading.peak)
        patches.append(cut_patches(shot.image, pixel, where, reading.lattice.angle_rad, 0.4, 16, levels))
        xy, left = columns_in_frame(shot, "S")
        vacant.append(left[cKDTree(xy).query(where)[1]] < 2)
    return np.concatenate(patches), np.concatenate(vacant)


def separation(latents: NDArray[np.float64], vacant: NDArray[np.bool_], train: int) -> float:
    """Area under the ROC curve of the share of vacancies among the 15 nearest training patches."""
    share = vacant[:train][cKDTree(latents[:train]).query(latents[train:], k=15)[1]].mean(1)
    positive, negative = share[vacant[train:]], share[~vacant[train:]]
    return float(((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)).mean())


@pytest.mark.parametrize("config", [PcaEmbedding(), VaeEmbedding(steps=400)], ids=["pca", "vae"])
def test_vacancies_stand_apart_in_latent_space(
    config: EmbeddingConfig, learning: tuple[Patches, NDArray[np.bool_]]
) -> None:
    patches, vacant = learning
    train = len(patches) // 2
    model = config.fit(patches[:train], seed=1)
    latents = model.encode(patches)
    assert latents.shape == (len(patches), 2)
    assert separation(latents, vacant, train) > 0.9
    assert separation(latents, np.random.default_rng(0).permutation(vacant), train) < 0.6
    if isinstance(config, VaeEmbedding):
        assert model.report["active"] == 2
        assert min(model.report["kl_0"], model.report["kl_1"]) > 0.3


def test_kl_tells_used_coordinates_from_idle_ones() -> None:
    # One varying pattern in noise of standard deviation 1: one coordinate carries it, the others have nothing to carry.
    random = np.random.default_rng(0)
    pattern = random.normal(size=(8, 8))
    patches = random.normal(size=(6000, 1, 1)) * pattern + random.normal(size=(6000, 8, 8))
    report = VaeEmbedding(latent_dim=3, steps=400).fit(patches.astype(np.float32), seed=0).report
    idle, used = sorted(report[f"kl_{i}"] for i in range(3))[1:]
    assert used > 1.5
    assert idle < 0.2
    assert report["sigma"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("config", [PcaEmbedding(components=3), VaeEmbedding(steps=30)], ids=["pca", "vae"])
def test_saving_and_seeding_are_bit_exact(config: EmbeddingConfig, learning: tuple[Patches, NDArray[np.bool_]]) -> None:
    import torch

    patches = learning[0][:300]
    model = config.fit(patches, seed=5)
    again = load(model.save())
    assert again.save() == model.save()
    assert again.version == model.version
    assert again.report == model.report
    assert np.array_equal(again.encode(patches), model.encode(patches))
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert config.fit(patches, seed=5).version == model.version
    assert torch.equal(torch.random.get_rng_state(), state)
    if isinstance(config, VaeEmbedding):
        assert config.fit(patches, seed=6).version != model.version


def test_foreign_bytes_and_patches_are_refused(learning: tuple[Patches, NDArray[np.bool_]]) -> None:
    model = PcaEmbedding().fit(learning[0][:100], seed=0)
    data = model.save()
    for bad in (b"", b"hello world, not a model", data[:-40], data[:60]):
        with pytest.raises(BadInput, match="train the embedding again"):
            load(bad)
    with pytest.raises(BadInput, match="16"):
        model.encode(np.zeros((3, 12, 12), np.float32))
    with pytest.raises(BadInput, match="at least 16"):
        VaeEmbedding().fit(np.zeros((3, 12, 12), np.float32), seed=0)
