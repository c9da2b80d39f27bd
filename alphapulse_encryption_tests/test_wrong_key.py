"""Another key of the right length: every step refuses, and the database stays as it is."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import dagster as dg
import psycopg
import pytest

from alphapulse_encryption.__main__ import main
from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.place import Place, place

RIGHT = base64.b64encode(bytes(range(32))).decode()
WRONG = base64.b64encode(bytes(range(1, 33))).decode()
VARIABLE = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
TABLE = "sessions"
SAYS = f"The master key of version 1, from the environment variable {VARIABLE}, is not the one this database was begun"

PARTITION = f"00|{TABLE}"
NAMED = {"tables": [TABLE]}
# Every job that is no step on the data: it uses no key, and changes nothing that another key could spoil.
NO_STEPS = {
    *("change_settings", "list_approvals", "revoke_approval"),
    *("look_for_slow_queries", "analyze_tables", "reindex_tables"),
}
# Does its steps on a clone of another database.
ELSEWHERE = {"staging_rehearsal"}
# Every other job: its op with its configuration, and its partition.
STEPS: Mapping[str, tuple[str, Mapping[str, object], str | None]] = {
    "run_preflight": ("preflight", {}, None),
    "take_backup": ("backup", {"restore_drill": True}, None),
    "add_columns": ("encrypted_columns", {}, TABLE),
    "migrate_data": ("encrypted_data", {"autovacuum_off": True}, PARTITION),
    "build_indexes": ("search_indexes", {"reindex": True}, TABLE),
    "verify_data": ("verified_data", {}, PARTITION),
    "verify_tables": ("verified_table", {}, TABLE),
    "create_views": ("compatibility_views", {}, TABLE),
    "switch_to_ciphertext": ("switch", NAMED, None),
    "revert_to_plaintext": ("revert", NAMED, None),
    "approve_drop": (
        "approve",
        {"table": TABLE, "approver": "Ada", "reason": "done", "confirmation": TABLE},
        None,
    ),
    "drop_unencrypted": ("drop", NAMED, None),
    "erase_dropped": ("erase", {"table": TABLE, "confirmation": TABLE}, None),
    "restore_plaintext": ("restore", NAMED, None),
    "replan_ranges": ("replan", NAMED, None),
    "repair_mismatched": ("repair", NAMED, None),
    "rotate_keys": ("begin", NAMED, None),
    "live_check": ("check", NAMED, None),
    "benchmark_queries": ("benchmark", NAMED, None),
    "rotated_data": ("rotated_data", {"autovacuum_off": True}, PARTITION),
}
# Of the assets, the one that no job makes by itself.
WITHOUT_A_JOB = "rotated_data"
# By hand, at the command line; what they launch is above.
FLAGS = (
    *(("--preflight",), ("--backup",), ("--add-columns",), ("--migrate-data",), ("--verify",)),
    *(("--create-views",), ("--switch-to-encrypted",), ("--drop-unencrypted", "--confirm")),
    *(("--revert-to-plaintext",), ("--restore-plaintext",), ("--repair-mismatched",), ("--replan",)),
    *(("--rotate-keys",), ("--live-check",), ("--benchmark-queries",)),
)


@pytest.fixture
def theirs(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(another.SCHEMA.encode())
    with place(postgres, database_url, server_dir.parent, RIGHT, another.CATALOGUE) as found:
        found.ranges = walk.RANGES
        yield found


def begun(theirs: Place, catalogue: Catalogue) -> None:
    walk.encrypt(theirs.url, catalogue.table(TABLE))


def approved(theirs: Place, catalogue: Catalogue) -> None:
    tables = tuple(catalogue.table(key) for key in catalogue.keys)
    walk.switch(theirs.url, catalogue.table(TABLE))
    walk.backup(theirs.url, tables, theirs.state / "backups", theirs.postgres.bin_dir())
    walk.approve(theirs.url, catalogue.table(TABLE), catalogue)


def dropped(theirs: Place, catalogue: Catalogue) -> None:
    approved(theirs, catalogue)
    walk.drop(theirs.url, catalogue.table(TABLE), catalogue)


def run(definitions: dg.Definitions, instance: dg.DagsterInstance, job: str) -> dg.ExecuteInProcessResult:
    """One run of a job, as the UI's button starts it."""
    op, config, partition = STEPS[job]
    alone = job == WITHOUT_A_JOB
    found = definitions.resolve_implicit_global_asset_job_def() if alone else definitions.resolve_job_def(job)
    return found.execute_in_process(
        instance=instance,
        run_config={"ops": {op: {"config": dict(config)}}} if config else {},
        asset_selection=[dg.AssetKey(job)] if alone else None,
        partition_key=partition,
        raise_on_error=False,
    )


def problem(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert failure.user_failure_data is not None
    return str(failure.user_failure_data.description)


def test_every_job_is_here(theirs: Place) -> None:
    """A job that is not listed above is tested by nobody; nor is an asset that no job makes."""
    definitions = theirs.definitions()
    jobs = {job.name for job in definitions.resolve_all_job_defs() if not job.name.startswith("__")}
    assert jobs | {WITHOUT_A_JOB} == {*STEPS, *NO_STEPS, *ELSEWHERE}
    assets = {key.to_user_string() for key in definitions.resolve_asset_graph().materializable_asset_keys}
    # That one is made by a job that is no step.
    assert assets - {"slow_encrypted_queries"} <= {op for op, _, _ in STEPS.values()}
    assert len(assets) == 10


@pytest.mark.parametrize(
    ("state", "jobs"),
    [
        pytest.param(begun, tuple(STEPS), id="begun"),
        # Again, where they have more to do.
        pytest.param(
            approved,
            ("approve_drop", "drop_unencrypted", "revert_to_plaintext", "take_backup"),
            id="approved",
        ),
        pytest.param(
            dropped,
            ("add_columns", "migrate_data", "erase_dropped", "restore_plaintext", "rotated_data"),
            id="dropped",
        ),
    ],
)
def test_every_step_refuses(
    theirs: Place, state: Callable[[Place, Catalogue], None], jobs: Sequence[str]
) -> None:
    catalogue = load_catalogue(theirs.catalogue_file())
    state(theirs, catalogue)
    before, files = theirs.dump(), sorted(theirs.state.rglob("backups/*"))
    theirs.master_key = WRONG
    definitions = theirs.definitions()
    with theirs.instance() as instance:
        results = {job: run(definitions, instance, job) for job in jobs}
    assert {job: SAYS in problem(result) for job, result in results.items()} == dict.fromkeys(jobs, True)
    assert theirs.dump() == before
    assert sorted(theirs.state.rglob("backups/*")) == files


def test_the_command_line_refuses_before_it_starts_a_run(
    theirs: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(theirs, load_catalogue(theirs.catalogue_file()))
    before = theirs.dump()
    theirs.master_key = WRONG
    for flags in FLAGS:
        with theirs.in_environment():
            assert main([*flags, "--table", TABLE]) == 1, flags
        printed = capsys.readouterr()
        assert SAYS in printed.err and printed.out == "", flags
    assert theirs.dump() == before
    assert theirs.run_count() == 0


def check_key(theirs: Place, capsys: pytest.CaptureFixture[str], **extra: str | None) -> tuple[int, str]:
    """What ``--check-key`` answers and prints, which holds no key."""
    theirs.extra = extra
    with theirs.in_environment():
        status = main(["--check-key"])
    printed = capsys.readouterr()
    said = printed.out + printed.err
    for key in (RIGHT, WRONG):
        assert key not in said
    return status, said


def test_check_key(theirs: Place, capsys: pytest.CaptureFixture[str]) -> None:
    start = theirs.dump()
    readable = f"version 1 (current): readable from the environment variable {VARIABLE}; "
    fresh = (0, f"✓ {readable}this database has not been begun with this version\n")
    assert check_key(theirs, capsys) == fresh
    assert theirs.dump() == start, "looking is no beginning"

    walk.encrypt(theirs.url, load_catalogue(theirs.catalogue_file()).table(TABLE))
    before = theirs.dump()
    assert check_key(theirs, capsys) == (0, f"✓ {readable}the key this database was begun with\n")
    status, said = check_key(theirs, capsys, **{VARIABLE: WRONG})
    assert (status, said.startswith(f"✗ {readable}NOT the key")) == (1, True)
    version = {"ALPHAPULSE_ENCRYPTION_KEY_VERSION": "2"}
    status, said = check_key(theirs, capsys, **version)
    assert (status, said.count("✓")) == (0, 2)
    status, said = check_key(theirs, capsys, **version, **{VARIABLE: WRONG})
    assert (status, said.count("✗"), said.count("✓ version 2 (current)")) == (1, 1, 1)
    # Only version 2 has a key: what version 1 has encrypted cannot be read.
    status, said = check_key(theirs, capsys, **version, **{VARIABLE: None, f"{VARIABLE}_V2": WRONG})
    assert (status, "! version 1: this database was begun with it" in said) == (0, True)
    status, said = check_key(theirs, capsys, **{VARIABLE: None})
    assert (status, f"{VARIABLE} is not set" in said) == (2, True)
    assert theirs.dump() == before


def test_check_key_without_a_database(theirs: Place, capsys: pytest.CaptureFixture[str]) -> None:
    url = "postgresql://nobody@127.0.0.1:1/nothing"
    status, said = check_key(theirs, capsys, ALPHAPULSE_DATABASE_URL=url)
    assert (status, "✓ version 1" in said, "not compared: The database cannot be reached" in said) == (
        0,
        True,
        True,
    )
    # No embedded server is made for it.
    status, said = check_key(
        theirs, capsys, ALPHAPULSE_DATABASE_URL=None, ALPHAPULSE_STATE_DIR=f"{theirs.state}/new"
    )
    assert (status, "no database to compare with" in said) == (0, True)
    assert not (theirs.state / "new").exists()
    status, said = check_key(theirs, capsys, ALPHAPULSE_DATABASE_URL="mysql://x/y")
    assert (status, "ALPHAPULSE_DATABASE_URL is not a PostgreSQL URL" in said) == (2, True)
