"""Which server a session is on, and which database of it: whether two addresses lead to the same one."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psycopg

from alphapulse_encryption.migration.postgres.database import Connection, Database, answer


@dataclass(frozen=True)
class Identity:
    """Which server, and which database of it."""

    # The system identifier that initdb gave (PostgreSQL manual, 9.28.12 "Control Data Functions"); a physical copy has
    # the same. None where the role may not see it.
    cluster: str | None
    # To the microsecond: tells a server from its physical copies, and from any other.
    started: str
    oid: int
    name: str

    def same_server(self, other: Identity) -> bool:
        known = self.cluster is not None and other.cluster is not None
        return self.started == other.started and (not known or self.cluster == other.cluster)

    def same_database(self, other: Identity) -> bool:
        return self.same_server(other) and self.oid == other.oid

    def copy_of(self, other: Identity) -> bool:
        """Whether one was made of the other's files."""
        return self.cluster is not None and (self.cluster, self.oid) == (other.cluster, other.oid)


def identity(connection: Connection) -> Identity:
    cluster = None
    with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
        cluster = answer(connection, "SELECT system_identifier::text FROM pg_control_system()")
    ((started, oid, name),) = connection.execute(
        "SELECT pg_postmaster_start_time()::text, oid::bigint, datname FROM pg_database "
        "WHERE datname = current_database()"
    )
    return Identity(cluster, started, oid, name)


def elsewhere(writer: Database) -> str:
    """What is told of an address that leads to another database than the target's."""
    return (
        f"{writer.variable} does not lead to the database of ALPHAPULSE_DATABASE_URL, whose rows it is to write. Give "
        "both the same server and the same database; nothing was written."
    )
