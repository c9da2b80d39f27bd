"""A process of ours that works for a rehearsal, and is gone when that is: both ends say one JSON document a line.

What it is told through the pipe holds addresses and keys; arguments and environment, which others see, hold none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from typing import IO, Any, ClassVar, cast

from alphapulse_encryption import secrecy
from alphapulse_encryption.secrecy import bare_environment

Said = Mapping[str, Any]

_SECONDS_BETWEEN_LOOKS_AT_PARENT = 1.0
_saying = threading.Lock()


class Child:
    """The process, as the one that started it sees it."""

    # That it runs.
    module: ClassVar[str]

    def __init__(self) -> None:
        environment = bare_environment() | {n: os.environ[n] for n in ("PYTHONPATH",) if n in os.environ}
        # In a session of its own: what a terminal sends is for the parent to act on.
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._orders = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, what: Said) -> None:
        """Say something to it; whether it is there still, its answer shows."""
        with suppress(BrokenPipeError):
            self._orders.write(json.dumps(what).encode() + b"\n")
            self._orders.flush()

    def answer(self) -> Said | None:
        """The next thing it says; None at its end."""
        line = self._answers.readline()
        return cast(Said, json.loads(line)) if line.endswith(b"\n") else None

    def answers_within(self, seconds: float) -> bool:
        """Whether it says something in time, where nothing that it said before was left unread."""
        return bool(wait([self._answers.fileno()], seconds))

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._orders, self._answers):
            with suppress(BrokenPipeError):
                pipe.close()


def say(what: Said) -> None:
    """In the process: a line for the other end."""
    with _saying:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


def heard() -> Iterator[Said]:
    """In the process: what it is told."""
    return map(json.loads, sys.stdin)


def run(main: Callable[[], None]) -> None:
    """In the process: do all that it is for, and end with it, or with the parent."""
    secrecy.tell_no_texts()
    secrecy.leave_no_core()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with suppress(BrokenPipeError):
        main()
    # Threads may be at work still: what they are at is nobody's any more.
    os._exit(0)


def _end_with(parent: int) -> None:
    # The end of the input says the same, but for a copy of the pipe that a fork of the parent still holds.
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS_AT_PARENT)
    os._exit(0)
