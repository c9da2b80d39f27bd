"""The guide's command line. Each flag launches the job that the UI launches, on the same instance."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from alphapulse_encryption import guide, logfiles, secrecy, settings
from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.cli.commands import keys, preparations, reports, running
from alphapulse_encryption.cli.commands.parser import PROGRAM, build_parser
from alphapulse_encryption.cli.commands.usage import check_usage, given
from alphapulse_encryption.errors import MigrationError

# Told of in the log files, as the steps are: what changes something, or does a lot.
LOGGED = ("rehearse", "reinstate_key_version", "pause", "resume", "set", "stop_runs")

# In this order: what changes settings shows them as well.
_OF_THE_WHOLE: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "rehearse": preparations.rehearse_on_a_clone,
    "backup_identity": keys.print_backup_identity,
    "json_schema": reports.print_json_schema,
    "discover": reports.print_discovery,
    "approvals": reports.print_approvals,
    "check_key": keys.compare_keys,
    "key_usage": keys.print_key_usage,
    "test_alerts": preparations.try_alerts,
    "roles_sql": preparations.print_roles_sql,
    "stop_runs": running.stop_all_runs,
    "reinstate_key_version": keys.reinstate_key_version,
    "pause": running.change_settings,
    "resume": running.change_settings,
    "set": running.change_settings,
    "settings": running.print_settings,
}
_OF_TABLES: Mapping[str, Callable[[argparse.Namespace, Catalogue, tuple[str, ...]], int]] = {
    "plan": reports.print_plan,
    "status": reports.print_status,
    "slow_queries": reports.print_slow_queries,
    "key_versions": keys.print_key_versions,
    # With --json; else it is a step.
    "preflight": reports.print_preflight,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps asked for; 0 is done, 1 not migrated, not verified or refused, 2 wrong usage or configuration."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    check_usage(parser, options)
    told_of = (*(step.name for step in guide.in_running_order()), *LOGGED)
    flags = [guide.flag(name) for name in given(options, told_of)]
    if not flags or options.json:
        return _main(options, {})
    with logfiles.command(flags, options.table) as told:
        told["exit_status"] = status = _main(options, told)
    return status


def _main(options: argparse.Namespace, told: dict[str, object]) -> int:
    """Do what the checked options ask for, and add to what the log files are to tell of the end."""
    try:
        for name, do in _OF_THE_WHOLE.items():
            if getattr(options, name):
                return do(options)
        catalogue = load_catalogue(settings.TargetVariables().catalogue_path)
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


def _run(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    from alphapulse_encryption.crypto.envelope import get_format
    from alphapulse_encryption.defs.resources import environment
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.bookkeeping.keys import check_key, check_key_values
    from alphapulse_encryption.migration.gates.drill import refuse_unless_possible
    from alphapulse_encryption.migration.gates.offsite import open_client
    from alphapulse_encryption.migration.gates.roles import refuse_unless_allowed
    from alphapulse_encryption.migration.rows.plan import check_ranges
    from alphapulse_encryption.migration.schema.definition import check_catalogue

    ranges = settings.TargetVariables().batch_ranges
    key_ring = load_key_ring(environment.key_environment())
    get_format(catalogue.format, key_ring)
    database = environment.target_database()
    asked = [step for step in guide.in_running_order() if given(options, [step.name])]
    # The steps look at all this themselves; here it is known before the first of them has begun.
    with database.session("check the configuration") as connection:
        for step in asked:
            refuse_unless_allowed(connection, step.name, [catalogue.table(key) for key in tables])
        # A rotation that begins has another current version than the database.
        (check_key_values if options.rotate_keys else check_key)(connection, key_ring)
        check_catalogue(connection, catalogue, tables)
        for key in () if options.replan else tables:
            check_ranges(connection, catalogue.table(key), ranges)
    if options.backup:
        if environment.backup_bucket() is not None:
            open_client()
        if options.restore_drill:
            refuse_unless_possible(environment.restore_drill_server())
    # Dagster takes a second to load: not before all this is known to be right.
    from alphapulse_encryption.cli.launch import launcher
    from alphapulse_encryption.cli.steps import Steps

    with launcher(ranges, options.runs) as found:
        steps = Steps(found, database, catalogue, key_ring, tables)
        for step in asked:
            value = {step.value: getattr(options, step.name)} if step.value else {}
            if not steps.run(step.name, **given(options, step.options), **value):
                return 1
    return 0


if __name__ == "__main__":
    secrecy.run_program(main)
