import math

import numpy as np
import pytest
from pydantic import ValidationError

from aecontrol.errors import BadInput
from simulators.cross_sections import BARN_A2
from simulators.materials import PRESETS, Damage, Migration, Zone, assumptions, preset


def test_only_s_of_mos2_and_c_of_graphene_can_leave_at_the_defaults():
    damage = Damage()
    assert damage.knock_on_A2("S", 80) == pytest.approx(1.84e-8, rel=0.02)  # 0.84 b knock-on + 1 b excitation
    assert damage.knock_on_A2("Mo", 80) == 0.0
    assert 0.0 < damage.knock_on_A2("C", 80) < 1e-13


def test_a_preset_fills_in_what_is_not_given():
    whole, changed = Damage(preset="llzo"), Damage(preset="llzo", cryo_factor=2.0, temperature_K=100.0)
    assert changed.critical_fluence_e_per_A2 == whole.critical_fluence_e_per_A2
    assert (whole.cryo_factor, changed.cryo_factor) == (5.0, 2.0)
    assert Damage.model_validate(changed.model_dump(mode="json")) == changed
    assert Damage.model_validate_json(preset("mos2").model_dump_json()) == preset("mos2")
    assert preset("llzo", 100.0).temperature_K == 100.0


@pytest.mark.parametrize("bad", [lambda: preset("glass"), lambda: Damage(preset="glass")])
def test_an_unknown_preset_is_answered_with_the_known_ones(bad):
    with pytest.raises((BadInput, ValidationError), match=r"(?s)glass.*graphene, mos2, perovskite, llzo"):
        bad()


def test_critical_fluence_rises_in_the_cold_by_the_factor_and_by_nothing_else():
    warm, half, cold = (preset("llzo", kelvin).critical_fluence_at("Li") for kelvin in (300.0, 200.0, 100.0))
    assert (warm, cold) == (1e3, pytest.approx(5e3))
    assert half == pytest.approx(math.sqrt(warm * cold))
    assert preset("llzo", 400.0).critical_fluence_at("Li") == warm
    assert preset("sulfide", 100.0).critical_fluence_at("S") == preset("sulfide").critical_fluence_at("S")
    assert preset("llzo").critical_fluence_at("S") == math.inf
    still = {"velocity_variance_m2_s2": {}, "displacement_threshold_eV": {"C": 21.13}}
    colds = [Damage(**still, temperature_K=kelvin).knock_on_A2("C", 120) for kelvin in (10.0, 300.0)]
    assert colds[0] == colds[1] > 0.0
    assert preset("graphene", 100.0).knock_on_A2("C", 95) < preset("graphene").knock_on_A2("C", 95)


def test_excitation_holds_only_between_the_voltages_of_its_table():
    mos2 = preset("mos2")
    assert [mos2.excitation_at_barn("S", kV) for kV in (59, 60, 71.3, 80, 81)] == [
        0.0,
        1.0,
        pytest.approx(1.0),
        1.0,
        0.0,
    ]
    sloped = Damage(excitation_barn={"S": [[60, 1.0], [80, 3.0], [100, 0.0]]})
    assert sloped.excitation_at_barn("S", 75) == pytest.approx(2.5)
    assert sloped.excitation_at_barn("S", 90) == pytest.approx(1.5)
    assert Damage(excitation_barn={"S": [[80, 3.0]]}).excitation_at_barn("S", 80) == 3.0
    difference = mos2.knock_on_A2("S", 80) - Damage(preset="mos2", excitation_barn={}).knock_on_A2("S", 80)
    assert difference == pytest.approx(BARN_A2)


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_of_a_preset_is_shown_with_its_unit_and_mark(name):
    model, lines = preset(name), assumptions(preset(name))
    shown = {}
    for line in lines:
        elements, _, rest = line.rpartition(": ")
        shown |= {(symbol, rest[:-4]): rest[-3:] for symbol in elements.split(", ")}
    expected = [(s, f"displacement threshold {v:.4g} eV") for s, v in model.displacement_threshold_eV.items()]
    expected += [(s, f"critical fluence at 300 K {v:.4g} e/A^2") for s, v in model.critical_fluence_e_per_A2.items()]
    expected += [(s, f"velocity variance at 300 K {v:.4g} m^2/s^2") for s, v in model.velocity_variance_m2_s2.items()]
    assert expected
    assert set(expected) <= set(shown)
    assert set(shown.values()) <= {"[L]", "[A]"}
    quoted = {"graphene": {"C"}, "mos2": {"S"}, "li2co3": {"Li", "C", "O"}}
    assert {symbol for (symbol, _), mark in shown.items() if mark == "[L]"} == quoted.get(name, set())


@pytest.mark.parametrize(
    "bad",
    [
        {"excitation_barn": {"S": [[80, 1.0], [60, 1.0]]}},
        {"critical_fluence_e_per_A2": {"Xx": 10.0}},
        {"radiolysis_removes": {"S": 1.5}},
        {"induction_exponent": 0.5},
        {"temperature_K": 0.0},
        {"migration": {"hop_per_s": 1e13}},
    ],
)
def test_what_cannot_be_simulated_is_refused(bad):
    with pytest.raises(ValidationError):
        Damage(**bad)


def test_barriers_slow_healing_and_hops_as_arrhenius():
    slow = Migration(healing_per_s=5.0, hop_per_s=1e13, hop_barrier_eV=1.0)
    assert slow.healing_rate(77.0) == 5.0
    ratio = slow.hop_rate(320.0) / slow.hop_rate(300.0)
    assert math.log(ratio) == pytest.approx((1 / 300 - 1 / 320) / 8.617333262e-5)
    assert any("hops" in line and line.endswith("[A]") for line in assumptions(Damage(migration=slow)))


def test_assumptions_of_a_specimen_name_its_elements_only_and_those_that_are_spared():
    lines = assumptions(Damage(), ("S", "Mo"))
    assert any(line.startswith("S: displacement threshold") for line in lines)
    assert not any(line.startswith("C") for line in lines)
    assert lines[-1] == "Mo: no damage is modelled"


def test_zones_multiply_and_are_shown_as_assumed():
    left, top = Zone(center_nm=(1, 5), fov_nm=(2, 10), factor=0.1), Zone(center_nm=(5, 1), fov_nm=(10, 2), factor=3.0)
    damage = Damage(critical_fluence_e_per_A2={"S": 1e3}, zones=(left, top))
    places = np.array([[1.0, 9.0], [9.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    assert damage.sensitivity(places) == pytest.approx([0.1, 3.0, 0.3, 1.0])
    assert "critical fluence in 2 x 10 nm about (1, 5) nm over that elsewhere 0.1 [A]" in assumptions(damage)
    assert not any("elsewhere" in line for line in assumptions(Damage(critical_fluence_e_per_A2={"S": 1e3})))
    with pytest.raises(ValidationError):
        Zone(center_nm=(1, 5), fov_nm=(2, 10), factor=0.0)
