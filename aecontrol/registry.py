"""Interchangeable parts, found by entry point: a third party adds one without touching this code.

Each part is a pydantic model with a ``kind``; its entry point's name is that kind. Modules named by entry points import
nothing heavy at their top level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from aecontrol.errors import BadInput
from aecontrol.types import Model

M = TypeVar("M", bound=Model)

GROUPS = {
    "driver": "aecontrol.drivers",
    "backend": "aecontrol.backends",
    "specimen": "aecontrol.specimens",
    "policy": "aecontrol.policies",
    "perceiver": "aecontrol.perceivers",
    "scenes": "aecontrol.scenes",
    "simulation": "aecontrol.simulations",
}


@cache
def _points(role: str) -> Mapping[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=GROUPS[role]), key=lambda p: p.name)}


def kinds(role: str) -> tuple[str, ...]:
    """Names of all installed parts of a role, one of GROUPS."""
    return tuple(_points(role))


def part_class(role: str, kind: str) -> type[Model]:
    """The configuration class of one part. Raises BadInput for an unknown kind, or one that cannot be imported."""
    point = _points(role).get(kind)
    if point is None:
        raise BadInput(
            f"{role}.kind = {kind!r} is not known", f"use one of {', '.join(kinds(role)) or '(none installed)'}"
        )
    try:
        loaded = point.load()
    except ImportError as error:
        raise BadInput(f"{role} {kind!r} cannot be imported: {error}", "install what it needs") from error
    if not (
        isinstance(loaded, type) and issubclass(loaded, Model) and get_args(loaded.model_fields["kind"].annotation)
    ):
        raise BadInput(f"{role} {kind!r}: {point.value} is not a configuration model with a literal kind")
    return loaded


def build_part(role: str, table: object, where: str) -> Model:
    """A part from its table, validated. ``where`` names the table in error messages. Raises BadInput."""
    if not isinstance(table, Mapping):
        raise BadInput(
            f"[{where}] is missing or not a table", f"add [{where}] with kind = one of {', '.join(kinds(role))}"
        )
    kind = table.get("kind")
    if not isinstance(kind, str):
        raise BadInput(f"[{where}] has no kind", f"add kind = one of {', '.join(kinds(role))}")
    return validate(part_class(role, kind), table, where)


def tool(name: str) -> Callable[..., Any]:
    """A function that a command calls, from the entry points of the group 'aecontrol.tools': so that the command line
    knows no driver. Raises BadInput when it is not installed or cannot be imported."""
    for point in entry_points(group="aecontrol.tools", name=name):
        try:
            found: Callable[..., Any] = point.load()
            return found
        except ImportError as error:
            raise BadInput(f"{name} cannot be imported: {error}", "install what it needs") from error
    raise BadInput(f"{name} is not installed", "install aecontrol anew: pip install -c constraints.txt -e .")


def validate(model: type[M], table: Mapping[str, Any], where: str) -> M:
    """``table`` as ``model``. Raises BadInput that names each wrong key, its value and what is allowed."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise BadInput(_explain(error, where, model), "see `aecontrol schema` for every key") from error


def _keys(model: type[Model], path: tuple[int | str, ...]) -> str:
    """Keys that the table at ``path`` of ``model`` may have, where that can be told."""
    for step in path:
        field = model.model_fields.get(str(step))
        inner = [a for a in (field.annotation, *get_args(field.annotation)) if field] if field else []
        found = [a for a in inner if isinstance(a, type) and issubclass(a, Model)]
        if not found:
            return ""
        model = found[0]
    return f" (known: {', '.join(model.model_fields)})"


def _explain(error: ValidationError, where: str, model: type[Model]) -> str:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in (where, *item["loc"]) if part != "")
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_keys(model, item['loc'][:-1])}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        else:
            lines.append(f"{key} = {item['input']!r}: {item['msg']}")
    return "; ".join(lines)
