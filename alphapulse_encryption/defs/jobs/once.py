"""What the jobs that change sides or destroy have in common: a person starts them, and nothing starts them again."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import yaml
from pydantic import Field

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import ConfigurationError

# Dagster starts a failed run again where it is told to; a destructive step never starts by itself.
NEVER_AGAIN = {"dagster/max_retries": "0"}

# In the metadata of the op's output: the tables that were not already as they were to be.
TABLES_CHANGED = "tables_changed"


EXAMPLE = {"tables": ["users"]}


class TablesConfig(dg.Config):
    """Which tables."""

    tables: list[str] = Field(
        description='Tables by the names of the catalogue, for example ["users"]. No default, on purpose.'
    )


class AnyTablesConfig(dg.Config):
    """Which tables, where it does no harm to look at all of them."""

    tables: list[str] = Field(
        default=[], description="Tables by the names of the catalogue; none: all of them."
    )


def no_tables(op: str) -> dict[str, Any]:
    """The configuration that the launchpad begins with: no table, to be filled in."""
    return {"ops": {op: {"config": {"tables": []}}}}


def what_to_type(op: str, config: Mapping[str, object]) -> str:
    """For a job's description: an example of what goes into the launchpad, ready to be copied.

    It is not what the launchpad begins with: a job that changes sides or destroys has nothing filled in, so that no
    careless click starts it.
    """
    text = yaml.safe_dump({"ops": {op: {"config": dict(config)}}}, sort_keys=False)
    return f"\n\nFor example, in the Launchpad, with the names that are yours:\n\n```yaml\n{text}```"


def named_tables(catalogue: Catalogue, names: list[str]) -> list[Table]:
    """The tables of those names.

    Raises:
        ConfigurationError: none is given, or one is not in the catalogue.
    """
    if not names:
        raise ConfigurationError(f"Name at least one table: {', '.join(catalogue.keys)}.")
    return [catalogue.table(name) for name in dict.fromkeys(names)]
