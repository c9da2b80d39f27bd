"""Traffic in the application's shapes, on any database with a catalogue, for the length of a ``with`` block.

A process of its own makes the requests (``application``), because a benchmark in a process that encrypts measures that
process. It is kept, idle and without connections, from one block to the next: what it wrote in one stage has to be read
in the next, whichever way.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import dagster as dg
from pydantic import Field

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.orm import Phase
from alphapulse_encryption.rehearsal.child import Child, Said
from alphapulse_encryption.rehearsal.measures import Traffic

# Seconds: its connections, and the last requests, may have to wait for a server that is being restarted.
_ANSWER_TIMEOUT = 600

# What says where keys are and how servers are reached; it goes to the process through a pipe.
_SENT = (
    "ALPHAPULSE_ENCRYPTION_",
    "AWS_",
    "VAULT_",
    "PG",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_",
)


class MixConfig(dg.Config):
    """How often requests are of which kind, relative to each other; 0 leaves a kind out."""

    read: float = Field(default=40, ge=0, description="Read a row by its key.")
    look_up: float = Field(default=20, ge=0, description="Look rows up by a search column.")
    update: float = Field(default=25, ge=0, description="Change up to three sensitive columns of a row.")
    insert: float = Field(default=6, ge=0, description="Insert a row like another one.")
    delete: float = Field(default=4, ge=0, description="Delete a row that the traffic has inserted.")
    report: float = Field(default=5, ge=0, description="Read a hundred rows in the order of their keys.")


class TrafficConfig(dg.Config):
    """The application's load during a rehearsal."""

    rate: float = Field(
        default=20,
        ge=0,
        le=1000,
        description="Requests per second, whether earlier ones were answered or not; 0 for no traffic. One core makes "
        "about 200, and what the process that makes them cannot make in time counts as latency.",
    )
    clients: int = Field(
        default=8,
        ge=1,
        le=64,
        description="Sessions at work at once; requests wait their turn behind one of them.",
    )
    library_share: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="How many of the requests go through the runtime library; the others are plain SQL, as long as "
        "instances in the phase off are at work.",
    )
    mix: MixConfig = Field(default_factory=MixConfig, description="How often requests are of which kind.")
    seed: int = Field(default=1, description="Of the choices, to repeat them.")


@dataclass
class Running:
    """Traffic that was begun, or none: the process that makes it, and, once it has ended, what was measured."""

    pid: int | None = None
    measured: Traffic | None = None


@contextmanager
def traffic(
    url: str,
    catalogue: Catalogue,
    phases: Sequence[Phase | str],
    config: TrafficConfig,
    environment: Mapping[str, str],
) -> Iterator[Running]:
    """Traffic for the length of the block.

    Args:
        phases: of the application's instances, which run side by side; with ``off``, plain SQL as well.

    Raises:
        ConfigurationError: there is no such phase, or a key or a table is missing.
        RefusedError: a phase contradicts where the migration stands.
        MigrationError: the traffic does not work, or ended by itself; from the end of the block.
    """
    if config.rate <= 0 or not phases:
        yield Running()
        return
    for phase in phases:
        if phase not in [*Phase]:
            raise ConfigurationError(f"There is no phase {phase!r}; there are {', '.join(Phase)}.")
    process = _begin(
        {
            "url": url,
            "catalogue": catalogue.model_dump(mode="json", by_alias=True),
            "phases": [str(phase) for phase in phases],
            "config": config.model_dump(mode="json"),
            "environment": {n: v for n, v in environment.items() if n.upper().startswith(_SENT)},
        }
    )
    try:
        running = Running(process.pid)
        yield running
        running.measured = Traffic.model_validate(process.order("end")["measured"])
    except BaseException:
        # Of a stage that has failed nobody wants to know how quick it was.
        process.kill()
        raise
    _kept.append(process)


class _Ended(MigrationError):
    """The process that makes the traffic is not there any more."""


class _Process(Child):
    """The process that makes the traffic, which ends when this one does."""

    module = "alphapulse_encryption.rehearsal.traffic.application"

    def order(self, what: str, details: Said | None = None) -> Said:
        """Send an order and wait for the answer.

        Raises:
            MigrationError: as the answer says, or there is none.
        """
        self.tell({what: details})
        if not self.answers_within(_ANSWER_TIMEOUT):
            raise MigrationError(
                f"The process that makes the rehearsal's traffic has not answered for {_ANSWER_TIMEOUT} s: its last "
                "requests wait for something, or the machine is overloaded. Rehearse again, with less traffic (--rate)."
            )
        answer = self.answer()
        if answer is None:
            raise _Ended(
                f"The process that makes the rehearsal's traffic ended by itself (status {self._process.wait()})."
            )
        if "refused" in answer:
            kind = {1: RefusedError, 2: ConfigurationError}.get(answer["status"], MigrationError)
            raise kind(answer["refused"])
        if "broken" in answer:
            raise MigrationError(f"The traffic of the rehearsal does not work: {answer['broken']}.")
        return answer


_kept: list[_Process] = []


def _begin(order: Said) -> _Process:
    """A process that has begun: the one that is kept, or a new one where there is none or it is gone."""
    while True:
        is_new = not _kept
        process = _Process() if is_new else _kept.pop()
        try:
            process.order("begin", order)
            return process
        except BaseException as error:
            process.kill()
            if is_new or not isinstance(error, _Ended):
                raise


def _end_kept() -> None:
    for process in _kept:
        process.kill()


atexit.register(_end_kept)
# Of the parent's process a fork could read nothing that is for it.
os.register_at_fork(after_in_child=_kept.clear)
