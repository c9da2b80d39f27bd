"""Which options go together."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping

from alphapulse_encryption import guide
from alphapulse_encryption.cli.commands import parser as options_of
from alphapulse_encryption.guide import flag

# Options of --rehearse, named as in the job's configuration.
REHEARSAL_OPTIONS = ("workers", "batch_size", "source_is_not_production", "keep_clone")


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, object]:
    """Those of the named options that were given, with their values; a number may be 0."""
    found = {name: getattr(options, name) for name in names}
    return {name: value for name, value in found.items() if value not in (None, []) and value is not False}


def check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse combinations that mean nothing; ends the process with status 2."""
    steps = given(options, [step.name for step in guide.STEPS])
    commands = given(options, [one.name for one in options_of.options() if one.command])
    _check_takers(parser, options, {one.name: one.needs for one in options_of.options() if one.needs})
    _check_reports(parser, options, {**steps, **commands})
    if commands:
        alone = {one.name for one in options_of.options() if one.command == "alone"}
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
    of_steps = {one.name: guide.takers(one.name) for one in options_of.options()}
    _check_takers(parser, options, {name: takers for name, takers in of_steps.items() if takers})


def _check_takers(
    parser: argparse.ArgumentParser, options: argparse.Namespace, takers: Mapping[str, tuple[str, ...]]
) -> None:
    for name in given(options, takers):
        if not given(options, takers[name]):
            parser.error(f"{flag(name)} goes with {' or '.join(map(flag, takers[name]))}")


def _check_reports(
    parser: argparse.ArgumentParser, options: argparse.Namespace, asked: Mapping[str, object]
) -> None:
    if options.discover and options.table:
        parser.error("--discover looks at whole schemas: --schema, not --table")
    if options.watch and (options.json or options.json_schema):
        parser.error("--watch is for people: ask for --json as often as you like")
    takers = {"json": options_of.with_json(), "json_schema": options_of.with_schema()}
    _check_takers(parser, options, takers)
    for name in given(options, takers):
        if len(asked) > 1:
            parser.error(f"{flag(name)} goes with one report alone, not with {', '.join(map(flag, asked))}")
