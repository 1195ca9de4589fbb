"""Time of one decision of the Bayes policy, median over repeats, one thread, fits included.

python tests/benchmarks/decision_time.py
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from policies.bayes import Bayes
from policies.contract import history, windows

REPEATS = 7


def main() -> None:
    """Print the table."""
    print("windows  sub-scans  acquisition  median s")
    for side, scans in ((8, 10), (16, 100), (32, 300)):
        candidates = windows(side, side)
        for acquisition in ("ucb", "logei"):
            policy, seconds = Bayes(acquisition=acquisition), []
            for repeat in range(REPEATS + 1):
                random = np.random.default_rng((side, scans, repeat, len(acquisition)))  # no fit is met twice
                visited = [int(i) for i in random.permutation(side * side)[:scans]]
                view = history(
                    candidates, visited, random.normal(size=scans).tolist(), random.normal(size=side * side).tolist()
                )
                start = time.perf_counter()
                policy.decide(view, candidates, 0)
                seconds.append(time.perf_counter() - start)
            print(f"{side * side:7d}  {scans:9d}  {acquisition:>11}  {statistics.median(seconds[1:]):8.3f}", flush=True)


if __name__ == "__main__":
    main()
