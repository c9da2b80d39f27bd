"""The assets with one partition for each table, whose work is one function: columns, indexes, views."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import dagster as dg
from pydantic import Field

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.assets.groups import COLUMNS, DROP, MIGRATE, TARGET_POOL, VIEWS
from alphapulse_encryption.defs.resources.effects import NOTHING, Effect, NoConfig, On
from alphapulse_encryption.defs.resources.partitions import Partitions, over_ranges
from alphapulse_encryption.defs.resources.reporting import counted, materialized, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.defs.resources.workers import told
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.rows.engine import Stopped
from alphapulse_encryption.migration.schema.indexes import build_search_indexes, reindex
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns

DROPPED = dg.AssetKey("plaintext_dropped")

Config = TypeVar("Config", bound=dg.Config)


class IndexConfig(dg.Config):
    """What else to do."""

    reindex: bool = Field(
        default=False,
        description="Also rebuild every index of the table, concurrently (post-migration tuning).",
    )


def _asset(
    name: str,
    partitions: Partitions,
    config: type[Config],
    work: Callable[[On[Config], Table], Effect],
    *,
    deps: Sequence[str | dg.AssetDep],
    group: str,
    description: str,
) -> dg.AssetsDefinition:
    @dg.asset(
        name=name,
        deps=list(deps),
        partitions_def=partitions.by_table,
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=group,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description=description,
    )
    def asset(context: dg.AssetExecutionContext, config: config, target: TargetResource) -> None:  # type: ignore[valid-type]
        with safely():
            on = On(context, config, target)
            failed: list[MigrationError] = []
            for key in context.partition_keys:
                try:
                    effect = work(on, target.catalogue.table(key))
                except Stopped:
                    raise
                except MigrationError as error:
                    context.log.error(f"{key}: {error.args[0]}")
                    failed.append(error)
                    continue
                on.tell(effect)
                materialized(context, key, effect.metadata())
            if failed:
                raise MigrationError("\n".join(error.args[0] for error in failed))

    return asset


def _add_columns(on: On[NoConfig], table: Table) -> Effect:
    result = add_encrypted_columns(
        on.target, table, batch_ranges=on.resource.batch_ranges, on_progress=told(on.context)
    )
    lines = [f"✓ Added column {table.key}.{name}" for name in result.added]
    if result.guards_created and not result.added:
        lines.append(f"✓ Put the guard of {table.key} in its place again")
    if result.cleared:
        lines.append(
            f"✓ Cleared the ciphertext of {counted(result.cleared, 'row')} of {table.key}, which had no guard since "
            "the revert: --migrate-data encrypts them again"
        )
    if result.added:
        outcome = f"{counted(len(result.added), 'column')} added"
    elif result.cleared:
        outcome = f"the ciphertext of {counted(result.cleared, 'row')} cleared"
    else:
        outcome = "guard put in its place again" if result.guards_created else NOTHING
    searchable = result.added and any(column.searchable for column in table.columns)
    return Effect(
        outcome,
        lines,
        {
            "columns_added": list(result.added),
            "columns_found": list(result.existing),
            **({"rows_cleared_since_revert": result.cleared} if result.cleared else {}),
            "batch_ranges": result.ranges,
            "seconds": round(result.seconds, 3),
        },
        then="Indexes for search are built after the data, with --migrate-data." if searchable else "",
    )


def _build_indexes(on: On[IndexConfig], table: Table) -> Effect:
    on.resource.refuse_another_key()
    waiting = on.context.log.info
    result = build_search_indexes(on.database, table, on.actor, on_wait=waiting)
    rebuilt = reindex(on.database, table, on.actor, on_wait=waiting) if on.config.reindex else None
    return Effect(
        f"indexes built: {len(result.created)}" if result.changed else NOTHING,
        [f"✓ Created index {name}" for name in result.created],
        {
            "indexes_built": list(result.created),
            "indexes_found": list(result.existing),
            "rebuilt_after_interruption": list(result.rebuilt),
            "reindexed": list(rebuilt.reindexed) if rebuilt is not None else "not asked for",
            "bytes": result.bytes,
            "seconds": round(result.seconds, 3),
        },
    )


def _create_views(on: On[NoConfig], table: Table) -> Effect:
    on.resource.refuse_another_key()
    result = create_views(on.database, table, on.actor)
    return Effect(
        f"{counted(len(result.created), 'view')} created" if result.changed else NOTHING,
        [f"✓ Created view {name}" for name in result.created],
        {
            "views_created": list(result.created),
            "views_found": list(result.existing),
            "seconds": round(result.seconds, 3),
        },
    )


def build(partitions: Partitions) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """The assets ``encrypted_columns``, ``search_indexes``, ``compatibility_views`` and ``plaintext_dropped``."""
    return [
        _asset(
            "encrypted_columns",
            partitions,
            NoConfig,
            _add_columns,
            deps=["preflight", "backup"],
            group=COLUMNS,
            description="**Step 2.** Adds `<column>_encrypted` and, for searchable columns, `<column>_search`, without "
            "rewriting the table, and the guard triggers that from now on keep every write of the application "
            "consistent. Cuts the table into its batch ranges. Nothing that is there already is changed.",
        ),
        _asset(
            "search_indexes",
            partitions,
            IndexConfig,
            _build_indexes,
            deps=[over_ranges("encrypted_data")],
            group=MIGRATE,
            description="**Indexes and statistics.** Builds the indexes on the search columns (unique where the "
            "plaintext column is) and the small one that finds pending rows, `CONCURRENTLY`, then runs `ANALYZE`. An "
            "index left invalid by an interrupted build is built again.",
        ),
        _asset(
            "compatibility_views",
            partitions,
            NoConfig,
            _create_views,
            deps=["verified_table"],
            group=VIEWS,
            description="**Step 6.** `v_<table>` has the original column names over the encrypted columns, "
            "`v_<table>_safe` leaves the sensitive ones out. Both go on working after the drop.",
        ),
        # External: the drop jobs report it, and nobody can materialize it.
        dg.AssetSpec(
            key=DROPPED,
            deps=["verified_table", "compatibility_views"],
            partitions_def=partitions.by_table,
            group_name=DROP,
            description="**Step 8.** The plaintext columns are gone. Reported by the job `drop_unencrypted`, which "
            "needs an approval given by a person with the job `approve_drop`; it cannot be materialized from here, and "
            "what the database's audit log says counts, not the colour. The job `restore_plaintext` undoes it.",
        ),
    ]
