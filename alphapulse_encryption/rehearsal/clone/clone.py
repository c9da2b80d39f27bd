"""The clone: a scratch database that a rehearsal works on, and what tells it from any other.

It is recognised by its name and by its mark, a comment that says which run made it and when (or, until it has that, the
connection limit it was made with); nothing else is ever dropped. While a stage works on it, a session holds a lock for
it, so that nobody takes it for a leftover.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, cast

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier, Literal
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alphapulse_encryption import settings
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.resources.environment import client_programs, database_at
from alphapulse_encryption.defs.resources.processes import this_process
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.migration.postgres import locks, programs, scratch
from alphapulse_encryption.migration.postgres.database import Connection, Database, DatabaseUnreachable
from alphapulse_encryption.rehearsal.clone.source import APPLICATION, STAGING_VARIABLE
from alphapulse_encryption.rehearsal.measures import Finding, Stage
from alphapulse_encryption.sample.postgres import embedded

PREFIX = "alphapulse_rehearsal_"
# A clone's connection limit, which limits nobody: it has that from its first moment, its comment from the next.
BIRTHMARK = 271_828
_MARK = "alphapulse_encryption: clone of a staging rehearsal. "
SERVER_VARIABLE = "ALPHAPULSE_REHEARSAL_SERVER_URL"
_CHUNK = 1 << 20


class Mark(BaseModel):
    """What the comment on a clone says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Dagster's, that made it. The owner of a clone may change its comment, and directories are named by this.
    run: str = Field(pattern=r"^[\w -]+$")
    # Machine, process and its start, of who worked on it last; and when that stage began, or ended.
    process: str
    at: datetime
    keep_failed_hours: float
    # For good.
    keep: bool = False
    attempts: dict[Stage, int] = Field(default_factory=dict)

    def begun(self, stage: Stage) -> Mark:
        """As this process begins a stage."""
        attempts = {**self.attempts, stage: self.attempts.get(stage, 0) + 1}
        return self.touched().model_copy(update={"attempts": attempts})

    def touched(self) -> Mark:
        return self.model_copy(update={"process": this_process(), "at": datetime.now(UTC)})


def server() -> Database:
    """A database on the server for clones: on ``ALPHAPULSE_REHEARSAL_SERVER_URL``'s, else on the source's own.

    Raises:
        ConfigurationError: malformed variables, or there is no database there to be connected to meanwhile.
    """
    url = settings.Rehearsals().server_url
    if url is not None:
        return database_at(url, APPLICATION, SERVER_VARIABLE)
    source = settings.Rehearsals().staging_database_url
    if source is None:
        embedded().ensure_running()
        return Database(embedded().url("postgres"), APPLICATION, STAGING_VARIABLE)
    # Not the source itself: nothing but reading sessions are ever connected to it.
    for name in ("postgres", "template1"):
        found = database_at(make_conninfo(source, dbname=name), APPLICATION, STAGING_VARIABLE)
        with (
            contextlib.suppress(DatabaseUnreachable),
            found.session("look for a database to be connected to"),
        ):
            return found
    raise ConfigurationError(
        f"On the server of {STAGING_VARIABLE} the role can connect to neither of the databases postgres and template1, "
        f"from where the clone would be made. Let it, or name a server for the clone with {SERVER_VARIABLE}."
    )


def is_embedded(server: Database) -> bool:
    return server.conninfo.startswith(embedded().url("").partition("/?")[0])


def make(
    source: Database, on: Database, name: str, mark: Mark, tables: Sequence[Table]
) -> tuple[Finding, ...]:
    """Clone the source, which is only read; returns what somebody should know of that.

    Args:
        tables: those that get fresh statistics.

    Raises:
        RefusedError: the role may make no scratch database there, or the dump cannot be restored.
        DatabaseFailure: the server refused.
    """
    with on.session("make a clone of the staging database") as connection:
        # Killed meanwhile, we leave nothing: the server looks whether we are still there.
        with contextlib.suppress(psycopg.Error):
            connection.execute("SELECT set_config('client_connection_check_interval', '1s', false)")
        owned = scratch.refuse_unless_possible(connection, "A rehearsal", SERVER_VARIABLE)
        # Held while it is made: until it is marked, nobody takes it for a leftover.
        locks.try_hold(connection, name)
        with source.session("read the staging database's locale and settings") as there:
            like = scratch.read_like(there)
            found = there.execute(_SETTINGS).fetchall()
        clone = scratch.make(on, connection, name, like, limit=BIRTHMARK)
        write_mark(connection, name, mark)
        left_out = _dump_and_restore(source, clone, like)
        with clone.session("give the clone the staging database's settings") as session:
            for setting, text in found:
                parameter = SQL(".").join(map(Identifier, setting.split(".")))
                # Not for every role to set, and another server may not know the setting.
                with contextlib.suppress(psycopg.Error):
                    session.execute("SELECT pg_catalog.set_config(%s, %s, false)", [setting, text])
                    session.execute(
                        SQL("ALTER DATABASE {} SET {} FROM CURRENT").format(Identifier(name), parameter)
                    )
        with clone.session("take statistics of the clone") as session:
            for table in tables:
                session.execute(SQL("ANALYZE {}").format(Identifier(table.schema_name, table.name)))
    said = [
        "owners and privileges are not part of a clone, so that missing ones were not found; tables came without the "
        "bloat they have.",
    ]
    if left_out:
        said.append(f"it is without {', '.join(left_out)}: a role without rights restores and owns it.")
    if not owned:
        said.append(
            "the code of the staging database ran on it as the role of the address, which may create no role for it."
        )
    return tuple(Finding(level="note", subject="clone", what=what) for what in said)


_SETTINGS = """
SELECT split_part(s.setting, '=', 1), substr(s.setting, strpos(s.setting, '=') + 1)
  FROM pg_db_role_setting d JOIN pg_database b ON b.oid = d.setdatabase, unnest(d.setconfig) AS s (setting)
 WHERE b.datname = current_database() AND d.setrole = 0
 ORDER BY 1
"""


def _dump_and_restore(source: Database, clone: Database, like: scratch.Like) -> tuple[str, ...]:
    """From the one to the other through pipes: nothing on a disk of ours, passwords in no command; what is left out."""
    reading, writing = programs.way_to(source), programs.way_to(clone, unlogged=True)
    pair = programs.choose(client_programs(), reading.server, tls=reading.tls or writing.tls)
    dump = [*programs.dump_command(pair, reading), "--compress=0"]
    beginning = programs.child(dump, reading.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with beginning as (dumping, said):
        output = cast(IO[bytes], dumping.stdout)
        head = bytearray()

        def list_head(process: subprocess.Popen[bytes]) -> int:
            entrance = cast(IO[bytes], process.stdin)
            # Nobody listens any more behind the list.
            with contextlib.suppress(BrokenPipeError):
                while chunk := os.read(output.fileno(), _CHUNK):
                    head.extend(chunk)
                    entrance.write(chunk)
                    entrance.flush()
            with contextlib.suppress(BrokenPipeError):
                entrance.close()
            return process.wait()

        def go_on(process: subprocess.Popen[bytes]) -> int:
            entrance = cast(IO[bytes], process.stdin)
            with contextlib.suppress(BrokenPipeError):
                entrance.write(head)
                while chunk := os.read(output.fileno(), _CHUNK):
                    entrance.write(chunk)
            with contextlib.suppress(BrokenPipeError):
                entrance.close()
            # If pg_restore ended early, pg_dump ends.
            output.close()
            return process.wait()

        listing = programs.listing(pair.pg_restore, list_head)
        problem: str | None = None
        left_out: tuple[str, ...] = ()
        if listing is not None:
            problem, left_out = scratch.restore(writing, pair, listing, like, go_on)
        output.close()
        dumped = dumping.wait()
    if dumped != 0 or listing is None:
        why = programs.kind_of_failure(said())
        problem = problem or f"pg_dump ended with exit status {dumped} ({why})"
    if problem:
        raise RefusedError(f"The clone could not be made: {problem}.")
    return left_out


def write_mark(connection: Connection, name: str, mark: Mark) -> None:
    """Mark a clone, in a session beside it."""
    comment = Literal(_MARK + mark.model_dump_json())
    connection.execute(SQL("COMMENT ON DATABASE {} IS {}").format(Identifier(name), comment))


def read_clones(connection: Connection) -> Mapping[str, Mark | None]:
    """The clones of that server, by name: those that are marked, and those that were made and not marked yet."""
    rows = connection.execute(
        "SELECT datname, comment FROM pg_database, shobj_description(oid, 'pg_database') AS comment "
        "WHERE starts_with(datname, %s) AND coalesce(starts_with(comment, %s), datconnlimit = %s)",
        [PREFIX, _MARK, BIRTHMARK],
    )
    found: dict[str, Mark | None] = {}
    for name, comment in rows:
        with contextlib.suppress(ValidationError):
            found[name] = Mark.model_validate_json(comment.removeprefix(_MARK)) if comment else None
    return found


class CloneIsGone(RefusedError):
    """There is nothing left to go on with."""


@contextlib.contextmanager
def held(on: Database, name: str, stage: Stage) -> Iterator[Mark]:
    """A stage works on the clone: nobody else does, and nobody removes it meanwhile.

    Raises:
        RefusedError: it is gone, or another run works on it.
    """
    with on.session("hold the clone") as connection:
        mark = read_clones(connection).get(name)
        if mark is None:
            raise CloneIsGone(
                f"The clone {name} is gone: it was removed when the rehearsal was cancelled, after its time, or by a "
                "later rehearsal. Re-execute the whole rehearsal."
            )
        if not locks.try_hold(connection, name):
            raise RefusedError(f"Another run works on the clone {name}. Wait until it ends.")
        mark = mark.begun(stage)
        write_mark(connection, name, mark)
        yield mark
        # A restart of the server may have ended the session, which costs a mark its last sign of life only.
        if stage is not Stage.REMOVAL and not connection.broken:
            with contextlib.suppress(psycopg.Error):
                write_mark(connection, name, mark.touched())


def keep(on: Database, name: str) -> None:
    with on.session("keep the clone") as connection:
        if (mark := read_clones(connection).get(name)) is not None:
            write_mark(connection, name, mark.model_copy(update={"keep": True}))


def remove(on: Database, name: str) -> bool:
    """Remove a clone, whoever is connected to it; returns whether there was one of that name.

    Raises:
        DatabaseFailure: the server refused.
        ConfigurationError: it cannot be reached.
    """
    with on.session("remove the clone") as connection:
        found = read_clones(connection)
        if name in found:
            drop(connection, name, found[name])
        return name in found


def drop(connection: Connection, name: str, mark: Mark | None) -> None:
    """Drop a database that was found to be a clone, and what its rehearsal kept on the disk."""
    if mark is not None:
        # First: by its clone a rehearsal's backup is found, and killed in between, it would stay for ever.
        shutil.rmtree(backup_directory(mark.run), ignore_errors=True)
    scratch.drop(connection, name)


def directory(run_id: str) -> Path:
    """Where a rehearsal keeps its report, and while it lasts its backup."""
    return settings.state_dir() / "rehearsals" / run_id


def backup_directory(run_id: str) -> Path:
    return directory(run_id) / "backup"


def remove_quietly(on: Database, name: str) -> None:
    """As :func:`remove`, on the way out: what cannot be removed now is found as a leftover."""
    with contextlib.suppress(MigrationError):
        remove(on, name)
