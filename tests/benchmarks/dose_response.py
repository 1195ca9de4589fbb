"""How well the critical fluence is found from a ladder of exposures, and in which time; every seed shown.

    python tests/benchmarks/dose_response.py [--seeds 50] [--nuts 5] [--exponent 1]

A garnet, 10 nm thick, whose bond units break at a critical fluence drawn from 300 to 3000 e/A^2 is scanned six times at
one place, up to 3 to 8 times that fluence: 8 x 8 patches of 20 x 20 px, of which those at the rim are left out. Truth
is what the simulator broke in a patch between the moments at which the first and a later scan passed each atom, by
scattering power. The score is that share times a gain (10 % s.d.), with an error per frame and patch (null s.d. of 0.03
to 0.09), an error that all patches of a frame share (0.01), and electrons that are known to 2 %. The fit's first guess
of the critical fluence is wrong by a factor of up to 10.

``--nuts``: the first so many seeds also by Pyro's NUTS on the same model. ``--exponent``: of the simulated law; the fit
assumes 1, and the last column says whether it notices.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from numpy.typing import NDArray

from aecontrol.fit_response import _Latent, _table, criticise, fit_response, model
from aecontrol.response import Evidence
from aecontrol.types import ScanRegion
from simulators.damage import Damage, DamagedSpecimen
from simulators.optics import Optics
from simulators.scan import nominal_positions_nm
from simulators.specimens.garnet import Llzo

Floats = NDArray[np.float64]
PATCH_PX, PATCHES, PIXEL_NM = 20, 6, 0.03
SIDE_PX = PATCH_PX * (PATCHES + 2)
SIDE_NM, MARGIN_NM = SIDE_PX * PIXEL_NM, 0.6
FRAMES = 6
UNITS = 64 * (PATCH_PX * PIXEL_NM / 1.29682) ** 2  # in a patch: eight in each cell of eight
GAIN_SD, SHARED_SD, CURRENT_SD = 0.1, 0.01, 0.02
ELEMENTS = ("Li", "La", "Zr", "O")


def simulate(seed: int, exponent: float) -> tuple[float, float, list[Evidence]]:
    """True critical fluence, first guess, and the ladder's evidence."""
    random = np.random.default_rng(seed)
    critical = 1000.0 * 10.0 ** random.uniform(-0.5, 0.5)
    guess = critical * 10.0 ** random.uniform(-1.0, 1.0)
    step = critical * 3.0 * (8.0 / 3.0) ** random.random() / (FRAMES - 0.5)
    damaged = shares_damaged(seed, critical, exponent, step)
    gain = math.exp(GAIN_SD * random.normal())
    sd = 0.05 * np.exp(0.3 * random.normal(size=PATCHES**2))
    error = (sd * random.normal(size=(FRAMES, PATCHES**2)) + SHARED_SD * random.normal(size=(FRAMES, 1))) / math.sqrt(2)
    known = step * (1.0 + CURRENT_SD * random.normal())
    row, evidence = np.ones(PATCHES**2), []
    for later in range(1, FRAMES):
        score = gain * (damaged[later] - damaged[0]) + error[later] - error[0]
        evidence.append(Evidence(0, 0.5 * known * row, (later + 0.5) * known * row, score, sd, "first", UNITS))
    return critical, guess, evidence


def shares_damaged(seed: int, critical: float, exponent: float, step_e_per_A2: float) -> Floats:
    """Share of the matter that is damaged [frames, patches] as the scan passes it."""
    field = SIDE_NM + 2 * MARGIN_NM
    specimen = Llzo(size_nm=(field, field), thickness_nm=10.0, rotation_deg=17.0 * seed).build(seed)
    law = Damage(
        displacement_threshold_eV={},
        excitation_barn={},
        critical_fluence_e_per_A2=dict.fromkeys(ELEMENTS, critical),
        induction_exponent=exponent,
        radiolysis_removes={"Li": 0.5},
    )
    body = DamagedSpecimen(specimen, law, Optics(), seed)
    region = ScanRegion(
        center_nm=(field / 2, field / 2), fov_nm=(SIDE_NM, SIDE_NM), shape=(SIDE_PX, SIDE_PX), dwell_time_s=1e-6
    )
    points = 10.0 * nominal_positions_nm(region).reshape(-1, 2)
    broken = np.full(len(specimen), np.inf)
    for frame in range(FRAMES):
        for event in body.expose(points, step_e_per_A2 * (10.0 * PIXEL_NM) ** 2):
            broken[event.atom] = min(broken[event.atom], frame * len(points) + event.point)
    pixel = np.floor((specimen.positions_A[:, :2] / 10.0 - MARGIN_NM) / PIXEL_NM).astype(int)
    inside = ((pixel >= PATCH_PX) & (pixel < SIDE_PX - PATCH_PX)).all(axis=1)
    (column, row), weight = pixel[inside].T, specimen.atomic_numbers[inside] ** 1.7
    patch = (row // PATCH_PX - 1) * PATCHES + column // PATCH_PX - 1
    passed = row * SIDE_PX + column
    whole = np.bincount(patch, weight)
    return np.array(
        [
            np.bincount(patch, weight * (broken[inside] <= frame * len(points) + passed)) / whole
            for frame in range(FRAMES)
        ]
    )


def by_nuts(evidence: list[Evidence], guess: float) -> tuple[Floats, float]:
    """Critical fluences by Pyro's NUTS, and its CPU seconds."""
    from pyro.infer import MCMC, NUTS

    table = _table(evidence, 1, math.log(guess), 1.0, GAIN_SD)
    start = time.process_time()
    torch.manual_seed(0)
    chain = MCMC(NUTS(model, full_mass=True, max_tree_depth=7), 600, 300, disable_progbar=True)
    chain.run(table)
    spent = time.process_time() - start
    return _Latent.of(table, chain.get_samples()["point"]).critical[:, 0].numpy(), spent


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--nuts", type=int, default=5)
    parser.add_argument("--exponent", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    covered, errors, seconds, noticed = [], [], [], 0
    print("seed   F_c true    5 %   50 %   95 %  inside  r_hat  CPU s   p of the law    NUTS: 5 %   50 %   95 %  CPU s")
    for seed in range(options.seeds):
        critical, guess, evidence = simulate(seed, options.exponent)
        start = time.process_time()
        response = fit_response(evidence, ["garnet"], guess, gain_sd=GAIN_SD, seed=seed)
        seconds.append(time.process_time() - start)
        low, middle, high = np.quantile(response.critical_fluence_e_per_A2[0], [0.05, 0.5, 0.95])
        covered.append(low <= critical <= high)
        errors.append(abs(middle / critical - 1.0))
        p = criticise(response, evidence)
        noticed += p < 0.01
        row = (
            f"{seed:4d}  {critical:9.0f}  {low:5.0f}  {middle:5.0f}  {high:5.0f}  {'yes' if covered[-1] else 'NO':>6s}"
        )
        row += f"  {response.diagnostics['r_hat']:5.3f}  {seconds[-1]:5.2f}  {p:13.2g}"
        if seed < options.nuts:
            chain, spent = by_nuts(evidence, guess)
            row += "{:13.0f}  {:5.0f}  {:5.0f}  ".format(*np.quantile(chain, [0.05, 0.5, 0.95])) + f"{spent:5.1f}"
        print(row, flush=True)
    print(f"\ntruth inside the 90 % interval: {np.mean(covered):.2f} of {len(covered)} (bar: 0.80 to 0.98)")
    print(f"median relative error: {np.median(errors):.3f} (bar: at most 0.15)")
    print(f"law refused at p < 0.01: {noticed} of {len(covered)}")
    print(f"CPU seconds of a fit: {np.median(seconds):.3f} (median)")


if __name__ == "__main__":
    main()
