"""Every command, on a database full of canaries, through all kinds of failures: no value, key or password gets out.

The server logs whatever it can, and so does Dagster.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests
from werkzeug.wrappers import Response

from alphapulse_encryption_tests import canaries
from alphapulse_encryption_tests.browser.demonstration import ui
from alphapulse_encryption_tests.canaries import Canaries, Watch, silent
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.defs.alerts.servers import mail_server, webhook
from alphapulse_encryption_tests.defs.alerts.test_daemon import start
from alphapulse_encryption_tests.keysources.servers import serving
from alphapulse_encryption_tests.leaks import Find, Scanner
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place

TARGET = "target"
# What stands in the way of a write, and says why with the value; and what clears it away.
OBSTACLES = {
    "users": (
        """CREATE FUNCTION refuse_user() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE WARNING 'warned: %', NEW.email;
            IF NEW.id = 3 THEN RAISE EXCEPTION 'refused: %', NEW.email
                USING ERRCODE = '23514', DETAIL = NEW.last_name, HINT = NEW.first_name; END IF;
            RETURN NEW; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW
            WHEN (NEW.email_encrypted IS NOT NULL) EXECUTE FUNCTION refuse_user();
        ALTER TABLE users ENABLE ALWAYS TRIGGER refuse""",
        "DROP FUNCTION refuse_user CASCADE",
    ),
    "trades": (
        "ALTER TABLE trades ADD CONSTRAINT refuse CHECK (id % 7 <> 0 OR order_id_encrypted IS NULL)",
        "ALTER TABLE trades DROP CONSTRAINT refuse",
    ),
    "positions": (
        "CREATE UNIQUE INDEX refuse ON positions ((metadata->>'k')) "
        "WHERE metadata_encrypted IS NOT NULL AND id <= 3",
        "DROP INDEX refuse",
    ),
    "api_keys": (
        """CREATE FUNCTION refuse_key() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.permissions_encrypted IS NOT NULL AND left(NEW.id::text, 1) < '4' THEN
                PERFORM (NEW.permissions->>'k')::int; END IF;
            RETURN NEW; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION refuse_key();
        ALTER TABLE api_keys ENABLE ALWAYS TRIGGER refuse""",
        "DROP FUNCTION refuse_key CASCADE",
    ),
    "trading_accounts": (
        "CREATE DOMAIN short AS text CHECK (length(value) < 5);"
        """CREATE FUNCTION refuse_account() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE name short; BEGIN
            IF NEW.account_number_encrypted IS NOT NULL AND NEW.id = 2 THEN name := NEW.account_number; END IF;
            RETURN NEW; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON trading_accounts FOR EACH ROW EXECUTE FUNCTION refuse_account();
        ALTER TABLE trading_accounts ENABLE ALWAYS TRIGGER refuse""",
        "DROP FUNCTION refuse_account CASCADE; DROP DOMAIN short",
    ),
}


# Our own; what Dagster copies compute logs with, where they are kept, which our `dagster.yaml` does not; and what its
# croniter asks for the kind of the interpreter.
_WITH_OUR_ENVIRONMENT = {"python", "python3", Path(sys.executable).name, "tail", "file"}


@dataclass
class Stage:
    """Where it happens.

    Args:
        place: where commands run.
        url: of the target, for a superuser.
        canaries: what must not get out.
        said: what commands printed.
    """

    place: Place
    url: str
    canaries: Canaries
    scanner: Scanner
    said: list[str] = field(default_factory=list)
    watch: Watch | None = None

    def watch_saw(self, what: Path | tuple[int, str] | str) -> bool:
        """Whether a file, a process or a statement was looked at."""
        assert self.watch is not None
        match what:
            case Path():
                return what in self.watch.files
            case (pid, last):
                # By its last argument, too: for a moment it has its parent's command line and environment.
                seen = self.watch.processes.seen.copy()
                return any(one.pid == pid and one.command[-1:] == (last,) for one in seen)
            case str():
                return any(what in query for _, query in self.watch.sessions.copy())

    def run(self, status: int, *arguments: str, **changes: str | None) -> str:
        """A command that ends like this; what it says."""
        return self.ended(self.place.run(*arguments, **changes), status)

    def ended(self, done: subprocess.CompletedProcess[str], status: int | None = None) -> str:
        said = done.stdout + done.stderr
        self.said.append(said)
        assert status is None or done.returncode == status, self.safe(said)
        return said

    def safe(self, said: str) -> str:
        """For what a failing test shows, which is kept, too."""
        for name, text in self.canaries.secrets.items():
            if isinstance(text, str):
                said = said.replace(text, f"<{name}>")
        return said

    def silently(self, statement: str, *parameters: object) -> None:
        """A statement of which the server logs nothing."""
        with silent(self.url) as connection, connection.transaction():
            connection.execute("SELECT set_config('alphapulse_encryption.writer', 'engine', true)")
            connection.execute(statement.encode(), parameters or None)

    def everywhere(self, watch: Watch) -> list[Find]:
        """All that is found, in every place where there is something to look at."""
        server, scanner = self.place.postgres, self.scanner
        found = scanner.text("\n".join(self.said), "terminal")
        found += watch.found()
        found += watch.processes.that_were_given(
            self.without_password, {seen.program for seen in watch.processes.seen} - _WITH_OUR_ENVIRONMENT
        )
        found += scanner.database(self.place.dagster_url)
        found += canaries.in_files_of(server, self.dagster_database, scanner)
        found += canaries.in_the_target(self.url, scanner)
        found += canaries.in_statistics(self.url, scanner)
        found += canaries.in_the_log(server, scanner)
        return found

    @property
    def dagster_database(self) -> str:
        with psycopg.connect(self.place.dagster_url) as connection:
            return connection.info.dbname

    @property
    def without_password(self) -> Scanner:
        # libpq's programs are given it, in an environment that nobody else can read.
        return Scanner({name: text for name, text in self.canaries.secrets.items() if name != "password"})


@contextmanager
def stage(directory: Path) -> Iterator[tuple[Stage, Watch]]:
    private = directory.parent / "private"
    folders = {name: private / name for name in ("state", "home", "tmp", "dagster")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    with canaries.talkative_server(directory, UNSAFE_SETTINGS) as server:
        url, hatched = canaries.make_target(server, TARGET)
        (folders["dagster"] / "dagster.yaml").write_text(canaries.DAGSTER_YAML)
        with place(server, canaries.address(url, hatched), folders["state"], hatched.key()) as found:
            found.extra = {
                "HOME": str(folders["home"]),
                "TMPDIR": str(folders["tmp"]),
                "DAGSTER_HOME": str(folders["dagster"]),
                # Extensions are a superuser's to make.
                "ALPHAPULSE_RESTORE_DRILL_URL": server.url("postgres"),
            }
            scanner = Scanner(hatched.secrets)
            yield Stage(found, url, hatched, scanner), Watch(url, scanner, [private], directory)


def up_to_a_verified_table(at: Stage) -> None:
    """Steps 1 to 4, each row refused that something stands in the way of."""
    assert "our sessions leave no values in the server's log" in at.run(0, "--preflight", "--add-columns")
    for obstacle, _ in OBSTACLES.values():
        at.silently(obstacle)
    said = at.run(1, "--migrate-data")
    for table in OBSTACLES:
        assert f"{table}" in said
    for _, remedy in OBSTACLES.values():
        at.silently(remedy)
    at.run(0, "--migrate-data", "--verify")
    # Somebody wrote plaintext where the ciphertext goes; another value beside its ciphertext.
    at.silently("UPDATE users SET email_encrypted = email WHERE id = 7")
    at.silently("UPDATE users SET email_encrypted = '{' || email WHERE id = 8")
    at.silently("UPDATE users SET address_data_encrypted = address_data::text WHERE id = 9")
    assert "✗ users.email" in at.run(1, "--verify", "--table", "users")
    at.run(0, "--repair-mismatched", "--migrate-data", "--verify", "--table", "users")


def keys_that_are_not_right(at: Stage) -> None:
    """Wrong and malformed keys, and sources that answer with the key in an error page."""
    wrong = base64.b64encode(secrets.token_bytes(32)).decode()
    at.run(1, "--verify", ALPHAPULSE_ENCRYPTION_MASTER_KEY=wrong)
    at.run(2, "--check-key", ALPHAPULSE_ENCRYPTION_MASTER_KEY=f"{at.canaries.key()}?")
    key = at.canaries.key()
    with serving(
        Response(f"<h1>{key}</h1>", status=500, headers={"x-amzn-ErrorType": key}, content_type="text/html")
    ) as front:
        common = {"ALPHAPULSE_ENCRYPTION_MASTER_KEY": None, "NO_PROXY": "127.0.0.1"}
        at.run(
            2,
            "--check-key",
            **common,
            ALPHAPULSE_ENCRYPTION_KEY_SOURCE="aws",
            AWS_ENDPOINT_URL=front.url,
            AWS_REGION="eu-central-1",
            AWS_ACCESS_KEY_ID="AKIAEXAMPLE",
            AWS_SECRET_ACCESS_KEY=at.canaries.password,
            AWS_SESSION_TOKEN=at.canaries.password,
            AWS_MAX_ATTEMPTS="1",
        )
        at.run(
            2,
            "--check-key",
            **common,
            ALPHAPULSE_ENCRYPTION_KEY_SOURCE="vault",
            VAULT_ADDR=front.url,
            VAULT_TOKEN=at.canaries.password,
        )
    nowhere = at.place.url.replace(canaries.ROLE, "nobody", 1)
    at.run(2, "--verify", ALPHAPULSE_DATABASE_URL=nowhere)
    at.run(2, "--verify", ALPHAPULSE_DATABASE_URL=f"{at.place.url}&nonsense={at.canaries.password}")
    at.run(2, "--verify", ALPHAPULSE_DATABASE_URL=f"mysql://{at.canaries.password}")
    at.run(2, "--verify", DAGSTER_POSTGRES_URL=f"{at.place.dagster_url}&nonsense={at.canaries.password}")


def there_and_back(at: Stage) -> None:
    """Validation, views, backup, switch, drop, erasure, and back again, with values that do not fit."""
    at.run(
        0,
        *("--live-check", "--benchmark-queries", "--create-views", "--backup", "--restore-drill"),
        *("--switch-to-encrypted", "--verify"),
    )
    at.run(0, "--set", "two_person_rule=names")
    table = ("--table", "users")
    at.run(
        0,
        *("--approve-drop", "--approver", "Ada", "--reason", "it serves", "--confirmation", "users", *table),
    )
    at.run(0, "--drop-unencrypted", "--confirm", "--operator", "Grace", *table)
    at.run(0, "--erase-dropped", "--confirmation", "users", *table)
    key = independent.derive(at.canaries.keys[1], "user_address", 1)
    no_json = at.canaries.values["users.address_data"]
    sealed = independent.seal(key, secrets.token_bytes(12), no_json, "user_address", 1)
    at.silently("UPDATE users SET address_data_encrypted = %s WHERE id = 11", sealed)
    assert "key (11)" in at.run(1, "--restore-plaintext", *table)
    at.silently(
        "UPDATE users SET address_data_encrypted = (SELECT address_data_encrypted FROM users WHERE id = 12) "
        "WHERE id = 11"
    )
    at.run(0, "--restore-plaintext", *table)
    at.run(0, "--live-check", "--table", "users")
    at.run(0, "--revert-to-plaintext")


def interrupted(at: Stage, arguments: tuple[str, ...], interrupt: Callable[[Stage], None]) -> None:
    """A command that is interrupted as soon as it writes."""
    running = at.place.start(*arguments, ALPHAPULSE_ENCRYPTION_KEY_VERSION="2", **keys(at))

    def writes() -> bool:
        with silent(at.url) as connection:
            cursor = connection.execute(
                "SELECT FROM pg_stat_activity WHERE usename = %s AND query ILIKE 'UPDATE%%unnest%%'",
                [canaries.ROLE],
            )
            return cursor.rowcount > 0 or not running.running

    support.until(writes, "it writes")
    if interrupt is kill:
        running.kill()
    else:
        interrupt(at)
    at.ended(running.ended())


def keys(at: Stage) -> dict[str, str | None]:
    return {"ALPHAPULSE_ENCRYPTION_MASTER_KEY_V2": at.canaries.key(2)}


def kill(_: Stage) -> None:
    """kill -9."""


def end_sessions(at: Stage) -> None:
    with silent(at.url) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [canaries.ROLE]
        )


def rotation(at: Stage) -> None:
    """A rotation whose sessions are ended, that is killed, and that then ends."""
    at.run(0, "--add-columns", "--migrate-data", "--verify")
    for interrupt in (end_sessions, kill):
        interrupted(at, ("--rotate-keys",), interrupt)
    at.run(0, "--rotate-keys", ALPHAPULSE_ENCRYPTION_KEY_VERSION="2", **keys(at))


def alerts(at: Stage) -> None:
    with webhook() as (posted, front):
        at.run(
            0,
            "--test-alerts",
            ALPHAPULSE_ALERT_WEBHOOK_URL=f"{front.url}/{at.canaries.password}",
            NO_PROXY="127.0.0.1",
        )
        assert posted.texts
        at.said += posted.texts


def look_around(at: Stage) -> None:
    """What is asked for while all this goes on."""
    for arguments in (
        ("--plan",),
        ("--plan", "--json"),
        ("--status",),
        ("--status", "--json"),
        ("--preflight", "--json"),
        ("--approvals",),
        ("--key-usage",),
        ("--key-versions",),
        ("--settings",),
        ("--slow-queries", "--limit", "100"),
        ("--roles-sql",),
        ("--analyze", "--rebuild-indexes", "--table", "users"),
        ("--nonsense", "--table"),
    ):
        at.ended(at.place.run(*arguments, ALPHAPULSE_ENCRYPTION_KEY_VERSION="2", **keys(at)))


def nothing_is_found(at: Stage, watch: Watch) -> None:
    """Anywhere, when the watch has ended."""
    found = at.everywhere(watch)
    what = sorted({f"{find.secret} ({find.form}) in {find.place}" for find in found})
    assert not what, "\n".join(what)


def test_there_and_back(server_dir: Path) -> None:
    with stage(server_dir) as (at, watch):
        with watch:
            up_to_a_verified_table(at)
            there_and_back(at)
            alerts(at)
        nothing_is_found(at, watch)
        # There was something to look at, and it was looked at with open eyes.
        assert {find.secret for find in at.scanner.database(at.url)} >= set(canaries.columns())
        assert b"UPDATE" in at.place.postgres.log_file.read_bytes()
        assert {"pg_dump", "pg_restore"} <= {seen.program for seen in watch.processes.seen}
        assert any(path.suffix == ".err" for path in watch.files), "compute logs"
        assert any(".dump.age" in path.name for path in watch.files)
        assert any("unnest" in query for _, query in watch.sessions)
        with psycopg.connect(at.place.dagster_url) as connection:
            logged = connection.execute("SELECT count(*) FROM event_logs WHERE dagster_event_type IS NULL")
            assert logged.fetchall()[0][0] > 10


def _in_a_file(at: Stage, secret: str) -> None:
    path = Path(at.place.environment()["TMPDIR"], "for a moment")
    path.write_text(f"value: {secret}")
    support.until(lambda: at.watch_saw(path), "the file is seen")
    path.unlink()


def _in_a_process(at: Stage, secret: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()", secret], stdin=subprocess.PIPE) as process:
        support.until(lambda: at.watch_saw((process.pid, secret)), "the process is seen")
        process.communicate(b"\n")


def _in_a_child_s_environment(at: Stage, secret: str) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={"SECRET": secret}) as process:
        support.until(lambda: at.watch_saw((process.pid, "cat")), "the process is seen")
        process.communicate()


def _in_a_session(at: Stage, secret: str) -> None:
    with psycopg.connect(at.place.url, application_name="alphapulse_encryption") as connection:
        connection.execute(f"SELECT '{secret}' /* looked at */".encode())
        support.until(lambda: at.watch_saw("/* looked at */"), "the session is seen")


def _in_the_server_s_log(at: Stage, secret: str) -> None:
    with psycopg.connect(at.place.url) as connection:
        connection.execute("SELECT %s::text", [secret])


def _in_a_table(at: Stage, secret: str) -> None:
    at.silently("CREATE TABLE IF NOT EXISTS leaked (it text)")
    at.silently("INSERT INTO leaked VALUES (%s)", f"behind {secret}")


def _in_dagster_s_storage(at: Stage, secret: str) -> None:
    with silent(at.place.dagster_url) as connection:
        connection.execute("INSERT INTO kvs (key, value) VALUES ('leaked', %s)", [secret])


def _in_dagster_s_files(at: Stage, secret: str) -> None:
    with silent(at.place.dagster_url) as connection:
        connection.execute("INSERT INTO kvs (key, value) VALUES ('removed', %s)", [secret])
        connection.execute("DELETE FROM kvs WHERE key = 'removed'")


def _at_the_terminal(at: Stage, secret: str) -> None:
    at.said.append(f"said {secret}.")


def test_each_place_is_looked_at(server_dir: Path) -> None:
    """What is put there on purpose is found, and there alone."""
    places: dict[str, Callable[[Stage, str], None]] = {
        "file ": _in_a_file,
        "command line of ": _in_a_process,
        "environment of cat": _in_a_child_s_environment,
        "pg_stat_activity": _in_a_session,
        "the server's log": _in_the_server_s_log,
        "column public.leaked.it": _in_a_table,
        "column public.kvs.value": _in_dagster_s_storage,
        "base/": _in_dagster_s_files,
        "terminal": _at_the_terminal,
    }
    with stage(server_dir) as (at, watch):
        chosen = dict(zip(places, at.canaries.values.items(), strict=False))
        with watch:
            at.watch = watch
            for name, leak in places.items():
                leak(at, chosen[name][1])
        found = at.everywhere(watch)
        for name, (column, _) in chosen.items():
            assert any(name in find.place for find in found if find.secret == column), (name, column)
        assert {find.secret.removesuffix(" in capitals") for find in found} == {
            column for column, _ in chosen.values()
        }


@pytest.mark.long
def test_keys_and_reports(server_dir: Path) -> None:
    with stage(server_dir) as (at, watch):
        with watch:
            at.run(0, "--add-columns", "--migrate-data")
            keys_that_are_not_right(at)
            rotation(at)
            look_around(at)
        nothing_is_found(at, watch)


@pytest.mark.long
def test_every_step_interrupted(server_dir: Path) -> None:
    """Each command, its sessions ended and itself killed as soon as it is at work, and then run to its end."""
    table = ("--table", "users")
    approval = ("--approver", "Ada", "--reason", "it serves", "--confirmation", "users")
    steps: tuple[tuple[str, ...], ...] = (
        ("--preflight",),
        ("--add-columns",),
        ("--replan",),
        ("--migrate-data", "--workers", "2", "--autovacuum-off", "--reindex"),
        ("--verify", "--workers", "2"),
        ("--live-check",),
        ("--benchmark-queries",),
        ("--create-views",),
        ("--backup", "--restore-drill"),
        ("--switch-to-encrypted",),
        ("--verify",),
        ("--set", "two_person_rule=names"),
        ("--approve-drop", *approval, *table),
        ("--drop-unencrypted", "--confirm", "--operator", "Grace", *table),
        ("--erase-dropped", "--confirmation", "users", *table),
        ("--restore-plaintext", *table),
        ("--revert-to-plaintext",),
    )
    with stage(server_dir) as (at, watch):
        with watch:
            for step in steps:
                for interrupt in (end_sessions, kill):
                    running = at.place.start(*step)
                    support.until(lambda: at_work(at) or not running.running, "it is at work")  # noqa: B023
                    running.kill() if interrupt is kill else interrupt(at)
                    at.ended(running.ended())
                said = at.ended(at.place.run(*step))
                # An approval may have been given before the interruption.
                assert "✗" not in said or step[0] in {"--approve-drop", "--drop-unencrypted"}, at.safe(said)
        nothing_is_found(at, watch)


def at_work(at: Stage) -> bool:
    with silent(at.url) as connection:
        cursor = connection.execute(
            "SELECT FROM pg_stat_activity WHERE usename = %s AND query NOT LIKE '%%set_config%%' AND query <> ''",
            [canaries.ROLE],
        )
        return cursor.rowcount > 0


@pytest.mark.long
def test_rehearsals(server_dir: Path) -> None:
    """One that goes all the way, with traffic, and one that fails."""
    with stage(server_dir) as (at, watch):
        staging = {
            "ALPHAPULSE_STAGING_DATABASE_URL": at.place.url,
            "ALPHAPULSE_DATABASE_URL": None,
            # Extensions are a superuser's to make.
            "ALPHAPULSE_REHEARSAL_SERVER_URL": at.place.postgres.url("postgres"),
        }
        with watch:
            said = at.ended(at.place.run("--rehearse", "--rate", "5", "--workers", "2", **staging))
            assert "all the way there and back" in said, at.safe(said)
            at.silently("CREATE VIEW addresses AS SELECT email FROM users")
            said = at.ended(at.place.run("--rehearse", "--rate", "0", "--table", "users", **staging))
            assert "The rehearsal failed" in said, at.safe(said)
        assert any(path.name == "index.html" for path in watch.files)
        nothing_is_found(at, watch)


_RUN = """mutation($selector: JobOrPipelineSelector!, $config: RunConfigData, $tags: [ExecutionTag!]) {
  launchRun(executionParams: {selector: $selector, runConfigData: $config, mode: "default",
    executionMetadata: {tags: $tags}}) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message stack }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}"""
_LOGS = """query($run: ID!) {
  runOrError(runId: $run) { ... on Run { status runConfigYaml tags { key value } } }
  logsForRun(runId: $run, limit: 1000) { ... on EventConnection { events {
    __typename
    ... on MessageEvent { message stepKey }
    ... on ExecutionStepFailureEvent { error { message stack errorChain { error { message stack } } }
      failureMetadata { metadataEntries { ...metadata } } }
    ... on MaterializationEvent { metadataEntries { ...metadata } }
    ... on ObservationEvent { metadataEntries { ...metadata } }
    ... on ExecutionStepOutputEvent { metadataEntries { ...metadata } }
  } } }
}
fragment metadata on MetadataEntry {
  label description
  ... on TextMetadataEntry { text } ... on MarkdownMetadataEntry { mdStr } ... on JsonMetadataEntry { jsonString }
  ... on PathMetadataEntry { path } ... on TableMetadataEntry { table { records } }
}"""


@dataclass
class Page:
    """The UI, asked as its pages ask."""

    address: str
    said: list[str]

    def ask(self, query: str, **variables: object) -> dict[str, Any]:
        answer = requests.post(
            f"{self.address}/graphql", json={"query": query, "variables": variables}, timeout=60
        )
        self.said.append(answer.text)
        data: dict[str, Any] = answer.json()["data"]
        return data

    def run(self, job: str, config: Mapping[str, object], **tags: str) -> str:
        """A run to its end; its status."""
        selector = {
            "repositoryLocationName": "alphapulse_encryption",
            "repositoryName": "__repository__",
            "pipelineName": job,
        }
        launched = self.ask(
            _RUN,
            selector=selector,
            config=json.dumps(config),
            tags=[{"key": key.replace("__", "/"), "value": value} for key, value in tags.items()],
        )["launchRun"]
        if launched["__typename"] != "LaunchRunSuccess":
            return str(launched["__typename"])
        run = launched["run"]["runId"]
        ended = {"SUCCESS", "FAILURE", "CANCELED"}
        support.until(lambda: self.ask(_LOGS, run=run)["runOrError"]["status"] in ended, f"{job} ends")
        return str(self.ask(_LOGS, run=run)["runOrError"]["status"])


@pytest.mark.long
def test_the_ui_and_the_daemon(server_dir: Path) -> None:
    """Runs in processes of their own, sensors at work, and what the UI's pages are told."""
    with stage(server_dir) as (at, watch), webhook() as (posted, front), mail_server() as box:
        at.place.extra |= {
            "ALPHAPULSE_ALERT_WEBHOOK_URL": f"{front.url}/{at.canaries.password}",
            "ALPHAPULSE_SMTP_URL": f"smtp://127.0.0.1:{box.port}",
            "ALPHAPULSE_ALERT_EMAIL_TO": "ada@example.com",
            "ALPHAPULSE_ALERT_EMAIL_FROM": "alerts@example.com",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        log = at.place.state.parent / "ui.log"
        with watch, at.place.instance() as instance:
            for name in ("alert_failed_runs", "alert_drift", "pending_rows", "alert_keys"):
                start(instance, name)
            with ui(log, at.place.environment()) as (address, _):
                _in_the_ui(at, Page(address, at.said))
                support.until(
                    lambda: any("failed" in text or "run " in text for text in posted.texts),
                    "failures are told of",
                )
                for path in ("/runs", "/assets", "/locations", "/automation"):
                    at.said.append(requests.get(address + path, timeout=60).text)
        at.said += posted.texts
        at.said += [mail.as_string() for mail in box.mails]
        assert box.mails
        nothing_is_found(at, watch)


def _in_the_ui(at: Stage, page: Page) -> None:
    every = {"dagster__asset_partition_range_start": "trading_accounts"}
    every |= {"dagster__asset_partition_range_end": "api_keys"}
    assert page.run("run_preflight", {}) == "SUCCESS"
    assert page.run("add_columns", {}, **every) == "SUCCESS"
    for obstacle, _ in OBSTACLES.values():
        at.silently(obstacle)
    ranges = {
        "dagster__asset_partition_range_start": "00|trading_accounts",
        "dagster__asset_partition_range_end": "01|api_keys",
    }
    assert page.run("migrate_data", {}, **ranges) == "FAILURE"
    for _, remedy in OBSTACLES.values():
        at.silently(remedy)
    assert page.run("migrate_data", {}, **ranges) == "SUCCESS"
    assert page.run("build_indexes", {}, **every) == "SUCCESS"
    at.silently("UPDATE users SET email_encrypted = email WHERE id = 7")
    page.run("verify_data", {}, **ranges)
    assert page.run("verify_tables", {}, **every) == "FAILURE"
    users = {"config": {"tables": ["users"]}}
    assert page.run("switch_to_ciphertext", {"ops": {"switch": users}}) == "FAILURE"
    assert page.run("drop_unencrypted", {"ops": {"drop": users}}) == "FAILURE"
    assert page.run("repair_mismatched", {"ops": {"repair": users}}) == "SUCCESS"
    # A guard is gone, and somebody writes: drift.
    at.silently("ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update")
    assert page.run("migrate_data", {}, **ranges) in {"SUCCESS", "FAILURE"}
    page.run("live_check", {"ops": {"check": {"config": {"tables": []}}}})
    page.run("take_backup", {})
    page.run("restore_plaintext", {"ops": {"restore": users}})
    page.run("revert_to_plaintext", {"ops": {"revert": {"config": {"tables": ["trades", "nobody"]}}}})
    page.run("switch_to_ciphertext", {"ops": {"switch": {"config": {"tables": 7}}}})
