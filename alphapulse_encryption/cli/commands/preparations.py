"""What is made ready before the day: the roles, the channels of alerts, and a rehearsal on a clone."""

from __future__ import annotations

import argparse
import sys

from alphapulse_encryption import settings
from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.cli.commands.parser import PROGRAM
from alphapulse_encryption.cli.commands.usage import REHEARSAL_OPTIONS, given
from alphapulse_encryption.errors import ConfigurationError


def print_roles_sql(options: argparse.Namespace) -> int:
    """SQL that creates the roles, for an administrator to run."""
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.gates.roles import DEFAULT_PREFIX, roles_sql

    prefix = DEFAULT_PREFIX if options.role_prefix is None else options.role_prefix
    catalogue = load_catalogue(settings.TargetVariables().catalogue_path)
    with target_database().session("look at who owns what") as connection:
        print(roles_sql(connection, catalogue, prefix), end="")
    return 0


def try_alerts(_: argparse.Namespace) -> int:
    """Send a message to every channel that is configured, and tell which got it."""
    from alphapulse_encryption.defs.alerts.delivery import (
        VARIABLES,
        configured_channels,
        deliver,
        trial_message,
    )

    channels = configured_channels()
    if not channels:
        raise ConfigurationError(f"No channel is configured for alerts: set {VARIABLES}.")
    message = trial_message(settings.Alerts().label)
    results = deliver([(channel, message) for channel in channels])
    for name, problem in results.items():
        print(f"✓ {name}: delivered" if problem is None else f"✗ {name}: not delivered: {problem}")
    return 1 if any(results.values()) else 0


def rehearse_on_a_clone(options: argparse.Namespace) -> int:
    """The whole migration on a clone of the staging database, measured."""
    catalogue = load_catalogue(settings.TargetVariables().catalogue_path)
    tables = list(dict.fromkeys(options.table))
    for name in tables:
        catalogue.table(name)
    if options.rows and settings.Rehearsals().staging_database_url is not None:
        raise ConfigurationError(
            "--rows is the size of the sample's staging copy, and ALPHAPULSE_STAGING_DATABASE_URL names another "
            "database: leave one of them out."
        )
    from alphapulse_encryption.cli.rehearse import rehearse

    config = {**given(options, REHEARSAL_OPTIONS), **({"tables": tables} if tables else {})}
    if options.rate is not None:
        config["traffic"] = {"rate": options.rate}
    try:
        return 0 if rehearse(config, options.rows) else 1
    except KeyboardInterrupt:
        print(
            f"\n{PROGRAM}: stopped. The clone is removed, or will be by the next rehearsal.", file=sys.stderr
        )
        return 130
