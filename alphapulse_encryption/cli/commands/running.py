"""What is under way, also in other processes: the settings that it follows, and its end."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alphapulse_encryption.migration.bookkeeping.limits import Limits


def change_settings(options: argparse.Namespace) -> int:
    """Change what ``--set``, ``--pause`` and ``--resume`` name, and show all of them."""
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.bookkeeping.limits import change_limits
    from alphapulse_encryption.migration.postgres.database import Actor

    changes = dict(text.partition("=")[::2] for text in options.set)
    if options.pause or options.resume:
        changes["paused"] = "true" if options.pause else "false"
    _show_settings(change_limits(target_database(), changes, Actor("command line")))
    return 0


def print_settings(options: argparse.Namespace) -> int:
    """The settings, with what they mean."""
    from alphapulse_encryption.cli.reports.documents import print_members
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
    from alphapulse_encryption.migration.bookkeeping.limits import Limits, read_limits

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


def stop_all_runs(_: argparse.Namespace) -> int:
    """Stop every run that is queued or under way."""
    from alphapulse_encryption.cli.unfinished import stop_runs

    told = stop_runs()
    for line in told:
        print(line)
    if not told:
        print("No run is queued or under way.")
    return 0
