"""The tool under the wrong role: it says what is missing and who has it, and nothing is changed."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from alphapulse_encryption import guide
from alphapulse_encryption.__main__ import main
from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.gates.preflight import PreflightReport, check
from alphapulse_encryption.migration.gates.roles import roles_sql
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.verify import count_rows
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another, test_wrong_key
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.place import Place, place
from alphapulse_encryption_tests.roles.conftest import PREFIX, Separated, run_script

USERS = walk.CATALOGUE.table("users")
APPROVAL = ("--approve-drop", "--approver", "Ada", "--reason", "why", "--confirmation", "users")
COMMANDS = {
    "approve_drop": APPROVAL,
    "revoke_approval": ("--revoke-approval", "1"),
    "drop_unencrypted": ("--drop-unencrypted", "--confirm", "--operator", "Grace"),
    "rebuild_indexes": ("--rebuild-indexes", "all"),
    "erase_dropped": ("--erase-dropped", "--confirmation", "users"),
}
# Who may run it, of the log-ins with one part each.
ALLOWED = {
    "planner": {"petra_plans", "vera_verifies", "mia_migrates", "ada_approves", "bob_backs_up"},
    "verifier": {"vera_verifies", "mia_migrates"},
    "migrator": {"mia_migrates"},
    "approver": {"ada_approves"},
    "backup": {"bob_backs_up"},
}
ALSO = {"revoke_approval": {"mia_migrates"}, "benchmark_queries": {"bob_backs_up"}}
ONE_PART = ("shop", "petra_plans", "vera_verifies", "mia_migrates", "ada_approves", "bob_backs_up")
# What is done without a run: who may, and of the others, what the server says.
AT_ONCE = {
    ("--approvals",): ALLOWED["planner"],
    ("--plan",): ALLOWED["planner"],
    ("--status",): ALLOWED["planner"],
    ("--settings",): ALLOWED["planner"],
    ("--key-usage",): ALLOWED["planner"],
    ("--key-versions",): {"bob_backs_up", *ALLOWED["verifier"]},
    ("--set", "paused=true"): ALLOWED["migrator"],
    ("--set", "two_person_rule=off"): set[str](),
}
REPORTS = {("--plan",), ("--status",)}


@pytest.fixture
def theirs(postgres: EmbeddedPostgres, separated: Separated, server_dir: Any) -> Iterator[Place]:
    key = base64.b64encode(bytes(range(32))).decode()
    with place(postgres, separated.url, server_dir.parent, key) as found:
        yield found


LOGGED = "SELECT id, action, database_role FROM alphapulse_encryption.audit_log ORDER BY id"


def what_matters(dump: str) -> list[str]:
    """A dump without the audit log's last line and the counters."""
    return [line for line in dump.splitlines() if "change_settings" not in line and "setval(" not in line]


def test_the_command_line_refuses_before_it_starts_a_run(
    theirs: Place, separated: Separated, capsys: pytest.CaptureFixture[str]
) -> None:
    walk.encrypt(separated.of("mia_migrates"), walk.CATALOGUE.table("api_keys"))
    before, logged = theirs.dump(), walk.query(separated.url, LOGGED)
    for step in guide.STEPS:
        flags = COMMANDS.get(step.name, (step.flag,))
        for login in ONE_PART:
            if login in ALLOWED[step.needs.role] | ALSO.get(step.name, set()):
                continue
            theirs.url = separated.of(login)
            with theirs.in_environment():
                assert main([*flags, "--table", "users"]) == 1, (step.name, login)
            printed = capsys.readouterr()
            assert f"{flags[0]} is not for the database role {login}, which lacks " in printed.err
            assert (
                f"alphapulse_{step.needs.role} as --roles-sql creates it; nothing was changed" in printed.err
            )
            assert "Traceback" not in printed.err and printed.out == ""
    for command, allowed in AT_ONCE.items():
        # A report takes a while, and a privilege that it lacks is the first thing it meets.
        for login in ("shop", "petra_plans") if command in REPORTS else ONE_PART:
            theirs.url = separated.of(login)
            with theirs.in_environment():
                status = main([*command])
            printed = capsys.readouterr()
            assert status == (0 if login in allowed else 1), (command, login, printed)
            if status:
                assert "Which role a step takes is in docs/roles.md" in printed.err
    theirs.url = separated.url
    walk.query(separated.url, "DELETE FROM alphapulse_encryption.settings WHERE name = 'paused'")
    now = walk.query(separated.url, LOGGED)
    assert now[:-1] == logged and now[-1][1:] == ("change_settings", "mia_migrates")
    assert what_matters(theirs.dump()) == what_matters(before)
    assert theirs.run_count() == 0


def test_an_approval_by_who_migrates_names_the_privilege_and_the_role(
    theirs: Place, separated: Separated, capsys: pytest.CaptureFixture[str]
) -> None:
    walk.switch(separated.of("jack_of_all"), USERS)
    walk.backup(separated.of("bob_backs_up"), (USERS,), theirs.state / "backups", theirs.postgres.bin_dir())
    count_rows(walk.target(separated.of("vera_verifies")), USERS)
    theirs.url = separated.of("mia_migrates")
    with theirs.in_environment():
        assert main([*APPROVAL, "--table", "users"]) == 1
    said = capsys.readouterr().err
    assert (
        "lacks INSERT (table_name, approver, reason," in said and "on alphapulse_encryption.approvals" in said
    )
    assert "alphapulse_approver" in said
    # The engine itself, as the job calls it.
    with pytest.raises(RefusedError, match=r"lacks INSERT .* on alphapulse_encryption.approvals"):
        walk.approve(theirs.url, USERS)
    assert walk.query(separated.url, "SELECT FROM alphapulse_encryption.approvals") == []

    approval = walk.approve(separated.of("jack_of_all"), USERS)
    assert approval.database_role == "jack_of_all"
    with pytest.raises(
        RefusedError, match="approved over the role jack_of_all, and has to be carried out over"
    ):
        walk.drop(separated.of("jack_of_all"), USERS)
    with pytest.raises(RefusedError, match="somebody else has to carry it out"):
        walk.drop(separated.of("mia_migrates"), USERS, operator="ada")
    assert walk.drop(separated.of("mia_migrates"), USERS).changed


def test_every_job_of_a_planner_but_the_checklist_fails_in_words(
    postgres: EmbeddedPostgres, _roles_template: str, database_url: str, server_dir: Any
) -> None:
    walk.query(database_url, another.SCHEMA)
    with place(postgres, database_url, server_dir.parent, test_wrong_key.RIGHT, another.CATALOGUE) as theirs:
        theirs.ranges = walk.RANGES
        catalogue = load_catalogue(theirs.catalogue_file())
        with Database(database_url).session("look") as connection:
            script = roles_sql(connection, catalogue, PREFIX)
        run_script(postgres, database_url, script)
        walk.encrypt(database_url.replace("//postgres@", "//mia_migrates@", 1), catalogue.table("sessions"))
        before = theirs.dump()
        theirs.url = database_url.replace("//postgres@", "//petra_plans@", 1)
        definitions = theirs.definitions()
        # It runs programs of its own.
        jobs = [job for job in test_wrong_key.STEPS if job not in ("run_preflight", "take_backup")]
        with theirs.instance() as instance:
            for job in jobs:
                result = test_wrong_key.run(definitions, instance, job)
                if not result.success:
                    said = test_wrong_key.problem(result)
                    assert "Unexpected" not in said, (job, said)
        assert theirs.dump(database_url) == before


def findings(url: str) -> PreflightReport:
    return check(Database(url), walk.CATALOGUE.tables, walk.KEYS)


def about_privileges(report: PreflightReport, level: str) -> str:
    return "\n".join(
        finding.message
        for finding in report.findings
        if (finding.subject, finding.level) == ("privileges", level)
    )


def test_the_checklist_says_what_is_missing_for_which_step(separated: Separated) -> None:
    planned = findings(separated.of("petra_plans"))
    assert planned.blockers == ()
    assert about_privileges(planned, "ok") == "the role petra_plans may run --preflight"
    warned = about_privileges(planned, "warning")
    assert (
        "may not run --backup, which is for a member of alphapulse_backup: it lacks SELECT on trading_accounts"
        in warned
    )
    assert (
        "may not run --approve-drop, which is for a member of alphapulse_approver: it lacks INSERT (table_"
        in warned
    )
    assert (
        "ownership, or membership in the owner, of trading_accounts, positions, trades, users, api_keys"
        in warned
    )
    # As good an estimate as that of a role which reads the data.
    assert planned.growth_bytes == findings(separated.url).growth_bytes
    assert planned.growth_bytes == findings(separated.of("mia_migrates")).growth_bytes

    migrating = findings(separated.of("mia_migrates"))
    assert migrating.blockers == ()
    assert "--add-columns" in about_privileges(migrating, "ok") and "--approve" not in about_privileges(
        migrating, "ok"
    )
    assert "has more than it needs" not in about_privileges(migrating, "warning")

    both = about_privileges(findings(separated.of("jack_of_all")), "warning")
    assert "has more than it needs: it may approve a drop as well as carry it out" in both
    owning = "GRANT tested_bookkeeper TO max_migrates"
    walk.query(separated.url, owning)
    try:
        assert "it owns the bookkeeping" in about_privileges(
            findings(separated.of("max_migrates")), "warning"
        )
    finally:
        walk.query(separated.url, owning.replace("GRANT", "REVOKE").replace(" TO ", " FROM "))
    superuser = findings(separated.url)
    assert superuser.blockers == ()
    assert "is a superuser: nothing is refused to it" in about_privileges(superuser, "warning")
