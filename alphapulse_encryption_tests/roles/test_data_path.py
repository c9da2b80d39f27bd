"""The data path's own log-in: what code of others gets by it, and what the checklist says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.gates.findings import Checked
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.insight.live_check import live_check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.rows.verify import count_rows, verify_range
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.roles.conftest import PREFIX, Separated, run_script, script_for

USERS, TRADES = walk.CATALOGUE.table("users"), walk.CATALOGUE.table("trades")
MIGRATOR, WRITER, VERIFIER = "mia_migrates", "wes_writes", "vera_verifies"
VARIABLE = "ALPHAPULSE_WRITER_DATABASE_URL"
# Leaves behind, with the rights of the session that it runs in, a function that does what one tells it. Where it may
# not do so as it is, it tries to be another role first.
LEAVE = """
CREATE SCHEMA shops AUTHORIZATION shop;
CREATE SEQUENCE shops.ran;
GRANT ALL ON SEQUENCE shops.ran TO PUBLIC;
GRANT USAGE ON SCHEMA shops TO PUBLIC;
SET SESSION AUTHORIZATION shop;
CREATE FUNCTION shops.leave() RETURNS void LANGUAGE plpgsql AS $f$
DECLARE name text; place text;
BEGIN
    PERFORM nextval('shops.ran');
    FOREACH name IN ARRAY ARRAY['', session_user, '{prefix}owner', '{prefix}migrator', '{prefix}bookkeeper', 'postgres']
    LOOP
        FOREACH place IN ARRAY ARRAY['public', 'shops', 'alphapulse_encryption'] LOOP
            BEGIN
                IF name <> '' THEN
                    EXECUTE format('SET LOCAL ROLE %I', name);
                END IF;
                EXECUTE format('CREATE FUNCTION %I.left_behind(text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS '
                    '$g$ BEGIN EXECUTE $1; END $g$', place);
            EXCEPTION WHEN OTHERS THEN NULL;
            END;
        END LOOP;
    END LOOP;
END $f$;
CREATE FUNCTION shops.on_write() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN PERFORM shops.leave(); RETURN NEW; END';
CREATE FUNCTION shops.checked(text) RETURNS bool LANGUAGE plpgsql IMMUTABLE
    AS 'BEGIN PERFORM shops.leave(); RETURN true; END';
RESET SESSION AUTHORIZATION;
""".replace("{prefix}", PREFIX)
# What the application hangs on its table, before it gave that away.
PLANTED = {
    "a trigger": "CREATE TRIGGER planted BEFORE UPDATE ON trades FOR EACH ROW EXECUTE FUNCTION shops.on_write()",
    "a check": "ALTER TABLE trades ADD CONSTRAINT planted CHECK (shops.checked(symbol)) NOT VALID",
    "a domain": "CREATE DOMAIN shops.dom AS text CHECK (shops.checked(VALUE)); "
    "ALTER TABLE trades ALTER order_id TYPE shops.dom",
    "a cast": "CREATE TYPE shops.kind AS ENUM ('x'); CREATE FUNCTION shops.cast_to(shops.kind) RETURNS text "
    "LANGUAGE plpgsql AS 'BEGIN PERFORM shops.leave(); RETURN ''x''; END'; "
    "CREATE CAST (shops.kind AS text) WITH FUNCTION shops.cast_to(shops.kind); "
    "ALTER FUNCTION shops.cast_to OWNER TO shop; ALTER TYPE shops.kind OWNER TO shop; "
    "ALTER TABLE trades ALTER order_id TYPE shops.kind USING 'x'",
}


@pytest.fixture
def planted(separated: Separated) -> Separated:
    walk.query(separated.url, LEAVE)
    return separated


def target(of: Separated, login: str = MIGRATOR, writer: str | None = None) -> Target:
    made = walk.target(Database(of.of(login)))
    names = ("alphapulse_encryption", VARIABLE)
    data_path = None if writer is None else Database(of.of(writer), *names)
    return Target(made.database, made.catalogue, made.cipher, made.keys, made.actor, data_path)


def left_behind(url: str) -> list[tuple[Any, ...]]:
    return walk.query(
        url,
        "SELECT proowner::regrole::text, pronamespace::regnamespace::text FROM pg_proc WHERE proname = 'left_behind'",
    )


def ran(url: str) -> bool:
    return bool(walk.value(url, "SELECT is_called FROM shops.ran"))


def checklist(of: Separated, data_path: Database | None, *tables: Table) -> tuple[Checked, ...]:
    return check(Database(of.of(MIGRATOR)), tables or (TRADES,), None, data_path=data_path).findings


STEPS: dict[str, tuple[Callable[[Separated], object], str]] = {
    "add": (lambda of: add_encrypted_columns(target(of), TRADES, batch_ranges=walk.RANGES), "untouched"),
    "backfill": (lambda of: backfill_range(target(of, writer=WRITER), TRADES, 0), "added"),
    "verify": (lambda of: verify_range(target(of, VERIFIER), TRADES, 0), "encrypted"),
    "indexes": (lambda of: build_search_indexes(target(of).database, TRADES, walk.ACTOR), "added"),
    "live check": (lambda of: live_check(target(of), TRADES), "encrypted"),
    "switch": (lambda of: switch_to_ciphertext(target(of), TRADES), "encrypted"),
    "revert": (lambda of: revert_to_plaintext(target(of, writer=WRITER), TRADES), "switched"),
    "rotate": (lambda of: rotate_range(target(of, writer=WRITER), TRADES, 0), "encrypted"),
    "drop": (lambda of: walk.drop(of.of(MIGRATOR), TRADES), "switched"),
    "restore": (lambda of: restore_plaintext(target(of, writer=WRITER), TRADES), "dropped"),
}


def lead_to(of: Separated, state: str, tmp_path: Any) -> None:
    """By the roles, before anything is planted."""
    url = of.of(MIGRATOR)
    if state == "untouched":
        return
    if state == "added":
        add_encrypted_columns(target(of), TRADES, batch_ranges=walk.RANGES)
        return
    walk.encrypt(url, TRADES)
    walk.verify(of.of(VERIFIER), TRADES)
    if state == "encrypted":
        return
    walk.hand_over(url, TRADES)
    walk.backup(of.of("bob_backs_up"), (TRADES,), tmp_path / "backup", of.postgres.bin_dir())
    count_rows(target(of, VERIFIER), TRADES)
    walk.approve(of.of("ada_approves"), TRADES)
    if state == "dropped":
        walk.drop(url, TRADES)


@pytest.mark.parametrize("step", STEPS)
def test_each_step_refuses_what_was_planted_after_the_checklist(
    planted: Separated, step: str, tmp_path: Any
) -> None:
    do, state = STEPS[step]
    lead_to(planted, state, tmp_path)
    walk.query(planted.url, PLANTED["a trigger"])
    with pytest.raises(RefusedError, match=r"shops\.on_write\(\)"):
        do(planted)
    assert not ran(planted.url) and left_behind(planted.url) == []


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_is_named_and_not_run(planted: Separated, what: str) -> None:
    walk.query(planted.url, "ALTER TABLE trades DROP CONSTRAINT IF EXISTS planted")
    walk.query(planted.url, PLANTED[what])
    # It ran as the superuser who planted it here.
    places = ("public", "shops", "alphapulse_encryption")
    left = ", ".join(f"{place}.left_behind(text)" for place in places)
    walk.query(planted.url, f"DROP FUNCTION IF EXISTS {left}")
    walk.query(planted.url, "SELECT setval('shops.ran', 1, false)")
    # That of a domain has run just now, by who made it.
    for _, place in left_behind(planted.url):
        walk.query(planted.url, f"DROP FUNCTION {place}.left_behind(text)")
    blockers = [f for f in checklist(planted, None) if f.level == "blocker"]
    assert any("shops." in blocker.message and "shop" in blocker.message for blocker in blockers)
    with pytest.raises(RefusedError, match="shops"):
        add_encrypted_columns(target(planted), TRADES, batch_ranges=walk.RANGES)
    assert not ran(planted.url)
    # The script names it, and does not take it over.
    script = script_for(planted.url)
    run_script(planted.postgres, planted.url, script)
    assert "\n-- ALTER" in script
    assert walk.query(
        planted.url,
        "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'shops'::regnamespace",
    ) == [("shop",)]


def unhindered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had looked: what the roles alone keep from happening."""
    for module in ("schema.definition", "rows.engine", "steps.columns"):
        monkeypatch.setattr(
            f"alphapulse_encryption.migration.{module}.refuse_foreign_code", lambda *_, **__: None
        )


@pytest.mark.parametrize("writer", [None, WRITER])
def test_code_that_runs_as_the_writer_gets_nothing(
    planted: Separated, monkeypatch: pytest.MonkeyPatch, writer: str | None
) -> None:
    """Were the owners not looked at: the migrator's session leaves a way to the tables, the writer's does not."""
    unhindered(monkeypatch)
    add_encrypted_columns(target(planted), TRADES, batch_ranges=walk.RANGES)
    walk.query(planted.url, PLANTED["a trigger"])
    walk.query(planted.url, "ALTER TABLE trades ENABLE ALWAYS TRIGGER planted")
    for number in range(walk.RANGES):
        backfill_range(target(planted, writer=writer), TRADES, number)
    assert ran(planted.url)
    shop = planted.of("shop")
    drop = "SELECT public.left_behind('ALTER TABLE trades DROP COLUMN fee_encrypted CASCADE')"
    if writer is None:
        walk.query(shop, drop)
        assert "fee_encrypted" not in walk.columns_of(planted.url, "trades")
        return
    # Nothing but what the application can make by itself.
    assert all(row == ("shop", "shops") for row in left_behind(planted.url))
    with pytest.raises(psycopg.Error):
        walk.query(shop, drop)
    assert "fee_encrypted" in walk.columns_of(planted.url, "trades")
    rows = "SELECT count(*) FROM trades WHERE fee IS NOT NULL AND fee_encrypted IS NULL"
    assert walk.value(planted.url, rows) == 0


def test_the_checklist_tells_of_the_log_in(separated: Separated) -> None:
    walk.encrypt(separated.of(MIGRATOR), TRADES)

    def told(data_path: Database | None, level: str) -> str:
        found = checklist(separated, data_path)
        return " ".join(f.message for f in found if f.subject in ("data path", "trades") and f.level == level)

    def of(login: str, database: str | None = None) -> Database:
        url, name = separated.of(login), separated.url.split("?")[0].rpartition("/")[2]
        return Database(url.replace(f"/{name}?", f"/{database or name}?", 1), "x", VARIABLE)

    assert VARIABLE in told(Database(separated.of(MIGRATOR)), "warning")
    assert WRITER in told(of(WRITER), "ok") and told(of(WRITER), "blocker") == ""
    # The application's, a stranger's, a superuser's, another database's.
    assert "UPDATE" in told(of("petra_plans"), "blocker")
    assert f"{PREFIX}owner" in told(of("max_migrates"), "warning")
    assert "superuser" in told(of("postgres"), "warning")
    assert VARIABLE in told(of(WRITER, "postgres"), "blocker")
    walk.query(separated.url, "ALTER TABLE trades ENABLE ROW LEVEL SECURITY")
    assert "BYPASSRLS" in told(of(WRITER), "blocker")
    walk.query(separated.url, "ALTER TABLE trades DISABLE ROW LEVEL SECURITY")
    walk.query(separated.url, f"REVOKE UPDATE (fee_encrypted) ON trades FROM {PREFIX}writer")
    assert 'UPDATE ("fee_encrypted")' in told(of(WRITER), "blocker")
    run_script(separated.postgres, separated.url, script_for(separated.url))
    assert told(of(WRITER), "blocker") == ""


def test_a_writer_of_another_database_writes_nothing(separated: Separated, sample_url: str) -> None:
    walk.encrypt(separated.of(MIGRATOR), TRADES)
    walk.query(separated.url, "UPDATE trades SET fee_encrypted = NULL, fee = fee + 1 WHERE id < 10")
    walk.encrypt(sample_url, TRADES)
    walk.query(sample_url, "UPDATE trades SET fee_encrypted = NULL, fee = fee + 1 WHERE id < 10")
    made = target(separated)
    elsewhere = Target(
        made.database, made.catalogue, made.cipher, made.keys, made.actor, Database(sample_url, "x", VARIABLE)
    )
    with pytest.raises(ConfigurationError, match=VARIABLE):
        backfill_range(elsewhere, TRADES, 0)
    pending = "SELECT count(*) FROM trades WHERE fee_encrypted IS NULL AND fee IS NOT NULL"
    assert walk.value(sample_url, pending) > 0 and walk.value(separated.url, pending) > 0
