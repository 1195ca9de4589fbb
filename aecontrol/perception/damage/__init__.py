"""Damage seen: how much a later frame differs from a first one by what the beam did, patch by patch."""
