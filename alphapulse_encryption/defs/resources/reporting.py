"""The border to Dagster: what of an error, and of who runs a step, goes into its database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from alphapulse_encryption import secrecy
from alphapulse_encryption.errors import MigrationError, TablesFailed
from alphapulse_encryption.migration.postgres.database import Actor

Context = dg.AssetExecutionContext | dg.OpExecutionContext
# In the metadata of a failure: why, by table.
TABLES_FAILED = "tables_failed"
# What Dagster shows of an event, by name.
MetadataEntry = dg.MetadataValue[Any] | str | float | dict[str, Any] | list[Any] | None


@contextmanager
def safely() -> Iterator[None]:
    """Let an error through as a :class:`dagster.Failure` that quotes nothing.

    Dagster stores exception texts. Ours are written to be shown; of any other only its type and the places
    it passed are kept, because a driver's text can quote rows.
    """
    try:
        yield
    except dg.Failure as failure:
        # As it was raised: not what led to it.
        raise failure from None
    except MigrationError as error:
        failed = {TABLES_FAILED: dict(error.failed)} if isinstance(error, TablesFailed) else None
        raise dg.Failure(description=str(error), metadata=failed, allow_retries=False) from None
    except Exception as error:
        where = "\n".join(f"- `{place}`" for place in secrecy.places(error.__traceback__))
        raise dg.Failure(
            description=secrecy.kind(error),
            metadata={"where": dg.MetadataValue.md(where)},
            allow_retries=False,
        ) from None


@contextmanager
def loading() -> Iterator[None]:
    """The same for what Dagster loads: it shows, and keeps, why a code location could not be loaded."""
    try:
        yield
    except MigrationError as error:
        raise error from None
    except Exception as error:
        places = secrecy.places(error.__traceback__)
        if isinstance(error, SyntaxError):
            places.append(f"{error.filename}:{error.lineno}")
        where = "".join(f"\n- {place}" for place in places)
        raise MigrationError(
            f"The definitions cannot be loaded. {secrecy.kind(error)} Where:{where}"
        ) from None


def actor(context: Context) -> Actor:
    """Who the audit log names for this run."""
    return Actor(name=f"dagster job {context.run.job_name}", run_id=context.run.run_id)


def counted(number: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def as_table(rows: Iterable[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """A table for the UI; its columns are those of the first row."""
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows])


def materialized(
    context: dg.AssetExecutionContext, partition: str, metadata: Mapping[str, MetadataEntry]
) -> None:
    """Say at once that a partition is done, with its metadata.

    A run over many partitions would say so at its end only: its counters would stand still, and a failure
    in the middle would mark all of them as failed. The event that Dagster adds at the end by itself gets the
    metadata too, or it would hide that of ours.
    """
    if len(context.partition_keys) > 1:
        context.log_event(
            dg.AssetMaterialization(asset_key=context.asset_key, partition=partition, metadata=metadata)
        )
    context.add_asset_metadata(metadata, partition_key=partition)
