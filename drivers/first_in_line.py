"""Which thread the machine runs first. Where the beam goes off must not depend on how busy a computer is.

On a machine with every core in use a process that sleeps for 5 ms was seen to wake up 100 ms late; with a real-time
priority it does not. The right to one is given by the computer's owner (``LimitRTPRIO=1`` of a systemd service,
``rtprio`` in ``/etc/security/limits.conf``); without it everything works, and is as late as the machine is busy.
"""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)


def run_first() -> None:
    """Run this thread, and those that it starts, before everything else. It must hardly ever do more than wait."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError as error:
        log.warning("no real-time priority (%s): blanking can be late while the machine is busy", error)


def run_as_others() -> None:
    """Run this thread, started by one that runs first, as any other: it works."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
