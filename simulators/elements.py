"""What the simulator knows of the elements: symbols, numbers, masses and thermal motion. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from aecontrol.errors import BadInput

MASSES_U: Mapping[str, float] = MappingProxyType(
    {
        "H": 1.008, "Li": 6.94, "B": 10.81, "C": 12.011, "N": 14.007, "O": 15.999, "F": 18.998, "Mg": 24.305,
        "Al": 26.982, "Si": 28.085, "P": 30.974, "S": 32.06, "Cl": 35.45, "Ca": 40.078, "Ti": 47.867, "Mn": 54.938,
        "Fe": 55.845, "Co": 58.933, "Ni": 58.693, "Cu": 63.546, "Zn": 65.38, "Ga": 69.723, "As": 74.922, "Se": 78.971,
        "Sr": 87.62, "Zr": 91.224, "Nb": 92.906, "Mo": 95.95, "Pd": 106.42, "Ag": 107.868, "Te": 127.6, "Ba": 137.327,
        "La": 138.905, "Ce": 140.116, "Ta": 180.948, "W": 183.84, "Pt": 195.084, "Au": 196.967, "Pb": 207.2,
        "Bi": 208.98,
    }
)  # fmt: skip
"""Standard atomic weights, u, of the elements that the simulator can render and damage."""
NUMBERS: Mapping[str, int] = MappingProxyType(
    {
        "H": 1, "Li": 3, "B": 5, "C": 6, "N": 7, "O": 8, "F": 9, "Mg": 12, "Al": 13, "Si": 14, "P": 15, "S": 16,
        "Cl": 17, "Ca": 20, "Ti": 22, "Mn": 25, "Fe": 26, "Co": 27, "Ni": 28, "Cu": 29, "Zn": 30, "Ga": 31, "As": 33,
        "Se": 34, "Sr": 38, "Zr": 40, "Nb": 41, "Mo": 42, "Pd": 46, "Ag": 47, "Te": 52, "Ba": 56, "La": 57, "Ce": 58,
        "Ta": 73, "W": 74, "Pt": 78, "Au": 79, "Pb": 82, "Bi": 83,
    }
)  # fmt: skip
SYMBOLS: Mapping[int, str] = MappingProxyType({number: symbol for symbol, number in NUMBERS.items()})
THERMAL_RMS_A: Mapping[str, float] = MappingProxyType(
    {
        "Mo": 0.06, "S": 0.07, "C": 0.06, "Sr": 0.08, "Ti": 0.07, "O": 0.09, "La": 0.07, "Zr": 0.06, "Pb": 0.10,
        "Ca": 0.08, "Au": 0.09,
        "Li": 0.12, "B": 0.06, "N": 0.06, "Si": 0.07, "Al": 0.07, "Mn": 0.07, "Fe": 0.07, "Ni": 0.06, "Se": 0.07,
        "Ta": 0.06, "Ce": 0.06, "W": 0.05, "Pt": 0.07, "Bi": 0.10,
    }
)  # fmt: skip
"""Root-mean-square thermal displacement per axis near 300 K, angstrom. Assumed, not measured."""
DEFAULT_THERMAL_RMS_A = 0.08


def number_of(symbol: str) -> int:
    """Atomic number. Raises BadInput for an element that the simulator has no data for."""
    if symbol not in NUMBERS:
        raise BadInput(f"element {symbol!r} is not known to the simulator", f"use one of {', '.join(NUMBERS)}")
    return NUMBERS[symbol]


def check_numbers(numbers: NDArray[np.int64]) -> None:
    """Raises BadInput that names the atomic numbers that the simulator has no data for."""
    unknown = sorted({int(number) for number in np.unique(numbers)} - set(SYMBOLS))
    if unknown:
        raise BadInput(
            f"atomic number(s) {', '.join(map(str, unknown))} are not known to the simulator",
            f"use elements among {', '.join(NUMBERS)}",
        )


def thermal_rms_A(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Assumed thermal displacement of each atom [n], angstrom."""
    return np.asarray(_thermal_table()[numbers])


@cache
def _thermal_table() -> NDArray[np.float64]:
    table = np.full(max(SYMBOLS) + 1, DEFAULT_THERMAL_RMS_A)
    for symbol, rms in THERMAL_RMS_A.items():
        table[NUMBERS[symbol]] = rms
    return table
