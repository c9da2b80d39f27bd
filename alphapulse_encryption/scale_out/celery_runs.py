"""Runs on workers of Celery's: Dagster's own launcher, with addresses from the environment and a true look at health.

The broker is a queue and no more. Whether a run is alive says its lease (:mod:`.running`): Celery's result of a task
whose worker was killed stays "started" for ever.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import Any, Self

import dagster as dg
import sqlalchemy
from celery import Celery
from dagster import Field
from dagster_celery.config import DEFAULT_CONFIG, TASK_EXECUTE_JOB_NAME
from dagster_celery.launcher import CeleryRunLauncher
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from alphapulse_encryption import settings
from alphapulse_encryption.defs.dagster_private import (
    CheckRunHealthResult,
    ConfigurableClassData,
    LaunchRunContext,
    WorkerStatus,
)
from alphapulse_encryption.defs.resources import tags
from alphapulse_encryption.defs.resources.processes import PROCESS_TAG
from alphapulse_encryption.defs.resources.running import (
    RUN_AGAIN,
    SECONDS_TO_COME_BACK,
    held_leases,
    safe_to_repeat,
)
from alphapulse_encryption.defs.resources.storage import connect_once, storage_url
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.postgres.unreachable import reason

QUEUE = "dagster"

# Delivered messages stay in the queue's table of the PostgreSQL broker; they are removed after so many days.
_DAYS_KEPT = 7
_REMOVE_DELIVERED = (
    "DELETE FROM kombu_message WHERE NOT visible AND timestamp < now() - make_interval(days => :days)"
)


def celery_settings() -> dict[str, Any]:
    """What launchers and workers have in common: broker, backend, and Celery's own configuration."""
    given = settings.Workers()
    return {
        "broker": given.broker_url or f"sqla+{storage_url()}",
        "backend": given.backend_url or f"db+{storage_url()}",
        "config_source": {
            # A worker has no more runs than it executes: those in reserve would be lost with it. A message that a
            # broker delivers once more meanwhile finds that its run is being executed.
            **DEFAULT_CONFIG,
            "worker_prefetch_multiplier": 1,
            "task_acks_late": True,
            "task_default_queue": QUEUE,
            "task_track_started": True,
            "broker_connection_retry_on_startup": True,
            # Dagster's event log says what came of a run; this is a number only.
            "result_expires": _DAYS_KEPT * 86_400,
            "worker_hijack_root_logger": False,
            "worker_redirect_stdouts": False,
            "worker_enable_remote_control": False,
        },
    }


class AlphaPulseCeleryRunLauncher(CeleryRunLauncher):
    """Starts runs as tasks of Celery's.

    ``dagster.yaml`` names it without any address, so that none is written down or sent along with a run.
    """

    def __init__(self, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(default_queue=QUEUE, inst_data=inst_data, **celery_settings())
        # When each run was first found without a lease.
        self._missing: dict[str, float] = {}

    @classmethod
    def config_type(cls) -> dict[str, Field]:
        """What `dagster.yaml` may say about it: nothing."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        """Called by Dagster in every process that opens the instance."""
        return cls(inst_data=inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Put a run into the queue; one that is safe to repeat may be run again if its worker dies."""
        run = context.dagster_run
        if safe_to_repeat(run) and tags.MAX_RETRIES not in run.tags:
            self._instance.add_run_tags(run.run_id, RUN_AGAIN)
        # A worker knows the instance and the definitions by itself.
        task = self.celery.signature(TASK_EXECUTE_JOB_NAME, kwargs={"run_id": run.run_id}, immutable=True)
        try:
            self._launch_celery_task_run(run=run, task_signature=task, routing_key=TASK_EXECUTE_JOB_NAME)
        except Exception as error:
            # Dagster keeps its text and stack, which quote addresses.
            raise ConfigurationError(
                f"The run could not be queued ({type(error).__name__}). Check that the servers of "
                "ALPHAPULSE_CELERY_BROKER_URL and ALPHAPULSE_CELERY_BACKEND_URL are up (unset: Dagster's storage)."
            ) from None

    def terminate(self, run_id: str) -> bool:
        """Ask a run to stop: whoever executes it sees that it is asked, and so does a worker that takes it."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether somebody executes a run that has started; asked by the daemon's run monitoring."""
        held = held_leases(self._instance, [run.run_id])
        lives = held is None or run.run_id in held
        now = time.monotonic()
        # The storage's server may have been restarted: the process that executes the run takes its lease again.
        may_come_back = now - self._missing.setdefault(run.run_id, now) < SECONDS_TO_COME_BACK
        if lives or not may_come_back:
            del self._missing[run.run_id]
        if lives or may_come_back:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        who = "The command" if PROCESS_TAG in run.tags else "The worker"
        return CheckRunHealthResult(
            WorkerStatus.FAILED, f"{who} that executed the run is gone: killed, or its machine is lost"
        )

    def get_run_worker_debug_info(
        self, run: dg.DagsterRun, include_container_logs: bool | None = True
    ) -> str | None:
        """Nothing: Celery knows no more of a run than its events."""
        return None


def prepare_broker(app: Celery) -> None:
    """Make the queue's tables, where the broker is a PostgreSQL, and remove messages that were delivered long ago.

    Celery makes the tables by itself, but several workers that start at once would stumble over each other.
    """
    address = str(app.conf.broker_url)
    if not address.startswith("sqla+"):
        return
    engine = sqlalchemy.create_engine(address.removeprefix("sqla+"), poolclass=sqlalchemy.pool.NullPool)
    with engine.begin() as connection:
        lock = "SELECT pg_advisory_xact_lock(hashtextextended('alphapulse_encryption broker', 0))"
        connection.execute(sqlalchemy.text(lock))
        with app.connection_for_write() as broker:
            for queue in app.conf.task_queues:
                queue(broker.default_channel).declare()
        connection.execute(sqlalchemy.text(_REMOVE_DELIVERED), {"days": _DAYS_KEPT})


def check_reachable(url: str, variable: str) -> None:
    """Refuse an address where nobody answers, without showing it; the variable is named."""
    from kombu import Connection  # type: ignore[attr-defined]

    try:
        if url.startswith(("sqla+", "db+")):
            connect_once(url.partition("+")[2])
        else:
            with Connection(url, connect_timeout=10) as connection:  # type: ignore[no-untyped-call]
                connection.ensure_connection(max_retries=2, timeout=15)
    except Exception as error:
        why = reason(str(error))
        raise ConfigurationError(
            f"The server of {variable} cannot be reached ({type(error).__name__}: {why.what}). {why.next_for(variable)}"
        ) from None


class WithoutAddresses(logging.Filter):
    """Takes addresses, users, passwords and stack traces out of what Celery and its drivers log."""

    def __init__(self, *urls: str) -> None:
        super().__init__()
        parts = {text for url in urls for text in _parts(url)}
        self._secret = re.compile("|".join(re.escape(text) for text in sorted(parts, key=len, reverse=True)))

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record, and let it pass."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            text = f"{text.splitlines()[0] if text else ''} ({record.exc_info[0].__name__})"
        record.msg, record.args = self._secret.sub("***", text), None
        record.exc_info = record.exc_text = None
        return True


def _parts(url: str) -> set[str]:
    found = {url, url.partition("+")[2] or url}
    try:
        parsed = make_url(url.removeprefix("sqla+").removeprefix("db+"))
    except (ArgumentError, ValueError):
        return found
    found |= {parsed.render_as_string(hide_password=True), str(parsed.password or url)}
    # Short names would blacken half of every line; they tell nobody anything.
    found |= {text for text in (parsed.host, parsed.username) if text and len(text) > 3}
    return found
