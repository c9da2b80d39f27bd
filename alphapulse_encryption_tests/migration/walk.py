"""Walks a table through the stages with the engine's own functions, for tests of what comes after them."""

from __future__ import annotations

import os
import re
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from alphapulse_encryption.catalogue import Catalogue, Table, load_catalogue
from alphapulse_encryption.crypto.envelope import EnvelopeFormat, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.bookkeeping.approvals import Approval
from alphapulse_encryption.migration.gates.approvals import TwoPersonRule, approve_drop
from alphapulse_encryption.migration.gates.backup import BackupResult, take_backup
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.verify import TableVerification, verify_range, verify_table
from alphapulse_encryption.migration.schema import views
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.drop import DropResult, drop_plaintext
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption_tests.migration import support

KEYS = KeyRing({1: bytes(range(32))}, 1)
CIPHER = get_format("AES-256-GCM", KEYS)
ACTOR = Actor("tests", "run-1")
CATALOGUE = load_catalogue()
RANGES = 2


def target(
    of: str | Database,
    *,
    catalogue: Catalogue = CATALOGUE,
    keys: KeyRing = KEYS,
    cipher: EnvelopeFormat | None = None,
    actor: Actor = ACTOR,
) -> Target:
    """As :func:`support.target`, with the keys and the catalogue of the sample."""
    usual = CIPHER if keys is KEYS else None
    return support.target(of, catalogue=catalogue, keys=keys, cipher=cipher or usual, actor=actor)


def query(url: str, text: str, *parameters: object) -> list[tuple[Any, ...]]:
    """The rows of a statement in a session of its own, that of an application."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(text.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def rewrite(url: str, text: str, *parameters: object) -> None:
    """Change evidence as only who has the master key could: a test's subject is what is said, not who says it."""
    query(url, text, *parameters)
    support.sign_here(url, KEYS)


def let_approvals_end(url: str, after: timedelta) -> None:
    """Move all approvals in time, so that they end so long from now; their MACs stay as they were."""
    query(
        url,
        "UPDATE alphapulse_encryption.approvals SET (verified_at, approved_at, expires_at) = "
        "(SELECT verified_at + moved, approved_at + moved, expires_at + moved FROM (SELECT now() + %s - expires_at) "
        "AS m (moved))",
        after,
    )


def value(url: str, text: str, *parameters: object) -> Any:
    """The first column of the first row."""
    return query(url, text, *parameters)[0][0]


def encrypt(url: str, table: Table) -> None:
    """Steps 2 and 3: columns, backfill, indexes."""
    database = Database(url)
    add_encrypted_columns(target(database), table, batch_ranges=RANGES)
    backfill(url, table)
    build_search_indexes(database, table, ACTOR)


def backfill(url: str, table: Table) -> None:
    """Step 3 alone."""
    for number in range(RANGES):
        backfill_range(target(url), table, number)


def verify(url: str, table: Table) -> TableVerification:
    """Step 4."""
    database = Database(url)
    for number in range(RANGES):
        verify_range(target(database), table, number)
    with database.session("read the verification") as connection:
        return verify_table(connection, table, KEYS)


def switch(url: str, table: Table) -> None:
    """Everything up to a verified table whose ciphertext is right."""
    encrypt(url, table)
    verify(url, table)
    hand_over(url, table)


def hand_over(url: str, table: Table) -> None:
    """The switch of a verified table, and its verification since."""
    switch_to_ciphertext(target(url), table)
    assert verify(url, table).passed


def create_views(url: str, table: Table) -> None:
    """Step 6."""
    views.create_views(Database(url), table, ACTOR)


def backup(url: str, tables: tuple[Table, ...], directory: Path, bin_dir: Path) -> BackupResult:
    return take_backup(target(url), tables, directory=directory, bin_dirs=[bin_dir])


def backup_directory(url: str) -> Path:
    """Where the backups of a database are."""
    locations = query(url, "SELECT location FROM alphapulse_encryption.backups ORDER BY id DESC LIMIT 1")
    return Path(locations[0][0] if locations else "/nowhere/at all").parent


def approve(url: str, table: Table, catalogue: Catalogue = CATALOGUE) -> Approval:
    return approve_drop(
        target(url, catalogue=catalogue),
        table,
        approver="Ada",
        reason="the encrypted columns serve for a month",
        confirmation=table.key,
        backups=backup_directory(url),
    )


def drop(
    url: str,
    table: Table,
    catalogue: Catalogue = CATALOGUE,
    *,
    keys: KeyRing = KEYS,
    operator: str = "Grace",
    default_rule: TwoPersonRule = "names",
) -> DropResult:
    return drop_plaintext(
        target(url, keys=keys, catalogue=catalogue),
        table,
        backups=backup_directory(url),
        operator=operator,
        default_rule=default_rule,
    )


def dump(url: str, bin_dir: Path, *arguments: str) -> str:
    """What pg_dump says of the database, as SQL."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PG")}
    done = subprocess.run(
        [bin_dir / "pg_dump", "--dbname", url, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def contents(url: str, table: str, columns: list[str]) -> list[tuple[Any, ...]]:
    """Every row's values in their text form, in an order that depends on nothing but them."""
    values = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in sorted(columns))
    with psycopg.connect(url) as connection:
        statement = sql.SQL("SELECT {} FROM {}").format(values, sql.Identifier(*table.split(".")))
        return sorted(connection.execute(statement).fetchall(), key=repr)


def columns_of(url: str, table: str) -> list[str]:
    rows = query(
        url,
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
        table,
    )
    return [name for (name,) in rows]


def schema(url: str, bin_dir: Path, table: Table) -> list[str]:
    """The table as pg_dump writes it, lines sorted, without what the engine adds to it."""
    text = dump(url, bin_dir, "--schema-only", "--table", f'"{table.schema_name}"."{table.name}"')
    ours = [name for column in table.columns for name in column.derived]
    ours += [column.search_index for column in table.columns if column.search_index]
    ours += ["_encryption_pending"]
    # The guard's condition goes over several lines.
    text = re.sub(
        r"^(CREATE|COMMENT ON|ALTER TABLE \S+ ENABLE ALWAYS) TRIGGER zzz_encryption_guard.*?;$",
        "",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    return sorted(
        line.rstrip(",")
        for line in text.splitlines()
        if line and not line.startswith(("--", "\\")) and not any(name in line for name in ours)
    )
