"""After the migration: statistics and indexes taken anew. ``analyze_tables`` and ``reindex_tables``."""

from collections.abc import Callable, Iterable

import dagster as dg
from pydantic import Field

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import (
    EXAMPLE,
    NEVER_AGAIN,
    TABLES_CHANGED,
    TablesConfig,
    named_tables,
    no_tables,
    what_to_type,
)
from alphapulse_encryption.defs.resources.border import actor, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import ConfigurationError, MigrationError
from alphapulse_encryption.migration.gates.preflight import readable_size
from alphapulse_encryption.migration.schema.indexes import IndexChoice, reindex
from alphapulse_encryption.migration.steps.analyze import analyze


class IndexesConfig(TablesConfig):
    """Which tables, and which of their indexes."""

    indexes: str = Field(
        description="`all`: every index of the tables, all of a table's at once, which needs room for a second copy of "
        "them; `encrypted`: those that have an encrypted or search column in them, one after the other. No default, "
        "on purpose."
    )


@dg.op(
    name="analyze",
    pool=TARGET_POOL,
    description="Take the planner's statistics of the named tables anew, beside the application.",
)
def analyze_tables(context: dg.OpExecutionContext, config: TablesConfig, target: TargetResource) -> None:
    """Analyze table by table."""
    with safely():

        def work(table: Table) -> None:
            result = analyze(target.database, table, actor(context), on_progress=context.log.info)
            context.log.info(f"{table.key}: analyzed in {result.seconds:.1f} s, about {result.rows:,} rows")

        done = _each(context, named_tables(target.catalogue, config.tables), work)
        context.add_output_metadata({TABLES_CHANGED: done})


@dg.op(
    name="rebuild",
    pool=TARGET_POOL,
    description="Build indexes of the named tables anew, beside the application; what an interrupted rebuild left is "
    "dropped first.",
)
def reindex_tables(context: dg.OpExecutionContext, config: IndexesConfig, target: TargetResource) -> None:
    """Rebuild table by table."""
    with safely():
        if config.indexes not in {"all", "encrypted"}:
            raise ConfigurationError("Say which indexes: `all`, or only those of `encrypted` columns.")
        choice: IndexChoice = "all" if config.indexes == "all" else "encrypted"
        sizes: dict[str, str] = {}
        changed: list[str] = []

        def work(table: Table) -> None:
            result = reindex(
                target.database,
                table,
                actor(context),
                choice=choice,
                on_wait=context.log.info,
                progress=True,
            )
            sizes[table.key] = f"{readable_size(result.bytes_before)} → {readable_size(result.bytes_after)}"
            if result.reindexed:
                changed.append(table.key)
            for name in result.leftovers:
                context.log.info(f"{table.key}: dropped {name}, which an interrupted rebuild had left")
            context.log.info(
                f"{table.key}: rebuilt {', '.join(result.reindexed) or 'no index'} in {result.seconds:.1f} s, "
                + sizes[table.key]
            )

        _each(context, named_tables(target.catalogue, config.tables), work)
        context.add_output_metadata({TABLES_CHANGED: changed, "sizes": sizes})


def _each(
    context: dg.OpExecutionContext, tables: Iterable[Table], work: Callable[[Table], None]
) -> list[str]:
    """Work on each; one that fails does not keep the others from it.

    Raises:
        MigrationError: some failed; names them.
    """
    done: list[str] = []
    failed: list[str] = []
    for table in tables:
        try:
            work(table)
            done.append(table.key)
        except MigrationError as error:
            context.log.error(f"{table.key}: {error.args[0]}")
            failed.append(error.args[0])
    if failed:
        raise MigrationError("\n".join(failed))
    return done


def build() -> list[dg.JobDefinition]:
    """The two jobs."""
    nothing = no_tables("rebuild")
    nothing["ops"]["rebuild"]["config"]["indexes"] = ""
    return [
        dg.GraphDefinition(name="analyze_tables", node_defs=[analyze_tables]).to_job(
            tags=NEVER_AGAIN,
            config=no_tables("analyze"),
            executor_def=dg.in_process_executor,
            description="**After the migration.** Takes the planner's statistics of tables anew (`ANALYZE`), beside "
            "the application." + what_to_type("analyze", EXAMPLE),
        ),
        dg.GraphDefinition(name="reindex_tables", node_defs=[reindex_tables]).to_job(
            tags=NEVER_AGAIN,
            config=nothing,
            executor_def=dg.in_process_executor,
            description="**After the migration.** Builds indexes of tables anew (`REINDEX CONCURRENTLY`), beside the "
            "application; what an interrupted rebuild left is dropped first."
            + what_to_type("rebuild", {**EXAMPLE, "indexes": "encrypted"}),
        ),
    ]
