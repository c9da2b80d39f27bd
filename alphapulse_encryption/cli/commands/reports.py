"""What only tells something: the plan, how it stands, what preflight and discovery find, approvals."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.cli.commands.parser import PROGRAM


def print_json_schema(options: argparse.Namespace) -> int:
    """The schema of a report's JSON document."""
    from alphapulse_encryption.cli.reports.documents import print_schema
    from alphapulse_encryption.migration.discovery.discover import Discovery
    from alphapulse_encryption.migration.insight.preview import Plan
    from alphapulse_encryption.migration.insight.status import Status

    print_schema(Plan if options.plan else Status if options.status else Discovery)
    return 0


def print_discovery(options: argparse.Namespace) -> int:
    """A catalogue proposed for this database, on standard output or into a file."""
    from alphapulse_encryption.cli.reports.discovery import refuse_existing, show_discovery, write_catalogue
    from alphapulse_encryption.cli.reports.documents import print_document
    from alphapulse_encryption.cli.reports.terminal import console
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.discovery.discover import SAMPLED_ROWS, as_yaml, discover

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
    from alphapulse_encryption.cli.reports.documents import print_document
    from alphapulse_encryption.cli.reports.plan import read_plan, show_plan
    from alphapulse_encryption.cli.reports.terminal import console

    plan = read_plan(catalogue, tables)
    if options.json:
        print_document(plan)
    else:
        show_plan(plan, console())
    return 1 if plan.blockers else 0


def print_status(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    """Where the migration stands, once or, with ``--watch``, until Ctrl-C."""
    from alphapulse_encryption.cli.reports.documents import print_document
    from alphapulse_encryption.cli.reports.status import show_status, watch
    from alphapulse_encryption.cli.reports.terminal import console
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.insight.status import read_status

    database = target_database()
    if options.watch:
        watch(database, catalogue, tables, console())
        return 0
    status = read_status(database, catalogue, tables)
    if options.json:
        print_document(status)
    else:
        show_status(status, console())
    return 0


def print_slow_queries(options: argparse.Namespace, catalogue: Catalogue, tables: tuple[str, ...]) -> int:
    """What statements on encrypted tables cost, slowest first."""
    from dataclasses import replace

    from alphapulse_encryption.cli.reports.documents import print_members
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.insight.slow_queries import DEFAULT_LIMIT, slow_queries

    found = slow_queries(
        replace(target_database(), read_only=True), [catalogue.table(name) for name in tables]
    )
    shown = found.queries[: options.limit or DEFAULT_LIMIT]
    if options.json:
        found = replace(found, queries=shown)
        print_members("slow-queries", {"report": found, "remarks": found.remarks})
        return 0
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
    return 0


def print_preflight(_: argparse.Namespace, catalogue: Catalogue, __: tuple[str, ...]) -> int:
    """The findings as JSON; read directly, so that no run is seen in the UI."""
    from dataclasses import replace

    from alphapulse_encryption.cli.reports.documents import print_members
    from alphapulse_encryption.defs.resources.environment import key_environment, target_database
    from alphapulse_encryption.keysources import load_key_ring
    from alphapulse_encryption.migration.gates.preflight import check

    keys = load_key_ring(key_environment())
    report = check(replace(target_database(), read_only=True), catalogue.tables, keys, once=True)
    print_members("preflight", {"report": report})
    return 1 if report.blockers else 0


def print_approvals(options: argparse.Namespace) -> int:
    """Every approval: open, used, revoked or expired."""
    from alphapulse_encryption.cli.reports.documents import print_members
    from alphapulse_encryption.defs.resources.environment import target_database
    from alphapulse_encryption.migration.bookkeeping.approvals import list_approvals

    with target_database().session("list the approvals") as connection:
        approvals = list_approvals(connection)
    if options.json:
        print_members("approvals", {"approvals": approvals})
        return 0
    for approval in approvals:
        print(approval)
    if not approvals:
        print("There is no approval.")
    return 0
