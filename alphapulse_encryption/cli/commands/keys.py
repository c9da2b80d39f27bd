"""The keys: whether they are the right ones, how much they are used, which versions there are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alphapulse_encryption.catalogue import Catalogue

if TYPE_CHECKING:
    from alphapulse_encryption.migration.bookkeeping.keys import KeyVersion
    from alphapulse_encryption.migration.steps.versions import TableVersions


def print_backup_identity(_: argparse.Namespace) -> int:
    """The age identity that opens backups; a secret."""
    from alphapulse_encryption.defs.resources.environment import key_environment
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.gates.backup import backup_identity

    print(backup_identity(load_key_ring(key_environment())))
    return 0


def compare_keys(_: argparse.Namespace) -> int:
    """Every master key beside what the database was begun with; the status is 1 where one is another."""
    from alphapulse_encryption.defs.resources.environment import (
        key_environment,
        target_database,
        target_exists,
    )
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.bookkeeping.keys import stored_key_checks
    from alphapulse_encryption.migration.postgres.database import DatabaseUnreachable

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


def print_key_usage(options: argparse.Namespace) -> int:
    """How many values each key has encrypted, and how many it may."""
    from alphapulse_encryption.cli.reports.documents import print_members
    from alphapulse_encryption.crypto.usage import MOST_MESSAGES
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.bookkeeping.usage import read_usage

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


def print_key_versions(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    """The key versions, and how many values each table has of them; reads every row."""
    from alphapulse_encryption.cli.reports.documents import print_members
    from alphapulse_encryption.crypto.envelope import get_format
    from alphapulse_encryption.defs.resources.environment import key_environment, target_database
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.bookkeeping.keys import key_versions
    from alphapulse_encryption.migration.steps.versions import count_versions

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


def reinstate_key_version(options: argparse.Namespace) -> int:
    """Make a retired key version readable again."""
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.postgres.database import Actor
    from alphapulse_encryption.migration.steps.versions import reinstate_version

    version = options.reinstate_key_version
    changed = reinstate_version(target_database(), version, Actor("command line"))
    print(
        f"✓ Key version {version} is readable again"
        if changed
        else f"Nothing to do: {version} is not retired"
    )
    return 0
