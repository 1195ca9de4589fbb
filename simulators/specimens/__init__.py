"""Specimens with ground truth: atoms, labels per atom and labels of places, each from a seed."""

from .base import MARGIN_NM, MAX_ATOMS, TARGET_KINDS, Specimen, assemble, tile

__all__ = ["MARGIN_NM", "MAX_ATOMS", "TARGET_KINDS", "Specimen", "assemble", "tile"]
