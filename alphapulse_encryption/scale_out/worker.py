"""A worker: takes runs from the queue and executes them, on as many machines as you like.

``python -m alphapulse_encryption.scale_out.worker``. Every worker needs the same package, catalogue and settings as
the command line, and reaches the same target, Dagster storage, broker and key source. It may be killed at any moment:
its runs are noticed and go on elsewhere.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.bounds import whole_number
from alphapulse_encryption.errors import ConfigurationError

if TYPE_CHECKING:
    from celery import Celery

MOST_RUNS = 64
_LONGEST_NAME = 60

_log = logging.getLogger("alphapulse_encryption.scale_out.worker")


def build_parser() -> argparse.ArgumentParser:
    """The command's parser. No address is an argument: arguments of a process are seen by everybody."""
    parser = argparse.ArgumentParser(
        prog="python -m alphapulse_encryption.scale_out.worker",
        description="Takes runs from the queue and executes them.",
        epilog="A first Ctrl-C or SIGTERM: no new runs, and those under way are waited for. A second one, or kill -9: "
        "the daemon notices, and other workers go on with them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--name", type=_name, help="as the list of runs shows it (default: the machine's name)"
    )
    parser.add_argument(
        "--concurrent-runs",
        type=whole_number(1, MOST_RUNS),
        default=1,
        metavar="N",
        help="how many runs at once, each a process of its own (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="log what Celery does, too")
    return parser


def _name(text: str) -> str:
    if text.isascii() and len(text) <= _LONGEST_NAME and text.replace("-", "").replace("_", "").isalnum():
        return text
    raise argparse.ArgumentTypeError(f"up to {_LONGEST_NAME} letters, digits, - and _")


@secrecy.telling_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Work; 0 when stopped by a signal, 2 on wrong usage or configuration."""
    options = build_parser().parse_args(arguments)
    name, runs = options.name or platform.node(), options.concurrent_runs
    if settings.Workers().run_launcher != "celery" and not os.environ.get("DAGSTER_HOME", "").strip():
        raise ConfigurationError(
            "Nobody sends runs to a worker of this instance: set ALPHAPULSE_RUN_LAUNCHER=celery, here and wherever "
            "runs are launched."
        )
    try:
        from alphapulse_encryption.scale_out import celery_runs
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"celery", "dagster_celery", "kombu"}:
            raise
        raise ConfigurationError(
            "Workers need Celery: pip install 'alphapulse-encryption[celery]'."
        ) from None
    from alphapulse_encryption import definitions
    from alphapulse_encryption.defs.resources.instance import open_instance

    addresses = celery_runs.celery_settings()
    broker, backend = addresses["broker"], addresses["backend"]
    celery_runs.check_reachable(broker, "ALPHAPULSE_CELERY_BROKER_URL")
    celery_runs.check_reachable(backend, "ALPHAPULSE_CELERY_BACKEND_URL")
    with open_instance():
        # Whatever is wrong with it is known now, and not with the first run.
        pass
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(celery_runs.WithoutAddresses(broker, backend))
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)
    _log.setLevel(logging.INFO)
    app = build_app(name)
    celery_runs.prepare_broker(app)
    # Loaded once here, and not in the process of every run.
    definitions.defs()
    _log.info("Worker %s takes runs, %d at once. Ctrl-C: no new ones.", name, runs)
    worker = app.Worker(
        hostname=f"{name}@{platform.node()}",
        concurrency=runs,
        pool="prefork",
        queues=[celery_runs.QUEUE],
        # A fresh process for every run: keys and sessions of one do not outlive it.
        max_tasks_per_child=1,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def build_app(name: str) -> Celery:
    """The application whose tasks are runs."""
    from dagster_celery.config import TASK_EXECUTE_JOB_NAME
    from dagster_celery.make_app import make_app

    from alphapulse_encryption.scale_out import celery_runs

    app: Celery = make_app(celery_runs.celery_settings())  # type: ignore[no-untyped-call]

    @app.task(name=TASK_EXECUTE_JOB_NAME)  # type: ignore[untyped-decorator]
    def execute_job(run_id: str) -> int:
        try:
            return execute(run_id, name)
        except Exception as error:
            # Celery would keep its text, which could quote data.
            _log.error("A run could not be executed: %s", type(error).__name__)
            return 1

    return app


def execute(run_id: str, worker: str) -> int:
    """Execute a run that was taken from the queue, unless another worker does; 1 where it failed."""
    import dagster as dg

    from alphapulse_encryption.defs.dagster_private import capture_interrupts, execute_launched_run
    from alphapulse_encryption.defs.resources.instance import open_instance
    from alphapulse_encryption.defs.resources.running import WORKER_TAG, executing

    with capture_interrupts(), open_instance() as instance, executing(instance, run_id) as ours:
        # Looked up now that nobody else can begin it.
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished or not ours:
            _log.info("Run %s is left alone: it has ended, or another worker executes it.", run_id[:8])
            return 0
        if run.status is dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, "Stopped before a worker took it.")
            return 0
        _log.info("Run %s begins.", run_id[:8])
        instance.add_run_tags(run_id, {WORKER_TAG: worker})
        succeeded = execute_launched_run(instance, run_id)
        _log.info("Run %s ends, %s.", run_id[:8], "done" if succeeded else "failed")
        return 0 if succeeded else 1


if __name__ == "__main__":
    secrecy.run_program(main)
