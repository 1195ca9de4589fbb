"""A record used as a microscope: it answers what it holds, charges a pixel once, and remembers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aecontrol.errors import BadInput, InstrumentFault, RecordCannotAnswer
from aecontrol.files import read_image
from aecontrol.types import ScanRegion
from drivers.record import RecordedColumn

DATA = Path(__file__).parents[1] / "data" / "pt_single_atoms"
PIXEL = 15 / 512
ROWS, COLS = 24, 32
IMAGE = np.arange(ROWS * COLS, dtype=np.uint32).reshape(ROWS, COLS)  # every pixel tells where it is


def column(image=IMAGE):
    return RecordedColumn({"HAADF": image}, PIXEL)


def region(row, col, rows, cols, pitch=1, **change):
    """A scan of ``rows`` x ``cols`` pixels, ``pitch`` record pixels each, from record pixel (row, col)."""
    values = {
        "center_nm": ((col + cols * pitch / 2) * PIXEL, (row + rows * pitch / 2) * PIXEL),
        "fov_nm": (cols * pitch * PIXEL, rows * pitch * PIXEL),
        "shape": (rows, cols),
        "dwell_time_s": 1e-6,
    }
    return ScanRegion(**{**values, **change})


@st.composite
def regions(draw):
    pitch = draw(st.integers(1, 5))
    row, col = draw(st.integers(0, ROWS - pitch)), draw(st.integers(0, COLS - pitch))
    rows, cols = draw(st.integers(1, (ROWS - row) // pitch)), draw(st.integers(1, (COLS - col) // pitch))
    return (row, col, rows, cols, pitch)


@settings(deadline=None)
@given(shots=st.lists(regions(), min_size=1, max_size=8), cut=st.integers(0, 8))
def test_any_shots_read_the_right_pixels_charge_each_once_and_survive_a_restart(shots, cut):
    live, seen, clock = column(), set(), 0.0
    pulses = []
    for ordinal, (row, col, rows, cols, pitch) in enumerate(shots):
        scan = region(row, col, rows, cols, pitch)
        wanted = [
            [(row + i * pitch + pitch // 2) * COLS + col + j * pitch + pitch // 2 for j in range(cols)]
            for i in range(rows)
        ]
        new = set(np.ravel(wanted)) - seen
        assert live.new_pixels(scan) == len(new)
        pulse = live.fire(ordinal, scan)
        assert pulse.channels["HAADF"].tolist() == wanted
        assert (pulse.pixels, pulse.electrons, pulse.flags) == (len(new), None, ())
        assert pulse.started_s == pytest.approx(clock)
        assert pulse.seconds == pytest.approx(len(new) * 1e-6)
        seen |= new
        clock += pulse.seconds
        pulses.append(pulse)
    rebuilt = column()
    for ordinal, shot in enumerate(shots):
        if ordinal < cut:
            rebuilt.absorb(ordinal, region(*shot))
        else:
            again = rebuilt.fire(ordinal, region(*shot))
            assert (again.pixels, again.started_s) == (pulses[ordinal].pixels, pulses[ordinal].started_s)


@pytest.mark.parametrize(
    ("scan", "says"),
    [
        (region(0, 0, 4, 4, rotation_rad=0.1), r"turned by 0\.1 rad"),
        (region(0, 0, 8, 8, shape=(16, 8)), r"along y.*times 0\.0292"),
        (region(0, 0, 8, 8, shape=(8, 3)), r"along x"),
        (region(0, 29, 4, 4), r"inside the field"),
        (region(-1, 0, 4, 4), r"y = -0\.029"),
        (region(0, 0, 8, 8, center_nm=(4.3 * PIXEL, 4 * PIXEL)), r"x = 0\.0087.*move the centre by -0\.0087"),
    ],
)
def test_what_the_record_does_not_hold_is_refused_before_anything_is_revealed(scan, says):
    record = column()
    for ask in (record.check, record.new_pixels, lambda r: record.fire(0, r), lambda r: record.absorb(0, r)):
        with pytest.raises(RecordCannotAnswer, match="(?s)" + says):
            ask(scan)
    assert record.fire(0, region(0, 0, ROWS, COLS)).pixels == ROWS * COLS


def test_a_region_rounded_in_the_last_digits_still_lies_on_the_grid():
    scan = region(3, 5, 4, 4, center_nm=(7 * PIXEL + 3e-7, 5 * PIXEL - 3e-7))
    assert column().fire(0, scan).channels["HAADF"][0, 0] == 3 * COLS + 5


def test_a_shot_is_never_repeated_but_one_that_came_too_late_is_left_out():
    record = column()
    for ordinal in (0, 2):
        record.fire(ordinal, region(0, 0, 4, 4))
        with pytest.raises(InstrumentFault, match="order"):
            record.fire(ordinal, region(0, 0, 4, 4))


def test_a_hole_in_the_record_is_flagged_only_where_it_is_read():
    image = IMAGE.astype(float)
    image[3, 3] = np.nan
    record = column(image)
    assert record.fire(0, region(0, 0, 4, 4)).flags == ("nan",)
    assert record.fire(1, region(0, 0, 2, 2, 2)).flags == ("nan",)
    assert record.fire(2, region(4, 4, 4, 4)).flags == ()


def test_a_delivered_frame_is_the_callers_own():
    record = column()
    record.fire(0, region(0, 0, 4, 4)).channels["HAADF"][...] = 0
    assert record.fire(1, region(0, 0, 4, 4)).channels["HAADF"][1, 1] == COLS + 1


def test_the_committed_labels_sit_on_bright_spots_of_the_committed_image():
    picture = read_image(DATA / "img_021.npz")
    record = RecordedColumn({"HAADF": picture.array}, picture.pixel_size_nm, picture.labels, "Pt")
    assert record.field_nm == pytest.approx((15.0, 15.0))
    xy, labels = record.targets("atom")
    assert set(labels) == {"Pt"}
    assert len(labels) == len(xy) == 33
    assert record.targets("vacancy") is None
    image = picture.array.astype(float)

    def contrast(x, y):
        """Mean of the 7 x 7 px around a point against the 25 x 25 px around it."""
        r, c = int(y / PIXEL), int(x / PIXEL)
        return image[r - 3 : r + 4, c - 3 : c + 4].mean() / image[r - 12 : r + 13, c - 12 : c + 13].mean()

    inner = xy[((xy > 0.5) & (xy < 14.5)).all(1)]
    right = np.mean([contrast(x, y) for x, y in inner])
    swapped = np.mean([contrast(y, x) for x, y in inner])
    assert right > 1.1 > swapped + 0.05


@pytest.mark.parametrize(
    ("channels", "pixel"), [({}, 1.0), ({"a": np.ones((2, 2)), "b": np.ones((2, 3))}, 1.0), ({"a": np.ones((2, 2))}, 0)]
)
def test_what_cannot_be_a_microscope_image_is_refused(channels, pixel):
    with pytest.raises(BadInput, match=r"channels|pixel size"):
        RecordedColumn(channels, pixel)
