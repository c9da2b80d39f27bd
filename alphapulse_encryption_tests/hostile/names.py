"""Hostile names, and a database all of whose objects have them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.catalogue import Catalogue, Column, Table

HOSTILE = {
    "quotes": "q'u\"o''t\"\"e",
    "dollar": "$$;$guard$ $1",
    "format": "%s %(x)s %% {0} {} %I",
    "backslash": "b\\s\\' E'\\n\\\\",
    "psql": ':"DBNAME" :x \\! id',
    "markup": "<script>alert(1)</script>&amp;",
    "statement": "'; DROP TABLE users; --",
    "comment": "*/ /* -- x",
    "bidi": "a\u202eb\u2066c\u200f\u2069",
    "emoji": "💥👩‍👧é e\u0301",
    "blank": "  lead, trail  ",
    "escape": "\x1b[31mred\x07\x9b",
    "newline": "a\nb\r\n; x\t",
    "dots": 'a.b."c"..d',
    "long": "l" * 63,
    # Each name is one of the words below instead.
    "reserved": "",
}
RESERVED = (
    "select table order group user from where and or not null default check unique primary references foreign "
    "constraint grant create column limit offset union all any array as asc case cast collate desc distinct do else"
)


@dataclass(frozen=True)
class Named:
    """What everything is called: each name has a word of its own, and the hostile text."""

    text: str

    def __call__(self, word: str, longest: int = 63) -> str:
        words = (*_WORDS, "schema", "people", "mail", "amount", "mood", "search")
        if not self.text and word in words:
            return RESERVED.split()[words.index(word)]
        name = f"{word} {self.text}" if self.text != self.text.lstrip() else f"{word}{self.text}"
        return name.encode()[:longest].decode(errors="ignore")

    def catalogued(self, word: str, longest: int = 63) -> str:
        """Of a table or a schema, whose names become keys of partitions: without what these refuse."""
        name = self(word, longest)
        for refused in ("|", "[", "]", ",", "..."):
            name = name.replace(refused, "_")
        return "".join("_" if unicodedata.category(c) == "Cc" else c for c in name)

    @property
    def table(self) -> Table:
        columns = (
            Column(name=self("mail", 53), context="mail", search_index=self("search")),
            Column(name=self("amount", 53), context="amount"),
            Column(name=self("mood", 53), context="mood"),
        )
        return Table(
            # Its safe view is called v_…_safe.
            name=self.catalogued("people", 56),
            schema=self.catalogued("schema"),
            columns=columns,
            hide=(self("hidden"),),
        )

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue(tables=(self.table,))

    @property
    def roles(self) -> tuple[str, str]:
        """Who owns the table, and whom it gives something."""
        return self("owner"), self("reader")


# ``{name:word}`` is an object's name, ``{text:word}`` the same as a literal.
_SCHEMA = """
CREATE SCHEMA {schema};
CREATE TYPE {schema}.{mood_type} AS ENUM ({label_a}, {label_b});
CREATE DOMAIN {schema}.{amount_type} AS numeric(12, 2) CONSTRAINT {amount_check} CHECK (VALUE <> 0);
CREATE SEQUENCE {schema}.{numbers};
CREATE TABLE {schema}.{people} (
    {id} int DEFAULT nextval({numbers_text}),
    {part} text,
    {mail} text NOT NULL,
    {amount} {schema}.{amount_type} DEFAULT 7.50,
    {mood} {schema}.{mood_type} DEFAULT {label_a},
    {other} text DEFAULT {label_b},
    {hidden} text,
    CONSTRAINT {key} PRIMARY KEY ({id}, {part}),
    CONSTRAINT {unique} UNIQUE ({mail}),
    CONSTRAINT {positive} CHECK ({amount} > 0),
    CONSTRAINT {untouched} CHECK ({other} <> 'x'));
CREATE INDEX {by_amount} ON {schema}.{people} ({amount}, {other});
CREATE INDEX {by_mood} ON {schema}.{people} ({mood}) WHERE {mood} = {label_a};
CREATE STATISTICS {schema}.{statistics} ON {amount}, {other} FROM {schema}.{people};
CREATE TABLE {schema}.{child} ({id} int, {part} text,
    CONSTRAINT {refers} FOREIGN KEY ({id}, {part}) REFERENCES {schema}.{people} ON DELETE CASCADE);
CREATE FUNCTION {schema}.{of_trigger}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER {fires} BEFORE UPDATE OF {other} ON {schema}.{people} FOR EACH ROW
    WHEN (NEW.{other} IS DISTINCT FROM OLD.{other}) EXECUTE FUNCTION {schema}.{of_trigger}({fires_text});
CREATE POLICY {policy} ON {schema}.{people} TO {reader} USING ({other} IS NOT NULL);
COMMENT ON TABLE {schema}.{people} IS {fires_text};
COMMENT ON COLUMN {schema}.{people}.{amount} IS {fires_text};
COMMENT ON CONSTRAINT {positive} ON {schema}.{people} IS {fires_text};
COMMENT ON INDEX {schema}.{by_amount} IS {fires_text};
CREATE VIEW {schema}.{view} AS SELECT {id}, {other} FROM {schema}.{people};
ALTER TABLE {schema}.{people} OWNER TO {owner};
GRANT USAGE ON SCHEMA {schema} TO {owner}, {reader};
GRANT CREATE ON SCHEMA {schema} TO {owner};
GRANT SELECT ({amount}, {mail}), UPDATE ({amount}) ON {schema}.{people} TO {reader};
GRANT SELECT ({other}) ON {schema}.{people} TO {reader} WITH GRANT OPTION;
INSERT INTO {schema}.{people} ({id}, {part}, {mail}, {amount}, {mood}, {other})
    SELECT n, {label_a} || n, n || {label_b} || '@example.org', n + 0.25,
           (CASE WHEN n % 2 = 0 THEN {label_a} ELSE {label_b} END)::{schema}.{mood_type}, {label_b} || n
      FROM generate_series(1, 40) n;
ANALYZE {schema}.{people};
"""
_WORDS = (
    *(
        "mood_type",
        "amount_type",
        "amount_check",
        "numbers",
        "id",
        "part",
        "other",
        "hidden",
        "key",
        "unique",
    ),
    *(
        "positive",
        "untouched",
        "by_amount",
        "by_mood",
        "statistics",
        "child",
        "refers",
        "of_trigger",
        "fires",
    ),
    *("policy", "view", "owner", "reader"),
)

# All that the application has there, but for what we add.
_SHAPE = """
SELECT 'column', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid),
       (SELECT array_agg(x::text ORDER BY 1) FROM unnest(a.attacl) x)::text, col_description(c.oid, a.attnum)
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
 WHERE c.oid = ({t}) AND a.attname <> ALL ({ours})
UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid), convalidated, obj_description(oid), NULL, NULL
  FROM pg_constraint WHERE conrelid = ({t}) AND contype <> 'n'
UNION ALL SELECT 'index', i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid), indisvalid,
       obj_description(i.indexrelid), NULL, NULL FROM pg_index i WHERE indrelid = ({t})
   AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = i.indexrelid AND a.attname = ANY ({ours}))
UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid), NULL, tgenabled::text, NULL, NULL
  FROM pg_trigger WHERE tgrelid = ({t}) AND NOT tgisinternal AND tgname !~ '^zzz_encryption'
UNION ALL SELECT 'policy', polname, pg_get_expr(polqual, polrelid), NULL, polroles::text, NULL, NULL
  FROM pg_policy WHERE polrelid = ({t})
UNION ALL SELECT 'statistics', stxname, (SELECT array_agg(attname ORDER BY attname)::text FROM pg_attribute
         WHERE attrelid = stxrelid AND attnum = ANY (stxkeys)), NULL, stxowner::regrole::text, stxkind::text, NULL
  FROM pg_statistic_ext WHERE stxrelid = ({t})
UNION ALL SELECT 'table', relname, relowner::regrole::text, NULL, (SELECT array_agg(x::text ORDER BY 1)
       FROM unnest(relacl) x)::text, obj_description(oid, 'pg_class'), NULL FROM pg_class WHERE oid = ({t})
"""


def names(named: Named) -> dict[str, str]:
    table = named.table
    mail, amount, mood = (column.name for column in table.columns)
    return {
        **{word: named(word) for word in _WORDS},
        **{"schema": table.schema_name, "people": table.name, "mail": mail, "amount": amount, "mood": mood},
    }


@contextmanager
def database_of(named: Named, url: str) -> Iterator[None]:
    """The objects, in a database that is there; their roles go with the block."""
    given = names(named)
    quoted: dict[str, Any] = {word: Identifier(name) for word, name in given.items()}
    with psycopg.connect(url, autocommit=True) as connection:
        numbers = Identifier(given["schema"], given["numbers"]).as_string(connection)
        literals = {
            "label_a": Literal(named("label a")),
            "label_b": Literal(named("label b")),
            "numbers_text": Literal(numbers),
            "fires_text": Literal(given["fires"]),
        }
        for role in named.roles:
            connection.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
        try:
            connection.execute(SQL(_SCHEMA).format(**quoted, **literals))
            yield
        finally:
            for role in named.roles:
                connection.execute(SQL("REASSIGN OWNED BY {} TO postgres").format(Identifier(role)))
                connection.execute(SQL("DROP OWNED BY {}").format(Identifier(role)))
                connection.execute(SQL("DROP ROLE {}").format(Identifier(role)))


def shape(named: Named, url: str) -> list[tuple[Any, ...]]:
    """The table as its owner knows it: names, types, constraints, indexes, privileges, comments."""
    table = named.table
    oid = SQL(
        "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = {} "
        "AND c.relname = {}"
    ).format(Literal(table.schema_name), Literal(table.name))
    ours = [name for column in table.columns for name in column.derived]
    with psycopg.connect(url) as connection:
        rows = connection.execute(SQL(_SHAPE).format(t=oid, ours=Literal(ours))).fetchall()
    return sorted(rows, key=repr)


def rows(named: Named, url: str) -> list[tuple[Any, ...]]:
    """Every value of the table's own columns."""
    given = names(named)
    wanted = SQL(", ").join(
        SQL("{}::text").format(Identifier(given[word]))
        for word in ("id", "part", "mail", "amount", "mood", "other")
    )
    with psycopg.connect(url) as connection:
        query = SQL("SELECT {} FROM {}.{} ORDER BY 1").format(
            wanted, Identifier(given["schema"]), Identifier(given["people"])
        )
        return connection.execute(query).fetchall()
