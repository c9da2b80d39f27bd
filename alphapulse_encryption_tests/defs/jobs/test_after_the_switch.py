"""After the switch, on a database of somebody else's: what the commands print and the runs leave in the UI."""

from __future__ import annotations

import json
from typing import Any

import dagster as dg
import psycopg

from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption_tests.place import Place

ASSET = "slow_encrypted_queries"


def test_the_commands(theirs: Place) -> None:
    too_early = theirs.fails(1, "--analyze", "--rebuild-indexes", "all", "--table", "sessions")
    assert "✗ Table sessions has no encrypted columns yet" in too_early.stdout
    theirs.succeeds("--add-columns", "--migrate-data")
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        # What a killed rebuild leaves.
        connection.execute("CREATE INDEX idx_sessions_token_ccnew ON sessions (token_search)")
        connection.execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_sessions_token_ccnew'::regclass"
        )
        connection.execute("DELETE FROM pg_statistic WHERE starelid = 'sessions'::regclass")
        before = nodes(connection)
        lines = theirs.succeeds("--analyze", "--rebuild-indexes", "encrypted", "--table", "sessions")
        assert lines == ["✓ Rebuilt the indexes: sessions", "✓ Analyzed: sessions"]
        after = nodes(connection)
        gone = {"idx_sessions_token_ccnew"}
        assert set(before) - set(after) == gone
        changed = {name for name in after if before[name] != after[name]}
        assert {"idx_sessions_token", "sessions_encryption_pending"} == changed
        statistics = connection.execute(
            "SELECT count(*) FROM pg_stats WHERE tablename = 'sessions'"
        ).fetchone()
        assert statistics is not None and statistics[0] > 3
    not_said = theirs.fails(2, "--rebuild-indexes")
    assert "expected one argument" in not_said.stderr


def nodes(connection: psycopg.Connection[tuple[Any, ...]]) -> dict[str, int]:
    return dict(
        connection.execute(
            "SELECT c.relname, c.relfilenode FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid "
            "WHERE x.indrelid = 'sessions'::regclass"
        ).fetchall()
    )


def test_slow_queries(theirs: Place) -> None:
    missing = theirs.fails(2, "--slow-queries")
    assert "pg_stat_statements is not installed in this database" in missing.stderr
    with theirs.instance() as instance:
        assert not materialize(theirs, instance).success
        beside = materialize(theirs, instance, "preflight")
        assert beside.success
        assert [event.asset_key for event in beside.get_asset_materialization_events()] == [
            dg.AssetKey("preflight")
        ]
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION pg_stat_statements")
        theirs.succeeds("--add-columns")
        connection.execute("SELECT pg_stat_statements_reset()")
        for _ in range(20):
            connection.execute("SELECT payload FROM sessions WHERE token = 'canary' LIMIT 1")
        with Database(theirs.url).session("test") as own:
            own.execute("SELECT count(*) FROM public.sessions")
        connection.execute('SELECT "E-Mail" AS "canary" FROM crm."Kunde" WHERE "geburts Tag" IS NULL')
        lines = theirs.succeeds("--slow-queries", "--limit", "1")
        assert lines[0].startswith("Statements on sessions, crm.order_lines, crm.Kunde since 20")
        assert sum(" ms in " in line for line in lines) == 1
        assert "  … and 1 more: --limit 2" in lines
        lines = theirs.succeeds("--slow-queries", "--table", "sessions")
        (shown,) = [line for line in lines if " ms in " in line]
        assert " ms in 20 calls (" in shown
        assert shown.endswith(": SELECT payload FROM sessions WHERE token = $1 LIMIT $2")
        assert (
            "! reads sessions.token by equality and not token_search: the plaintext, which it will not find"
            in (lines[2])
        )
        assert any("of this tool took" in line for line in theirs.succeeds("--slow-queries"))

        document = json.loads("\n".join(theirs.succeeds("--slow-queries", "--json", "--limit", "1")))
        assert (document["kind"], document["remarks"]) == ("slow-queries", [])
        assert len(document["report"]["queries"]) == 1 and document["report"]["since"].startswith("20")

        with theirs.instance() as instance:
            for seconds in (0.0, 0.01):
                for _ in range(12):
                    connection.execute("SELECT payload, pg_sleep(%s) FROM sessions LIMIT 1", [seconds])
                assert materialize(theirs, instance).success
            before, now = metadata(instance)
    assert before["queries"].value == now["queries"].value == 3
    worst = now["worst_mean_ms"].value
    assert isinstance(worst, float) and 5 < worst < 1_000
    assert now["slow_queries"].value == 0
    assert isinstance(now["total_ms_crm.Kunde"].value, float)
    assert before["worse_than_last_time"].value == "none"
    told = str(now["worse_than_last_time"].value)
    assert told.startswith("- worse than last time: 1") and "in 12 calls since, 0." in told
    assert told.endswith("before: SELECT payload, pg_sleep($1) FROM sessions LIMIT $2")
    table = now["statements"]
    assert isinstance(table, dg.TableMetadataValue)
    assert {record.data["of"] for record in table.records} == {"application", "this tool"}
    assert "canary" not in str(before) + str(now)


def materialize(theirs: Place, instance: dg.DagsterInstance, *others: str) -> dg.ExecuteInProcessResult:
    job = theirs.definitions().resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(name) for name in (ASSET, *others)],
        raise_on_error=False,
    )


def metadata(instance: dg.DagsterInstance) -> list[dict[str, dg.MetadataValue]]:
    """Of both runs, the earlier first."""
    records = instance.fetch_materializations(dg.AssetKey(ASSET), limit=2).records
    return [
        dict(record.asset_materialization.metadata)
        for record in reversed(records)
        if record.asset_materialization is not None
    ]
