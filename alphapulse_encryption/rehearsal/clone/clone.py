"""The clone: a scratch database that a rehearsal works on, and what tells it from any other.

It is recognised by its name and by its mark, a comment that says which run made it and when (or, until it has that, the
connection limit it was made with); nothing else is ever dropped. While a stage works on it, a session holds a lock for
it, so that nobody takes it for a leftover.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from alphapulse_encryption.migration.gates.drill import locale_options
from alphapulse_encryption.migration.postgres import locks, programs
from alphapulse_encryption.migration.postgres.database import (
    Connection,
    Database,
    DatabaseUnreachable,
    answer,
)
from alphapulse_encryption.rehearsal.clone.source import APPLICATION, STAGING_VARIABLE
from alphapulse_encryption.rehearsal.measures import Finding, Stage
from alphapulse_encryption.sample.postgres import embedded

PREFIX = "alphapulse_rehearsal_"
# A clone's connection limit, which limits nobody: it has that from its first moment, its comment from the next.
BIRTHMARK = 271_828
_MARK = "alphapulse_encryption: clone of a staging rehearsal. "
SERVER_VARIABLE = "ALPHAPULSE_REHEARSAL_SERVER_URL"
# CREATE DATABASE … TEMPLATE needs the source to itself: so often it is tried, with these pauses.
_TRIES, _PAUSE_SECONDS = 5, 0.4


class Mark(BaseModel):
    """What the comment on a clone says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Dagster's, that made it.
    run: str
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


def clone_on(server: Database, name: str) -> Database:
    return replace(server, conninfo=make_conninfo(server.conninfo, dbname=name))


def make(
    source: Database, on: Database, name: str, mark: Mark, tables: Sequence[Table], *, template: str | None
) -> tuple[str, tuple[Finding, ...]]:
    """Clone the source, which is only read; returns how it was cloned, and what somebody should know of it.

    Args:
        tables: those that get fresh statistics, where the source's are not copied.
        template: the source's name, where it is on that server as well.

    Raises:
        RefusedError: the role may make no database there, or the dump cannot be restored.
        DatabaseFailure: the server refused.
    """
    said = []
    with on.session("make a clone of the staging database") as connection:
        # Killed meanwhile, we leave nothing: the server looks whether we are still there.
        with contextlib.suppress(psycopg.Error):
            connection.execute("SELECT set_config('client_connection_check_interval', '1s', false)")
        if not answer(
            connection, "SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"
        ):
            raise RefusedError(
                "A rehearsal needs a clone, and this role may not create a database. Give it CREATEDB, or name another "
                f"server with {SERVER_VARIABLE}; nothing was created."
            )
        # Held while it is made: until it is marked, nobody takes it for a leftover.
        locks.try_hold(connection, name)
        if template is not None:
            why_not = _from_template(connection, template, name)
            if why_not is None:
                _dress(connection, source, on, name, mark)
                return "template", ()
            said.append(f"made by pg_dump and pg_restore, not as a copy of the files, because {why_not}.")
        with source.session("read the staging database's locale") as there:
            like = locale_options(there)
        connection.execute(
            SQL("CREATE DATABASE {} TEMPLATE template0 CONNECTION LIMIT {} {}").format(
                Identifier(name), Literal(BIRTHMARK), like
            )
        )
        _dress(connection, source, on, name, mark)
        _dump_and_restore(source, clone_on(on, name))
        with clone_on(on, name).session("take statistics of the clone") as scratch:
            for table in tables:
                scratch.execute(SQL("ANALYZE {}").format(Identifier(table.schema_name, table.name)))
    said.append(
        "owners and privileges are not part of a dump's copy, so that missing ones were not found; tables came without "
        "the bloat they have."
    )
    return "dump and restore", tuple(Finding(level="note", subject="clone", what=what) for what in said)


def _from_template(connection: Connection, template: str, name: str) -> str | None:
    """Copy the source's files; returns why that cannot be, None where it is done."""
    statement = SQL("CREATE DATABASE {} TEMPLATE {} CONNECTION LIMIT {}").format(
        Identifier(name), Identifier(template), Literal(BIRTHMARK)
    )
    for _ in range(_TRIES):
        try:
            connection.execute(statement)
            return None
        except psycopg.errors.InsufficientPrivilege:
            return "this role does not own the staging database"
        except psycopg.errors.ObjectInUse:
            time.sleep(_PAUSE_SECONDS)
    return "others were connected to the staging database"


_SETTINGS = """
SELECT r.rolname, split_part(s.setting, '=', 1), substr(s.setting, strpos(s.setting, '=') + 1)
  FROM pg_db_role_setting d JOIN pg_database b ON b.oid = d.setdatabase LEFT JOIN pg_roles r ON r.oid = d.setrole,
       unnest(d.setconfig) AS s (setting)
 WHERE b.datname = current_database()
 ORDER BY 1 NULLS FIRST, 2
"""


def _dress(connection: Connection, source: Database, on: Database, name: str, mark: Mark) -> None:
    """The mark first; then for nobody else, and with the settings that the source has as a database."""
    write_mark(connection, name, mark)
    connection.execute(SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(Identifier(name)))
    with source.session("read the staging database's settings") as there:
        found = there.execute(_SETTINGS).fetchall()
    # In a session of its own, for they are its settings for a moment.
    with on.session("give the clone the staging database's settings") as session:
        for role, setting, text in found:
            whose = SQL("DATABASE {}").format(Identifier(name))
            if role is not None:
                whose = SQL("ROLE {} IN DATABASE {}").format(Identifier(role), Identifier(name))
            parameter = SQL(".").join(map(Identifier, setting.split(".")))
            # Not for every role to set, and another server may not have the role or know the setting.
            with contextlib.suppress(psycopg.Error):
                session.execute("SELECT pg_catalog.set_config(%s, %s, false)", [setting, text])
                session.execute(SQL("ALTER {} SET {} FROM CURRENT").format(whose, parameter))


def _dump_and_restore(source: Database, clone: Database) -> None:
    """From the one to the other through a pipe: nothing on a disk of ours, passwords in no command."""
    reading, writing = programs.way_to(source), programs.way_to(clone, unlogged=True)
    pair = programs.choose(client_programs(), reading.server, tls=reading.tls or writing.tls)
    dump = [*programs.dump_command(pair, reading), "--compress=0"]
    restore = programs.restore_command(pair, writing)
    beginning = programs.child(dump, reading.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with beginning as (dumping, said):
        output = cast(IO[bytes], dumping.stdout)
        with programs.child(
            restore, writing.environment, stdin=output.fileno(), stdout=subprocess.DEVNULL
        ) as (restoring, answered):
            # The last reader of the pipe is the other one: if that ends, pg_dump ends.
            output.close()
            restored = restoring.wait()
        dumped = dumping.wait()
    problem = programs.restore_problem(restored, answered(), writing)
    if dumped != 0:
        why = programs.kind_of_failure(said())
        problem = problem or f"pg_dump ended with exit status {dumped} ({why})"
    if problem:
        raise RefusedError(f"The clone could not be made: {problem}.")


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
    connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))


def directory(run_id: str) -> Path:
    """Where a rehearsal keeps its report, and while it lasts its backup."""
    return settings.state_dir() / "rehearsals" / run_id


def backup_directory(run_id: str) -> Path:
    return directory(run_id) / "backup"


def remove_quietly(on: Database, name: str) -> None:
    """As :func:`remove`, on the way out: what cannot be removed now is found as a leftover."""
    with contextlib.suppress(MigrationError):
        remove(on, name)
