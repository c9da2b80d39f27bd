"""The command line's options: their names, types and help. Those of the steps come from the guide."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from alphapulse_encryption import guide
from alphapulse_encryption.bounds import LARGEST_BATCH_SIZE, MOST_WORKERS
from alphapulse_encryption.guide import flag

PROGRAM = "python -m alphapulse_encryption"

MOST_RUNS = 999
MOST_HOURS = 168
SMALLEST_SAMPLE = 1_000
LARGEST_SAMPLE = 100_000
HIGHEST_RATE = 1_000
LONGEST_NUMBER = 18
LARGEST_NUMBER = 10**LONGEST_NUMBER - 1
MOST_SHOWN = 1_000

_EPILOG = """\
Several of the steps may be given at once; they run in the guide's order. Every run is seen in Dagster's UI (make ui).
Exit status: 0 done; 1 something is not migrated, not verified or refused (the message says what); 2 wrong usage or
configuration. The database is ALPHAPULSE_DATABASE_URL, or the embedded sample database where that is unset.
"""


@dataclass(frozen=True)
class Option:
    """An option of the command line that is no step.

    Args:
        name: with underscores.
        help: what it asks for.
        value: what is typed behind it; empty for a switch.
        type: what reads the value; text where None.
        several: whether it may be given several times.
        choices: what the value may be.
        goes_with: one of these is needed beside it; empty for one that is checked elsewhere, or for a command.
        command: whether it is done at once, without a step: ``alone`` beside no other command, or ``together``.
        json: whether ``--json`` goes with it; ``schema``: ``--json-schema`` as well.
    """

    name: str
    help: str
    value: str = ""
    type: Callable[[str], object] | None = None
    several: bool = False
    choices: tuple[str, ...] = ()
    goes_with: tuple[str, ...] = ()
    command: str = ""
    json: bool = False
    schema: bool = False


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


_REPORTS = (
    Option(
        "plan",
        "what would be done: statements, batch ranges, durations, growth, locks, obstacles",
        command="alone",
        schema=True,
    ),
    Option(
        "status",
        "where it stands: per table and column, who works, what is left",
        command="alone",
        schema=True,
    ),
    Option(
        "slow_queries",
        "step 7: what statements on encrypted tables cost, from pg_stat_statements, slowest first",
        command="alone",
        json=True,
    ),
    Option(
        "limit",
        "with --slow-queries: how many to show (default: 20)",
        "N",
        _between(1, MOST_SHOWN),
        goes_with=("slow_queries",),
    ),
    Option("watch", "with --status: again and again, until Ctrl-C", goes_with=("status",)),
    Option(
        "discover",
        "propose a catalogue for this database, by names, types and the form of sampled values; shows none",
        command="alone",
        schema=True,
    ),
    Option(
        "schema",
        "with --discover: only this schema; may be given several times",
        "S",
        several=True,
        goes_with=("discover",),
    ),
    Option(
        "sample",
        "with --discover: rows of each table whose values are looked at; 0 for none (default: 1000)",
        "N",
        _up_to(LARGEST_SAMPLE),
        goes_with=("discover",),
    ),
    Option(
        "output",
        "with --discover: write the catalogue there; it must not exist",
        "FILE",
        goes_with=("discover",),
    ),
    Option("force", "with --output: replace the file", goes_with=("output",)),
)
_KEYS_AND_APPROVALS = (
    Option(
        "key_versions",
        "show the key versions, and how many values each table has of them; reads every row",
        command="alone",
        json=True,
    ),
    Option(
        "reinstate_key_version",
        "a retired key version is readable again",
        "N",
        _whole_number(1, LARGEST_NUMBER, "a key version, as --key-versions shows it"),
        command="alone",
    ),
    Option(
        "backup_identity",
        "print the age identity that opens backups; a secret, keep it like the master key",
        command="alone",
    ),
    Option("approvals", "show every approval: open, used, revoked or expired", command="alone", json=True),
    Option(
        "check_key",
        "read the master key of every version and compare it with what this database was begun with; reads only",
        command="alone",
    ),
    Option(
        "key_usage",
        "show how many values each key has encrypted, and how many it may; reads only",
        command="alone",
        json=True,
    ),
    Option(
        "test_alerts", "send a test message to every channel that alerts are configured for", command="alone"
    ),
)
_ROLES = (
    Option(
        "roles_sql",
        "print SQL that creates the roles, for a database administrator to run with psql; reads only",
        command="alone",
    ),
    Option(
        "role_prefix",
        "what their names begin with (default: alphapulse_)",
        "TEXT",
        goes_with=("roles_sql",),
    ),
)
_REHEARSAL = (
    Option(
        "rehearse",
        "the whole migration there and back on a clone, measured; the database itself is only read",
        command="alone",
    ),
    Option(
        "rows",
        "size of the sample's staging copy, which is rehearsed where no staging database is named",
        "N",
        _whole_number(SMALLEST_SAMPLE, LARGEST_NUMBER, f"a whole number of at least {SMALLEST_SAMPLE}"),
        goes_with=("rehearse",),
    ),
    Option(
        "rate",
        "requests per second that the application makes on the clone meanwhile; 0 for none (default: 20)",
        "N",
        _up_to(HIGHEST_RATE),
        goes_with=("rehearse",),
    ),
    Option(
        "source_is_not_production",
        "the staging database is not production, though its name says so, or it is a physical copy",
        goes_with=("rehearse",),
    ),
    Option("keep_clone", "leave the clone there; you remove it yourself", goes_with=("rehearse",)),
)
_RUNNING = (
    Option("pause", "have every backfill wait at its next batch", command="together"),
    Option("resume", "let them go on", command="together"),
    Option("set", "change a setting (see --settings)", "NAME=VALUE", several=True, command="together"),
    Option("settings", "show the settings", command="together", json=True),
    Option(
        "stop_runs",
        "stop every run that is queued or under way, on whatever machine; what is done stays done",
        command="alone",
    ),
)
# What these go with the guide says.
_OF_STEPS = (
    Option("table", "only this table; may be given several times", "T", several=True),
    Option(
        "batch_size",
        "rows per batch (default: adapted to the server)",
        "N",
        _between(1, LARGEST_BATCH_SIZE),
    ),
    Option(
        "workers",
        "batch ranges encrypted, verified or encrypted again at once (default: 1)",
        "N",
        _between(1, MOST_WORKERS),
    ),
    Option(
        "runs",
        "with workers on other machines: runs that the batch ranges of each table are spread over (default: 4)",
        "N",
        _between(1, MOST_RUNS),
    ),
    Option("work_mem", "memory of one sort or hash in our sessions, for example 256MB", "SIZE"),
    Option("autovacuum_off", "turn autovacuum off for the tables during the backfill; always put back"),
    Option("reindex", "rebuild every index after the backfill, concurrently"),
    Option("restore_drill", "with --backup: restore it into a scratch database and compare"),
    Option("confirm", "needed with --drop-unencrypted"),
    Option(
        "hold",
        "with --restore-plaintext: stop before the plaintext becomes right, until no instance of the application "
        "writes ciphertext alone; run it again without",
    ),
)
_APPROVAL = (
    Option("approver", "your name, for the audit log", "NAME"),
    Option("reason", "why now, for the audit log", "TEXT"),
    Option("confirmation", "the table's name, typed once more (both)", "T"),
    Option("valid_hours", "how long it may be used (default: 24)", "N", _hours),
    Option(
        "operator",
        "with --drop-unencrypted or --revoke-approval: your name; outside the sample, a drop needs it, and "
        "another one than the approver's (setting two_person_rule)",
        "NAME",
    ),
)


def _steps() -> Iterator[Option]:
    for step in guide.STEPS:
        yield Option(
            step.name,
            f"{step.number}: {step.help}" if step.number else step.help,
            "N" if step.number_of else "",
            _whole_number(1, LARGEST_NUMBER, step.number_of) if step.number_of else None,
            choices=step.choices,
            json=step.name == "preflight",
        )


def _json() -> Iterator[Option]:
    takers = ", ".join(flag(name) for name in with_json())
    yield Option("json", f"one JSON document on standard output; with {takers}")
    takers = ", ".join(flag(name) for name in with_schema())
    yield Option("json_schema", f"print the JSON schema of that document instead; with {takers}")


# In the order of the help.
_COMMANDS = (*_REPORTS, *_KEYS_AND_APPROVALS, *_ROLES, *_REHEARSAL, *_RUNNING)


def commands(how: str = "") -> tuple[str, ...]:
    """What is done at once, without a run of Dagster's: all, or what is done ``alone``."""
    return tuple(one.name for one in _COMMANDS if one.command and how in ("", one.command))


def with_json() -> tuple[str, ...]:
    """Reports that can be had as JSON."""
    reports = [one.name for one in _COMMANDS if one.json or one.schema]
    return (*reports[:4], "preflight", *reports[4:])


def with_schema() -> tuple[str, ...]:
    """Those whose document has a schema."""
    return tuple(one.name for one in _COMMANDS if one.schema)


def go_with() -> dict[str, tuple[str, ...]]:
    """Options of commands, and one of which each of them needs."""
    return {one.name: one.goes_with for one in _COMMANDS if one.goes_with}


def of_steps() -> dict[str, tuple[str, ...]]:
    """Options of steps, and one of which each of them needs."""
    names = [one.name for one in (*_OF_STEPS, *_APPROVAL)]
    takers = {name: tuple(step.name for step in guide.takers(name)) for name in names}
    return {name: steps for name, steps in takers.items() if steps}


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
    for title, options in (
        ("reports (read only, without a run)", (*_REPORTS, *_json())),
        ("steps", (*_steps(), *_KEYS_AND_APPROVALS)),
        ("least privilege", _ROLES),
        ("rehearsal, on a clone of ALPHAPULSE_STAGING_DATABASE_URL", _REHEARSAL),
        ("running backfills (at once, also of other processes)", _RUNNING),
        ("options", _OF_STEPS),
        ("approval (with --approve-drop --table T, or --erase-dropped --table T)", _APPROVAL),
    ):
        group = parser.add_argument_group(title)
        for option in options:
            _add(group, option)
    return parser


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    name = flag(option.name)
    if option.choices:
        group.add_argument(name, choices=option.choices, help=option.help)
    elif option.several:
        group.add_argument(name, action="append", default=[], metavar=option.value, help=option.help)
    elif option.type:
        group.add_argument(name, type=option.type, metavar=option.value, help=option.help)
    elif option.value:
        group.add_argument(name, metavar=option.value, help=option.help)
    else:
        group.add_argument(name, action="store_true", help=option.help)
