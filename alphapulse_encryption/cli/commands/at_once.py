"""What is done for an option: the steps, by their jobs; what is no step, at once and in this process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alphapulse_encryption import guide, settings
from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.cli.commands.parser import PROGRAM, REHEARSAL_OPTIONS, given
from alphapulse_encryption.cli.reports.discovery import refuse_existing, show_discovery, write_catalogue
from alphapulse_encryption.cli.reports.documents import print_document, print_members, print_schema
from alphapulse_encryption.cli.reports.plan import read_plan, show_plan
from alphapulse_encryption.cli.reports.status import show_status, watch
from alphapulse_encryption.cli.reports.terminal import console
from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.usage import MOST_MESSAGES
from alphapulse_encryption.defs.alerts.delivery import (
    VARIABLES,
    configured_channels,
    deliver,
    trial_message,
)
from alphapulse_encryption.defs.resources.environment import (
    backup_bucket,
    client_programs,
    data_path,
    key_environment,
    restore_drill_server,
    target_database,
    target_exists,
)
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.bookkeeping.approvals import list_approvals
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.keys import (
    KeyVersion,
    check_key,
    check_key_values,
    key_versions,
    stored_key_checks,
)
from alphapulse_encryption.migration.bookkeeping.limits import Limits, change_limits, read_limits
from alphapulse_encryption.migration.bookkeeping.usage import read_usage
from alphapulse_encryption.migration.discovery.discover import SAMPLED_ROWS, Discovery, as_yaml, discover
from alphapulse_encryption.migration.gates import preflight, saved
from alphapulse_encryption.migration.gates.backup import backup_identity
from alphapulse_encryption.migration.gates.drill import refuse_unless_possible
from alphapulse_encryption.migration.gates.offsite import open_client
from alphapulse_encryption.migration.gates.roles import DEFAULT_PREFIX, refuse_unless_allowed, roles_sql
from alphapulse_encryption.migration.insight.plan import Plan
from alphapulse_encryption.migration.insight.slow_queries import DEFAULT_LIMIT, slow_queries
from alphapulse_encryption.migration.insight.status import Status, read_status
from alphapulse_encryption.migration.postgres.database import Actor, DatabaseUnreachable
from alphapulse_encryption.migration.rows.batch_ranges import check_ranges
from alphapulse_encryption.migration.schema.definition import check_catalogue
from alphapulse_encryption.migration.steps.versions import count_versions, reinstate_version
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption.visible import visible_sql


def print_json_schema(options: argparse.Namespace) -> None:
    """The schema of a report's JSON document."""
    print_schema(Plan if options.plan else Status if options.status else Discovery)


def print_discovery(options: argparse.Namespace) -> int:
    """A catalogue proposed for this database, on standard output or into a file."""
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


def print_plan(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    """What would be done; the status is 1 where something blocks it."""
    plan = read_plan(catalogue, tables)
    if options.json:
        print_document(plan)
    else:
        show_plan(plan, console())
    return 1 if plan.blockers else 0


def print_status(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> None:
    """Where the migration stands, once or, with ``--watch``, until Ctrl-C."""
    database = target_database()
    if options.watch:
        watch(database, catalogue, tables, console())
    elif options.json:
        print_document(read_status(database, catalogue, tables))
    else:
        show_status(read_status(database, catalogue, tables), console())


def print_slow_queries(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> None:
    """What statements on encrypted tables cost, slowest first."""
    entries = [catalogue.table(name) for name in tables]
    found = slow_queries(replace(target_database(), read_only=True), entries)
    shown = found.queries[: options.limit or DEFAULT_LIMIT]
    if options.json:
        found = replace(found, queries=shown)
        print_members("slow-queries", {"report": found, "remarks": found.remarks})
        return
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


def print_preflight(_: argparse.Namespace, catalogue: Catalogue, __: tuple[str, ...]) -> int:
    """The findings as JSON; read directly, so that no run is seen in the UI."""
    keys = load_key_ring(key_environment())
    database = replace(target_database(), read_only=True)
    report = preflight.check(
        *(database, catalogue.tables, keys),
        envelope=catalogue.format,
        source=catalogue.source,
        once=True,
        bin_dirs=client_programs(),
        data_path=data_path(),
    )
    print_members("preflight", {"report": report, "next": report.next})
    return 1 if report.blockers else 0


def print_approvals(options: argparse.Namespace) -> None:
    """Every approval: open, used, revoked or expired."""
    with target_database().session("list the approvals") as connection:
        approvals = list_approvals(connection)
    if options.json:
        print_members("approvals", {"approvals": approvals})
        return
    for approval in approvals:
        print(approval)
    if not approvals:
        print("There is no approval.")


def print_backup_identity(_: argparse.Namespace) -> None:
    """The age identity that opens backups; a secret."""
    print(backup_identity(load_key_ring(key_environment())))


def compare_keys(_: argparse.Namespace) -> int:
    """Every master key beside what the database was begun with; the status is 1 where one is another."""
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
        if spelling := keys.spelling(version):
            print(f"! {spelling}.")
    for version in sorted(set(stored or ()) - set(found)):
        print(
            f"! version {version}: this database was begun with it, and there is no key of that version to read it"
        )
    return 1 if any(found.get(version, check) != check for version, check in (stored or {}).items()) else 0


def print_key_usage(options: argparse.Namespace) -> None:
    """How many values each key has encrypted, and how many it may."""
    with target_database().session("read how much the keys are used") as connection:
        usages = read_usage(connection)
    warnings = [warning for usage in usages if (warning := usage.warning())]
    if options.json:
        print_members("key-usage", {"most_messages": MOST_MESSAGES, "usage": usages, "warnings": warnings})
        return
    for usage in usages:
        print(
            f"{'!' if usage.warning() else '✓'} {usage.context}, version {usage.key_version}: "
            f"{usage.messages:,} values encrypted ({usage.share:.4%} of 2^32)"
        )
    for warning in warnings:
        print(warning)
    if not usages:
        print("Nothing has been encrypted yet.")


def print_key_versions(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    """The key versions, and how many values each table has of them; reads every row."""
    keys = load_key_ring(key_environment())
    database = target_database()
    with database.session("read the key versions") as connection:
        versions = key_versions(connection)
    if not options.json:
        _show_versions(versions, keys)
    entries = [catalogue.table(name) for name in tables] if versions else []
    found = count_versions(database, entries, get_format(catalogue.format, keys))
    retired = {version.number for version in versions if version.state == "retired"}
    late = sorted({number for count in found for number in count.versions} & retired)
    if options.json:
        print_members("key-versions", {"versions": versions, "tables": found})
        return 1 if late else 0
    for count in found:
        print(f"{count.table}: {count}")
    for number in late:
        print(f"! version {number} is retired, and values of it were written since: run --rotate-keys again")
    return 1 if late else 0


def _show_versions(versions: Sequence[KeyVersion], keys: KeyRing) -> None:
    for version in versions:
        readable = "" if version.number in keys.versions else "; there is NO KEY of it here"
        print(
            f"version {version.number}: {version.state} since {version.since:%Y-%m-%d %H:%M} UTC "
            f"({version.changed_by}){readable}"
        )
    if not versions:
        print("This database has not been begun with any key version.")
    elif keys.current_version not in {v.number for v in versions if v.state == "current"}:
        print(f"! ALPHAPULSE_ENCRYPTION_KEY_VERSION says {keys.current_version} (see --rotate-keys)")


def reinstate_key_version(options: argparse.Namespace) -> None:
    """Make a retired key version readable again."""
    version = options.reinstate_key_version
    changed = reinstate_version(target_database(), version, Actor("command line"))
    done, nothing = f"✓ Key version {version} is readable again", f"Nothing to do: {version} is not retired"
    print(done if changed else nothing)


def sign_saved(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    """What a revert or a restore would execute and nobody has authenticated; the status is 1 where some is left."""
    target = Target.of(target_database(), catalogue, load_key_ring(key_environment()), Actor("command line"))
    entries = [catalogue.table(name) for name in tables]
    signing = options.sign_saved != "show"
    found = saved.sign(target, entries, options.sign_saved) if signing else saved.unsigned(target, entries)
    for each in found.rows:
        print(f"✓ Signed {each}" if signing else f"! Not authenticated: {each}")
    if found.digest is None:
        print("Nothing to do: what is saved is authenticated")
    elif not signing:
        print(f"Where it is what a switch or a drop of yours has saved: --sign-saved {found.digest}")
    return 1 if found.rows and not signing else 0


def change_settings(options: argparse.Namespace) -> None:
    """Change what ``--set``, ``--pause`` and ``--resume`` name, and show all of them."""
    changes = dict(text.partition("=")[::2] for text in options.set)
    if options.pause or options.resume:
        changes["paused"] = "true" if options.pause else "false"
    _show_settings(change_limits(target_database(), changes, Actor("command line")))


def print_settings(options: argparse.Namespace) -> None:
    """The settings, with what they mean."""
    with target_database().session("read the settings of running backfills") as connection:
        limits = read_limits(connection) if bookkeeping_exists(connection) else Limits()
    if options.json:
        described = {name: field.description for name, field in Limits.model_fields.items()}
        print_members("settings", {"settings": limits, "descriptions": described})
    else:
        _show_settings(limits)


def _show_settings(limits: Limits) -> None:
    for name, field in type(limits).model_fields.items():
        print(f"{name} = {getattr(limits, name)}    # {field.description}")


def stop_all_runs(_: argparse.Namespace) -> None:
    """Stop every run that is queued or under way."""
    # Dagster takes a second to load.
    from alphapulse_encryption.cli.unfinished import stop_runs

    told = stop_runs()
    for line in told:
        print(line)
    if not told:
        print("No run is queued or under way.")


def print_roles_sql(options: argparse.Namespace) -> None:
    """SQL that creates the roles, for an administrator to run."""
    prefix = DEFAULT_PREFIX if options.role_prefix is None else options.role_prefix
    catalogue = load_catalogue(settings.TargetVariables().catalogue_path)
    with target_database().session("look at who owns what") as connection:
        print(visible_sql(roles_sql(connection, catalogue, prefix)), end="")


def try_alerts(_: argparse.Namespace) -> int:
    """Send a message to every channel that is configured, and tell which got it."""
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


def run_steps(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    """Run the steps that were asked for, in the guide's order."""
    ranges = settings.TargetVariables().batch_ranges
    keys = load_key_ring(key_environment())
    get_format(catalogue.format, keys)
    database = target_database()
    asked = [step for step in guide.in_running_order() if given(options, [step.name])]
    # The steps look at all this themselves; here it is known before the first of them has begun.
    with database.session("check the configuration") as connection:
        for step in asked:
            refuse_unless_allowed(connection, step.name, [catalogue.table(key) for key in tables])
        # A rotation that begins has another current version than the database.
        (check_key_values if options.rotate_keys else check_key)(connection, keys)
        # The checklist tells of that with all else that it finds.
        if not options.preflight:
            check_catalogue(connection, catalogue, tables)
        for key in () if options.replan else tables:
            check_ranges(connection, catalogue.table(key), ranges)
    if options.backup and backup_bucket() is not None:
        open_client()
    if options.backup and options.restore_drill:
        refuse_unless_possible(restore_drill_server())
    # Dagster takes a second to load: not before all this is known to be right.
    from alphapulse_encryption.cli.launch import launcher
    from alphapulse_encryption.cli.steps import Steps

    with launcher(ranges, options.runs) as found:
        steps = Steps(found, database, catalogue, keys, tables)
        for step in asked:
            value = {step.value: getattr(options, step.name)} if step.value else {}
            if not steps.run(step.name, **given(options, step.options), **value) and not steps.tables:
                break
        steps.sum_up()
    return 1 if steps.failed else 0


# Each returns the exit status, where it can be another than 0. In this order: what changes settings shows them, too.
OF_THE_WHOLE: Mapping[str, Callable[[argparse.Namespace], int | None]] = {
    "rehearse": rehearse_on_a_clone,
    "backup_identity": print_backup_identity,
    "json_schema": print_json_schema,
    "discover": print_discovery,
    "approvals": print_approvals,
    "check_key": compare_keys,
    "key_usage": print_key_usage,
    "test_alerts": try_alerts,
    "roles_sql": print_roles_sql,
    "stop_runs": stop_all_runs,
    "reinstate_key_version": reinstate_key_version,
    "pause": change_settings,
    "resume": change_settings,
    "set": change_settings,
    "settings": print_settings,
}
OF_TABLES: Mapping[str, Callable[[argparse.Namespace, Catalogue, tuple[str, ...]], int | None]] = {
    "plan": print_plan,
    "status": print_status,
    "slow_queries": print_slow_queries,
    "key_versions": print_key_versions,
    "sign_saved": sign_saved,
    # With --json; else it is a step.
    "preflight": print_preflight,
}
