"""Time of one decision of the Bayes policy on one thread.

'cold' is a decision in a new process, as after a resume: it fits the overview and the sub-scans. 'warm' is the median
over the following decisions of the same session, each with one sub-scan more; their own fits are counted.

python tests/benchmarks/decision_time.py
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from policies.bayes import Bayes
from policies.contract import history, windows

STEPS = 15


def main() -> None:
    """Print the table."""
    print("windows  sub-scans  acquisition  cold s  warm s")
    Bayes().decide(
        history(windows(2, 2), [0, 1, 2], [1.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0]), windows(2, 2), 0
    )  # imports
    for side, scans in ((8, 10), (16, 100), (32, 300), (32, 800)):
        candidates = windows(side, side)
        for acquisition in ("ucb", "logei"):
            random = np.random.default_rng((side, scans, len(acquisition)))  # no fit is met twice
            visited = [int(i) for i in random.permutation(side * side)[: scans + STEPS]]
            overview = random.normal(size=side * side).tolist()
            values = random.normal(size=scans + STEPS).tolist()
            policy, seconds = Bayes(acquisition=acquisition), []
            for n in range(scans, scans + STEPS):
                view = history(candidates, visited[:n], values[:n], overview)
                start = time.perf_counter()
                policy.decide(view, candidates, 0)
                seconds.append(time.perf_counter() - start)
            cold, warm = seconds[0], statistics.median(seconds[1:])
            print(f"{side * side:7d}  {scans:9d}  {acquisition:>11}  {cold:6.3f}  {warm:6.3f}", flush=True)


if __name__ == "__main__":
    main()
