"""The report: one file that fetches nothing, with every section, of any session whatever its state and its texts."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from aecontrol.aftermath import conclude
from aecontrol.canvas import draw_png, into_region, new_figure, place_image
from aecontrol.report import write_report
from aecontrol.session import Session
from aecontrol.types import ScanRegion
from drivers.faults import FaultyColumn

from .lattice import FIELD_NM, Sheet, lattice_session
from .parts import CountingColumn, Reckless, configuration

SECTIONS = (
    "Where it looked",
    "What it found",
    "What the policy believed",
    "What the patches look like",
    "What it cost",
    "Interruptions and faults",
    "Decisions",
    "Limits of this record",
    "Configuration as run",
    "Versions",
)


class Page(HTMLParser):
    """Tags, the addresses they fetch, and the text of a page; raises on unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.fetched, self.text, self._open = [], [], [], []
        self.feed(html)
        self.close()
        assert self._open == []
        self.words = re.sub(r"\s+", " ", " ".join(self.text))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text.append(data)


def run(folder, config, *, concluded=True):
    session = Session.create(config, folder)
    try:
        state = session.run()
        if concluded:
            conclude(folder, config, state, "cpu", 1.0, lambda text: None)
    finally:
        session.close()
    return state


def page_of(folder) -> Page:
    return Page(write_report(folder).read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "s"
    return folder, run(folder, lattice_session())


def test_it_is_one_file_with_every_section_and_says_what_was_found(finished):
    folder, state = finished
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert [t for t in SECTIONS if f"<h2>{t}</h2>" in html] == list(SECTIONS)
    assert "Left out" not in page.words
    assert "script" not in page.tags
    assert len(page.fetched) == 5
    for address in page.fetched:
        assert address.startswith("data:image/png;base64,")
        assert base64.b64decode(address.split(",")[1]).startswith(b"\x89PNG")
    assert not re.search(r"https?:|@import|url\(", html)
    assert len(html) < 4_000_000
    summary = json.loads((folder / "summary.json").read_text())
    found, matched = len(state.found()), summary["curve"]["matched"][-1]
    assert matched < found  # the perceiver shifts every ninth find, so the two must not be confused
    assert f"target objects found {found} " in page.words
    assert f"{matched:.0f} of {len(Sheet.draw().vacancies)}" in page.words
    assert f"{state.charged.electrons:,}".replace(",", " ") in page.words
    for line in summary["lines"]:
        assert line in page.words or line.startswith("report:")
    assert "simulated specimen" in page.words
    assert "Drift is not corrected" in page.words
    assert page.tags.count("tr") >= len(state.decisions)
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_session_gives_the_same_report(finished):
    folder, _ = finished
    first = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == first


def test_hostile_texts_stay_texts(tmp_path):
    evil = "<script>alert(1)</script> \"'&$x$ ${title} $\\frac"
    raw = {"session": {"name": evil}, "driver": {evil: [evil]}}
    run(tmp_path / "s", lattice_session(why=evil, note=evil, raw=raw, max_steps=2))
    page = Page((tmp_path / "s" / "report.html").read_text())
    assert "script" not in page.tags
    assert page.words.count(evil) >= 4  # name, reasons and notes arrive unchanged


def test_a_record_is_called_a_record_and_its_recall_is_drawn_beside_any_other_policy(tmp_path):
    folder = tmp_path / "s"
    run(folder, lattice_session(electrons=None, pixels=40_000, max_steps=3))
    summary = json.loads((folder / "summary.json").read_text())
    before = Page((folder / "report.html").read_text())
    summary["comparison"] = {
        "oracle $\\frac$": {"curve": {"charge": [100.0, 30_000.0], "matched": [3.0, 30.0]}},
        "random": {},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    page = page_of(folder)
    assert page.fetched[:-1] == before.fetched[:-1]
    assert page.fetched[-1] != before.fetched[-1]
    assert "recorded image" in page.words
    assert "The dose of the record is unknown" in page.words
    assert re.search(r"electrons unknown no limit", page.words)


def test_interrupted_spoiled_and_paused(tmp_path):
    folder = tmp_path / "s"
    faults = {1: "break", 2: "nan", 3: "nan", 4: "nan"}
    state = run(folder, lattice_session(column=lambda c: FaultyColumn(c, faults)))
    assert state.phase == "paused"
    page = Page((folder / "report.html").read_text())
    assert "unusable frames in a row" in page.words
    assert "step 1: exposure" in page.words
    assert "its frame was lost" in page.words
    assert page.words.count("kept and charged, never read") == 3
    assert "interrupted, charged at its bound" in page.words
    assert "Left out: There is no readable sub-scan yet." in page.words
    assert not (folder / "picture.png").exists()


def test_a_summary_of_an_earlier_state_is_not_believed(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "s")
    summary = json.loads((folder / "summary.json").read_text())
    summary["contract"]["steps"] = 1
    (folder / "summary.json").write_text(json.dumps(summary))
    page = page_of(folder)
    assert "There is no summary of this session as it stands" in page.words
    assert "precision" not in page.words


@pytest.mark.parametrize("overview", [True, False])
def test_a_session_without_atoms_maps_or_patches_says_so(tmp_path, overview):
    folder = tmp_path / "s"
    config = configuration(Reckless(3, 0.0), CountingColumn(), lattice_session().tables.budget, overview=overview)
    run(folder, config, concluded=False)
    page = page_of(folder)
    assert page.words.count("Left out") == 2
    assert len(page.fetched) == 3


def test_a_session_that_never_began_has_a_report(tmp_path):
    Session.create(lattice_session(), tmp_path / "s").close()
    page = page_of(tmp_path / "s")
    assert page.words.count("Left out") == 6
    assert "instrument not asked" in page.words


def test_images_and_marks_of_a_turned_region_lie_where_the_region_lies():
    region = ScanRegion(center_nm=(5.0, 4.0), fov_nm=(3.0, 2.0), rotation_rad=0.4, shape=(2, 3), dwell_time_s=1e-6)
    corners = into_region(region, np.array(region.corners_nm()))
    np.testing.assert_allclose(corners, [(0, 0), (3, 0), (3, 2), (0, 2)], atol=1e-12)

    figure = Figure(figsize=(1, 1), dpi=200)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(10, 0))
    ax.set_axis_off()
    place_image(ax, region, np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), 0.0, 1.0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="raw")
    pixels = np.frombuffer(buffer.getvalue(), np.uint8).reshape(200, 200, 4)[..., :3].astype(float)
    c, s = np.cos(0.4), np.sin(0.4)
    for u, v, grey in ((-1, -0.5, 255), (0, -0.5, 0), (-1, 0.5, 0), (1, 0.5, 0)):  # pixel centres from the middle
        x, y = 5 + c * u - s * v, 4 + s * u + c * v
        np.testing.assert_array_equal(pixels[int(y * 20), int(x * 20)], grey)


def test_a_large_picture_keeps_its_rare_colours():
    from PIL import Image

    def draw():
        figure = new_figure(11, 6)
        ax = figure.subplots()
        ax.imshow(np.random.default_rng(0).random((600, 1100)), cmap="gray")
        ax.plot([500], [300], "o", ms=12, color="#E69F00")
        return figure

    with Image.open(io.BytesIO(draw_png(draw))) as image:
        assert image.mode == "P"
        rgb = np.asarray(image.convert("RGB")).astype(int)
    assert len(np.unique(rgb.reshape(-1, 3), axis=0)) > 100
    close = np.abs(rgb - (0xE6, 0x9F, 0x00)).max(axis=-1) < 16
    assert 100 < close.sum() < 1000


def test_the_stand_in_fills_its_field():
    assert Sheet.draw().atoms.max(axis=0) == pytest.approx(np.array(FIELD_NM) - 0.15)
