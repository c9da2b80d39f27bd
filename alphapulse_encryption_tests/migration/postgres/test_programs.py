"""Programs of PostgreSQL's as children."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from alphapulse_encryption.migration.postgres import programs


def test_what_a_child_leaves_behind_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_EXIT_TIMEOUT", 0.2)
    command = ["sh", "-c", "sleep 600 & echo $!; echo something went wrong >&2"]
    environment = {"PATH": os.environ["PATH"]}
    with programs.child(command, environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as (
        process,
        said,
    ):
        assert process.stdout is not None
        left = int(process.stdout.readline())
        try:
            assert process.wait() == 0
            assert said() == "something went wrong\n"
        finally:
            # Had it ended by itself, there would be nothing to see here.
            os.kill(left, signal.SIGKILL)
