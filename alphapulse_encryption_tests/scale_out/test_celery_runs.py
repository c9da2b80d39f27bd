"""The launcher for Celery: what is run again by itself, what is said of a run's health, and what logs do not say."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psycopg
import pytest
import yaml

from alphapulse_encryption import settings
from alphapulse_encryption.defs.dagster_private import LaunchRunContext, WorkerStatus
from alphapulse_encryption.defs.jobs import build_jobs
from alphapulse_encryption.defs.resources.instance import packaged_file
from alphapulse_encryption.defs.resources.running import run_lease, safe_to_repeat
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption.scale_out import celery_runs
from alphapulse_encryption.scale_out.celery_runs import (
    AlphaPulseCeleryRunLauncher,
    WithoutAddresses,
    prepare_broker,
)
from alphapulse_encryption.scale_out.worker import build_app
from alphapulse_encryption_tests.place import Place, place

DESTRUCTIVE = {
    "drop_unencrypted",
    "erase_dropped",
    "switch_to_ciphertext",
    "restore_plaintext",
    "rotate_keys",
}


@pytest.fixture
def here(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    with place(postgres, database_url, server_dir.parent, "") as found:
        found.extra = {"ALPHAPULSE_RUN_LAUNCHER": "celery"}
        yield found


def run_of(job: str, *assets: str) -> dg.DagsterRun:
    selection = frozenset(map(dg.AssetKey, assets)) if assets else None
    return dg.DagsterRun(job_name=job, asset_selection=selection)


def test_what_is_run_again_by_itself() -> None:
    repeated = {job.name for job in build_jobs() if safe_to_repeat(run_of(job.name))}
    assert repeated == {"migrate_data", "verify_data"}
    assert not repeated & DESTRUCTIVE
    assert {job.name for job in build_jobs()} >= DESTRUCTIVE
    assert safe_to_repeat(run_of("__ASSET_JOB", "encrypted_data"))
    assert safe_to_repeat(run_of("__ASSET_JOB", "encrypted_data", "verified_data"))
    assert not safe_to_repeat(run_of("__ASSET_JOB", "encrypted_data", "encrypted_columns"))
    assert not safe_to_repeat(run_of("__ASSET_JOB"))


def test_the_two_configurations_differ_where_they_should() -> None:
    local, celery = (
        yaml.safe_load(packaged_file(name).read_text()) for name in ("dagster.yaml", "dagster-celery.yaml")
    )
    assert celery.pop("run_launcher") == {
        "module": "alphapulse_encryption.scale_out.celery_runs",
        "class": "AlphaPulseCeleryRunLauncher",
    }
    assert (
        celery["run_retries"]
        == local["run_retries"]
        == {
            "enabled": True,
            "max_retries": 0,
            "retry_on_asset_or_op_failure": False,
        }
    )
    differing = {
        f"{section}.{name}"
        for section in local
        for name in local[section]
        if local[section][name] != celery[section][name]
    }
    assert local.keys() == celery.keys()
    assert differing == {
        "concurrency.runs",
        "run_monitoring.poll_interval_seconds",
        "run_monitoring.free_slots_after_run_end_seconds",
    }
    assert celery["concurrency"]["pools"] == local["concurrency"]["pools"]


def test_health_is_the_lease(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with here.instance() as instance:
        looks = instance.run_launcher
        assert isinstance(looks, AlphaPulseCeleryRunLauncher)
        run = instance.create_run_for_job(
            here.definitions().resolve_job_def("live_check"), status=dg.DagsterRunStatus.STARTED
        )
        with run_lease(instance, run.run_id):
            assert looks.check_run_worker_health(run).status is WorkerStatus.RUNNING
        # It may be back in a moment, and then counts from the beginning.
        for seconds, status in (
            (0, "RUNNING"),
            (14, "RUNNING"),
            (2, "FAILED"),
            (0, "RUNNING"),
            (16, "FAILED"),
        ):
            now[0] += seconds
            assert looks.check_run_worker_health(run).status is WorkerStatus[status]
        assert looks.check_run_worker_health(run).status is WorkerStatus.RUNNING
        with run_lease(instance, run.run_id):
            now[0] += 20
            assert looks.check_run_worker_health(run).status is WorkerStatus.RUNNING
        assert looks.check_run_worker_health(run).status is WorkerStatus.RUNNING


def test_no_address_in_what_a_run_is_sent_with(here: Place) -> None:
    here.extra["ALPHAPULSE_CELERY_BROKER_URL"] = "amqp://canary:canary@canary.example//"
    here.extra["ALPHAPULSE_CELERY_BACKEND_URL"] = "redis://:canary@canary.example/0"
    with here.instance() as instance:
        assert isinstance(instance.run_launcher, AlphaPulseCeleryRunLauncher)
        assert instance.run_launcher.broker == "amqp://canary:canary@canary.example//"
        reference = str(instance.get_ref().to_dict())
        assert "canary" not in reference
        assert "AlphaPulseCeleryRunLauncher" in reference


@pytest.mark.parametrize(
    ("given", "broker"),
    [
        ("postgresql://u@h/d", "sqla+postgresql+psycopg2://u@h/d"),
        ("sqla+postgresql+psycopg2://u@h/d", "sqla+postgresql+psycopg2://u@h/d"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("amqps://u:p@h//", "amqps://u:p@h//"),
    ],
)
def test_brokers(monkeypatch: pytest.MonkeyPatch, given: str, broker: str) -> None:
    monkeypatch.setenv("ALPHAPULSE_CELERY_BROKER_URL", given)
    assert settings.Workers().broker_url == broker


@pytest.mark.parametrize("given", ["canary", "mysql://canary/x", "postgresql://", "http://canary"])
def test_what_is_no_broker(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    for name, field in (
        ("ALPHAPULSE_CELERY_BROKER_URL", "broker_url"),
        ("ALPHAPULSE_CELERY_BACKEND_URL", "backend_url"),
    ):
        monkeypatch.setenv(name, given)
        with pytest.raises(ConfigurationError, match=name) as caught:
            getattr(settings.Workers(), field)
        assert "canary" not in str(caught.value)


def test_one_command_may_execute_its_runs_itself(here: Place) -> None:
    with here.instance() as instance:
        assert isinstance(instance.run_launcher, AlphaPulseCeleryRunLauncher)
        here.extra["ALPHAPULSE_RUN_LAUNCHER"] = "local"
        with here.instance() as local:
            assert not isinstance(local.run_launcher, AlphaPulseCeleryRunLauncher)
            # Neither takes the other's configuration away, and both know the same runs.
            assert local.root_directory != instance.root_directory
            run = local.create_run_for_job(here.definitions().resolve_job_def("live_check"))
        assert instance.get_run_by_id(run.run_id) is not None


def test_an_unknown_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAPULSE_RUN_LAUNCHER", "canary")
    with pytest.raises(ConfigurationError, match="ALPHAPULSE_RUN_LAUNCHER"):
        print(settings.Workers().run_launcher)


def test_a_queue_that_cannot_be_reached_is_not_quoted(here: Place) -> None:
    here.extra["ALPHAPULSE_CELERY_BROKER_URL"] = "postgresql://canary:canary@127.0.0.1:9/canary"
    with here.in_environment(), here.instance() as instance:
        job = here.definitions().resolve_job_def("live_check")
        from alphapulse_encryption.cli.launch import Launcher

        with pytest.raises(ConfigurationError, match="ALPHAPULSE_CELERY_BROKER_URL") as caught:
            found = Launcher(instance, 1)
            run = found.location.create_run(instance, job.name, {}, {})
            instance.run_launcher.launch_run(LaunchRunContext(dagster_run=run, workspace=None))
        assert "canary" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_delivered_messages_do_not_stay_for_ever(here: Place) -> None:
    with here.in_environment(), psycopg.connect(here.dagster_url, autocommit=True) as connection:
        app = build_app("test")
        prepare_broker(app)
        prepare_broker(app)
        row = connection.execute("SELECT id, name FROM kombu_queue").fetchall()
        assert [name for _, name in row] == [celery_runs.QUEUE]
        for visible, days in ((True, 30), (False, 30), (False, 1)):
            connection.execute(
                "INSERT INTO kombu_message (id, visible, timestamp, payload, version, queue_id) VALUES "
                "(nextval('message_id_sequence'), %s, now() - make_interval(days => %s), '{}', 1, %s)",
                [visible, days, row[0][0]],
            )
        prepare_broker(app)
        left = connection.execute("SELECT visible FROM kombu_message ORDER BY timestamp").fetchall()
        assert left == [(True,), (False,)]


def test_logs_have_no_addresses(caplog: pytest.LogCaptureFixture) -> None:
    url = "sqla+postgresql+psycopg2://canary_user:canary%40password@canary.example:5432/canary_database"
    hidden = WithoutAddresses(url)

    def said(message: str, *arguments: object, error: Exception | None = None) -> str:
        record = logging.LogRecord(
            "celery", logging.ERROR, "", 0, message, arguments, (type(error), error, None) if error else None
        )
        assert hidden.filter(record)
        return logging.Formatter().format(record)

    assert "canary" not in said("Connected to %s", url)
    assert "canary" not in said("Connected to %s", url.removeprefix("sqla+"))
    assert said("cannot connect to canary.example as canary_user") == "cannot connect to *** as ***"
    told = said("Unrecoverable", error=OSError("connection to canary.example failed for canary_user"))
    assert told == "Unrecoverable (OSError)"
