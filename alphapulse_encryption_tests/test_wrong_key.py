"""Another key of the right length: every step refuses, and the database stays as it is."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import dagster as dg
import psycopg
import pytest

from alphapulse_encryption.__main__ import main
from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.jobs import build_jobs
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.place import Place, place

RIGHT = base64.b64encode(bytes(range(32))).decode()
WRONG = base64.b64encode(bytes(range(1, 33))).decode()
VARIABLE = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
TABLE = "sessions"
SAYS = f"The master key of version 1, from the environment variable {VARIABLE}, is not the one this database was begun"

# What uses no key, and changes nothing that a key could spoil.
NO_STEPS = {"change_settings", "list_approvals", "revoke_approval"}
CONFIG: Mapping[str, Mapping[str, object]] = {
    "approve_drop": {"table": TABLE, "approver": "Ada", "reason": "done", "confirmation": TABLE},
    "erase_dropped": {"table": TABLE, "confirmation": TABLE},
}


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


def runs(definitions: dg.Definitions, instance: dg.DagsterInstance) -> dict[str, dg.ExecuteInProcessResult]:
    """One run of every asset that can be materialized and of every job that is none of assets."""
    everything = definitions.resolve_implicit_global_asset_job_def()
    graph = definitions.resolve_asset_graph()
    results = {}
    for key in sorted(graph.materializable_asset_keys):
        partitions = graph.get(key).partitions_def
        names = {
            None: None,
            dg.MultiPartitionsDefinition: f"00|{TABLE}",
            dg.StaticPartitionsDefinition: TABLE,
        }
        name = names[None if partitions is None else type(partitions)]  # type: ignore[index]
        tuned = {"ops": {"encrypted_data": {"config": {"autovacuum_off": True}}}}
        results[key.to_user_string()] = everything.execute_in_process(
            instance=instance,
            asset_selection=[key],
            partition_key=name,
            run_config=tuned if key == dg.AssetKey("encrypted_data") else None,
            raise_on_error=False,
        )
    for job in build_jobs():
        if isinstance(job, dg.JobDefinition) and job.name not in NO_STEPS:
            config = CONFIG.get(job.name, {"tables": [TABLE]})
            results[job.name] = definitions.resolve_job_def(job.name).execute_in_process(
                instance=instance,
                run_config={"ops": {job.nodes[0].name: {"config": dict(config)}}},
                raise_on_error=False,
            )
    return results


def problem(result: dg.ExecuteInProcessResult) -> str:
    (failure,) = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert failure.user_failure_data is not None
    return str(failure.user_failure_data.description)


@pytest.mark.parametrize("state", [begun, approved, dropped])
def test_every_step_refuses(theirs: Place, state: Callable[[Place, Catalogue], None]) -> None:
    catalogue = load_catalogue(theirs.catalogue_file())
    state(theirs, catalogue)
    before = theirs.dump()
    theirs.master_key = WRONG
    with theirs.instance() as instance:
        results = runs(theirs.definitions(), instance)
    assert {"encrypted_columns", "encrypted_data", "switch_to_ciphertext", "drop_unencrypted"} <= set(results)
    assert {name: SAYS in problem(result) for name, result in results.items()} == dict.fromkeys(results, True)
    assert theirs.dump() == before
    assert not list(theirs.state.glob("backups/*.part*"))


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


@pytest.mark.parametrize("flag", ["--check-key", "--key-usage"])
def test_what_goes_alone(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for others in (["--verify"], ["--pause"], ["--backup-identity"]):
        with pytest.raises(SystemExit, match="2"):
            main([flag, *others])
        assert "to be given without a step" in capsys.readouterr().err
