"""A specimen's portrait: a noisy frame, the ideal image with its atoms, and what is true of each place or atom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.canvas import coarse, new_figure, scale_bar
from aecontrol.image_sets import ImageSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Extent = tuple[float, float, float, float]
COLOURS = ("#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
ATOMS_SHOWN_NM = 4.0
MOST_MARKS = 1500
"""An element with more columns than this in the middle (an amorphous film) is not marked."""


def draw_card(title: str, images: ImageSet) -> Figure:
    """Three panels: the first channel with noise, its ideal image with the sites of the middle, one label."""
    figure = new_figure(13.0, 4.7)
    noisy, ideal, truth = figure.subplots(1, 3)
    channel, image = next(iter(images.channels.items()))
    rows, cols = image.shape[-2:]
    extent = (0.0, cols * images.pixel_size_nm[0], rows * images.pixel_size_nm[1], 0.0)
    dose = float(images.metadata["fluence_e_per_A2_per_frame"])
    _grey(noisy, np.asarray(image, float), extent)
    noisy.set_title(f"{title}: {channel}, {dose:.3g} e/Å²")
    _grey(ideal, np.asarray(images.arrays[f"noiseless_{channel}"], float), extent)
    _mark_sites(ideal, images, extent)
    _draw_label(truth, images, extent)
    optics = images.metadata["settings"]["optics"]
    claim = images.metadata["validity"][channel]
    note = "linear model valid" if claim["linear_ok"] else f"linear model not valid: {claim['note']}"
    setting = f"{optics['voltage_kV']:g} kV, {optics['semi_angle_mrad']:g} mrad"
    figure.text(0.5, -0.03, f"{setting}; {channel}: {note}", ha="center")
    return figure


def _grey(ax: Axes, image: Floats, extent: Extent) -> None:
    low, high = np.percentile(image, [0.5, 99.9])
    ax.imshow(image, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="nearest")
    _bare(ax)
    scale_bar(ax)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])


def _mark_sites(ax: Axes, images: ImageSet, extent: Extent) -> None:
    """The sites of the middle, one mark a column: filled by element, crosses where atoms are missing."""
    from ase.data import chemical_symbols

    half = 0.5 * min(ATOMS_SHOWN_NM, extent[1], extent[2])
    middle = np.clip(_brightest(ax, extent), half, np.array([extent[1], extent[2]]) - half)
    x, y = _places_nm(images).T
    numbers = np.asarray(images.arrays["atomic_numbers"])
    alive: NDArray[np.bool_] = np.asarray(images.arrays["atoms_alive"], dtype=np.bool_)
    shown = (np.abs(x - middle[0]) < half) & (np.abs(y - middle[1]) < half)
    for colour, number in zip(COLOURS, _common(numbers[shown]), strict=False):
        same = shown & (numbers == number)
        columns = np.unique(np.asarray(images.arrays["atoms_column"])[same], return_index=True)[1]
        if len(columns) <= MOST_MARKS:
            ax.scatter(
                x[same][columns], y[same][columns], s=9, color=colour, label=chemical_symbols[int(number)], linewidths=0
            )
    if (shown & ~alive).any():
        ax.scatter(x[shown & ~alive], y[shown & ~alive], s=30, marker="x", color="red", label="vacant", linewidths=1.0)
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] + half, middle[1] - half))
    ax.legend(loc="upper right", ncols=3, handletextpad=0.1, columnspacing=0.8)
    ax.set_title("ideal image and sites")


def _places_nm(images: ImageSet) -> Floats:
    """Sites from the frame's corner, [n, 2] nm."""
    pixels: Floats = np.asarray(images.arrays["atoms_px"], dtype=np.float64)
    scaled: Floats = pixels * np.array(images.pixel_size_nm)
    return scaled


def _brightest(ax: Axes, extent: Extent) -> Floats:
    """The middle of the frame, or of what shines in an otherwise dark one, (x, y) nm."""
    image = coarse(np.asarray(ax.images[0].get_array(), float), 32)
    middle = np.array([extent[1], extent[2]]) / 2
    if image.max() < 5.0 * np.median(image):
        return middle
    row, col = np.unravel_index(int(np.argmax(image)), image.shape)
    return np.array([(col + 0.5) / image.shape[1] * extent[1], (row + 0.5) / image.shape[0] * extent[2]])


def _common(numbers: NDArray[Any]) -> NDArray[Any]:
    found, count = np.unique(numbers, return_counts=True)
    return np.asarray(found[np.argsort(-count)])


def _draw_label(ax: Axes, images: ImageSet, extent: Extent) -> None:
    """The most telling label: a map of places, else a number per atom, else the second channel."""
    maps = {
        name: np.asarray(values, float)
        for name, values in images.arrays.items()
        if name.startswith("labels_") and name not in ("labels_defect", "labels_tilt_deg")
    }
    telling = {name: values for name, values in maps.items() if np.isfinite(values).any() and np.ptp(values) > 0}
    for name in sorted(telling, key=lambda name: ("polarisation" not in name, "distance" in name)):
        _draw_map(ax, name.removeprefix("labels_"), telling[name], extent)
        return
    for name in ("tilt_deg", "ring", "particle"):
        if f"atoms_{name}" in images.arrays:
            values = np.asarray(images.arrays[f"atoms_{name}"], float)
            if np.nanmax(values, initial=0.0) > np.nanmin(values, initial=0.0) + 1e-6:
                _draw_atoms(ax, name, values, images, extent)
                return
    other = list(images.channels)[-1]
    _grey(ax, np.asarray(images.channels[other], float), extent)
    ax.set_title(other)


def _draw_map(ax: Axes, name: str, values: Floats, extent: Extent) -> None:
    if values.ndim == 3:  # a vector: its direction as a colour, arrows on top
        angle = np.degrees(np.arctan2(values[..., 1], values[..., 0]))
        shown = ax.imshow(angle, cmap="twilight", vmin=-180, vmax=180, extent=extent)
        step = max(1, len(values) // 16)
        at = np.arange(step // 2, len(values), step)
        x, y = (at + 0.5) * extent[1] / values.shape[1], (at + 0.5) * extent[2] / len(values)
        u, v = values[np.ix_(at, at)][..., 0], values[np.ix_(at, at)][..., 1]
        ax.quiver(x, y, u, v, angles="xy", color="white", width=0.005)
        name = f"{name.removesuffix('_nm')}: direction, degrees from +x to +y (down)"
    else:
        shown = ax.imshow(values, cmap="viridis", extent=extent, interpolation="nearest")
    ax.figure.colorbar(shown, ax=ax, shrink=0.8)
    _bare(ax)
    ax.set_title(name.replace("_", " "))


def _draw_atoms(ax: Axes, name: str, values: Floats, images: ImageSet, extent: Extent) -> None:
    values = values[:, -1] if values.ndim == 2 else values
    x, y = _places_nm(images).T
    known = np.isfinite(values) & (values > -1 if name != "tilt_deg" else np.isfinite(values))
    shown = ax.scatter(x[known], y[known], c=values[known], s=4, cmap="viridis", linewidths=0)
    ax.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
    ax.figure.colorbar(shown, ax=ax, shrink=0.8)
    _bare(ax)
    ax.set_title({"tilt_deg": "tilt γ, degrees"}.get(name, name))
