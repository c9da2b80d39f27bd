"""The guide's command line. Each flag launches the job that the UI launches, on the same instance."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from alphapulse_encryption import logfiles, settings, uncaught
from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.errors import ConfigurationError, MigrationError

if TYPE_CHECKING:
    from alphapulse_encryption.migration.limits import Limits
    from alphapulse_encryption.migration.tracking import KeyVersion
    from alphapulse_encryption.migration.versions import TableVersions

PROGRAM = "python -m alphapulse_encryption"
LARGEST_BATCH_SIZE = 100_000
MOST_WORKERS = 16
MOST_RUNS = 999
MOST_HOURS = 168
SMALLEST_SAMPLE = 1_000
LARGEST_SAMPLE = 100_000
HIGHEST_RATE = 1_000
LONGEST_NUMBER = 18
MOST_SHOWN = 1_000

_EPILOG = """\
Several of the steps may be given at once; they run in the order above. Every run is seen in Dagster's UI (make ui).
Exit status: 0 done; 1 something is not migrated, not verified or refused (the message says what); 2 wrong usage or
configuration. The database is ALPHAPULSE_DATABASE_URL, or the embedded sample database where that is unset.
"""


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that reads files."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"alphapulse-encryption {version('alphapulse-encryption')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Moves sensitive columns of a PostgreSQL database from plaintext to application-level encryption.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    _add_reports(parser)
    steps = parser.add_argument_group("steps")
    steps.add_argument(
        "--preflight", action="store_true", help="check what would block the migration; reads only"
    )
    steps.add_argument("--backup", action="store_true", help="take an encrypted, verified backup")
    steps.add_argument("--add-columns", action="store_true", help="step 2: add encrypted columns and guards")
    steps.add_argument(
        "--migrate-data", action="store_true", help="step 3: encrypt what is pending, build indexes"
    )
    steps.add_argument("--verify", action="store_true", help="step 4: decrypt and compare every value")
    steps.add_argument(
        "--live-check",
        action="store_true",
        help="validation: write, read and look at the raw columns of live rows; nothing remains",
    )
    steps.add_argument(
        "--benchmark-queries",
        action="store_true",
        help="validation: time queries on the encrypted and the plaintext columns; reads only",
    )
    steps.add_argument("--create-views", action="store_true", help="step 6: create the compatibility views")
    steps.add_argument(
        "--switch-to-encrypted", action="store_true", help="step 7: make the encrypted columns the right side"
    )
    steps.add_argument(
        "--approve-drop", action="store_true", help="step 8: approve the drop of one table (see below)"
    )
    steps.add_argument(
        "--drop-unencrypted",
        action="store_true",
        help="step 8: drop the plaintext columns; needs an approval",
    )
    steps.add_argument(
        "--erase-dropped",
        action="store_true",
        help="after step 8, in a maintenance window: rewrite one table, locked meanwhile, and say what remains",
    )
    steps.add_argument(
        "--revoke-approval", type=_number, metavar="N", help="take approval N back (see --approvals)"
    )
    steps.add_argument(
        "--replan",
        action="store_true",
        help="before step 3: cut the tables anew into ALPHAPULSE_BATCH_RANGES",
    )
    steps.add_argument(
        "--repair-mismatched",
        action="store_true",
        help="before step 3: clear the ciphertext that the last --verify named as wrong, to be encrypted again",
    )
    steps.add_argument(
        "--revert-to-plaintext",
        action="store_true",
        help="rollback before the drop: plaintext is right again",
    )
    steps.add_argument(
        "--restore-plaintext",
        action="store_true",
        help="rollback after the drop: rebuild the plaintext columns",
    )
    _add_after_the_migration(steps)
    steps.add_argument(
        "--rotate-keys",
        action="store_true",
        help="after the migration: encrypt again, under ALPHAPULSE_ENCRYPTION_KEY_VERSION, what is of an older key "
        "version; verify it, and retire the versions of which nothing is left",
    )
    steps.add_argument(
        "--key-versions",
        action="store_true",
        help="show the key versions, and how many values each table has of them; reads every row",
    )
    steps.add_argument(
        "--reinstate-key-version",
        type=_key_version,
        metavar="N",
        help="a retired key version is readable again",
    )
    steps.add_argument(
        "--backup-identity",
        action="store_true",
        help="print the age identity that opens backups; a secret, keep it like the master key",
    )
    steps.add_argument(
        "--approvals", action="store_true", help="show every approval: open, used, revoked or expired"
    )
    steps.add_argument(
        "--check-key",
        action="store_true",
        help="read the master key of every version and compare it with what this database was begun with; reads only",
    )
    steps.add_argument(
        "--key-usage",
        action="store_true",
        help="show how many values each key has encrypted, and how many it may; reads only",
    )
    steps.add_argument(
        "--test-alerts",
        action="store_true",
        help="send a test message to every channel that alerts are configured for",
    )
    _add_rehearsal(parser)
    _add_settings(parser)
    options = parser.add_argument_group("options")
    options.add_argument(
        "--table",
        action="append",
        default=[],
        metavar="T",
        help="only this table; may be given several times",
    )
    options.add_argument(
        "--batch-size", type=_batch_size, metavar="N", help="rows per batch (default: adapted to the server)"
    )
    options.add_argument(
        "--workers",
        type=_workers,
        metavar="N",
        help="batch ranges encrypted, verified or encrypted again at once (default: 1)",
    )
    options.add_argument(
        "--runs",
        type=_runs,
        metavar="N",
        help="with workers on other machines: runs that the batch ranges of each table are spread over (default: 4)",
    )
    options.add_argument(
        "--work-mem", metavar="SIZE", help="memory of one sort or hash in our sessions, for example 256MB"
    )
    options.add_argument(
        "--autovacuum-off",
        action="store_true",
        help="turn autovacuum off for the tables during the backfill; always put back",
    )
    options.add_argument(
        "--reindex", action="store_true", help="rebuild every index after the backfill, concurrently"
    )
    options.add_argument(
        "--restore-drill",
        action="store_true",
        help="with --backup: restore it into a scratch database and compare",
    )
    options.add_argument("--confirm", action="store_true", help="needed with --drop-unencrypted")
    options.add_argument(
        "--hold",
        action="store_true",
        help="with --restore-plaintext: stop before the plaintext becomes right, until no instance of the application "
        "writes ciphertext alone; run it again without",
    )
    approval = parser.add_argument_group(
        "approval (with --approve-drop --table T, or --erase-dropped --table T)"
    )
    approval.add_argument("--approver", metavar="NAME", help="your name, for the audit log")
    approval.add_argument("--reason", metavar="TEXT", help="why now, for the audit log")
    approval.add_argument("--confirmation", metavar="T", help="the table's name, typed once more (both)")
    approval.add_argument(
        "--valid-hours", type=_hours, metavar="N", help="how long it may be used (default: 24)"
    )
    approval.add_argument(
        "--operator",
        metavar="NAME",
        help="with --drop-unencrypted or --revoke-approval: your name; outside the sample, a drop needs it, and "
        "another one than the approver's (setting two_person_rule)",
    )
    return parser


def _add_reports(parser: argparse.ArgumentParser) -> None:
    reports = parser.add_argument_group("reports (read only, without a run)")
    reports.add_argument(
        "--plan",
        action="store_true",
        help="what would be done: statements, batch ranges, durations, growth, locks, obstacles",
    )
    reports.add_argument(
        "--status", action="store_true", help="where it stands: per table and column, who works, what is left"
    )
    reports.add_argument(
        "--slow-queries",
        action="store_true",
        help="step 7: what statements on encrypted tables cost, from pg_stat_statements, slowest first",
    )
    reports.add_argument(
        "--limit", type=_limit, metavar="N", help="with --slow-queries: how many to show (default: 20)"
    )
    reports.add_argument("--watch", action="store_true", help="with --status: again and again, until Ctrl-C")
    reports.add_argument(
        "--discover",
        action="store_true",
        help="propose a catalogue for this database, by names, types and the form of sampled values; shows none",
    )
    reports.add_argument(
        "--schema",
        action="append",
        default=[],
        metavar="S",
        help="with --discover: only this schema; may be given several times",
    )
    reports.add_argument(
        "--sample",
        type=_sample,
        metavar="N",
        help="with --discover: rows of each table whose values are looked at; 0 for none (default: 1000)",
    )
    reports.add_argument(
        "--output", metavar="FILE", help="with --discover: write the catalogue there; it must not exist"
    )
    reports.add_argument("--force", action="store_true", help="with --output: replace the file")
    reports.add_argument(
        "--json",
        action="store_true",
        help="one JSON document on standard output; with " + ", ".join(_flag(name) for name in JSON_TAKERS),
    )
    reports.add_argument(
        "--json-schema",
        action="store_true",
        help="print the JSON schema of that document instead; with "
        + ", ".join(_flag(name) for name in SCHEMA_TAKERS),
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_after_the_migration(steps: argparse._ArgumentGroup) -> None:
    steps.add_argument(
        "--rebuild-indexes",
        choices=("all", "encrypted"),
        help="after the migration: build the tables' indexes anew, concurrently: all of them, or only those with an "
        "encrypted or search column in them",
    )
    steps.add_argument(
        "--analyze", action="store_true", help="after the migration: take the planner's statistics anew"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    running = parser.add_argument_group("running backfills (at once, also of other processes)")
    running.add_argument("--pause", action="store_true", help="have every backfill wait at its next batch")
    running.add_argument("--resume", action="store_true", help="let them go on")
    running.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting (see --settings)"
    )
    running.add_argument("--settings", action="store_true", help="show the settings")
    running.add_argument(
        "--stop-runs",
        action="store_true",
        help="stop every run that is queued or under way, on whatever machine; what is done stays done",
    )


def _add_roles(parser: argparse.ArgumentParser) -> None:
    roles = parser.add_argument_group("least privilege")
    roles.add_argument(
        "--roles-sql",
        action="store_true",
        help="print SQL that creates the roles, for a database administrator to run with psql; reads only",
    )
    roles.add_argument(
        "--role-prefix", metavar="TEXT", help="what their names begin with (default: alphapulse_)"
    )


def _add_rehearsal(parser: argparse.ArgumentParser) -> None:
    _add_roles(parser)
    rehearsal = parser.add_argument_group("rehearsal, on a clone of ALPHAPULSE_STAGING_DATABASE_URL")
    rehearsal.add_argument(
        "--rehearse",
        action="store_true",
        help="the whole migration there and back on a clone, measured; the database itself is only read",
    )
    rehearsal.add_argument(
        "--rows",
        type=_rows,
        metavar="N",
        help="size of the sample's staging copy, which is rehearsed where no staging database is named",
    )
    rehearsal.add_argument(
        "--rate",
        type=_rate,
        metavar="N",
        help="requests per second that the application makes on the clone meanwhile; 0 for none (default: 20)",
    )
    rehearsal.add_argument(
        "--source-is-not-production",
        action="store_true",
        help="the staging database is not production, though its name says so, or it is a physical copy",
    )
    rehearsal.add_argument(
        "--keep-clone", action="store_true", help="leave the clone there; you remove it yourself"
    )


def _number(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError("must be the number of an approval, as --approvals shows it")


def _sample(text: str) -> int:
    if (
        text.isascii()
        and text.isdigit()
        and len(text) <= len(str(LARGEST_SAMPLE))
        and int(text) <= LARGEST_SAMPLE
    ):
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number up to {LARGEST_SAMPLE}")


def _rate(text: str) -> int:
    if (
        text.isascii()
        and text.isdigit()
        and len(text) <= len(str(HIGHEST_RATE))
        and int(text) <= HIGHEST_RATE
    ):
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number up to {HIGHEST_RATE}")


def _rows(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER and int(text) >= SMALLEST_SAMPLE:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least {SMALLEST_SAMPLE}")


def _limit(text: str) -> int:
    if (
        text.isascii()
        and text.isdigit()
        and len(text) <= len(str(MOST_SHOWN))
        and 1 <= int(text) <= MOST_SHOWN
    ):
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST_SHOWN}")


def _key_version(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError("must be a key version, as --key-versions shows it")


def _hours(text: str) -> float:
    # float() would also take "nan", "1e3" and "1_0".
    plain = text.isascii() and text.replace(".", "", 1).isdigit() and len(text) <= LONGEST_NUMBER
    if plain and 0 < float(text) <= MOST_HOURS:
        return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of hours, at most {MOST_HOURS}")


def _workers(text: str) -> int:
    if (
        text.isascii()
        and text.isdigit()
        and len(text) <= len(str(MOST_WORKERS))
        and 1 <= int(text) <= MOST_WORKERS
    ):
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST_WORKERS}")


def _runs(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= len(str(MOST_RUNS)) and 1 <= int(text) <= MOST_RUNS:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST_RUNS}")


def _batch_size(text: str) -> int:
    # int() refuses thousands of digits with words of its own.
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST_BATCH_SIZE))
    if digits and 1 <= int(text) <= LARGEST_BATCH_SIZE:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {LARGEST_BATCH_SIZE}")


def _check_reports(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.watch and not options.status:
        parser.error("--watch goes with --status")
    if options.limit is not None and not options.slow_queries:
        parser.error("--limit goes with --slow-queries")
    if not options.discover:
        for name in ("schema", "sample", "output"):
            # A sample of 0 is one, too.
            if getattr(options, name) not in (None, []):
                parser.error(f"{_flag(name)} goes with --discover")
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
            parser.error(f"{_flag(given)} goes with {' or '.join(map(_flag, takers))}")
        others = [name for name in (*STEPS, *WITHOUT_STEPS) if getattr(options, name)]
        if len(others) > 1:
            parser.error(
                f"{_flag(given)} goes with one report alone, not with {', '.join(map(_flag, others))}"
            )


def _goes_without_steps(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    for name in REHEARSAL_ONLY:
        given = getattr(options, name)
        # A rate of 0 is one, too.
        if given is not None and given is not False and not options.rehearse:
            parser.error(f"--{name.replace('_', '-')} goes with --rehearse")
    if options.role_prefix is not None and not options.roles_sql:
        parser.error("--role-prefix goes with --roles-sql")
    alone = [name for name in WITHOUT_STEPS if getattr(options, name)]
    if not alone:
        return False
    if any(getattr(options, name) for name in STEPS) or (set(alone) & set(ALONE) and len(alone) > 1):
        flags = ", ".join("--" + name.replace("_", "-") for name in alone)
        parser.error(f"{flags}: to be given without a step")
    if options.pause and options.resume:
        parser.error("--pause or --resume, not both")
    if any("=" not in text for text in options.set):
        parser.error("--set takes NAME=VALUE, for example --set max_wal_mib_per_second=50")
    return True


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
            flags = " or ".join("--" + step.replace("_", "-") for step in takers)
            parser.error(f"--{name.replace('_', '-')} goes with {flags}")
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

# Told of in the log files, as the steps are: what changes something, or does a lot.
LOGGED = ("rehearse", "reinstate_key_version", "pause", "resume", "set", "stop_runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps asked for.

    Returns:
        The exit status: 0 done, 1 not migrated, not verified or refused, 2 wrong usage or configuration.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    check_usage(parser, options)
    flags = [_flag(name) for name in (*STEPS, *LOGGED) if getattr(options, name)]
    if not flags or options.json:
        return _main(options, {})
    with logfiles.command(flags, options.table) as told:
        told["exit_status"] = status = _main(options, told)
    return status


def _main(options: argparse.Namespace, told: dict[str, object]) -> int:
    """Do what the options ask for.

    Args:
        options: checked.
        told: what the log files are to tell of the end.
    """
    try:
        for name, do in _OF_THE_WHOLE.items():
            if getattr(options, name):
                return do(options)
        catalogue = load_catalogue(settings.catalogue_path())
        tables = tuple(dict.fromkeys(options.table)) or catalogue.keys
        for name in tables:
            catalogue.table(name)
        for name, report in _OF_TABLES.items():
            if getattr(options, name) and (name != "preflight" or options.json):
                return report(options, catalogue, tables)
        return _run(options, catalogue, tables)
    except MigrationError as error:
        told["message"] = str(error)
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as stop:
        # Empty but for a command that only waited for others (LeftRunning).
        said = str(stop) or "stopped. What is done stays done; run the same again to go on."
        print(f"\n{PROGRAM}: {said}", file=sys.stderr)
        return 130


def _rehearse(options: argparse.Namespace) -> int:
    catalogue = load_catalogue(settings.catalogue_path())
    tables = list(dict.fromkeys(options.table))
    for name in tables:
        catalogue.table(name)
    if options.rows and settings.staging_database_url() is not None:
        raise ConfigurationError(
            "--rows is the size of the sample's staging copy, and ALPHAPULSE_STAGING_DATABASE_URL names another "
            "database: leave one of them out."
        )
    from alphapulse_encryption.rehearse import rehearse

    config = {**_chosen(options, REHEARSAL_OPTIONS), **({"tables": tables} if tables else {})}
    if options.rate is not None:
        config["traffic"] = {"rate": options.rate}
    try:
        return 0 if rehearse(config, options.rows) else 1
    except KeyboardInterrupt:
        print(
            f"\n{PROGRAM}: stopped. The clone is removed, or will be by the next rehearsal.", file=sys.stderr
        )
        return 130


def _print_backup_identity(_: argparse.Namespace) -> int:
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.backup import backup_identity
    from alphapulse_encryption.resources.environment import key_environment

    print(backup_identity(load_key_ring(key_environment())))
    return 0


def _print_schema(options: argparse.Namespace) -> int:
    from alphapulse_encryption.migration.discover import Discovery
    from alphapulse_encryption.migration.preview import Plan
    from alphapulse_encryption.migration.status import Status
    from alphapulse_encryption.reports.documents import print_schema

    print_schema(Plan if options.plan else Status if options.status else Discovery)
    return 0


def _discover(options: argparse.Namespace) -> int:
    from alphapulse_encryption.migration.discover import SAMPLED_ROWS, as_yaml, discover
    from alphapulse_encryption.reports.discovery import refuse_existing, show_discovery, write_catalogue
    from alphapulse_encryption.reports.documents import print_document
    from alphapulse_encryption.reports.terminal import console
    from alphapulse_encryption.resources.environment import target_database

    path = Path(options.output) if options.output else None
    if path is not None:
        refuse_existing(path, force=options.force)
    sample = SAMPLED_ROWS if options.sample is None else options.sample
    schemas = tuple(dict.fromkeys(options.schema))
    found = discover(target_database(), schemas=schemas, sample=sample)
    # Comments alone are no catalogue.
    if path is not None and found.catalogue is not None:
        write_catalogue(found, path, force=options.force)
    if options.json:
        print_document(found)
    elif path is None:
        sys.stdout.write(as_yaml(found))
    else:
        show_discovery(found, console())
        print(f"Nothing to write: {path}" if found.catalogue is None else f"✓ Wrote {path}")
    if found.catalogue is None:
        print(f"{PROGRAM}: nothing that looks sensitive could be put into a catalogue.", file=sys.stderr)
        return 1
    return 0


def _print_plan(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    from alphapulse_encryption.reports.documents import print_document
    from alphapulse_encryption.reports.plan import read_plan, show_plan
    from alphapulse_encryption.reports.terminal import console

    plan = read_plan(catalogue, tables)
    if options.json:
        print_document(plan)
    else:
        show_plan(plan, console())
    return 1 if plan.blockers else 0


def _print_status(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    from alphapulse_encryption.migration.status import read_status
    from alphapulse_encryption.reports.documents import print_document
    from alphapulse_encryption.reports.status import show_status, watch
    from alphapulse_encryption.reports.terminal import console
    from alphapulse_encryption.resources.environment import target_database

    database = target_database()
    if options.watch:
        watch(database, catalogue, tables, console())
        return 0
    status = read_status(database, catalogue, tables)
    if options.json:
        print_document(status)
    else:
        show_status(status, console())
    return 0


def _print_slow_queries(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    from dataclasses import replace

    from alphapulse_encryption.migration.slow_queries import DEFAULT_LIMIT, slow_queries
    from alphapulse_encryption.reports.documents import print_members
    from alphapulse_encryption.resources.environment import target_database

    found = slow_queries(
        replace(target_database(), read_only=True), [catalogue.table(name) for name in tables]
    )
    shown = found.queries[: options.limit or DEFAULT_LIMIT]
    if options.json:
        found = replace(found, queries=shown)
        print_members("slow-queries", {"report": found, "remarks": found.remarks})
        return 0
    since = "" if found.since is None else f" since {found.since:%Y-%m-%d %H:%M} UTC"
    print(f"Statements on {', '.join(tables)}{since}, slowest first:")
    for query in shown:
        print(f"{query.mean_ms:10,.2f} ms in {query.calls:,} calls ({query.total_ms:,.0f} ms): {query.shown}")
        for hint in query.hints:
            print(f"              ! {hint}")
    if not shown:
        print("  none was counted.")
    left = len(found.queries) - len(shown)
    if left:
        print(f"  … and {left} more: --limit {len(found.queries)}")
    if found.own:
        total = sum(query.total_ms for query in found.own)
        print(f"{len(found.own)} statements of this tool took {total:,.0f} ms; they are not listed.")
    for remark in found.remarks:
        print(f"! {remark}")
    return 0


def _print_preflight(_: argparse.Namespace, catalogue: Catalogue, __: tuple[str, ...]) -> int:
    """The findings as JSON; read directly, so that no run is seen in the UI."""
    from dataclasses import replace

    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.preflight import check
    from alphapulse_encryption.reports.documents import print_members
    from alphapulse_encryption.resources.environment import key_environment, target_database

    keys = load_key_ring(key_environment())
    report = check(replace(target_database(), read_only=True), catalogue, keys, once=True)
    print_members("preflight", {"report": report})
    return 1 if report.blockers else 0


def _print_approvals(options: argparse.Namespace) -> int:
    from alphapulse_encryption.migration.approvals import list_approvals
    from alphapulse_encryption.reports.documents import print_members
    from alphapulse_encryption.resources.environment import target_database

    with target_database().session("list the approvals") as connection:
        approvals = list_approvals(connection)
    if options.json:
        print_members("approvals", {"approvals": approvals})
        return 0
    for approval in approvals:
        print(approval)
    if not approvals:
        print("There is no approval.")
    return 0


def _check_key(_: argparse.Namespace) -> int:
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.database import DatabaseUnreachable
    from alphapulse_encryption.migration.tracking import stored_key_checks
    from alphapulse_encryption.resources.environment import key_environment, target_database, target_exists

    keys = load_key_ring(key_environment())
    # Deriving from each shows that it can be used, also where there is nothing to compare with.
    found = {version: keys.check_value(version) for version in keys.versions}
    stored: dict[int, str] | None = None
    unknown = "no database to compare with"
    try:
        if target_exists():
            with target_database().session("read the key-check values") as connection:
                stored = stored_key_checks(connection)
    except DatabaseUnreachable as error:
        unknown = f"not compared: {error}"
    for version, check in found.items():
        if stored is None:
            sign, verdict = "✓", unknown
        elif version not in stored:
            sign, verdict = "✓", "this database has not been begun with this version"
        elif stored[version] == check:
            sign, verdict = "✓", "the key this database was begun with"
        else:
            sign, verdict = "✗", "NOT the key this database was begun with: put the original one back there"
        current = " (current)" if version == keys.current_version else ""
        print(f"{sign} version {version}{current}: readable from {keys.origin(version)}; {verdict}")
    missing = sorted(set(stored or ()) - set(found))
    for version in missing:
        print(
            f"! version {version}: this database was begun with it, and there is no key of that version to read it"
        )
    return 1 if any(found.get(version, check) != check for version, check in (stored or {}).items()) else 0


def _print_key_usage(options: argparse.Namespace) -> int:
    from alphapulse_encryption.crypto.usage import MOST_MESSAGES
    from alphapulse_encryption.migration.usage import read_usage
    from alphapulse_encryption.reports.documents import print_members
    from alphapulse_encryption.resources.environment import target_database

    with target_database().session("read how much the keys are used") as connection:
        usages = read_usage(connection)
    if options.json:
        warnings = [warning for usage in usages if (warning := usage.warning()) is not None]
        print_members("key-usage", {"most_messages": MOST_MESSAGES, "usage": usages, "warnings": warnings})
        return 0
    for usage in usages:
        share = usage.messages / MOST_MESSAGES
        print(
            f"{'✓' if usage.warning() is None else '!'} {usage.context}, version {usage.key_version}: "
            f"{usage.messages:,} values encrypted ({share:.4%} of 2^32)"
        )
    for warning in filter(None, (usage.warning() for usage in usages)):
        print(warning)
    if not usages:
        print("Nothing has been encrypted yet.")
    return 0


def _print_key_versions(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    from alphapulse_encryption.crypto.envelope import get_format
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.tracking import key_versions
    from alphapulse_encryption.migration.versions import count_versions
    from alphapulse_encryption.reports.documents import print_members
    from alphapulse_encryption.resources.environment import key_environment, target_database

    keys = load_key_ring(key_environment())
    database = target_database()
    with database.session("read the key versions") as connection:
        versions = key_versions(connection)
    cipher = get_format(catalogue.format, keys)
    if options.json:
        found = (
            count_versions(database, [catalogue.table(name) for name in tables], cipher) if versions else []
        )
        print_members("key-versions", {"versions": versions, "tables": found})
        return 1 if _late(versions, found) else 0
    if not versions:
        print("This database has not been begun with any key version.")
        return 0
    for version in versions:
        readable = "" if version.number in keys.versions else "; there is NO KEY of it here"
        print(
            f"version {version.number}: {version.state} since {version.since:%Y-%m-%d %H:%M} UTC "
            f"({version.changed_by}){readable}"
        )
    if keys.current_version not in {v.number for v in versions if v.state == "current"}:
        print(f"! ALPHAPULSE_ENCRYPTION_KEY_VERSION says {keys.current_version} (see --rotate-keys)")
    counts = count_versions(database, [catalogue.table(name) for name in tables], cipher)
    for count in counts:
        print(f"{count.table}: {count}")
    late = _late(versions, counts)
    for number in late:
        print(f"! version {number} is retired, and values of it were written since: run --rotate-keys again")
    return 1 if late else 0


def _late(versions: Sequence[KeyVersion], counts: Sequence[TableVersions]) -> list[int]:
    """Key versions that are retired, and of which there are values all the same."""
    retired = {version.number for version in versions if version.state == "retired"}
    return sorted({number for count in counts for number in count.versions} & retired)


def _print_roles_sql(options: argparse.Namespace) -> int:
    from alphapulse_encryption.migration.roles import DEFAULT_PREFIX, roles_sql
    from alphapulse_encryption.resources.environment import target_database

    prefix = DEFAULT_PREFIX if options.role_prefix is None else options.role_prefix
    catalogue = load_catalogue(settings.catalogue_path())
    with target_database().session("look at who owns what") as connection:
        print(roles_sql(connection, catalogue, prefix), end="")
    return 0


def _reinstate_key_version(options: argparse.Namespace) -> int:
    from alphapulse_encryption.migration.database import Actor
    from alphapulse_encryption.migration.versions import reinstate_version
    from alphapulse_encryption.resources.environment import target_database

    version = options.reinstate_key_version
    changed = reinstate_version(target_database(), version, Actor("command line"))
    print(
        f"✓ Key version {version} is readable again"
        if changed
        else f"Nothing to do: {version} is not retired"
    )
    return 0


def _stop_runs(_: argparse.Namespace) -> int:
    from alphapulse_encryption.launch import stop_runs

    told = stop_runs()
    for line in told:
        print(line)
    if not told:
        print("No run is queued or under way.")
    return 0


def _test_alerts(_: argparse.Namespace) -> int:
    from alphapulse_encryption.alerts.delivery import VARIABLES, configured_channels, deliver, trial_message
    from alphapulse_encryption.errors import ConfigurationError

    channels = configured_channels()
    if not channels:
        raise ConfigurationError(f"No channel is configured for alerts: set {VARIABLES}.")
    message = trial_message(settings.alert_label())
    results = deliver([(channel, message) for channel in channels])
    for name, problem in results.items():
        print(f"✓ {name}: delivered" if problem is None else f"✗ {name}: not delivered: {problem}")
    return 1 if any(results.values()) else 0


def _change_settings(options: argparse.Namespace) -> int:
    from alphapulse_encryption.migration.database import Actor
    from alphapulse_encryption.migration.limits import change_limits
    from alphapulse_encryption.resources.environment import target_database

    changes = dict(text.partition("=")[::2] for text in options.set)
    if options.pause or options.resume:
        changes["paused"] = "true" if options.pause else "false"
    _show_settings(change_limits(target_database(), changes, Actor("command line")))
    return 0


def _print_settings(options: argparse.Namespace) -> int:
    from alphapulse_encryption.migration.limits import Limits, read_limits
    from alphapulse_encryption.migration.tracking import bookkeeping_exists
    from alphapulse_encryption.reports.documents import print_members
    from alphapulse_encryption.resources.environment import target_database

    with target_database().session("read the settings of running backfills") as connection:
        limits = read_limits(connection) if bookkeeping_exists(connection) else Limits()
    if options.json:
        described = {name: field.description for name, field in Limits.model_fields.items()}
        print_members("settings", {"settings": limits, "descriptions": described})
    else:
        _show_settings(limits)
    return 0


def _show_settings(limits: Limits) -> None:
    for name, field in type(limits).model_fields.items():
        print(f"{name} = {getattr(limits, name)}    # {field.description}")


# In this order: what changes settings shows them as well.
_OF_THE_WHOLE: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "rehearse": _rehearse,
    "backup_identity": _print_backup_identity,
    "json_schema": _print_schema,
    "discover": _discover,
    "approvals": _print_approvals,
    "check_key": _check_key,
    "key_usage": _print_key_usage,
    "test_alerts": _test_alerts,
    "roles_sql": _print_roles_sql,
    "stop_runs": _stop_runs,
    "reinstate_key_version": _reinstate_key_version,
    "pause": _change_settings,
    "resume": _change_settings,
    "set": _change_settings,
    "settings": _print_settings,
}
_OF_TABLES: Mapping[str, Callable[[argparse.Namespace, Catalogue, tuple[str, ...]], int]] = {
    "plan": _print_plan,
    "status": _print_status,
    "slow_queries": _print_slow_queries,
    "key_versions": _print_key_versions,
    # With --json; else it is a step.
    "preflight": _print_preflight,
}


def _check_backup(options: argparse.Namespace) -> None:
    from alphapulse_encryption.migration.drill import refuse_unless_possible
    from alphapulse_encryption.migration.offsite import open_client
    from alphapulse_encryption.resources.environment import backup_bucket, restore_drill_server

    if backup_bucket() is not None:
        open_client()
    if options.restore_drill:
        refuse_unless_possible(restore_drill_server())


def _run(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    from alphapulse_encryption.crypto.envelope import get_format
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.definition import check_catalogue
    from alphapulse_encryption.migration.plan import check_ranges
    from alphapulse_encryption.migration.roles import refuse_unless_allowed
    from alphapulse_encryption.migration.tracking import check_key, check_key_values
    from alphapulse_encryption.resources.environment import key_environment, target_database

    ranges = settings.batch_ranges()
    keys = load_key_ring(key_environment())
    get_format(catalogue.format, keys)
    database = target_database()
    # The steps look at all this themselves; here it is known before the first of them has begun.
    with database.session("check the configuration") as connection:
        for name in STEPS:
            if getattr(options, name):
                refuse_unless_allowed(connection, name, [catalogue.table(key) for key in tables])
        # A rotation that begins has another current version than the database.
        (check_key_values if options.rotate_keys else check_key)(connection, keys)
        check_catalogue(connection, catalogue, tables)
        for key in () if options.replan else tables:
            check_ranges(connection, catalogue.table(key), ranges)
    if options.backup:
        _check_backup(options)
    # Dagster takes a second to load: not before all this is known to be right.
    from alphapulse_encryption.launch import launcher
    from alphapulse_encryption.steps import Steps

    with ExitStack() as stack:
        steps = Steps(
            stack.enter_context(launcher(ranges, options.runs)),
            database,
            catalogue,
            keys,
            tables,
            backfill=_chosen(options, BACKFILL_OPTIONS),
            reindex=options.reindex,
            restore_drill=options.restore_drill,
            verification=_chosen(options, VERIFICATION_OPTIONS),
            rotation=_chosen(options, BACKFILL_OPTIONS),
            operator=options.operator or "",
            hold=options.hold,
        )
        for name in STEPS:
            if not getattr(options, name):
                continue
            if name == "approve_drop":
                succeeded = steps.approve_drop(
                    options.approver, options.reason, options.confirmation, options.valid_hours
                )
            elif name == "revoke_approval":
                succeeded = steps.revoke_approval(options.revoke_approval, options.reason or "")
            elif name == "erase_dropped":
                succeeded = steps.erase_dropped(options.confirmation)
            elif name == "rebuild_indexes":
                succeeded = steps.rebuild_indexes(options.rebuild_indexes)
            else:
                succeeded = getattr(steps, name)()
            if not succeeded:
                return 1
    return 0


def _chosen(options: argparse.Namespace, names: Sequence[str]) -> dict[str, object]:
    return {name: getattr(options, name) for name in names if getattr(options, name) not in (None, False)}


if __name__ == "__main__":
    uncaught.tell_no_texts()
    uncaught.leave_no_core()
    sys.exit(main())
