"""The guide's flags on a database of somebody else's: what they print, what they leave behind, how they end."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import dagster as dg
import psycopg
import pytest

from alphapulse_encryption.bounds import LARGEST_BATCH_SIZE, MOST_WORKERS
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place

ADDED = [
    "Adding encrypted columns to tables...",
    "✓ Added column sessions.token_encrypted",
    "✓ Added column sessions.token_search",
    "✓ Added column sessions.payload_encrypted",
    "✓ Added column crm.order_lines.price_encrypted",
    "✓ Added column crm.order_lines.note_encrypted",
    "✓ Added column crm.Kunde.E-Mail_encrypted",
    "✓ Added column crm.Kunde.E-Mail_search",
    "✓ Added column crm.Kunde.geburts Tag_encrypted",
    "  Indexes for search are built after the data, with --migrate-data.",
]
CREATED_INDEXES = [
    "✓ Created index idx_sessions_token",
    "✓ Created index sessions_encryption_pending",
    "✓ Created index order_lines_encryption_pending",
    "✓ Created index idx_Kunde_EMail",
    "✓ Created index Kunde_encryption_pending",
]
CREATED_VIEWS = [
    "Creating compatibility views...",
    "✓ Created view v_sessions",
    "✓ Created view v_sessions_safe",
    "✓ Created view v_order_lines",
    "✓ Created view v_order_lines_safe",
    "✓ Created view v_Kunde",
    "✓ Created view v_Kunde_safe",
]


def summary(tables: int, columns: int, failed: int = 0) -> list[str]:
    """What --verify prints."""
    return [
        "Migration verification results:",
        f"  Total tables: {tables}",
        f"  Total columns: {columns}",
        f"  Successful: {columns - failed}",
        f"  Failed: {failed}",
    ]


NOTHING_TO_DO = [
    *("Adding encrypted columns to tables...", "Nothing to do: every encrypted column is there."),
    *("Migrating data...", "Nothing to do: every value is encrypted."),
    *summary(3, 6),
    *("Creating compatibility views...", "Nothing to do: every view is there."),
]
APPROVAL = ("--approver", "Ada", "--reason", "it has served for a month")


def query(url: str, text: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(text.encode()).fetchall()


def test_the_largest_batches_and_the_most_workers(theirs: Place) -> None:
    """What the options take, the run takes as well."""
    most = ("--batch-size", str(LARGEST_BATCH_SIZE), "--workers", str(MOST_WORKERS))
    theirs.succeeds("--add-columns", "--migrate-data", "--table", "sessions", *most)
    assert theirs.succeeds("--verify", "--table", "sessions", *most[2:])[1:5] == summary(1, 2)[1:]


def test_flag_by_flag(theirs: Place) -> None:
    before = {table: another.plaintexts(theirs.url, table) for table in another.TABLES}

    not_begun = theirs.fails(1, "--verify")
    assert not_begun.stdout.splitlines()[:5] == summary(3, 6, failed=6)
    assert "✗" in not_begun.stdout and "--add-columns" in not_begun.stdout

    assert theirs.succeeds("--add-columns") == ADDED
    nothing_encrypted = theirs.fails(1, "--verify", "--table", "crm.Kunde")
    assert nothing_encrypted.stdout.splitlines()[:5] == summary(1, 2, failed=2)
    assert "✗ crm.Kunde.E-Mail: 45 values pending" in nothing_encrypted.stdout

    # Batches of seven, of one table: the others are not begun.
    one = theirs.succeeds("--migrate-data", "--table", "crm.order_lines", "--batch-size", "7")
    assert [line.split(" in ")[0] for line in one] == [
        "Migrating data...",
        "✓ Migrated crm.order_lines: 90 rows",
        "✓ Created index order_lines_encryption_pending",
    ]
    assert another.decrypted(theirs.url, "crm.order_lines") == before["crm.order_lines"]
    assert {row[-1] for row in another.decrypted(theirs.url, "sessions")} == {None}

    rest = theirs.succeeds("--migrate-data")
    assert [line.split(" in ")[0] for line in rest] == [
        "Migrating data...",
        "✓ Migrated sessions: 60 rows",
        "✓ Migrated crm.Kunde: 50 rows",
        *(line for line in CREATED_INDEXES if "order_lines" not in line),
    ]
    for table, rows in before.items():
        assert another.plaintexts(theirs.url, table) == rows
        assert another.decrypted(theirs.url, table) == rows
    watched = query(theirs.url, "SELECT DISTINCT status, completed_at IS NULL FROM encryption_migrations")
    assert watched == [("completed", False)]
    assert query(
        theirs.url,
        "SELECT column_name, records_processed::int FROM encryption_migrations WHERE table_name = 'crm.Kunde' "
        "ORDER BY 1",
    ) == [("E-Mail", 45), ("geburts Tag", 50)]

    assert theirs.succeeds("--verify") == summary(3, 6)

    assert theirs.succeeds("--create-views") == CREATED_VIEWS
    assert theirs.succeeds("--create-views", "--add-columns", "--migrate-data", "--verify") == NOTHING_TO_DO
    assert query(theirs.url, 'SELECT count(*)::int FROM crm."v_Kunde" WHERE "geburts Tag" LIKE \'{%\'') == [
        (50,)
    ]

    unapproved = theirs.fails(1, "--drop-unencrypted", "--confirm")
    assert "✗" in unapproved.stdout and "nothing was changed" in unapproved.stdout
    assert another.plaintexts(theirs.url, "sessions") == before["sessions"]
    _runs_are_in_the_instance(theirs)


def _runs_are_in_the_instance(theirs: Place) -> None:
    with theirs.instance() as instance:
        runs = instance.get_runs()
        assert {run.job_name for run in runs} == {
            *("add_columns", "migrate_data", "build_indexes", "verify_data", "verify_tables", "create_views"),
            "drop_unencrypted",
        }
        migrated = [
            run.tags["dagster/asset_partition_range_start"]
            + " to "
            + run.tags["dagster/asset_partition_range_end"]
            for run in reversed(runs)
            if run.job_name == "migrate_data"
        ]
        once = [f"00|{table} to 01|{table}" for table in another.TABLES]
        assert migrated == [once[1], *once, *once]
        # The UI finds the job's code location by this.
        origins = {run.remote_job_origin for run in runs}
        assert {origin.location_name for origin in origins if origin} == {"alphapulse_encryption"}
        assert None not in origins
        dropped = next(run for run in runs if run.job_name == "drop_unencrypted")
        assert dropped.status is dg.DagsterRunStatus.FAILURE
        assert dropped.tags["dagster/max_retries"] == "0"
        assert dropped.tags.get("dagster/will_retry", "false") == "false"
        parts = {f"{number:02d}|{table}" for number in range(2) for table in another.TABLES}
        for asset, partitions in {
            "encrypted_columns": set(another.TABLES),
            "encrypted_data": parts,
            "search_indexes": set(another.TABLES),
            "verified_data": parts,
            "verified_table": set(another.TABLES),
            "compatibility_views": set(another.TABLES),
            "plaintext_dropped": set(),
        }.items():
            assert instance.get_materialized_partitions(dg.AssetKey(asset)) == partitions, asset


@pytest.mark.long
def test_flags_together_then_switch_drop_and_restore(theirs: Place) -> None:
    table = "crm.Kunde"
    before = another.plaintexts(theirs.url, table)
    columns_before = _columns(theirs.url)

    # In the guide's order, whatever order they are given in.
    lines = theirs.succeeds(
        *("--create-views", "--verify", "--migrate-data", "--add-columns", "--backup", "--preflight")
    )
    assert lines.index(ADDED[0]) > next(i for i, line in enumerate(lines) if line.startswith("  sha256: "))
    begin = lines.index(ADDED[0])
    assert lines[begin : begin + len(ADDED)] == ADDED
    verified = lines.index("Migration verification results:")
    assert lines[verified - len(CREATED_INDEXES) : verified] == CREATED_INDEXES
    assert lines[verified:] == [*summary(3, 6), *CREATED_VIEWS]
    with theirs.instance() as instance:
        order = list(dict.fromkeys(run.job_name for run in reversed(instance.get_runs())))
    assert order == [
        *("run_preflight", "take_backup", "add_columns", "migrate_data", "build_indexes"),
        *("verify_data", "verify_tables", "create_views"),
    ]

    people = another.ROWS[table]
    mails, birthdays = (
        sum(row[column] is not None for row in another.plaintexts(theirs.url, table)) for column in (1, 2)
    )
    used = theirs.succeeds("--key-usage")
    assert len(used) == sum(len(columns) for *_, columns in another.TABLES.values())
    assert used[:2] == [
        f"✓ customer_birthday, version 1: {birthdays} values encrypted (0.0000% of 2^32)",
        f"✓ customer_mail, version 1: {mails} values encrypted (0.0000% of 2^32)",
    ]
    assert 0 < mails < birthdays == people

    # One log-in does both here.
    theirs.succeeds("--set", "two_person_rule=names")
    approve = ("--approve-drop", "--table", table, *APPROVAL, "--confirmation")
    early = theirs.fails(1, *approve, table)
    assert "✗" in early.stdout and "Switch it first" in early.stdout

    assert theirs.succeeds("--switch-to-encrypted", "--table", table) == [
        f"✓ Switched to the encrypted columns: {table}"
    ]
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        # The application may now write ciphertext alone: NOT NULL and the like do not stand in its way.
        connection.execute(
            'INSERT INTO crm."Kunde" ("KundenNr", "geburts Tag_encrypted") '
            'SELECT 51, "geburts Tag_encrypted" FROM crm."Kunde" WHERE "KundenNr" = 1'
        )
    mistyped = theirs.fails(1, *approve, "crm.kunde", "--switch-to-encrypted")
    assert mistyped.stdout.startswith(f"Nothing to do: {table}\n")
    assert "Type crm.Kunde exactly" in mistyped.stdout
    assert theirs.succeeds("--approvals") == ["There is no approval."]

    same = theirs.fails(
        1, "--drop-unencrypted", "--confirm", "--operator", "ada", *approve, table, "--verify"
    )
    assert "Ada approved the drop of crm.Kunde, so somebody else has to carry it out" in same.stdout
    taken_back = theirs.succeeds("--revoke-approval", "1", "--operator", "Grace", "--reason", "not yet")
    assert taken_back == ["✓ Revoked approval 1"]
    (listed,) = theirs.succeeds("--approvals")
    assert listed.startswith(f"approval 1 of {table}: revoked by Grace at ")
    assert listed.endswith(": it has served for a month")
    revoked = theirs.fails(1, "--drop-unencrypted", "--confirm", "--operator", "Grace", "--table", table)
    assert "the last one was revoked" in revoked.stdout

    done = theirs.succeeds(
        "--drop-unencrypted", "--confirm", "--operator", "Grace", *approve, table, "--verify"
    )
    assert done[:5] == summary(1, 2)
    assert done[-2:] == [
        f"✓ Approved by Ada: the plaintext of {table} may be dropped, once",
        f"✓ Dropped the unencrypted columns: {table}",
    ]
    gone = {("Kunde", "E-Mail"), ("Kunde", "geburts Tag")}
    assert gone.isdisjoint(_columns(theirs.url))
    inserted = ("51", None, before[0][2])
    assert another.decrypted(theirs.url, table) == [*before, inserted]
    approved = query(
        theirs.url, "SELECT approver, reason, consumed_by FROM alphapulse_encryption.approvals ORDER BY id"
    )
    reason = "it has served for a month"
    assert approved == [("Ada", reason, None), ("Ada", reason, "Grace")]
    with theirs.instance() as instance:
        assert instance.get_materialized_partitions(dg.AssetKey("plaintext_dropped")) == {table}

    # The drop left the values in the files; the erasure says what it found there before and after.
    mistyped = theirs.fails(1, "--erase-dropped", "--table", table, "--confirmation", "crm.kunde")
    assert "Type crm.Kunde exactly" in mistyped.stdout
    erased = theirs.succeeds("--erase-dropped", "--table", table, "--confirmation", table)
    assert erased[0] == f"Erasing what was dropped from {table}: nobody reads or writes it meanwhile..."
    assert erased[1].startswith(f"✓ Erased what was dropped: {table} rewritten in ")
    heap = next(line for line in erased if line.startswith("    crm.Kunde: heap: "))
    assert re.fullmatch(r"    crm\.Kunde: heap: not found, before: [1-9]\d*", heap)
    assert "@example.org" not in "".join(erased)
    assert another.decrypted(theirs.url, table) == [*before, inserted]

    # Again: nothing to do. A table that nobody approved is refused still.
    again = theirs.fails(1, "--drop-unencrypted", "--confirm", "--table", table, "--table", "sessions")
    assert again.stdout.startswith(f"Nothing to do: {table}\n✗ ")
    assert another.decrypted(theirs.url, "sessions") == another.plaintexts(theirs.url, "sessions")
    assert theirs.succeeds("--add-columns", "--migrate-data", "--verify", "--create-views") == NOTHING_TO_DO

    assert theirs.succeeds("--restore-plaintext", "--table", table) == [
        f"✓ Restored the plaintext columns: {table}"
    ]
    assert another.plaintexts(theirs.url, table) == [*before, inserted]
    ours = {name for name in _columns(theirs.url) if name not in columns_before}
    assert columns_before <= _columns(theirs.url)
    assert {
        column.rpartition("_")[2] for name, column in ours if not name.startswith(("v_", "encryption_"))
    } == {
        "encrypted",
        "search",
    }
    assert theirs.succeeds("--restore-plaintext", "--verify") == [
        *summary(3, 6),
        *(f"Nothing to do: {name}" for name in another.TABLES),
    ]
    # Guards and views go, the encrypted columns stay.
    for outcome in ("✓ Reverted to the plaintext columns", "Nothing to do"):
        assert theirs.succeeds("--revert-to-plaintext") == [f"{outcome}: {name}" for name in another.TABLES]
    ours = {name for name in _columns(theirs.url) if name not in columns_before}
    assert not any(name.startswith("v_") for name, _ in ours)
    assert another.plaintexts(theirs.url, table) == [*before, inserted]


def _columns(url: str) -> set[tuple[Any, ...]]:
    return set(
        query(
            url,
            "SELECT table_name, column_name FROM information_schema.columns "
            "WHERE table_schema IN ('public', 'crm')",
        )
    )


def test_a_second_try_says_what_it_cleared_of_the_first(theirs: Place) -> None:
    table = ("--table", "sessions")
    theirs.succeeds("--add-columns", "--migrate-data", *table)
    theirs.succeeds("--revert-to-plaintext", *table)
    ((rows,),) = query(theirs.url, "SELECT count(*)::int FROM sessions WHERE token_encrypted IS NOT NULL")
    assert rows > 1
    assert theirs.succeeds("--add-columns", *table) == [
        ADDED[0],
        "✓ Put the guard of sessions in its place again",
        f"✓ Cleared the ciphertext of {rows} rows of sessions, which had no guard since the revert: --migrate-data "
        "encrypts them again",
    ]
    assert query(theirs.url, "SELECT count(*)::int FROM sessions WHERE token_encrypted IS NOT NULL") == [(0,)]
    with theirs.instance() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("encrypted_columns"))
    assert event is not None and event.asset_materialization is not None
    told = {name: value.value for name, value in event.asset_materialization.metadata.items()}
    assert told["outcome"] == f"the ciphertext of {rows} rows cleared"
    assert told["rows_cleared_since_revert"] == rows
    assert theirs.succeeds("--add-columns", *table) == NOTHING_TO_DO[:2]


@pytest.mark.long
def test_damage_is_found_and_named_by_its_key(theirs: Place) -> None:
    theirs.succeeds("--add-columns", "--migrate-data", "--table", "sessions", "--table", "crm.order_lines")
    canary = "CANARY-7f3a"
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        # Past the guards, as a careless superuser would.
        connection.execute(support.BEHIND)
        (swapped,) = connection.execute(
            "UPDATE sessions SET token_encrypted = (SELECT token_encrypted FROM sessions WHERE id = md5('1')::uuid) "
            "WHERE id = md5('2')::uuid RETURNING id::text"
        ).fetchone() or (None,)
        (rewritten,) = connection.execute(
            f"UPDATE sessions SET token = '{canary}' WHERE id = md5('3')::uuid RETURNING id::text".encode()
        ).fetchone() or (None,)
        connection.execute(
            f"UPDATE crm.order_lines SET note_encrypted = '{canary}' WHERE (order_id, line) = (5, 3)".encode()
        )
        connection.execute(
            "UPDATE crm.order_lines SET price_encrypted = NULL WHERE (order_id, line) = (6, 1)"
        )
    done = theirs.fails(1, "--verify", "--table", "sessions", "--table", "crm.order_lines")
    lines = done.stdout.splitlines()
    assert lines[:5] == summary(2, 4, failed=3)
    for line in (
        f"✗ sessions.token mismatched at key ({swapped})",
        f"✗ sessions.token mismatched at key ({rewritten})",
        "✗ crm.order_lines.note undecryptable at key (5, 3)",
        "✗ crm.order_lines.price pending at key (6, 1)",
    ):
        assert line in lines, lines
    with theirs.instance() as instance:
        verified = instance.get_materialized_partitions(dg.AssetKey("verified_table"))
        failed = [run for run in instance.get_runs() if run.status is dg.DagsterRunStatus.FAILURE]
    assert verified == set()
    assert {run.job_name for run in failed} == {"verify_tables"}
    assert canary not in done.stdout + done.stderr
    assert canary not in theirs.dump(theirs.dagster_url, "--inserts")
    assert canary not in theirs.dump(None, "--inserts", "--schema", "alphapulse_encryption")

    # What is pending is repaired by the next step 3; what is damaged is not glossed over.
    theirs.succeeds("--migrate-data", "--table", "crm.order_lines")
    done = theirs.fails(1, "--verify", "--table", "crm.order_lines")
    assert done.stdout.splitlines()[:5] == summary(1, 2, failed=1)
    assert "--repair-mismatched --migrate-data" in done.stdout

    # On demand it is encrypted again from the plaintext, which is right.
    lines = theirs.succeeds(
        "--repair-mismatched",
        "--migrate-data",
        "--verify",
        "--table",
        "sessions",
        "--table",
        "crm.order_lines",
    )
    done_again = "✓ Cleared, to be encrypted again by --migrate-data"
    assert lines[:2] == [f"{done_again}: sessions", f"{done_again}: crm.order_lines"]
    assert lines[-5:] == summary(2, 4)
    # What another table lacks is named, and is no fault of this one.
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        connection.execute("DELETE FROM alphapulse_encryption.verifications WHERE table_name = 'sessions'")
    lines = theirs.succeeds("--verify", "--table", "crm.order_lines")
    assert lines == [*summary(1, 2), "  Not verified, and not asked for: sessions"]
    theirs.succeeds("--verify", "--table", "sessions")
    repaired = query(
        theirs.url, f"SELECT token, token_encrypted FROM sessions WHERE id IN ('{swapped}', '{rewritten}')"
    )
    repaired += query(
        theirs.url, "SELECT note, note_encrypted FROM crm.order_lines WHERE (order_id, line) = (5, 3)"
    )
    assert len(repaired) == 3
    for plaintext, envelope in repaired:
        key = independent.derive(another.MASTER_KEY, json.loads(envelope)["context"], 1)
        assert independent.open_envelope(key, envelope) == plaintext


def test_damage_of_every_kind_forbids_the_approval(theirs: Place) -> None:
    """Flip a bit, swap two ciphertexts, alter a token, clear a ciphertext, change a plaintext behind the trigger."""
    table = ("--table", "sessions")
    approve = ("--approve-drop", *table, *APPROVAL, "--confirmation", "sessions")
    theirs.succeeds(
        "--backup", "--add-columns", "--migrate-data", "--verify", "--switch-to-encrypted", *table
    )
    ids = {n: _id(theirs.url, n) for n in range(1, 9)}
    expected = sorted(
        [
            f"✗ sessions.token undecryptable at key ({ids[1]})",
            f"✗ sessions.token mismatched at key ({ids[2]})",
            f"✗ sessions.token mismatched at key ({ids[3]})",
            f"✗ sessions.token token_mismatched at key ({ids[4]})",
            f"✗ sessions.payload pending at key ({ids[5]})",
            f"✗ sessions.payload mismatched at key ({ids[6]})",
        ]
    )
    with psycopg.connect(theirs.url, autocommit=True) as behind:
        behind.execute(support.BEHIND)
        behind.execute("CREATE TEMP TABLE kept AS SELECT * FROM sessions")
        ((envelope,),) = behind.execute(
            "SELECT token_encrypted FROM sessions WHERE id = %s", [ids[1]]
        ).fetchall()
        members = json.loads(envelope)
        payload = bytearray(base64.b64decode(members["ciphertext"]))
        payload[len(payload) // 2] ^= 0x10
        members["ciphertext"] = base64.b64encode(payload).decode()
        for statement, parameters in (
            ("UPDATE sessions SET token_encrypted = %s WHERE id = %s", [json.dumps(members), ids[1]]),
            (
                "UPDATE sessions a SET token_encrypted = b.token_encrypted, token_search = b.token_search "
                "FROM sessions b WHERE (a.id, b.id) IN ((%s, %s), (%s, %s))",
                [ids[2], ids[3], ids[3], ids[2]],
            ),
            ("UPDATE sessions SET token_search = reverse(token_search) WHERE id = %s", [ids[4]]),
            ("UPDATE sessions SET payload_encrypted = NULL WHERE id = %s", [ids[5]]),
            ("UPDATE sessions SET payload = '{}' WHERE id = %s", [ids[6]]),
        ):
            behind.execute(statement.encode(), parameters)

        verified = theirs.fails(1, "--verify", "--workers", "2", *table)
        assert verified.stdout.splitlines()[:5] == summary(1, 2, failed=2)
        assert sorted(line for line in verified.stdout.splitlines() if " at key " in line) == expected
        dump = theirs.dump()
        refused = theirs.fails(1, *approve)
        assert "✗ Table sessions is not verified: sessions.token: 2 values mismatched" in refused.stdout
        assert theirs.dump() == dump

        behind.execute("TRUNCATE sessions")
        behind.execute("INSERT INTO sessions SELECT * FROM kept")
    assert theirs.succeeds("--verify", *approve)[:5] == summary(1, 2)


def _id(url: str, number: int) -> str:
    return str(query(url, f"SELECT id::text FROM sessions WHERE id = md5('{number}')::uuid")[0][0])
