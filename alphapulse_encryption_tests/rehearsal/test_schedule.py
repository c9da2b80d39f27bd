"""The schedule in a daemon as it runs in production, every minute."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import dagster as dg
import pytest

from alphapulse_encryption.defs.resources.instance import packaged_file, prepare_dagster_home
from alphapulse_encryption.rehearsal.job import JOB, SCHEDULE
from alphapulse_encryption.rehearsal.report import history
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.rehearsal.circle import clones, contents

_STOP_TIMEOUT = 60


def test_a_turn_is_left_out_while_a_rehearsal_is_under_way(small: Place) -> None:
    schedule = small.definitions().get_repository_def().get_schedule_def(SCHEDULE)
    job = small.definitions().resolve_job_def(JOB)
    with small.instance() as instance:

        def tick() -> dg.ScheduleExecutionData:
            with dg.build_schedule_context(instance=instance) as context:
                return schedule.evaluate_tick(context)

        assert len(tick().run_requests or ()) == 1
        run = instance.create_run_for_job(job_def=job, run_config={}, status=dg.DagsterRunStatus.STARTED)
        assert (tick().run_requests or [], tick().skip_message) == ([], "A rehearsal is under way.")
        instance.report_run_failed(run)
        assert len(tick().run_requests or ()) == 1


@contextlib.contextmanager
def daemon(here: Place) -> Iterator[None]:
    """Dagster's daemon, with this schedule started."""
    with here.in_environment():
        environment = {**os.environ, "DAGSTER_HOME": str(prepare_dagster_home())}
    workspace = ["--workspace", str(packaged_file("workspace.yaml"))]
    started = subprocess.run(
        [sys.executable, "-m", "dagster", "schedule", "start", SCHEDULE, *workspace],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "dagster._daemon", "run", "--log-level", "warning", *workspace],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.long
def test_the_schedule_rehearses_again_and_again(small: Place) -> None:
    """Twice, in a running daemon, with everything by default: traffic as well."""
    before = contents(small.url)
    small.extra["ALPHAPULSE_REHEARSAL_SCHEDULE"] = "* * * * *"
    with small.instance() as instance:
        with daemon(small):
            while len(history.read(instance)) < 2:
                time.sleep(0.4)
        first, second, *_ = history.read(instance)
        assert first.run_id != second.run_id
        for found in (first, second):
            assert (found.failed_stage, found.source_unchanged) == (None, True)
            run = instance.get_run_by_id(found.run_id)
            assert run is not None
            assert run.tags["dagster/schedule_name"] == SCHEDULE
    assert contents(small.url) == before
    # A third one may have been under way when the daemon ended.
    assert len(clones(small)) <= 1
