"""A place to run the command line in: a target database, Dagster's storage and a state directory of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.definitions import build_defs
from alphapulse_encryption.defs.resources.instance import open_instance
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import forked

RANGES = 2

_DAGSTER_TEMPLATE = "dagster_template"
_numbers = itertools.count(1)


@dataclass
class Place:
    """Where a command runs.

    Args:
        postgres: the server.
        url: the target database.
        dagster_url: Dagster's storage.
        state: the state directory.
        master_key: as the environment variable holds it.
        catalogue: the text of the catalogue; None for the packaged one.
    """

    postgres: EmbeddedPostgres
    url: str
    dagster_url: str
    state: Path
    master_key: str
    catalogue: str | None
    ranges: int = RANGES
    extra: dict[str, str | None] = field(default_factory=dict)

    def environment(self, **changes: str | None) -> dict[str, str]:
        """The process's environment; None removes a variable."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ALPHAPULSE_", "DAGSTER_", "PG"))
        }
        wanted: dict[str, str | None] = {
            **inherited,
            "PATH": f"{self.postgres.bin_dir()}{os.pathsep}{os.environ['PATH']}",
            "ALPHAPULSE_DATABASE_URL": self.url,
            "DAGSTER_POSTGRES_URL": self.dagster_url,
            "ALPHAPULSE_STATE_DIR": str(self.state),
            "ALPHAPULSE_ENCRYPTION_MASTER_KEY": self.master_key,
            "ALPHAPULSE_BATCH_RANGES": str(self.ranges),
            "ALPHAPULSE_ENCRYPTION_CATALOGUE": str(self.catalogue_file()) if self.catalogue else None,
            **self.extra,
            **changes,
        }
        return {name: value for name, value in wanted.items() if value is not None}

    def catalogue_file(self, text: str | None = None) -> Path:
        """The catalogue as a file; another one where a text is given."""
        path = self.state / ("catalogue.yaml" if text is None else "another.yaml")
        path.write_text(text if text is not None else self.catalogue or "", encoding="utf-8")
        return path

    def start(self, *arguments: str, **changes: str | None) -> forked.Program:
        """``python -m alphapulse_encryption ARGUMENTS`` in a process of its own."""
        return forked.Program("alphapulse_encryption", arguments, self.environment(**changes))

    def run(self, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        return self.start(*arguments, **changes).ended()

    def succeeds(self, *arguments: str, **changes: str | None) -> list[str]:
        """The lines that a run prints which ends with 0 and leaves stderr empty."""
        done = self.run(*arguments, **changes)
        assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
        return done.stdout.splitlines()

    def fails(self, status: int, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        """A run that ends with another status, in words and not with a stack trace."""
        done = self.run(*arguments, **changes)
        assert done.returncode == status, (done.stdout, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    @contextlib.contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        """The instance that the command line uses, in this process and with its environment."""
        with self.in_environment(), open_instance() as instance:
            yield instance

    @contextlib.contextmanager
    def in_environment(self) -> Iterator[None]:
        """This process's environment is the command's for a while."""
        before = dict(os.environ)
        wanted = self.environment()
        os.environ.clear()
        os.environ.update(wanted)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def definitions(self) -> dg.Definitions:
        """What the code location holds, with this environment."""
        with self.in_environment():
            return build_defs()

    def materialize(
        self, instance: dg.DagsterInstance, asset: str, partitions: str | Sequence[str]
    ) -> dg.ExecuteInProcessResult:
        """Run partitions of an asset in one run, by the job that the UI's button uses.

        Args:
            instance: opened by :meth:`instance`.
            asset: its name.
            partitions: one key, or the first and the last of a range.
        """
        job = self.definitions().resolve_implicit_global_asset_job_def()
        key: dict[str, Any] = {"partition_key": partitions}
        if not isinstance(partitions, str):
            first, last = partitions
            key = {
                "tags": {
                    "dagster/asset_partition_range_start": first,
                    "dagster/asset_partition_range_end": last,
                }
            }
        return job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey(asset)], raise_on_error=False, **key
        )

    def run_count(self) -> int:
        """How many runs Dagster knows of."""
        with psycopg.connect(self.dagster_url) as connection:
            row = connection.execute("SELECT count(*) FROM runs").fetchone()
            assert row is not None
            return int(row[0])

    def dump(self, url: str | None = None, *arguments: str) -> str:
        """A database as pg_dump writes it; the target where no other is named."""
        done = subprocess.run(
            [self.postgres.bin_dir() / "pg_dump", "--dbname", url or self.url, *arguments],
            env={"LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=True,
        )
        # Each dump has a random word in its \restrict lines.
        return "\n".join(
            line for line in done.stdout.splitlines() if not line.startswith(("\\restrict", "\\unres"))
        )


@contextlib.contextmanager
def place(
    postgres: EmbeddedPostgres, url: str, state: Path, master_key: str, catalogue: str | None = None
) -> Iterator[Place]:
    """A place on a test's server; Dagster's database is removed afterwards."""
    name = f"dagster_{next(_numbers)}"
    found = Place(postgres, url, postgres.url(name), state, master_key, catalogue)
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [_DAGSTER_TEMPLATE]).rowcount:
            _make_template(found, connection)
        connection.execute(
            SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                Identifier(name), Identifier(_DAGSTER_TEMPLATE)
            )
        )
        try:
            yield found
        finally:
            connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))


def _make_template(found: Place, connection: psycopg.Connection[Any]) -> None:
    # Making Dagster's tables takes longer than copying them.
    unfinished = f"{_DAGSTER_TEMPLATE}_unfinished"
    connection.execute(SQL("CREATE DATABASE {}").format(Identifier(unfinished)))
    template = Place(
        found.postgres, found.url, found.postgres.url(unfinished), found.state, found.master_key, None
    )
    with template.instance():
        pass
    connection.execute(
        SQL("ALTER DATABASE {} RENAME TO {}").format(Identifier(unfinished), Identifier(_DAGSTER_TEMPLATE))
    )
