"""Is what a session reserves for damage the quantile that it says? Every session shown.

    python -m tests.benchmarks.charge_calibration [--seeds 60] [--first 1000] [--metric learned | simulated] [--gains]

One place is scanned five times (0.3 of the first guess of the critical fluence each) and the response fitted; then ten
windows of 2 to 4 nm at 0.03 to 1 of that guess each, where they fall, overlapping; after five of them the place is
scanned once more and the response fitted anew. For every window: what is reserved, against what the simulator then
broke, tile by tile and weighed by scattering power. The true critical fluence lies within a factor 5 of the guess.
Where a session would raise its alarm and wait for a person, it ends.

``learned``: frames of seven specimens in the simulated column, read by the shipped metric, with the gain and errors
that it tells of itself; how far its gain scatters was learned from ladders of the same seven (other seeds), and the
law, the sites per nm^2 and the mean current are as told. ``simulated``: no images, a metric whose gain is known to
10 %. See ``charge_worlds.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from aecontrol import forecast
from aecontrol.dose import bound_charge
from aecontrol.events import DamageMeasured
from aecontrol.exposure import KeyRecord
from aecontrol.fit_response import fit_response
from aecontrol.harm import Harm
from aecontrol.perception.damage.meter import build_meter
from aecontrol.response import prior
from aecontrol.types import Charge, ScanRegion

from .charge_worlds import FIELD_NM, Column, Floats, NoImages, World, region

LADDER, STEPS, REFIT = 5, 10, 5


@dataclass(frozen=True)
class Step:
    """One window: nm^2 reserved, expected and broken; whether the response was known to saturate."""

    reserved: float
    expected: float
    broken: float
    saturates: bool


def session(world: World, random: np.random.Generator, seed: int) -> tuple[list[Step], str]:
    """The windows of one session, and why it paused before it had taken all; empty when it took them."""
    guess = world.plan.critical_fluence_e_per_A2
    on = forecast.ground(world.plan, (), FIELD_NM)
    harm = Harm(world.plan, (), world.column, prior(("specimen",), guess, 1.0), on.fresh)
    keys: dict[str, KeyRecord] = {}
    looks: list[str] = []
    tables: list[tuple[DamageMeasured, Floats]] = []

    def posted(window: ScanRegion, electrons: int) -> KeyRecord:
        bound, key = bound_charge(window, world.column), f"{len(keys):064x}"
        measured = Charge(electrons=electrons, pixels=window.pixels, seconds=bound.seconds)
        keys[key] = KeyRecord(
            key=key, step=len(keys), attempt=0, region=window, bound=bound, state="POST", measured=measured
        )
        return keys[key]

    def look() -> Harm:
        """The session's knowledge after one more frame of the place; an alarm as it would raise it."""
        electrons, shown = world.look()
        record = posted(world.place, electrons)
        looks.append(record.key)
        event = DamageMeasured(key=record.key, first=looks[0], metric=world.name)
        if isinstance(shown, str):
            first = None if record.key == looks[0] else looks[0]
            return harm.settled(record).measured(event.model_copy(update={"first": first, "reason": shown}), keys)
        sd = float(np.sqrt((shown[:, 3] ** 2).sum())) / len(shown)
        event = event.model_copy(update={"mean": float(shown[:, 2].mean()), "sd": sd})
        tables.append((event, shown))
        return harm.settled(record).measured(event, keys)

    def fitted() -> Harm:
        evidence = [harm.evidence(event, table, world.patch_nm2, keys) for event, table in tables]
        response = fit_response(evidence, ("specimen",), guess, 1.0, world.gain_sd, world.metric_sd, seed=seed)
        return harm.refitted(response, len(evidence), keys)

    for _ in range(LADDER):
        harm = look()
        if harm.alarm:
            return [], harm.alarm
    harm, steps = fitted(), []
    for number in range(STEPS):
        if number == REFIT:
            harm = look()
            if harm.alarm:
                return steps, harm.alarm
            harm = fitted()
        side, fluence = random.uniform(2.0, 4.0), 0.03 * guess * (1.0 / 0.03) ** random.random()
        middle = [float(random.uniform(2.0, extent - 2.0)) for extent in FIELD_NM]
        window = region((middle[0], middle[1]), side, fluence, 0.1)
        reserved = harm.reserve(window, bound_charge(window, world.column))
        electrons, broken = world.scan(window)
        record = posted(window, electrons)
        harm = harm.settled(record)
        saturates = bool(np.median(harm.response.critical_fluence_e_per_A2[0]) < harm.response.tested_e_per_A2[0])
        steps.append(Step(reserved, harm.charges[record.key].damage, broken, saturates))
    return steps, ""


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--first", type=int, default=1000)
    parser.add_argument("--quantile", type=float, default=0.95)
    parser.add_argument("--metric", default="learned")
    parser.add_argument("--gains", action="store_true", help="tell every session the metric's gain for its material")
    options = parser.parse_args()
    torch.set_num_threads(1)
    meter = None if options.metric == "simulated" else build_meter(options.metric, "cpu")
    every: list[Step] = []
    ended = 0
    print("seed   F_c true   windows within the reserve   reserved  expected   broken nm^2   law known   specimen")
    for seed in range(options.first, options.first + options.seeds):
        random = np.random.default_rng(seed)
        if meter is None:
            world: World = NoImages(seed, random, options.quantile)
        else:
            world = Column(seed, random, options.quantile, meter, options.gains)
        steps, paused = session(world, random, seed)
        every += steps
        ended += bool(paused)
        within = sum(step.broken <= step.reserved for step in steps)
        sums = [sum(getattr(step, name) for step in steps) for name in ("reserved", "expected", "broken")]
        print(f"{seed:4d}  {world.critical:9.0f}  {within:8d} of {len(steps)}  ".ljust(48), end="")
        print(
            "  ".join(f"{value:8.3f}" for value in sums),
            "  beyond F_c" if steps and steps[-1].saturates else "  slope     ",
            f" {world.name}{'; paused: ' if paused else ''}{paused}",
            flush=True,
        )
    for name, chosen in (
        ("all windows", every),
        ("seen beyond F_c", [step for step in every if step.saturates]),
        ("slope only", [step for step in every if not step.saturates]),
    ):
        within = [step.broken <= step.reserved for step in chosen]
        if within:
            bias = sum(step.expected for step in chosen) / sum(step.broken for step in chosen)
            print(f"{name}: {np.mean(within):.3f} of {len(within)} within the reserve; expected / broken {bias:.3f}")
    print(f"{ended} of {options.seeds} sessions raised the alarm and ended there")
    print(f"bar: 0.93 to 0.97 at a quantile of 0.95; asked for {options.quantile:g}")


if __name__ == "__main__":
    main()
