"""The partitions: by table, and by table and batch range. Fixed when the code location is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import dagster as dg

from alphapulse_encryption.catalogue import Catalogue

TABLE = "table"
BATCH_RANGE = "batch_range"


def range_name(number: int) -> str:
    """``3`` is ``03``: names of a fixed width sort like their numbers."""
    return f"{number:02d}"


@dataclass(frozen=True)
class Partitions:
    """The partitions of one catalogue."""

    catalogue: Catalogue
    ranges: int

    @property
    def by_table(self) -> dg.StaticPartitionsDefinition:
        return dg.StaticPartitionsDefinition(list(self.catalogue.keys))

    @property
    def by_table_and_range(self) -> dg.MultiPartitionsDefinition:
        names = [range_name(number) for number in range(self.ranges)]
        return dg.MultiPartitionsDefinition(
            {BATCH_RANGE: dg.StaticPartitionsDefinition(names), TABLE: self.by_table}
        )

    @property
    def one_run_per_table(self) -> dg.BackfillPolicy:
        """A backfill over tables and ranges becomes one run for each table."""
        return dg.BackfillPolicy.multi_run(max_partitions_per_run=self.ranges)


def over_ranges(asset: str) -> dg.AssetDep:
    """A dependency between an asset by table and one by table and batch range, in either direction."""
    return dg.AssetDep(asset, partition_mapping=dg.MultiToSingleDimensionPartitionMapping(TABLE))


class TablePart(NamedTuple):
    """A batch range of a table."""

    table: str
    batch_range: int

    @property
    def partition(self) -> str:
        """Its key as Dagster has it."""
        return f"{range_name(self.batch_range)}|{self.table}"


def parts_by_table(partitions: Iterable[str]) -> list[TablePart]:
    """Partitions in the order they are worked through: one table after the other, ranges ascending."""
    keys = (key.partition("|") for key in partitions)
    return sorted(TablePart(table, int(number)) for number, _, table in keys)
