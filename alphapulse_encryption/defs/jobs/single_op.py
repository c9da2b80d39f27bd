"""Jobs of one op: a person starts them, and nothing starts them again."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_origin

import dagster as dg
import yaml
from pydantic import Field

from alphapulse_encryption import guide
from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.resources.effects import REPORT, TABLES_CHANGED, Effect, On
from alphapulse_encryption.defs.resources.reporting import Context, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import ConfigurationError, MigrationError, TablesFailed
from alphapulse_encryption.migration.rows.engine import Stopped

# Dagster starts a failed run again where it is told to; a destructive step never starts by itself.
NEVER_AGAIN = {"dagster/max_retries": "0"}


class TablesConfig(dg.Config):
    """Which tables."""

    tables: list[str] = Field(
        description='Tables by the names of the catalogue, for example ["users"]. No default, on purpose.',
        examples=[["users"]],
    )


class AnyTablesConfig(dg.Config):
    """Which tables, where it does no harm to look at all of them."""

    tables: list[str] = Field(
        default=[], description="Tables by the names of the catalogue; none: all of them."
    )


C = TypeVar("C", bound=dg.Config)
T = TypeVar("T", bound=TablesConfig)


def op_job(
    op: str,
    config: type[C],
    work: Callable[[On[C]], Mapping[str, Any]],
    description: str,
    *,
    job: str = "",
    pool: str | None = TARGET_POOL,
) -> dg.JobDefinition:
    """A job of one op.

    The launchpad begins with the defaults, and with nothing where there is none: no careless click starts a job that
    changes sides or destroys. The description says what to type, where the fields of the configuration have examples.

    Args:
        work: what the op does; returns the metadata of its output.
        job: its name, where the guide has no such step.
        pool: what its op waits for a place in.
    """

    @dg.op(name=op, pool=pool, description=description)
    def run(context: dg.OpExecutionContext, config: config, target: TargetResource) -> None:  # type: ignore[valid-type]
        with safely():
            context.add_output_metadata(work(On(context, config, target)))

    launchpad, example = dict[str, Any](), dict[str, Any]()
    for name, field in config.model_fields.items():
        kind: Any = get_origin(field.annotation) or field.annotation
        launchpad[name] = kind() if field.is_required() else field.default
        if field.examples:
            example[name] = field.examples[0]
    if example:
        text = yaml.safe_dump({"ops": {op: {"config": example}}}, sort_keys=False)
        description += (
            f"\n\nFor example, in the Launchpad, with the names that are yours:\n\n```yaml\n{text}```"
        )
    return dg.GraphDefinition(name=job or guide.stage(op).job, node_defs=[run]).to_job(
        tags=NEVER_AGAIN,
        config={"ops": {op: {"config": launchpad}}} if launchpad else None,
        executor_def=dg.in_process_executor,
        description=description,
    )


def table_job(
    op: str,
    config: type[T],
    work: Callable[[On[T], Table], Effect],
    description: str,
) -> dg.JobDefinition:
    """A job of one op that works on one table after the other; where one fails, the others have their turn."""

    def each(on: On[T]) -> dict[str, Any]:
        report: list[str] = []
        changed: list[str] = []
        done: list[str] = []
        entries: dict[str, dict[str, Any]] = {}

        def one(table: Table) -> None:
            effect = work(on, table)
            on.tell(effect)
            done.append(table.key)
            changed.extend([table.key] if effect.changed else [])
            report.extend(effect.lines if effect.changed else [f"Nothing to do: {table.key}"])
            for name, value in effect.entries.items():
                entries.setdefault(name, {})[table.key] = value

        if failed := in_turn(on.context, named_tables(on.catalogue, on.config.tables), one):
            raise TablesFailed(f"Done for: {', '.join(done)}." if done else "", failed)
        return {TABLES_CHANGED: changed, REPORT: report, **entries}

    return op_job(op, config, each, description)


def in_turn(context: Context, tables: Iterable[Table], work: Callable[[Table], None]) -> dict[str, str]:
    """Do work to one table after the other; where one fails, the others have their turn. Why, by the failed tables."""
    failed: dict[str, str] = {}
    for table in tables:
        try:
            work(table)
        except Stopped:
            raise
        except MigrationError as error:
            context.log.error(f"{table.key}: {error.args[0]}")
            failed[table.key] = error.args[0]
    return failed


def named_tables(catalogue: Catalogue, names: Iterable[str]) -> list[Table]:
    """The tables of those names, of which there has to be one."""
    if not names:
        raise ConfigurationError(f"Name at least one table: {', '.join(catalogue.keys)}.")
    return [catalogue.table(name) for name in dict.fromkeys(names)]
