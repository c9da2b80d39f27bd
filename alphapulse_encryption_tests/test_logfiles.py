"""The log files: what is in them, what never is, and that they stop nothing."""

from __future__ import annotations

import json
import logging
import logging.config
import multiprocessing
import os
import resource
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from alphapulse_encryption import settings
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.logfiles import Files, RunLog, note
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.place import Place

TODAY = datetime.now(UTC)


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "deep" / "logs"
    monkeypatch.setenv("ALPHAPULSE_LOG_DIR", str(directory))
    return directory


def entries(directory: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(directory.glob("migration-*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def test_an_entry(logs: Path) -> None:
    before = os.umask(0)
    try:
        note("range_started", run_id="r", partition="03|users", nothing=None, message="Größe\nzwei", number=3)
    finally:
        os.umask(before)
    (path,) = logs.iterdir()
    assert path.name in {f"migration-{day:%Y-%m-%d}.jsonl" for day in (TODAY, TODAY + timedelta(days=1))}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(logs.stat().st_mode) == 0o700
    (entry,) = entries(logs)
    assert abs(datetime.fromisoformat(entry.pop("at")) - TODAY) < timedelta(hours=1)
    assert entry.pop("user") and entry.pop("host")
    assert entry == {
        "level": "info",
        "event": "range_started",
        "run_id": "r",
        "partition": "03|users",
        "number": 3,
        "message": "Größe\nzwei",
        "pid": os.getpid(),
    }


def test_no_address(logs: Path) -> None:
    note(
        "message",
        message="cannot reach postgresql://me:secret@db/x?password=secret now; see https://example.com/a",
    )
    (entry,) = entries(logs)
    assert entry["message"] == "cannot reach (an address) now; see https://example.com/a"


def _write_many(number: int) -> None:
    for line in range(200):
        # Some are longer than what is buffered.
        note("x", number=number, line=line, text="x" * (500 if line % 4 else 20_000))


def test_many_processes_at_once(logs: Path) -> None:
    note("x", number=4, line=0)
    processes = [multiprocessing.get_context("fork").Process(target=_write_many, args=(n,)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = [(entry["number"], entry["line"]) for entry in entries(logs)]
    assert sorted(found) == [*((number, line) for number in range(4) for line in range(200)), (4, 0)]


def test_old_files_are_removed(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs.mkdir(parents=True)
    monkeypatch.setenv("ALPHAPULSE_LOG_DAYS", "7")
    kept = [
        f"migration-{TODAY - timedelta(days=6):%Y-%m-%d}.jsonl",
        "migration-2020-01-01.txt",
        "other-2020-01-01.jsonl",
    ]
    for name in [
        *kept,
        "migration-2020-01-01.jsonl",
        f"migration-{TODAY - timedelta(days=9):%Y-%m-%d}.jsonl",
    ]:
        (logs / name).touch()
    note("message")
    assert {path.name for path in logs.iterdir()} >= set(kept)
    assert len(list(logs.iterdir())) == len(kept) + 1
    monkeypatch.setenv("ALPHAPULSE_LOG_DAYS", "seven")
    with pytest.raises(ConfigurationError, match="ALPHAPULSE_LOG_DAYS must be a whole number"):
        print(settings.Logs().days)


def test_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ALPHAPULSE_LOG_DIR", raising=False)
    monkeypatch.delenv("ALPHAPULSE_STATE_DIR", raising=False)
    assert settings.log_dir() == settings.state_dir().parent / "logs" / "migration"
    monkeypatch.setenv("ALPHAPULSE_STATE_DIR", str(tmp_path))
    assert settings.log_dir() == tmp_path / "logs" / "migration"


def test_what_cannot_be_written_stops_nothing(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").touch()
    for _ in range(3):
        note("message")
    assert capsys.readouterr().err == (
        f"alphapulse_encryption: the log files in {logs} cannot be written (Not a directory); everything else goes on. "
        "ALPHAPULSE_LOG_DIR names another directory.\n"
    )
    (tmp_path / "deep").unlink()
    note("message")
    assert len(entries(logs)) == 1
    monkeypatch.setenv("ALPHAPULSE_LOG_DAYS", "seven")
    note("message")
    assert capsys.readouterr().out == ""


def test_a_directory_that_was_removed_comes_back(logs: Path) -> None:
    note("message")
    shutil.rmtree(logs)
    note("message")
    assert len(entries(logs)) == 1


def test_a_link_in_its_place_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    logs = tmp_path / "logs"
    logs.mkdir()
    for day in (TODAY, TODAY + timedelta(days=1)):
        (logs / f"migration-{day:%Y-%m-%d}.jsonl").symlink_to(target)
    monkeypatch.setenv("ALPHAPULSE_LOG_DIR", str(logs))
    note("message")
    assert target.read_text() == "precious"
    assert "cannot be written" in capsys.readouterr().err


def _write_until_full() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
    for number in range(3):
        note("x", number=number, text="x" * 80)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    note("x", number=3)
    note("x", number=4)


def test_a_line_that_a_full_disk_cut(logs: Path) -> None:
    """Whatever follows, when there is room again, is whole."""
    process = multiprocessing.get_context("fork").Process(target=_write_until_full)
    process.start()
    process.join()
    assert process.exitcode == 0
    (path,) = logs.iterdir()
    first, *middle, before, last = path.read_text().splitlines()
    assert json.loads(first)["number"] == 0
    assert (json.loads(before)["number"], json.loads(last)["number"]) == (3, 4)
    with pytest.raises(json.JSONDecodeError):
        json.loads(middle[-1])


def test_what_is_not_of_a_run_is_left_out(logs: Path) -> None:
    RunLog().emit(logging.makeLogRecord({"msg": "canary"}))
    broken = logging.makeLogRecord({"msg": "canary"})
    broken.dagster_meta = {"dagster_event": object()}
    RunLog().emit(broken)
    of_a_library = logging.makeLogRecord({"name": "botocore", "levelno": logging.ERROR, "msg": "canary"})
    of_a_library.dagster_meta = {"dagster_event": None, "orig_message": "canary"}
    RunLog().emit(of_a_library)
    assert not logs.exists()


def test_commands_and_runs(theirs: Place) -> None:
    logs = theirs.state / "logs" / "migration"
    theirs.succeeds("--add-columns", "--migrate-data", "--verify", "--table", "sessions")
    told = entries(logs)
    assert (told[0]["event"], told[0]["flags"], told[0]["tables"]) == (
        "command_started",
        ["--add-columns", "--migrate-data", "--verify"],
        ["sessions"],
    )
    assert (told[-1]["event"], told[-1]["exit_status"]) == ("command_ended", 0)
    assert told[-1]["seconds"] > 0 and told[-1]["level"] == "info"
    assert {entry["pid"] for entry in told} == {told[0]["pid"]}
    with theirs.instance() as instance:
        runs = {run.run_id: run.job_name for run in instance.get_runs()}
    assert {entry["run_id"]: entry["job"] for entry in told if entry["event"] == "run_started"} == runs
    assert {entry["run_id"] for entry in told if entry["event"] == "run_succeeded"} == set(runs)
    ranges = [entry for entry in told if entry["event"] == "range_started"]
    assert [entry["partition"] for entry in ranges] == ["00|sessions", "01|sessions"] * 2
    done = [entry for entry in told if entry["event"] == "done" and entry["asset"] == "encrypted_data"]
    assert [entry["partition"] for entry in done] == ["00|sessions", "01|sessions"]
    assert {entry["outcome"] for entry in done} == {"30 rows encrypted"}
    assert done[0]["figures"]["rows_encrypted"] == 30 and done[0]["figures"]["rows_per_second"] > 0
    checks = {entry["check"]: entry["passed"] for entry in told if entry["event"] == "checked"}
    assert checks["nothing_pending"] is True and len(checks) == 6

    refused = theirs.fails(1, "--drop-unencrypted", "--confirm", "--table", "sessions", "--operator", "Eve")
    *_, failed, run_failed, ended = (
        e for e in entries(logs) if e["level"] == "error" and e["event"] != "message"
    )
    assert failed["event"] == "step_failed" and failed["step"] == "drop"
    assert f"✗ {failed['message']}" in refused.stdout
    assert (run_failed["event"], run_failed["run_id"]) == ("run_failed", failed["run_id"])
    assert (ended["event"], ended["exit_status"]) == ("command_ended", 1)

    theirs.fails(
        1, "--verify", ALPHAPULSE_ENCRYPTION_MASTER_KEY="AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
    )
    assert entries(logs)[-1]["exit_status"] == 1 and "master key" in entries(logs)[-1]["message"]

    # As the UI's button launches it.
    with theirs.instance() as instance:
        result = theirs.materialize(instance, "encrypted_data", "01|sessions")
    of_the_run = [entry for entry in entries(logs) if entry.get("run_id") == result.run_id]
    assert {"run_started", "step_started", "range_started", "done", "run_succeeded"} <= {
        entry["event"] for entry in of_the_run
    }
    assert {entry["partition"] for entry in of_the_run} == {"01|sessions"}

    text = "".join(path.read_text() for path in logs.iterdir())
    values = {str(value) for row in another.plaintexts(theirs.url, "sessions") for value in row[1:] if value}
    assert len(values) > 60
    assert [value for value in values if value in text] == []
    for secret in (another.MASTER_KEY_TEXT, theirs.url, theirs.dagster_url, "Eve"):
        assert secret not in text


def test_a_migration_goes_on_without_them(theirs: Place) -> None:
    blocked = theirs.state / "a file"
    blocked.touch()
    done = theirs.run("--add-columns", "--migrate-data", ALPHAPULSE_LOG_DIR=str(blocked / "logs"))
    assert done.returncode == 0
    assert done.stderr.count("cannot be written (Not a directory)") == 1
    assert done.stderr.count("\n") == 1


def test_the_clock_of_a_new_day(logs: Path) -> None:
    """Without any process being told."""
    log = Files()
    days = [TODAY - timedelta(days=2), TODAY - timedelta(days=1)]
    for day in days:
        log.append(day.replace(hour=23, minute=59), {"event": f"{day:%F}"})
    assert {path.name: json.loads(path.read_text())["event"] for path in logs.iterdir()} == {
        f"migration-{day:%F}.jsonl": f"{day:%F}" for day in days
    }


def test_libraries_that_configure_logging_turn_nothing_off(logs: Path) -> None:
    logging.disable(logging.CRITICAL)
    try:
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})
        note("message")
    finally:
        logging.disable(logging.NOTSET)
    assert len(entries(logs)) == 1
