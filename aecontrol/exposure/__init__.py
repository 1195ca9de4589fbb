"""The exposure protocol: both halves as pure state machines, no clock, no disk, no beam.

The controller's half (C) and the instrument's half (S) each keep a ledger of keys::

    C:  RESERVED ------------------------------> POST(m) | VOID | INDET(r)
    S:  (absent) -> FIRING(r) -> POST(m)         normal
                 -> VOID                         refused by an interlock, or CANCEL tombstone
        FIRING(r) found at start-up -> INDET(r)  charged in full, never fired again

``keys`` and ``ledger`` are all that an instrument in the same process needs: the two halves then meet through
:class:`~aecontrol.protocols.Microscope`. Over a wire, ``messages`` is what travels, ``server`` is S with its lease,
fencing and heartbeats, ``client`` is C; both are told the time and handed their messages. A *shell* makes each record
durable before it acts on what follows it.
"""

from .interlocks import InterlockLimits
from .keys import KeyRecord, KeyState, Outcome, command_digest, make_key, settle
from .ledger import (
    Entry,
    Ledger,
    LedgerRecord,
    absorb,
    answer,
    delivered,
    on_boot,
    on_cancel,
    on_expose,
    on_fired,
)

__all__ = [
    "Entry",
    "InterlockLimits",
    "KeyRecord",
    "KeyState",
    "Ledger",
    "LedgerRecord",
    "Outcome",
    "absorb",
    "answer",
    "command_digest",
    "delivered",
    "make_key",
    "on_boot",
    "on_cancel",
    "on_expose",
    "on_fired",
    "settle",
]
