"""`aecontrol train adapt`: the atom finder learns from a session's own frames, or from other images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from aecontrol.errors import BadInput
from aecontrol.events import Recorded
from aecontrol.files import read_image
from aecontrol.measuring import load_array
from aecontrol.session import read_events
from aecontrol.types import Model, Positive

if TYPE_CHECKING:
    from aecontrol.perception.own_frames import Frame

JOURNAL = "session.sqlite"


class Request(Model):
    """What is to be learnt from, and by which networks."""

    sources: tuple[Path, ...] = Field(min_length=1, description="session folders and image files")
    pixel_size_nm: Positive | None = Field(None, description="side of a pixel of the images, nm; None: as they say")
    channel: str | None = Field(None, description="which channel of a session, or image of a file that holds several")
    weights: Path | None = Field(None, description="safetensors file to adapt; None: the shipped ones")


def adapt(
    request: Request, out: Path, device: str, progress: Callable[[int, int, float], None] | None = None
) -> dict[str, Any]:
    """Adapt the finder and write its card to ``out``, with weights if they pass; see ``perception.adapt``.

    Raises BadInput, StorageFault.
    """
    from aecontrol.perception.adapt import adapt as learn

    frames = [frame for source in request.sources for frame in _frames(source, request)]
    command = f"aecontrol train adapt {' '.join(map(str, request.sources))} --out {out}"
    return learn(frames, out, parent=request.weights, device=device, progress=progress, command=command)


def _frames(source: Path, request: Request) -> Iterator[Frame]:
    """The usable frames of a session that atoms can be found in, or the one of a file."""
    from aecontrol.perception.own_frames import Frame

    if not source.is_dir():
        picture = read_image(source, request.channel)
        pixel = request.pixel_size_nm or picture.pixel_size_nm
        if pixel is None:
            raise BadInput(f"{source.name} does not say how large its (square) pixels are", "give --pixel-size-nm")
        yield Frame(source.name, picture.array, (pixel, pixel))
        return
    if not (source / JOURNAL).is_file():
        raise BadInput(f"{source}: no session", "give a session folder or image files")
    yield from _recorded(source, request.channel)


def _recorded(folder: Path, channel: str | None) -> Iterator[Frame]:
    """The fine frames of a session, in the order in which they were taken."""
    from aecontrol.perception.own_frames import Frame
    from aecontrol.perception.sampling import COARSEST_KEPT_NM

    taken = [event for event in read_events(folder) if isinstance(event, Recorded)]
    for event in taken:
        frame = event.frame
        if not frame.usable or max(frame.region.pixel_size_nm) > COARSEST_KEPT_NM:
            continue  # an overview: its atoms are not resolved
        name = channel or next(iter(frame.channels))
        if name not in frame.channels:
            raise BadInput(f"{folder}: no channel {name!r}", f"it has {', '.join(frame.channels)}")
        yield Frame(
            f"{folder.name}/{event.key[:12]}", load_array(folder, frame.channels[name]), frame.region.pixel_size_nm
        )
