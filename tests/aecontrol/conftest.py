"""The command line in this process: what most tests of commands need; those of what a process costs start their own."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def aecontrol(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder: exit code, stdout and stderr. A traceback would be an exception here."""
    from aecontrol import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["aecontrol", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run
