"""Command line of the accurate road of the simulator: ``python -m simulators.multislice tables --out FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .single_atoms import write_tables


def main() -> None:
    """Make the tables of single atoms."""
    parser = argparse.ArgumentParser(prog="python -m simulators.multislice", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    tables = actions.add_parser("tables", help="how single atoms scatter, for the fast renderer")
    tables.add_argument("--out", type=Path, default=Path(__file__).parent / "tables" / "single_atoms.npz")
    write_tables(parser.parse_args().out)


if __name__ == "__main__":
    main()
