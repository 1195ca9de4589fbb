"""`aecontrol simulate` and `aecontrol gallery`: simulations written to files, and one picture of every specimen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

from aecontrol.errors import BadInput
from aecontrol.image_sets import ImageSet, Progress, Simulation, check_target, write_image_set
from aecontrol.registry import build_part, kinds, part_class
from aecontrol.toml_file import read_toml

GALLERY_FOV_NM = 8.0
GALLERY_SHAPE = (512, 512)
THIN_NM = 1.0
SHEET = {  # a sheet at the voltage that spares it, anything thicker at 200 kV
    "optics": {"voltage_kV": 80.0, "semi_angle_mrad": 30.0},
    "beam_current_pA": 40.0,
}
THICK = {"optics": {"voltage_kV": 200.0, "semi_angle_mrad": 21.4}, "beam_current_pA": 20.0}
HARMLESS: dict[str, dict[str, float]] = {"displacement_threshold_eV": {}, "excitation_barn": {}}


def simulate(config: Path, out: Path, device: str, workers: int, progress: Progress) -> dict[str, Any]:
    """Carry out the [simulation] of a TOML file and write it to ``out``; several parts to ``out`` with numbers.

    Returns what `--json` prints: ``file`` (and ``files``), ``shape`` of a channel, ``atoms`` listed, ``assumptions``.
    Raises BadInput, StorageFault.
    """
    raw = read_toml(config)
    unknown = set(raw) - {"simulation"}
    if unknown:
        raise BadInput(f"{config}: unknown table(s) {', '.join(sorted(unknown))}", "a simulation has one: [simulation]")
    simulation = cast(Simulation, build_part("simulation", raw.get("simulation"), "simulation"))
    check_target(out)
    parts = simulation.produce(device, workers, progress)
    files, atoms, first = [], 0, None
    for path, images in _named(parts, out):
        write_image_set(path, images)
        files.append(str(path))
        atoms += len(images.arrays["atomic_numbers"])
        first = first or images
    assert first is not None
    return {
        "file": files[0],
        "files": files,
        "shape": list(next(iter(first.channels.values())).shape),
        "atoms": atoms,
        "channels": list(first.channels),
        "validity": first.metadata.get("validity", {}),
        "assumptions": list(first.metadata.get("assumptions", ())),
    }


def _named(parts: Iterator[ImageSet], out: Path) -> Iterator[tuple[Path, ImageSet]]:
    """Each part with its file: ``out`` itself for a single one, ``out`` with numbers for several."""
    first = next(parts)
    second = next(parts, None)
    if second is None:
        yield out, first
        return
    for index, images in enumerate(chain((first, second), parts)):
        yield out.with_name(f"{out.stem}-{index:04d}{out.suffix}"), images


def gallery(out: Path, only: str | None, device: str, progress: Progress) -> list[Path]:
    """One picture (PNG) for every installed specimen that can be built without settings, into the folder ``out``."""
    from aecontrol.canvas import draw_png
    from aecontrol.specimen_card import draw_card

    if only is not None and only not in kinds("specimen"):
        raise BadInput(f"specimen kind {only!r} is not known", f"use one of {', '.join(kinds('specimen'))}")
    chosen = [kind for kind in kinds("specimen") if only in (None, kind) and not _needs(kind)]
    if not chosen:
        raise BadInput(f"specimen {only!r} needs {', '.join(_needs(str(only)))}", "give them to `aecontrol simulate`")
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for done, kind in enumerate(chosen, start=1):
        images = next(iter(_portrait(kind).produce(device, 1, lambda done, total: None)))
        png = draw_png(lambda images=images, kind=kind: draw_card(kind, images))  # type: ignore[misc]
        assert isinstance(png, bytes)
        path = out / f"{kind}.png"
        path.write_bytes(png)
        made.append(path)
        progress(done, len(chosen))
    return made


def _needs(kind: str) -> list[str]:
    """Settings that a specimen cannot do without."""
    return [name for name, field in part_class("specimen", kind).model_fields.items() if field.is_required()]


def _portrait(kind: str) -> Simulation:
    """A noisy frame of the middle of a specimen with its default settings, undamaged."""
    specimen = build_part("specimen", {"kind": kind}, "specimen")
    built = specimen.build(0)  # type: ignore[attr-defined]  # a specimen can be built
    fov = min(GALLERY_FOV_NM * (2.0 if built.fields else 1.0), *built.size_nm)
    table = {
        "kind": "scan",
        "specimen": {"kind": kind},
        "damage": HARMLESS,
        "detectors": {"HAADF": {}, "MAADF": {"inner_mrad": 40.0, "outer_mrad": 86.0}},
        "view": {"fov_nm": (fov, fov), "shape": GALLERY_SHAPE, "dwell_time_s": 2e-5},
        **(SHEET if built.thickness_nm <= THIN_NM else THICK),
    }
    return cast(Simulation, build_part("simulation", table, "simulation"))
