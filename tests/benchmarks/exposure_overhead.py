"""What an exposure costs over a bridge with CURVE on loopback: python -m tests.benchmarks.exposure_overhead

Everything that a session does for one exposure but the pulse and the writing of frames: its own two journal records,
EXPOSE with heartbeat and two ledger records at the bridge, finding and fetching the frame, acknowledging it, copying
the ledger. The pulse with its frame in the spool is timed on a column of the same kind and subtracted (median). Then:
a ping while a scan runs, and the time from BLANK to a beam that is off. ``tests/benchmarks/wire.py`` has the rest.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import zmq

from aecontrol.dose import bound_charge
from aecontrol.exposure import make_key
from aecontrol.journal import Journal
from aecontrol.types import ScanRegion
from drivers.column_link import connect_or_start
from drivers.column_messages import Close, Fire, Fired
from tests.drivers.running_bridge import running, until, write_bridge

SHOTS, PINGS, ABORTS = 300, 500, 20


def region(shape: tuple[int, int], seconds: float) -> ScanRegion:
    """A square in the middle of the field."""
    dwell = seconds / (shape[0] * shape[1])
    return ScanRegion(center_nm=(3.0, 3.0), fov_nm=(4.0, 4.0), shape=shape, dwell_time_s=dwell)


def pulses(folder: Path) -> np.ndarray:
    """Times from FIRE to FIRED on a column of the same kind, s."""
    folder.chmod(0o700)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link, _ = connect_or_start(context, write_bridge(folder, keys=False), folder)
    small, times = region((16, 16), 1e-3), []
    for number in range(SHOTS // 3):
        order = Fire(key=f"{number:064x}", ordinal=number, region=small, not_after_ns=1 << 62)
        before = time.perf_counter()
        link.send(order)
        while not ((reply := link.receive()) and isinstance(reply.message, Fired)):
            link.socket.poll(100)
        times.append(time.perf_counter() - before)
    link.ask(Close(), 5.0)
    link.close()
    context.destroy(linger=0)
    return np.array(times)


def shots(microscope, journal: Journal) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Times of whole exposures, s."""
    times, small = [], region((16, 16), 1e-3)
    bound = bound_charge(small, microscope.capabilities())
    for number in range(SHOTS):
        key = make_key("benchmark", number, 0, small, bound)
        before = time.perf_counter()
        journal.append(f"reserved {key}")
        outcome = microscope.expose(key, small, bound)
        journal.append(outcome.model_dump_json())
        microscope.fetch(key)
        microscope.acknowledge(key)
        times.append(time.perf_counter() - before)
    return np.array(times)


def while_scanning(bridge, folder: Path) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """Times of pings during scans, and from BLANK to the beam off, s."""
    microscope = bridge.driver().build(folder / "client", folder, 0)
    watcher = bridge.driver("observer").build(folder / "watcher", folder, 0)
    pings, aborts = [], []
    for number in range(ABORTS):
        scan = region((256, 256), 10.0)
        bound = bound_charge(scan, microscope.capabilities())
        key = make_key("aborts", number, 0, scan, bound)
        thread = threading.Thread(target=microscope.expose, args=(key, scan, bound))
        thread.start()
        until(lambda: watcher.state().beam_on)
        for _ in range(PINGS // ABORTS):
            before = time.perf_counter()
            watcher.ping()
            pings.append(time.perf_counter() - before)
            time.sleep(0.002)
        before = time.perf_counter()
        watcher.blank()
        until(lambda: not watcher.state().beam_on)
        aborts.append(time.perf_counter() - before)
        thread.join()
    watcher.close()
    microscope.close()
    return np.array(pings), np.array(aborts)


def ms(times: np.ndarray) -> str:
    """Median, 99th percentile and maximum."""
    p50, p99 = np.percentile(times, (50, 99))
    return f"p50 {1e3 * p50:6.2f} ms   p99 {1e3 * p99:6.2f} ms   max {1e3 * times.max():6.2f} ms"


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "alone").mkdir()
        alone = pulses(folder / "alone")
        with running(folder) as bridge:
            microscope = bridge.driver().build(folder / "client", folder, 0)
            journal = Journal(folder / "journal.sqlite")
            times = shots(microscope, journal)
            microscope.close()
        print(f"pulse and its frame in the spool:      {ms(alone)}")
        print(f"exposure in all:                       {ms(times)}")
        print(f"overhead (pulse's median subtracted):  {ms(times - np.median(alone))}")
    with tempfile.TemporaryDirectory() as name, running(Path(name), real_time=True) as bridge:
        pings, aborts = while_scanning(bridge, Path(name))
        print(f"ping during a scan:                    {ms(pings)}")
        print(f"BLANK until the beam is off:           {ms(aborts)}")


if __name__ == "__main__":
    main()
