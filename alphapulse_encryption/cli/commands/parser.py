"""The command line's options: their names, types and help."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from alphapulse_encryption.bounds import LARGEST_BATCH_SIZE, MOST_WORKERS
from alphapulse_encryption.cli.commands.usage import JSON_TAKERS, PROGRAM, SCHEMA_TAKERS, flag

MOST_RUNS = 999
MOST_HOURS = 168
SMALLEST_SAMPLE = 1_000
LARGEST_SAMPLE = 100_000
HIGHEST_RATE = 1_000
LONGEST_NUMBER = 18
LARGEST_NUMBER = 10**LONGEST_NUMBER - 1
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
    # In the order of the help.
    _add_reports(parser)
    _add_steps(parser)
    _add_roles(parser)
    _add_rehearsal(parser)
    _add_running(parser)
    _add_options(parser)
    _add_approval(parser)
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
        "--limit",
        type=_between(1, MOST_SHOWN),
        metavar="N",
        help="with --slow-queries: how many to show (default: 20)",
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
        type=_up_to(LARGEST_SAMPLE),
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
        help="one JSON document on standard output; with " + ", ".join(flag(name) for name in JSON_TAKERS),
    )
    reports.add_argument(
        "--json-schema",
        action="store_true",
        help="print the JSON schema of that document instead; with "
        + ", ".join(flag(name) for name in SCHEMA_TAKERS),
    )


def _add_steps(parser: argparse.ArgumentParser) -> None:
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
        "--revoke-approval",
        type=_whole_number(1, LARGEST_NUMBER, "the number of an approval, as --approvals shows it"),
        metavar="N",
        help="take approval N back (see --approvals)",
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
    steps.add_argument(
        "--rebuild-indexes",
        choices=("all", "encrypted"),
        help="after the migration: build the tables' indexes anew, concurrently: all of them, or only those with an "
        "encrypted or search column in them",
    )
    steps.add_argument(
        "--analyze", action="store_true", help="after the migration: take the planner's statistics anew"
    )
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
        type=_whole_number(1, LARGEST_NUMBER, "a key version, as --key-versions shows it"),
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
    rehearsal = parser.add_argument_group("rehearsal, on a clone of ALPHAPULSE_STAGING_DATABASE_URL")
    rehearsal.add_argument(
        "--rehearse",
        action="store_true",
        help="the whole migration there and back on a clone, measured; the database itself is only read",
    )
    rehearsal.add_argument(
        "--rows",
        type=_whole_number(SMALLEST_SAMPLE, LARGEST_NUMBER, f"a whole number of at least {SMALLEST_SAMPLE}"),
        metavar="N",
        help="size of the sample's staging copy, which is rehearsed where no staging database is named",
    )
    rehearsal.add_argument(
        "--rate",
        type=_up_to(HIGHEST_RATE),
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


def _add_running(parser: argparse.ArgumentParser) -> None:
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


def _add_options(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("options")
    options.add_argument(
        "--table",
        action="append",
        default=[],
        metavar="T",
        help="only this table; may be given several times",
    )
    options.add_argument(
        "--batch-size",
        type=_between(1, LARGEST_BATCH_SIZE),
        metavar="N",
        help="rows per batch (default: adapted to the server)",
    )
    options.add_argument(
        "--workers",
        type=_between(1, MOST_WORKERS),
        metavar="N",
        help="batch ranges encrypted, verified or encrypted again at once (default: 1)",
    )
    options.add_argument(
        "--runs",
        type=_between(1, MOST_RUNS),
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


def _add_approval(parser: argparse.ArgumentParser) -> None:
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


def _whole_number(least: int, most: int, what: str) -> Callable[[str], int]:
    """The type of an option that takes one.

    Args:
        least: included.
        most: included.
        what: it has to be, for people.
    """

    def read(text: str) -> int:
        # int() also takes other digits than ours, and refuses thousands of digits with words of its own.
        if text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be {what}")

    return read


def _between(least: int, most: int) -> Callable[[str], int]:
    return _whole_number(least, most, f"a whole number from {least} to {most}")


def _up_to(most: int) -> Callable[[str], int]:
    return _whole_number(0, most, f"a whole number up to {most}")


def _hours(text: str) -> float:
    # float() would also take "nan", "1e3" and "1_0".
    plain = text.isascii() and text.replace(".", "", 1).isdigit() and len(text) <= LONGEST_NUMBER
    if plain and 0 < float(text) <= MOST_HOURS:
        return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of hours, at most {MOST_HOURS}")
