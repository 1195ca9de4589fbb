"""Reading of configuration files: short TOML texts, every mistake named."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from aecontrol.errors import BadInput

MAX_CONFIG_BYTES = 1 << 20


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a table. Raises BadInput when it is missing, too large, or not TOML."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BadInput(f"{path} is larger than {MAX_CONFIG_BYTES} bytes", "a configuration is a short text")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist", "give the path of a TOML file; configs/ has examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{path} is not valid TOML: {error}") from error
