"""A microscope behind a bridge, as the session sees it: the controller's half of the protocol, and how frames come."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aecontrol.durable import load_npy, sha256_hex
from aecontrol.errors import InstrumentFault
from aecontrol.exposure import Outcome
from aecontrol.exposure import messages as m
from aecontrol.exposure.client import Client
from aecontrol.protocols import FrameData, Image, Truth
from aecontrol.types import Capabilities, Charge, InstrumentState, ScanRegion

from .column_messages import Ideal, TruthIs
from .column_truth import ideal_from, truth_from

FetchBytes = Callable[[str, int], bytes]
"""(sha256, number of bytes) -> the file of the bridge's spool with that digest."""


class RemoteMicroscope:
    """A :class:`~aecontrol.protocols.Microscope` over ``client``; ``fetch_bytes`` brings files of the spool,
    ``release`` closes the connection."""

    def __init__(self, client: Client, fetch_bytes: FetchBytes, release: Callable[[], None]) -> None:
        self._client, self._fetch_bytes, self._release = client, fetch_bytes, release

    def capabilities(self) -> Capabilities:
        """What the instrument is."""
        return self._client.capabilities()

    def expose(self, key: str, region: ScanRegion, bound: Charge) -> Outcome:
        """Fire once, or give the outcome that the key already has."""
        return self._client.expose(key, region, bound)

    def cancel(self, key: str) -> Outcome:
        """The terminal outcome of ``key``; a key never seen is tombstoned."""
        return self._client.settle(key)

    def fetch(self, key: str) -> FrameData:
        """The spooled frame, every digest checked on arrival."""
        spooled = self._client.frames(key)
        if spooled is None:
            raise InstrumentFault(f"there is no frame for key {key[:12]}")
        channels = {}
        for name, file in spooled.channels.items():
            data = self._fetch_bytes(file.sha256, file.nbytes)
            if sha256_hex(data) != file.sha256:
                raise InstrumentFault(f"frame {key[:12]}, channel {name} does not match its digest")
            channels[name] = load_npy(data, name)
        return FrameData(channels, spooled.started_s, spooled.electrons_per_pixel, spooled.flags)

    def acknowledge(self, key: str) -> None:
        """The frame is durable here: the bridge may delete its copy."""
        self._client.forget(key)

    def blank(self) -> None:
        """Blank the beam at once."""
        self._client.blank()

    def ping(self) -> None:
        """Returns once the bridge has answered."""
        self._client.ask(m.Ping)

    def state(self) -> InstrumentState:
        """What the instrument says of itself."""
        return self._client.state()

    def move_stage(self, to_nm: tuple[float, float]) -> None:
        """Move the stage so that the field's corner lies at ``to_nm`` of the specimen frame; blocks until settled."""
        self._client.move_stage(to_nm)

    def park(self, at_nm: tuple[float, float]) -> None:
        """Rest the idle beam there."""
        self._client.park(at_nm)

    def truth(self, target: str) -> Truth | None:
        """True objects of a simulated instrument, for the scorer only; None for a real one."""
        told = self._arrays(target=target)
        return None if told is None else truth_from(TruthIs.model_validate_json(told[0], strict=True), told[1])

    def noiseless(self, region: ScanRegion) -> Mapping[str, Image] | None:
        """The ideal image of ``region`` on a simulated instrument, for the scorer only; None for a real one."""
        told = self._arrays(region=region)
        return None if told is None else ideal_from(Ideal.model_validate_json(told[0], strict=True), told[1])

    def _arrays(self, **what: object) -> tuple[bytes, list[bytes]] | None:
        if not self.capabilities().simulated:
            return None
        reply = self._client.ask(m.Truths, **what)
        if not isinstance(reply, m.Arrays):
            return None
        about, *arrays = [self._fetch_bytes(file.sha256, file.nbytes) for file in reply.files]
        return about, arrays

    def close(self) -> None:
        """Give the lease back, which blanks, and close the connection."""
        try:
            self._client.release()
        finally:
            self._release()
