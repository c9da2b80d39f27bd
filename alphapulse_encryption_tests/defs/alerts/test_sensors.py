"""The sensors against a real instance, a real database and real channels: told once, again, and when it is over."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest
from werkzeug.wrappers import Response

from alphapulse_encryption.definitions import build_defs
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.defs.alerts.servers import Posted, mail_server, webhook
from alphapulse_encryption_tests.keysources.servers import Front
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.place import Place, place

USERS = walk.CATALOGUE.table("users")
ALERTS = ["alert_failed_runs", "alert_drift", "alert_old_pending_rows", "alert_keys", "alert_approvals"]
CANARY = "canary-51c2@example.com"


class Watched:
    """A place with a webhook; each sensor is evaluated as the daemon does, from one cursor to the next."""

    def __init__(self, found: Place, instance: dg.DagsterInstance, posted: Posted, front: Front) -> None:
        self.place = found
        self.instance = instance
        self.posted = posted
        self.front = front
        self.cursors: dict[str, str | None] = {}

    def tick(self, name: str) -> str:
        """What the tick shows."""
        with self.place.in_environment():
            definitions = build_defs()
            sensor = definitions.resolve_sensor_def(name)
            with dg.build_sensor_context(
                instance=self.instance,
                cursor=self.cursors.get(name),
                definitions=definitions,
                resources={"target": TargetResource()},
            ) as context:
                answer = sensor(context)
        if isinstance(answer, dg.SkipReason):
            return str(answer.skip_message)
        assert isinstance(answer, dg.SensorResult) and not answer.run_requests
        self.cursors[name] = answer.cursor
        assert isinstance(answer.skip_reason, dg.SkipReason)
        shown = str(answer.skip_reason.skip_message)
        for secret in (CANARY, self.front.url, self.place.url):
            assert secret not in f"{shown} {answer.cursor} {self.posted.texts}"
        return shown

    def told(self, name: str) -> str:
        """What is posted at a tick."""
        before = len(self.posted.texts)
        shown = self.tick(name)
        texts = self.posted.texts[before:]
        assert len(texts) <= 1, "one message"
        assert ("told by webhook" in shown) == bool(texts)
        return texts[0] if texts else ""


@pytest.fixture
def somewhere(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> Iterator[Place]:
    key = base64.b64encode(bytes(range(32))).decode()
    with place(postgres, sample_url, server_dir.parent, key) as found:
        found.ranges = walk.RANGES
        yield found


@pytest.fixture
def watched(somewhere: Place) -> Iterator[Watched]:
    with webhook() as (posted, front):
        somewhere.extra = {
            "ALPHAPULSE_ALERT_WEBHOOK_URL": f"{front.url}/services/canary",
            "ALPHAPULSE_ALERT_LABEL": "staging",
            "ALPHAPULSE_UI_URL": "http://dagster.example.com:3000/",
            "NO_PROXY": "127.0.0.1",
        }
        with somewhere.instance() as instance:
            yield Watched(somewhere, instance, posted, front)


def test_they_are_stopped_and_say_what_is_missing(watched: Watched) -> None:
    watched.place.extra = {}
    sensors = {sensor.name: sensor for sensor in watched.place.definitions().get_repository_def().sensor_defs}
    assert set(ALERTS) <= set(sensors)
    for name in ALERTS:
        assert sensors[name].default_status is dg.DefaultSensorStatus.STOPPED
        assert sensors[name].description
        assert watched.tick(name) == (
            "Nobody is told: set ALPHAPULSE_ALERT_WEBHOOK_URL, or ALPHAPULSE_SMTP_URL with ALPHAPULSE_ALERT_EMAIL_TO "
            "and ALPHAPULSE_ALERT_EMAIL_FROM."
        )
    watched.place.extra = {"ALPHAPULSE_SMTP_URL": "smtp://a:canary@b"}
    with pytest.raises(dg.Failure, match="need ALPHAPULSE_ALERT_EMAIL_TO and") as caught:
        watched.tick("alert_keys")
    assert "canary" not in str(caught.value)


def test_drift_from_its_beginning_to_its_end(watched: Watched) -> None:
    walk.encrypt(watched.place.url, USERS)
    first = watched.told("alert_drift")
    assert first.startswith(
        "AlphaPulse encryption (staging), drift: 1 new\nNew:\n- Column username (person, possible)"
    )
    assert first.endswith("\nhttp://dagster.example.com:3000/automation")
    assert watched.told("alert_drift") == ""
    walk.query(watched.place.url, "ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update")
    walk.query(watched.place.url, "UPDATE users SET email = %s WHERE id = 7", CANARY)
    again = watched.told("alert_drift")
    assert again.startswith("AlphaPulse encryption (staging), drift: 1 new\nNew:\n- The guard of users")
    assert "First seen at 20" in again and "--add-columns --table users" in again
    assert watched.tick("alert_drift") == "2 found; nothing new to tell."
    walk.encrypt(watched.place.url, USERS)
    assert watched.told("alert_drift").startswith(
        "AlphaPulse encryption (staging), drift: 1 over\nOver:\n- users: guard (told of at 20"
    )
    assert watched.told("alert_drift") == ""
    # What is told once is not told again, however long it stands; the rest is.
    walk.query(watched.place.url, "ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update")
    assert "1 new" in watched.told("alert_drift")
    watched.place.extra["ALPHAPULSE_ALERT_REMIND_HOURS"] = "0.00001"
    assert watched.told("alert_drift").startswith(
        "AlphaPulse encryption (staging), drift: 1 as before\nAs before:\n- The guard of users"
    )


def test_a_failed_delivery_is_shown_and_made_up_for(watched: Watched) -> None:
    walk.encrypt(watched.place.url, USERS)
    with mail_server() as box:
        watched.place.extra |= {
            "ALPHAPULSE_SMTP_URL": f"smtp://127.0.0.1:{box.port}",
            "ALPHAPULSE_ALERT_EMAIL_TO": "ada@example.com",
            "ALPHAPULSE_ALERT_EMAIL_FROM": "alerts@example.com",
        }
        watched.front.always = Response(status=404)
        shown = watched.tick("alert_drift")
        assert shown == (
            "1 found; NOT DELIVERED by webhook (HTTP status 404); tried again at the next tick; told by e-mail."
        )
        watched.front.always = None
        assert watched.tick("alert_drift") == "1 found; told by webhook."
        assert len(box.mails) == len(watched.posted.texts) == 1
        assert box.mails[0]["Subject"] == "AlphaPulse encryption (staging), drift: 1 new"
        assert watched.tick("alert_drift") == "1 found; nothing new to tell."


def test_pending_rows_that_are_old(watched: Watched) -> None:
    walk.encrypt(watched.place.url, USERS)
    watched.place.extra["ALPHAPULSE_ALERT_PENDING_HOURS"] = "0.00001"
    walk.query(watched.place.url, "UPDATE users SET first_name = 'x' WHERE id = (SELECT min(id) FROM users)")
    # The first tick has no mark that is old enough.
    assert watched.tick("alert_old_pending_rows") == "All is well; nothing new to tell."
    told = watched.told("alert_old_pending_rows")
    assert "- 1 row of users waits for ciphertext" in told
    walk.backfill(watched.place.url, USERS)
    assert "Over:\n- users: rows that wait for their ciphertext" in watched.told("alert_old_pending_rows")
    watched.place.extra["ALPHAPULSE_ALERT_PENDING_HOURS"] = "1"
    walk.query(watched.place.url, "UPDATE users SET first_name = 'x'")
    assert [watched.told("alert_old_pending_rows") for _ in range(3)] == ["", "", ""]


def test_keys(watched: Watched) -> None:
    walk.encrypt(watched.place.url, USERS)
    assert watched.tick("alert_keys") == "All is well; nothing new to tell."
    usage = "UPDATE alphapulse_encryption.key_usage SET messages = %s WHERE context = 'user_pii'"
    walk.query(watched.place.url, usage, 2**31)
    assert "- The key of context user_pii, version 1, has encrypted" in watched.told("alert_keys")
    walk.query(watched.place.url, usage, 2**31 + 1)
    assert watched.told("alert_keys") == ""
    walk.query(watched.place.url, usage, 2**32)
    assert "1 changed\nChanged:\n- The key of context user_pii, version 1, may not encrypt" in watched.told(
        "alert_keys"
    )


def test_a_database_that_is_away_for_long(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    walk.encrypt(watched.place.url, USERS)
    assert "1 new" in watched.told("alert_drift")
    url, watched.place.url = watched.place.url, "postgresql://u:canary@127.0.0.1:1/nothing"
    shown = watched.tick("alert_drift")
    assert shown.startswith(
        "Could not look: Nobody can look for drift: The database cannot be reached (connection"
    )
    assert shown.endswith("; nothing new to tell.") and "canary" not in shown
    # Ten minutes later, as the cursor has it.
    kept = json.loads(str(watched.cursors["alert_drift"]))
    kept["standing"]["look:alert_drift"]["since"] = "2026-01-01T00:00:00+00:00"
    watched.cursors["alert_drift"] = json.dumps(kept)
    assert "- Nobody can look for drift: The database cannot be reached" in watched.told("alert_drift")
    assert watched.told("alert_drift") == ""
    watched.place.url = url
    assert "1 over\nOver:\n- look for drift" in watched.told("alert_drift")


def failing(watched: Watched, partition: str) -> str:
    """A run of a partition that fails; its id."""
    result = watched.place.materialize(watched.instance, "encrypted_data", partition)
    assert not result.success
    return result.run_id


def test_failed_runs(watched: Watched) -> None:
    before = failing(watched, "00|users")
    assert watched.tick("alert_failed_runs") == "No run has failed since the last look; nothing new to tell."
    first, second = failing(watched, "00|users"), failing(watched, "01|trades")
    text = watched.told("alert_failed_runs")
    assert text.startswith("AlphaPulse encryption (staging), runs: 2 failed runs\n- ")
    assert before not in text
    lines = text.splitlines()[1:]
    assert lines[0] == (
        f"- materialization of encrypted_data of users, run {first}: step encrypted_data: 1 of 1 batch ranges failed: "
        "- 00|users: Table users has no encrypted columns yet. Run the step encrypted_columns (--add-columns --table "
        "users) first. To do: correct what it says, and run it again; it goes on where it was (python -m "
        "alphapulse_encryption --migrate-data --table users). "
        f"http://dagster.example.com:3000/runs/{first}"
    )
    assert f"of trades, run {second}:" in lines[1]
    assert watched.told("alert_failed_runs") == ""


def test_failed_runs_of_jobs_and_of_others(watched: Watched) -> None:
    watched.tick("alert_failed_runs")
    definitions = watched.place.definitions()
    definitions.resolve_job_def("switch_to_ciphertext").execute_in_process(
        instance=watched.instance,
        run_config={"ops": {"switch": {"config": {"tables": ["users", "trades"]}}}},
        raise_on_error=False,
    )
    text = watched.told("alert_failed_runs")
    assert "- switch_to_ciphertext of trades, users, run " in text
    assert "(python -m alphapulse_encryption --switch-to-encrypted --table trades --table users)" in text

    @dg.op
    def wrong() -> None:
        raise ValueError(CANARY)

    @dg.op
    def theirs() -> None:
        raise dg.Failure(f"no: https://x:canary@host/ {CANARY} {'Ab1/' * 12}\nsecond line {CANARY}")

    @dg.job(name="migrate_data")
    def ours_by_name() -> None:
        wrong()
        theirs()

    @dg.job
    def somebody_elses() -> None:
        wrong()

    somebody_elses.execute_in_process(instance=watched.instance, raise_on_error=False)
    assert watched.tick("alert_failed_runs") == "No run has failed since the last look; nothing new to tell."
    ours_by_name.execute_in_process(instance=watched.instance, raise_on_error=False)
    text = watched.told("alert_failed_runs")
    # Of an error that did not come by our border nothing is told but where; and of what came, nothing foreign.
    assert (
        "step wrong: an unexpected error; the run's page says where." in text
        or "step theirs: no: … … …" in text
    )
    assert "canary" not in text and "second line" not in text


def test_runs_that_end_outside_of_their_steps(watched: Watched) -> None:
    watched.tick("alert_failed_runs")
    job = watched.place.definitions().resolve_job_def("take_backup")
    for status in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTED):
        run = watched.instance.create_run_for_job(job, status=status)
        watched.instance.report_run_failed(run, f"The worker with {CANARY} went away")
    stopped = watched.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    watched.instance.report_run_canceled(stopped)
    text = watched.told("alert_failed_runs")
    assert text.count("take_backup, run ") == 2
    assert "ended outside of its steps" in text and "(python -m alphapulse_encryption --backup)" in text


def test_failed_runs_are_told_later_where_nobody_could_be(watched: Watched) -> None:
    watched.tick("alert_failed_runs")
    first = failing(watched, "00|users")
    watched.front.always = Response(status=410)
    assert "NOT DELIVERED by webhook (HTTP status 410)" in watched.tick("alert_failed_runs")
    second = failing(watched, "01|users")
    watched.front.always = None
    text = watched.told("alert_failed_runs")
    assert first in text and second in text
    assert watched.told("alert_failed_runs") == ""


def test_approvals(postgres: EmbeddedPostgres, sample_url: str, watched: Watched, tmp_path: Path) -> None:
    walk.switch(sample_url, USERS)
    walk.backup(sample_url, (USERS,), tmp_path, postgres.bin_dir())
    approval = walk.approve(sample_url, USERS)
    assert f"- Approval {approval.id} of the drop of users waits to be used" in watched.told(
        "alert_approvals"
    )
    assert watched.told("alert_approvals") == ""
    walk.let_approvals_end(sample_url, timedelta(hours=1))
    assert "1 changed" in watched.told("alert_approvals")
    walk.let_approvals_end(sample_url, timedelta(hours=-1))
    assert "has ended at" in watched.told("alert_approvals")
    walk.let_approvals_end(sample_url, timedelta(days=-2))
    assert watched.told("alert_approvals") == ""
    walk.approve(sample_url, USERS)
    assert "1 new" in watched.told("alert_approvals")
    walk.drop(sample_url, USERS)
    assert "1 over\nOver:\n- approval" in watched.told("alert_approvals")
