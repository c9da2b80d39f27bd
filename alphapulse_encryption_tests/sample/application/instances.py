"""Instances of the sample application: real processes, and a switch that decides which of them answers."""

from __future__ import annotations

import base64
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption_tests import forked
from alphapulse_encryption_tests.migration import support, walk

MASTER_KEY = base64.b64encode(bytes(range(32))).decode()
_APPLICATION = "alphapulse_encryption.sample.application"


def environment(url: str, phase: str) -> dict[str, str]:
    """Of a process of the application, with the key that `walk` migrates with."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ALPHAPULSE_", "DAGSTER_", "PG"))
    }
    return inherited | {
        "ALPHAPULSE_DATABASE_URL": url,
        "ALPHAPULSE_ENCRYPTION_MASTER_KEY": MASTER_KEY,
        "ALPHAPULSE_ENCRYPTION_PHASE": phase,
    }


class Instance:
    """A running instance.

    Args:
        url: the database.
        phase: the only thing in which instances differ.
    """

    def __init__(self, url: str, phase: str) -> None:
        self.phase = phase
        self._program = forked.Program(_APPLICATION, ["--port", "0"], environment(url, phase))
        support.until(self._listens, f"the instance in the phase {phase} listens")
        self.address = self._program.output.strip()

    def _listens(self) -> bool:
        if not self._program.running:
            done = self._program.ended()
            raise AssertionError(done.stdout + done.stderr)
        return self._program.output.endswith("\n")

    @property
    def complaints(self) -> str:
        """What it has printed to stderr."""
        return self._program.errors

    def stop(self) -> None:
        """Stop it as a deployment does, and see that it had nothing to complain of."""
        self._program.stop()
        done = self._program.ended(support.PATIENCE)
        assert (done.stdout.strip(), done.stderr) == (self.address, ""), done.stderr

    def kill(self) -> None:
        """However it is."""
        if self._program.running:
            self._program.kill()
            self._program.ended()


@contextmanager
def instance(url: str, phase: str) -> Iterator[Instance]:
    """An instance for the length of a `with` block."""
    started = Instance(url, phase)
    try:
        yield started
        started.stop()
    finally:
        started.kill()


@dataclass
class Traffic:
    """Which instances requests go to; changes while clients go on asking."""

    url: str
    serving: list[Instance] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    _under_way: Counter[str] = field(default_factory=Counter)
    _lock: threading.Condition = field(default_factory=threading.Condition)

    def start(self, phase: str) -> None:
        """Start another instance and let it answer beside those that are there."""
        started = Instance(self.url, phase)
        with self._lock:
            self.serving.append(started)

    def stop_oldest(self) -> None:
        """Take requests away from the instance that was started first; stop it when it has answered the last one."""
        with self._lock:
            oldest = self.serving.pop(0)
            self._lock.wait_for(lambda: not self._under_way[oldest.address], support.PATIENCE)
        oldest.stop()

    def complaints(self) -> str:
        """What instances have printed to stderr, for messages of failures."""
        return "\n".join(one.complaints for one in self.serving)

    def kill(self) -> None:
        """At the end of a test, however it went."""
        for one in self.serving:
            one.kill()

    @contextmanager
    def request(self) -> Iterator[str]:
        """The address that the next request goes to."""
        with self._lock:
            chosen = random.choice(self.serving)
            self._under_way[chosen.address] += 1
        try:
            yield chosen.address
        finally:
            with self._lock:
                self._under_way[chosen.address] -= 1
                self.answered[chosen.phase] += 1
                self._lock.notify_all()


@contextmanager
def traffic(url: str, phase: str) -> Iterator[Traffic]:
    """Traffic to one instance at first."""
    found = Traffic(url)
    try:
        found.start(phase)
        yield found
    finally:
        found.kill()


# How every table gets to where an instance of a phase may work.


def prepare(url: str, phase: str) -> None:
    """Bring all tables of a plain sample to where the phase is right."""
    for table in walk.CATALOGUE.tables:
        if phase == "encrypted":
            walk.encrypt(url, table)
            walk.verify(url, table)
            switch_to_ciphertext(walk.target(url), table)
        elif phase != "off":
            support.add_columns(url, table, keys=walk.KEYS)
