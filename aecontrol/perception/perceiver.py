"""The shipped perceiver: frames in, atoms, patches and a scalar target out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.perception.embedding import EmbeddingConfig, VaeEmbedding, cut_patches
from aecontrol.perception.lattice import LatticeHint
from aecontrol.perception.targets import (
    AtomCountTarget,
    CrystalReading,
    Evidence,
    LatentComponentTarget,
    NoveltyTarget,
    Target,
    VacancyTarget,
    missing_atom_evidence,
    read_crystal,
    to_specimen,
)
from aecontrol.protocols import Embedding, Reading
from aecontrol.types import ATOM_LABELS, Model, Positive, ScanRegion

if TYPE_CHECKING:
    from aecontrol.perception.finder import Found

Array = NDArray[np.float64]

REVISION = "2"
"""Raised when the reading of a frame changes with the same settings and weights; part of ``version``."""
_LISTED_CONFIDENCE = 0.2
"""Atoms less certain than this are not even listed, unless the target asks for them."""


class Finder(Protocol):
    """What this perceiver needs of the atom finder."""

    @property
    def version(self) -> str:
        """Hash of the weights."""

    def find(self, image: NDArray[np.generic], pixel_size_nm: tuple[float, float], threshold: float = ...) -> Found:
        """Atoms in pixels, the centre of pixel [0, 0] at (0.5, 0.5). Raises BadInput for an unusable image."""


class AtomPerceiver(Model):
    """Perception on the scale of atoms: a network finds them, a lattice names their sites, patches are embedded."""

    kind: Literal["atoms"] = "atoms"
    target: Target = VacancyTarget()
    finder: Literal["network", "spots"] = Field(
        "network",
        description="'network': the trained U-Net; 'spots': a training-free fit, for single atoms on an uneven support",
    )
    weights: Path | None = Field(None, description="safetensors file of the network; None: the shipped one")
    embedding: EmbeddingConfig = VaeEmbedding()
    patch_size_nm: Positive = Field(0.4, description="side of the square patches, nm")
    patch_pixels: Annotated[int, Field(ge=8, le=64)] = Field(16, description="pixels along a patch's side")
    max_patches: Annotated[int, Field(ge=1)] = Field(400, description="patches kept from one frame at most")

    @property
    def target_kind(self) -> str:
        """Kind of object that the scorer asks the instrument for."""
        return {"vacancy": "vacancy", "atom_count": "atom"}.get(self.target.kind, self.target.kind)

    def build(self, device: str = "cpu") -> AtomReader:
        """Load the finder's weights. Raises BadInput when they are missing or foreign."""
        if self.finder == "spots":
            from aecontrol.perception.bright import BrightAtomFinder

            return AtomReader(self, BrightAtomFinder())
        from aecontrol.perception.device import resolve
        from aecontrol.perception.finder import AtomFinder

        return AtomReader(self, AtomFinder(self.weights, resolve(device)))


class AtomReader:
    """The perceiver that ``AtomPerceiver`` builds; see ``aecontrol.protocols.Perceiver``."""

    def __init__(self, config: AtomPerceiver, finder: Finder) -> None:
        self._config, self._finder = config, finder

    @property
    def version(self) -> str:
        """Hash of settings, finder weights and this code's revision."""
        text = "|".join((REVISION, self._config.model_dump_json(), self._finder.version))
        return hashlib.sha256(text.encode()).hexdigest()

    # ------------------------------------------------------------ frames

    def read_overview(
        self,
        image: NDArray[np.generic],
        region: ScanRegion,
        windows: Sequence[ScanRegion],
        electrons_per_pixel: float | None,
    ) -> list[Reading]:
        """One reading per window; abstains (value None) where the target cannot be told from an overview."""
        target = self._config.target
        data = np.asarray(image, dtype=np.float64)
        if data.ndim != 2 or not np.isfinite(data).all():
            return [Reading(None, None, note="the overview is not a finite 2-D image")] * len(windows)
        evidence: list[Evidence]
        if isinstance(target, VacancyTarget):
            evidence = missing_atom_evidence(data, region, windows, target.lattice)
        elif isinstance(target, AtomCountTarget):
            from aecontrol.perception.evidence import bright_atom_evidence

            evidence = bright_atom_evidence(data, region, windows)
        else:
            note = f"target {target.kind!r} is defined on patches, which an overview does not give"
            return [Reading(None, None, note=note)] * len(windows)
        outside = "no evidence: the window lies outside the overview, or too little of the field was seen"
        return [
            Reading(value, variance, features, note="" if value is not None else outside)
            for value, variance, features in evidence
        ]

    def read_scan(self, image: NDArray[np.generic], region: ScanRegion, electrons_per_pixel: float | None) -> Reading:
        """Atoms, target objects, patches and value of one sub-scan; abstains with a note rather than guess."""
        target = self._config.target
        data = np.asarray(image, dtype=np.float64)
        least = (
            min(_LISTED_CONFIDENCE, target.confidence) if isinstance(target, AtomCountTarget) else _LISTED_CONFIDENCE
        )
        try:
            found = self._finder.find(data, region.pixel_size_nm, least)
        except BadInput as error:
            return Reading(None, None, note=error.what)
        if isinstance(target, AtomCountTarget) or target.lattice is None:
            return self._read_atoms(data, region, found)
        positions = np.column_stack([found.x_px, found.y_px]) * np.array(region.pixel_size_nm)
        border = target.border_nm if isinstance(target, VacancyTarget) else 0.0
        crystal = read_crystal(data, region.pixel_size_nm, positions, target.lattice, border)
        if isinstance(crystal, str):
            return Reading(None, None, note=crystal)
        return self._read_columns(data, region, crystal)

    def _read_columns(self, image: Array, region: ScanRegion, crystal: CrystalReading) -> Reading:
        is_target = isinstance(self._config.target, VacancyTarget)
        chosen = _choose(crystal.table, crystal.judged, crystal.found, region, self._config)
        patches = self._cut(image, region, crystal.table[chosen], crystal.lattice.angle_rad, crystal)
        table = crystal.table.copy()
        table[:, :2] = to_specimen(table[:, :2], region)
        return Reading(
            value=float(crystal.missing.sum()) if is_target else None,
            variance=crystal.value_variance if is_target else None,
            features=crystal.features,
            atoms=table,
            found=crystal.found if is_target else (),
            patches=patches,
            patch_atoms=chosen,
        )

    def _cut(
        self, image: Array, region: ScanRegion, rows: Array, angle_rad: float, crystal: CrystalReading | None
    ) -> NDArray[np.float32]:
        levels = (crystal.background, crystal.peak) if crystal else _bright_levels(image, region, rows)
        config = self._config
        return cut_patches(
            image, region.pixel_size_nm, rows[:, :2], angle_rad, config.patch_size_nm, config.patch_pixels, levels
        )

    def _read_atoms(self, image: Array, region: ScanRegion, found: Found) -> Reading:
        target = self._config.target
        pixel = region.pixel_size_nm
        label = target.label if isinstance(target, AtomCountTarget) else "atom"
        confidence = np.clip(found.confidence, 0.0, 1.0)
        table = np.column_stack(
            [
                found.x_px * pixel[0],
                found.y_px * pixel[1],
                np.full(len(confidence), ATOM_LABELS.index(label)),
                confidence,
                found.sigma_x * pixel[0],
                found.sigma_y * pixel[1],
                found.intensity,
                confidence,
            ]
        )
        inside = _whole_patch(table, region, self._config)
        chosen = np.flatnonzero(inside)[: self._config.max_patches]
        patches = self._cut(image, region, table[chosen], 0.0, None)
        table[:, :2] = to_specimen(table[:, :2], region)
        counts = isinstance(target, AtomCountTarget)
        accepted = confidence >= target.confidence if isinstance(target, AtomCountTarget) else np.zeros(0, bool)
        return Reading(
            value=float(confidence.sum()) if counts else None,
            variance=float((confidence * (1 - confidence)).sum()) if counts else None,
            features={"atoms": float(len(confidence))},
            atoms=table,
            found=tuple(int(i) for i in np.flatnonzero(accepted)),
            patches=patches,
            patch_atoms=chosen.astype(np.int64),
        )

    # ------------------------------------------------------------ embedding

    def fit_embedding(self, patches: NDArray[np.float32], seed: int) -> Embedding:
        """Train the configured embedding on [n, size, size]; seeded and deterministic."""
        return self._config.embedding.fit(patches, seed)

    def load_embedding(self, data: bytes) -> Embedding:
        """Rebuild an embedding that ``save`` wrote. Raises BadInput on foreign or damaged bytes."""
        from aecontrol.perception.embedding import load

        return load(data)

    def value_from_latents(
        self, patches: NDArray[np.float32], latents: Array, reference: Array
    ) -> tuple[float | None, float | None]:
        """Value and its variance (scatter of the patches over their number) for targets defined on latents."""
        target = self._config.target
        if len(latents) < 2 or len(reference) < _NEIGHBOUR + 1:
            return None, None
        if isinstance(target, LatentComponentTarget):
            scores = _component_scores(latents, reference, target.component)
        elif isinstance(target, NoveltyTarget):
            scores = _novelty_scores(latents, reference)
        else:
            return None, None
        return float(scores.mean()), float(scores.var(ddof=1) / len(scores))


_NEIGHBOUR = 8
"""Which neighbour's distance measures novelty: far enough for a patch not to be its own company (a choice)."""


def _component_scores(latents: Array, reference: Array, component: int | None) -> Array:
    """One coordinate in standard deviations of the reference, the side of its longer tail positive."""
    spread = reference.std(0)
    which = int(np.argmax(spread)) if component is None else component
    if which >= reference.shape[1]:
        raise BadInput(
            f"target.component = {which}, the embedding has {reference.shape[1]} coordinates",
            "count from 0, or leave it out",
        )
    scale = max(float(spread[which]), 1e-12)
    standard = (reference[:, which] - reference[:, which].mean()) / scale
    sign = 1.0 if (standard**3).mean() >= 0 else -1.0
    return np.asarray(sign * (latents[:, which] - reference[:, which].mean()) / scale)


def _novelty_scores(latents: Array, reference: Array) -> Array:
    """log distance to the eighth nearest reference point over the median of the same among the reference."""
    from scipy.spatial import cKDTree

    scale = np.maximum(reference.std(0), 1e-12)
    tree = cKDTree(reference / scale)
    usual = float(np.median(tree.query(reference / scale, k=[_NEIGHBOUR + 1])[0]))
    distance = tree.query(latents / scale, k=[_NEIGHBOUR])[0][:, 0]
    return np.asarray(np.log((distance + 1e-9) / (usual + 1e-9)))


def _whole_patch(table: Array, region: ScanRegion, config: AtomPerceiver) -> NDArray[np.bool_]:
    """True where the patch's inscribed circle lies inside the frame."""
    half = config.patch_size_nm / 2
    return np.asarray(((table[:, :2] >= half) & (table[:, :2] <= np.array(region.fov_nm) - half)).all(1))


def _choose(
    table: Array, judged: NDArray[np.bool_], found: tuple[int, ...], region: ScanRegion, config: AtomPerceiver
) -> NDArray[np.int64]:
    """Rows that get a patch: all vacancies, then monitored columns and a quarter as many reference columns, evenly
    over the table, up to the cap. Ascending."""
    whole = _whole_patch(table, region, config)
    is_found = np.zeros(len(table), dtype=bool)
    is_found[list(found)] = True
    first = np.flatnonzero(whole & is_found)[: config.max_patches]
    room = config.max_patches - len(first)
    monitored = np.flatnonzero(whole & judged & ~is_found)
    reference = np.flatnonzero(whole & (table[:, 2] == ATOM_LABELS.index(_reference_label(config))))
    picked = [first, _evenly(reference, room // 5), _evenly(monitored, room - min(room // 5, len(reference)))]
    return np.sort(np.concatenate(picked)).astype(np.int64)


def _reference_label(config: AtomPerceiver) -> str:
    hint: LatticeHint | None = getattr(config.target, "lattice", None)
    return hint.reference if hint else ATOM_LABELS[0]


def _evenly(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """At most ``count`` of ``rows``, evenly spread."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)] if count else rows[:0]


def _bright_levels(image: Array, region: ScanRegion, rows: Array) -> tuple[float, float]:
    """Background (the median) and the level of a bright atom (90th percentile of the atoms' peaks, lightly smoothed),
    for frames without a lattice."""
    from scipy.ndimage import gaussian_filter

    background = float(np.median(image))
    if not len(rows):
        return background, background + 1.0
    smooth = gaussian_filter(image, [0.03 / p for p in reversed(region.pixel_size_nm)])
    index = np.floor(rows[:, :2] / np.array(region.pixel_size_nm)).astype(int)
    index = np.clip(index, 0, [region.shape[1] - 1, region.shape[0] - 1])
    return background, float(np.percentile(smooth[index[:, 1], index[:, 0]], 90))
