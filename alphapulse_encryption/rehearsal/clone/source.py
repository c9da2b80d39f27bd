"""What is rehearsed: the staging database. It is only ever read, and never anything that looks like production."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable

from psycopg.conninfo import conninfo_to_dict

from alphapulse_encryption import settings
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.resources.environment import database_at
from alphapulse_encryption.defs.resources.storage import storage_url
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.tables import states
from alphapulse_encryption.migration.gates import drill
from alphapulse_encryption.migration.gates.preflight import long_transactions
from alphapulse_encryption.migration.postgres.database import (
    Connection,
    Database,
    DatabaseUnreachable,
    answer,
)
from alphapulse_encryption.migration.postgres.identity import Identity, identity
from alphapulse_encryption.migration.schema.partitions import read_parts
from alphapulse_encryption.rehearsal.measures import Finding
from alphapulse_encryption.sample.postgres import embedded

# The embedded server's copy of the sample, rehearsed where no staging database is named.
STAGING_DATABASE = "alphapulse_staging"
APPLICATION = "alphapulse_encryption rehearsal"
STAGING_VARIABLE = "ALPHAPULSE_STAGING_DATABASE_URL"
PRODUCTION_VARIABLE = "ALPHAPULSE_DATABASE_URL"

# As a word of a name: in "prod-db1.example.com" and "alphapulse_production", not in "products".
_PRODUCTION = re.compile(r"(?<![a-z])prod(uction)?(?![a-z])", re.IGNORECASE)


def is_sample() -> bool:
    """Whether the embedded server's copy of the sample is rehearsed."""
    return settings.Rehearsals().staging_database_url is None


def source_database() -> Database:
    """The staging database, in sessions that cannot write.

    Raises:
        ConfigurationError: the variable is malformed, or there is no staging copy of the sample yet.
    """
    url = settings.Rehearsals().staging_database_url
    if url is not None:
        return database_at(url, APPLICATION, STAGING_VARIABLE, read_only=True)
    server = embedded()
    if server.exists():
        server.ensure_running()
        with Database(server.url("postgres"), APPLICATION).session("look for the sample") as connection:
            if answer(connection, "SELECT oid FROM pg_database WHERE datname = %s", STAGING_DATABASE):
                return Database(server.url(STAGING_DATABASE), APPLICATION, STAGING_VARIABLE, read_only=True)
    raise ConfigurationError(
        f"There is nothing to rehearse: {STAGING_VARIABLE} is not set, and the sample has no staging copy yet. Set it, "
        "or run make rehearsal (python -m alphapulse_encryption --rehearse), which makes that copy."
    )


def production_database() -> Database | None:
    """Production, in sessions that cannot write; None where nobody names it."""
    url = settings.TargetVariables().database_url
    return database_at(url, APPLICATION, PRODUCTION_VARIABLE, read_only=True) if url is not None else None


def refuse_production(source: Database, *, declared: bool) -> tuple[Identity, Identity | None]:
    """Refuse a source that is production, or looks like it; which database it is, and which production, where known.

    Args:
        declared: somebody said in the run's configuration that it is not production. That helps against likeness; it
            does not help where it is the same database.

    Raises:
        RefusedError: says why; nothing was created.
        ConfigurationError: it cannot be reached.
    """
    with source.session("look which database the rehearsal's source is") as connection:
        found = identity(connection)
    production = _production(source, declared=declared)
    if production is not None and found.same_database(production):
        raise RefusedError(
            f"{STAGING_VARIABLE} and {PRODUCTION_VARIABLE} are the same database ({found.name}). A rehearsal needs a "
            "staging database of its own; nothing was created."
        )
    if declared:
        return found, production
    if production is not None and found.copy_of(production):
        raise RefusedError(
            f"The staging database {found.name} is a physical copy or a replica of {PRODUCTION_VARIABLE}'s. If it is "
            "not production, say so in the run's configuration (source_is_not_production: true); nothing was created."
        )
    sign = production_sign(source.conninfo, found.name)
    if sign is not None:
        raise RefusedError(
            f"The {sign} of the staging database says that it is production. If it is not, say so in the run's "
            "configuration (source_is_not_production: true, --source-is-not-production); nothing was created."
        )
    return found, production


def _production(source: Database, *, declared: bool) -> Identity | None:
    production = production_database()
    if production is None:
        return None
    try:
        with production.session("look which database production is") as connection:
            return identity(connection)
    except MigrationError:
        if declared and _address(production) != _address(source):
            return None
        raise RefusedError(
            f"{PRODUCTION_VARIABLE} cannot be reached, so it cannot be told whether {STAGING_VARIABLE} is another "
            "database. Let it be reached, or, if it is another one, say so in the run's configuration "
            "(source_is_not_production: true, --source-is-not-production); nothing was created."
        ) from None


def _address(database: Database) -> tuple[str, ...]:
    given = conninfo_to_dict(database.conninfo)
    return tuple(str(given.get(name) or "") for name in ("host", "hostaddr", "port", "dbname", "service"))


def production_sign(conninfo: str, name: str) -> str | None:
    """What of an address, or of the database's name, says that it is production; None where nothing does."""
    given = conninfo_to_dict(conninfo)
    # A directory with a socket is no host.
    hosts = [host for host in str(given.get("host") or "").split(",") if not host.startswith(("/", "@"))]
    names = [
        *(("host", host) for host in hosts),
        ("service", str(given.get("service") or "")),
        ("name", name),
    ]
    return next((f"{what} {text}" for what, text in names if _PRODUCTION.search(text)), None)


def refuse_unrehearsable(connection: Connection, tables: Iterable[Table]) -> tuple[Finding, ...]:
    """Refuse a source with nothing left to rehearse; returns what of the migration was done there already.

    Raises:
        RefusedError: a table's plaintext is dropped, or on its way back.
    """
    findings = []
    stands = states(connection)
    for table in tables:
        state = stands.get(table.key)
        if state is None or state.state is State.REVERTED:
            continue
        if not state.state.has_both_sides:
            raise RefusedError(
                f"The plaintext of {table.key} is {state.state.stage} on the staging database, so there is nothing to "
                "rehearse. Let the staging database be made anew from production, or restore_plaintext end there; "
                "nothing was created."
            )
        findings.append(
            Finding(
                level="warning",
                subject=table.key,
                what="its migration was begun on the staging database: what is done there already was not measured.",
                advice="Rehearse on a staging database as production is now.",
            )
        )
    return tuple(findings)


# Who is dead in it, as the statistics of the source know: a clone's begin anew.
_BLOAT = """
SELECT n_live_tup, n_dead_tup FROM pg_stat_all_tables WHERE schemaname = %s AND relname = %s
   AND n_dead_tup > 1000 AND n_dead_tup > n_live_tup * 0.2
"""


def circumstances_there(
    connection: Connection, tables: Iterable[Table], where: str = "the staging database"
) -> tuple[Finding, ...]:
    """What a clone does not show: bloat, and long transactions of others."""
    findings = [
        Finding(
            level="warning",
            subject=table.key,
            what=f"is bloated: {dead:,} dead rows beside {live:,} live ones on {where}.",
            advice=f"VACUUM {table.key} before the day, and see why autovacuum does not keep up.",
        )
        for table in tables
        for live, dead in connection.execute(_BLOAT, [table.schema_name, table.name])
    ]
    findings += [
        Finding(level="warning", subject=found.subject, what=f"on {where}: {found.message}")
        for found in long_transactions(connection)
    ]
    return tuple(findings)


def checksums(source: Database, tables: Iterable[Table]) -> dict[str, str]:
    """Of the tables' rows, whatever their order: computed by the server, as the restore drill does.

    Raises:
        DatabaseFailure: the server refused.
    """
    found = {}
    with source.session("compute checksums of the staging database") as connection:
        for table in tables:
            oid = answer(
                connection,
                "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                "WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')",
                *(table.schema_name, table.name),
            )
            for part in read_parts(connection, oid) if oid else ():
                if part.leaf:
                    contents = drill.read_contents(connection, (part.schema_name, part.name))
                    found[f"{part.schema_name}.{part.name}"] = f"{contents.rows} {contents.checksum}"
    return found


def also_on(here: Identity) -> str:
    """What else is on that server, in words; empty for nothing that matters.

    What cannot be reached is not on it: it is running.
    """
    others = {
        "the staging database": source_database(),
        "the production database": production_database(),
        "Dagster's own storage": Database(storage_url().replace("postgresql+psycopg2:", "postgresql:", 1)),
    }
    found = []
    for what, database in others.items():
        with contextlib.suppress(DatabaseUnreachable):
            if database is not None:
                with database.session(f"see whether {what} is on the server of the clone") as connection:
                    found += [what] if identity(connection).same_server(here) else []
    return " and ".join(found)
