"""What a restart of the clone's server would concern besides the clone."""

from __future__ import annotations

from collections.abc import Iterator

from alphapulse_encryption import settings
from alphapulse_encryption.defs.resources.storage import storage_url
from alphapulse_encryption.migration.postgres.database import Database, DatabaseUnreachable
from alphapulse_encryption.rehearsal.clone.clone import Server
from alphapulse_encryption.rehearsal.clone.source import identity, source_database
from alphapulse_encryption.sample.postgres import embedded


def restart_embedded() -> None:
    """Stop the embedded server and start it again."""
    embedded().stop()
    embedded().ensure_running()


def also_on(server: Server) -> str:
    """What else is on that server, in words; empty for nothing that matters.

    What cannot be reached is not on it: it is running.
    """
    with server.session("look at the server for the clone") as connection:
        here = identity(connection)
    found = []
    for what, database in _others():
        try:
            with database.session(f"see whether {what} is on the server of the clone") as connection:
                if identity(connection).same_server(here):
                    found.append(what)
        except DatabaseUnreachable:
            continue
    return " and ".join(found)


def _others() -> Iterator[tuple[str, Database]]:
    yield "the staging database", source_database()
    production = settings.TargetVariables().database_url
    if production is not None:
        yield "the production database", Database(production)
    yield "Dagster's own storage", Database(storage_url().replace("postgresql+psycopg2:", "postgresql:", 1))
