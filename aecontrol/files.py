"""Images from files: NumPy archives and TIFF by ourselves, microscopy formats through RosettaSciIO (extra ``files``).

A file is untrusted: nothing is unpickled, names inside an archive are never used as paths, sizes are checked before
anything is unpacked, and whatever a reader stumbles over ends as one BadInput.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

SIZE_LIMIT_BYTES = 2 * 1024**3
_RATIO_LIMIT = 1000  # unpacked / packed; a noisy image packs to a half, a blank one to some hundredths
_LABELS, _PIXEL_SIZE, _IMAGE, _MADE = "xy_px", "pixel_size_nm", "image", "metadata"
_WIDEST_TABLE = 8  # columns; a 2-D array as narrow as this is a table of positions, not an image
_NM = {"nm": 1.0, "n_m": 1.0, "nanometer": 1.0, "å": 0.1, "a": 0.1, "angstrom": 0.1, "pm": 1e-3}
_NM |= {"um": 1e3, "µm": 1e3, "μm": 1e3, "micron": 1e3, "mm": 1e6, "m": 1e9}


@dataclass(frozen=True)
class Picture:
    """One image [rows, cols] as stored (native byte order, read-only).

    ``pixel_size_nm`` is None where the file does not say or the pixels are not square. ``labels`` [n, 2] are positions
    (x, y) in px whose origin is the image's corner: the centre of pixel [row, col] lies at (col + 1/2, row + 1/2).
    ``metadata`` is what the reader told, in its own words.
    """

    array: NDArray[np.generic]
    pixel_size_nm: float | None = None
    labels: NDArray[np.float64] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_image(path: str | Path, key: str | None = None, frame: int | None = None) -> Picture:
    """The image in ``path``; ``key`` names it where the file holds several, ``frame`` its number in a stack (from 0,
    along the first axis).

    npz: ``key``, or the array called ``image``, or the only one that looks like an image; ``pixel_size_nm`` (a number)
    and ``xy_px`` [n, 2] are read beside it when present. npy and TIFF: the one image. Other formats: any that
    RosettaSciIO reads, ``key`` being the signal's title or its number. Raises BadInput when the file is missing,
    damaged, too large, ambiguous, or holds no finite two-dimensional image.
    """
    picture = _stored(Path(path), key)
    return replace(picture, array=_checked(picture.array, Path(path).name, frame))


def read_stack(path: str | Path, key: str | None = None) -> Picture:
    """The frames [frames, rows, cols] in ``path``, a single image being a stack of one; ``key`` as for
    :func:`read_image`, or in an archive the only stack but for what was simulated without noise. Raises BadInput."""
    path = Path(path)
    if key is None and path.suffix.lower() == ".npz" and path.is_file():
        key = _only_stack(path)
    picture = _stored(path, key)
    array = picture.array.reshape([n for n in picture.array.shape if n != 1])
    frames = (
        [_checked(frame, f"{path.name}, frame {k}", None) for k, frame in enumerate(array)]
        if array.ndim == 3
        else [_checked(array, path.name, None)]
    )
    return replace(picture, array=np.stack(frames))


def _stored(path: Path, key: str | None) -> Picture:
    """What a file holds, as it holds it."""
    if not path.is_file():
        raise BadInput(f"no file {str(path)!r}", "check the path; a folder is not an image")
    size = path.stat().st_size
    if size == 0:
        raise BadInput(f"{path.name} is empty (0 bytes)", "copy the file again")
    if size > SIZE_LIMIT_BYTES:
        raise BadInput(f"{path.name} has {size} bytes, the limit is {SIZE_LIMIT_BYTES}", "crop or bin the image first")
    readers = {".npz": _read_npz, ".npy": _read_npy, ".tif": _read_tiff, ".tiff": _read_tiff}
    reader = readers.get(path.suffix.lower(), _read_with_rosettasciio)
    try:
        picture = reader(path, key)
    except BadInput:
        raise
    except Exception as error:  # readers of foreign formats raise anything on a damaged file
        raise BadInput(
            f"{path.name} could not be read: {type(error).__name__}: {error}",
            "the file is damaged or not what its name says",
        ) from error
    return picture


def _checked(array: NDArray[np.generic], name: str, frame: int | None) -> NDArray[np.generic]:
    shape = array.shape
    if {"R", "G", "B"} <= set(array.dtype.names or ()):
        colours: Any = array  # a structured array: one field a colour
        array = _grey(np.stack([colours[colour] for colour in "RGB"], -1), name)
    if array.dtype.kind not in "buif":
        raise BadInput(f"{name}: values of type {array.dtype}", "give real numbers")
    if array.ndim > 2:
        array = array.reshape([n for n in shape if n != 1] or [1])
    if frame is not None:
        array = _one_of(array if array.ndim > 2 else array[None], frame, name)
    if array.ndim != 2:
        stack = f"; of a stack, one frame: 0 to {len(array) - 1}" if array.ndim == 3 else ""
        raise BadInput(f"{name}: an array of shape {shape}", f"give one two-dimensional image [rows, columns]{stack}")
    if array.size == 0:
        raise BadInput(f"{name}: an empty image, shape {shape}", "give at least one pixel")
    if not np.isfinite(array).any():
        raise BadInput(f"{name}: no finite pixel among {array.size}", "the recording failed; give another image")
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def _one_of(stack: NDArray[np.generic], frame: int, name: str) -> NDArray[np.generic]:
    if not 0 <= frame < len(stack):
        raise BadInput(f"{name} has no frame {frame}", f"it holds {len(stack)}: 0 to {len(stack) - 1}")
    return np.asarray(stack[frame])


def _grey(colours: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    """The common value of red, green and blue [..., 3]; a coloured picture is not an intensity."""
    if not (colours[..., :1] == colours[..., :3]).all():
        raise BadInput(f"{name}: a colour picture", "give the recorded image, or export it in greys without marks")
    return np.asarray(colours[..., 0])


def _read_npy(path: Path, key: str | None) -> Picture:
    _no_key(path, key)
    return Picture(np.load(path, allow_pickle=False))


def _read_npz(path: Path, key: str | None) -> Picture:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        total = sum(info.file_size for info in members.values())
        packed = sum(info.compress_size for info in members.values())
        if total > SIZE_LIMIT_BYTES or total > _RATIO_LIMIT * max(packed, 1024):
            raise BadInput(
                f"{path.name} unpacks from {packed} to {total} bytes",
                f"the limits are {SIZE_LIMIT_BYTES} bytes and a ratio of {_RATIO_LIMIT}; pack it less",
            )
        chosen = key if key is not None else _only_image(archive, members, path.name)
        if chosen not in members:
            raise BadInput(f"{path.name} holds no array {chosen!r}", f"it holds {_listed(members)}")
        image = _member(archive, members[chosen])
        scale = _member(archive, members[_PIXEL_SIZE]) if _PIXEL_SIZE in members else None
        labels = _member(archive, members[_LABELS]) if _LABELS in members else None
        made = _member(archive, members[_MADE]) if _MADE in members else None
    if scale is not None and (scale.size not in (1, 2) or not np.isfinite(scale).all() or scale.min() <= 0):
        raise BadInput(
            f"{path.name}: {_PIXEL_SIZE} = {scale.tolist()}", "give one positive number of nm, or two (x, y)"
        )
    if labels is not None and (labels.ndim != 2 or labels.shape[1] != 2 or not np.isfinite(labels).all()):
        raise BadInput(
            f"{path.name}: {_LABELS} of shape {labels.shape}, or not finite", "give (x, y) in px, shape [n, 2]"
        )
    return Picture(
        image,
        None if scale is None else _square(float(scale.flat[0]), float(scale.flat[-1])),
        None if labels is None else labels.astype(np.float64),
        {"format": "npz", "key": chosen} | ({} if made is None or made.dtype.kind != "U" else {"made": str(made)}),
    )


def _only_stack(path: Path) -> str | None:
    """The stack of images in an archive, if it holds just one that was not simulated without noise."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            shapes = _shapes(archive, members)
    except (ValueError, zipfile.BadZipFile):
        return None  # which reading it will say
    stacks = [name for name, shape in shapes.items() if len(shape) == 3 and shape[2] > _WIDEST_TABLE]
    stacks = [name for name in stacks if not name.startswith("noiseless_")]
    return stacks[0] if len(stacks) == 1 else None


def _shapes(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> dict[str, tuple[int, ...]]:
    """Shape of every array, without unpacking it."""
    shapes = {}
    for member, info in members.items():
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shapes[member] = read_header(stream)[0]
    return shapes


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """One array; the archive's directory has bounded its size, and unpacking stops there."""
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _only_image(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> str:
    if _IMAGE in members:
        return _IMAGE
    shapes = _shapes(archive, members)
    images = [member for member, shape in shapes.items() if len(shape) == 2 and shape[1] > _WIDEST_TABLE]
    if len(images) != 1:
        found = "no array that looks like an image" if not images else f"{len(images)} images"
        raise BadInput(f"{name} holds {found}", f"name one with `key` (--channel): {_listed(images or members)}")
    return images[0]


def _read_tiff(path: Path, key: str | None) -> Picture:
    import tifffile

    _no_key(path, key)
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        if series.nbytes > SIZE_LIMIT_BYTES:
            raise BadInput(
                f"{path.name}: an image of shape {series.shape}, {series.nbytes} bytes",
                f"the limit is {SIZE_LIMIT_BYTES} bytes; crop or bin the image first",
            )
        array = series.asarray()
        if series.axes.endswith("S") and array.shape[-1] in (3, 4):  # samples of a colour, the fourth of opacity
            array = _grey(array, path.name)
        return Picture(array, _tiff_pixel_size(file), None, {"format": "TIFF"})


def _tiff_pixel_size(file: Any) -> float | None:
    """Pixel size, nm, from ImageJ's convention (pixels per named unit); the bare resolution tags mean printing."""
    unit = _NM.get(str((file.imagej_metadata or {}).get("unit", "")).replace("\\u00B5", "µ").lower())
    tags = file.pages[0].tags
    if unit is None or "XResolution" not in tags or "YResolution" not in tags:
        return None
    (xn, xd), (yn, yd) = tags["XResolution"].value, tags["YResolution"].value
    return _square(unit * xd / xn, unit * yd / yn) if xn and yn else None


def _read_with_rosettasciio(path: Path, key: str | None) -> Picture:
    try:
        from rsciio import IO_PLUGINS
    except ImportError as error:
        raise BadInput(
            f"{path.name}: {path.suffix or 'a file without ending'} needs RosettaSciIO, which is not installed",
            "pip install -c constraints.txt -e '.[files]'; npz, npy and TIFF need nothing more",
        ) from error
    ending = path.suffix.lower().lstrip(".")
    plugins = [plugin for plugin in IO_PLUGINS if ending and ending in plugin["file_extensions"]]
    if not plugins:
        raise BadInput(
            f"{path.name}: no reader for {path.suffix or 'a file without ending'!r}", "give npz, npy or TIFF"
        )
    failures = []
    for plugin in plugins:
        try:
            signals = _load_signals(plugin["api"], path)
        except Exception as error:  # another plugin may know the same ending
            failures.append(f"{plugin['name']}: {type(error).__name__}: {error}")
            continue
        return _choose_signal(signals, path, key, plugin["name"])
    raise BadInput(
        f"{path.name} could not be read ({'; '.join(failures)})", "the file is damaged or not what its name says"
    )


def _load_signals(api: str, path: Path) -> list[dict[str, Any]]:
    """Signals of the file, unread where the reader can (a spectrum image lies beside its small picture)."""
    from importlib import import_module

    reader = import_module(api).file_reader
    try:
        signals: list[dict[str, Any]] = reader(os.fspath(path), lazy=True)
    except (NotImplementedError, TypeError):  # pictures with an opacity cannot be read lazily, and fail with TypeError
        signals = reader(os.fspath(path))
    return signals


def _choose_signal(signals: list[dict[str, Any]], path: Path, key: str | None, reader: str) -> Picture:
    titles = [str(signal.get("metadata", {}).get("General", {}).get("title", "")) for signal in signals]
    shapes = [tuple(signal["data"].shape) for signal in signals]
    offered = "; ".join(f"{n}: {title!r} {shape}" for n, (title, shape) in enumerate(zip(titles, shapes, strict=True)))
    if key is not None:
        hits = [n for n, title in enumerate(titles) if key in (title, str(n))]
    elif len(signals) == 1:
        hits = [0]
    else:
        hits = [n for n, shape in enumerate(shapes) if sum(length > 1 for length in shape) == 2]
    if len(hits) != 1:
        what = f"no image {key!r}" if key is not None and not hits else f"{len(hits)} images that fit"
        raise BadInput(f"{path.name} holds {what}", f"name one with `key` (--channel): {offered[:2000]}")
    signal = signals[hits[0]]
    data = signal["data"]
    if math.prod(data.shape) * data.dtype.itemsize > SIZE_LIMIT_BYTES:
        raise BadInput(f"{path.name}: an image of shape {data.shape}", f"the limit is {SIZE_LIMIT_BYTES} bytes")
    scales = [_scale_nm(axis) for axis, length in zip(_axes(signal), data.shape, strict=False) if length > 1]
    pixel = _square(*scales[-2:]) if len(scales) in (2, 3) else None  # of three, the first counts the frames
    return Picture(np.asarray(data), pixel, None, {"format": reader, "title": titles[hits[0]]})


def _axes(signal: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(signal["axes"], key=lambda axis: axis.get("index_in_array", 0))


def _scale_nm(axis: Mapping[str, Any]) -> float | None:
    unit = _NM.get(str(axis.get("units", "")).strip().lower())
    return None if unit is None else unit * float(axis.get("scale", 0.0))


def _square(x_nm: float | None, y_nm: float | None) -> float | None:
    """The pixel size when both are known, positive and the same within 1 % (a file rounds them)."""
    if x_nm is None or y_nm is None or not (x_nm > 0 and y_nm > 0 and abs(x_nm - y_nm) < 0.01 * x_nm):
        return None
    return x_nm


def _no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise BadInput(f"{path.name} holds one image, asked for {key!r}", "leave `key` out")


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(names)[:40])
