"""The traffic of a rehearsal, on a real database: what it does, what it notices, and that nothing is left of it."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption.rehearsal.measures import Traffic
from alphapulse_encryption.rehearsal.traffic.application import APPLICATION_NAME, FINAL, KINDS
from alphapulse_encryption.rehearsal.traffic.samples import Sample, latency, moments
from alphapulse_encryption.rehearsal.traffic.traffic import (
    MixConfig,
    Running,
    TrafficConfig,
    _kept,
    _Process,
    traffic,
)
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support, walk

KEY = base64.b64encode(bytes(range(32))).decode()
ENVIRONMENT = {"ALPHAPULSE_ENCRYPTION_MASTER_KEY": KEY}
TRADES = Catalogue(tables=(walk.CATALOGUE.table("trades"),))
SOME = Catalogue(tables=tuple(walk.CATALOGUE.table(name) for name in ("trades", "users", "api_keys")))
EVEN = MixConfig(read=1, look_up=1, update=1, insert=1, delete=1, report=1)
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s"


@contextmanager
def busy(
    url: str, *phases: str, catalogue: Catalogue = walk.CATALOGUE, rate: float = 60, mix: MixConfig = EVEN
) -> Iterator[Running]:
    """Traffic of all kinds."""
    config = TrafficConfig(rate=rate, mix=mix, library_share=0.6, clients=4)
    with traffic(url, catalogue, phases, config, ENVIRONMENT) as running:
        yield running


def measured(running: Running) -> Traffic:
    assert running.measured is not None
    return running.measured


def writes(url: str, table: str = "trades") -> int:
    """Rows that were inserted, updated and deleted since the table was made, as the server counts them."""
    return int(
        support.value(
            url,
            "SELECT pg_stat_get_tuples_inserted(%s::regclass) + pg_stat_get_tuples_updated(%s::regclass)",
            *[table, table],
        )
    )


def wait_for_writes(url: str, more: int, table: str = "trades") -> None:
    """Until the traffic has written so many rows more."""
    before = writes(url, table)
    support.until(lambda: writes(url, table) >= before + more, f"{more} writes")


def fine(running: Running) -> Traffic:
    """Nothing failed and nothing was wrong."""
    found = measured(running)
    assert (found.overall.errors, found.overall.wrong_answers, found.error_kinds) == (0, 0, {})
    assert found.overall.requests > 0
    return found


def test_every_kind_of_request_is_right_in_every_phase_and_side_by_side(sample_url: str) -> None:
    with busy(sample_url, "off", catalogue=SOME) as running:
        for table in SOME.tables:
            support.add_columns(sample_url, table, keys=walk.KEYS, ranges=walk.RANGES)
        wait_for_writes(sample_url, 5)
    before = fine(running)
    assert before.left_out == ()
    assert {one.way for one in before.by_kind} == {"library, off", "plain SQL"}

    with busy(sample_url, "off", "plaintext", catalogue=SOME) as running:
        for table in SOME.tables:
            walk.encrypt(sample_url, table)
    during = fine(running)
    assert {one.kind for one in during.by_kind} == {*KINDS.values(), FINAL}
    assert {one.way for one in during.by_kind} == {"library, off", "library, plaintext", "plain SQL"}
    assert during.overall.requests == sum(o.requests for o in during.by_kind if o.kind != FINAL)
    assert during.overall.requests == sum(moment.requests for moment in during.moments)
    assert during.phases == ("off", "plaintext")

    with busy(sample_url, "plaintext", "dual", catalogue=SOME) as running:
        for table in SOME.tables:
            walk.backfill(sample_url, table)
            walk.verify(sample_url, table)
    assert {one.way for one in fine(running).by_kind} == {"library, plaintext", "library, dual"}
    with busy(sample_url, "dual", catalogue=SOME) as running:
        for table in SOME.tables:
            switch_to_ciphertext(walk.target(sample_url), table)
        wait_for_writes(sample_url, 5)
    fine(running)
    # Written as ciphertext alone, by nobody but the traffic, and readable by who knows the format and nothing else.
    alone = "SELECT order_id_encrypted FROM trades WHERE order_id IS NULL AND order_id_encrypted IS NOT NULL"
    with busy(sample_url, "dual", "encrypted", catalogue=SOME) as running:
        wait_for_writes(sample_url, 10)
        support.until(lambda: bool(support.run(sample_url, alone)), "a row that is ciphertext alone")
    assert {one.way for one in fine(running).by_kind} == {"library, dual", "library, encrypted"}
    key = independent.derive(bytes(range(32)), "trade_order", 1)
    assert all(independent.open_envelope(key, envelope) for (envelope,) in support.run(sample_url, alone))


def test_dropped_columns_keep_their_types(sample_url: str) -> None:
    table = TRADES.tables[0]
    walk.encrypt(sample_url, table)
    walk.verify(sample_url, table)
    with busy(sample_url, "dual", catalogue=TRADES) as running:
        wait_for_writes(sample_url, 5)
    fine(running)
    switch_to_ciphertext(walk.target(sample_url), table)
    support.run(
        sample_url,
        "INSERT INTO alphapulse_encryption.definitions (table_name, definition) VALUES ('trades', %s)",
        '{"columns": [{"name": "quantity", "type": "numeric(28,10)"}, {"name": "price", "type": "numeric"}, '
        '{"name": "fee", "type": "numeric(28,10)"}, {"name": "order_id", "type": "text"}, '
        '{"name": "execution_details", "type": "json"}]}',
    )
    for column in table.columns:
        support.run(sample_url, f"ALTER TABLE trades DROP COLUMN {column.name} CASCADE")
    with busy(sample_url, "encrypted", catalogue=TRADES) as running:
        # Beside what is remembered from before.
        wait_for_writes(sample_url, 5)
    fine(running)


def test_a_write_behind_its_back_is_noticed(sample_url: str) -> None:
    with busy(sample_url, "off", catalogue=TRADES) as running:
        wait_for_writes(sample_url, 3)
    fine(running)
    support.run(sample_url, "UPDATE trades SET fee = 1234.5678")
    with busy(sample_url, "off", catalogue=TRADES, mix=MixConfig(read=1, update=0, insert=0)) as running:
        pass
    found = measured(running)
    owned = next(one for one in found.by_kind if one.kind == FINAL)
    # All but those of which something else is remembered: none.
    assert owned.wrong_answers == owned.requests > 0
    assert found.overall.wrong_answers >= owned.wrong_answers
    assert found.overall.errors == 0


def test_a_value_that_cannot_be_found_by_its_token_is_noticed(sample_url: str) -> None:
    users = Catalogue(tables=(walk.CATALOGUE.table("users"),))
    walk.encrypt(sample_url, users.tables[0])
    look_up = MixConfig(read=0, look_up=1, update=0, insert=0, delete=0, report=0)
    with psycopg.connect(sample_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE users DISABLE TRIGGER USER")
        connection.execute("UPDATE users SET email_search = 'x' || id")
    with busy(sample_url, "dual", catalogue=users, mix=look_up) as running:
        seen = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'idx_user_email_search'"
        support.until(lambda: support.value(sample_url, seen) > 5, "look-ups")
    found = measured(running)
    (looked_up,) = (one for one in found.by_kind if one.kind != FINAL)
    assert looked_up.wrong_answers == looked_up.requests > 0


def test_errors_are_counted_by_kind_and_quote_nothing(sample_url: str) -> None:
    writing = MixConfig(read=1, look_up=0, update=5, insert=0, delete=0, report=0)
    with busy(sample_url, "off", catalogue=TRADES, mix=writing) as running:
        wait_for_writes(sample_url, 3)
        support.run(sample_url, "ALTER TABLE trades ADD CONSTRAINT never CHECK (false) NOT VALID")
        tried = "SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        before = support.value(sample_url, tried)
        support.until(lambda: support.value(sample_url, tried) > before + 3, "failures")
    found = measured(running)
    assert found.error_kinds == {"CheckViolation 23514": found.overall.errors}
    assert found.overall.errors == sum(one.errors for one in found.by_kind if one.kind == "update") > 0
    # What failed has changed nothing.
    assert found.overall.wrong_answers == 0


OWN = """
CREATE SCHEMA "Other";
CREATE TABLE "Other".pairs (tenant int, number int, "metadata" text, PRIMARY KEY (tenant, number));
INSERT INTO "Other".pairs SELECT n % 7, n, 'value ' || n FROM generate_series(1, 400) n;
CREATE TABLE documents (
    tenant int NOT NULL, id uuid NOT NULL, title varchar(40) UNIQUE, born date, seen timestamp(3), raw bytea,
    flag boolean NOT NULL, ratio double precision, small smallint, tags text[],
    doubled int GENERATED ALWAYS AS (2 * small) STORED,
    PRIMARY KEY (tenant, id)
);
INSERT INTO documents SELECT n % 3, gen_random_uuid(), 'title ' || n, date '2020-01-01' + n, now() + n * interval '1 s',
    decode(md5(n::text), 'hex'), n % 2 = 0, n / 7.0, n % 100, ARRAY['a'] FROM generate_series(1, 60) n;
INSERT INTO documents (tenant, id, title, born, flag) VALUES (1, gen_random_uuid(), NULL, 'infinity', true);
CREATE TABLE totals (day date PRIMARY KEY, amount numeric CHECK (amount > 0), code char(4), serial int UNIQUE);
INSERT INTO totals SELECT date '2020-01-01' + n, n, 'ab', n FROM generate_series(1, 30) n;
CREATE TABLE nothing (id int PRIMARY KEY, secret text);
"""


def own_catalogue() -> Catalogue:
    def entry(name: str, *columns: str, searchable: str = "", schema: str = "public") -> Table:
        found = [support.searchable(c, f"idx_{name}_{c}") if c == searchable else c for c in columns]
        return support.table(name, *found, schema=schema)

    return Catalogue(
        tables=(
            entry("pairs", "metadata", searchable="metadata", schema="Other"),
            entry(
                "documents",
                *["title", "born", "seen", "raw", "flag", "ratio", "small", "tags"],
                searchable="title",
            ),
            entry("totals", "amount", "code", "serial"),
            entry("nothing", "secret"),
        )
    )


def test_any_catalogue_is_served_as_far_as_its_tables_allow(database_url: str) -> None:
    support.run(database_url, OWN)
    catalogue = own_catalogue()
    with busy(database_url, "off", catalogue=catalogue, rate=200) as running:
        for table in catalogue.tables:
            support.add_columns(database_url, table, keys=walk.KEYS)
        wait_for_writes(database_url, 20, "documents")
    found = fine(running)
    assert set(found.left_out) == {
        "insert into Other.pairs: no key of its own can be made for a new row",
        "column documents.tags: the runtime library has no type for text[]",
        "insert into totals: no key of its own can be made for a new row",
        "column totals.code: the runtime library has no type for character(4)",
        "update of totals.serial: no other value would be unique",
        "table nothing: it has no rows that can be read",
    }
    assert support.value(database_url, "SELECT count(*) FROM documents") != 61
    with busy(database_url, "plaintext", "dual", catalogue=catalogue, rate=200) as running:
        wait_for_writes(database_url, 20, "documents")
    fine(running)


UNKNOWN = """
CREATE TYPE mood AS ENUM ('low', 'high');
CREATE TABLE moods (
    id uuid PRIMARY KEY, note text, mood mood NOT NULL, address inet, tags text[] NOT NULL DEFAULT '{}',
    code char(4) NOT NULL);
INSERT INTO moods SELECT gen_random_uuid(), 'note ' || n, 'low', '10.0.0.1', ARRAY['a'], 'ab'
  FROM generate_series(1, 60) n;
"""


def test_types_that_the_library_does_not_know_stop_nothing(
    database_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Neither in a column that stays, nor in one that is needed for new rows and dropped later."""
    support.run(database_url, UNKNOWN)
    moods = support.table("moods", "note", "code")
    catalogue = Catalogue(tables=(moods,))
    with busy(database_url, "off", catalogue=catalogue, rate=200) as running:
        wait_for_writes(database_url, 20, "moods")
    found = fine(running)
    assert set(found.left_out) == {"column moods.code: the runtime library has no type for character(4)"}
    assert support.value(database_url, "SELECT count(*) FROM moods") != 60

    walk.switch(database_url, moods)
    walk.backup(database_url, (moods,), tmp_path, postgres.bin_dir())
    walk.approve(database_url, moods, catalogue)
    walk.drop(database_url, moods, catalogue)
    with busy(database_url, "encrypted", catalogue=catalogue, rate=200) as running:
        wait_for_writes(database_url, 20, "moods")
    found = fine(running)
    (code, insert) = sorted(found.left_out)
    assert code.startswith("column moods.code:") and insert.startswith("insert into moods:")


def test_a_lost_connection_is_no_failed_request_and_is_counted(sample_url: str) -> None:
    with busy(sample_url, "off", rate=200) as running:
        wait_for_writes(sample_url, 3)
        # Once: a request that is hit again while it is made once more does fail, for an application as well.
        support.run(
            sample_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
            APPLICATION_NAME,
        )
        wait_for_writes(sample_url, 3)
    assert fine(running).retried > 0


def test_waits_for_locks_are_seen_with_who_holds_them(sample_url: str) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'"
    with (
        busy(sample_url, "off", catalogue=TRADES) as running,
        psycopg.connect(sample_url, application_name="the tests") as holder,
    ):
        holder.execute("LOCK TABLE trades IN EXCLUSIVE MODE")
        support.until(lambda: support.value(sample_url, waiting, APPLICATION_NAME) > 1, "waits")
        threading.Event().wait(0.45)
        holder.rollback()
    found = fine(running)
    assert set(found.lock_waits) == {"relation trades held by the tests"}
    assert 0.2 < found.longest_lock_wait < 60
    # From when they were due: who waited behind the wait was late as well.
    assert found.overall.longest >= 400


def test_a_phase_that_contradicts_the_database_is_refused(sample_url: str) -> None:
    too_early = r"users is used in the phase dual, but it has no encrypted columns"
    with pytest.raises(RefusedError, match=too_early), busy(sample_url, "dual"):
        pass
    with pytest.raises(ConfigurationError, match="no phase 'double'"), busy(sample_url, "double"):
        pass
    assert support.value(sample_url, SESSIONS, f"{APPLICATION_NAME}%") == 0


def test_a_key_that_is_missing_is_said(sample_url: str) -> None:
    walk.encrypt(sample_url, TRADES.tables[0])
    # The process that makes the traffic is the same one, and had a key for this block.
    with busy(sample_url, "dual", catalogue=TRADES) as running:
        pass
    assert [one.pid for one in _kept] == [running.pid]
    missing = pytest.raises(ConfigurationError, match="ALPHAPULSE_ENCRYPTION_MASTER_KEY")
    with missing, traffic(sample_url, TRADES, ["dual"], TrafficConfig(), {}):
        pass


def test_without_a_rate_there_is_no_traffic(sample_url: str) -> None:
    with busy(sample_url, "off", rate=0) as running:
        assert running.pid is None
    assert running.measured is None


def test_what_fails_in_the_block_ends_the_traffic_and_is_what_is_raised(sample_url: str) -> None:
    with pytest.raises(ZeroDivisionError), busy(sample_url, "off", catalogue=TRADES):
        1 / 0  # noqa: B018
    sessions = f"{APPLICATION_NAME}%"
    support.until(lambda: support.value(sample_url, SESSIONS, sessions) == 0, "the end of all sessions")


_PARENT = """
import sys, time
from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.rehearsal.traffic.traffic import TrafficConfig, traffic
url, key = sys.stdin.readline().split()
environment = {"ALPHAPULSE_ENCRYPTION_MASTER_KEY": key}
with traffic(url, load_catalogue(), ["off"], TrafficConfig(rate=100), environment) as running:
    print(running.pid, flush=True)
    time.sleep(600)
"""


def test_the_load_ends_with_its_parent_and_shows_nobody_address_or_key(sample_url: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None and parent.stdout is not None
    try:
        parent.stdin.write(f"{sample_url} {KEY}\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        wait_for_writes(sample_url, 3)
        seen = Path(f"/proc/{child}")
        if seen.exists():
            shown = (seen / "cmdline").read_bytes() + (seen / "environ").read_bytes()
            assert b"traffic.application" in shown
            assert KEY.encode() not in shown and sample_url.encode() not in shown
            assert b"ALPHAPULSE" not in shown
        assert support.value(sample_url, SESSIONS, f"{APPLICATION_NAME}%") > 0
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    sessions = f"{APPLICATION_NAME}%"
    support.until(lambda: support.value(sample_url, SESSIONS, sessions) == 0, "the end of all sessions")
    with pytest.raises((ProcessLookupError, FileNotFoundError)):
        # Nobody waits for it but init, or nobody: a zombie is as good as gone.
        while "Z" not in Path(f"/proc/{child}/status").read_text().split("State:")[1][:4]:
            os.kill(child, 0)
        raise ProcessLookupError


def test_a_process_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphapulse_encryption.rehearsal.traffic.traffic._ANSWER_TIMEOUT", 0.2)
    process = _Process()
    try:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(MigrationError, match=r"has not answered for 0\.2 s"):
            process.order("end")
    finally:
        process.kill()


def test_one_process_serves_one_block_after_another(sample_url: str) -> None:
    with busy(sample_url, "off", catalogue=TRADES):
        pass
    (first,) = _kept
    assert support.value(sample_url, SESSIONS, f"{APPLICATION_NAME}%") == 0, "idle, it has no sessions"
    with busy(sample_url, "off", catalogue=TRADES):
        assert _kept == []
    assert _kept == [first]
    # One that was killed is replaced.
    os.kill(first.pid, signal.SIGKILL)
    with busy(sample_url, "off", catalogue=TRADES) as running:
        wait_for_writes(sample_url, 1)
    fine(running)


def sample(due: float, milliseconds: float, *, error: str | None = None) -> Sample:
    return Sample(due, milliseconds, "read", "plain", error, False)


def test_percentiles_are_those_of_all_samples() -> None:
    found = latency("read", "plain", [sample(0, n) for n in range(1000, 0, -1)])
    assert (found.p50, found.p95, found.p99, found.longest) == (500, 950, 990, 1000)
    one = latency("read", "plain", [sample(0, 7)])
    assert (one.p50, one.p99, one.longest) == (7, 7, 7)
    none = latency("read", "plain", [])
    assert (none.requests, none.p99) == (0, 0)


def test_moments_cover_all_the_time_and_stay_few() -> None:
    found = moments([sample(10.2, 1), sample(12.9, 3, error="x"), sample(12.1, 2)], 10, 13.5)
    assert [(m.requests, m.errors, m.p50, m.longest) for m in found] == [
        (1, 0, 1, 1),
        (0, 0, None, None),
        (2, 1, 2, 3),
        (0, 0, None, None),
    ]
    assert [m.seconds for m in found] == [1, 1, 1, 0.5]
    assert len(moments([], 0, 100_000)) <= 240
