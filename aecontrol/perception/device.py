"""Where the networks run, decided once."""

from __future__ import annotations

from aecontrol.errors import BadInput

THREADS = 1
"""CPU threads of every network: fixed, so that a resumed session reads the same frame to the same last digit."""


def resolve(device: str) -> str:
    """'cpu' or 'cuda' for 'auto', 'cpu' or 'cuda'; fixes torch's thread count. Raises BadInput for a GPU that is not
    there."""
    import torch

    torch.set_num_threads(THREADS)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: no CUDA device is usable", "use --device cpu, or mend the driver")
    return device
