"""The command line's options, of the steps from the guide, others from a table beside this; and which go together."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from alphapulse_encryption import guide
from alphapulse_encryption.bounds import LARGEST_BATCH_SIZE, MOST_WORKERS, whole_number
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
    """An option of the command line that is no step; ``options.yaml`` says what its members mean."""

    group: str
    name: str
    help: str
    value: str = ""
    several: bool = False
    command: str = ""
    json: bool = False
    schema: bool = False
    needs: tuple[str, ...] = ()


@cache
def all_options() -> tuple[Option, ...]:
    """In the order of the help."""
    text = Path(__file__).with_name("options.yaml").read_text(encoding="utf-8")
    return tuple(
        Option(group, _dest(name), needs=tuple(map(_dest, more.pop("with", ()))), **more)
        for group, found in yaml.safe_load(text).items()
        for name, more in found.items()
    )


def _dest(name: str) -> str:
    return name.replace("-", "_")


def _hours(text: str) -> float:
    # float() would also take "nan", "1e3" and "1_0".
    plain = text.isascii() and text.replace(".", "", 1).isdigit() and len(text) <= LONGEST_NUMBER
    if plain and 0 < float(text) <= MOST_HOURS:
        return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of hours, at most {MOST_HOURS}")


_TYPES: Mapping[str, Callable[[str], object]] = {
    "limit": whole_number(1, MOST_SHOWN),
    "sample": whole_number(0, LARGEST_SAMPLE, f"a whole number up to {LARGEST_SAMPLE}"),
    "reinstate_key_version": whole_number(1, LARGEST_NUMBER, "a key version, as --key-versions shows it"),
    "rows": whole_number(SMALLEST_SAMPLE, LARGEST_NUMBER, f"a whole number of at least {SMALLEST_SAMPLE}"),
    "rate": whole_number(0, HIGHEST_RATE, f"a whole number up to {HIGHEST_RATE}"),
    "batch_size": whole_number(1, LARGEST_BATCH_SIZE),
    "workers": whole_number(1, MOST_WORKERS),
    "runs": whole_number(1, MOST_RUNS),
    "valid_hours": _hours,
}


def with_json() -> tuple[str, ...]:
    """Reports that can be had as JSON."""
    return (*(one.name for one in all_options() if one.json or one.schema), "preflight")


def with_schema() -> tuple[str, ...]:
    """Those whose document has a schema."""
    return tuple(one.name for one in all_options() if one.schema)


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
    for title in dict.fromkeys(one.group for one in all_options()):
        group = parser.add_argument_group(title)
        if title == "steps":
            for step in guide.STEPS:
                _add_step(group, step)
        more = _json(title) if title.startswith("reports") else ()
        for option in (*(one for one in all_options() if one.group == title), *more):
            _add(group, option)
    return parser


def _json(group: str) -> Iterator[Option]:
    for name, does, takers in (
        ("json", "one JSON document on standard output", with_json()),
        ("json_schema", "print the JSON schema of that document instead", with_schema()),
    ):
        yield Option(group, name, f"{does}; with {', '.join(map(flag, takers))}")


def _add_step(group: argparse._ArgumentGroup, step: guide.Step) -> None:
    if step.choices:
        group.add_argument(step.flag, choices=step.choices, help=step.help)
    elif step.number:
        number = whole_number(1, LARGEST_NUMBER, step.number)
        group.add_argument(step.flag, type=number, metavar="N", help=step.help)
    else:
        group.add_argument(step.flag, action="store_true", help=step.help)


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    how: dict[str, Any] = {"metavar": option.value, "type": _TYPES.get(option.name)}
    if option.several:
        how |= {"action": "append", "default": []}
    elif not option.value:
        how = {"action": "store_true"}
    group.add_argument(flag(option.name), help=option.help, **how)


# Options of --rehearse, named as in the job's configuration.
REHEARSAL_OPTIONS = ("workers", "batch_size", "source_is_not_production", "keep_clone")


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, object]:
    """Those of the named options that were given, with their values; a number may be 0."""
    found = {name: getattr(options, name) for name in names}
    return {name: value for name, value in found.items() if value not in (None, []) and value is not False}


def check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse combinations that mean nothing; ends the process with status 2."""
    steps = given(options, [step.name for step in guide.STEPS])
    commands = given(options, [one.name for one in all_options() if one.command])
    documents = {"json": with_json(), "json_schema": with_schema()}
    _check_takers(parser, options, {one.name: one.needs for one in all_options() if one.needs} | documents)
    if options.discover and options.table:
        parser.error("--discover looks at whole schemas: --schema, not --table")
    if options.watch and (options.json or options.json_schema):
        parser.error("--watch is for people: ask for --json as often as you like")
    asked = [*steps, *commands]
    if len(asked) > 1 and (one := next(iter(given(options, documents)), None)):
        parser.error(f"{flag(one)} goes with one report alone, not with {', '.join(map(flag, asked))}")
    if commands:
        alone = {one.name for one in all_options() if one.command == "alone"}
        if steps or (len(commands) > 1 and alone & set(commands)):
            parser.error(f"{', '.join(map(flag, commands))}: to be given without a step")
        if options.pause and options.resume:
            parser.error("--pause or --resume, not both")
        if any("=" not in text for text in options.set):
            parser.error("--set takes NAME=VALUE, for example --set max_wal_mib_per_second=50")
        return
    if not steps:
        parser.error("name at least one step, for example --add-columns (see --help)")
    if options.drop_unencrypted and not options.confirm:
        parser.error(
            "--drop-unencrypted removes the plaintext columns: add --confirm if that is what you want"
        )
    if options.erase_dropped and (len(options.table) != 1 or not options.confirmation):
        parser.error(
            "--erase-dropped takes one --table and --confirmation with its name: it rewrites the table, which nobody "
            "reads or writes meanwhile"
        )
    if options.approve_drop:
        missing = [n for n in ("approver", "reason", "confirmation") if not getattr(options, n)]
        if len(options.table) != 1 or missing:
            parser.error(
                "--approve-drop takes one --table and --approver, --reason and --confirmation"
                + (f" (missing: {', '.join(map(flag, missing))})" if missing else "")
            )
    of_steps = {one.name: guide.takers(one.name) for one in all_options()}
    _check_takers(parser, options, {name: takers for name, takers in of_steps.items() if takers})


def _check_takers(
    parser: argparse.ArgumentParser, options: argparse.Namespace, takers: Mapping[str, tuple[str, ...]]
) -> None:
    for name in given(options, takers):
        if not given(options, takers[name]):
            parser.error(f"{flag(name)} goes with {' or '.join(map(flag, takers[name]))}")
