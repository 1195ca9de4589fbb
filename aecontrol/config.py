"""A session's configuration: one TOML file, typed, every mistake named before the beam is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from pydantic import Field, model_validator

from aecontrol.errors import BadInput
from aecontrol.protocols import Microscope, Perceiver, Policy
from aecontrol.registry import GROUPS, build_part, kinds, part_class, validate
from aecontrol.toml_file import read_toml
from aecontrol.types import (
    AreaPlan,
    Budget,
    Count,
    DamagePlan,
    DriftPlan,
    Model,
    NonNegative,
    OverviewPlan,
    Plan,
    Positive,
    ScanPlan,
    StopRules,
)

Device = Literal["auto", "cpu", "cuda"]


class DriverConfig(Protocol):
    """What a driver's configuration must offer."""

    def build(self, folder: Path, base: Path, seed: int) -> Microscope:
        """Open the instrument: its ledger lives in ``folder``, relative paths start at ``base``. Raises BadInput."""


class PerceiverConfig(Protocol):
    """What a perceiver's configuration must offer."""

    @property
    def target_kind(self) -> str:
        """Kind of object that is looked for, as the scorer asks the instrument for it."""

    def build(self, device: str) -> Perceiver:
        """Load weights and make ready. Raises BadInput."""


class SessionTable(Model):
    """[session]: what the run is called and how it is judged."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="names the session folder")
    seed: Count = Field(0, description="of specimen, noise and policy; --seed overrides it")
    match_nm: Positive = Field(description="two finds closer than this are one object, and the scoring gate, nm")
    decision_seconds: NonNegative = Field(1.0, description="fixed time charged to each decision, s")
    learn_patches: Count = Field(0, description="train the embedding once this many patches are recorded; 0: never")


class CompareTable(Model):
    """[compare]: after the session, other policies at the same budget on a fresh copy of the specimen (simulated
    specimens and records only; a real specimen has no copy)."""

    policies: tuple[str, ...] = Field(description="kinds of policies without settings, e.g. 'serpentine', 'random'")
    overview: bool = Field(False, description="True: they take the overview too")


class Tables(Model):
    """The tables whose keys do not depend on a kind."""

    session: SessionTable
    overview: OverviewPlan | None = None
    scan: ScanPlan
    drift: DriftPlan | None = None
    damage: DamagePlan | None = None
    areas: tuple[AreaPlan, ...] = ()
    budget: Budget
    stop: StopRules = StopRules()
    compare: CompareTable | None = None

    @model_validator(mode="after")
    def _some_budget(self) -> Tables:
        if self.budget.electrons is None and self.budget.pixels is None:
            raise ValueError("a session needs budget.electrons or budget.pixels")
        return self


@dataclass(frozen=True)
class SessionConfig:
    """A validated configuration and the raw table that it came from (the raw table is what is journaled)."""

    tables: Tables
    driver: DriverConfig
    perceiver: PerceiverConfig
    policy: Policy
    raw: Mapping[str, Any]
    base: Path
    text: str = ""  # the file as its author wrote it

    @property
    def plan(self) -> Plan:
        """What the pure core needs of it."""
        t = self.tables
        return Plan(
            overview=t.overview,
            scan=t.scan,
            drift=t.drift,
            damage=t.damage,
            areas=t.areas,
            budget=t.budget,
            stop=t.stop,
            decision_seconds=t.session.decision_seconds,
            learn_patches=t.session.learn_patches,
            match_nm=t.session.match_nm,
        )


def parse(raw: Mapping[str, Any], base: Path) -> SessionConfig:
    """A raw table as a configuration. Raises BadInput that names the key, the value and what is allowed."""
    parts = {"driver", "perceiver", "policy"}
    tables = validate(Tables, {key: value for key, value in raw.items() if key not in parts}, "")
    driver, perceiver, policy = (build_part(role, raw.get(role), role) for role in ("driver", "perceiver", "policy"))
    for kind in tables.compare.policies if tables.compare else ():
        build_part("policy", {"kind": kind}, f"compare.policies {kind!r}")
    if getattr(policy, "cost", None) == "damage" and tables.damage is None:
        raise BadInput(
            "policy.cost = 'damage', but nothing is charged for damage", "add the table [damage], or count electrons"
        )
    return SessionConfig(
        tables,
        cast(DriverConfig, driver),
        cast(PerceiverConfig, perceiver),
        cast(Policy, policy),
        raw,
        base,
    )


def load(path: Path, seed: int | None = None) -> SessionConfig:
    """Read a session's configuration; ``seed`` overrides its own. Raises BadInput."""
    raw = read_toml(path)
    text = path.read_text(encoding="utf-8")
    if seed is not None:
        session = raw.get("session")
        if not isinstance(session, dict):
            raise BadInput("[session] is missing", "add [session] with a name and match_nm")
        session["seed"] = seed
        text = f"# run with --seed {seed}, which overrides session.seed below\n{text}"
    return replace(parse(raw, path.resolve().parent), text=text)


def load_driver(path: Path) -> DriverConfig:
    """The [driver] of a configuration, whatever else is in it. Raises BadInput."""
    return cast(DriverConfig, build_part("driver", read_toml(path).get("driver"), "driver"))


def json_schema() -> dict[str, Any]:
    """JSON schema of the whole configuration, with every installed part. What tables inside others may hold (specimens)
    and what has files of its own (simulations) is among the definitions, as ``specimen.KIND`` and ``simulation.KIND``.
    """
    schema = Tables.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for role in ("driver", "perceiver", "policy", "specimen", "simulation"):
        options = []
        for kind in kinds(role):
            part = part_class(role, kind).model_json_schema(ref_template=f"#/$defs/{role}.{kind}.{{model}}")
            for name, body in part.pop("$defs", {}).items():
                definitions[f"{role}.{kind}.{name}"] = body
            definitions[f"{role}.{kind}"] = part
            options.append({"$ref": f"#/$defs/{role}.{kind}"})
        if role in ("specimen", "simulation"):
            continue
        schema["properties"][role] = {"oneOf": options, "description": f"entry points: {GROUPS[role]}"}
        schema.setdefault("required", []).append(role)
    schema["title"] = "aecontrol session"
    return schema
