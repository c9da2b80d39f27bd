"""Tables that nobody made: composed at random of what products' tables have, the same ones for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg

from alphapulse_encryption.catalogue import Column, Table

ROWS = 40
# What tables refer to.
BEFORE = (
    "CREATE TYPE mood AS ENUM ('low', 'high', 'Very')",
    "CREATE TYPE pair AS (a int, b text)",
    "CREATE DOMAIN short AS text CHECK (length(VALUE) < 60)",
    "CREATE DOMAIN told AS text DEFAULT 'told' CHECK (VALUE <> 'never')",
    "CREATE DOMAIN positive AS numeric(12,3) CHECK (VALUE > 0)",
    "CREATE SCHEMA elsewhere",
    "CREATE TYPE elsewhere.\"Odd Type\" AS ENUM ('a', 'b')",
    "CREATE SEQUENCE elsewhere.numbers",
    "CREATE FUNCTION pass() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN CASE TG_OP WHEN ''DELETE'' THEN OLD "
    "ELSE NEW END; END'",
    "CREATE FUNCTION folded(text) RETURNS text IMMUTABLE LANGUAGE sql RETURN lower($1)",
    "CREATE TABLE regions (id int PRIMARY KEY)",
    "INSERT INTO regions SELECT generate_series(0, 9)",
    "CREATE COLLATION plain (provider = libc, locale = 'C')",
)
# By type: what makes the value of a row, and a constant for a default.
_TYPES = {
    "text": ("'v' || i", "'none'"),
    "varchar(40)": ("'v' || i", "'none'"),
    '"char"': ("chr(40 + i % 80)", "'x'"),
    "char(12)": ("'v' || i", "'none'"),
    "name": ("'v' || i", "'none'"),
    "numeric(9,2)": ("i + 0.10", "7"),
    "numeric": ("i / 7.0", "0.5"),
    "int": ("i * 3", "12"),
    "smallint": ("i", "1"),
    "bigint": ("i * 10000000000", "nextval('elsewhere.numbers')"),
    "double precision": ("i / 3.0", "'NaN'"),
    "boolean": ("i % 2 = 0", "false"),
    "date": ("date '2020-01-01' + i", "CURRENT_DATE"),
    "timestamptz(3)": ("timestamptz '2020-01-01Z' + i * interval '1 hour'", "now()"),
    "interval day to second(2)": ("i * interval '3 h'", "'1 day'"),
    "jsonb": ("jsonb_build_object('n', i)", "'{}'"),
    "json": ("json_build_object('n', i)", "'{}'"),
    "text[]": ("ARRAY['a', NULL, i::text]", "'{}'"),
    "int[]": ("ARRAY[i, NULL]", "'{}'"),
    "mood": ("(ARRAY['low', 'high', 'Very'])[1 + i % 3]::mood", "'low'"),
    "mood[]": ("ARRAY['low', NULL]::mood[]", "'{}'"),
    'elsewhere."Odd Type"': ("'b'::elsewhere.\"Odd Type\"", "'a'"),
    "pair": ("ROW(i, NULL)::pair", "'(1,x)'"),
    "short": ("'v' || i", "'none'"),
    "short[]": ("ARRAY['v' || i]::short[]", "'{}'"),
    "told": ("'v' || i", "'other'"),
    "positive": ("i + 1", "5"),
    "uuid": ("md5(i::text)::uuid", "gen_random_uuid()"),
    "bytea": ("decode(md5(i::text), 'hex')", "''"),
    "inet": ("'10.0.0.0'::inet + i", "'::1'"),
    "tstzrange": ("tstzrange(NULL, timestamptz '2020-01-01Z' + i * interval '1 day')", "'empty'"),
    "int4multirange": ("int4multirange(int4range(i, i + 2))", "'{}'"),
    "bit(5)": ("(i % 32)::bit(5)", "B'10101'"),
    "varbit(9)": ("(i % 32)::bit(5)::varbit(9)", "B'1'"),
    "tsvector": ("to_tsvector('simple', 'v' || i)", "''"),
    "point": ("point(i, i)", "'(0,0)'"),
    "macaddr": ("('08:00:2b:01:02:' || lpad(to_hex(i % 256), 2, '0'))::macaddr", "'08:00:2b:01:02:03'"),
}
_OF_TEXT = ("text", "varchar(40)", "short", "told")
_TABLES = (
    "people",
    "Odd Table",
    "order",
    "a'b",
    "naïve",
    'quo"ted',
    "a_rather_long_name_of_a_table_that_somebody_gave",
)
_COLUMNS = ("mail", "Secret Value", "user", "größe", "it's", 'in"ner', "value", "name", "a%b")
_OTHERS = {"region": "i % 4", "other": "i * 2", "note": "'note ' || i"}
_BY = {"range": "RANGE", "hash": "HASH"}
_PARTITIONED = ("", "", "", "list", "list", "range", "hash", "levels", "order")


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class Made:
    """A table and what makes it.

    Args:
        base: statements without which there is none.
        options: any of which may be left out, for one that fails, too.
        key: columns of its key.
        values: what makes the value of each other column for row ``i``.
        kinds: types of the catalogued columns.
    """

    table: Table
    base: tuple[str, ...]
    options: tuple[str, ...]
    key: tuple[str, ...]
    values: dict[str, str]
    kinds: dict[str, str]

    @property
    def relation(self) -> str:
        return f"{quoted(self.table.schema_name)}.{quoted(self.table.name)}"

    def make(self, url: str) -> tuple[str, ...]:
        """Have the table in a database; returns the options that it has."""
        done = []
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in (*BEFORE, *self.base):
                connection.execute(statement.encode())
            for statement in self.options:
                try:
                    connection.execute(statement.encode())
                except psycopg.Error:
                    # PostgreSQL does not have this of such a table.
                    continue
                done.append(statement)
        return tuple(done)


def make(seed: int) -> Made:
    return _Maker(random.Random(seed)).made()


_LAST = """
DO $$
DECLARE
    was text;
BEGIN
    SELECT format_type(a.atttypid, a.atttypmod)
           || coalesce(' COLLATE ' || nullif(a.attcollation, y.typcollation)::regcollation, '')
           || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END INTO was
      FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
     WHERE a.attrelid = '{part}'::regclass AND a.attname = 'was';
    EXECUTE format('ALTER TABLE %s ADD COLUMN %I %s', '{part}', '{name}', was);
END $$
"""


def _made_again(part: str, name: str) -> Iterator[str]:
    """Make a column the last one of its table."""
    yield f"ALTER TABLE {part} RENAME COLUMN {quoted(name)} TO was"
    yield _LAST.format(part=part, name=name.replace("'", "''"))
    yield f"ALTER TABLE {part} DROP COLUMN was"


class _Maker:
    def __init__(self, choice: random.Random) -> None:
        self.choice = choice
        self.schema = choice.choice(("public", "public", "elsewhere"))
        self.name = choice.choice(_TABLES)
        self.partitioned = choice.choice(_PARTITIONED)
        self.names = choice.sample(_COLUMNS, choice.choice((1, 2, 2, 3)))
        self.types = {name: choice.choice([*_TYPES, *_OF_TEXT]) for name in self.names}
        self.nullable: dict[str, bool] = {}
        self.relation = f"{quoted(self.schema)}.{quoted(self.name)}"

    def chance(self, share: float) -> bool:
        return self.choice.random() < share

    def made(self) -> Made:
        key: tuple[str, ...] = ("Key 1",)
        if self.partitioned:
            key = ("region", "Key 1")
        elif self.chance(0.3):
            key = ("Key 1", "other")
        columns = [
            Column(
                name=name, context=f"context_{n}", search_index=f"idx find {n}" if self.chance(0.6) else None
            )
            for n, name in enumerate(self.names)
        ]
        values = {name: how for name, how in _OTHERS.items() if name not in key}
        values |= {name: _TYPES[kind][0] for name, kind in self.types.items()}
        base = [*self.create(key), *self.parts(), self.fill(key, values), f"ANALYZE {self.relation}"]
        pool = [*self.options()]
        # What stops the switch or the drop, by its mark: few, for the others to come through.
        stopping = [text[1:] for text in pool if text.startswith("!")]
        pool = [text for text in pool if not text.startswith("!")]
        options = self.choice.sample(pool, min(len(pool), self.choice.randrange(2, 16)))
        if self.chance(0.3):
            options.insert(self.choice.randrange(len(options)), self.choice.choice(stopping))
        table = Table.model_validate({"name": self.name, "schema": self.schema, "columns": columns})
        return Made(table, tuple(base), tuple(options), key, values, self.types)

    def create(self, key: tuple[str, ...]) -> Iterator[str]:
        identity = ("", " GENERATED ALWAYS AS IDENTITY", " GENERATED BY DEFAULT AS IDENTITY")
        of_key = self.choice.choice(("int", "bigint"))
        of_key += "" if self.partitioned else self.choice.choice(identity)
        lines = [f'"Key 1" {of_key}', "region int", "other int", "note text", *map(self.column, self.names)]
        if self.chance(0.3):
            lines.append("twice int GENERATED ALWAYS AS (other * 2) STORED")
        if gone := self.chance(0.5):
            lines.append("gone text")
        self.choice.shuffle(lines)
        lines.append(f"PRIMARY KEY ({', '.join(map(quoted, key))})")
        if self.partitioned:
            tail = f" PARTITION BY {_BY.get(self.partitioned, 'LIST')} (region)"
        else:
            tail = self.choice.choice(("", "", " WITH (fillfactor=70, autovacuum_enabled=false)"))
        unlogged = "UNLOGGED " if not self.partitioned and self.chance(0.1) else ""
        yield f"CREATE {unlogged}TABLE {self.relation} ({', '.join(lines)}){tail}"
        if gone:
            yield f"ALTER TABLE {self.relation} DROP COLUMN gone"

    def fill(self, key: tuple[str, ...], values: dict[str, str]) -> str:
        made = dict.fromkeys(key, "i") | values | {name: _OTHERS[name] for name in key if name in _OTHERS}
        for number, name in enumerate(self.names):
            if self.nullable[name]:
                made[name] = f"CASE WHEN i % 5 = {number} THEN NULL ELSE {made[name]} END"
        return (
            f"INSERT INTO {self.relation} ({', '.join(map(quoted, made))}) OVERRIDING SYSTEM VALUE "
            f"SELECT {', '.join(made.values())} FROM generate_series(1, {ROWS}) i"
        )

    def column(self, name: str) -> str:
        kind = self.types[name]
        self.nullable[name] = self.chance(0.6)
        text = f"{quoted(name)} {kind}"
        if kind in _OF_TEXT and self.chance(0.2):
            text += " COLLATE " + self.choice.choice(('"C"', "plain", "public.plain"))
        if self.chance(0.4):
            text += f" DEFAULT {self.choice.choice((_TYPES[kind][1], _TYPES[kind][1], 'NULL'))}"
        if not self.nullable[name]:
            text += " NOT NULL"
        return text

    def parts(self) -> Iterator[str]:
        t, schema = self.relation, quoted(self.schema)
        part = [
            f'{schema}."{name}"'
            for name in (
                "p one",
                "p2",
                "p3",
                "P rest",
                "a_rather_long_name_of_a_partition_that_somebody_gave_to_it_once",
            )
        ]
        if self.partitioned == "hash":
            for number in range(3):
                yield f"CREATE TABLE {part[number]} PARTITION OF {t} FOR VALUES WITH (MODULUS 3, REMAINDER {number})"
        elif self.partitioned == "range":
            yield f"CREATE TABLE {part[0]} PARTITION OF {t} FOR VALUES FROM (MINVALUE) TO (1)"
            yield f"CREATE TABLE {part[1]} PARTITION OF {t} FOR VALUES FROM (1) TO (3)"
            yield f"CREATE TABLE {part[4]} PARTITION OF {t} DEFAULT"
        elif self.partitioned:
            yield f"CREATE TABLE {part[0]} PARTITION OF {t} FOR VALUES IN (0)"
            if self.partitioned == "levels":
                yield f'CREATE TABLE {part[1]} PARTITION OF {t} FOR VALUES IN (1, 2) PARTITION BY RANGE ("Key 1")'
                yield f"CREATE TABLE {part[2]} PARTITION OF {part[1]} FOR VALUES FROM (0) TO (20)"
                yield f"CREATE TABLE {part[4]} PARTITION OF {part[1]} DEFAULT"
            elif self.partitioned == "order":
                yield f"CREATE TABLE {part[1]} (x1 int, LIKE {t} INCLUDING GENERATED, x2 text)"
                yield f"ALTER TABLE {part[1]} DROP COLUMN x1, DROP COLUMN x2"
                for name in self.names:
                    yield from _made_again(part[1], name)
                yield f"ALTER TABLE {t} ATTACH PARTITION {part[1]} FOR VALUES IN (1, 2)"
            yield f"CREATE TABLE {part[3]} PARTITION OF {t} DEFAULT"

    def options(self) -> Iterator[str]:
        t, schema = self.relation, quoted(self.schema)
        parts = [f'{schema}."{name}"' for name in ("p one", "p2", "P rest")] if self.partitioned else []
        also = ', region, "Key 1"' if self.partitioned else ""
        yield f"CREATE INDEX ON {t} (other)"
        yield f"CREATE INDEX together ON {t} (other{''.join(', ' + quoted(n) for n in self.names)})"
        yield f"CREATE STATISTICS {schema}.many ON other{''.join(', ' + quoted(n) for n in self.names)} FROM {t}"
        yield f"CREATE TRIGGER any_update BEFORE INSERT OR UPDATE ON {t} FOR EACH ROW EXECUTE FUNCTION public.pass()"
        yield f"CREATE TRIGGER a_statement AFTER UPDATE ON {t} EXECUTE FUNCTION public.pass()"
        yield (
            f"CREATE CONSTRAINT TRIGGER late AFTER INSERT OR UPDATE ON {t} DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION public.pass()"
        )
        yield f"ALTER TABLE {t} ADD CONSTRAINT of_region FOREIGN KEY (region) REFERENCES public.regions DEFERRABLE"
        yield (
            f"CREATE TABLE public.refers (region int, k bigint); "
            f"ALTER TABLE public.refers ADD FOREIGN KEY (k) REFERENCES {t}"
        )
        yield f"CREATE PUBLICATION everything FOR TABLE {t}"
        yield f"GRANT SELECT, UPDATE ON {t} TO pg_monitor WITH GRANT OPTION"
        yield f"COMMENT ON TABLE {t} IS 'it''s a table'"
        yield f"ALTER TABLE {t} ENABLE ROW LEVEL SECURITY; CREATE POLICY all_of_it ON {t} USING (other > 0)"
        yield f"CREATE VIEW public.of_others AS SELECT other, note FROM {t}"
        yield f"CREATE RULE nothing AS ON DELETE TO {t} WHERE false DO ALSO NOTHING"
        yield f"ALTER TABLE {t} SET (toast_tuple_target = 256)"
        yield f"ALTER TABLE {t} REPLICA IDENTITY FULL"
        for n, name in enumerate(self.names):
            c, kind = quoted(name), self.types[name]
            constant = _TYPES[kind][1]
            text = f"{c}::text"
            i = f"of {n}"
            yield f'CREATE INDEX "by {i}" ON {t} ({c})'
            yield f'CREATE INDEX "desc {i}" ON {t} ({c} DESC NULLS LAST, other) INCLUDE (note)'
            yield f'CREATE INDEX "hash {i}" ON {t} USING hash ({c})'
            yield f'CREATE INDEX "brin {i}" ON {t} USING brin ({c}) WITH (pages_per_range=8)'
            yield f'CREATE INDEX "gin {i}" ON {t} USING gin ({c}) WITH (fastupdate=off)'
            yield f'CREATE INDEX "gist {i}" ON {t} USING gist ({c})'
            yield f'CREATE INDEX "partial {i}" ON {t} (other) WHERE {c} IS NOT NULL'
            yield f'CREATE INDEX "including {i}" ON {t} (note) INCLUDE ({c})'
            yield f'CREATE INDEX "expression {i}" ON {t} (public.folded({c}), other) WITH (fillfactor=60)'
            yield f'CREATE INDEX "pattern {i}" ON {t} ({c} text_pattern_ops)'
            yield f'CREATE INDEX "collated {i}" ON {t} ({c} COLLATE "C" DESC)'
            yield (
                f'CREATE INDEX "stat {i}" ON {t} (lower({c})); '
                f'ALTER INDEX {schema}."stat {i}" ALTER COLUMN 1 SET STATISTICS 400'
            )
            yield f'CREATE UNIQUE INDEX "unique {i}" ON {t} ({c}{also})'
            yield f'!CREATE UNIQUE INDEX "upper unique {i}" ON {t} ({c}{also}) WHERE {c} IS NOT NULL'
            yield f'!CREATE UNIQUE INDEX "no nulls {i}" ON {t} ({c}{also or ", note"}) NULLS NOT DISTINCT'
            yield f'!CREATE UNIQUE INDEX "key with {i}" ON {t} (note{also}) INCLUDE ({c})'
            yield f'!CREATE UNIQUE INDEX "key where {i}" ON {t} (note{also}) WHERE {c} IS NOT NULL'
            yield f'ALTER TABLE {t} ADD CONSTRAINT "once {i}" UNIQUE ({c}{also})'
            yield (
                f'ALTER TABLE {t} ADD CONSTRAINT "later once {i}" UNIQUE ({c}{also or ", other"}) INCLUDE (note) '
                "DEFERRABLE INITIALLY DEFERRED; "
                f"COMMENT ON CONSTRAINT \"later once {i}\" ON {t} IS 'later'"
            )
            yield f'CREATE INDEX "told {i}" ON {t} ({c}, note); COMMENT ON INDEX {schema}."told {i}" IS \'of it\''
            yield f'CREATE INDEX "cluster {i}" ON {t} ({c}); ALTER TABLE {t} CLUSTER ON "cluster {i}"'
            yield (
                f'!CREATE UNIQUE INDEX "identity {i}" ON {t} ({c}{also}); '
                f'ALTER TABLE {t} REPLICA IDENTITY USING INDEX "identity {i}"'
            )
            yield f"ALTER TABLE {t} ADD CONSTRAINT \"check {i}\" CHECK ({text} <> 'never')"
            yield f"ALTER TABLE {t} ADD CONSTRAINT \"check later {i}\" CHECK ({text} <> 'never') NOT VALID"
            yield f"ALTER TABLE {t} ADD CONSTRAINT \"check here {i}\" CHECK ({text} <> 'never') NO INHERIT"
            yield f"ALTER TABLE {t} ADD CONSTRAINT \"not enforced {i}\" CHECK ({text} <> 'never') NOT ENFORCED"
            yield f'ALTER TABLE {t} ADD CONSTRAINT "there {i}" CHECK ({c} IS NOT NULL OR other > 0)'
            yield f'!ALTER TABLE {t} ADD CONSTRAINT "must {i}" CHECK ({c} IS NOT NULL) NOT VALID'
            yield f'ALTER TABLE {t} ADD CONSTRAINT "composite {i}" CHECK (({text}, other) IS DISTINCT FROM (NULL, -1))'
            yield (
                f'ALTER TABLE {t} ADD CONSTRAINT "needs {i}" NOT NULL {c}; '
                f"COMMENT ON CONSTRAINT \"needs {i}\" ON {t} IS 'needed'"
            )
            yield f'!ALTER TABLE {t} ADD CONSTRAINT "needs later {i}" NOT NULL {c} NOT VALID'
            yield f'ALTER TABLE {t} ADD CONSTRAINT "needs here {i}" NOT NULL {c} NO INHERIT'
            yield f'!ALTER TABLE {t} ADD CONSTRAINT "self {i}" FOREIGN KEY ({c}) REFERENCES {t} ({c})'
            yield f'!ALTER TABLE {t} ADD CONSTRAINT "of all {i}" FOREIGN KEY ({c}) REFERENCES public.regions NOT VALID'
            yield f'!ALTER TABLE {t} ADD CONSTRAINT "excluded {i}" EXCLUDE USING btree ({c} WITH =)'
            yield f"COMMENT ON COLUMN {t}.{c} IS 'what it''s for'"
            yield f"GRANT SELECT ({c}), UPDATE ({c}) ON {t} TO pg_monitor WITH GRANT OPTION"
            yield f"GRANT SELECT ({c}) ON {t} TO PUBLIC"
            yield f"ALTER TABLE {t} ALTER {c} SET STORAGE EXTERNAL"
            yield f"ALTER TABLE {t} ALTER {c} SET STORAGE PLAIN"
            yield f"ALTER TABLE {t} ALTER {c} SET COMPRESSION pglz"
            yield f"ALTER TABLE {t} ALTER {c} SET STATISTICS 0"
            yield f"ALTER TABLE {t} ALTER {c} SET STATISTICS 300"
            yield f"ALTER TABLE {t} ALTER {c} SET (n_distinct=-0.5, n_distinct_inherited=3)"
            yield (
                f'CREATE STATISTICS {schema}."stats {i}" (ndistinct) ON {c}, other FROM {t}; '
                f'ALTER STATISTICS {schema}."stats {i}" SET STATISTICS 70; '
                f"COMMENT ON STATISTICS {schema}.\"stats {i}\" IS 's'"
            )
            yield f'CREATE STATISTICS {schema}."expr {i}" ON ({text}) FROM {t}'
            yield f'!CREATE TRIGGER "of {i}" BEFORE UPDATE OF {c} ON {t} FOR EACH ROW EXECUTE FUNCTION public.pass()'
            yield (
                f'!CREATE TRIGGER "when {i}" AFTER UPDATE ON {t} FOR EACH ROW '
                f"WHEN (OLD.{c}::text IS DISTINCT FROM NEW.{c}::text) EXECUTE FUNCTION public.pass()"
            )
            yield f'!CREATE VIEW public."view {i}" AS SELECT {c} FROM {t}'
            yield f'!CREATE POLICY "policy {i}" ON {t} USING ({c} IS NOT NULL)'
            yield f'!ALTER TABLE {t} ADD "made {i}" text GENERATED ALWAYS AS (public.folded({c})) STORED'
            yield f'!ALTER TABLE {t} ADD "virtual {i}" boolean GENERATED ALWAYS AS ({c} IS NULL) VIRTUAL'
            yield f'!CREATE PUBLICATION "pub {i}" FOR TABLE {t} ("Key 1", region, {c})'
            yield f'!CREATE PUBLICATION "pub where {i}" FOR TABLE {t} WHERE ({c} IS NOT NULL) WITH (publish = insert)'
            yield f'CREATE SEQUENCE {schema}."owned {i}" OWNED BY {t}.{c}'
            yield (
                f'CREATE SEQUENCE {schema}."serial {i}" OWNED BY {t}.{c}; '
                f"ALTER TABLE {t} ALTER {c} SET DEFAULT nextval('{schema}.\"serial {i}\"')"
            )
            for number, part in enumerate(parts):
                p = f"{i} in {number}"
                yield f"ALTER TABLE {part} ALTER {c} SET DEFAULT {constant}"
                yield f"ALTER TABLE {part} ALTER {c} DROP DEFAULT"
                yield f"ALTER TABLE {part} ALTER {c} SET NOT NULL"
                yield f'ALTER TABLE {part} ADD CONSTRAINT "needs {p}" NOT NULL {c}'
                yield f'CREATE INDEX "only {p}" ON {part} ({c}, note)'
                yield f'!CREATE UNIQUE INDEX "unique {p}" ON {part} ({c}{also})'
                yield f'!CREATE UNIQUE INDEX "alone unique {p}" ON {part} ({c})'
                yield f'CREATE INDEX "partial {p}" ON {part} (other) WHERE {c} IS NULL'
                yield f'!ALTER TABLE {part} ADD CONSTRAINT "own once {p}" UNIQUE ({c}, note)'
                yield f"!ALTER TABLE {part} ADD CONSTRAINT \"own check {p}\" CHECK ({text} <> 'never')"
                yield f"!ALTER TABLE {part} ALTER {c} SET STATISTICS 9"
                yield f"!COMMENT ON COLUMN {part}.{c} IS 'of the part'"
                yield f'!CREATE TRIGGER "own {p}" BEFORE UPDATE ON {part} FOR EACH ROW EXECUTE FUNCTION public.pass()'
