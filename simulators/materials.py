"""What the beam does to which material: the numbers of the damage model, ready-made sets of them, and how far each of
these numbers can be trusted.

Marks: [L] quoted from the literature, [A] assumed; an assumed number is an order of magnitude to plan with, never a
measured property. No calibrated critical fluence of LLZO is known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aecontrol.errors import BadInput
from aecontrol.types import Model, NonNegative, Positive

from .cross_sections import (
    BARN_A2,
    BOLTZMANN_EV_K,
    ROOM_K,
    classical_variance_m2_s2,
    thermal_knock_on_barn,
    variance_at_m2_s2,
)
from .elements import NUMBERS

CRYO_K = 100.0
"""Temperature at which ``cryo_factor`` holds, K."""
MAX_RATE_PER_S = 100.0
"""Fastest healing or hopping, 1/s; beyond it vacancies would have to be followed between two pixels."""

Fraction = Annotated[float, Field(ge=0, le=1)]
AtLeastOne = Annotated[float, Field(ge=1)]
Excitation = NonNegative | Annotated[tuple[tuple[Positive, NonNegative], ...], Field(min_length=1)]


class Migration(Model):
    """What becomes of vacancies; off by default. A healed atom comes back to its own site. A vacancy hops to one of the
    nearest sites of its element at its height. Rates are attempts times exp(-barrier / k T)."""

    healing_per_s: NonNegative = Field(0.0, description="rate at which an atom that the beam removed comes back, 1/s")
    healing_barrier_eV: NonNegative = Field(0.0, description="activation energy of healing, eV")
    hop_per_s: NonNegative = Field(0.0, description="attempt rate of vacancy hops, 1/s")
    hop_barrier_eV: NonNegative = Field(0.0, description="activation energy of vacancy hops, eV")
    hop_barn: NonNegative = Field(0.0, description="cross-section of a vacancy hop driven by the beam, barn")

    def healing_rate(self, temperature_K: float) -> float:
        """Healing at ``temperature_K``, 1/s."""
        return self.healing_per_s * math.exp(-self.healing_barrier_eV / (BOLTZMANN_EV_K * temperature_K))

    def hop_rate(self, temperature_K: float) -> float:
        """Thermal hops at ``temperature_K``, 1/s."""
        return self.hop_per_s * math.exp(-self.hop_barrier_eV / (BOLTZMANN_EV_K * temperature_K))

    @property
    def hops(self) -> bool:
        """True when vacancies move."""
        return self.hop_per_s > 0.0 or self.hop_barn > 0.0

    @property
    def on(self) -> bool:
        """True when anything becomes of vacancies."""
        return self.hops or self.healing_per_s > 0.0


class Zone(Model):
    """A rectangle of the specimen that radiolysis harms sooner, or later, than the rest: another phase of it."""

    center_nm: tuple[float, float] = Field(description="centre (x, y), nm")
    fov_nm: tuple[Positive, Positive] = Field(description="width and height, nm")
    factor: Positive = Field(description="critical fluence here over that elsewhere; assumed, not measured")

    def covers(self, places_nm: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of ``places_nm`` [n, 2] lie in it."""
        offset = np.abs(places_nm - np.array(self.center_nm))
        return np.asarray((offset < 0.5 * np.array(self.fov_nm)).all(axis=1))


class Damage(Model):
    """What the beam does to which element. An element that is not named is not harmed by that process.

    Knock-on and excitation remove atoms of the exit surface (every atom of a sheet); deeper atoms only leave their site
    above the bulk threshold. Radiolysis breaks a bond unit at once: its atoms are displaced by a Gaussian or removed.
    Temperature changes critical fluences, velocity variances and the rates of migration, nothing else. There is no
    dose-rate effect, no heating and no charging. Excitation and every critical fluence are assumptions, not measured.
    """

    preset: str | None = Field(None, description="material whose numbers stand for every key that is not given here")
    displacement_threshold_eV: dict[str, Positive] = Field(
        {"S": 6.9, "C": 21.13}, description="energy that ejects an atom: S from MoS2, C from graphene, eV"
    )
    bulk_threshold_eV: dict[str, Positive] = Field(
        {}, description="energy that moves an atom below the exit surface off its site, eV; not named: never"
    )
    velocity_variance_m2_s2: dict[str, NonNegative] = Field(
        {"S": 7.78e4, "C": 3.17e5}, description="thermal velocity variance along the beam at 300 K, m^2/s^2"
    )
    excitation_barn: dict[str, Excitation] = Field(
        {"S": 1.0},
        description="cross-section added to surface knock-on by electronic excitation, barn: one number for every "
        "voltage, or pairs (kV, barn), straight in between and none outside",
    )
    critical_fluence_e_per_A2: dict[str, Positive] = Field(
        {}, description="radiolysis: fluence at which 1/e of the bond units are still untouched at 300 K, e/A^2"
    )
    zones: tuple[Zone, ...] = Field(
        (), description="where critical fluences are others; where zones overlap their factors multiply"
    )
    induction_exponent: AtLeastOne = Field(1.0, description="k in exp(-(F / F_c)^k), the share still untouched")
    cryo_factor: AtLeastOne = Field(
        1.0, description="critical fluence at 100 K over that at 300 K; log-linear in temperature, constant above 300 K"
    )
    radiolysis_removes: Fraction | dict[str, Fraction] = Field(
        0.0, description="share of radiolysed atoms that leave (for all, or by element); the others are displaced"
    )
    radiolysis_displacement_nm: NonNegative = Field(
        0.05, description="standard deviation per axis of the displacement of a radiolysed atom, nm"
    )
    temperature_K: Positive = Field(ROOM_K, description="temperature of the specimen, K")
    migration: Migration = Migration()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, Mapping) else None
        if not isinstance(name, str):
            return data
        if name not in PRESETS:
            raise ValueError(f"damage preset {name!r} is not known; use one of {', '.join(PRESETS)}")
        return {**PRESETS[name], **data}

    @model_validator(mode="after")
    def _can_be_simulated(self) -> Damage:
        for key, value in self:
            for symbol in value if isinstance(value, dict) else ():
                if symbol not in NUMBERS:
                    raise ValueError(f"{key} names {symbol!r}; use elements among {', '.join(NUMBERS)}")
        for symbol, table in self.excitation_barn.items():
            voltages = [] if isinstance(table, float) else [kV for kV, _ in table]
            if voltages != sorted(set(voltages)):
                raise ValueError(f"excitation_barn of {symbol}: voltages must ascend, got {voltages}")
        rates = (self.migration.healing_rate(self.temperature_K), self.migration.hop_rate(self.temperature_K))
        if max(rates) > MAX_RATE_PER_S:
            raise ValueError(f"migration: healing or hops at {max(rates):.3g} per s exceed {MAX_RATE_PER_S:g} per s")
        return self

    def knock_on_A2(self, symbol: str, voltage_kV: float) -> float:
        """Cross-section of removal from the exit surface: knock-on with thermal velocities plus excitation, A^2."""
        barn = self.excitation_at_barn(symbol, voltage_kV)
        return self._thermal_A2(symbol, self.displacement_threshold_eV, voltage_kV) + barn * BARN_A2

    def bulk_knock_on_A2(self, symbol: str, voltage_kV: float) -> float:
        """Cross-section of leaving a site below the exit surface, A^2."""
        return self._thermal_A2(symbol, self.bulk_threshold_eV, voltage_kV)

    def excitation_at_barn(self, symbol: str, voltage_kV: float) -> float:
        """Cross-section of removal by electronic excitation, barn."""
        table = self.excitation_barn.get(symbol, 0.0)
        if isinstance(table, float):
            return table
        for (low, first), (high, last) in zip(table, table[1:] or table, strict=False):
            if low <= voltage_kV <= high:
                return first + (last - first) * (voltage_kV - low) / ((high - low) or 1.0)
        return 0.0

    def critical_fluence_at(self, symbol: str) -> float:
        """Critical fluence at the specimen's temperature, e/A^2; infinite for an element that is not named."""
        cold = max(0.0, ROOM_K - self.temperature_K) / (ROOM_K - CRYO_K)
        return self.critical_fluence_e_per_A2.get(symbol, math.inf) * float(self.cryo_factor**cold)

    def sensitivity(self, places_nm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Critical fluence at ``places_nm`` [n, 2] over that outside all zones [n]."""
        factor = np.ones(len(places_nm))
        for zone in self.zones:
            factor[zone.covers(places_nm)] *= zone.factor
        return factor

    def removed_share(self, symbol: str) -> float:
        """Share of the radiolysed atoms of an element that leave."""
        share = self.radiolysis_removes
        return share.get(symbol, 0.0) if isinstance(share, dict) else share

    def _thermal_A2(self, symbol: str, thresholds: Mapping[str, float], voltage_kV: float) -> float:
        if symbol not in thresholds:
            return 0.0
        variance = variance_at_m2_s2(symbol, self.velocity_variance_m2_s2.get(symbol, 0.0), self.temperature_K)
        return thermal_knock_on_barn(symbol, thresholds[symbol], voltage_kV, variance) * BARN_A2


def _material(
    thresholds_eV: Mapping[str, float],
    elements: tuple[str, ...] = (),
    fluence: float = 0.0,
    cryo_factor: float = 1.0,
    leaving: tuple[str, ...] = (),
) -> Mapping[str, Any]:
    """Keys of a preset: classical thermal velocities; ``elements`` have one critical ``fluence``, so that a bond unit
    of them breaks at once, and half of the radiolysed atoms of the elements ``leaving`` leave."""
    return MappingProxyType(
        {
            "displacement_threshold_eV": dict(thresholds_eV),
            "velocity_variance_m2_s2": {symbol: classical_variance_m2_s2(symbol, ROOM_K) for symbol in thresholds_eV},
            "excitation_barn": {},
            "critical_fluence_e_per_A2": dict.fromkeys(elements, fluence),
            "cryo_factor": cryo_factor,
            "radiolysis_removes": dict.fromkeys(leaving, 0.5),
        }
    )


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "graphene": {**_material({"C": 21.13}), "velocity_variance_m2_s2": {"C": 3.17e5}},
        "mos2": {**_material({"S": 6.9, "Mo": 20.0}), "excitation_barn": {"S": ((60.0, 1.0), (80.0, 1.0))}},
        "perovskite": _material({"O": 20.0, "Sr": 70.0, "Ti": 70.0, "La": 25.0, "Zr": 25.0}),
        "llzo": _material({"Li": 10.0, "O": 20.0, "La": 25.0, "Zr": 25.0}, ("Li", "La", "Zr", "O"), 1e3, 5.0, ("Li",)),
        "sulfide": _material({"Li": 10.0}, ("Li", "Si", "P", "S", "Cl"), 1e2),
        # 60 e/A^2 and 5 lie in the middle of the ranges 20-200 and 3-10 on a logarithmic scale.
        "halide": _material({"Li": 10.0}, ("Li", "F", "Cl", "Zr", "La"), 60.0, 5.0, ("F", "Cl")),
        "polymer": _material({}, ("H", "Li", "C", "N", "O", "F", "S"), 60.0, 5.0, ("O", "F")),
        "li2co3": _material({"Li": 10.0, "O": 20.0}, ("Li", "C", "O"), 750.0, 5.0, ("O",)),
    }
)
"""Keys of :class:`Damage` by material. Radiolysis of perovskite oxides needs more than 1e6 e/A^2: none here."""

_LITERATURE = {
    ("displacement_threshold_eV", "C", 21.13),
    ("displacement_threshold_eV", "S", 6.9),
    ("velocity_variance_m2_s2", "C", 3.17e5),
    *(("critical_fluence_e_per_A2", symbol, 750.0) for symbol in ("Li", "C", "O")),  # Li2CO3 at 200 kV
}
_PER_ELEMENT = (
    ("displacement_threshold_eV", "displacement threshold", "eV"),
    ("bulk_threshold_eV", "bulk displacement threshold", "eV"),
    ("velocity_variance_m2_s2", "velocity variance at 300 K", "m^2/s^2"),
    ("critical_fluence_e_per_A2", "critical fluence at 300 K", "e/A^2"),
)


def preset(name: str, temperature_K: float = ROOM_K) -> Damage:
    """The damage model of a material. Raises BadInput for one that is not known."""
    if name not in PRESETS:
        raise BadInput(f"damage preset {name!r} is not known", f"use one of {', '.join(PRESETS)}")
    return Damage(preset=name, temperature_K=temperature_K)


def assumptions(damage: Damage, elements: Collection[str] | None = None) -> tuple[str, ...]:
    """One line for each number in ``damage`` that is quoted [L] or assumed [A], with its unit and the elements that it
    is for, to show to the user. With ``elements``: of those only, and which of them the beam cannot harm."""
    if elements is not None:
        keys = (*(key for key, *_ in _PER_ELEMENT), "excitation_barn")
        kept = {key: {s: v for s, v in getattr(damage, key).items() if s in elements} for key in keys}
        harmed = {symbol for key in keys if key != "velocity_variance_m2_s2" for symbol in kept[key]}
        safe = [symbol for symbol in elements if symbol not in harmed]
        spared = (f"{', '.join(safe)}: no damage is modelled",) if safe else ()
        return (*assumptions(damage.model_copy(update=kept)), *spared)
    lines: list[str] = []
    for key, words, unit in _PER_ELEMENT:
        marked = {
            symbol: f"{value:.4g} {unit} [{'L' if (key, symbol, value) in _LITERATURE else 'A'}]"
            for symbol, value in getattr(damage, key).items()
        }
        lines += _together(words, marked)
    for symbol, table in damage.excitation_barn.items():
        pairs = [("at every voltage", table)] if isinstance(table, float) else [(f"at {kV:g} kV", b) for kV, b in table]
        lines += [f"{symbol}: excitation cross-section {barn:.4g} barn {where} [A]" for where, barn in pairs]
    if damage.critical_fluence_e_per_A2:
        lines += _radiolysis_assumptions(damage)
    lines += _migration_assumptions(damage.migration)
    return tuple(lines)


def _together(words: str, values: Mapping[str, str]) -> Iterator[str]:
    """One line for all elements of a value."""
    for value in dict.fromkeys(values.values()):
        yield f"{', '.join(symbol for symbol in values if values[symbol] == value)}: {words} {value}"


def _radiolysis_assumptions(damage: Damage) -> Iterator[str]:
    yield f"critical fluence at 100 K over that at 300 K {damage.cryo_factor:.4g}, log-linear in between [A]"
    for zone in damage.zones:
        (x, y), (width, height) = zone.center_nm, zone.fov_nm
        where = f"{width:.4g} x {height:.4g} nm about ({x:.4g}, {y:.4g}) nm"
        yield f"critical fluence in {where} over that elsewhere {zone.factor:.4g} [A]"
    yield f"radiolysis induction exponent {damage.induction_exponent:.4g} [A]"
    yield f"radiolysis displacement {damage.radiolysis_displacement_nm:.4g} nm per axis [A]"
    shares = {symbol: f"{damage.removed_share(symbol):.4g} [A]" for symbol in damage.critical_fluence_e_per_A2}
    yield from _together("share of radiolysed atoms that leave", shares)


def _migration_assumptions(migration: Migration) -> Iterator[str]:
    if migration.healing_per_s > 0.0:
        yield f"healing {migration.healing_per_s:.4g} 1/s over a barrier of {migration.healing_barrier_eV:.4g} eV [A]"
    if migration.hop_per_s > 0.0:
        yield f"vacancy hops {migration.hop_per_s:.4g} 1/s over a barrier of {migration.hop_barrier_eV:.4g} eV [A]"
    if migration.hop_barn > 0.0:
        yield f"vacancy hops driven by the beam {migration.hop_barn:.4g} barn [A]"
