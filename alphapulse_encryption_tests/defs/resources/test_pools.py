"""Pools of tables: a step waits for a place, gives it back, and needs no other's."""

import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from alphapulse_encryption.defs.resources import pools
from alphapulse_encryption.defs.resources.pools import in_table_pools, table_pool
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place


@pytest.fixture
def here(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    with place(postgres, database_url, server_dir.parent, "") as found:
        yield found


def test_names() -> None:
    assert table_pool("users") == "table/users"
    assert table_pool("crm.order lines") == "table/crm.order_lines"


def test_places(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_SECONDS_BETWEEN_TRIES", 0.02)
    begun, end = threading.Event(), threading.Event()

    @dg.op
    def holds(context: dg.OpExecutionContext) -> None:
        with in_table_pools(context, ["users", "trades"]):
            begun.set()
            assert end.wait(support.PATIENCE)

    @dg.op
    def fails(context: dg.OpExecutionContext) -> None:
        with in_table_pools(context, ["users"]):
            raise RuntimeError

    @dg.op
    def takes(context: dg.OpExecutionContext) -> None:
        with in_table_pools(context, ["users"]):
            pass

    with here.instance() as instance:

        def execute(op: dg.OpDefinition) -> dg.ExecuteInProcessResult:
            @dg.job(name=f"job_{op.name}")
            def job() -> None:
                op()

            return job.execute_in_process(instance=instance, raise_on_error=False)

        storage = instance.event_log_storage
        storage.set_concurrency_slots("table/users", 1)
        holder = threading.Thread(target=execute, args=(holds,))
        holder.start()
        try:
            assert begun.wait(support.PATIENCE)
            assert storage.get_concurrency_info("table/users").active_slot_count == 1
            # Nobody has said how many may work on trades: as many as the instance says by default.
            assert storage.get_concurrency_info("table/trades").slot_count == 4

            results: list[dg.ExecuteInProcessResult] = []
            waiter = threading.Thread(target=lambda: results.append(execute(takes)))
            waiter.start()
            support.until(
                lambda: storage.get_concurrency_info("table/users").pending_step_count == 1, "one waits"
            )
            assert waiter.is_alive() and not results
        finally:
            end.set()
            holder.join()
        waiter.join()
        assert results[0].success
        assert not execute(fails).success
        assert execute(takes).success
        for pool in ("table/users", "table/trades"):
            found = storage.get_concurrency_info(pool)
            assert (found.active_slot_count, found.pending_step_count) == (0, 0)
