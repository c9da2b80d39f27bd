"""The drop of a partitioned table, and back: indexes and constraints of every partition are as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import DatabaseFailure, RefusedError
from alphapulse_encryption.migration.gates.backup import take_backup
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema import saved_indexes
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import dumps, support, walk
from alphapulse_encryption_tests.migration.support import run

PAYMENTS = support.table("payments", support.searchable("mail", "idx_payments_mail"), "secret")
CATALOGUE = Catalogue(tables=(PAYMENTS,))
ADDED = dumps.added_columns(PAYMENTS)
KEY = "region, day, id"
DEFINITIONS = (
    "CREATE TABLE payments (id int, region text, day date, mail text NOT NULL DEFAULT 'none', secret numeric(9,2), "
    f"PRIMARY KEY ({KEY})) PARTITION BY LIST (region)",
    "CREATE TABLE pay_north PARTITION OF payments FOR VALUES IN ('north')",
    "CREATE TABLE pay_south PARTITION OF payments FOR VALUES IN ('south') PARTITION BY RANGE (day)",
    "CREATE TABLE pay_south_1 PARTITION OF pay_south FOR VALUES FROM ('2020-01-01') TO ('2020-02-01')",
    'CREATE TABLE "paySouthRest" PARTITION OF pay_south DEFAULT',
    # Its columns stand in another order, and one before them was dropped.
    "CREATE TABLE pay_west (gone int, secret numeric(9,2), "
    "mail text CONSTRAINT there NOT NULL DEFAULT 'none', day date NOT NULL, region text NOT NULL, "
    "id int NOT NULL)",
    "ALTER TABLE pay_west DROP COLUMN gone",
    "ALTER TABLE payments ATTACH PARTITION pay_west FOR VALUES IN ('west')",
    "INSERT INTO payments SELECT i, (ARRAY['north', 'south', 'west'])[i % 3 + 1], date '2020-01-01' + i % 60, "
    "'m' || i, nullif(i % 7, 0) + 0.10 FROM generate_series(1, 120) AS i",
    f"ALTER TABLE payments ADD CONSTRAINT once UNIQUE (mail, {KEY})",
    "CREATE INDEX by_mail ON payments (lower(mail)) WHERE secret > 1",
    'CREATE INDEX "by secret" ON payments USING btree (secret DESC) INCLUDE (id)',
    "COMMENT ON INDEX \"by secret\" IS 'for the report'",
    "COMMENT ON INDEX pay_north_secret_id_idx IS 'of the north'",
    "CREATE INDEX alone ON pay_south_1 (id, secret) WHERE mail <> 'x'",
    "CREATE INDEX below ON pay_south (mail)",
    "COMMENT ON INDEX below IS 'of the south'",
    "COMMENT ON CONSTRAINT once ON payments IS 'one a day'",
    "ALTER TABLE pay_west ALTER mail SET DEFAULT 'west'",
    "ALTER TABLE pay_south_1 ALTER mail DROP DEFAULT",
    "ALTER TABLE pay_south ALTER secret SET DEFAULT 3",
    "ALTER TABLE payments ADD CONSTRAINT positive CHECK (secret > 0)",
    "ALTER TABLE payments ALTER mail SET STATISTICS 250",
    "COMMENT ON COLUMN payments.mail IS 'where they write to'",
)


@pytest.fixture
def payments_url(database_url: str) -> str:
    for statement in DEFINITIONS:
        run(database_url, statement)
    return database_url


def drop(url: str, bin_dir: Path, directory: Path) -> None:
    walk.switch(url, PAYMENTS)
    take_backup(walk.target(url, catalogue=CATALOGUE), (PAYMENTS,), directory=directory, bin_dirs=[bin_dir])
    walk.approve(url, PAYMENTS, CATALOGUE)
    walk.drop(url, PAYMENTS, CATALOGUE)


def restore(url: str) -> None:
    restore_plaintext(walk.target(url, catalogue=CATALOGUE), PAYMENTS)


def indexes(url: str) -> dict[str, bool]:
    return dict(
        run(
            url,
            "SELECT indexrelid::regclass::text, indisvalid FROM pg_index WHERE indrelid IN "
            "(SELECT relid FROM pg_partition_tree('payments'))",
        )
    )


def test_the_dump_is_the_same(payments_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    bin_dir = postgres.bin_dir()
    before = dumps.dump(payments_url, bin_dir)
    values = run(payments_url, f"SELECT {KEY}, mail, secret FROM payments ORDER BY {KEY}")
    there = indexes(payments_url)
    assert not [
        f for f in check(Database(payments_url), (PAYMENTS,), None).findings if "approve_drop" in f.message
    ]
    drop(payments_url, bin_dir, tmp_path)
    left = run(
        payments_url,
        "SELECT count(*) FROM pg_attribute WHERE attname IN ('mail', 'secret') AND attrelid IN "
        "(SELECT relid FROM pg_partition_tree('payments'))",
    )
    assert left == [(0,)]
    restore(payments_url)
    assert run(payments_url, f"SELECT {KEY}, mail, secret FROM payments ORDER BY {KEY}") == values
    assert there.items() <= indexes(payments_url).items()
    revert_to_plaintext(walk.target(payments_url, catalogue=CATALOGUE), PAYMENTS)
    after = dumps.dump(payments_url, bin_dir, ADDED)
    assert before - after == {}
    restore(payments_url)


def test_a_revert_puts_back_what_partitions_have_of_their_own(
    payments_url: str, postgres: EmbeddedPostgres
) -> None:
    """As does a second one; between them nothing of it refuses ciphertext alone, or fills in plaintext."""
    # Each partition had it before the whole, as one does to spare the large table a scan under the lock.
    run(payments_url, "ALTER TABLE payments ALTER mail DROP NOT NULL")
    for part in ("pay_north", "pay_south_1", "pay_south", "payments"):
        run(payments_url, f"ALTER TABLE {part} ALTER mail SET NOT NULL")
    before = dumps.dump(payments_url, postgres.bin_dir())
    for number in range(2):
        walk.switch(payments_url, PAYMENTS)
        for region in ("north", "south", "west"):
            run(
                payments_url,
                "INSERT INTO payments (region, day, id, mail_encrypted, mail_search) "
                "VALUES (%s, '2020-01-05', 999, %s, %s)",
                *(region, support.seal("new", "test_search"), support.token("new", "test_search")),
            )
        run(
            payments_url,
            "INSERT INTO pay_south_1 (region, day, id, mail_encrypted) SELECT 'south', '2020-01-06', "
            "999, mail_encrypted FROM payments LIMIT 1",
        )
        assert run(payments_url, "SELECT mail, secret FROM payments WHERE id = 999") == [(None, None)] * 4
        run(payments_url, "DELETE FROM payments WHERE id = 999")
        revert_to_plaintext(walk.target(payments_url, catalogue=CATALOGUE), PAYMENTS)
        after = dumps.dump(payments_url, postgres.bin_dir(), ADDED)
        assert before - after == {}, number


def test_the_indexes_of_a_partition_that_is_renamed_meanwhile_are_told(
    payments_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    drop(payments_url, postgres.bin_dir(), tmp_path)
    run(payments_url, "ALTER TABLE pay_south_1 RENAME TO pay_south_of_once")
    restore(payments_url)
    ((lost,),) = run(
        payments_url,
        "SELECT details -> 'indexes' FROM alphapulse_encryption.audit_log WHERE action = 'lost_indexes'",
    )
    assert list(lost) == ["public.pay_south_1: alone"]
    assert lost["public.pay_south_1: alone"].startswith("CREATE INDEX alone ON public.pay_south_1")
    assert "below" in indexes(payments_url) and "alone" not in indexes(payments_url)


def test_partitions_that_came_since_have_what_the_others_have(
    payments_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    drop(payments_url, postgres.bin_dir(), tmp_path)
    run(payments_url, "CREATE TABLE pay_east PARTITION OF payments FOR VALUES IN ('east')")
    restore(payments_url)
    assert all(indexes(payments_url).values())
    of_new = run(payments_url, "SELECT indexdef FROM pg_indexes WHERE tablename = 'pay_east'")
    assert len([text for (text,) in of_new if "lower(mail)" in text or "secret DESC" in text]) == 2
    constraints = run(
        payments_url,
        "SELECT count(*) FROM pg_constraint WHERE conrelid = 'pay_east'::regclass AND contype = 'u'",
    )
    assert constraints == [(1,)]


@pytest.mark.parametrize("at", [1, 3, 6])
def test_interrupted_it_goes_on(
    payments_url: str, postgres: EmbeddedPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    there = indexes(payments_url)
    drop(payments_url, postgres.bin_dir(), tmp_path)
    build, calls = saved_indexes._build, []

    def killed(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(saved_indexes, "_build", killed)
    with pytest.raises(KeyboardInterrupt):
        restore(payments_url)
    monkeypatch.setattr(saved_indexes, "_build", build)
    restore(payments_url)
    assert there.items() <= indexes(payments_url).items()
    assert all(indexes(payments_url).values())


def test_a_partitions_build_that_the_server_ends_is_done_again(
    payments_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    there = indexes(payments_url)
    drop(payments_url, postgres.bin_dir(), tmp_path)
    with support.application(payments_url, autocommit=False) as application:
        # It has seen the table as it is: a concurrent build waits for its end.
        application.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        application.execute("SELECT 1")
        with support.Background(lambda: restore(payments_url)) as restoring:
            support.until(
                lambda: support.engine_waits(payments_url, "CREATE%CONCURRENTLY%", behind=application),
                "it builds the index of a partition",
            )
            run(
                payments_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'alphapulse_encryption'",
            )
            with pytest.raises(DatabaseFailure):
                restoring.result()
    assert not all(indexes(payments_url).values())
    restore(payments_url)
    assert there.items() <= indexes(payments_url).items()
    assert all(indexes(payments_url).values())


@pytest.mark.parametrize(
    ("own", "named"),
    [
        (
            "ALTER TABLE pay_west ADD CONSTRAINT own CHECK (secret < 900)",
            "constraint own of the partition pay_west",
        ),
        ("ALTER TABLE pay_south_1 ALTER secret SET STATISTICS 7", "secret in the partition pay_south_1"),
        ("COMMENT ON COLUMN pay_north.mail IS 'own'", "mail in the partition pay_north"),
        ("GRANT SELECT (mail) ON pay_north TO pg_monitor", "mail in the partition pay_north"),
        ("CREATE STATISTICS own ON mail, region FROM pay_north", "statistics own of the partition pay_north"),
        ("COMMENT ON CONSTRAINT positive ON pay_north IS 'own'", "positive of the partition pay_north"),
        ("CREATE VIEW own AS SELECT mail FROM pay_north", "view public.own"),
        (
            "CREATE TABLE people (mail text PRIMARY KEY); INSERT INTO people SELECT mail FROM payments; "
            "ALTER TABLE payments ADD CONSTRAINT of_people FOREIGN KEY (mail) REFERENCES people",
            "of_people on table public.payments",
        ),
    ],
)
def test_what_a_partition_has_of_its_own_stops_it(
    payments_url: str, postgres: EmbeddedPostgres, tmp_path: Path, own: str, named: str
) -> None:
    for statement in own.split("; "):
        run(payments_url, statement)
    told = [f.message for f in check(Database(payments_url), (PAYMENTS,), None).warnings]
    assert [m for m in told if named in m and "stops its drop" in m]
    with pytest.raises(RefusedError, match=named):
        drop(payments_url, postgres.bin_dir(), tmp_path)
    assert run(payments_url, "SELECT count(mail) FROM payments") == [(120,)]
