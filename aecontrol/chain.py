"""The hash chain of a ledger: what lets two parties compare years of records by one number."""

from __future__ import annotations

import hashlib

GENESIS = "0" * 64


def chain_hash(prev: str, body: str) -> str:
    """Hash of a record: sha256 of its predecessor's hash and its own text."""
    return hashlib.sha256(f"{prev}\n{body}".encode()).hexdigest()
