"""Results that took long, kept on disk by a hash of what they depend on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

T = TypeVar("T")
log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where they are kept: ``$XDG_CACHE_HOME/aecontrol``, by default ``~/.cache/aecontrol``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aecontrol"


def kept(path: Path, read: Callable[[Path], T], make: Callable[[], T], write: Callable[[Path, T], None]) -> T:
    """What ``path`` holds; where it is absent or damaged, what ``make`` gives, written there for the next time."""
    if path.is_file():
        try:
            return read(path)
        except Exception as error:  # readers of a damaged file raise anything
            log.warning("%s is damaged (%s) and made anew", path, error)
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        write(partial, value)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return value
