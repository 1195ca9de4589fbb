"""Image files: what is read is what was written, and whatever is wrong ends as one clear error."""

import builtins
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aecontrol import files
from aecontrol.errors import BadInput
from aecontrol.files import read_image

DATA = Path(__file__).parent / "data" / "pt_single_atoms"
IMAGE = (np.arange(20 * 30).reshape(20, 30) % 251).astype(np.uint16)


def packed(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def tiff(**settings_):
    stream = io.BytesIO()
    tifffile.imwrite(stream, IMAGE, **settings_)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_the_committed_pictures_are_complete():
    for name, atoms in (("img_021.npz", 33), ("img_034.npz", 44)):
        picture = read_image(DATA / name)
        assert (picture.array.shape, picture.array.dtype) == ((512, 512), np.uint32)
        assert picture.pixel_size_nm == pytest.approx(15 / 512)
        assert len(picture.labels) == atoms


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", packed(image=IMAGE, other=IMAGE + 1)),
        ("a.npz", packed(HAADF=IMAGE, xy_px=np.ones((5, 2)), atoms_xyz_nm=np.ones((5, 3)))),
        ("a.npy", npy(IMAGE)),
        ("a.npy", npy(IMAGE.astype(">u2"))),
        ("a.npy", npy(IMAGE[None, :, :, None])),
        ("a.tif", tiff()),
        ("A.TIFF", tiff(compression="zlib")),
    ],
)
def test_an_image_comes_back_as_it_was_written(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    picture = read_image(tmp_path / name)
    np.testing.assert_array_equal(picture.array, IMAGE)
    assert picture.array.dtype == np.uint16
    assert picture.pixel_size_nm is None
    assert not picture.array.flags.writeable


def test_scale_labels_and_a_named_array_are_read_from_an_archive(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(packed(first=IMAGE, second=IMAGE + 1, pixel_size_nm=0.03, xy_px=np.asarray([[1.5, 2.5]])))
    picture = read_image(path, key="second")
    assert picture.array[0, 0] == 1
    assert picture.pixel_size_nm == 0.03
    assert picture.labels.tolist() == [[1.5, 2.5]]


@pytest.mark.parametrize(
    ("unit", "per_unit", "expected"), [("nm", 50.0, 0.02), ("um", 2e4, 0.05), ("pixel", 1.0, None)]
)
def test_the_scale_of_an_imagej_tiff_is_read(tmp_path, unit, per_unit, expected):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(imagej=True, resolution=(per_unit, per_unit), metadata={"unit": unit}))
    assert read_image(path).pixel_size_nm == (None if expected is None else pytest.approx(expected))


class Bomb:
    """Unpickling it would be seen."""

    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.npy", b"", "empty"),
        ("a.npy", b"not an array", "could not be read"),
        ("a.npz", b"PK\x03\x04 not an archive", "could not be read"),
        ("a.npz", packed(image=IMAGE)[:-40], "could not be read"),
        ("a.tif", tiff()[:100], "could not be read"),
        ("a.npy", npy(np.full((4, 4), np.nan)), "no finite pixel"),
        ("a.npy", npy(np.ones((3, 4, 5))), r"shape \(3, 4, 5\)"),
        ("a.npy", npy(np.ones(7)), r"shape \(7,\)"),
        ("a.npy", npy(np.ones((0, 4))), r"empty image, shape \(0, 4\)"),
        ("a.npy", npy(np.ones((4, 4), complex)), "complex"),
        ("a.npy", npy(np.asarray(["a"])), "values of type"),
        ("a.npy", pickle.dumps(Bomb()), "could not be read"),
        ("a.npz", packed(one=IMAGE, two=IMAGE), "2 images.*'one', 'two'"),
        ("a.npz", packed(xy=np.ones((9, 2))), "no array that looks like an image.*'xy'"),
        ("a.npz", packed(image=IMAGE, pixel_size_nm=-1.0), "pixel_size_nm"),
        ("a.npz", packed(image=IMAGE, xy_px=np.ones(3)), r"xy_px of shape \(3,\)"),
        ("a.xyz", b"1\n", "no reader for '.xyz'"),
        ("a.dm3", b"not a DM file", "could not be read"),
    ],
)
def test_each_bad_file_is_refused_with_what_is_wrong(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match="(?s)" + says):
        read_image(tmp_path / name)


def test_a_missing_file_a_folder_and_a_wrong_key_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no file"):
        read_image(tmp_path / "missing.npz")
    with pytest.raises(BadInput, match="folder"):
        read_image(tmp_path)
    with pytest.raises(BadInput, match=r"'nothing'.*\n.*'image'"):
        read_image(DATA / "img_021.npz", key="nothing")
    (tmp_path / "a.npy").write_bytes(npy(IMAGE))
    with pytest.raises(BadInput, match="leave `key` out"):
        read_image(tmp_path / "a.npy", key="image")


def test_an_object_array_is_never_unpickled(tmp_path):
    for name, write in (("a.npy", np.save), ("a.npz", lambda p, a: np.savez(p, image=a))):
        array = np.empty((9, 9), object)
        array[0, 0] = Bomb()
        write(tmp_path / name, array)
        with pytest.raises(BadInput, match="could not be read"):
            read_image(tmp_path / name)


def test_sizes_are_refused_before_anything_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("image.npy", npy(np.zeros((3000, 3000), np.uint8)))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(BadInput, match="unpacks from"):
        read_image(path)
    monkeypatch.setattr(files, "SIZE_LIMIT_BYTES", 1000)
    for name, content in (("b.npy", npy(IMAGE)), ("b.tif", tiff(compression="zlib"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match="limit is 1000"):
            read_image(tmp_path / name)


def test_names_in_an_archive_are_never_paths(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("../../outside.npy", npy(IMAGE))
    np.testing.assert_array_equal(read_image(tmp_path / "a.npz").array, IMAGE)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["npz", "npy", "tif"]),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=6),
)
def test_a_damaged_file_gives_a_picture_or_a_clear_error(tmp_path, kind, cut, flips):
    content = bytearray({"npz": packed(image=IMAGE), "npy": npy(IMAGE), "tif": tiff()}[kind])
    for place, change in flips:
        content[place % len(content)] ^= change
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content[: len(content) - cut])
    told = path.name
    try:
        picture = read_image(path)
    except BadInput as error:
        told = str(error)
    else:
        assert picture.array.ndim == 2
    assert path.name in told


def test_a_microscopy_format_is_read_with_its_scale(tmp_path):
    hspy = pytest.importorskip("rsciio.hspy")
    axes = [
        {
            "name": name,
            "size": size,
            "scale": 0.25,
            "offset": 0.0,
            "units": "Å",
            "navigate": False,
            "_type": "UniformDataAxis",
        }
        for name, size in (("y", 20), ("x", 30))
    ]
    signal = {
        "data": IMAGE,
        "axes": axes,
        "metadata": {"General": {"title": "HAADF"}},
        "original_metadata": {},
        "learning_results": {},
        "package_info": {"package": "", "package_version": ""},
        "tmp_parameters": {},
        "attributes": {"_lazy": False, "ragged": False},
        "models": {},
    }
    hspy.file_writer(str(tmp_path / "a.hspy"), signal)
    for key in (None, "HAADF", "0"):
        picture = read_image(tmp_path / "a.hspy", key)
        np.testing.assert_array_equal(picture.array, IMAGE)
        assert picture.pixel_size_nm == pytest.approx(0.025)
    with pytest.raises(BadInput, match=r"no image 'BF'.*\n.*'HAADF'"):
        read_image(tmp_path / "a.hspy", "BF")


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "rsciio":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    (tmp_path / "a.dm4").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"\.dm4.*\n.*\.\[files\]"):
        read_image(tmp_path / "a.dm4")
