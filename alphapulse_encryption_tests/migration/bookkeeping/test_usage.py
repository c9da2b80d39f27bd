"""Messages per key in the database: reserved before they are encrypted, and never fewer than were encrypted."""

from __future__ import annotations

import itertools
import threading
from contextlib import closing
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.crypto.envelope import AES_256_GCM, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.usage import MOST_MESSAGES, WARNING_FROM, KeyUsage
from alphapulse_encryption.errors import KeyExhausted
from alphapulse_encryption.migration.bookkeeping.usage import BLOCK, MeteredCipher, read_usage
from alphapulse_encryption.migration.gates import preflight
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, Progress, Stopped
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.migration.steps.versions import begin_rotation
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.support import CIPHER, KEYS, run, target, value

ENTRY = support.table(
    "notes", support.searchable("mail", "idx_notes_mail", "ctx_mail"), "body", "extra", context="ctx_text"
)
USED = "SELECT coalesce(sum(messages), 0)::bigint FROM alphapulse_encryption.key_usage WHERE context = %s"


def make(url: str, rows: int = 40, *, ranges: int = 1) -> None:
    run(url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, body text, extra text)")
    run(
        url,
        "INSERT INTO notes SELECT i, 'mail ' || i, 'text ' || i, CASE WHEN i % 4 = 0 THEN 'extra' END "
        f"FROM generate_series(1, {rows}) AS i",
    )
    support.add_columns(url, ENTRY, ranges=ranges)


def used(url: str) -> tuple[int, int]:
    """Messages counted under the two keys."""
    return value(url, USED, "ctx_mail"), value(url, USED, "ctx_text")


class Seen:
    """A cipher that knows how many messages it has encrypted, and looks at the database at each of them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.messages: dict[str, int] = {}
        self.ahead: list[bool] = []
        self._lock = threading.Lock()

    def _note(self, values: list[Any], context: str) -> None:
        with self._lock:
            self.messages[context] = self.messages.get(context, 0) + len(values) - values.count(None)
            self.ahead.append(value(self.url, USED, context) >= self.messages[context])

    def encrypt(self, text: str, context: str) -> str:
        self._note([text], context)
        return CIPHER.encrypt(text, context)

    def encrypt_many(self, values: Any, context: str) -> list[str | None]:
        self._note(values, context)
        return CIPHER.encrypt_many(values, context)

    def encrypt_many_utf8(self, values: Any, context: str) -> list[bytes | None]:
        self._note(values, context)
        return CIPHER.encrypt_many_utf8(values, context)

    def decrypt(self, envelope: str, context: str) -> str:
        return CIPHER.decrypt(envelope, context)

    def decrypt_many(self, envelopes: Any, context: str) -> list[str | None]:
        return CIPHER.decrypt_many(envelopes, context)

    def key_version(self, envelope: str, context: str) -> int:
        return CIPHER.key_version(envelope, context)

    def ending(self, context: str, version: int) -> str:
        return CIPHER.ending(context, version)


def test_a_backfill_counts_what_it_encrypts_beforehand(database_url: str) -> None:
    make(database_url, 1_000, ranges=2)
    seen = Seen(database_url)
    for number in (0, 1):
        result = backfill_range(target(database_url, cipher=seen), ENTRY, number, pace=Pace(100))
    assert seen.messages == {"ctx_mail": 1_000, "ctx_text": 1_250}
    assert seen.ahead and all(seen.ahead)
    # What was reserved and not used is given back.
    assert used(database_url) == (1_000, 1_250)
    assert {usage.context: usage.key_version for usage in result.key_usage} == {"ctx_mail": 1, "ctx_text": 1}
    # Nothing to do: nothing counted.
    assert backfill_range(target(database_url, cipher=seen), ENTRY, 0).key_usage == ()
    assert used(database_url) == (1_000, 1_250)
    run(database_url, "UPDATE notes SET mail = 'another' WHERE id <= 3")
    result = backfill_range(target(database_url, cipher=seen), ENTRY, 0)
    assert result.key_usage[0] == KeyUsage("ctx_mail", 1, 1_003)
    assert used(database_url)[0] == 1_003


def test_what_is_encrypted_in_vain_counts(database_url: str) -> None:
    """Every batch fails at its first try: all of it is encrypted again, and has used the key twice."""
    make(database_url, 60)
    run(
        database_url,
        "CREATE FUNCTION once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.id = 45 THEN RAISE EXCEPTION 'no' USING ERRCODE = 'check_violation'; END IF; RETURN NEW; END $$",
    )
    run(database_url, "CREATE TRIGGER aaa BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION once()")
    run(database_url, "ALTER TABLE notes ENABLE ALWAYS TRIGGER aaa")
    seen = Seen(database_url)
    with pytest.raises(Exception, match="could not be encrypted: 1"):
        backfill_range(target(database_url, cipher=seen), ENTRY, 0, pace=Pace(20))
    with pytest.raises(Exception, match="could not be encrypted: 1"):
        backfill_range(target(database_url, cipher=seen), ENTRY, 0, pace=Pace(20))
    assert value(database_url, "SELECT count(*) FROM notes WHERE mail_encrypted IS NOT NULL") == 59
    assert seen.messages["ctx_mail"] == 61
    assert used(database_url)[0] == 61


def test_a_stopped_backfill_counts_what_it_read_ahead(database_url: str) -> None:
    make(database_url, 500)
    seen = Seen(database_url)

    def stop(_: Progress) -> None:
        raise Stopped("enough")

    with pytest.raises(Stopped):
        backfill_range(target(database_url, cipher=seen), ENTRY, 0, pace=Pace(50), on_progress=stop)
    written = value(database_url, "SELECT count(*) FROM notes WHERE mail_encrypted IS NOT NULL")
    assert written == 50
    assert used(database_url) == (seen.messages["ctx_mail"], seen.messages["ctx_text"])


def test_a_process_that_does_not_end_in_order_counts_its_block(database_url: str) -> None:
    make(database_url)
    lost = MeteredCipher(target(database_url))
    lost.encrypt_many_utf8([b"x"] * 10, "ctx_mail")
    assert used(database_url)[0] == 10
    lost.encrypt("x", "ctx_mail")
    assert used(database_url)[0] == 20, "as many as so far are reserved at once"
    # As a kill does: its connection goes, and nobody gives back.
    run(
        database_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'alphapulse_encryption'",
    )
    lost.close()
    assert used(database_url)[0] == 20


def test_blocks_grow_to_their_full_size_and_no_further(database_url: str) -> None:
    make(database_url)
    with closing(MeteredCipher(target(database_url))) as cipher:
        cipher._block = 64
        sums = []
        for _ in range(200):
            cipher.encrypt("x", "ctx_mail")
            sums.append(used(database_url)[0])
        steps = [after - before for before, after in itertools.pairwise(sums) if after > before]
        assert steps == [1, 2, 4, 8, 16, 32, 64, 64, 64]
        assert cipher.usage() == (KeyUsage("ctx_mail", 1, 200),)
    assert used(database_url)[0] == 200
    assert BLOCK == 100_000


def test_many_at_once(database_url: str) -> None:
    make(database_url)
    together = threading.Barrier(4)

    def work() -> None:
        with closing(MeteredCipher(target(database_url))) as cipher:
            together.wait()
            for _ in range(30):
                cipher.encrypt_many_utf8([b"x"] * 7, "ctx_mail")
                cipher.encrypt_many_utf8([b"x", None], "ctx_text")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used(database_url) == (840, 120)


def test_refused_at_the_limit(database_url: str) -> None:
    make(database_url)
    run(
        database_url,
        "UPDATE alphapulse_encryption.key_usage SET messages = %s WHERE context = 'ctx_mail'",
        MOST_MESSAGES - 40,
    )
    # There is room for 40, which are the rows; of a block there is not.
    with closing(MeteredCipher(target(database_url))) as cipher:
        cipher.encrypt_many_utf8([b"x"] * 10, "ctx_mail")
        cipher.encrypt_many_utf8([b"x"] * 19, "ctx_mail")
        with pytest.raises(
            KeyExhausted, match="context ctx_mail, version 1, may not encrypt more than 4,294,967,296"
        ):
            cipher.encrypt_many_utf8([b"x"] * 12, "ctx_mail")
        cipher.encrypt_many_utf8([b"x"] * 11, "ctx_mail")
        # Another version is another key, and so is another context.
        newer = KeyRing({1: bytes(32), 2: bytes(32)}, 2)
        with closing(MeteredCipher(target(database_url, keys=newer))) as other:
            other.encrypt("x", "ctx_mail")
        cipher.encrypt("x", "ctx_text")
    assert used(database_url) == (MOST_MESSAGES + 1, 1), "of two versions"
    with pytest.raises(KeyExhausted, match="ctx_mail"):
        support.backfill(database_url, ENTRY)
    (row,) = run(database_url, "SELECT status, error_message FROM alphapulse_encryption.ranges")
    assert row[0] == "failed" and "ctx_mail" in row[1]
    assert value(database_url, "SELECT count(*) FROM notes WHERE mail_encrypted IS NOT NULL") == 0
    findings = preflight.check(Database(database_url), (ENTRY,), KEYS).blockers
    assert [finding.subject for finding in findings] == ["key usage"]


def test_what_an_application_reports_warns_and_stops_nobody(database_url: str) -> None:
    make(database_url)
    for _ in range(3):
        run(database_url, "SELECT encryption_report_key_usage('ctx_mail', 1, %s)", MOST_MESSAGES)
    (usage, _) = support.backfill(database_url, ENTRY).key_usage
    assert usage.messages > 3 * MOST_MESSAGES
    assert value(database_url, "SELECT count(*) FROM notes WHERE mail_encrypted IS NOT NULL") == 40
    found = preflight.check(Database(database_url), (ENTRY,), KEYS)
    assert [f.level for f in found.findings if f.subject == "key usage"] == ["warning"]
    (told,) = [f.message for f in found.findings if f.subject == "key usage"]
    assert "ctx_mail" in told and f"{3 * MOST_MESSAGES:,}" in told and "application" in told


def test_a_warning_from_half_of_it(database_url: str) -> None:
    make(database_url)
    run(
        database_url,
        "UPDATE alphapulse_encryption.key_usage SET messages = %s WHERE context = 'ctx_mail'",
        WARNING_FROM - 41,
    )

    def found() -> list[tuple[str, bool]]:
        report = preflight.check(Database(database_url), (ENTRY,), KEYS)
        return [
            (f.level, "Plan a rotation" in f.message) for f in report.findings if f.subject == "key usage"
        ]

    (usage, _) = support.backfill(database_url, ENTRY).key_usage
    assert usage.warning() is None
    assert found() == [("ok", False)]
    run(database_url, "UPDATE notes SET mail = 'new' WHERE id = 1")
    (usage,) = support.backfill(database_url, ENTRY).key_usage
    assert usage == KeyUsage("ctx_mail", 1, WARNING_FROM)
    assert usage.warning() is not None
    assert found() == [("warning", True)]
    run(database_url, "UPDATE alphapulse_encryption.key_usage SET key_version = 2")
    assert found() == [], "a key that is not written with any more concerns nobody"


def test_what_applications_report(database_url: str) -> None:
    make(database_url)
    run(database_url, "DROP ROLE IF EXISTS an_application")
    run(database_url, "CREATE ROLE an_application")
    report = "SELECT encryption_report_key_usage('ctx_mail', 1, %s)"
    try:
        with psycopg.connect(database_url) as connection:
            connection.execute("SET ROLE an_application")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(report, [5])
            connection.rollback()
            connection.execute("GRANT EXECUTE ON FUNCTION encryption_report_key_usage TO an_application")
            connection.execute("SET ROLE an_application")
            for messages, total in ((5, 5), (7, 12), (0, 12), (2**32, 2**32 + 12)):
                assert connection.execute(report, [messages]).fetchone() == (total,)
            for wrong in (-1, None, 2**32 + 1):
                with pytest.raises(psycopg.errors.InvalidParameterValue), connection.transaction():
                    connection.execute(report, [wrong])
            # Of what the migration does not know, the report would show an operator any text.
            for context, version in (("\x1b[2Jctx_mail", 1), ("another", 1), ("ctx_mail", 2)):
                with pytest.raises(psycopg.errors.InvalidParameterValue), connection.transaction():
                    connection.execute("SELECT encryption_report_key_usage(%s, %s, 1)", [context, version])
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("UPDATE alphapulse_encryption.key_usage SET messages = 0")
    finally:
        run(database_url, "REVOKE ALL ON FUNCTION encryption_report_key_usage FROM an_application")
        run(database_url, "DROP ROLE an_application")
    run(database_url, report, 3)
    support.backfill(database_url, ENTRY)
    with Database(database_url).connect() as connection:
        assert read_usage(connection) == (KeyUsage("ctx_mail", 1, 43), KeyUsage("ctx_text", 1, 50))


def test_nobody_waits_for_an_application_that_does_not_commit(database_url: str) -> None:
    make(database_url)
    with psycopg.connect(database_url) as application:
        application.execute("SELECT encryption_report_key_usage('ctx_mail', 1, 5)")
        support.backfill(database_url, ENTRY)
        assert used(database_url)[0] == 40
    assert used(database_url)[0] == 45


def test_a_rotation_counts_under_the_new_version(database_url: str) -> None:
    make(database_url)
    support.backfill(database_url, ENTRY)
    newer = KeyRing({1: support.MASTER_KEY, 2: bytes(range(32))}, 2)
    database, cipher = Database(database_url), get_format(AES_256_GCM, newer)
    begin_rotation(target(database, keys=newer))
    result = rotate_range(target(database, keys=newer, cipher=cipher), ENTRY, 0)
    assert result.rows == 40
    assert {usage.context: usage.key_version for usage in result.key_usage} == {"ctx_mail": 2, "ctx_text": 2}
    with database.connect() as connection:
        assert read_usage(connection) == (
            *(KeyUsage("ctx_mail", 1, 40), KeyUsage("ctx_mail", 2, 40)),
            *(KeyUsage("ctx_text", 1, 50), KeyUsage("ctx_text", 2, 50)),
        )


def test_a_revert_counts_what_it_encrypts_again(sample_url: str) -> None:
    """An application wrote JSON in a form that is not PostgreSQL's: put back, it is encrypted again."""
    users = walk.CATALOGUE.table("users")
    walk.switch(sample_url, users)
    before = value(sample_url, USED, "user_address")
    assert before == value(sample_url, "SELECT count(address_data) FROM users")
    walk.query(
        sample_url,
        "UPDATE users SET address_data_encrypted = %s WHERE id IN (100, 101)",
        walk.CIPHER.encrypt('{"b":1,  "a": 2}', "user_address"),
    )
    revert_to_plaintext(walk.target(sample_url), users)
    assert value(sample_url, "SELECT address_data::text FROM users WHERE id = 100") == '{"a": 2, "b": 1}'
    assert value(sample_url, USED, "user_address") == before + 2
