"""Where the networks run, decided once."""

from __future__ import annotations

from aecontrol.errors import BadInput

THREADS = 1
"""CPU threads of every network in a session: fixed, so that a resumed one reads the same frame to the same last digit,
and one, so that instrument and watchdog have the other cores."""


def resolve(device: str, threads: int = THREADS) -> str:
    """'cpu' or 'cuda' for 'auto', 'cpu' or 'cuda'; sets torch's thread count. Raises BadInput for a GPU that is not
    there."""
    import torch

    torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: no CUDA device is usable", "use --device cpu, or mend the driver")
    return device
