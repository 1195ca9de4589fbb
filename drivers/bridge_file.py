"""The part of a bridge's configuration that its three processes share: the instrument and the heartbeat.

The server has further tables in the same file (limits, address, keys); column process and watchdog do not read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from aecontrol.registry import build_part, validate
from aecontrol.toml_file import read_toml
from aecontrol.types import Count, Model, Positive

from .backend import BackendConfig


class ColumnTable(Model):
    """[column]: the process that holds the instrument."""

    seed: Count = Field(0, description="of specimen and noise, for simulated instruments")
    idle_exit_s: Positive = Field(600.0, description="ends when nobody has spoken to it for so long, s")


class HeartbeatTable(Model):
    """[heartbeat]: how long the beam may stay on unattended."""

    interval_s: float = Field(
        0.1,
        ge=0.02,
        le=10.0,
        description="H, s: the beam is blanked at most 2 H after the last sign of life of the controller",
    )


@dataclass(frozen=True)
class BridgeFile:
    """What column process and watchdog need. ``base`` is where relative paths start, ``raw`` the whole file."""

    backend: BackendConfig
    column: ColumnTable
    heartbeat: HeartbeatTable
    base: Path
    raw: Mapping[str, Any]


def read_bridge_file(path: Path) -> BridgeFile:
    """Read a bridge's configuration. Raises BadInput that names the key, the value and what is allowed."""
    raw = read_toml(path)
    return BridgeFile(
        cast(BackendConfig, build_part("backend", raw.get("backend"), "backend")),
        validate(ColumnTable, raw.get("column", {}), "column"),
        validate(HeartbeatTable, raw.get("heartbeat", {}), "heartbeat"),
        path.resolve().parent,
        raw,
    )
