"""Pictures small enough to keep."""

from __future__ import annotations

import io

LARGEST_PNG = 200_000
"""Bytes."""


def small(png: bytes) -> bytes:
    """The picture with fewer colours and pixels, until it is small enough to keep."""
    from PIL import Image

    whole = Image.open(io.BytesIO(png)).convert("RGB")
    for wide in (1200, 1000, 900, 800, 700, 600):
        width = min(wide, whole.width)
        reduced = whole.resize((width, round(whole.height * width / whole.width)), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        # maximum coverage keeps the few red pixels of marks apart from the many grey ones
        reduced.quantize(24, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
        if len(data.getvalue()) < LARGEST_PNG:
            break
    return data.getvalue()
