"""Who keeps the server's write-ahead log, or makes commits wait: slots, the archive, synchronous standbys."""

from __future__ import annotations

import re
from dataclasses import dataclass

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Connection


@dataclass(frozen=True)
class Slot:
    """A replication slot of the server, of whichever database.

    Args:
        active: whether something reads it now.
        kept: bytes of write-ahead log from what it has not read up to now.
        left: bytes until the server drops what it has not read (``max_slot_wal_keep_size``); None where it never does.
    """

    name: str
    active: bool
    kept: int
    left: int | None


_SLOTS = """
SELECT slot_name, active, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint, safe_wal_size
  FROM pg_replication_slots
 WHERE restart_lsn IS NOT NULL AND wal_status IS DISTINCT FROM 'lost' AND NOT pg_is_in_recovery() ORDER BY 1
"""


def slots(connection: Connection) -> list[Slot]:
    """The slots that keep write-ahead log."""
    return [Slot(*row) for row in connection.execute(_SLOTS)]


# Segments are archived in their order. Before the first one is, only the one that failed tells where the archive is.
_ARCHIVE = """
SELECT coalesce(failed > archived, failed IS NOT NULL),
       greatest(0, pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')
                   - ('x' || substr(file, 9, 8))::bit(32)::bigint * 4294967296
                   - ('x' || substr(file, 17, 8))::bit(32)::bigint * size)::bigint
  FROM (SELECT last_failed_time AS failed, last_archived_time AS archived,
               coalesce(substring(last_archived_wal FROM '^[0-9A-F]{24}'),
                        substring(last_failed_wal FROM '^[0-9A-F]{24}')) AS file,
               pg_size_bytes(current_setting('wal_segment_size')) AS size FROM pg_stat_archiver) AS a
 WHERE file IS NOT NULL AND current_setting('archive_mode') <> 'off' AND NOT pg_is_in_recovery()
"""


def waiting_for_the_archive(connection: Connection) -> tuple[bool, int]:
    """Whether the last try to archive a segment failed, and bytes of write-ahead log that are not archived yet."""
    row = connection.execute(_ARCHIVE).fetchone()
    return (False, 0) if row is None else row


_SYNCHRONOUS = """
SELECT current_setting('synchronous_standby_names'), coalesce(bool_or(state IS NULL), false),
       count(*) FILTER (WHERE sync_state IN ('sync', 'quorum'))
  FROM pg_stat_replication
 WHERE current_setting('synchronous_commit') NOT IN ('off', 'local') AND NOT pg_is_in_recovery()
"""


def missing_standbys(connection: Connection) -> str | None:
    """Why no commit returns: synchronous standbys that are not there, in words; None where none is missing.

    A role that may not see replicas learns of it only where there are none at all.
    """
    names, hidden, there = connection.execute(_SYNCHRONOUS).fetchall()[0]
    found = re.match(r"\s*(?:(?:first|any)\s+)?(\d+)\s*\(", names, re.IGNORECASE)
    needed = int(found[1]) if found else 1
    if not names.strip() or hidden or there >= needed:
        return None
    return (
        f"every commit waits for {needed} of the standbys of synchronous_standby_names ({names}), and {there} of them "
        "are connected"
    )


START_STANDBYS = (
    "Start them, or have commits not wait for them: ALTER SYSTEM SET synchronous_standby_names = ''; "
    "SELECT pg_reload_conf()."
)


def refuse_missing_standbys(connection: Connection) -> None:
    """Refuse what would commit, and hang for ever.

    Raises:
        RefusedError: names the setting.
    """
    if why := missing_standbys(connection):
        raise RefusedError(f"Nothing was changed, because {why}: it would not return. {START_STANDBYS}")


# The server then says that a commit is local so far, and it is a success (src/backend/replication/syncrep.c).
_GIVE_UP_WAITING = """
SELECT pg_cancel_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND usename = session_user AND wait_event = 'SyncRep'
   AND application_name = current_setting('application_name') AND state_change < now() - interval '10 s'
"""


def give_up_waiting(connection: Connection) -> None:
    """Let our own sessions go on whose commit waits for standbys that are not there."""
    connection.execute(_GIVE_UP_WAITING)


# For a note that has to be seen although a synchronous standby is missing; until the end of the transaction.
COMMIT_LOCALLY = b"SELECT set_config('synchronous_commit', 'local', true)"
