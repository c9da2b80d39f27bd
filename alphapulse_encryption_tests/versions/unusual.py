"""A table of types and constraints that the sample has not, some of which only newer servers know."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption_tests.migration import walk

TABLE = "unusual"
ROWS = 400

_SCHEMA = """
CREATE EXTENSION citext;
CREATE TYPE mood AS ENUM ('low', 'high');
CREATE DOMAIN short AS text CHECK (length(VALUE) < 60);
CREATE TABLE unusual (
    id uuid,
    part smallint,
    handle text UNIQUE,
    mail citext NOT NULL,
    amount numeric(30, 10) NOT NULL DEFAULT 7 CHECK (amount > -1),
    mood mood DEFAULT 'low',
    moods mood[],
    tags text[],
    at timestamptz,
    span interval,
    during tstzrange,
    raw bytea,
    document jsonb NOT NULL DEFAULT '{}',
    address inet,
    nick short,
    ratio double precision,
    note text,
    label text GENERATED ALWAYS AS ('number ' || part) STORED,
    PRIMARY KEY (id, part))
"""
_INDEXES = (
    "CREATE INDEX unusual_at ON unusual (at)",
    "CREATE INDEX unusual_mail ON unusual (lower(mail::text)) INCLUDE (part)",
)
_ROWS = f"""
INSERT INTO unusual (id, part, handle, mail, amount, mood, moods, tags, at, span, during, raw, document, address, nick,
                     ratio, note)
SELECT md5(n::text)::uuid, n % 9, CASE WHEN n > 1 THEN 'handle ' || n END, 'Mail' || n || '@Example.org', n / 7.0,
       (ARRAY['low', 'high', NULL]::mood[])[1 + n % 3], ARRAY['high', NULL, 'low']::mood[],
       ARRAY['', 'a,b', NULL, U&'"\\00E4\\005C', n::text],
       '2024-01-01 00:00+05:45'::timestamptz + n * interval '1.000001 s',
       n * interval '1 month 2 days 03:04:05.000006',
       tstzrange(NULL, '2024-01-01Z'::timestamptz + n * interval '1 day'),
       decode(md5(n::text), 'hex'), jsonb_build_object('n', n, 'b', ARRAY[1.10, NULL], 'a', U&'\\00E4'),
       '10.0.0.0/8'::inet + n, 'nick ' || n, CASE WHEN n % 5 = 0 THEN 'NaN' ELSE n / 3.0 END, 'note ' || n
  FROM generate_series(1, {ROWS}) n
"""
# What came with a version; it is of every later one.
_SINCE = {
    15: (
        "ALTER TABLE unusual ADD UNIQUE NULLS NOT DISTINCT (note)",
        "CREATE PUBLICATION some_unusual FOR TABLE unusual WHERE (part > 3)",
    ),
    18: (
        "ALTER TABLE unusual ADD twice integer GENERATED ALWAYS AS (part * 2) VIRTUAL",
        "ALTER TABLE unusual RENAME CONSTRAINT unusual_amount_not_null TO an_amount_is_needed",
    ),
}

_COLUMNS = (
    *(
        "mail",
        "amount",
        "mood",
        "moods",
        "tags",
        "at",
        "span",
        "during",
        "raw",
        "document",
        "address",
        "nick",
    ),
    "ratio",
)


def statements(version: int) -> Iterator[str]:
    """What makes and fills it on a server of that version."""
    yield from (_SCHEMA, _ROWS, *_INDEXES, "CREATE PUBLICATION all_unusual FOR TABLE unusual")
    for since, statements in _SINCE.items():
        if since <= version:
            yield from statements
    yield "ANALYZE unusual"


def catalogue() -> str:
    """The packaged catalogue, and this table."""
    columns = [{"name": "handle", "context": "unusual_handle", "search_index": "unusual_handle_search"}]
    columns += [{"name": name, "context": f"unusual_{name}"} for name in _COLUMNS]
    packaged = walk.CATALOGUE.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump({"tables": [*packaged["tables"], {"name": TABLE, "columns": columns}]})


TABLES = Catalogue.model_validate(yaml.safe_load(catalogue())).tables
