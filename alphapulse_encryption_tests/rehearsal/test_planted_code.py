"""Staging's application may not get the rehearsal server: its code runs there under a role without rights."""

from __future__ import annotations

import psycopg
import pytest

from alphapulse_encryption.rehearsal import stages
from alphapulse_encryption.rehearsal.measures import Stage
from alphapulse_encryption_tests.migration.walk import query
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.planted import planted, ran
from alphapulse_encryption_tests.rehearsal.circle import clones, last, rehearse

# The clone's owner, and what it may.
OWNERS = """
SELECT r.rolname = d.datname, rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls,
       EXISTS (SELECT FROM pg_auth_members m WHERE m.member = r.oid)
  FROM pg_database d JOIN pg_roles r ON r.oid = d.datdba WHERE datname LIKE 'alphapulse\\_rehearsal\\_%'
"""
THINGS = """
SELECT DISTINCT rolname FROM (SELECT relowner AS o FROM pg_class WHERE oid >= 16384 UNION
    SELECT proowner FROM pg_proc WHERE oid >= 16384 UNION SELECT typowner FROM pg_type WHERE oid >= 16384 UNION
    SELECT nspowner FROM pg_namespace WHERE oid >= 16384) AS t JOIN pg_roles ON pg_roles.oid = o
"""


def test_a_whole_rehearsal_runs_no_planted_code_with_rights(
    small: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[str] = set()
    owners: list[tuple[object, ...]] = []
    plan = stages.PLANS[Stage.REMOVAL]
    (phases, remove), *_ = plan.parts

    def look(at: stages.Rehearsing) -> None:
        (clone,) = clones(small)
        url = small.postgres.url(clone)
        found.update(ran(url))
        owners.extend(query(url, OWNERS))
        assert query(url, THINGS) == [(clone,)]
        remove(at)

    with (
        planted(small.postgres, small.url, "public.sessions", "token") as attack,
        small.instance() as instance,
    ):
        monkeypatch.setattr(stages, "PLANS", {**stages.PLANS, Stage.REMOVAL: stages.Plan("", (phases, look))})
        outcome = rehearse(small, instance, tables=["sessions"], compare_source=False)
        assert attack.harm() == ([], [])
        assert (outcome.problems, outcome.succeeded) == ((), True)
        (clone, *_) = last(instance).stages
    assert owners == [(True, False, False)]
    # It did run, and as nobody who matters.
    assert found >= {"trigger", "table_check", "table_index", "index", "view"}
    assert not found & {"as_superuser", "event"}
    assert any("event trigger planted_event" in finding.what for finding in clone.findings)
    assert clones(small) == []
    assert query(small.url, "SELECT rolname FROM pg_roles WHERE rolname LIKE 'alphapulse\\_rehearsal%'") == []


def test_the_mark_of_a_clone_names_no_directory_of_its_owners_choice(small: Place) -> None:
    """The clone's owner may change its comment; cleaning up, we remove what that names."""
    from datetime import UTC, datetime

    from alphapulse_encryption.rehearsal.clone import clone as clones_

    name = "alphapulse_rehearsal_00000009"
    theirs = small.state / "theirs" / "backup"
    theirs.mkdir(parents=True)
    mark = clones_.Mark(run="gone", process="-", at=datetime.now(UTC), keep_failed_hours=0)
    text = mark.model_dump_json().replace("gone", "../theirs")
    with psycopg.connect(small.postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        connection.execute(f"COMMENT ON DATABASE {name} IS '{clones_._MARK}{text}'".encode())
        with small.in_environment():
            clones_.remove(clones_.server(), name)
    assert theirs.exists()
