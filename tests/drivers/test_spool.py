"""The spool hands out only what it was given, whole, and only under names that it chose itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aecontrol.durable import npy_bytes, sha256_hex
from aecontrol.errors import InstrumentFault, StorageFault
from aecontrol.types import Capabilities, ScanRegion, SpectrumAxis
from drivers.backends.base import Shot
from drivers.spool import Spool, frame_bytes, spooled_channels

KEY = "a" * 64
IMAGE = np.arange(12, dtype=np.float32).reshape(3, 4)
SHOT = Shot({"HAADF": IMAGE, "BF": IMAGE[::-1]}, 10, 12, 1.0, 0.5, ("partial",))


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool", ("HAADF", "BF"))


def test_a_frame_comes_back_as_it_was_until_it_is_deleted(spool):
    digests = spool.write(KEY, SHOT)
    assert digests["HAADF"] == sha256_hex(npy_bytes(IMAGE))
    assert spool.complete([KEY, "b" * 64]) == {KEY: digests}
    channels, started_s, flags = spool.read(KEY, digests)
    assert np.array_equal(channels["BF"], IMAGE[::-1])
    assert (started_s, flags) == (0.5, ("partial",))
    spool.delete(KEY, digests)
    spool.delete(KEY, digests)
    assert spool.complete([KEY]) == {}
    with pytest.raises(InstrumentFault, match="no longer"):
        spool.read(KEY, digests)


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "link", "json"])
def test_a_damaged_or_foreign_frame_is_none(spool, tmp_path, harm):
    digests = spool.write(KEY, SHOT)
    path = spool.path(KEY, "BF")
    data = path.read_bytes()
    if harm == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "cut":
        path.write_bytes(data[:-1])
    elif harm == "json":
        path.with_name(f"{KEY}.json").write_text("{}")
    else:
        path.rename(tmp_path / "elsewhere")
        if harm == "link":
            path.symlink_to(tmp_path / "elsewhere")
    assert spool.complete([KEY]) == {}
    if harm != "json":
        with pytest.raises(InstrumentFault):
            spool.read(KEY, digests)


@given(name=st.text(max_size=70).filter(lambda text: len(text) != 64))
def test_no_word_from_outside_becomes_a_path(tmp_path_factory, name):
    spool = Spool(tmp_path_factory.getbasetemp() / "names", ("HAADF",))
    for call in (lambda: spool.path(name, "HAADF"), lambda: spool.path(KEY, name), lambda: spool.reserve(name, 1)):
        with pytest.raises(InstrumentFault):
            call()


def test_room_is_checked_and_counts_every_energy(spool):
    with pytest.raises(StorageFault, match="no room"):
        spool.reserve(KEY, 1 << 60)
    spool.reserve(KEY, 1 << 20)
    known = Capabilities(
        identity="x",
        simulated=True,
        unit="pixels",
        field_nm=(1.0, 1.0),
        channels=("HAADF",),
        spectra=SpectrumAxis(size=1000, offset_eV=0.0, scale_eV=1.0),
    )
    images = ScanRegion(center_nm=(0.5, 0.5), fov_nm=(1.0, 1.0), shape=(10, 10), dwell_time_s=1e-6)
    spectra = images.model_copy(update={"signal": "spectra"})
    assert spooled_channels(known) == ("HAADF", "EELS")
    assert frame_bytes(spectra, known) - frame_bytes(images, known) == 10 * 10 * 1000 * 8
