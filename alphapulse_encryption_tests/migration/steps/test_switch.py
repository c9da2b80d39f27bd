"""Over to the ciphertext and back: what the application may write, and what the columns promise meanwhile."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.tables import SetAside, require_state
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.decrypt import Decrypt, Filling
from alphapulse_encryption.migration.rows.engine import RangeResult
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.migration.steps import switch
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.migration.journey import After

USERS = walk.CATALOGUE.table("users")
ACCOUNTS = walk.CATALOGUE.table("trading_accounts")


def switched(url: str, table: Table) -> SetAside | None:
    return switch_to_ciphertext(walk.target(url), table)


def reverted(url: str, table: Table) -> RangeResult | None:
    return revert_to_plaintext(walk.target(url), table)


def filling(url: str) -> Filling:
    return Filling(Decrypt(walk.target(url), ACCOUNTS), "the step")


def envelope(value: str, context: str) -> str:
    return walk.CIPHER.encrypt(value, context)


def authority(url: str, table: Table) -> str:
    row = walk.query(
        url, "SELECT authority FROM alphapulse_encryption.tables WHERE table_name = %s", table.key
    )
    return str(row[0][0])


def test_it_needs_a_verification_and_nothing_pending(after: After) -> None:
    url = after("encrypted")
    with pytest.raises(RefusedError, match="not verified"):
        switched(url, USERS)
    walk.verify(url, USERS)
    walk.query(url, "UPDATE users SET last_name = 'Pending' WHERE id = 5")
    with pytest.raises(RefusedError, match="pending"):
        switched(url, USERS)
    assert authority(url, USERS) == "plaintext"
    checks = "SELECT count(*) FROM pg_constraint WHERE conname LIKE '%_encryption_%'"
    assert walk.value(url, checks) == 0


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("CREATE UNIQUE INDEX one_phone ON users (phone_number)", "one_phone"),
        ("CREATE UNIQUE INDEX some_mail ON users (email) WHERE email > ''", "some_mail"),
        ("CREATE UNIQUE INDEX both_names ON users (email, first_name)", "both_names"),
        ("ALTER TABLE users ADD CONSTRAINT apart EXCLUDE (lower(email) WITH =) WHERE (id > 100)", "apart"),
    ],
)
def test_uniqueness_that_tokens_cannot_carry_is_refused(sample_url: str, index: str, reason: str) -> None:
    walk.query(sample_url, "UPDATE users SET phone_number = NULL")
    walk.query(sample_url, index)
    walk.encrypt(sample_url, USERS)
    walk.verify(sample_url, USERS)
    with pytest.raises(RefusedError, match=reason):
        switched(sample_url, USERS)
    assert authority(sample_url, USERS) == "plaintext"


def test_the_index_that_carries_uniqueness_has_to_be_there(after: After) -> None:
    url = after("verified")
    walk.query(url, "DROP INDEX idx_user_email_search")
    with pytest.raises(RefusedError, match="idx_user_email_search"):
        switched(url, USERS)


def test_a_domain_that_forbids_null_is_refused(sample_url: str) -> None:
    walk.query(sample_url, "CREATE DOMAIN name_ AS text NOT NULL; CREATE DOMAIN last_ AS name_")
    walk.query(sample_url, "DELETE FROM users WHERE last_name IS NULL")
    walk.query(sample_url, "ALTER TABLE users ALTER last_name TYPE last_")
    walk.encrypt(sample_url, USERS)
    walk.verify(sample_url, USERS)
    with pytest.raises(RefusedError, match="domain"):
        switched(sample_url, USERS)


def test_not_null_becomes_a_check_and_defaults_are_set_aside(after: After) -> None:
    url = after("verified", ACCOUNTS)
    result = switched(url, ACCOUNTS)
    assert result is not None
    assert set(result.not_null) == {"account_number", "balance", "available_balance"}
    assert set(result.defaults) == {"balance", "available_balance"}
    nullable = (
        "SELECT count(*) FROM pg_attribute WHERE attrelid = 'trading_accounts'::regclass "
        "AND attname = ANY(%s) AND NOT attnotnull AND NOT atthasdef"
    )
    assert walk.value(url, nullable, ["account_number", "balance", "available_balance"]) == 3
    valid = "SELECT count(*) FROM pg_constraint WHERE conname LIKE '%%_encryption_present' AND convalidated"
    assert walk.value(url, valid.replace("%%", "%")) == 3
    with pytest.raises(psycopg.errors.CheckViolation):
        walk.query(url, "UPDATE trading_accounts SET balance = NULL, balance_encrypted = NULL")

    again = switched(url, ACCOUNTS)
    assert again is None


def test_ciphertext_alone_is_accepted_and_clears_the_old_plaintext(after: After) -> None:
    url = after("switched")
    walk.query(
        url,
        "UPDATE users SET email_encrypted = %s, email_search = %s WHERE id = 7",
        envelope("new@example.com", "user_pii"),
        search_token(walk.KEYS, "new@example.com", "user_pii"),
    )
    assert walk.value(url, "SELECT email FROM users WHERE id = 7") is None
    walk.query(url, "UPDATE users SET last_name = 'Old App' WHERE id = 8")
    assert walk.value(url, "SELECT last_name_encrypted FROM users WHERE id = 8") is None


def test_a_switch_killed_after_its_checks_is_continued(after: After) -> None:
    url = after("verified", ACCOUNTS)
    with Database(url).session("begin") as connection:
        definition = read_table(connection, ACCOUNTS)
        switch._require_either(connection, definition, ACCOUNTS.columns[0], walk.ACTOR)
    assert switched(url, ACCOUNTS) is not None
    assert authority(url, ACCOUNTS) == "ciphertext"


def test_a_revert_puts_everything_back(sample_url: str, postgres: EmbeddedPostgres) -> None:
    columns = walk.columns_of(sample_url, "users")
    before = walk.schema(sample_url, postgres.bin_dir(), USERS)
    walk.switch(sample_url, USERS)
    walk.query(
        sample_url,
        "UPDATE users SET email_encrypted = %s, email_search = %s, last_name_encrypted = NULL WHERE id = 7",
        envelope("new@example.com", "user_pii"),
        search_token(walk.KEYS, "new@example.com", "user_pii"),
    )
    rows = walk.contents(
        sample_url, "users", [name for name in columns if name not in ("email", "last_name")]
    )

    result = reverted(sample_url, USERS)

    assert result is not None and (result.rows, result.values) == (1, 1)
    assert authority(sample_url, USERS) == "plaintext"
    assert walk.schema(sample_url, postgres.bin_dir(), USERS) == before
    assert walk.query(sample_url, "SELECT email, last_name FROM users WHERE id = 7") == [
        ("new@example.com", None)
    ]
    assert (
        walk.contents(sample_url, "users", [name for name in columns if name not in ("email", "last_name")])
        == rows
    )
    assert reverted(sample_url, USERS) is None


def triggers(url: str) -> list[str]:
    rows = walk.query(
        url, "SELECT tgname FROM pg_trigger WHERE tgrelid = 'users'::regclass AND NOT tgisinternal"
    )
    return [name for (name,) in rows]


def relations(url: str) -> set[str]:
    names = ("v_users", "v_users_safe", "users_encryption_pending", "idx_user_email_search")
    rows = walk.query(url, "SELECT relname FROM pg_class WHERE relname = ANY(%s)", list(names))
    return {name for (name,) in rows}


def test_a_revert_leaves_the_encrypted_columns_alone(
    after: After, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    url = after("switched")
    create_views(Database(url), USERS, walk.ACTOR)
    walk.backup(url, (USERS,), tmp_path, postgres.bin_dir())
    walk.approve(url, USERS)

    reverted(url, USERS)

    audited = "SELECT details -> 'views' FROM alphapulse_encryption.audit_log WHERE action = 'withdraw'"
    assert set(walk.value(url, audited)) == {"v_users", "v_users_safe"}
    assert triggers(url) == []
    assert walk.value(url, "SELECT count(*) FROM pg_proc WHERE proname LIKE 'encryption_guard%'") == 0
    assert relations(url) == {"idx_user_email_search"}
    assert walk.value(url, "SELECT count(*) FROM users WHERE email_encrypted IS NULL") == 0
    assert walk.query(url, "SELECT revoked_by FROM alphapulse_encryption.approvals") == [("tests",)]
    for step in (walk.backfill, switched, lambda url, table: create_views(Database(url), table, walk.ACTOR)):
        with pytest.raises(RefusedError, match=r"reverted to plaintext\. Begin again"):
            step(url, USERS)


def test_the_next_try_trusts_no_ciphertext_that_nobody_watched_over(after: After) -> None:
    url = after("switched")
    reverted(url, USERS)
    walk.query(url, "UPDATE users SET first_name = 'Newer' WHERE id = 9")
    walk.query(url, "UPDATE users SET email = 'newer@x.example', email_search = 'stale' WHERE id = 10")
    rows = walk.value(url, "SELECT count(*) FROM users")

    result = add_encrypted_columns(walk.target(url), USERS, batch_ranges=walk.RANGES)

    assert (result.added, result.guards_created, result.cleared) == ((), True, rows)
    assert walk.value(url, "SELECT count(*) FROM users WHERE email_encrypted || email_search <> ''") == 0
    assert not add_encrypted_columns(walk.target(url), USERS, batch_ranges=walk.RANGES).guards_created
    walk.encrypt(url, USERS)
    assert walk.verify(url, USERS).passed
    sealed = walk.value(url, "SELECT first_name_encrypted FROM users WHERE id = 9")
    assert walk.CIPHER.decrypt(sealed, "user_personal") == "Newer"
    processed = "SELECT sum(rows_processed) FROM alphapulse_encryption.ranges WHERE table_name = 'users'"
    assert walk.value(url, processed) == rows


def test_what_others_built_on_the_views_stays_and_the_plaintext_is_right(after: After) -> None:
    url = after("switched")
    create_views(Database(url), USERS, walk.ACTOR)
    walk.query(url, "CREATE VIEW report AS SELECT count(*) FROM v_users_safe")
    with pytest.raises(RefusedError, match="v_users_safe has to go, and others depend on it"):
        reverted(url, USERS)
    assert authority(url, USERS) == "plaintext"
    assert relations(url) > {"v_users", "v_users_safe"} and triggers(url)
    walk.query(url, "DROP VIEW report")
    assert reverted(url, USERS) is not None
    assert not triggers(url)


def test_a_revert_killed_before_not_null_is_continued(sample_url: str, postgres: EmbeddedPostgres) -> None:
    before = walk.schema(sample_url, postgres.bin_dir(), ACCOUNTS)
    walk.switch(sample_url, ACCOUNTS)
    with Database(sample_url).session("hand back") as connection:
        switch.hand_back(connection, read_table(connection, ACCOUNTS), filling(sample_url))
    with pytest.raises(RefusedError, match="on its way back"):
        switched(sample_url, ACCOUNTS)
    with pytest.raises(psycopg.errors.CheckViolation):
        walk.query(sample_url, "UPDATE trading_accounts SET balance = NULL WHERE id = 1")

    assert reverted(sample_url, ACCOUNTS) is not None

    assert walk.schema(sample_url, postgres.bin_dir(), ACCOUNTS) == before
    with Database(sample_url).session("read") as connection:
        state = require_state(connection, ACCOUNTS)
    assert (state.authority, state.state) == ("plaintext", State.REVERTED)


def test_not_null_comes_back_without_a_look_at_the_rows(after: After) -> None:
    url = after("switched", ACCOUNTS)
    notices: list[str] = []
    with Database(url).session("revert") as connection:
        definition = read_table(connection, ACCOUNTS)
        switch.hand_back(connection, definition, filling(url))
        switch.put_back_not_null(connection, definition)
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
        connection.execute("SET client_min_messages = debug1")
        with connection.transaction():
            switch.finish_return(connection, definition, walk.target(url), "revert_to_plaintext")
    proven = [text for text in notices if "sufficient to prove" in text]
    assert len(proven) == 3
    assert not any("verifying table" in text for text in notices)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("", "malformed"), ("x", "malformed"), (envelope("7", "user_pii"), "context")],
    # An envelope is another one each time; the processes that share the tests have to name them alike.
    ids=["nothing", "no envelope", "another column's"],
)
def test_a_value_that_cannot_be_read_is_named_and_nothing_is_handed_back(
    after: After, damage: str, reason: str
) -> None:
    url = after("switched", ACCOUNTS)
    walk.query(url, "UPDATE trading_accounts SET balance_encrypted = %s WHERE id = 3", damage)
    with pytest.raises(RefusedError, match=r"key \(3\): balance_encrypted") as caught:
        reverted(url, ACCOUNTS)
    assert reason in str(caught.value)
    assert authority(url, ACCOUNTS) == "ciphertext"


def written_at_the_last_moment(
    url: str, monkeypatch: pytest.MonkeyPatch, values: dict[int, str]
) -> tuple[Filling, str]:
    """A table that is handed back; what the application has written, no fill has seen. Returns how that ended, too."""
    walk.switch(url, ACCOUNTS)
    for key, sealed in values.items():
        walk.query(url, "UPDATE trading_accounts SET balance_encrypted = %s WHERE id = %s", sealed, key)
    last, said = filling(url), ""
    monkeypatch.setattr(Filling, "fill", lambda _: None)
    monkeypatch.setattr(switch, "LOOKS", 2)
    with Database(url).session("hand back") as connection:
        try:
            switch.hand_back(connection, read_table(connection, ACCOUNTS), last)
        except RefusedError as error:
            said = str(error)
    return last, said


BALANCES = "SELECT id, balance::text FROM trading_accounts WHERE id IN (3, 4) ORDER BY id"


def test_what_is_written_at_the_last_moment_is_filled_under_the_lock(
    sample_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {3: envelope("7.5", "account_balance"), 4: envelope("2.50", "account_balance")}
    last, said = written_at_the_last_moment(sample_url, monkeypatch, values)
    assert (said, last.done.rows, last.done.values) == ("", 2, 2)
    assert walk.query(sample_url, BALANCES) == [(3, "7.5000000000"), (4, "2.5000000000")]
    assert authority(sample_url, ACCOUNTS) == "plaintext"
    audited = "SELECT details ->> 'rows' FROM alphapulse_encryption.audit_log WHERE action = 'hand_back'"
    assert walk.query(sample_url, audited) == [("2",)]


@pytest.mark.parametrize(("second", "most"), [("2.5", 1), ("not a number", 500), (None, 500)])
def test_what_cannot_be_filled_under_the_lock_changes_nothing(
    sample_url: str, monkeypatch: pytest.MonkeyPatch, second: str | None, most: int
) -> None:
    monkeypatch.setattr(switch, "FILLED_UNDER_LOCK", most)
    sealed = "no envelope" if second is None else envelope(second, "account_balance")
    values = {3: envelope("7.5", "account_balance"), 4: sealed}
    _, said = written_at_the_last_moment(sample_url, monkeypatch, values)
    assert "faster than it can be put back" in said
    assert walk.query(sample_url, BALANCES) == [(3, None), (4, None)]
    assert authority(sample_url, ACCOUNTS) == "ciphertext"


@pytest.mark.parametrize("text", ["not a number", "1.00000000001", "1e40"])
def test_a_value_that_does_not_fit_is_named_and_never_shown(after: After, text: str) -> None:
    url = after("switched", ACCOUNTS)
    for key, value in ((3, text), (4, "2.5")):
        walk.query(
            url,
            "UPDATE trading_accounts SET balance_encrypted = %s WHERE id = %s",
            envelope(value, "account_balance"),
            key,
        )
    with pytest.raises(RefusedError, match=r"key \(3\): ") as caught:
        reverted(url, ACCOUNTS)
    assert text not in str(caught.value)
    assert "(4)" not in str(caught.value)
    rows = walk.query(url, "SELECT balance::text FROM trading_accounts WHERE id IN (3, 4) ORDER BY id")
    assert rows == [(None,), ("2.5000000000",)]


def test_another_text_form_of_the_same_value_is_encrypted_again(after: After) -> None:
    url = after("switched", ACCOUNTS)
    walk.query(
        url,
        "UPDATE trading_accounts SET balance_encrypted = %s WHERE id = 3",
        envelope("0012.5", "account_balance"),
    )
    reverted(url, ACCOUNTS)
    plain, encrypted = walk.query(
        url, "SELECT balance::text, balance_encrypted FROM trading_accounts WHERE id = 3"
    )[0]
    assert plain == walk.CIPHER.decrypt(encrypted, "account_balance") == "12.5000000000"
