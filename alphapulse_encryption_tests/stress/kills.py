"""kill -9 of a worker, of a command and of the server, at moments a seeded generator chooses."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import dagster as dg
import psutil

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run, value
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.stress import worker
from alphapulse_encryption_tests.stress.worker import BATCH, RANGES, ROWS

# What a kill comes after: the worker tells that it begins a step, or has written so many batches; and a while later,
# in which it writes a batch or two, or is in the middle of an index.
STEPS = ("backfill", "indexes", "columns", "backfill", "verify", "backfill")
BATCHES = 40
LONGEST_DELAY = 0.05
FINISHED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}


@dataclass
class Witness:
    """Looks at one table from outside, after each kill and at the end.

    Args:
        url: the database.
        name: of the table.
        before: kills that other tables had.
        kills: of this one, so far.
    """

    url: str
    name: str
    before: int = 0
    kills: int = 0
    done: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plaintext = self._plaintext()
        self.options = self._options()

    @property
    def killed(self) -> int:
        """Kills in all."""
        return self.before + self.kills

    def _plaintext(self) -> str:
        return str(
            value(
                self.url,
                f"SELECT md5(string_agg(concat_ws(',', id, mail, secret), ';' ORDER BY id)) FROM {self.name}",
            )
        )

    def _options(self) -> object:
        return value(self.url, f"SELECT reloptions FROM pg_class WHERE oid = '{self.name}'::regclass")

    def after_a_kill(self) -> None:
        """Nothing is half done, nothing was done twice, nothing is left behind."""
        self.kills += 1
        self._all_quiet()
        self._nothing_twice()
        if value(self.url, "SELECT to_regclass('public.encryption_ranges') IS NULL"):
            return
        # Progress was committed with the data it speaks of.
        assert self.written() == self._counted()

    def at_the_end(self) -> None:
        """Everything is there once, and verified."""
        self._all_quiet()
        self._nothing_twice()
        entry = worker.table(self.name)
        assert support.assert_encrypted(self.url, entry) == ROWS + ROWS * 9 // 10
        assert self._plaintext() == self.plaintext
        # Autovacuum was off while the backfill ran, also when it was killed.
        assert self._options() == self.options
        assert self.written() == ROWS
        assert ROWS <= self._counted() <= ROWS + self.kills * RANGES * BATCH
        found = support.verification(self.url, entry)
        assert found.passed, found.reasons
        assert found.rows == ROWS
        assert run(
            self.url,
            "SELECT count(*), count(completed_at) FROM encryption_ranges WHERE table_name = %s "
            "AND status = 'completed'",
            self.name,
        ) == [(RANGES, RANGES)]
        assert run(
            self.url,
            "SELECT DISTINCT status, error_message FROM encryption_migrations WHERE table_name = %s",
            self.name,
        ) == [("completed", None)]
        assert run(
            self.url,
            "SELECT c.relname, x.indisunique, x.indisvalid AND x.indisready FROM pg_index x "
            "JOIN pg_class c ON c.oid = x.indexrelid WHERE x.indrelid = %s::regclass ORDER BY 1",
            self.name,
        ) == sorted(
            [
                (f"idx_{self.name}_mail", True, True),
                (f"{self.name}_encryption_pending", False, True),
                (f"{self.name}_mail_key", True, True),
                (f"{self.name}_pkey", True, True),
            ]
        )

    def written(self) -> int:
        columns = (
            "SELECT count(*) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'mail_encrypted'"
        )
        if not value(self.url, columns, self.name):
            return 0
        return int(value(self.url, f"SELECT count(*) FROM {self.name} WHERE mail_encrypted IS NOT NULL"))

    def _counted(self) -> int:
        total = "SELECT coalesce(sum(rows_processed), 0) FROM encryption_ranges WHERE table_name = %s"
        return int(value(self.url, total, self.name))

    def _all_quiet(self) -> None:
        sessions = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'alphapulse_encryption'"
        )
        support.until(lambda: value(self.url, sessions) == 0, "the sessions of what was killed have ended")
        here = "(SELECT oid FROM pg_database WHERE datname = current_database())"
        advisory = f"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = {here}"
        assert value(self.url, advisory) == 0
        assert value(self.url, "SELECT count(*) FROM pg_prepared_xacts") == 0

    def _nothing_twice(self) -> None:
        """A row that was done before has not been written again."""
        if not self.written():
            return
        versions: dict[int, tuple[str, str]] = {
            key: (ctid, xmin)
            for key, ctid, xmin in run(
                self.url,
                f"SELECT id, ctid::text, xmin::text FROM {self.name} WHERE mail_encrypted IS NOT NULL",
            )
        }
        assert {key for key, version in self.done.items() if versions.get(key) != version} == set()
        self.done = versions


@dataclass
class Moments:
    """Where to kill, as a seed has it.

    Args:
        seed: of the generator; printed, with every moment.
    """

    seed: int

    def __post_init__(self) -> None:
        print(f"seed {self.seed}")
        self.chance = random.Random(self.seed)
        self._steps = itertools.cycle(self.chance.sample(STEPS, len(STEPS)))

    def wait(self, process: subprocess.Popen[str]) -> bool:
        """Wait until one has come; False where the process ended before."""
        step, batches = next(self._steps), 0
        if step == "backfill":
            batches = self.chance.randint(0, BATCHES)
        assert process.stdout is not None
        while (line := process.stdout.readline().strip()) != step:
            if not line:
                return False
        for _ in range(batches):
            line = process.stdout.readline().strip()
            if line != "batch":
                break
        delay = self.chance.uniform(0, LONGEST_DELAY)
        time.sleep(delay)
        print(f"kill {delay:.3f} s after {line or 'the end'}, the step {step}, {batches} batches")
        return bool(line)


def start_worker(url: str, name: str) -> subprocess.Popen[str]:
    """A worker in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", worker.__name__, url, name],
        stdout=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> int:
    """How a process ended, once all it had to tell is read."""
    process.communicate(timeout=support.PATIENCE)
    return process.returncode


def kill_workers(url: str, kills: int, seed: int) -> None:
    """Kill workers until that many were killed; each table is brought to its end, and looked at."""
    moments = Moments(seed)
    for witness in _tables(url, kills):
        finished = False
        while not finished:
            with start_worker(url, witness.name) as process:
                if witness.killed < kills and moments.wait(process):
                    process.kill()
                status = ended(process)
            finished = status == 0
            if not finished:
                assert status == -signal.SIGKILL
                witness.after_a_kill()


def kill_servers(server: EmbeddedPostgres, kills: int, seed: int) -> None:
    """Kill the server with all its processes under a worker; start it again, and go on."""
    moments = Moments(seed)
    server.ensure_database("target")
    url = server.url("target")
    for witness in _tables(url, kills):
        finished = False
        while not finished:
            with start_worker(url, witness.name) as process:
                hit = witness.killed < kills and moments.wait(process)
                if hit:
                    kill_server(server)
                    server.ensure_running()
                status = ended(process)
            # The worker may have found the server again, or have given up with an error; it is never stuck.
            finished = status == 0
            assert finished or (hit and status in {1, 2})
            if hit:
                witness.after_a_kill()


def _tables(url: str, kills: int) -> Iterator[Witness]:
    """One table after the other, until there were that many kills."""
    killed = 0
    for number in itertools.count(1):
        worker.create(url, f"payments_{number}")
        witness = Witness(url, f"payments_{number}", before=killed)
        yield witness
        witness.at_the_end()
        killed = witness.killed
        if killed >= kills:
            return


def kill_server(server: EmbeddedPostgres) -> None:
    """The postmaster and all its children, at once."""
    number = server.postmaster_pid()
    assert number is not None
    postmaster = psutil.Process(number)
    family = [postmaster, *postmaster.children(recursive=True)]
    for process in family:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    psutil.wait_procs(family, timeout=support.PATIENCE)


COMMAND = ("--add-columns", "--migrate-data", "--batch-size", str(BATCH), "--verify")


def kill_commands(theirs: Place, name: str, kills: int, seed: int) -> int:
    """Kill the command line, a Dagster run in it, each time in what is left of the rows; then let it end.

    Returns:
        The number of kills: fewer where a command was quicker.
    """
    chance = random.Random(seed)
    print(f"seed {seed}")
    witness = Witness(theirs.url, name)
    while witness.kills < kills and (written := witness.written()) < ROWS:
        goal = chance.randint(written + 1, (written + ROWS) // 2 + 1)
        delay = chance.uniform(0, LONGEST_DELAY)
        with _command(theirs) as process:
            _wait_for_rows(process, witness, goal)
            time.sleep(delay)
            process.kill()
            output, _ = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
        print(f"killed {delay:.3f} s after row {goal}")
        witness.after_a_kill()
    with _command(theirs) as process:
        try:
            output, _ = process.communicate(timeout=2 * support.PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert "  Failed: 0" in output.splitlines()
    witness.at_the_end()
    with theirs.instance() as instance:
        statuses = [run.status for run in instance.get_runs()]
    assert set(statuses) <= FINISHED, statuses
    assert statuses.count(dg.DagsterRunStatus.FAILURE) == witness.kills
    return witness.kills


def _command(theirs: Place) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "alphapulse_encryption", *COMMAND],
        env=theirs.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for_rows(process: subprocess.Popen[str], witness: Witness, rows: int) -> None:
    support.until(
        lambda: process.poll() is not None or witness.written() >= rows, f"the command encrypts {rows} rows"
    )
