"""What is read from the text of a statement, and that no value is left in what is shown of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphapulse_encryption.migration.insight.statements import (
    Reader,
    Statement,
    TableName,
    Use,
)

USERS = TableName("public", "users")
TRADES = TableName("public", "trades")
ORDERS = TableName("sales", "Order Lines")
NAMES = {"users", "trades", "email", "email_search", "Order Lines", "sales", "public", "id", "The Note"}
READER = Reader([USERS, TRADES, ORDERS], NAMES)
CANARY = "canary"


def read(text: str) -> Statement:
    found = READER.read(text)
    assert found is not None, text
    return found


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("SELECT id\n FROM  users WHERE email = $1", "SELECT id FROM users WHERE email = $1"),
        ("select id from users where x->>$1 = $12::text", "select id from users where x->>$1 = $12::text"),
        ("select id from users where id in ($1 /*, ... */)", "select id from users where id in ($1 )"),
        ("/* canary */ select id from users -- canary 'x'\n where id=$1", "select id from users where id=$1"),
        ("select id from users where id=$1 /*trace='canary'*/", "select id from users where id=$1"),
        ("select id /*+ canary */ from users", "select id from users"),
        ('select "The Note" from sales."Order Lines"', 'select "The Note" from sales."Order Lines"'),
        ("update users set email = $1 where ab @> $2", "update users set email = $1 where ab @> $2"),
        ("(select größe from users)", "(select größe from users)"),
    ],
)  # fmt: skip
def test_what_is_shown(text: str, shown: str) -> None:
    assert read(text).text == shown


@pytest.mark.parametrize(
    "text",
    [
        "select id from users where email = 'canary'",
        "select id from users where email = E'a\\'canary'",
        "select id from users where email = 'a\\' or email = canary'",
        "select id from users where email = $$canary$$",
        "select id from users where email = $1$$canary$$",
        "select id from users where email = $tag$canary$tag$ and id = 1",
        "select id from users where a$canary$b = $1",
        "select id from users where email = $é$canary$é$",
        "select id from users where email = U&'canary' and \"a'b\" = $1",
        "select id from users where email = 'a' -- canary",
        "select id from users where email = '/*' || 'canary' || '*/'",
        "select id from users where email = N'canary' or b = B'1010' or x = X'1FF'",
        *(f"select id from users limit {number}" for number in ("4711", "47.11e3", ".5", "0x4711", "47_11")),
        "select 4711::int from users",
        "select id from users /* a /* canary */ canary' */ where id=$1",
        "select id from users /* never ends, canary",
        'select "email" as "canary" from "users" "t0"',
        'select "cana""ry" from users',
        'select "email""canary" from users',
        'select ""email"canary" from users',
        'select U&"canary" from users',
        # Utility statements, whatever is in them: whether the server takes constants out depends on its version.
        "create table x as select * from users where email = $1",
        "explain select * from users where email = 'canary'",
        "prepare x as select * from users",
        "copy users to stdout",
        "copy (select * from users where email = 'canary') to stdout",
        "/* canary */ declare c cursor for select * from users",
    ],
)  # fmt: skip
def test_what_may_hold_a_value_is_told_by_kind_and_tables_alone(text: str) -> None:
    found = read(text)
    assert found.text is None
    assert found.tables == {USERS}
    assert found.kind in {"SELECT", "CREATE", "EXPLAIN", "PREPARE", "COPY", "DECLARE"}
    assert CANARY not in repr(found.tables)


@pytest.mark.parametrize(
    "text",
    [
        "set local app.user = canary",
        "vacuum users",
        "call users(1)",
        "explain select 1",
        "select 1",
        "select id from others",
        "with users as (select $1 as email) select * from users where email = $2",
        "select id from sales.users",
        'select id from "Users"',
        "copy sales.users to stdout",
        'copy "Users" to stdout',
        "",
        "select (((",
        "x" * 200_000,
        # Of the many ways to cut this into comments, one is looked at.
        "-" * 1_000 + "\n1",
    ],
)
def test_what_is_left_out(text: str) -> None:
    assert READER.read(text) is None


# No quotation mark and no asterisk alone: they end a name or a comment early, and what follows is no value then.
PIECES = [
    *("users", "email", '"email"', "$1", "=", " ", "\n", ",", "(", ")", "::text", "select", "from"),
    *("where", "and", "-", "/"),
    *("'canary'", "E'\\'canary'", "$$canary$$", "$t$canary$t$", "U&'canary'", "'", "$t$", "$$", "$", "\\"),
    *("--canary\n", "-- canary ' \r", "/*canary*/", "/*/*canary*/canary*/", "/*+ canary */", "/*", "*/", "--"),
    *('"canary"', '"a""canary"', " 4711", " 47.11e3", " 0x4711", " 4711_", " 4_711"),
]  # fmt: skip


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=14))
def test_no_order_of_pieces_shows_a_value(pieces: list[str]) -> None:
    """The server takes the longest token first, and so nothing here may end earlier than there."""
    found = READER.read("select id from users where id = $1 " + "".join(pieces))
    if found is not None and found.text is not None:
        assert CANARY not in found.text and "4711" not in found.text


def test_whose_columns() -> None:
    alone = read("select EMAIL, \"Email\" from users where id = $1")  # fmt: skip
    assert alone.columns == {(USERS, "email"), (USERS, "Email"), (USERS, "id")}
    joined = read("select u.email, price from users u join trades t on t.user_id = u.id where t.fee > $1")
    assert joined.tables == {USERS, TRADES}
    assert joined.columns == {(USERS, "email"), (USERS, "id"), (TRADES, "user_id"), (TRADES, "fee")}
    assert joined.uses == {Use(TRADES, "fee", "range")}
    # One alias for two tables, in different queries: nobody knows whose it is.
    twice = read("select (select x.a from users x) from trades x where x.b = $1")
    assert twice.columns == frozenset() and twice.tables == {USERS, TRADES}


@pytest.mark.parametrize(
    ("text", "uses", "only"),
    [
        ("select id from users where email = $1", {("email", "equality")}, {"email"}),
        ("select id from users where $1 = email::text", {("email", "equality")}, set()),
        ("delete from users where (id = any($1)) and a=1", {("id", "equality"), ("a", "equality")}, {"id", "a"}),
        ("select id from users where email = $1 or id = $2", {("email", "equality"), ("id", "equality")}, set()),
        ("select id from users where email like $1 order by id desc", {("email", "pattern"), ("id", "order")}, set()),
        ("select id from users where email between $1 and $2", {("email", "range")}, set()),
        ("select id from users where lower(email) = $1", set(), set()),
        ("select id from users where email = id", set(), set()),
        ("select email from users", set(), set()),
        ("update users set email = $1 where id = $2", {("id", "equality")}, {"id"}),
        ("delete from users where email = $1", {("email", "equality")}, {"email"}),
    ],
)  # fmt: skip
def test_what_decides(text: str, uses: set[tuple[str, str]], only: set[str]) -> None:
    found = read(text)
    assert {(use.column, use.how) for use in found.uses} == uses
    if only or "or" in text:
        assert found.only_conditions == only


def test_what_the_grammar_does_not_know() -> None:
    """Only the tables are told, from where they stand."""
    found = read("select from sales.\"Order Lines\" , users frobnicate by ( canary")  # fmt: skip
    assert found.tables == {ORDERS, USERS}
    assert found.columns == frozenset() and found.uses == frozenset()
