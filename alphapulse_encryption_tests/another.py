"""Another catalogue than the packaged one, and a database for it.

A UUID key, a key of two columns, another schema, mixed-case and quoted names, one with a space.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import psycopg
from psycopg.sql import SQL, Composable, Identifier

from alphapulse_encryption_tests.crypto import independent

MASTER_KEY = bytes(range(100, 132))
MASTER_KEY_TEXT = base64.urlsafe_b64encode(MASTER_KEY).decode()

CATALOGUE = """\
tables:
  - name: sessions
    columns:
      - {name: token, context: session_token, search_index: idx_sessions_token}
      - {name: payload, context: session_payload}
  - name: order_lines
    schema: crm
    columns:
      - {name: price, context: line_price}
      - {name: note, context: line_note}
  - name: Kunde
    schema: crm
    columns:
      - {name: E-Mail, context: customer_mail, search_index: idx_Kunde_EMail}
      - {name: geburts Tag, context: customer_birthday}
"""

SCHEMA = """
CREATE SCHEMA crm;
CREATE TABLE sessions (
    id uuid PRIMARY KEY,
    token text NOT NULL,
    payload jsonb,
    created_at timestamptz NOT NULL DEFAULT '2024-01-01 00:00:00+00');
CREATE TABLE crm.order_lines (
    order_id bigint, line smallint,
    price numeric(14,4) NOT NULL DEFAULT 0,
    note varchar(200),
    PRIMARY KEY (order_id, line));
CREATE TABLE crm."Kunde" (
    "KundenNr" integer PRIMARY KEY,
    "E-Mail" text UNIQUE,
    "geburts Tag" date,
    "Land" text NOT NULL DEFAULT 'DE');
INSERT INTO sessions (id, token, payload)
    SELECT md5(n::text)::uuid, 'token ' || n || ' ''"\\' || chr(9) || U&'\\00E4\\6F22',
           CASE WHEN n % 7 > 0 THEN jsonb_build_object('n', n, 'text', repeat('x', n)) END
      FROM generate_series(1, 60) n;
INSERT INTO crm.order_lines (order_id, line, price, note)
    SELECT o, l, CASE WHEN l = 3 THEN 'NaN'::numeric ELSE (o * l)::numeric / 7 END,
           CASE WHEN l = 1 THEN '' WHEN l = 2 THEN NULL ELSE 'note ' || o END
      FROM generate_series(1, 30) o, generate_series(1, 3) l;
INSERT INTO crm."Kunde" ("KundenNr", "E-Mail", "geburts Tag")
    SELECT n, CASE WHEN n % 10 > 0 THEN 'kunde' || n || '@example.org' END, DATE '1950-01-01' + 97 * n
      FROM generate_series(1, 50) n;
ANALYZE;
"""
# Rows per table, by the names of the command line.
ROWS = {"sessions": 60, "crm.order_lines": 90, "crm.Kunde": 50}
# Per table: schema, name, key columns, and per sensitive column its context and whether it is searchable.
TABLES: dict[str, tuple[str, str, tuple[str, ...], dict[str, tuple[str, bool]]]] = {
    "sessions": (
        "public",
        "sessions",
        ("id",),
        {"token": ("session_token", True), "payload": ("session_payload", False)},
    ),
    "crm.order_lines": (
        "crm",
        "order_lines",
        ("order_id", "line"),
        {"price": ("line_price", False), "note": ("line_note", False)},
    ),
    "crm.Kunde": (
        "crm",
        "Kunde",
        ("KundenNr",),
        {"E-Mail": ("customer_mail", True), "geburts Tag": ("customer_birthday", False)},
    ),
}


def plaintexts(url: str, table: str) -> list[tuple[Any, ...]]:
    """Key and sensitive values of every row in text form, in the order of the key."""
    schema, name, key, columns = TABLES[table]
    query = SQL("SELECT {} FROM {} t ORDER BY {}").format(
        SQL(", ").join(SQL("{}::text").format(Identifier(c)) for c in (*key, *columns)),
        Identifier(schema, name),
        SQL(", ").join(Identifier("t", c) for c in key),
    )
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


def decrypted(url: str, table: str, version: int = 1) -> list[tuple[Any, ...]]:
    """The same from the ciphertext alone, decrypted without the package; envelopes and tokens are checked."""
    schema, name, key, columns = TABLES[table]
    wanted: list[Composable] = [SQL("{}::text").format(Identifier(c)) for c in key]
    for column, (_, searchable) in columns.items():
        wanted.append(SQL("{}").format(Identifier(f"{column}_encrypted")))
        wanted.append(SQL("{}").format(Identifier(f"{column}_search")) if searchable else SQL("NULL"))
    query = SQL("SELECT {} FROM {} t ORDER BY {}").format(
        SQL(", ").join(wanted), Identifier(schema, name), SQL(", ").join(Identifier("t", c) for c in key)
    )
    with psycopg.connect(url) as connection:
        rows = connection.execute(query).fetchall()
    keys = {context: independent.derive(MASTER_KEY, context, version) for context, _ in columns.values()}
    result = []
    for row in rows:
        values: list[Any] = list(row[: len(key)])
        cells = row[len(key) :]
        for number, (context, searchable) in enumerate(columns.values()):
            envelope, token = cells[2 * number : 2 * number + 2]
            if envelope is None:
                assert token is None
                values.append(None)
                continue
            members = json.loads(envelope)
            assert (members["key_version"], members["context"]) == (version, context)
            value = independent.open_envelope(keys[context], envelope)
            assert token == (independent.token(keys[context], value) if searchable else None)
            values.append(value)
        result.append(tuple(values))
    return result
