"""The text forms that the manual shows are those that the engine encrypts."""

from __future__ import annotations

import re

from psycopg.sql import SQL, Literal

from alphapulse_encryption.migration.rows.verify import verify_range
from alphapulse_encryption_tests.docs.pages import DOCS
from alphapulse_encryption_tests.migration import support

# What the page says of types that the table leaves out.
_SAID = [
    ("char(8)", "ab      ", "ab"),
    *((type_, "Ab  ", "Ab  ") for type_ in ("text", "varchar(8)", "citext")),
    ("json", '{"b":1,  "a":2}', '{"b":1,  "a":2}'),
    ("date", "2024-01-02", "2024-01-02"),
    ("numeric", "1.50", "1.50"),
    ("bit(4)", "1010", "1010"),
]


def test_each_is_what_is_encrypted(database_url: str) -> None:
    page = (
        (DOCS / "catalogue.md")
        .read_text(encoding="utf-8")
        .partition("## Text forms")[2]
        .partition("\n## ")[0]
    )
    rows = [*re.findall(r"^\| `(.+)` \| `(.+)` \| `(.+)` \|$", page, re.MULTILINE), *_SAID]
    assert len(rows) == page.count("\n| ") - 1 + len(_SAID)
    names = [f"v{number}" for number in range(len(rows))]
    entry = support.table("forms", *names)
    support.run(database_url, "CREATE EXTENSION citext")
    columns = ", ".join(f"{name} {type_}" for name, (type_, _, _) in zip(names, rows, strict=True))
    support.run(database_url, f"CREATE TABLE forms (id int PRIMARY KEY, {columns})")
    values = SQL(", ").join(Literal(sent) for _, sent, _ in rows)
    support.run(database_url, SQL("SET lc_monetary TO 'C'; INSERT INTO forms VALUES (1, {})").format(values))
    support.encrypt(database_url, entry)
    for column, (type_, sent, form) in zip(entry.columns, rows, strict=True):
        (envelope,) = support.texts(database_url, entry, column.encrypted).values()
        assert (type_, sent, support.opened(str(envelope), column.context)) == (type_, sent, form)


def test_another_form_is_mismatched(database_url: str) -> None:
    entry = support.table("hosts", "address")
    support.run(database_url, "CREATE TABLE hosts (id int PRIMARY KEY, address inet)")
    support.add_columns(database_url, entry)
    for number, form in ((1, "10.1.2.3"), (2, "10.1.2.3/32")):
        envelope = support.seal(form, "test_context")
        support.run(database_url, "INSERT INTO hosts VALUES (%s, '10.1.2.3', %s)", number, envelope)
    (wrong,) = verify_range(support.target(database_url), entry, 0).offenders
    assert (wrong.problem, tuple(wrong.key)) == ("mismatched", ("1",))
