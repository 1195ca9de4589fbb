"""Vacancies found per electron: the shipped session against the serpentine raster at the same dose, all seeds shown.

    python tests/benchmarks/mos2_per_electron.py [--seeds 5] [--config configs/mos2_vacancies.toml]

Each row is one `aecontrol run --seed N`: a new specimen, its overview counted, and afterwards the raster on a fresh
copy of that specimen, without overview, same windows, same budget, same detector. Found: matched to a true vacancy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--config", type=Path, default=Path("configs/mos2_vacancies.toml"))
    options = parser.parse_args()
    sums = {"session": [0.0, 0.0], "raster": [0.0, 0.0]}
    print("seed  true   session: found / reported  electrons      raster: found / reported  electrons    ratio  step s")
    with tempfile.TemporaryDirectory() as work:
        for seed in range(options.seeds):
            folder = Path(work) / str(seed)
            command = [sys.executable, "-m", "aecontrol.cli", "run", str(options.config), "--seed", str(seed)]
            subprocess.run([*command, "--out", str(folder), "--json"], check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((folder / "summary.json").read_bytes())
            rows = {"session": summary, "raster": summary["comparison"]["serpentine"]}
            cells, rate = [], {}
            for name, row in rows.items():
                found = row["curve"]["matched"][-1]
                reported = row["contract"]["targets"]["found"]
                electrons = row["contract"]["electrons"]["spent"]
                sums[name][0] += found
                sums[name][1] += electrons
                rate[name] = found / electrons
                cells.append(f"{found:12.0f} / {reported:8d}  {electrons:9.3e}")
            ratio = f"{rate['session'] / rate['raster']:.2f}" if rate["raster"] else "raster found none"
            true, step = summary["contract"]["targets"]["true"], summary["contract"]["step_seconds"]["median"]
            print(f"{seed:4d}  {true:4d}  {cells[0]}     {cells[1]}   {ratio:>6}  {step:6.2f}", flush=True)
    session, raster = (found / electrons for found, electrons in sums.values())
    print(f"\nratio of sums over {options.seeds} seeds: {session / raster:.2f} (bar: at least 3)")


if __name__ == "__main__":
    main()
