"""One family of errors. Each names the value, the limit and the mend, and knows its exit code."""

from __future__ import annotations


class AecontrolError(Exception):
    """Base: an internal error (exit code 1) unless a subclass says otherwise."""

    exit_code = 1

    def __init__(self, what: str, mend: str = "") -> None:
        self.what, self.mend = what, mend
        super().__init__(f"{what}\n  mend: {mend}" if mend else what)


class BadInput(AecontrolError):
    """The user asked for something that cannot be done; raised before any electron is spent."""

    exit_code = 2


class RecordCannotAnswer(BadInput):
    """A recorded image was asked for something that it does not hold (rotation, finer pixels, outside)."""


class SafetyStop(AecontrolError):
    """A safety limit, a latch or an unmet precondition ended the session early."""

    exit_code = 3


class InstrumentFault(AecontrolError):
    """The instrument failed or contradicted itself; what it may have delivered stays charged."""

    exit_code = 4


class StorageFault(AecontrolError):
    """A journal, ledger or frame could not be written or is damaged; nothing more is exposed."""

    exit_code = 4
