"""Log files for support, ``logs/migration/``: what was done, when, by whom and how fast; never a value, key or address.

One file a day (UTC), one JSON object a line, written by commands and by the runs that the UI or a schedule launches
alike, several processes at once. The handlers of the standard library that rotate files rename them, which only one
process may do: here a new day has a new name, and each line is one write to the end of its file.

A log that cannot be written, because the disk is full or read-only, never stops what it tells of: that is said once, on
standard error.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from alphapulse_encryption import settings
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.secrecy import private_directory

_NAME = "migration-{:%Y-%m-%d}.jsonl"
_FILE_MODE = 0o600
# What is longer is a mistake, and is cut.
_LONGEST_MESSAGE = 8_000
# Our messages have none. Somebody's message that has is worth less than what it would show.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"]*@[^\s'\"]*", re.IGNORECASE)

# What Dagster calls its events, and what they are called here. Others tell of its own machinery.
_EVENTS: Mapping[str, str] = {
    "PIPELINE_START": "run_started",
    "PIPELINE_SUCCESS": "run_succeeded",
    "PIPELINE_FAILURE": "run_failed",
    "PIPELINE_CANCELING": "run_is_being_stopped",
    "PIPELINE_CANCELED": "run_stopped",
    "STEP_START": "step_started",
    "STEP_SUCCESS": "step_succeeded",
    "STEP_FAILURE": "step_failed",
    "STEP_SKIPPED": "step_skipped",
    "STEP_UP_FOR_RETRY": "step_tried_again_later",
    "ASSET_MATERIALIZATION": "done",
    "ASSET_OBSERVATION": "progress",
    "ASSET_CHECK_EVALUATION": "checked",
}
# The words among the metadata that say how it went; of all other metadata, numbers only.
_WORDS = ("outcome", "holds_back_because")


class Files:
    """The files of a directory, each of one day. No logger has them: who configures `logging` disables unknown ones."""

    def __init__(self) -> None:
        self._begun: Path | None = None
        self._failed = False
        self._warned: set[Path | None] = set()

    def append(self, at: datetime, entry: Mapping[str, object]) -> None:
        """Append an entry as one line to the file of its day (UTC), made where there is none; never raises."""
        directory = None
        try:
            directory = settings.log_dir()
            if not directory.is_dir():
                private_directory(directory)
            path = directory / _NAME.format(at)
            if path != self._begun:
                _remove_old(directory)
                self._begun = path
            moment = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            line = json.dumps({"at": moment, **entry}, ensure_ascii=False, default=str)
            self._write(path, f"{line}\n".encode(errors="replace"))
        except Exception as error:
            self.complain(error, directory)

    def _write(self, path: Path, line: bytes) -> None:
        # One call of the system writes a line to whatever end the file has then.
        with open(path, "ab+", buffering=0, opener=_opener) as file:
            # The rest of a line that a full disk has cut is left behind as a line of its own. Asked after a failure
            # only: another process may be in the middle of a line.
            size = os.fstat(file.fileno()).st_size
            if self._failed and size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[file.write(line) :]
        self._failed = False

    def complain(self, error: Exception, directory: Path | None = None) -> None:
        """Say once for each directory why it cannot be written."""
        self._failed = True
        if directory in self._warned:
            return
        self._warned.add(directory)
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        why = str(error).rstrip(".") if isinstance(error, ConfigurationError) else why
        with contextlib.suppress(OSError, ValueError):
            print(
                f"alphapulse_encryption: the log files{f' in {directory}' if directory else ''} cannot be written "
                f"({why}); everything else goes on. ALPHAPULSE_LOG_DIR names another directory.",
                file=sys.stderr,
            )


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, _FILE_MODE)


def _remove_old(directory: Path) -> None:
    oldest = _NAME.format(datetime.now(UTC) - timedelta(days=settings.Logs().days))
    for path in directory.glob("migration-????-??-??.jsonl"):
        if path.name < oldest:
            # Another process may remove it, too.
            with contextlib.suppress(OSError):
                path.unlink()


_FILES = Files()


def note(event: str, *, level: str = "info", message: str | None = None, **fields: object) -> None:
    """Write an entry, with the fields that are not None. Never raises.

    Args:
        level: ``info``, ``warning`` or ``error``.
        message: in words, without any value.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if message is not None:
        text = _ADDRESS.sub("(an address)", str(message))
        given["message"] = text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " …"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())  # a container's user may have no name
    who = {"user": user, "host": platform.node(), "pid": os.getpid()}
    _FILES.append(datetime.now(UTC), {"level": level, "event": event, **given, **who})


@contextlib.contextmanager
def command(flags: list[str], tables: list[str]) -> Iterator[dict[str, object]]:
    """Tell of a command from its beginning to its end: its flags, never what was given with them.

    Yields:
        What the end is to tell besides, to be filled in.
    """
    began = time.monotonic()
    told: dict[str, Any] = {}
    note("command_started", flags=flags, tables=tables or None)
    try:
        yield told
    finally:
        seconds = round(time.monotonic() - began, 3)
        level = "info" if told.get("exit_status") == 0 else "error"
        note("command_ended", level=level, flags=flags, seconds=seconds, **told)


class RunLog(logging.Handler):
    """What Dagster tells of a run, into the log files: ``dagster.yaml`` names this class, under ``python_logs``.

    Of events only what is listed above is written, and of their metadata numbers: not what Dagster or a driver may have
    put into their texts. What steps of ours log is written as they log it, for it is made to be shown.
    """

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        # What a run over many partitions says of each as it is done, Dagster says again at its end.
        self._told: set[tuple[object, ...]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; never raises."""
        meta: Mapping[str, Any] | None = getattr(record, "dagster_meta", None)
        if meta is None:
            return
        try:
            event = meta.get("dagster_event")
            if event is None:
                # Loggers of libraries come by here, too, where `managed_python_loggers` names them.
                if record.levelno >= logging.INFO and record.name == "dagster":
                    said = str(meta.get("orig_message", ""))
                    note("message", level=record.levelname.lower(), message=said, **_whose(meta))
            elif (name := _EVENTS.get(event.event_type_value)) is not None:
                level = "error" if name in {"run_failed", "step_failed"} else "info"
                fields: dict[str, Any] = {"level": level, **_whose(meta), **_told(event)}
                if name == "done":
                    subject = (fields.get("run_id"), fields.get("asset"), fields.get("partition"))
                    if subject in self._told:
                        return
                    self._told.add(subject)
                note(name, **fields)
        except Exception as error:
            _FILES.complain(error)


def _whose(meta: Mapping[str, Any]) -> dict[str, object]:
    tags = meta.get("job_tags") or {}
    return {
        "run_id": meta.get("run_id"),
        "job": meta.get("job_name"),
        "step": meta.get("step_key"),
        "table": tags.get("table"),
        "partition": tags.get("dagster/partition"),
    }


def _told(event: Any) -> dict[str, Any]:
    data = event.event_specific_data
    failure = getattr(data, "user_failure_data", None)
    if failure is not None:
        return {"message": failure.description}
    if getattr(data, "error", None) is not None:
        return {"error": data.error.cls_name}
    if event.event_type_value == "ASSET_CHECK_EVALUATION":
        return {"asset": data.asset_key.to_user_string(), "check": data.check_name, "passed": data.passed}
    subject = getattr(data, "materialization", None) or getattr(data, "asset_observation", None)
    if subject is None:
        return {}
    values = {name: getattr(value, "value", None) for name, value in subject.metadata.items()}
    return {
        "asset": subject.asset_key.to_user_string(),
        **({"partition": subject.partition} if subject.partition else {}),
        **{name: values[name] for name in _WORDS if isinstance(values.get(name), str)},
        "figures": {n: v for n, v in values.items() if isinstance(v, int | float)} or None,
    }
