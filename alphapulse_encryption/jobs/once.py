"""What the jobs that change sides or destroy have in common: a person starts them, and nothing starts them again."""

from typing import Any

import dagster as dg
from pydantic import Field

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import ConfigurationError

# Dagster starts a failed run again where it is told to; a destructive step never starts by itself.
NEVER_AGAIN = {"dagster/max_retries": "0"}

# In the metadata of the op's output: the tables that were not already as they were to be.
TABLES_CHANGED = "tables_changed"


class TablesConfig(dg.Config):
    """Which tables."""

    tables: list[str] = Field(
        description='Tables by the names of the catalogue, for example ["users"]. No default, on purpose.'
    )


def no_tables(op: str) -> dict[str, Any]:
    """The configuration that the launchpad begins with: no table, to be filled in."""
    return {"ops": {op: {"config": {"tables": []}}}}


def named_tables(catalogue: Catalogue, names: list[str]) -> list[Table]:
    """The tables of those names.

    Raises:
        ConfigurationError: none is given, or one is not in the catalogue.
    """
    if not names:
        raise ConfigurationError(f"Name at least one table: {', '.join(catalogue.keys)}.")
    return [catalogue.table(name) for name in dict.fromkeys(names)]
