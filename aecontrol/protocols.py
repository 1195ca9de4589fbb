"""The small interfaces between the core and its interchangeable parts.

Every docstring answers five things: what it does, units and shapes, what it may raise, whether it blocks, and whether
calling it twice is safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from aecontrol.exposure import Outcome
from aecontrol.types import ATOM_LABELS, Atom, Capabilities, Charge, Decision, Observation, ScanRegion

Image = NDArray[np.generic]


@dataclass(frozen=True)
class FrameData:
    """A fetched frame: ``channels`` name -> [rows, cols] array; ``flags`` and times as the instrument says."""

    channels: Mapping[str, Image]
    started_s: float
    electrons_per_pixel: float | None
    flags: tuple[str, ...] = ()


@runtime_checkable
class Microscope(Protocol):
    """An instrument that exposes regions. Every verb is idempotent by key: a key fires at most once, ever."""

    def capabilities(self) -> Capabilities:
        """What the instrument is. Does not block; safe to repeat; the answer never changes within a session."""

    def expose(self, key: str, region: ScanRegion, bound: Charge) -> Outcome:
        """Fire ``region`` under ``key``, never delivering more than ``bound``. Blocks until the beam is blanked.

        A key seen before returns its recorded outcome and fires nothing. A refusal by an interlock is an outcome
        (VOID), not an exception. Raises InstrumentFault when the instrument breaks; the key must then be settled
        with :meth:`cancel`.
        """

    def cancel(self, key: str) -> Outcome:
        """The terminal outcome of ``key``; an unknown key is tombstoned (VOID) so that it can never fire. Does not
        expose; safe to repeat. Raises InstrumentFault when the ledger cannot be written."""

    def fetch(self, key: str) -> FrameData:
        """The frame of ``key``, verified against the digest in the instrument's ledger. Does not expose; safe to
        repeat until acknowledged. Raises InstrumentFault when there is no such frame or it is damaged."""

    def acknowledge(self, key: str) -> None:
        """Tell the instrument that the frame is durable here, so that it may delete its copy. Safe to repeat."""

    def blank(self) -> None:
        """Blank the beam at once. Safe to repeat; needs no lease."""

    def close(self) -> None:
        """Blank and release. Safe to repeat."""


@dataclass(frozen=True)
class Change:
    """Something that the beam did to one atom: where (x, y) in nm, what ('removed', 'displaced', 'healed', 'hopped'),
    at which fluence and when on the instrument's clock; ``site``: which of ``Truth.sites`` (-1: not told)."""

    position_nm: tuple[float, float]
    kind: str
    fluence_e_per_A2: float
    time_s: float
    site: int = -1


@dataclass(frozen=True)
class Truth:
    """What is really there, for scoring only: ``targets`` [n, 2] (x, y) in nm as the session started and their
    ``labels``; ``electrons_delivered`` by the column's own meter; ``atoms`` [m, 2] left now, the ``changes`` so far in
    order, and ``sites`` [n, 3]: (x, y) in nm of every site as born and the atomic number of what sat there, 0 for a
    vacant one. The last four are None or empty for a record."""

    targets: NDArray[np.float64]
    labels: tuple[str, ...]
    electrons_delivered: int | None = None
    atoms: NDArray[np.float64] | None = None
    changes: tuple[Change, ...] = ()
    sites: NDArray[np.float64] | None = None


@runtime_checkable
class HasTruth(Protocol):
    """An instrument that knows what is there. Only the session's scorer may ask; perception and policies cannot."""

    def truth(self, target: str) -> Truth | None:
        """Target objects of kind ``target`` ('vacancy', 'atom') in the whole field; None when not known."""

    def noiseless(self, region: ScanRegion) -> Mapping[str, Image] | None:
        """What an ideal instrument would see of ``region`` now, fraction of the beam by channel, without exposing
        anything; None for a record."""


@dataclass(frozen=True)
class History:
    """All that a policy may know, folded from the journal.

    ``overview`` holds one Observation per candidate, in candidate order (empty without an overview). ``scans`` are the
    perceived sub-scans in order and ``scanned`` their candidate indices (-1 for a region off the grid). ``feasible``
    is the guard's mask over the candidates: budget, field, already spent areas. ``charges`` are the upper bounds of
    each candidate, but for ``damage``: that is what is expected, at which it will be settled. ``validity`` is the share
    of each candidate's matter that is expected to be undamaged still (empty: nothing is known of damage): what is
    scanned there tells of the specimen only so far.
    ``left`` is the share of the budget that nothing is charged to yet, by currency ('electrons', 'pixels', 'damage',
    'seconds'); a currency without a budget is missing.
    """

    step: int
    overview: tuple[Observation, ...]
    scans: tuple[Observation, ...]
    scanned: tuple[int, ...]
    feasible: tuple[bool, ...]
    charges: tuple[Charge, ...]
    validity: tuple[float, ...] = ()
    left: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Policy(Protocol):
    """Chooses the next region. Pure: the same history, candidates and seed give the same decision, in any process."""

    def decide(self, history: History, candidates: Sequence[ScanRegion], seed: int) -> Decision:
        """The next decision. Must choose among ``history.feasible``; at least one candidate is feasible when called.
        May block for a model fit. Never raises for a failed fit: it takes the next rung of its fallback ladder and
        says so in the explanation. Safe to repeat."""


@dataclass(frozen=True)
class Reading:
    """What perception read in one window. Positions nm in the specimen frame.

    ``atoms`` [n, 8] float64, columns ``types.ATOM_COLUMNS``; ``patches`` [k, size, size] float32 cut around the first
    k target-relevant atoms named by ``patch_atoms`` [k] (indices into ``atoms``), turned by the lattice angle where
    there is one. ``found`` indexes the atoms that are target objects.
    """

    value: float | None
    variance: float | None
    features: Mapping[str, float] = field(default_factory=dict)
    atoms: NDArray[np.float64] | None = None
    found: tuple[int, ...] = ()
    patches: NDArray[np.float32] | None = None
    patch_atoms: NDArray[np.int64] | None = None
    note: str = ""

    def found_atoms(self) -> tuple[Atom, ...]:
        """The target objects as values."""
        if self.atoms is None:
            return ()
        return tuple(
            Atom(
                x_nm=float(row[0]),
                y_nm=float(row[1]),
                label=ATOM_LABELS[int(row[2])],
                confidence=float(np.clip(row[3], 0.0, 1.0)),
                sigma_x_nm=float(row[4]),
                sigma_y_nm=float(row[5]),
                intensity=float(row[6]),
            )
            for row in self.atoms[list(self.found)]
        )


class Embedding(Protocol):
    """A map from patches to latent vectors, behind one interface whatever the method."""

    @property
    def version(self) -> str:
        """Hash of method and weights."""

    def encode(self, patches: NDArray[np.float32]) -> NDArray[np.float64]:
        """[n, size, size] -> [n, d]. Deterministic; safe to repeat."""

    def save(self) -> bytes:
        """The model as safetensors bytes, from which ``load`` rebuilds it exactly."""


class Perceiver(Protocol):
    """Turns frames into readings. Never sees ground truth; deterministic given its weights."""

    @property
    def version(self) -> str:
        """Hash of weights and settings."""

    def read_overview(
        self, image: Image, region: ScanRegion, windows: Sequence[ScanRegion], electrons_per_pixel: float | None
    ) -> list[Reading]:
        """One reading per window (value = cheap evidence for the target with its variance; no ``found``). ``image``
        [rows, cols] is the overview frame taken over ``region``. Abstains with value None rather than guess."""

    def read_scan(self, image: Image, region: ScanRegion, electrons_per_pixel: float | None) -> Reading:
        """The reading of one sub-scan. Abstains with value None and a note rather than guess."""

    def fit_embedding(self, patches: NDArray[np.float32], seed: int) -> Embedding:
        """Train the configured embedding on [n, size, size] patches; seeded and deterministic."""

    def load_embedding(self, data: bytes) -> Embedding:
        """Rebuild an embedding that ``save`` wrote. Raises BadInput on foreign or damaged bytes."""

    def value_from_latents(
        self, patches: NDArray[np.float32], latents: NDArray[np.float64], reference: NDArray[np.float64]
    ) -> tuple[float | None, float | None]:
        """Target value and variance for targets defined on latents ('latent_component', 'novelty'); (None, None) for
        the others, whose value needs no embedding. ``reference`` [m, d]: the training patches' latents."""
