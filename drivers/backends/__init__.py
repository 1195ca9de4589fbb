"""Backends: one module for each kind of instrument that a bridge can serve."""
