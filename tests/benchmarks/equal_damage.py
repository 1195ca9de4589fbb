"""Targets found at equal true damage: a session that is charged for damage against one that counts electrons.

    python tests/benchmarks/equal_damage.py [--seeds 20] [--control] [--oracle] [--faults] [--config FILE]

Each row is a pair of sessions on fresh copies of one specimen: the same policy, windows, dwell times and overview. The
first measures at sacrificed places what the beam does, and chooses by targets per damage; the second chooses by targets
per electron. Found: matched to a true vacancy, once. Damage: what the simulated beam did to all atoms, in sacrificed
places and the overview too, weighed by scattering power. Both curves are read at the smaller of the final damages.

--control: a specimen without zones, where there is nothing to gain. --oracle: the response is not measured but known,
and nothing is sacrificed; what is left is what the policy makes of charges. --faults: requests and replies get lost on
the way to the instrument and the process dies, again and again; the session is taken up where its journal ends.

Exceeded: sessions in which electrons or damage charged are beyond their budget, or electrons delivered beyond those
charged. Beyond: sessions whose true damage outside the sacrificed places is more than the budget of damage.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from aecontrol.aftermath import known_truth
from aecontrol.config import SessionConfig, parse
from aecontrol.errors import InstrumentFault
from aecontrol.protocols import Truth
from aecontrol.response import Response, prior
from aecontrol.scoring import recall_curve
from aecontrol.session import Session
from aecontrol.state import State
from aecontrol.true_damage import true_damage
from aecontrol.types import Plan
from drivers.faults import CallFault, FaultyMicroscope

FIRST_SEED = 2000
ELECTRONS = 350_000_000
"""Budget of the session that counts electrons: about as much damage as the other one may do."""
CONTROL_E_PER_A2 = 1.0e5
"""Critical fluence everywhere in the control."""
MARGIN = 4
"""Tiles around the field whose damage counts too."""


class Curve(NamedTuple):
    """After each exposure of a session: true damage, nm^2, and targets found; and what was charged in the end."""

    damage: NDArray[np.float64]
    found: NDArray[np.float64]
    steps: int
    charged: float
    within: bool
    beyond: bool
    stopped: str
    again: int

    def at(self, damage: float) -> float:
        """Targets found when the damage was so much, straight in between."""
        return float(np.interp(damage, self.damage, self.found))


class Treacherous(NamedTuple):
    """A driver whose instrument loses a request or a reply sooner or later, in every process at another call."""

    driver: Any
    random: np.random.Generator

    def build(self, folder: Path, base: Path, seed: int) -> FaultyMicroscope:
        """The instrument, and what will go wrong."""
        verb = str(self.random.choice(["expose", "fetch", "cancel"], p=[0.5, 0.4, 0.1]))
        fault: CallFault = "before" if self.random.random() < 0.5 else "after"
        number = int(self.random.integers(12)) if verb != "cancel" else 0
        return FaultyMicroscope(self.driver.build(folder, base, seed), {(verb, number): fault})


def finished(config: SessionConfig, folder: Path) -> tuple[State, int]:
    """The final state of a new session, and how often it was taken up again."""
    session, again = Session.create(config, folder), 0
    while True:
        try:
            return session.run(device="cpu"), again
        except InstrumentFault:
            session.close()
            session, again = Session.reopen(folder, config), again + 1
        finally:
            if session.state.phase in ("stopped", "paused"):
                session.close()


def run(raw: dict, base: Path, folder: Path, faults: bool) -> Curve:
    """One session, and what it did."""
    config = parse(raw, base)
    driver = Treacherous(config.driver, np.random.default_rng(raw["session"]["seed"])) if faults else config.driver
    state, again = finished(replace(config, driver=driver), folder)
    truth = known_truth(folder, config)
    assert truth is not None
    assert truth.sites is not None
    scans = {scan.key: scan.observation for scan in state.scans}
    finds, ends = [], []
    for key, record in state.keys.items():
        if key in state.frames:
            found = scans[key].found if key in scans else ()
            finds.append(np.array([(atom.x_nm, atom.y_nm) for atom in found]).reshape(-1, 2))
            ends.append(state.frames[key].started_s + record.charge.seconds)
    field_nm = state.capabilities.field_nm
    damage = [0.0] + [float(true_damage(truth, field_nm, MARGIN, end + 1e-9).sum()) for end in ends]
    recall = recall_curve(finds, truth.targets, state.plan.match_nm)
    budget, charged = state.plan.budget, state.charged
    within = charged.damage <= (budget.damage or np.inf) and charged.electrons <= (budget.electrons or np.inf)
    within &= (truth.electrons_delivered or 0) <= charged.electrons
    beyond = budget.damage is not None and _outside(state.plan, truth, field_nm) > budget.damage
    why = state.paused or (state.stopped.cause if state.stopped else "?")
    found = np.append(0.0, recall * len(truth.targets))
    return Curve(np.array(damage), found, len(scans), charged.damage, within, beyond, why, again)


def _outside(plan: Plan, truth: Truth, field_nm: tuple[float, float]) -> float:
    """True damage outside the sacrificed places, nm^2."""
    share = true_damage(truth, field_nm, MARGIN)
    for place in plan.damage.references if plan.damage else ():
        low, high = (np.floor(np.array(place.center_nm) + sign * np.array(plan.damage.fov_nm) / 2) for sign in (-1, 1))
        (left, top), (right, bottom) = low.astype(int) + MARGIN, high.astype(int) + MARGIN + 1
        share[top:bottom, left:right] = 0.0
    return float(share.sum())


def known_response(raw: dict, phases: tuple[str, ...]) -> Response:
    """The true response of the ``phases``, known to 10 %. All but the soft one are hardy."""
    table = raw["driver"]["damage"]
    softer = table["zones"][0]["factor"] if "zones" in table else 1.0
    true = [table["critical_fluence_e_per_A2"]["S"] * (softer if phase == "soft" else 1.0) for phase in phases]
    guess = prior(phases, 1.0, 1.0)
    spread = np.array(guess.critical_fluence_e_per_A2[0]) ** 0.05
    critical = tuple(tuple((value * spread).tolist()) for value in true)
    update = {"critical_fluence_e_per_A2": critical, "tested_e_per_A2": (1e9,) * len(phases)}
    return guess.model_copy(update=update)


def pair(raw: dict, base: Path, seed: int, oracle: bool, faults: bool, work: Path) -> tuple[Curve, Curve]:
    """Both sessions of a seed."""
    first, second = work / f"{seed}-damage", work / f"{seed}-electrons"
    aware = copy.deepcopy(raw)
    aware["session"]["seed"] = seed
    blind = copy.deepcopy(aware)
    del blind["damage"], blind["areas"]
    blind["budget"], blind["policy"]["cost"] = {"electrons": ELECTRONS}, "electrons"
    if not oracle:
        return run(aware, base, first, faults), run(blind, base, second, faults)
    aware["damage"]["references"] = []
    with patch("aecontrol.harm.prior", lambda phases, *_: known_response(raw, phases)):
        known = run(aware, base, first, faults)
    return known, run(blind, base, second, faults)


def interval(aware: NDArray[np.float64], blind: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the ratio of sums: paired percentile bootstrap over the seeds."""
    random = np.random.default_rng(0)
    chosen = random.integers(len(aware), size=(20_000, len(aware)))
    low, high = np.quantile(aware[chosen].sum(axis=1) / blind[chosen].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=FIRST_SEED)
    parser.add_argument("--config", type=Path, default=Path("configs/radiolytic.toml"))
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--faults", action="store_true")
    options = parser.parse_args()
    raw = tomllib.loads(options.config.read_text())
    if options.control:
        table = raw["driver"]["damage"]
        del table["zones"]
        table["critical_fluence_e_per_A2"] = dict.fromkeys(table["critical_fluence_e_per_A2"], CONTROL_E_PER_A2)
    print(
        "      charged for damage: found  steps  nm^2  charged   electrons: found  steps  nm^2   at equal damage  gain"
    )
    at_equal, exceeded, beyond, again = [], 0, 0, 0
    with tempfile.TemporaryDirectory() as work:
        for seed in range(options.first, options.first + options.seeds):
            both = pair(raw, options.config.parent.resolve(), seed, options.oracle, options.faults, Path(work))
            aware, blind = both
            equal = min(curve.damage[-1] for curve in both)
            found = [curve.at(equal) for curve in both]
            at_equal.append(found)
            exceeded += sum(not curve.within for curve in both)
            beyond += sum(curve.beyond for curve in both)
            again += sum(curve.again for curve in both)
            ends = {curve.stopped for curve in both} - {"budget"}
            print(
                f"{seed:5d} {aware.found[-1]:24.0f}  {aware.steps:5d}  {aware.damage[-1]:4.1f}  {aware.charged:7.1f}"
                f"   {blind.found[-1]:16.0f}  {blind.steps:5d}  {blind.damage[-1]:4.1f}"
                f"   {equal:4.1f}: {found[0]:3.0f}, {found[1]:3.0f}  {found[0] / max(found[1], 1.0):4.2f}"
                f"  {', '.join(sorted(ends))}",
                flush=True,
            )
    first, second = np.array(at_equal).T
    low, high = interval(first, second)
    print(
        f"\n{options.seeds} pairs, targets found at equal damage, ratio of sums: {first.sum() / second.sum():.2f} "
        f"[{low:.2f}, {high:.2f}] (bar: at least 1.5, lower bound above 1)"
    )
    print(
        f"of {2 * options.seeds} sessions, taken up again {again} times: exceeded a budget {exceeded}; true damage "
        f"beyond the budget {beyond}"
    )


if __name__ == "__main__":
    main()
