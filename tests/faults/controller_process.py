"""A session in a process of its own, which may be killed: ``python -m tests.faults.controller_process CONFIG FOLDER``.

Begins the session or goes on with it. Exit code 0: it has stopped, and what `aecontrol verify` says is in
``verified.json``; 3: it has paused, and wants to be resumed; anything else: it gave up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from aecontrol.config import load
from aecontrol.session import Session
from aecontrol.verify import verify_session

PAUSED = 3


def main(config: Path, folder: Path) -> int:
    """One run, until the session stops or pauses."""
    begun = (folder / "session.sqlite").exists()
    session = Session.reopen(folder) if begun else Session.create(load(config), folder)
    state = session.run(device="cpu")
    session.close()
    if state.stopped is None:
        print(f"paused: {state.paused}", file=sys.stderr)
        return PAUSED
    (folder / "verified.json").write_text(json.dumps(verify_session(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
