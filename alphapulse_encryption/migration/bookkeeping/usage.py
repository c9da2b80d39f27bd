"""Messages per derived key, kept in the target database: reserved there before they are encrypted.

NIST SP 800-38D section 8.3 allows 2^32 messages under one key with random IVs. :class:`MeteredCipher` is the one way
in which the engine encrypts: it reserves messages in blocks, in transactions of its own, so that what is rolled back
and encrypted again counts again, and a killed process counts a block at most too many, never too few. What
applications encrypt they report with the database's function ``encryption_report_key_usage``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import psycopg

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.usage import MOST_MESSAGES, KeyUsage, exhausted
from alphapulse_encryption.errors import KeyExhausted
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.target import Target

# Messages reserved at once, at most: about a tenth of a second of encrypting. The first blocks are small, so that a
# process that is killed early has hardly counted more than it has encrypted.
BLOCK = 100_000

# What applications report is their word: it adds to the sum that is told, and not to what stops the engine. It is a row
# of its own: one of theirs that reports and does not commit makes nobody here wait.
_RESERVE = """
INSERT INTO alphapulse_encryption.key_usage AS u (context, key_version, source, messages)
SELECT %(context)s, %(version)s, 'engine', %(messages)s WHERE %(messages)s <= %(most)s
ON CONFLICT (context, key_version, source) DO UPDATE
   SET messages = u.messages + excluded.messages, updated_at = clock_timestamp()
 WHERE u.messages + excluded.messages <= %(most)s
RETURNING messages + (SELECT coalesce(sum(o.messages), 0) FROM alphapulse_encryption.key_usage o
                       WHERE o.context = %(context)s AND o.key_version = %(version)s AND o.source <> 'engine')
"""
_GIVE_BACK = """
UPDATE alphapulse_encryption.key_usage SET messages = messages - %s, updated_at = clock_timestamp()
 WHERE context = %s AND key_version = %s AND source = 'engine'
"""
_READ = """
SELECT context, key_version, sum(messages)::bigint,
       coalesce(sum(messages) FILTER (WHERE source = 'application'), 0)::bigint
  FROM alphapulse_encryption.key_usage
 GROUP BY context, key_version HAVING sum(messages) > 0 ORDER BY context, key_version
"""
_KNOW = """
INSERT INTO alphapulse_encryption.key_usage (context, key_version, source, messages)
SELECT context, %s, 'engine', 0 FROM unnest(%s::text[]) AS c (context) ON CONFLICT DO NOTHING
"""


def read_usage(connection: Connection) -> tuple[KeyUsage, ...]:
    """What each key has encrypted, by context and version; empty where nothing was counted yet."""
    if not bookkeeping_exists(connection):
        return ()
    return tuple(KeyUsage(*row) for row in connection.execute(_READ))


def know_contexts(connection: Connection, table: Table, key_version: int) -> None:
    """Let applications report what they encrypt of a table; of contexts that were never known they cannot."""
    contexts = sorted({column.context for column in table.columns})
    connection.execute(_KNOW, [key_version, contexts])


class MeteredCipher:
    """Encrypts, by a target's envelope format, only what was reserved in the database before.

    Safe to share between threads, though they wait for each other where a block is reserved. Its connection is opened
    with the first value that is encrypted.
    """

    def __init__(self, target: Target) -> None:
        self._database = target.data_path
        self._cipher = target.cipher
        self._version = target.keys.current_version
        self._block = BLOCK
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._reserved: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._sums: dict[str, int] = {}

    def encrypt(self, value: str, context: str) -> str:
        """See `EnvelopeFormat.encrypt`; raises what :meth:`reserve` raises."""
        self.reserve(context, 1)
        return self._cipher.encrypt(value, context)

    def encrypt_many_utf8(self, values: Sequence[bytes | None], context: str) -> list[bytes | None]:
        """See `EnvelopeFormat.encrypt_many_utf8`; raises what :meth:`reserve` raises."""
        self.reserve(context, len(values) - values.count(None))
        return self._cipher.encrypt_many_utf8(values, context)

    def reserve(self, context: str, messages: int) -> None:
        """See to it that so many messages of a context are counted in the database, under the current key version.

        Raises:
            KeyExhausted: the key may not encrypt that many more; nothing was reserved.
            DatabaseUnreachable: nobody answers.
            psycopg.Error: the server refused.
        """
        if not messages:
            return
        with self._lock:
            missing = messages - self._left.get(context, 0)
            if missing > 0:
                self._left[context] = self._left.get(context, 0) + self._more(context, missing)
            self._left[context] -= messages

    def usage(self) -> tuple[KeyUsage, ...]:
        """What all processes have encrypted under the keys used here, as of the latest reservation of each."""
        with self._lock:
            return tuple(
                KeyUsage(context, self._version, total - self._left.get(context, 0))
                for context, total in sorted(self._sums.items())
            )

    def close(self) -> None:
        """Give back what was reserved and not used, if the server is there; it counts as used otherwise."""
        with self._lock:
            left, self._left = self._left, {}
            connection, self._connection = self._connection, None
            if connection is None:
                return
            with connection, contextlib.suppress(psycopg.Error):
                for context, messages in left.items():
                    if messages:
                        connection.execute(_GIVE_BACK, [messages, context, self._version])
                        self._sums[context] -= messages

    def _more(self, context: str, needed: int) -> int:
        if self._connection is None:
            self._connection = self._database.connect()
        before = self._reserved.get(context, 0)
        for messages in dict.fromkeys((max(needed, min(self._block, before)), needed)):
            row = self._connection.execute(
                _RESERVE,
                {"context": context, "version": self._version, "messages": messages, "most": MOST_MESSAGES},
            ).fetchone()
            if row is not None:
                self._sums[context] = int(row[0])
                self._reserved[context] = before + messages
                return messages
        raise KeyExhausted(exhausted(context, self._version))
