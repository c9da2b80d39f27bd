"""What terminals show of errors that nobody expected, and what a crash leaves behind; seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import alphapulse_encryption

CANARY = "canary-91c5d2aa"


def python(program: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("ALPHAPULSE_")}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )


IN_EVERY_WAY = f"""
import threading
from alphapulse_encryption import uncaught
uncaught.tell_no_texts()

def work():
    try:
        int("{CANARY}")
    except ValueError as error:
        error.add_note("{CANARY}")
        raise KeyError("{CANARY}") from error

class Finalized:
    def __del__(self):
        work()

thread = threading.Thread(target=work)
thread.start()
thread.join()
Finalized()
work()
"""


def test_in_a_thread_in_a_finalizer_and_at_the_end() -> None:
    shown = python(IN_EVERY_WAY)
    assert shown.returncode == 1
    assert CANARY not in shown.stderr + shown.stdout
    assert shown.stderr.count("Unexpected KeyError. Its text is not kept") == 3
    assert shown.stderr.count("<string>:11 in work") == 3
    open_hearted = python(IN_EVERY_WAY.replace("uncaught.tell_no_texts()", ""))
    assert open_hearted.stderr.count(CANARY) >= 6


@pytest.mark.parametrize(
    "module",
    [
        "alphapulse_encryption",
        "alphapulse_encryption.ui",
        "alphapulse_encryption.cli.demo",
        "alphapulse_encryption.sample.postgres",
        "alphapulse_encryption.sample.database",
    ],
)
def test_a_program(module: str) -> None:
    """One that meets an error of nobody's at its very beginning."""
    shown = python(
        f"""
import argparse, resource, runpy, sys

def bad(*_, **__):
    print("core files:", resource.getrlimit(resource.RLIMIT_CORE)[0])
    raise KeyError("{CANARY}")

argparse.ArgumentParser.parse_args = bad
sys.argv = ["program"]
runpy.run_module("{module}", run_name="__main__", alter_sys=True)
"""
    )
    assert shown.returncode == 1, shown
    assert "core files: 0" in shown.stdout
    assert "Unexpected KeyError" in shown.stderr, shown
    assert CANARY not in shown.stderr


def test_no_program_is_without() -> None:
    main = 'if __name__ == "__main__":\n'
    package = Path(alphapulse_encryption.__file__).parent
    programs = {
        path.relative_to(package).as_posix(): path.read_text().partition(main)[2]
        for path in package.rglob("*.py")
        if main in path.read_text()
    }
    assert len(programs) >= 8
    del programs["sample/application/__main__.py"]  # the application's own, to be copied
    begins = "    uncaught.tell_no_texts()\n    uncaught.leave_no_core()\n"
    assert [name for name, text in programs.items() if not text.startswith(begins)] == []
