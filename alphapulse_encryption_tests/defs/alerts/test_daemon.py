"""The alerts in Dagster's own daemon, as a person starts them: a failed run is told of, and a cursor is kept."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, SensorInstigatorData
from dagster._core.workspace.load import location_origins_from_yaml_paths

from alphapulse_encryption.defs.resources.instance import packaged_file
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.defs.alerts.servers import webhook
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place


def start(instance: dg.DagsterInstance, name: str) -> None:
    """Start a sensor as the UI's switch does."""
    location, *_ = location_origins_from_yaml_paths([str(packaged_file("workspace.yaml"))])
    origin = RemoteRepositoryOrigin(location, "__repository__").get_instigator_origin(name)
    data = SensorInstigatorData(min_interval=30)
    instance.add_instigator_state(
        InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.RUNNING, data)
    )


def ticks(instance: dg.DagsterInstance, name: str) -> list[tuple[str, str | None]]:
    """Status and reason of a sensor's ticks."""
    (state,) = [
        state
        for state in instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)
        if state.instigator_name == name
    ]
    found = instance.get_ticks(state.instigator_origin_id, state.selector_id)
    return [(tick.status.value, tick.skip_reason) for tick in found]


@contextlib.contextmanager
def daemon(found: Place) -> Iterator[None]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dagster._daemon", "run", "--log-level", "warning"),
            *("--workspace", str(packaged_file("workspace.yaml"))),
        ],
        env=found.environment(DAGSTER_HOME=str(found.state / "dagster_home")),
        start_new_session=True,
    )
    try:
        yield
    finally:
        # It leads a group of its own, in which its code server is.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.long
def test_started_in_a_daemon(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> None:
    key = base64.b64encode(bytes(range(32))).decode()
    with (
        webhook() as (posted, front),
        place(postgres, sample_url, server_dir.parent, key) as found,
    ):
        found.extra = {"ALPHAPULSE_ALERT_WEBHOOK_URL": f"{front.url}/canary", "NO_PROXY": "127.0.0.1"}
        with found.instance() as instance:
            for name in ("alert_failed_runs", "alert_drift"):
                start(instance, name)
            with daemon(found):
                support.until(
                    lambda: any("drift: 1 new" in text for text in posted.texts), "drift is told of"
                )
                support.until(lambda: bool(ticks(instance, "alert_failed_runs")), "a first look at runs")
                support.until(
                    lambda: ticks(instance, "alert_failed_runs")[0][0] == "SKIPPED", "the end of that look"
                )
                result = found.materialize(instance, "encrypted_data", "00|users")
                assert not result.success
                support.until(
                    lambda: any(result.run_id in text for text in posted.texts), "the failed run is told of"
                )
                support.until(
                    lambda: (
                        ticks(instance, "alert_failed_runs")[0]
                        == ("SKIPPED", "1 run failed; told by webhook.")
                    ),
                    "the tick that shows it",
                )
            assert [reason for _, reason in ticks(instance, "alert_drift")] == ["1 found; told by webhook."]
            assert len(posted.texts) == 2
