"""The statements of the data path, by name. Identifiers are always quoted through :mod:`psycopg.sql`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg.sql import SQL, Composable, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.migration.postgres.database import Verbatim
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.names import GUARD_COLUMNS

# Triggers of one kind fire in order of their names: the guard has to see what the application's own triggers
# made of the row, so it comes last.
GUARD_INSERT = "zzz_encryption_guard_insert"
GUARD_UPDATE = "zzz_encryption_guard_update"
# One for each column, told by its number; between the application's triggers and the guard itself.
GUARD_MENTION = "zzz_encryption_guard_mention_"
# A regular expression for the names of all of them.
GUARDS = f"^({GUARD_INSERT}|{GUARD_UPDATE}|{GUARD_COLUMNS}|{GUARD_MENTION}[0-9]+)$"
# The condition that every row meets.
EVERYTHING = SQL("{}").format(SQL("true"))


def verbatim(text: str) -> Composed:
    """A type, an expression or a definition as the server printed it: quoted and qualified already."""
    return Composed([Verbatim(text)])


def key_list(definition: TableDefinition, alias: LiteralString = "t") -> Composed:
    """``t.a, t.b``: the key's columns."""
    return SQL(", ").join(Identifier(alias, key.name) for key in definition.key)


def key_text(definition: TableDefinition) -> Composed:
    """``t.a::text, t.b::text``: the key in the form the bookkeeping keeps."""
    return SQL(", ").join(SQL("{}::text").format(Identifier("t", key.name)) for key in definition.key)


def compare_key(definition: TableDefinition, operator: LiteralString, alias: LiteralString = "t") -> Composed:
    """``(t.a, t.b) > (%s::bigint, %s::text)``: a comparison the primary key's index can serve."""
    return SQL("ROW({columns}) OPERATOR({schema}.{operator}) ROW({values})").format(
        columns=key_list(definition, alias),
        schema=Identifier(definition.key_operators),
        operator=SQL(operator),
        values=SQL(", ").join(SQL("%s::{}").format(SQL(_type(key.type))) for key in definition.key),
    )


def _type(name: str) -> LiteralString:
    # format_type() has quoted it already; there is no other way to write a type with its modifiers.
    return name


def _of_rows(definition: TableDefinition, template: LiteralString, **parts: Composable) -> Composed:
    """A statement on the table's rows ``t``.

    ``{table}``, ``{key}``, ``{order}`` and ``{same_key}`` (as a batch's row ``d``) are its own; ``{batch}`` takes the
    first and the last key of a batch.
    """
    return SQL(template).format(
        table=definition.identifier,
        key=key_text(definition),
        order=key_list(definition),
        same_key=_same_key(definition),
        batch=_batch(definition),
        **parts,
    )


def _batch(definition: TableDefinition, alias: LiteralString = "t") -> Composed:
    first, last = (compare_key(definition, operator, alias) for operator in (">=", "<="))
    return SQL("{} AND {}").format(first, last)


def within(
    definition: TableDefinition, lower: Sequence[str] | None, upper: Sequence[str] | None
) -> tuple[Composed, list[str]]:
    """The condition ``lower < key <= upper`` and its parameters; None leaves a side open."""
    sides: list[tuple[LiteralString, Sequence[str] | None]] = [(">", lower), ("<=", upper)]
    bounds = [(compare_key(definition, operator), key) for operator, key in sides if key is not None]
    conditions = [condition for condition, _ in bounds] or [EVERYTHING]
    return SQL(" AND ").join(conditions), [part for _, key in bounds for part in key]


def has_value(column: Composable) -> Composed:
    """Whether a column is not NULL. ``IS NOT NULL`` is false of a composite value with one field that is NULL."""
    # For every other type PostgreSQL makes the same of it.
    return SQL("{} IS DISTINCT FROM NULL").format(column)


def column_pending(column: Column, *alias: str) -> Composed:
    """A value is pending when its plaintext is there and its ciphertext, or the token it needs, is not."""
    missing = SQL("{} IS NULL").format(Identifier(*alias, column.encrypted))
    if column.searchable:
        missing = SQL("({} OR {} IS NULL)").format(missing, Identifier(*alias, column.search))
    return SQL("({} AND {})").format(has_value(Identifier(*alias, column.name)), missing)


def row_pending(definition: TableDefinition) -> Composed:
    """A row is pending when one of its values is."""
    return wanted(pending_cells(definition))


# What is to be done of a row: of each column when its value is wanted, and what is read of it then.
Cells = list[tuple[Composed, Composable]]


def wanted(cells: Cells) -> Composed:
    """A row is wanted when one of its values is."""
    conditions: list[Composable] = [condition for condition, _ in cells]
    return SQL("({})").format(SQL(" OR ").join(conditions or [SQL("false")]))


def select_wanted(definition: TableDefinition, condition: Composed, cells: Cells) -> Composed:
    """A batch of wanted rows in key order: key, xmin, and of each column what is read, where it is wanted."""
    return _of_rows(
        definition,
        "SELECT {key}, t.xmin::text, {values} FROM {table} t WHERE {condition} AND {wanted} "
        "ORDER BY {order} LIMIT %s",
        values=SQL(", ").join(SQL("CASE WHEN {} THEN {} END").format(*cell) for cell in cells),
        condition=condition,
        wanted=wanted(cells),
    )


def pending_cells(definition: TableDefinition) -> Cells:
    """Pending values, read as plaintext."""
    return [
        (column_pending(column), SQL("{}::text").format(Identifier("t", column.name)))
        for column in definition.plaintext_columns
    ]


def row_bytes(definition: TableDefinition) -> Composed:
    """About how many bytes of text the catalogued columns of a row have, of which large values count exactly."""
    names = [n for c in definition.table.columns for n in (c.name, *c.derived) if n in definition.columns]
    # Of a text, octet_length() looks at the pointer to a value that is kept out of line, and not at the value.
    size = SQL("coalesce(CASE WHEN {0} < 1000 THEN {0} ELSE octet_length({1}::text) END, 0)::bigint")
    columns = [Identifier("t", name) for name in names]
    return SQL(" + ").join(size.format(SQL("pg_catalog.pg_column_size({})").format(c), c) for c in columns)


def count_within(definition: TableDefinition, condition: Composed, wanted: Composed) -> Composed:
    """Of a batch's rows, how many there are before their bytes are more than allowed.

    Parameters: the condition's, how many rows to look at, and the bytes.
    """
    return _of_rows(
        definition,
        "SELECT count(*) FROM (SELECT sum(bytes) OVER (ROWS UNBOUNDED PRECEDING) AS total "
        "FROM (SELECT {bytes} AS bytes FROM {table} t WHERE {condition} AND {wanted} ORDER BY {order} LIMIT %s) "
        "AS sizes) AS totals WHERE total <= %s",
        bytes=row_bytes(definition),
        condition=condition,
        wanted=wanted,
    )


def select_first_key(definition: TableDefinition, condition: Composed, wanted: Composed) -> Composed:
    """The key of the first row that is wanted, whose values may be unreadable."""
    return _of_rows(
        definition,
        "SELECT {key} FROM {table} t WHERE {condition} AND {wanted} ORDER BY {order} LIMIT 1",
        condition=condition,
        wanted=wanted,
    )


def outdated_cells(definition: TableDefinition, endings: Mapping[str, str]) -> Cells:
    """Values whose ciphertext may be of another key version than the current one, read as ciphertext.

    Told by how it ends; another program's spelling has to be looked at. Pending values are not outdated: they are
    encrypted again from their plaintext.

    Args:
        endings: by context, how ciphertexts of the current version end.
    """
    cells: Cells = []
    for column in definition.encrypted_columns:
        encrypted, ending = Identifier("t", column.encrypted), endings[column.context]
        # "C" compares bytes; what a text is like under another collation does not matter here.
        outdated = SQL('{} IS NOT NULL AND pg_catalog.right({}, {}) COLLATE "C" <> {}').format(
            encrypted, encrypted, Literal(len(ending)), Literal(ending)
        )
        pending = column_pending(column) if column in definition.plaintext_columns else SQL("false")
        cells.append((SQL("({} AND NOT {})").format(outdated, pending), SQL("{}::text").format(encrypted)))
    return cells


def select_by_token(definition: TableDefinition, column: Column) -> Composed:
    """Keys of the rows that carry a search token (the parameter)."""
    return _of_rows(
        definition,
        "SELECT {key} FROM {table} t WHERE {search} = %s ORDER BY {order} LIMIT 2",
        search=Identifier("t", column.search),
    )


@dataclass(frozen=True)
class Changes:
    """What a batch makes of its rows.

    Args:
        arrays: how many arrays there are beside key and xmin, called by :func:`new_value`.
        assignments: columns of the table, with what becomes of them.
        stored: what is true of a row ``t`` of the table and ``d`` of the batch afterwards.
        pending: what is true where it is not stored because the guard cleared it: a trigger changed the plaintext. None
            where the guard does not.
        returning: what to tell of each row behind its key; nothing, not even that, where it is empty.
    """

    arrays: int
    assignments: Sequence[tuple[str, Composable]]
    stored: Composed
    pending: Composed | None = None
    returning: Sequence[Composable] = ()

    @property
    def columns(self) -> list[str]:
        return [name for name, _ in self.assignments]


def _same_text(name: str, value: Composable) -> Composed:
    text: LiteralString = '{}::text COLLATE "C" IS NOT DISTINCT FROM ({})::text COLLATE "C"'
    return SQL(text).format(Identifier("t", name), value)


def new_sides(
    definition: TableDefinition, columns: Sequence[Column], *, keep_adopted: bool = False
) -> Changes:
    """Ciphertexts and tokens of these columns, where there are new ones.

    Args:
        keep_adopted: leave what is there of the application's own as it is.
    """
    derived = [(name, column.adopt and keep_adopted) for column in columns for name in column.derived]
    names = [name for name, _ in derived]
    values = [
        SQL("coalesce({1}, {0})" if kept else "coalesce({0}, {1})").format(
            new_value(number), Identifier("t", name)
        )
        for number, (name, kept) in enumerate(derived)
    ]
    same = dict(zip(names, map(_same_text, names, values), strict=True))
    stored = [SQL("({})").format(SQL(" AND ").join(same[name] for name in c.derived)) for c in columns]
    pending = [
        SQL("({} OR {})").format(kept, column_pending(column, "t"))
        if column in definition.plaintext_columns
        else kept
        for column, kept in zip(columns, stored, strict=True)
    ]
    assignments = list(zip(names, values, strict=True))
    return Changes(len(names), assignments, SQL(" AND ").join(stored), SQL(" AND ").join(pending))


def cleared_sides(columns: Sequence[Column]) -> Changes:
    """No ciphertexts and tokens: takes an array for each encrypted column, NULL where its are kept.

    Tokens that are adopted stay.
    """
    assignments = [
        (name, SQL("CASE WHEN {} IS NULL THEN {} END").format(new_value(number), Identifier("t", name)))
        for number, column in enumerate(columns)
        for name in ([column.encrypted] if column.adopt else column.derived)
    ]
    stored = SQL(" AND ").join(_same_text(*assignment) for assignment in assignments)
    return Changes(len(columns), assignments, stored)


def new_value(number: int) -> Identifier:
    """In a statement of :func:`update_rows`, the value of an array in the row's place."""
    return Identifier("d", f"c{number}")


def update_rows(
    definition: TableDefinition,
    changes: Changes,
    *,
    skip_locked: bool = False,
    condition: Composed = EVERYTHING,
) -> Composed:
    """One UPDATE per row for all its columns, of rows nobody has changed since they were read.

    Parameters: one ``text[]`` per key column, one of xmin, the arrays, then the batch's first and last key. These
    bounds keep any plan within the batch; ``xmin`` is the compare-and-swap: another transaction's write gives the row
    another one. The application's search path may be set (``database.AS_APPLICATION``).

    Args:
        skip_locked: leave rows alone that another transaction holds; takes the two keys twice.
        condition: what has to be so besides, or no row is written; its parameters are the last.
    """
    told = SQL("RETURNING {}, {}").format(key_text(definition), SQL(", ").join(changes.returning))
    return _of_rows(
        definition,
        "UPDATE {table} t SET {assignments} FROM {rows} WHERE {batch} AND {same_key} AND t.xmin = d.x {free} "
        "AND {condition} {told}",
        assignments=SQL(", ").join(
            SQL("{} = {}").format(Identifier(name), value) for name, value in changes.assignments
        ),
        rows=_rows(definition, changes.arrays),
        free=_not_locked(definition) if skip_locked else SQL(""),
        condition=condition,
        told=told if changes.returning else SQL(""),
    )


def keys_not_stored(definition: TableDefinition, changes: Changes) -> Composed:
    """Of a batch, the keys of rows that are not as they were to be, and whether the guard cleared what is not.

    Takes what :func:`update_rows` takes.
    """
    return _of_rows(
        definition,
        "SELECT {key}, ({pending}) IS TRUE FROM {table} t, {rows} "
        "WHERE {batch} AND {same_key} AND ({stored}) IS NOT TRUE",
        rows=_rows(definition, changes.arrays),
        stored=changes.stored,
        pending=changes.pending or SQL("false"),
    )


def keys_unchanged(definition: TableDefinition) -> Composed:
    """Of rows that were read, the keys of those that are as they were; takes keys, xmin and bounds."""
    return _of_rows(
        definition,
        "SELECT {key} FROM {table} t, {rows} WHERE {batch} AND {same_key} AND t.xmin = d.x",
        rows=_rows(definition, 0),
    )


def _rows(definition: TableDefinition, arrays: int) -> Composed:
    names = [f"k{number}" for number in range(len(definition.key))]
    unnest: LiteralString = "pg_catalog.unnest(%s::text[]) AS {}"
    columns: list[Composable] = [SQL(unnest).format(Identifier(name)) for name in names]
    columns.append(SQL("pg_catalog.unnest(%s::text[]::xid[]) AS {}").format(Identifier("x")))
    columns += [SQL(unnest).format(Identifier(f"c{n}")) for n in range(arrays)]
    return SQL("(SELECT {}) AS d").format(SQL(", ").join(columns))


def _not_locked(definition: TableDefinition) -> Composed:
    return _of_rows(
        definition,
        "AND ({order}) IN (SELECT {others} FROM {table} o WHERE {bounds} FOR NO KEY UPDATE SKIP LOCKED)",
        others=key_list(definition, "o"),
        bounds=_batch(definition, "o"),
    )


def _same_key(definition: TableDefinition) -> Composed:
    """``t.a = d.k0::bigint AND t.b = d.k1::text``, by the key's own operators.

    The cast is made here and not of the whole array, because ``unnest`` would take an array of arrays apart
    down to its elements.
    """
    return SQL(" AND ").join(
        SQL("{} OPERATOR({}.=) {}::{}").format(
            Identifier("t", key.name),
            Identifier(definition.key_operators),
            Identifier("d", f"k{number}"),
            SQL(_type(key.type)),
        )
        for number, key in enumerate(definition.key)
    )


def keys_written_now(definition: TableDefinition) -> Composed:
    """The keys between two bounds that this very transaction has written."""
    return _of_rows(
        definition, "SELECT {key} FROM {table} t WHERE {batch} AND t.xmin = pg_current_xact_id()::xid"
    )


def any_pending(definition: TableDefinition, condition: Composed = EVERYTHING) -> Composed:
    """Whether any row of a part of the table is pending."""
    return any_of(definition, condition, row_pending(definition))


def any_of(definition: TableDefinition, condition: Composed, wanted: Composed) -> Composed:
    """Whether any row of a part of the table is wanted."""
    return SQL("SELECT EXISTS (SELECT FROM {} t WHERE {} AND {})").format(
        definition.identifier, condition, wanted
    )


def select_for_verification(
    definition: TableDefinition,
    condition: Composed,
    columns: Sequence[Column] | None = None,
    *,
    with_version: bool = False,
) -> Composed:
    """A batch in key order: key, then of some columns what :func:`sides` names; None for all.

    Args:
        with_version: have each row's xmin behind its key.
    """
    chosen = definition.table.columns if columns is None else columns
    rows = _select_sides(definition, chosen, with_version=with_version)
    return SQL("{} WHERE {} ORDER BY {} LIMIT %s").format(rows, condition, key_list(definition))


def select_changed(definition: TableDefinition, condition: Composed) -> Composed:
    """The rows changed since a transaction, all columns as in :func:`select_for_verification`, in no order.

    Parameter: the transaction's number, as text.
    """
    sides = _select_sides(definition, definition.table.columns)
    return SQL("{} WHERE {} AND {}").format(sides, _changed_since(), condition)


def count_unchanged(definition: TableDefinition) -> Composed:
    """How many rows there are, and how many of them were not changed since a transaction (the parameter)."""
    return SQL("SELECT count(*), count(*) FILTER (WHERE NOT {}) FROM {} t").format(
        _changed_since(), definition.identifier
    )


def count_pending_unchanged(definition: TableDefinition) -> Composed:
    """How many pending rows were not changed since a transaction (the first parameter), up to a limit (the second)."""
    return SQL("SELECT count(*) FROM (SELECT FROM {} t WHERE {} AND NOT {} LIMIT %s) AS old").format(
        definition.identifier, row_pending(definition), _changed_since()
    )


def _changed_since() -> Composed:
    # age() is a distance modulo 2^32 from the next transaction: in one statement it begins at 0, because nothing is
    # visible that began after it. A row keeps its xmin when it is frozen (PostgreSQL manual, 24.1.5).
    return SQL("(age(t.xmin) BETWEEN 0 AND age(%s::xid8::xid))").format()


def sides(definition: TableDefinition, column: Column) -> tuple[str | None, str, str | None]:
    """Plaintext, ciphertext and token of a column, by name; None for one that it does not have.

    What is not there is not selected: a statement has 1,664 entries at most, a table 1,600 columns.
    """
    plaintext = column.name if column.name in definition.columns else None
    return plaintext, column.encrypted, column.search if column.searchable else None


def _select_sides(
    definition: TableDefinition, columns: Sequence[Column], *, with_version: bool = False
) -> Composed:
    values: list[Composable] = [key_text(definition), *([SQL("t.xmin::text")] if with_version else [])]
    for column in columns:
        there = (name for name in sides(definition, column) if name is not None)
        values += (SQL("{}::text").format(Identifier("t", name)) for name in there)
    return SQL("SELECT {} FROM {} t").format(SQL(", ").join(values), definition.identifier)


def filled_cells(definition: TableDefinition) -> Cells:
    """Columns with any ciphertext or token of ours, of which nothing is read but that."""
    cells: Cells = []
    for column in definition.encrypted_columns:
        ours = () if column.adopt else column.derived
        parts = [SQL("{} IS NOT NULL").format(Identifier("t", name)) for name in ours] or [
            SQL("{}").format(SQL("false"))
        ]
        cells.append((SQL("({})").format(SQL(" OR ").join(parts)), SQL("''")))
    return cells


def unfilled_cells(definition: TableDefinition) -> Cells:
    """Ciphertexts that have no plaintext beside them."""
    cells: Cells = []
    for column in definition.plaintext_columns:
        plaintext, encrypted = Identifier(column.name), Identifier(column.encrypted)
        cells.append(
            (SQL("({} IS NOT DISTINCT FROM NULL AND {} IS NOT NULL)").format(plaintext, encrypted), encrypted)
        )
    return cells
