"""Pictures small enough to keep."""

from __future__ import annotations

import io

LARGEST_PNG = 200_000
"""Bytes."""


def small(png: bytes) -> bytes:
    """The picture with fewer pixels and colours, until it is small enough to keep."""
    from PIL import Image

    whole = Image.open(io.BytesIO(png)).convert("RGB")
    for wide, colours in ((1200, 128), (1000, 128), (1000, 24), (800, 24), (600, 24)):
        width = min(wide, whole.width)
        reduced = whole.resize((width, round(whole.height * width / whole.width)), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        # maximum coverage keeps the few red pixels of marks apart from the many grey ones
        reduced.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
        if len(data.getvalue()) < LARGEST_PNG:
            break
    return data.getvalue()
