import math

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, mx2
from ase.spacegroup import crystal
from pydantic import ValidationError
from scipy.spatial import cKDTree

from aecontrol.errors import BadInput
from simulators.specimens.sheets import Mos2, SulphurVacancies
from simulators.specimens.structure import Structure


def strontium_titanate():
    return crystal(
        ["Sr", "Ti", "O"], [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)], spacegroup=221, cellpar=[3.905] * 3 + [90] * 3
    )


def saved(folder, atoms, name="cell.cif"):
    ase.io.write(folder / name, atoms)
    return str(folder / name)


def test_a_sheet_from_a_file_is_the_sheet_of_the_builder(tmp_path):
    path = saved(tmp_path, mx2("MoS2", "2H", a=3.16, thickness=3.13, vacuum=5.0), "cell.xyz")
    read = Structure(path=path, size_nm=(6, 5), rotation_deg=7.0).build(0)
    built = Mos2(size_nm=(6, 5), vacancies=SulphurVacancies(background_fraction=0, n_clusters=0)).build(0)
    where, labels = read.targets("atom")
    expected, names = built.targets("atom")
    distance, order = cKDTree(where).query(expected)
    assert distance.max() < 1e-6
    assert [labels[k] for k in order] == list(names)
    assert len(where) == len(expected)
    assert sorted(set(np.round(read.positions_A[:, 2], 6))) == pytest.approx([0.0, 1.565, 3.13])


def test_a_thick_crystal_has_its_density_and_its_columns(tmp_path, monkeypatch):
    saved(tmp_path, strontium_titanate())
    monkeypatch.chdir(tmp_path)
    specimen = Structure(path="cell.cif", size_nm=(7, 9), rotation_deg=31.0, thickness_nm=4.0).build(0)
    assert specimen.thickness_nm == pytest.approx(10.5 * 0.3905)  # eleven cells reach 4 nm, the last layer is half up
    core = np.all((specimen.positions_A[:, :2] > 0) & (specimen.positions_A[:, :2] < (70, 90)), axis=1)
    for number, per_cell in ((38, 1), (22, 1), (8, 3)):
        count = np.count_nonzero(core & (specimen.atomic_numbers == number))
        assert count == pytest.approx(11 * per_cell * 70 * 90 / 3.905**2, rel=0.03)
    where, labels = specimen.targets("atom")
    assert set(labels) == {"Sr", "Ti", "O"}
    share = {symbol: labels.count(symbol) / len(labels) for symbol in set(labels)}
    assert share == pytest.approx({"Sr": 0.25, "Ti": 0.25, "O": 0.5}, abs=0.02)
    assert cKDTree(where).query(where, k=2)[0][:, 1].min() == pytest.approx(0.3905 / 2, abs=1e-6)
    titanium = specimen.column_id[core & (specimen.atomic_numbers == 22)]
    assert set(np.bincount(specimen.column_id)[titanium]) == {22}  # as many O above each other as Ti


def test_columns_hold_across_the_border_of_the_cell_and_end_at_the_limit(tmp_path):
    cell = [4.0, 5.0, 3.0]
    pair = Atoms("OSr2Ti", positions=[(0.1, 1, 0), (3.9, 1, 1), (2.0, 0.05, 0), (2.0, 4.7, 1.5)], cell=cell, pbc=True)
    specimen = Structure(path=saved(tmp_path, pair), size_nm=(4, 4)).build(0)
    shared = {"O": 2, "Sr": None, "Ti": 1}  # O and Sr are 0.2 angstrom apart through the border, Sr and Ti 0.35
    counts = np.bincount(specimen.column_id)[specimen.column_id]
    inside = np.all((specimen.positions_A[:, :2] > 1) & (specimen.positions_A[:, :2] < 39), axis=1)
    for symbol, size in shared.items():
        if size is not None:
            assert set(counts[inside & (specimen.site == symbol)]) == {size}
    for number in np.unique(specimen.column_id[inside]):
        assert np.ptp(specimen.positions_A[specimen.column_id == number, :2], axis=0).max() < 0.3


def test_a_leaning_axis_within_a_degree_is_kept_and_beyond_refused(tmp_path):
    def leaning(degrees):
        angle = math.radians(degrees)
        cell = [[4.0, 0, 0], [0, 4.0, 0], [10 * math.sin(angle), 0, 10 * math.cos(angle)]]
        return saved(tmp_path, Atoms("Au", cell=cell, pbc=True), f"{degrees}.xyz")

    specimen = Structure(path=leaning(0.9), size_nm=(3, 3), thickness_nm=5.0).build(0)
    column = specimen.positions_A[specimen.column_id == specimen.column_id[len(specimen) // 2]]
    steps = np.diff(column[np.argsort(column[:, 2])], axis=0)
    assert np.degrees(np.arctan2(np.hypot(steps[:, 0], steps[:, 1]), steps[:, 2])) == pytest.approx(0.9)
    with pytest.raises(BadInput, match=r"leans 1\.2 degrees"):
        Structure(path=leaning(1.2)).build(0)
    with pytest.raises(BadInput, match="leans"):
        Structure(path=saved(tmp_path, bulk("Au"), "fcc.xyz")).build(0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_handedness_survives_either_order_of_a_and_b(tmp_path, order):
    atoms = Atoms("AuSrTiO", positions=[(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], pbc=True)
    atoms.cell = np.diag([6.0, 7.0, 5.0])[[*order, 2]]
    specimen = Structure(path=saved(tmp_path, atoms, "cell.xyz"), size_nm=(3, 3)).build(0)
    gold = specimen.positions_A[
        np.argmin(np.linalg.norm(specimen.positions_A - (15, 15, 2), axis=1) + 99 * (specimen.site != "Au"))
    ]
    nearest = [
        specimen.positions_A[specimen.site == s][
            np.argmin(np.linalg.norm(specimen.positions_A[specimen.site == s] - gold, axis=1))
        ]
        for s in ("Sr", "Ti", "O")
    ]
    assert np.linalg.det(np.array(nearest) - gold) == pytest.approx(1.0, abs=1e-6)


def broken(folder, what):
    if what == "missing":
        return str(folder / "nothing.cif"), "is not there"
    if what == "folder":
        return str(folder), "is not there"
    if what == "nonsense":
        (folder / "cell.cif").write_text("not a crystal\n")
        return str(folder / "cell.cif"), "cannot read|holds no atoms"
    if what == "unknown format":
        (folder / "cell.abc").write_bytes(bytes(range(256)))
        return str(folder / "cell.abc"), "cannot read"
    if what == "molecule":
        return saved(folder, Atoms("CO", positions=[(0, 0, 0), (0, 0, 1.1)]), "cell.xyz"), "no cell"
    if what == "flat cell":
        return saved(folder, Atoms("C", cell=[[2, 0, 0], [1, 0, 0], [0, 0, 3]]), "cell.xyz"), "no volume"
    if what == "element":
        return saved(folder, Atoms("Xe", cell=[4, 4, 4], pbc=True), "cell.xyz"), "54"
    return saved(folder, Atoms("Au", positions=[(np.nan, 0, 0)], cell=[4, 4, 4]), "cell.xyz"), "not finite"


@pytest.mark.parametrize(
    "what", ["missing", "folder", "nonsense", "unknown format", "molecule", "flat cell", "element", "not finite"]
)
def test_a_file_that_is_no_crystal_is_refused_with_a_reason(tmp_path, what):
    path, reason = broken(tmp_path, what)
    with pytest.raises(BadInput, match=reason):
        Structure(path=path).build(0)


def test_impossible_settings_are_refused():
    for wrong in ({}, {"path": "a.cif", "thickness_nm": 0.0}, {"path": "a.cif", "size_nm": (0.0, 5.0)}):
        with pytest.raises(ValidationError):
            Structure.model_validate(wrong)
