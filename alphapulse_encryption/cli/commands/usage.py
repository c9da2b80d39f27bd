"""Which options there are, by what they ask for, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

PROGRAM = "python -m alphapulse_encryption"

# Each a method of Steps; they run in this order.
STEPS = (
    "rotate_keys",
    "replan",
    "preflight",
    "backup",
    "add_columns",
    "repair_mismatched",
    "migrate_data",
    "verify",
    "live_check",
    "benchmark_queries",
    "create_views",
    "switch_to_encrypted",
    "revoke_approval",
    "approve_drop",
    "drop_unencrypted",
    "erase_dropped",
    "revert_to_plaintext",
    "restore_plaintext",
    "rebuild_indexes",
    "analyze",
)

# What is done at once, without a run of Dagster's.
WITHOUT_STEPS = (
    "plan",
    "status",
    "slow_queries",
    "discover",
    "rehearse",
    "backup_identity",
    "approvals",
    "check_key",
    "key_usage",
    "key_versions",
    "reinstate_key_version",
    "test_alerts",
    "roles_sql",
    "stop_runs",
    "pause",
    "resume",
    "set",
    "settings",
)
# Of these, what goes with no other of them.
ALONE = (
    *("plan", "status", "slow_queries", "discover"),
    *("rehearse", "backup_identity", "approvals", "check_key", "key_usage", "key_versions"),
    *("reinstate_key_version", "test_alerts", "roles_sql", "stop_runs"),
)

# Reports that can be had as JSON, and those whose document has a schema.
JSON_TAKERS = (
    "plan",
    "status",
    "slow_queries",
    "discover",
    "preflight",
    "approvals",
    "settings",
    "key_usage",
    "key_versions",
)
SCHEMA_TAKERS = ("plan", "status", "discover")

REHEARSAL_ONLY = ("rows", "rate", "source_is_not_production", "keep_clone")
# Options of --rehearse, named as in the job's configuration.
REHEARSAL_OPTIONS = ("workers", "batch_size", "source_is_not_production", "keep_clone")

# Options of --migrate-data, named as in the configuration of encrypted_data; those of --verify among them.
BACKFILL_OPTIONS = ("batch_size", "workers", "work_mem", "autovacuum_off")
VERIFICATION_OPTIONS = ("workers",)
OPTIONS_OF = {
    "migrate_data": (*BACKFILL_OPTIONS, "reindex", "runs"),
    "verify": (*VERIFICATION_OPTIONS, "runs"),
    "rotate_keys": BACKFILL_OPTIONS,
}


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def chosen(options: argparse.Namespace, names: Sequence[str]) -> dict[str, object]:
    """Those of the named options that were given, with their values."""
    return {name: getattr(options, name) for name in names if getattr(options, name) not in (None, False)}


def check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse combinations that mean nothing; ends the process with status 2."""
    _check_reports(parser, options)
    if _goes_without_steps(parser, options):
        return
    if not any(getattr(options, name) for name in STEPS):
        parser.error("name at least one step, for example --add-columns (see --help)")
    if options.drop_unencrypted and not options.confirm:
        parser.error(
            "--drop-unencrypted removes the plaintext columns: add --confirm if that is what you want"
        )
    if options.confirm and not options.drop_unencrypted:
        parser.error("--confirm goes with --drop-unencrypted")
    for name in (*BACKFILL_OPTIONS, "reindex", "runs"):
        if getattr(options, name) in (None, False):
            continue
        takers = [step for step, names in OPTIONS_OF.items() if name in names]
        if not any(getattr(options, step) for step in takers):
            parser.error(f"{flag(name)} goes with {' or '.join(map(flag, takers))}")
    if options.hold and not options.restore_plaintext:
        parser.error("--hold goes with --restore-plaintext")
    if options.restore_drill and not options.backup:
        parser.error("--restore-drill goes with --backup")
    if options.erase_dropped and (len(options.table) != 1 or not options.confirmation):
        parser.error(
            "--erase-dropped takes one --table and --confirmation with its name: it rewrites the table, which nobody "
            "reads or writes meanwhile"
        )
    _check_approval(parser, options)


def _check_reports(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.watch and not options.status:
        parser.error("--watch goes with --status")
    if options.limit is not None and not options.slow_queries:
        parser.error("--limit goes with --slow-queries")
    if not options.discover:
        for name in ("schema", "sample", "output"):
            # A sample of 0 is one, too.
            if getattr(options, name) not in (None, []):
                parser.error(f"{flag(name)} goes with --discover")
    if options.force and not options.output:
        parser.error("--force goes with --output")
    if options.discover and options.table:
        parser.error("--discover looks at whole schemas: --schema, not --table")
    if options.watch and (options.json or options.json_schema):
        parser.error("--watch is for people: ask for --json as often as you like")
    for given, takers in (("json", JSON_TAKERS), ("json_schema", SCHEMA_TAKERS)):
        if not getattr(options, given):
            continue
        if not any(getattr(options, name) for name in takers):
            parser.error(f"{flag(given)} goes with {' or '.join(map(flag, takers))}")
        others = [name for name in (*STEPS, *WITHOUT_STEPS) if getattr(options, name)]
        if len(others) > 1:
            parser.error(f"{flag(given)} goes with one report alone, not with {', '.join(map(flag, others))}")


def _goes_without_steps(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    for name in REHEARSAL_ONLY:
        given = getattr(options, name)
        # A rate of 0 is one, too.
        if given is not None and given is not False and not options.rehearse:
            parser.error(f"{flag(name)} goes with --rehearse")
    if options.role_prefix is not None and not options.roles_sql:
        parser.error("--role-prefix goes with --roles-sql")
    alone = [name for name in WITHOUT_STEPS if getattr(options, name)]
    if not alone:
        return False
    if any(getattr(options, name) for name in STEPS) or (set(alone) & set(ALONE) and len(alone) > 1):
        parser.error(f"{', '.join(map(flag, alone))}: to be given without a step")
    if options.pause and options.resume:
        parser.error("--pause or --resume, not both")
    if any("=" not in text for text in options.set):
        parser.error("--set takes NAME=VALUE, for example --set max_wal_mib_per_second=50")
    return True


def _check_approval(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.operator and not (options.drop_unencrypted or options.revoke_approval):
        parser.error("--operator goes with --drop-unencrypted or --revoke-approval")
    if options.valid_hours and not options.approve_drop:
        parser.error("--valid-hours goes with --approve-drop")
    answers = {
        "--approver": options.approver,
        "--reason": options.reason,
        "--confirmation": options.confirmation,
    }
    if options.approve_drop:
        missing = [name for name, value in answers.items() if not value]
        if len(options.table) != 1 or missing:
            parser.error(
                "--approve-drop takes one --table and --approver, --reason and --confirmation"
                + (f" (missing: {', '.join(missing)})" if missing else "")
            )
        return
    if options.erase_dropped:
        del answers["--confirmation"]
    if options.revoke_approval:
        del answers["--reason"]
    if any(answers.values()):
        parser.error(
            f"{', '.join(name for name, value in answers.items() if value)}: only with --approve-drop"
        )
