"""What is installed and what is missing, from package metadata: quick, and importing nothing heavy."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from typing import Any

from aecontrol.registry import GROUPS, kinds

_PROBE = """
import json, torch
print(json.dumps({"torch": torch.__version__, "cuda": torch.cuda.is_available(),
    "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu", 
    "threads": torch.get_num_threads()}))
"""


def examine(probe: bool) -> dict[str, Any]:
    """Sections of name -> text. ``probe`` starts a child process that imports torch and says what it can use."""
    core = [_name(r) for r in requires("aecontrol") or () if "extra ==" not in r]
    extras = {_name(r): _extra(r) for r in requires("aecontrol") or () if "extra ==" in r and "'test'" not in r}
    facts: dict[str, Any] = {
        "system": {
            "aecontrol": version("aecontrol"),
            "python": platform.python_version(),
            "machine": platform.platform(),
        },
        "packages": {name: _version(name, "pip install -c constraints.txt -e .") for name in core},
        "extras": {
            name: _version(name, f"pip install -c constraints.txt -e '.[{extra}]'") for name, extra in extras.items()
        },
        "parts": {role: ", ".join(kinds(role)) or "(none)" for role in GROUPS},
        "weights": _weights(),
    }
    if probe:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=False)
        facts["probe"] = json.loads(done.stdout) if done.returncode == 0 else {"torch": done.stderr.strip()[-400:]}
    return facts


def _name(requirement: str) -> str:
    for mark in "[<>=!~; ":
        requirement = requirement.split(mark)[0]
    return requirement


def _extra(requirement: str) -> str:
    return requirement.split("extra ==")[1].strip(" '\"")


def _version(name: str, mend: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"missing: {mend}"


def _weights() -> dict[str, str]:
    folder = files("aecontrol.perception") / "weights"
    shipped = [item for item in folder.iterdir() if item.name.endswith(".safetensors")] if folder.is_dir() else []
    found = {item.name: f"{len(item.read_bytes()) / 1e6:.2f} MB" for item in shipped}
    return found or {"atoms.safetensors": "missing: aecontrol train atoms configs/train_atoms.toml"}
