"""One well-formed request of every kind, to start mutations from; and any request, for properties."""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from aecontrol.exposure import messages as m
from aecontrol.types import Charge, ScanRegion

KEY = "a" * 64
REGION = ScanRegion(center_nm=(10.0, 10.0), fov_nm=(4.0, 4.0), shape=(8, 8), dwell_time_s=1e-6)
BOUND = Charge(electrons=10_000, pixels=64, peak_fluence_e_per_A2=50.0, seconds=1e-3)
KINDS: tuple[type[m.AnyRequest], ...] = get_args(get_args(m.Request)[0])
FIELDS = {
    "client": "c", "session": "s", "seq": 0, "head": "0" * 64, "force": False, "epoch": 1, "tick": 2, "seconds": 1.0,
    "key": KEY, "boot_id": "boot", "deadline_ns": 10**12, "region": REGION, "bound": BOUND, "to_nm": (5.0, -5.0),
    "at_nm": (1.0, 1.0), "digests": {"HAADF": "c" * 64}, "after": 0, "target": "vacancy", "reason": "looked, all well",
}  # fmt: skip


def samples() -> list[bytes]:
    """One of each, as bytes."""
    return [
        m.encode(kind(id=7, **{name: FIELDS[name] for name in kind.model_fields if name in FIELDS})) for kind in KINDS
    ]


small = st.integers(0, 4)
VALUES = {
    "id": st.integers(1, 2**63 - 1),
    "client": st.just("c"),
    "session": st.sampled_from(["s", "t"]),
    "seq": small,
    "head": st.sampled_from(["0" * 64, "f" * 64]),
    "force": st.booleans(),
    "epoch": small,
    "tick": st.integers(0, 2**62),
    "seconds": st.floats(1e-6, 1e9),
    "key": st.integers(0, 20).map("{:064x}".format),
    "boot_id": st.sampled_from(["boot", "earlier"]),
    "deadline_ns": st.integers(0, 2**62),
    "region": st.builds(
        ScanRegion,
        center_nm=st.tuples(st.floats(-1e6, 1e6), st.floats(0, 20)),
        fov_nm=st.tuples(st.floats(1e-3, 30), st.floats(1e-3, 30)),
        rotation_rad=st.floats(-10, 10),
        shape=st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
        dwell_time_s=st.floats(1e-9, 10),
        signal=st.sampled_from(["images", "spectra"]),
        shift_nm=st.tuples(st.floats(-200, 200), st.floats(-1e9, 1e9)),
    )
    | st.just(REGION),
    "bound": st.builds(
        Charge,
        electrons=st.none() | st.integers(0, 2**62),
        pixels=st.integers(0, 2**62),
        peak_fluence_e_per_A2=st.none() | st.floats(0, 1e12),
        seconds=st.floats(0, 1e6),
    )
    | st.just(BOUND),
    "to_nm": st.tuples(st.floats(-1e6, 1e6), st.floats(-100, 100)),
    "at_nm": st.tuples(st.floats(-1, 30), st.floats(-1, 30)),
    "digests": st.dictionaries(st.sampled_from(["HAADF", "BF"]), st.just("c" * 64)),
    "after": st.integers(0, 2**62),
    "target": st.sampled_from([None, "vacancy"]),
    "reason": st.just("looked, all well"),
}


def any_request() -> st.SearchStrategy[m.AnyRequest]:
    """Any well-formed request, most of them absurd, a third of them exposures."""
    kinds = (*KINDS, *(m.Expose,) * (len(KINDS) // 2))
    return st.one_of(
        *(st.builds(kind, **{name: VALUES[name] for name in kind.model_fields if name in VALUES}) for kind in kinds)
    )
