"""What a person sees and can do in Dagster's UI after the demo."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from psycopg.rows import dict_row

from alphapulse_encryption_tests.browser import conftest, launchpad
from alphapulse_encryption_tests.browser.demonstration import Demonstration
from alphapulse_encryption_tests.browser.pages import GREEN, Pages
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.leaks import Scanner

# One demo for all of them: with pytest-xdist they stay together.
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

STAGES = {
    "step_1_prepare": ["preflight", "backup"],
    "step_2_columns": ["encrypted_columns"],
    "step_3_migrate": ["encrypted_data", "search_indexes"],
    "step_4_verify": ["verified_data", "verified_table"],
    "step_6_views": ["compatibility_views"],
    "step_8_drop": ["plaintext_dropped"],
}
# No stage of the guide: it may come at any time after them.
REHEARSAL = "rehearsal"
UPKEEP, ROTATION = "upkeep", "rotated_data"
# Beside the drop, not before it: neither depends on the other.
MONITOR, SLOW = "step_7_monitor", "slow_encrypted_queries"
MATERIALIZABLE = sorted(
    [ROTATION, SLOW]
    + [asset for assets in STAGES.values() for asset in assets if asset != "plaintext_dropped"]
)
TABLES = ["trading_accounts", "positions", "trades", "users", "api_keys"]
RANGES = [f"{number:02d}" for number in range(conftest.RANGES)]


def test_the_graph_shows_the_stages_of_the_guide_from_left_to_right(wide_pages: Pages) -> None:
    pages = wide_pages
    pages.open_graph()
    groups = pages.groups()
    assert groups.pop(UPKEEP).left > groups["step_4_verify"].right
    assert groups.pop(MONITOR).left > groups["step_6_views"].right
    del groups[REHEARSAL]
    assert sorted(groups, key=lambda name: groups[name].left) == list(STAGES)
    for left, right in zip(list(STAGES), list(STAGES)[1:], strict=False):
        assert groups[left].right < groups[right].left, (left, right)
    assert pages.assets() == {}

    pages.expand_groups()
    groups, assets = pages.groups(), pages.assets()
    assert groups[UPKEEP].holds(assets.pop(ROTATION))
    assert groups[MONITOR].holds(assets.pop(SLOW))
    assert groups[REHEARSAL].holds(assets.pop("staging_rehearsal"))
    assert sorted(assets, key=lambda name: assets[name].left) == [
        asset for stage in STAGES.values() for asset in stage
    ]
    for stage, members in STAGES.items():
        assert {name for name, box in assets.items() if groups[stage].holds(box)} == set(members)


@pytest.mark.parametrize("asset", ["encrypted_data", "verified_data"])
def test_the_grid_of_tables_and_batch_ranges_is_green(pages: Pages, asset: str) -> None:
    pages.open_partitions(asset)
    counts = pages.partition_counts()
    assert counts == {
        "Failed": 0,
        "Materialized": len(TABLES) * len(RANGES),
        "Materializing": 0,
        "Missing": 0,
    }
    assert list(pages.dimension("batch_range").items()) == [(name, GREEN) for name in RANGES]
    assert list(pages.dimension("table").items()) == [(name, GREEN) for name in TABLES]


def test_one_partition_can_be_run_again(pages: Pages, demo: Demonstration) -> None:
    with psycopg.connect(demo.database_url, autocommit=True, row_factory=dict_row) as connection:
        changed = make_pending(connection, "Zoë-Ålfhildr 'neu'")
        pending, untouched = users(connection), ranges(connection)
        assert pending[changed]["first_name_encrypted"] is None

        assert run_again(pages) == "1 row encrypted"
        encrypted = users(connection)
        assert opened(demo, encrypted[changed]["first_name_encrypted"]) == "Zoë-Ålfhildr 'neu'"
        assert {key: row for key, row in encrypted.items() if key != changed} == {
            key: row for key, row in pending.items() if key != changed
        }
        assert without_ciphertext(encrypted[changed]) == without_ciphertext(pending[changed])
        processed = untouched["users", 3]
        processed["rows_processed"] += 1
        processed["values_processed"] += 1
        assert ranges(connection) == untouched


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc here")
def test_none_of_its_processes_has_the_key_in_its_environment(demo: Demonstration) -> None:
    """Nor have the runs that the tests above have started: they are the code server's."""
    scanner = Scanner({"master key": base64.urlsafe_b64decode(demo.master_key)})
    services = {"alphapulse_encryption.ui.server": 0, "dagster-daemon": 0, "code-server": 0}
    for service in psutil.Process(demo.pid).children():
        (name,) = {name for name in services if name in " ".join(service.cmdline())}
        for process in (service, *service.children(recursive=True)):
            services[name] += 1
            given = Path(f"/proc/{process.pid}/environ").read_bytes()
            assert b"ALPHAPULSE_STATE_DIR=" in given
            assert scanner.data(given, name) == [], (name, process.cmdline())
            assert scanner.data("\0".join(process.cmdline()).encode(), name) == []
    assert min(services.values()) >= 1, services


def test_nobody_can_materialize_the_drop(wide_pages: Pages) -> None:
    pages = wide_pages
    assert pages.can_materialize("verified_table")
    assert not pages.can_materialize("plaintext_dropped")
    pages.open_graph()
    assert pages.materialize_all_count() == len(MATERIALIZABLE)
    assert sorted(pages.materialize_all_assets()) == MATERIALIZABLE


def test_the_jobs_are_listed(pages: Pages) -> None:
    stages = {"run_preflight", "take_backup", "add_columns", "migrate_data", "build_indexes", "verify_data"}
    stages |= {"verify_tables", "create_views"}
    by_hand = {"switch_to_ciphertext", "revert_to_plaintext", "approve_drop", "drop_unencrypted"}
    assert stages | by_hand | {"restore_plaintext"} <= set(pages.jobs())


@pytest.mark.long
def test_drop_and_restore_by_the_launchpad_alone(pages: Pages, demo: Demonstration) -> None:
    table, columns = (
        "trading_accounts",
        ["account_number", "api_key_reference", "available_balance", "balance"],
    )

    def launch(job: str, config: str) -> str:
        assert all(f"{job_op}:" in pages.open_job(job) for job_op in ("ops", "config"))
        pages.go_on_to_launchpad()
        pages.type_config(config)
        return pages.wait_for_end(pages.launch_run())

    with psycopg.connect(demo.database_url, autocommit=True) as connection:

        def present() -> list[str]:
            rows = connection.execute(
                "SELECT column_name FROM information_schema.columns WHERE table_name = %s AND column_name = ANY(%s) "
                "ORDER BY 1",
                [table, columns],
            ).fetchall()
            return [name for (name,) in rows]

        def plaintext() -> list[tuple[Any, ...]]:
            return connection.execute(
                "SELECT id, account_number, balance::text, available_balance::text, api_key_reference "
                "FROM trading_accounts ORDER BY id"
            ).fetchall()

        before = plaintext()
        assert launch("switch_to_ciphertext", launchpad.tables("switch", table)) == "Success"
        # No approval without the name of the table.
        assert launch("approve_drop", launchpad.approval(table, "")) == "Failure"
        assert connection.execute("SELECT count(*) FROM alphapulse_encryption.approvals").fetchone() == (0,)
        assert plaintext() == before

        assert launch("approve_drop", launchpad.approval(table, table)) == "Success"
        assert connection.execute(
            "SELECT approver, consumed_at FROM alphapulse_encryption.approvals"
        ).fetchall() == [("Ada Example", None)]
        assert present() == columns
        assert launch("drop_unencrypted", launchpad.drop(table, "Grace Example")) == "Success"
        assert present() == []
        (sealed,) = connection.execute(
            "SELECT account_number_encrypted FROM trading_accounts WHERE id = %s", [before[0][0]]
        ).fetchall()[0]
        master_key = base64.urlsafe_b64decode(demo.master_key)
        key = independent.derive(master_key, "trading_account", 1)
        assert independent.open_envelope(key, sealed) == before[0][1]

        assert launch("restore_plaintext", launchpad.tables("restore", table)) == "Success"
        assert present() == columns
        assert plaintext() == before


def run_again(pages: Pages) -> str:
    """Run 03|users from the grid.

    Returns:
        The outcome that the page shows for the partition then.
    """
    pages.open_partitions("encrypted_data")
    before = pages.select_partition("03", "users")
    assert pages.begin_to_materialize() == {"batch_range": "03", "table": "users", "selection": "1 partition"}
    launched = pages.launch()
    assert launched != before.run
    assert pages.wait_for_end(launched) == "Success"
    pages.open_partitions("encrypted_data")
    after = pages.select_partition("03", "users")
    assert (after.state, after.run) == ("Materialized", launched)
    return after.metadata["outcome"]


def make_pending(connection: psycopg.Connection[dict[str, Any]], name: str) -> int:
    """Change a user of batch range 03, as an application does that knows nothing of encryption."""
    row = connection.execute(
        "UPDATE users SET first_name = %s WHERE id = ("
        " SELECT max(u.id) FROM users u, alphapulse_encryption.ranges r WHERE r.table_name = "
        "'users' AND r.batch_range = 3"
        " AND u.id > r.lower_key[1]::bigint AND u.id <= r.upper_key[1]::bigint) RETURNING id",
        [name],
    ).fetchone()
    assert row is not None
    return int(row["id"])


def users(connection: psycopg.Connection[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """All users, each with the transaction that wrote the row last."""
    rows = connection.execute("SELECT *, xmin::text AS written_by FROM users").fetchall()
    return {row["id"]: row for row in rows}


def ranges(connection: psycopg.Connection[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """All batch ranges, without times."""
    rows = connection.execute(
        "SELECT table_name, batch_range, lower_key, upper_key, status, position, rows_processed,"
        " values_processed, error_message FROM alphapulse_encryption.ranges"
    ).fetchall()
    return {(row["table_name"], row["batch_range"]): row for row in rows}


def without_ciphertext(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in {"first_name_encrypted", "written_by"}}


def opened(demo: Demonstration, envelope: str) -> str:
    """A first name from its envelope, by the design alone."""
    master_key = base64.urlsafe_b64decode(demo.master_key)
    return independent.open_envelope(independent.derive(master_key, "user_personal", 1), envelope)
