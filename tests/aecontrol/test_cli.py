"""The command line from outside: every mistake is named, costs nothing, and exits with 2; light commands stay light."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = (CONFIGS / "short.toml").read_text()


def changed(*pairs):
    text = GOOD
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


MISTAKES = {
    "unknown key": (changed(("[session]\n", "[session]\ncolour = 1\n")), ["session.colour", "unknown key"]),
    "unknown table": (GOOD + "\n[sessoin]\n", ["sessoin", "unknown key"]),
    "unknown driver": (changed(('kind = "simulated"', 'kind = "imaginary"')), ["imaginary", "simulated"]),
    "unknown specimen": (changed(('kind = "mos2"', 'kind = "kryptonite"')), ["kryptonite", "mos2"]),
    "unknown policy": (changed(('kind = "bayes"', 'kind = "oracle"')), ["oracle", "bayes"]),
    "negative dwell": (changed(("dwell_time_s = ", "dwell_time_s = -")), ["dwell_time_s", "greater than 0"]),
    "zero size": (changed(("fov_nm = [", "fov_nm = [0.0, 2.0] #")), ["fov_nm", "greater than 0"]),
    "NaN": (changed(("match_nm = 0.1", "match_nm = nan")), ["match_nm", "nan"]),
    "overview outside the field": (
        changed(("[overview]", "[overview]\nfov_nm = [8.0, 8.0]\ncenter_nm = [1.0, 1.0]")),
        ["overview", "outside the field"],
    ),
    "sub-scan larger than the field": (changed(("fov_nm = [", "fov_nm = [500.0, 2.0] #")), ["500", "field"]),
    "budget below the overview": (changed(("electrons = ", "electrons = 10 # ")), ["overview", "electrons", "budget"]),
    "no budget": (changed(("electrons = ", "# ")), ["budget"]),
    "damage as a cost that nothing charges": (
        changed(('kind = "bayes"', 'kind = "bayes"\ncost = "damage"')),
        ["policy.cost", "[damage]"],
    ),
    "not TOML": ("[session\n", ["not valid TOML"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_costs_nothing(aecontrol, tmp_path, name):
    text, words = MISTAKES[name]
    (tmp_path / "config.toml").write_text(text)
    code, _, said = aecontrol("run", "config.toml", "--out", "s")
    assert code == 2, said
    for word in words:
        assert word in said
    ledger = tmp_path / "s" / "instrument" / "ledger.sqlite"
    if ledger.exists():  # refused once the instrument had said what it is: its own ledger shows that nothing fired
        from aecontrol.journal import read_journal

        assert not [body for body in read_journal(ledger) if "FIRING" in body]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "nowhere.toml"], "nowhere.toml does not exist"),
        (["resume", "nowhere"], "holds no session"),
        (["run", "config.toml", "--seed", "-1"], "seed"),
        (["run", "config.toml", "--device", "abacus"], "abacus"),
        (["inspect", "nowhere.tif"], "nowhere.tif"),
    ],
)
def test_a_wrong_argument_is_named(aecontrol, tmp_path, arguments, word):
    (tmp_path / "config.toml").write_text(GOOD)
    code, _, said = aecontrol(*arguments)
    assert code == 2
    assert word in said


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["doctor"], ["schema"], ["verify", "--help"]])
def test_light_commands_are_light(tmp_path, arguments):
    probe = (
        "import sys, aecontrol.cli as c\n"
        f"sys.argv = ['aecontrol', *{arguments!r}]\n"
        "try:\n    c.main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'torch', 'botorch', 'pyro', 'ase', 'matplotlib', 'scipy', 'skimage', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, check=False)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.0


def test_the_schema_describes_every_part(aecontrol):
    schema = json.loads(aecontrol("schema")[1])
    parts = {name: body for name, body in schema["$defs"].items() if name.count(".") == 1}
    kinds = {name.removeprefix("policy.") for name in parts if name.startswith("policy.")}
    assert {option["$ref"] for option in schema["properties"]["policy"]["oneOf"]} == {
        f"#/$defs/policy.{kind}" for kind in kinds
    }
    assert parts["specimen.llzo"]["properties"]["thickness_nm"]["description"]
    assert {"simulation.scan", "simulation.tem", "simulation.training"} <= set(parts)
    assert {"bayes", "random", "raster", "serpentine", "sobol", "greedy"} <= kinds


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    from aecontrol.config import load

    raw = tomllib.loads(path.read_text())
    if "session" in raw:
        config = load(path)
        drift = raw["driver"].get("scan", {}).get("drift_nm_per_s", [0.0, 0.0])
        assert drift == [0.0, 0.0] or config.tables.drift is not None
        assert config.plan.budget.electrons or config.plan.budget.pixels


def recorded(path):
    text = (CONFIGS / "pt_single_atoms.toml").read_text()
    return text.replace("../tests/data/pt_single_atoms/img_021.npz", path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "image.npz"),
        (b"PK\x03\x04 this is not an archive", "image.npz"),
        (b"", "empty"),
    ],
)
def test_an_image_that_cannot_be_read_costs_nothing(aecontrol, tmp_path, content, word):
    if content is not None:
        (tmp_path / "image.npz").write_bytes(content)
    (tmp_path / "config.toml").write_text(recorded("image.npz"))
    code, _, said = aecontrol("run", "config.toml", "--out", "s")
    assert code == 2, said
    assert word in said
    assert not (tmp_path / "s" / "session.sqlite").exists()  # the folder can be used again


def test_a_folder_in_use_is_refused(aecontrol, tmp_path):
    from aecontrol.durable import FolderLock

    (tmp_path / "config.toml").write_text(GOOD)
    (tmp_path / "s").mkdir()
    lock = FolderLock(tmp_path / "s")
    code, _, said = aecontrol("run", "config.toml", "--out", "s")
    lock.release()
    assert code == 2
    assert "in use by another run" in said
