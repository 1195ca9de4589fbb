"""Ground truth is for the scorer alone, and light modules stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aecontrol.session import Session
from aecontrol.types import Budget

from .parts import CountingColumn, Reckless, configuration

ROOT = Path(__file__).parents[2]


def test_a_session_never_asks_for_the_truth(tmp_path):
    class Jealous(CountingColumn):
        def targets(self, kind):
            raise AssertionError("somebody asked for the truth while the session ran")

    session = Session.create(configuration(Reckless(1, 0.0), Jealous(), Budget(electrons=10**6)), tmp_path / "s")
    assert session.run().stopped is not None
    session.close()


@pytest.mark.parametrize("folder", ["policies", "aecontrol/perception"])
def test_no_policy_or_perceiver_names_truth_or_an_instrument(folder):
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        for word in (".truth(", "HasTruth", "Microscope", ".targets(", ".noiseless(", ".snapshot(", ".changes("):
            assert word not in text, f"{path} mentions {word}"


@pytest.mark.parametrize(
    "modules",
    [
        "aecontrol, aecontrol.session, aecontrol.config, aecontrol.verify",
        "drivers, drivers.instrument, drivers.simulated, drivers.recorded, drivers.contract",
        "policies.baselines, policies.bayes",
        "aecontrol.perception.perceiver",
        "simulators.specimens.sheets, simulators.scenes",
    ],
)
def test_importing_is_light(modules):
    code = (
        f"import sys, {modules}\n"
        "heavy = {'torch', 'botorch', 'pyro', 'ase', 'matplotlib', 'skimage', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
