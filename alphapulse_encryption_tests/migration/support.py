"""What the tests of the engine share: a key, small catalogues, and eyes that do not belong to the engine.

Whatever is asserted on is read by plain psycopg and opened by `crypto.independent`, which follow the design's
envelope section alone. Only the steps themselves are the package's code.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from alphapulse_encryption.catalogue import Catalogue, Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.bookkeeping import evidence
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, RangeResult
from alphapulse_encryption.migration.rows.verify import TableVerification, verify_range, verify_table
from alphapulse_encryption.migration.steps.columns import ColumnsResult, add_encrypted_columns
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption_tests.crypto import independent

Row = tuple[Any, ...]
Connection = psycopg.Connection[Any]

MASTER_KEY = bytes(range(100, 132))
KEYS = KeyRing({1: MASTER_KEY}, 1)
OTHER_KEYS = KeyRing({1: bytes(32)}, 1)
CIPHER = get_format("AES-256-GCM", KEYS)
ACTOR = Actor("tests", "run-7")
# For steps that look at one table alone.
CATALOGUE = Catalogue(tables=(Table(name="notes", columns=(Column(name="body", context="test_context"),)),))


def target(
    of: str | Database,
    *,
    catalogue: Catalogue = CATALOGUE,
    keys: KeyRing = KEYS,
    cipher: EnvelopeFormat | None = None,
    actor: Actor = ACTOR,
) -> Target:
    """What a step works on: a database or its address, and what the tests have in common."""
    database = Database(of) if isinstance(of, str) else of
    # The same object for the same keys: a worker keeps what it has reserved for one.
    usual = CIPHER if keys is KEYS else get_format("AES-256-GCM", keys)
    return Target(database, catalogue, cipher or usual, keys, actor)


# The design: "always taken under".
DESIGN_SETTINGS = {
    "TimeZone": "UTC",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
}
# Far from those: what a database, or a role, may have been given by its administrator.
STRANGE_SETTINGS = {
    "TimeZone": "Asia/Kathmandu",
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "bytea_output": "escape",
    "extra_float_digits": "-10",
    "search_path": "elsewhere",
    "standard_conforming_strings": "off",
    "default_transaction_isolation": "repeatable read",
    "array_nulls": "off",
    "xmloption": "document",
    "quote_all_identifiers": "on",
}

# Past every guard, as a careless superuser would: it lets replicated rows pass, and the session's are such.
BEHIND = """
DO $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT tgrelid::regclass AS relation, tgname FROM pg_trigger WHERE tgname LIKE 'zzz_encryption_guard%'
                AND tgenabled = 'A'
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE TRIGGER %I', t.relation, t.tgname);
    END LOOP;
END $$;
SET session_replication_role = replica;
"""

# The longest that anything is waited for; a test that waits so long has failed.
PATIENCE = 240.0
_BLINK = 0.01


def table(name: str, *columns: str | Column, schema: str = "public", context: str = "test_context") -> Table:
    """A catalogue entry; a column given as text is not searchable."""
    entries = [Column(name=c, context=context) if isinstance(c, str) else c for c in columns]
    return Table.model_validate({"name": name, "schema": schema, "columns": entries})


def searchable(name: str, index: str, context: str = "test_search") -> Column:
    return Column(name=name, context=context, search_index=index)


@contextlib.contextmanager
def application(url: str, *, autocommit: bool = True) -> Iterator[Connection]:
    """A session of the application, which knows nothing of the engine."""
    with psycopg.connect(url, autocommit=autocommit) as connection:
        yield connection


def run(url: str, statement: str | sql.Composed, *parameters: object) -> list[Row]:
    """One statement in a session of its own."""
    with application(url) as connection:
        return ask(connection, statement, *parameters)


def ask(connection: Connection, statement: str | sql.Composed, *parameters: object) -> list[Row]:
    text = statement.encode() if isinstance(statement, str) else statement
    cursor = connection.execute(text, parameters or None)
    return cursor.fetchall() if cursor.description else []


def value(url: str, statement: str | sql.Composed, *parameters: object) -> Any:
    return run(url, statement, *parameters)[0][0]


def grant_bookkeeping(url: str, role: str) -> None:
    """Let a role read the bookkeeping."""
    for grant in ("USAGE ON SCHEMA", "SELECT ON ALL TABLES IN SCHEMA"):
        statement = sql.SQL("GRANT {} {} TO {}").format(
            sql.SQL(grant), sql.Identifier("alphapulse_encryption"), sql.Identifier(role)
        )
        run(url, statement)


def name_of(entry: Table) -> sql.Identifier:
    return sql.Identifier(entry.schema_name, entry.name)


def with_settings(url: str, settings: dict[str, str]) -> None:
    """Give the database other defaults for all its sessions to come."""
    with application(url) as connection:
        for name, text in settings.items():
            connection.execute(
                sql.SQL("ALTER DATABASE {} SET {} TO {}").format(
                    sql.Identifier(connection.info.dbname),
                    sql.Identifier(name),
                    sql.Literal(text),
                )
            )


# The engine's steps, as the assets call them.


def add_columns(url: str, entry: Table, *, ranges: int = 1, keys: KeyRing = KEYS) -> ColumnsResult:
    return add_encrypted_columns(target(url, keys=keys), entry, batch_ranges=ranges)


def backfill(url: str, entry: Table, number: int = 0, *, batch_size: int | None = None) -> RangeResult:
    """One batch range."""
    return backfill_range(target(url), entry, number, pace=Pace(batch_size))


def backfill_all(url: str, entry: Table, *, batch_size: int | None = None) -> list[RangeResult]:
    numbers = run(
        url,
        "SELECT batch_range FROM alphapulse_encryption.ranges WHERE table_name = %s ORDER BY 1",
        entry.key,
    )
    return [backfill(url, entry, number, batch_size=batch_size) for (number,) in numbers]


def encrypt(url: str, entry: Table, *, ranges: int = 1) -> None:
    """Steps 2 and 3."""
    add_columns(url, entry, ranges=ranges)
    backfill_all(url, entry)


def verify(url: str, entry: Table) -> TableVerification:
    """Step 4."""
    database = Database(url)
    for (number,) in run(
        url,
        "SELECT batch_range FROM alphapulse_encryption.ranges WHERE table_name = %s ORDER BY 1",
        entry.key,
    ):
        verify_range(target(database), entry, number)
    return verification(url, entry)


def verification(url: str, entry: Table, keys: KeyRing = KEYS) -> TableVerification:
    with Database(url).session("read the verification") as connection:
        return verify_table(connection, entry, keys)


# The bookkeeping, by its tables.


def backups(url: str) -> list[str]:
    """Where the backups are that the database knows of; none where nothing is begun."""
    if value(url, "SELECT to_regclass('alphapulse_encryption.backups')") is None:
        return []
    return [location for (location,) in run(url, "SELECT location FROM alphapulse_encryption.backups")]


def move_backup(url: str, location: str, to: str, keys: KeyRing = KEYS) -> None:
    run(url, "UPDATE alphapulse_encryption.backups SET location = %s WHERE location = %s", to, location)
    sign_here(url, keys)


def sign_here(url: str, keys: KeyRing = KEYS) -> None:
    """Make the evidence of a copied database its own, as nobody could who has no key."""
    with Database(url).session("sign the evidence") as connection, connection.transaction():
        for kind in evidence.ALL:
            for row in evidence.read(connection, kind, "mac IS NOT NULL"):
                also: object = None
                if kind is evidence.VERIFICATION:
                    (found,) = connection.execute(
                        "SELECT lower_key, upper_key FROM alphapulse_encryption.ranges "
                        "WHERE table_name = %s AND batch_range = %s",
                        [row["table_name"], row["batch_range"]],
                    )
                    also = list(found)
                elif kind is evidence.ROW_COUNT:
                    numbers = connection.execute(
                        "SELECT number FROM alphapulse_encryption.verifications WHERE table_name = %s "
                        "ORDER BY batch_range",
                        [row["table_name"]],
                    )
                    also = [number for (number,) in numbers]
                evidence.sign_again(connection, keys, kind, row, ACTOR, also=also)


# Eyes that do not belong to the engine.


@functools.cache
def derived(context: str, version: int = 1) -> bytes:
    return independent.derive(MASTER_KEY, context, version)


def seal(text: str, context: str) -> str:
    """An envelope as the application would write it."""
    iv = base64.b64decode(independent.token(derived(context), text + str(time.monotonic_ns())))[:12]
    return independent.seal(derived(context), iv, text, context, 1)


def token(text: str, context: str) -> str:
    return independent.token(derived(context), text)


def key_columns(connection: Connection, entry: Table) -> list[str]:
    rows = ask(
        connection,
        "SELECT a.attname FROM pg_index i CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k (n, position) "
        "JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.n "
        "WHERE i.indisprimary AND i.indrelid = (SELECT c.oid FROM pg_class c JOIN pg_namespace n "
        "ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s) ORDER BY k.position",
        entry.schema_name,
        entry.name,
    )
    return [name for (name,) in rows]


def texts(url: str, entry: Table, column: str) -> dict[Row, str | None]:
    """A column's values in the design's text form, by the text form of their keys."""
    with application(url) as connection:
        for name, text in DESIGN_SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, false)", [name, text])
        keys = [sql.SQL("{}::text").format(sql.Identifier(k)) for k in key_columns(connection, entry)]
        rows = connection.execute(
            sql.SQL("SELECT {}, {}::text FROM {}").format(
                sql.SQL(", ").join(keys), sql.Identifier(column), name_of(entry)
            )
        ).fetchall()
    found = {row[:-1]: row[-1] for row in rows}
    assert len(found) == len(rows)
    return found


def opened(envelope: str, context: str) -> str:
    """The value in an envelope, once its form is what the design says."""
    members = json.loads(envelope)
    assert set(members) == {"ciphertext", "key_version", "context", "algorithm"}
    assert members["algorithm"] == "AES-256-GCM"
    assert members["context"] == context
    return independent.open_envelope(derived(context, members["key_version"]), envelope)


def assert_encrypted(url: str, entry: Table) -> int:
    """Every value of every column decrypts to its plaintext, every token is that of its value.

    Returns:
        The number of values that are not NULL.
    """
    count = 0
    for column in entry.columns:
        plain = texts(url, entry, column.name)
        envelopes = texts(url, entry, column.encrypted)
        assert {k: e is None for k, e in envelopes.items()} == {k: p is None for k, p in plain.items()}, (
            column
        )
        decrypted = {k: None if e is None else opened(e, column.context) for k, e in envelopes.items()}
        assert decrypted == plain, column
        if column.searchable:
            tokens = {k: None if p is None else token(p, column.context) for k, p in plain.items()}
            assert texts(url, entry, column.search) == tokens, column
        count += sum(p is not None for p in plain.values())
    return count


def fingerprints(url: str, entry: Table) -> dict[Row, Row]:
    """Where each row version lies and who wrote it, by key: changes with any write to the row."""
    with application(url) as connection:
        keys = [sql.SQL("{}::text").format(sql.Identifier(k)) for k in key_columns(connection, entry)]
        rows = connection.execute(
            sql.SQL("SELECT {}, ctid::text, xmin::text FROM {}").format(
                sql.SQL(", ").join(keys), name_of(entry)
            )
        ).fetchall()
    return {row[:-2]: row[-2:] for row in rows}


# Waiting for something to happen, and doing two things at once.


def until(condition: Callable[[], bool], what: str) -> None:
    """Look again and again until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(_BLINK)


def engine_waits(url: str, pattern: LiteralString = "%", *, behind: Connection | None = None) -> bool:
    """Whether a session of the engine waits for a lock.

    Args:
        url: the database.
        pattern: of its statement, as for ``LIKE``.
        behind: whose lock it has to be. A build of an index also waits for whoever looks at the database, for an
            instant; only what the test itself holds is certain to be waited for until the test goes on.
    """
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'alphapulse_encryption' AND wait_event_type = 'Lock' AND query LIKE %s "
        "AND (%s::int IS NULL OR %s = ANY (pg_blocking_pids(pid)))"
    )
    holder = behind and behind.info.backend_pid
    return bool(_ask_again(url, waiting, pattern, holder, holder))


_watching = threading.local()


def _ask_again(url: str, query: LiteralString, *parameters: object) -> Any:
    """What is asked a hundred times a second, in a session that is kept: opening one costs more than the question."""
    kept: tuple[str, Connection] | None = getattr(_watching, "kept", None)
    if kept is None or kept[0] != url:
        if kept is not None:
            kept[1].close()
        kept = _watching.kept = (url, psycopg.connect(url, autocommit=True))
    try:
        return ask(kept[1], query, *parameters)[0][0]
    except psycopg.OperationalError:
        kept[1].close()
        del _watching.kept
        raise


class Background:
    """A function in a thread of its own; its result or its error when it is done."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "still running"
        if self._error is not None:
            raise self._error
        return self._result
