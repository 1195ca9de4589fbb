"""Logging that never makes its caller wait for a disk."""

from __future__ import annotations

import logging
import queue
from logging.handlers import QueueHandler, QueueListener


def log_aside() -> QueueListener:
    """From now on a thread of its own writes the log of this process to standard error. Stop what is returned before
    the process ends, so that the last lines are written."""
    written = logging.StreamHandler()
    written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[QueueHandler(lines)])
    listener = QueueListener(lines, written)
    listener.start()
    return listener
