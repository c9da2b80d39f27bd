"""The guide's command line. Each flag launches the job that the UI launches, on the same instance."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from alphapulse_encryption import guide, logfiles, secrecy, settings
from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.cli.commands.parser import PROGRAM, build_parser, check_usage, given
from alphapulse_encryption.errors import MigrationError

# Told of in the log files, as the steps are: what changes something, or does a lot.
LOGGED = ("rehearse", "reinstate_key_version", "sign_saved", "pause", "resume", "set", "stop_runs")


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
    # Not before the options are known to go together: all that reports take.
    from alphapulse_encryption.cli.commands.at_once import OF_TABLES, OF_THE_WHOLE, run_steps

    try:
        for name, do in OF_THE_WHOLE.items():
            if getattr(options, name):
                return do(options) or 0
        catalogue = load_catalogue(settings.TargetVariables().catalogue_path)
        tables = tuple(dict.fromkeys(options.table)) or catalogue.keys
        for name in tables:
            catalogue.table(name)
        for name, report in OF_TABLES.items():
            if getattr(options, name) and (name != "preflight" or options.json):
                return report(options, catalogue, tables) or 0
        return run_steps(options, catalogue, tables)
    except MigrationError as error:
        told["message"] = str(error)
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as stop:
        # Empty but for a command that only waited for others (LeftRunning).
        said = str(stop) or "stopped. What is done stays done; run the same again to go on."
        print(f"\n{PROGRAM}: {said}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    secrecy.run_program(main)
