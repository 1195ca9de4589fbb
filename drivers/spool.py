"""The frame spool: where a pulse's pixels lie, durable and verified, until the controller has them.

Its files are named by the key's hex digest and a channel's number, never by a word that a peer chose. A frame's
``.json`` is written last, so that its presence says that every channel is complete.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aecontrol.durable import load_npy, npy_bytes, sha256_hex, write_durable
from aecontrol.errors import InstrumentFault, StorageFault
from aecontrol.types import Capabilities, ScanRegion

from .backend import Pulse

log = logging.getLogger(__name__)
_KEY = re.compile(r"[0-9a-f]{64}")
_META_BYTES = 65536
Digests = dict[str, str]
"""Detector channel -> sha256 of its .npy bytes."""


def spooled_channels(capabilities: Capabilities) -> tuple[str, ...]:
    """Every channel that a frame of this instrument can have: its detectors, then its spectra."""
    spectra = () if capabilities.spectra is None else (capabilities.spectra.channel,)
    return (*capabilities.channels, *spectra)


def frame_bytes(region: ScanRegion, capabilities: Capabilities) -> int:
    """Room that a frame of ``region`` takes at most, bytes: 8 for every number in it, and its ``.json``."""
    numbers = len(capabilities.channels)
    if region.signal == "spectra" and capabilities.spectra is not None:
        numbers += capabilities.spectra.size
    return region.pixels * 8 * numbers + _META_BYTES


class Spool:
    """Frames in ``folder`` by key; ``channels`` are all names that a frame may have, in a fixed order. Processes may
    share a folder: one writes a key, others read it once it is complete."""

    def __init__(self, folder: Path, channels: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._channels = folder, channels

    def reserve(self, key: str, nbytes: int) -> None:
        """Make sure that ``nbytes`` fit on the disk now. Raises StorageFault when they do not."""
        path = self._path(key, "room")
        try:
            with open(path, "wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, nbytes)
        except OSError as error:
            raise StorageFault(f"no room for the frame in the spool: {error}", "free disk space") from error
        finally:
            path.unlink(missing_ok=True)

    def write(self, key: str, pulse: Pulse) -> Digests:
        """Write the frame of ``pulse``; durable when it returns. Raises StorageFault, and InstrumentFault for a channel
        that the instrument did not announce."""
        digests = {}
        for name, array in pulse.channels.items():
            data = npy_bytes(array)
            write_durable(self.path(key, name), data)
            digests[name] = sha256_hex(data)
        meta = {"digests": digests, "started_s": pulse.started_s, "flags": list(pulse.flags)}
        write_durable(self._path(key, "json"), json.dumps(meta).encode())
        return digests

    def complete(self, keys: Iterable[str]) -> dict[str, Digests]:
        """Digests of those frames of ``keys`` that are complete and intact, after reading every byte of them."""
        frames = {}
        for key in keys:
            path = self._path(key, "json")
            if not path.is_file():
                continue
            try:
                digests: Digests = json.loads(path.read_bytes())["digests"]
                for name, sha in digests.items():
                    self._bytes(key, name, sha)
            except (ValueError, KeyError, InstrumentFault, StorageFault) as error:
                log.warning("the spooled frame of %s is not usable: %s", key[:12], error)
                continue
            frames[key] = digests
        return frames

    def read(
        self, key: str, digests: Mapping[str, str]
    ) -> tuple[dict[str, NDArray[np.generic]], float, tuple[str, ...]]:
        """Channels of a frame, checked against ``digests``; instrument clock at its first pixel, s; flags. Raises
        InstrumentFault when it is gone or changed."""
        about = self.about(key)
        return {name: load_npy(self._bytes(key, name, sha), name) for name, sha in digests.items()}, *about

    def about(self, key: str) -> tuple[float, tuple[str, ...]]:
        """Instrument clock at a frame's first pixel, s, and its flags. Raises InstrumentFault when there is none."""
        try:
            meta = json.loads(self._path(key, "json").read_bytes())
            return float(meta["started_s"]), tuple(meta["flags"])
        except (OSError, ValueError, KeyError) as error:
            raise InstrumentFault(f"the frame of {key[:12]} is no longer in the spool: {error}") from error

    def keys(self) -> list[str]:
        """Every key that has a complete frame here."""
        return [path.stem for path in self.folder.glob("*.json") if _KEY.fullmatch(path.stem)]

    def delete(self, key: str, channels: Iterable[str]) -> None:
        """Delete these channels of a frame, and its ``.json``. Safe to repeat."""
        for name in channels:
            self.path(key, name).unlink(missing_ok=True)
        self._path(key, "json").unlink(missing_ok=True)

    def path(self, key: str, channel: str) -> Path:
        """Where one channel of a frame lies. Raises InstrumentFault for a channel that was not announced."""
        if channel not in self._channels:
            raise InstrumentFault(
                f"a frame with channel {channel!r}, the instrument announced {', '.join(self._channels)}",
                "name every channel in the capabilities",
            )
        return self._path(key, f"{self._channels.index(channel)}.npy")

    # ------------------------------------------------------------ inside

    def _path(self, key: str, ending: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InstrumentFault(f"{key[:80]!r} is not a key", "keys are 64 hex digits")
        return self.folder / f"{key}.{ending}"

    def _bytes(self, key: str, name: str, sha: str) -> bytes:
        try:
            descriptor = os.open(self.path(key, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(descriptor, "rb") as handle:
                data = handle.read()
        except OSError as error:
            raise InstrumentFault(f"frame {key[:12]}, channel {name} is gone: {error}") from error
        if sha256_hex(data) != sha:
            raise InstrumentFault(f"frame {key[:12]}, channel {name} does not match its digest")
        return data
