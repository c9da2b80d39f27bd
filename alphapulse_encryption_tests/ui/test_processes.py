"""What ``python -m alphapulse_encryption.ui`` starts, what each of them is given, and what the UI then does."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psutil
import psycopg

from alphapulse_encryption.defs.resources.instance import packaged_file
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
        """The data of an answer."""
        found: dict[str, Any] = json.loads(self.post(query, 200, **variables))["data"]
        return found

    def post(self, query: str, wanted: int | None = None, **variables: Any) -> str:
        """An answer, of that status where one is wanted."""
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
        assert wanted in (None, answer.status), text
        return text

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


CHANGES = (
    'mutation { setConcurrencyLimit(concurrencyKey: "target_database", limit: 9) }',
    "mutation { setAutoMaterializePaused(paused: true) }",
    "mutation { reloadWorkspace { __typename } }",
    """mutation { wipeAssets(assetPartitionRanges: [{assetKey: {path: ["preflight"]}}]) { __typename } }""",
    """mutation { reportRunlessAssetEvents(eventParams: {eventType: ASSET_MATERIALIZATION,
        assetKey: {path: ["plaintext_dropped"]}}) { __typename } }""",
    'mutation { startSensor(sensorSelector: {repositoryName: "__repository__", sensorName: "pending_rows",'
    ' repositoryLocationName: "alphapulse_encryption"}) { __typename } }',
)


def shows_and_changes_nothing(page: Page, place: Place) -> None:
    """All can be read; of whatever a page could change, nothing does."""
    assert page.launch("run_preflight")["__typename"] == "UnauthorizedError"
    for mutation in CHANGES:
        answer = page.post(mutation)
        assert "Unauthorized" in answer or "permission" in answer.lower(), (mutation, answer)
    assert page.ask(RUNS)["runsOrError"]["results"] == []
    with psycopg.connect(place.dagster_url) as connection:
        for table in ("runs", "asset_keys", "instigators", "concurrency_limits", "event_logs"):
            assert connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() == (0,), table


@contextmanager
def served(place: Place, **changes: str | None) -> Iterator[Page]:
    with ui(place.state / "ui.log", place.environment(**changes)) as (address, _):
        yield Page(address)


def test_web_server_and_daemon_have_neither_target_nor_keys_and_nobody_has_them_in_his_environment(
    theirs: Place,
) -> None:
    theirs.url = theirs.url.replace("postgres@", f"postgres:{PASSWORD}@")
    assert PASSWORD in theirs.url
    # No other test's process has it.
    theirs.master_key = base64.urlsafe_b64encode(os.urandom(32)).decode()
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
        # Other tests' processes run at the same time.
        if b"ALPHAPULSE_STATE_DIR=" in given and str(theirs.state).encode() not in given:
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


def test_a_ui_for_who_only_looks(theirs: Place) -> None:
    scanner = Scanner({"master key": base64.urlsafe_b64decode(theirs.master_key)})
    environment = theirs.environment(ALPHAPULSE_UI_READ_ONLY="true")
    with ui(theirs.state / "ui.log", environment) as (address, pid):
        shows_and_changes_nothing(Page(address), theirs)
        services = psutil.Process(pid).children()
        for service in services:
            given = Path(f"/proc/{service.pid}/environ").read_bytes()
            assert b"KEYS_KEPT_AT" not in given and scanner.data(given, "service") == []
    commands = [" ".join(service.cmdline()) for service in services if service.is_running()]
    assert commands == [] and len(services) == 2, "web server and code server, no daemon"


def test_as_the_chart_starts_it(theirs: Place) -> None:
    """Under a prefix, for who only looks, with a code location of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "alphapulse_encryption.ui.server", "-h", "0.0.0.0", "-p", str(port), "--read-only"]
    command += [
        "-w",
        str(packaged_file("workspace.yaml")),
        "--path-prefix",
        "/dagster",
        "--log-level",
        "info",
    ]
    log = theirs.state / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, *command],
            env=theirs.environment(ALPHAPULSE_UI_URL="https://ui.example.com/dagster"),
            stdout=output,
            stderr=output,
        )
    try:
        until(lambda: "Uvicorn running" in log.read_text() or server.poll() is not None)
        shows_and_changes_nothing(Page(f"http://localhost:{port}/dagster"), theirs)
        asked = []
        for host, path in (("ui.example.com", "/dagster/runs"), ("10.0.0.7", "/dagster/server_info")):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            asked.append((answer.status, "uvicorn" in str(answer.headers)))
            connection.close()
        assert asked == [(200, False), (421, False)]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0, log.read_text()
