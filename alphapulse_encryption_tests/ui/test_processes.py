"""What ``python -m alphapulse_encryption.ui`` starts, what each of them is given, and what the UI then does."""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psycopg

from alphapulse_encryption_tests.browser.demonstration import ui
from alphapulse_encryption_tests.leaks import Processes, Scanner
from alphapulse_encryption_tests.place import Place

T = TypeVar("T")

PASSWORD = "pass-of-the-target-7f3a"
WEBHOOK = "https://hooks.example/canary-41c9"
LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename
    ... on LaunchRunSuccess { run { runId } } } }"""
JOBS = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } jobs { name } } } } }"
STATUS = "query($r: ID!) { runOrError(runId: $r) { ... on Run { status } } }"
RUNS = "{ runsOrError { ... on Runs { results { runId } } } }"


@dataclass
class Page:
    """What a page of the UI asks."""

    address: str

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        at = urlsplit(self.address)
        connection = http.client.HTTPConnection(at.hostname or "", at.port)
        headers = {
            "Origin": f"{at.scheme}://{at.netloc}",
            "Sec-Fetch-Site": "same-origin",
            "Content-Type": "application/json",
        }
        body = json.dumps({"query": query, "variables": variables})
        connection.request("POST", f"{at.path}/graphql", body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        assert answer.status == 200, text
        found: dict[str, Any] = json.loads(text)["data"]
        return found

    def launch(self, job: str) -> dict[str, Any]:
        """What launching a job of the code location comes to, once that is loaded."""
        (node,) = until(lambda: self.ask(JOBS)["repositoriesOrError"].get("nodes"))
        assert job in {found["name"] for found in node["jobs"]}
        selector = {
            "repositoryLocationName": node["location"]["name"],
            "repositoryName": node["name"],
            "jobName": job,
        }
        launched: dict[str, Any] = self.ask(
            LAUNCH, p={"selector": selector, "runConfigData": "{}", "mode": "default"}
        )["launchRun"]
        return launched

    def end_of(self, run: str) -> str:
        """A run's last status."""

        def ended() -> str | None:
            status = str(self.ask(STATUS, r=run)["runOrError"]["status"])
            return status if status in {"SUCCESS", "FAILURE", "CANCELED"} else None

        return until(ended)


def until(look: Callable[[], T | None]) -> T:
    """What it gives, as soon as it gives something."""
    while not (found := look()):
        time.sleep(0.2)
    return found


@contextmanager
def served(place: Place, **changes: str | None) -> Iterator[Page]:
    with ui(place.state / "ui.log", place.environment(**changes)) as (address, _):
        yield Page(address)


def test_web_server_and_daemon_have_neither_target_nor_keys_and_nobody_has_them_in_his_environment(
    theirs: Place,
) -> None:
    theirs.url = theirs.url.replace("postgres@", f"postgres:{PASSWORD}@")
    assert PASSWORD in theirs.url
    key = Scanner({"master key": base64.urlsafe_b64decode(theirs.master_key)})
    password, webhook = Scanner({"password": PASSWORD}), Scanner({"webhook": WEBHOOK})
    with Processes() as processes, served(theirs, ALPHAPULSE_ALERT_WEBHOOK_URL=WEBHOOK) as page:
        # Both need the key: one compares it, the other one encrypts with what is derived from it.
        for job in ("run_preflight", "take_backup"):
            launched = page.launch(job)
            assert launched["__typename"] == "LaunchRunSuccess", launched
            assert page.end_of(launched["run"]["runId"]) == "SUCCESS"
    with psycopg.connect(theirs.url) as connection:
        assert connection.execute("SELECT count(*) FROM alphapulse_encryption.backups").fetchone() != (0,)

    started: dict[str, int] = {}
    for seen in processes.seen:
        words, given = " ".join(seen.command), seen.environment or b""
        # The one that a person starts: they gave it the key.
        if "-m alphapulse_encryption.ui --port" in words or not given:
            continue
        kinds = {
            "web server": "alphapulse_encryption.ui.server" in words,
            "daemon": "dagster-daemon" in words,
            "code server": "code-server" in words or "api grpc" in words,
            "run": "multiprocessing.spawn" in words,
            "pg_dump": seen.program == "pg_dump",
        }
        kind = next((name for name, is_it in kinds.items() if is_it), "other")
        started[kind] = started.get(kind, 0) + 1
        assert key.data(given, kind) == [], words
        assert key.data(words.encode(), kind) == [], words
        if kind in {"web server", "daemon"}:
            assert password.data(given, kind) == [] and webhook.data(given, kind) == [], words
            assert b"ALPHAPULSE_DATABASE_URL=" not in given
            assert b"ALPHAPULSE_ENCRYPTION_KEYS_KEPT_AT=" not in given
            assert b"DAGSTER_POSTGRES_URL=" in given
    assert {"web server", "daemon", "code server", "run", "pg_dump"} <= started.keys(), started
    # No file ever had it.
    assert key.files(theirs.state) == []
