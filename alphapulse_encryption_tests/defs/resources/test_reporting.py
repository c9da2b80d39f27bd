"""What of an error passes into Dagster's database: our own words, never a driver's."""

from __future__ import annotations

from collections.abc import Callable

import dagster as dg
import psycopg
import pytest
from dagster._serdes import serialize_value

from alphapulse_encryption.defs.resources.reporting import safely
from alphapulse_encryption.errors import RefusedError

CANARY = "canary-2c44"


def ours() -> None:
    raise RefusedError("Table x is not ready.")


def a_drivers(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TEMPORARY TABLE t (x text UNIQUE)")
        connection.execute("INSERT INTO t VALUES (%s), (%s)", [CANARY, CANARY])


def a_chain() -> None:
    try:
        int(CANARY)
    except ValueError as error:
        raise KeyError(CANARY) from error


def stored(problem: Callable[[], None]) -> tuple[dg.StepFailureData, str]:
    """The failure of a step that meets the problem, and everything the instance keeps of its run."""

    @dg.op
    def step() -> None:
        with safely():
            problem()

    @dg.job
    def job() -> None:
        step()

    with dg.instance_for_test() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        assert not result.success
        events = "\n".join(
            serialize_value(record.event_log_entry)
            for record in instance.get_records_for_run(result.run_id).records
        )
    (failure,) = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    return failure, events


def test_nothing_is_tried_again() -> None:
    for problem in (ours, a_chain):
        with pytest.raises(dg.Failure) as caught, safely():
            problem()
        assert caught.value.allow_retries is False
        assert caught.value.__suppress_context__


def test_our_words_pass() -> None:
    failure, events = stored(ours)
    assert failure.user_failure_data is not None
    assert failure.user_failure_data.description == "Table x is not ready."
    assert "Table x is not ready." in events


def test_a_drivers_words_do_not(database_url: str) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation, match=CANARY):
        a_drivers(database_url)
    failure, events = stored(lambda: a_drivers(database_url))
    assert failure.user_failure_data is not None
    assert "Unexpected UniqueViolation" in str(failure.user_failure_data.description)
    assert "test_reporting.py" in str(failure.user_failure_data.metadata["where"].value)
    assert CANARY not in events


def test_nor_what_caused_them() -> None:
    failure, events = stored(a_chain)
    assert "Unexpected KeyError" in str(failure.user_failure_data and failure.user_failure_data.description)
    assert CANARY not in events
