"""Pools: how many steps work on one database, and on one of its tables, at once, over all runs and machines.

Dagster gives an op one pool, which is the database's. A table's pool is taken inside the step, since which tables a
step works on is known by its partitions only. Both are limited, seen and changed like any pool of Dagster's:
``dagster instance concurrency set POOL LIMIT``, or in the UI under Deployment.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from alphapulse_encryption.defs.dagster_private import InstanceConcurrencyContext
from alphapulse_encryption.defs.resources.reporting import Context

_SECONDS_BETWEEN_TRIES = 0.25


def table_pool(table: str) -> str:
    """Name of a table's pool."""
    # The name of a pool has no blanks.
    return f"table/{'_'.join(table.split())}"


@contextlib.contextmanager
def in_table_pools(context: Context, tables: Sequence[str]) -> Iterator[None]:
    """Have a place in the pool of each table for the length of the block; waits for them.

    Two runs never wait for each other crosswise: the places are taken in the order of the tables' names. A place of a
    run that was killed is given back by the daemon, once it knows that the run has ended.
    """
    instance, run = context.instance, context.run
    if not instance.event_log_storage.supports_global_concurrency_limits:
        yield
        return
    with InstanceConcurrencyContext(instance, run) as places:
        taken: list[str] = []
        try:
            for pool in sorted({table_pool(table) for table in tables}):
                claim = f"{context.op_execution_context.op_handle.name}[{pool}]"
                waiting = False
                while not places.claim(pool, claim):
                    if not waiting:
                        waiting = True
                        context.log.info(f"Waits for a place in the pool {pool}.")
                    time.sleep(_SECONDS_BETWEEN_TRIES)
                taken.append(claim)
            yield
        finally:
            for claim in taken:
                places.free_step(claim)
