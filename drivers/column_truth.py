"""What a simulated column knows of itself, as messages and back. For scoring only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from aecontrol.durable import load_npy, npy_bytes
from aecontrol.protocols import Change, Truth

from .column_messages import Ideal, TruthIs

Parts = Sequence[bytes]


def truth_message(truth: Truth | None) -> tuple[TruthIs, Parts]:
    """The answer to TRUTH, and its arrays as .npy bytes."""
    if truth is None:
        return TruthIs(known=False), ()
    changes = [(*change.position_nm, change.fluence_e_per_A2, change.time_s, change.site) for change in truth.changes]
    message = TruthIs(
        known=True,
        labels=truth.labels,
        electrons_delivered=truth.electrons_delivered,
        atoms_known=truth.atoms is not None,
        sites_known=truth.sites is not None,
        kinds=tuple(change.kind for change in truth.changes),
    )
    atoms = np.empty((0, 2)) if truth.atoms is None else truth.atoms
    sites = np.empty((0, 3)) if truth.sites is None else truth.sites
    arrays = (truth.targets, atoms, np.array(changes, dtype=np.float64).reshape(-1, 5), sites)
    return message, [npy_bytes(array) for array in arrays]


def truth_from(message: TruthIs, parts: Parts) -> Truth | None:
    """What :func:`truth_message` was given. Raises StorageFault for damaged arrays."""
    if not message.known:
        return None
    targets, atoms, changes, sites = (np.asarray(load_npy(part, "TRUTH"), dtype=np.float64) for part in parts)
    return Truth(
        targets=targets,
        labels=message.labels,
        electrons_delivered=message.electrons_delivered,
        atoms=atoms if message.atoms_known else None,
        changes=tuple(
            Change((float(x), float(y)), kind, float(fluence), float(time_s), int(site))
            for kind, (x, y, fluence, time_s, site) in zip(message.kinds, changes, strict=True)
        ),
        sites=sites if message.sites_known else None,
    )


def ideal_message(images: Mapping[str, NDArray[np.generic]] | None) -> tuple[Ideal, Parts]:
    """The answer to NOISELESS, and its arrays as .npy bytes."""
    if images is None:
        return Ideal(channels=None), ()
    return Ideal(channels=tuple(images)), [npy_bytes(image) for image in images.values()]


def ideal_from(message: Ideal, parts: Parts) -> dict[str, NDArray[np.generic]] | None:
    """What :func:`ideal_message` was given. Raises StorageFault for damaged arrays."""
    if message.channels is None:
        return None
    return {name: load_npy(part, name) for name, part in zip(message.channels, parts, strict=True)}
