"""Faults on request, while a rehearsal encrypts: what happens to production on a bad day, and what it costs.

With faults the backfill is a process of its own (``worker``), which is killed and started again as a person on call
would do it. Each fault comes when a range has just been done and the next one is at work; all of them are spread over
the ranges. What was lost is counted from the fault to the next batch that was committed.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import dagster as dg
from pydantic import Field

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.keysources import KEY_SOURCE_VARIABLE
from alphapulse_encryption.migration.postgres.database import Actor, Database, DatabaseUnreachable, answer
from alphapulse_encryption.migration.rows.engine import Pace, RangeResult
from alphapulse_encryption.rehearsal.child import Child, Said
from alphapulse_encryption.rehearsal.measures import Fault
from alphapulse_encryption.secrecy import bare_environment

CONNECTIONS_DROPPED = "connections dropped"
SERVER_RESTARTED = "server restarted"
KEY_SOURCE_UNAVAILABLE = "key source unavailable"

_APPLICATION_NAME = "alphapulse_encryption rehearsal faults"
# How long a server that is being restarted is waited for, in seconds.
PATIENCE = 120.0
# How soon a person on call tries again.
SECONDS_BETWEEN_TRIES = 0.25

_BY_ITSELF = "it ended by itself."

# A port that nobody listens on: reserved, and never assigned (RFC 6335, section 6).
_NOBODY = "http://127.0.0.1:1"


class FaultConfig(dg.Config):
    """Faults to provoke during the backfill of a rehearsal, and how often."""

    worker_killed: int = Field(
        default=0, ge=0, le=20, description="Kill the process that encrypts (SIGKILL), and start it again."
    )
    connections_dropped: int = Field(
        default=0, ge=0, le=20, description="End the engine's sessions on the clone (pg_terminate_backend)."
    )
    server_restarted: int = Field(
        default=0, ge=0, le=20, description="Restart the PostgreSQL server that the clone is on."
    )
    key_source_unavailable: int = Field(
        default=0,
        ge=0,
        le=20,
        description="Start the process that encrypts again while keys cannot be read, until they can.",
    )
    key_source_seconds: float = Field(
        default=2, gt=0, le=600, description="How long keys cannot be read, in seconds."
    )
    restart_command: list[str] = Field(
        default=[],
        description="Program and arguments that restart the clone's server and return when they have, without a "
        "shell; not needed for the embedded one.",
    )
    restart_shared_server: bool = Field(
        default=False,
        description="Restart the server although the staging database, production or Dagster's own storage is on it "
        "as well: their sessions end, too.",
    )

    @property
    def kinds(self) -> list[str]:
        """The faults, in the order in which they come."""
        names = ("worker_killed", "connections_dropped", "server_restarted", "key_source_unavailable")
        # Not the same one twice in a row, where others are left.
        return [name.replace("_", " ") for turn in range(20) for name in names if turn < getattr(self, name)]


# Table and number of a batch range.
Part = tuple[str, int]


@dataclass
class Faults:
    """A backfill through faults.

    Raises:
        RefusedError: a restart would concern others, and the configuration does not allow that.
        ConfigurationError: nobody knows how to restart the server.
    """

    config: FaultConfig
    # The only database whose sessions are ended.
    clone: Database
    catalogue: Catalogue
    environment: Mapping[str, str] = field(repr=False)
    actor: Actor
    pace: Pace
    workers: int = 1
    # Restarts the clone's server where that can be done without a command: the embedded one.
    restart: Callable[[], None] | None = None
    # What else is on that server, in words.
    shared_with: str = ""
    # Called with a sentence about each fault.
    tell: Callable[[str], None] = lambda _: None
    found: list[Fault] = field(default_factory=list, init=False)
    # Those that the work has not gone on after yet.
    _open: list[Fault] = field(default_factory=list, init=False)
    _keys_back: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not self.config.server_restarted:
            return
        if self.shared_with and not self.config.restart_shared_server:
            raise RefusedError(
                f"The server of the clone is not restarted: {self.shared_with} is on it as well. Have clones made on "
                "another one (ALPHAPULSE_REHEARSAL_SERVER_URL), or allow it with restart_shared_server. Nothing was "
                "encrypted."
            )
        if not self.config.restart_command and self.restart is None:
            raise ConfigurationError(
                "To restart the server of the clone, a restart_command is needed: it is not the embedded one."
            )

    def encrypt(self, parts: Sequence[Part], done: Callable[[Part, RangeResult], None]) -> None:
        """The backfill of these batch ranges, through all faults; each that is done is told.

        Raises:
            MigrationError: some could not be encrypted; names them, and the others are.
        """
        left = dict.fromkeys(parts)
        failed: list[str] = []
        coming = self._spread(len(left))
        try:
            while left:
                worker = self._begin(list(left))
                try:
                    for said in worker.lines():
                        if "batch" in said:
                            self._close(
                                [
                                    fault
                                    for fault in self._open
                                    if said["at"] > fault.at.timestamp() + fault.seconds_away
                                ],
                                said["at"],
                            )
                            continue
                        table, number = said.get("done") or said["failed"]
                        left.pop((table, number), None)
                        if "failed" in said:
                            failed.append(f"{table}, batch range {number:02d}: {said['why']}")
                        else:
                            told = said["result"]
                            by_column = Counter(told["by_column"])
                            done((table, number), RangeResult(**{**told, "by_column": by_column}))
                        while (
                            left
                            and coming
                            and len(parts) - len(left) >= coming[0][0]
                            and not worker.was_killed
                        ):
                            self._provoke(coming.pop(0)[1], worker)
                finally:
                    worker.kill()
                if left:
                    worker.explain_end()
            # What came after the last batch has cost nothing more.
            self._close(self._open, time.time())
        finally:
            # What no work followed was not survived.
            self._close(self._open, time.time(), survived=False)
        if failed:
            listed = "\n".join(f"- {line}" for line in failed)
            raise MigrationError(f"{len(failed)} of {len(parts)} batch ranges failed:\n{listed}")

    def _spread(self, ranges: int) -> list[tuple[int, str]]:
        """Each fault, and after how many ranges it comes."""
        kinds = self.config.kinds
        if len(kinds) >= ranges > 0:
            raise ConfigurationError(
                f"{len(kinds)} faults are too many for {ranges} batch ranges: each comes after a range of its own."
            )
        return [(max(n + 1, (n + 1) * ranges // (len(kinds) + 1)), kind) for n, kind in enumerate(kinds)]

    def _begin(self, parts: Sequence[Part]) -> _Worker:
        away = self._keys_back - time.time()
        order = {
            "url": self.clone.conninfo,
            "catalogue": self.catalogue.model_dump(mode="json", by_alias=True),
            "actor": asdict(self.actor),
            "workers": self.workers,
            "pace": {
                name: getattr(self.pace, name) for name in ("batch_size", "target_seconds", "rest_ratio")
            },
            "parts": parts,
            "environment": without_keys(self.environment) if away > 0 else dict(self.environment),
        }
        return _Worker(order, has_keys=away <= 0)

    def _provoke(self, kind: str, worker: _Worker) -> None:
        began = time.time()
        if kind == CONNECTIONS_DROPPED:
            what = (
                f"{self._drop_connections()} sessions of the process that encrypts were ended by the server."
            )
        elif kind == SERVER_RESTARTED:
            self._restart()
            what = "The PostgreSQL server was restarted under the process that encrypts."
        else:
            worker.kill()
            what = "The process that encrypts was killed in the middle of a batch range, and started again."
        if kind == KEY_SOURCE_UNAVAILABLE:
            self._keys_back = began + self.config.key_source_seconds
            what = (
                "The process that encrypts was started again while its keys could not be read, and again until they "
                "could."
            )
        away = max(time.time(), self._keys_back) - began
        at = datetime.fromtimestamp(began, UTC)
        self._open.append(
            Fault(kind=kind, at=at, seconds_away=away, seconds_lost=away, survived=True, what=what)
        )
        self.tell(what)

    def _close(self, faults: Sequence[Fault], at: float, *, survived: bool = True) -> None:
        """The work has gone on after some faults, or never will."""
        self._open = [fault for fault in self._open if fault not in faults]
        for fault in faults:
            lost = max(at - fault.at.timestamp(), fault.seconds_away)
            self.found.append(fault.model_copy(update={"seconds_lost": lost, "survived": survived}))

    def _drop_connections(self) -> int:
        database = Database(self.clone.conninfo, _APPLICATION_NAME)
        with database.session("end the engine's sessions on the clone") as connection:
            ended = (
                "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = %s"
            )
            return int(answer(connection, ended, Database("").application_name))

    def _restart(self) -> None:
        if self.config.restart_command:
            try:
                subprocess.run(
                    self.config.restart_command,
                    env=bare_environment(),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=True,
                    timeout=PATIENCE,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise MigrationError(
                    f"The restart_command did not restart the server ({type(error).__name__}); try it by hand."
                ) from None
        elif self.restart is not None:
            self.restart()
        until = time.monotonic() + PATIENCE
        while True:
            try:
                Database(self.clone.conninfo, _APPLICATION_NAME).connect().close()
                return
            except DatabaseUnreachable:
                if time.monotonic() > until:
                    raise
                time.sleep(SECONDS_BETWEEN_TRIES / 5)


class _Worker(Child):
    """The process that encrypts, which ends when this one does; with keys that it can read, or not."""

    module = "alphapulse_encryption.rehearsal.faults.worker"

    def __init__(self, order: Said, *, has_keys: bool) -> None:
        super().__init__()
        self._has_keys = has_keys
        self.was_killed = False
        self._why = _BY_ITSELF
        self.tell(order)

    def lines(self) -> Iterator[Said]:
        """What it says of batches and ranges, until its end; nothing more once it was killed."""
        while not self.was_killed and (said := self.answer()) is not None and "end" not in said:
            if "refused" in said or "broken" in said:
                self._why = said.get("refused") or f"it ended with {said['broken']}."
            else:
                yield said

    def kill(self) -> None:
        """SIGKILL; it counts as killed where it was still running."""
        self.was_killed = self.was_killed or self._process.poll() is None
        super().kill()

    def explain_end(self) -> None:
        """Return where another one is to be started in its place.

        Raises:
            MigrationError: it ended for a reason of its own.
        """
        if not self._has_keys:
            time.sleep(SECONDS_BETWEEN_TRIES)
        elif not self.was_killed or self._why != _BY_ITSELF:
            raise MigrationError(f"The process that encrypts does not go on: {self._why}")


def without_keys(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which the key source fails as it does when it is away."""
    source = environment.get(KEY_SOURCE_VARIABLE) or "env"
    if source == "vault":
        return {**environment, "VAULT_ADDR": _NOBODY}
    if source == "aws":
        return {**environment, "AWS_ENDPOINT_URL": _NOBODY, "AWS_MAX_ATTEMPTS": "1"}
    return {n: v for n, v in environment.items() if not n.startswith("ALPHAPULSE_ENCRYPTION_MASTER_KEY")}
