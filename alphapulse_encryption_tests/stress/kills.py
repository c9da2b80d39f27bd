"""kill -9 of a worker, of a command and of the server, at moments a seeded generator chooses.

A *plan* is the steps in which one table's migration is killed, one kill each; what happens between two kills is a
process that is left alone until it comes to the next one's step.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import LiteralString

import dagster as dg
import psutil
import psycopg
from psycopg.sql import SQL, Composable, Literal

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import forked
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run, value
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.stress import worker
from alphapulse_encryption_tests.stress.worker import BATCH, RANGES, ROWS

Plan = Sequence[str]

# How long a step takes on a small table, more or less, in seconds: a kill comes at any moment of it. In a backfill it
# comes this long after any of its batches.
LENGTHS = {"columns": 0.1, "backfill": 0.02, "indexes": 0.1, "verify": 0.12, "switch": 0.06}
LONGEST_PLAN = 8
# Among so many kills some have to be in the middle of the rows, or the moments are badly chosen.
ONE_HALFWAY_OF = 4


def plans(
    kills: int, chance: random.Random, steps: Plan = worker.STEPS, *, size: int | None = None
) -> list[Plan]:
    """Plans with that many kills in all; half of them are in the backfill.

    Args:
        kills: how many.
        chance: chooses.
        steps: in their order.
        size: kills of each plan; a few where None.
    """
    found: list[Plan] = []
    weights = [len(steps) - 1 if step == "backfill" else 1 for step in steps]
    while kills:
        count = min(kills, size or chance.randint(2, LONGEST_PLAN))
        found.append(sorted(chance.choices(steps, weights, k=count), key=steps.index))
        kills -= count
    return found


# What has to be so


def reference(url: str) -> list[str]:
    """What becomes of a table whose migration nobody kills."""
    worker.create(url, "reference")
    worker.migrate(url, "reference", lambda *_: None)
    return outcome(url, "reference")


def outcome(url: str, name: str) -> list[str]:
    """Where a migrated table stands: its definition and its bookkeeping, without its name, times and key material."""
    found = [
        *run(
            url,
            "SELECT attname, format_type(atttypid, atttypmod), attnotnull, atthasdef FROM pg_attribute "
            "WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attname",
            name,
        ),
        *run(
            url,
            "SELECT pg_get_indexdef(indexrelid), indisvalid AND indisready AND indislive, "
            "obj_description(indexrelid, 'pg_class') FROM pg_index WHERE indrelid = %s::regclass ORDER BY 1",
            name,
        ),
        *run(
            url,
            "SELECT conname, pg_get_constraintdef(oid), convalidated FROM pg_constraint "
            "WHERE conrelid = %s::regclass ORDER BY 1",
            name,
        ),
        *run(
            url,
            "SELECT pg_get_triggerdef(oid), tgenabled, obj_description(oid, 'pg_trigger') FROM pg_trigger "
            "WHERE tgrelid = %s::regclass ORDER BY 1",
            name,
        ),
        *run(
            url,
            "SELECT c.reloptions, t.reloptions FROM pg_class c LEFT JOIN pg_class t ON t.oid = c.reltoastrelid "
            "WHERE c.oid = %s::regclass",
            name,
        ),
        *run(
            url,
            "SELECT authority, stage, set_aside FROM alphapulse_encryption.tables WHERE table_name = %s",
            name,
        ),
        *run(
            url,
            "SELECT batch_range, status, position, error_message, waiting_for FROM alphapulse_encryption.ranges "
            "WHERE table_name = %s ORDER BY 1",
            name,
        ),
        *run(
            url,
            "SELECT column_name, status, records_processed, error_message FROM encryption_migrations "
            "WHERE table_name = %s ORDER BY 1",
            name,
        ),
        *run(url, "SELECT key FROM alphapulse_encryption.quarantine WHERE table_name = %s", name),
        *run(
            url,
            "SELECT relation::regclass::text FROM alphapulse_encryption.tuning WHERE table_name = %s",
            name,
        ),
        *run(url, "SELECT actor FROM alphapulse_encryption.tuning_holders WHERE table_name = %s", name),
    ]
    # The guard's and the pending index's comments have hashes of names in them.
    return [re.sub(r"\b([0-9a-f]{32}){1,2}\b", "HASH", str(row).replace(name, "TABLE")) for row in found]


@dataclass
class Witness:
    """Looks at one table from outside, after each kill and at the end.

    Args:
        url: the database.
        name: of the table.
        kills: so far.
        halfway: how many of them left some rows done and some not.
    """

    url: str
    name: str
    kills: int = 0
    halfway: int = 0
    done: dict[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plaintext = self._plaintext()

    def _plaintext(self) -> str:
        return str(
            value(
                self.url,
                f"SELECT md5(string_agg(concat_ws(',', id, mail, secret), ';' ORDER BY id)) FROM {self.name}",
            )
        )

    def after_a_kill(self, *, halfway: bool | None = None) -> None:
        """Nothing is half done, nothing was done twice, nothing is left behind.

        Args:
            halfway: whether the kill left some rows done and some not; by default, what is seen now tells.
        """
        self._all_quiet()
        self.kills += 1
        written = self.written()
        self.halfway += 0 < written < ROWS if halfway is None else halfway
        self._nothing_twice()
        # Progress was committed with the data it speaks of.
        assert written == self._counted()

    def at_the_end(self, wanted: list[str]) -> None:
        """Everything is there once, and all is as it is of a table that nobody was killed over.

        Args:
            wanted: the outcome of such a table.
        """
        self._all_quiet()
        self._nothing_twice()
        entry = worker.table(self.name)
        assert support.assert_encrypted(self.url, entry) == ROWS + ROWS * 9 // 10
        assert self._plaintext() == self.plaintext
        assert self._counted() == ROWS
        assert outcome(self.url, self.name) == wanted
        found = support.verify(self.url, entry)
        assert found.passed, found.reasons
        assert found.rows == ROWS

    def written(self) -> int:
        """Rows that are encrypted."""
        columns = (
            "SELECT count(*) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'mail_encrypted'"
        )
        if not value(self.url, columns, self.name):
            return 0
        return int(value(self.url, f"SELECT count(*) FROM {self.name} WHERE mail_encrypted IS NOT NULL"))

    def _counted(self) -> int:
        if value(self.url, "SELECT to_regclass('alphapulse_encryption.ranges') IS NULL"):
            return 0
        total = (
            "SELECT coalesce(sum(rows_processed), 0) FROM alphapulse_encryption.ranges WHERE table_name = %s"
        )
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


def some_halfway(witnesses: Sequence[Witness], plan: Sequence[Plan]) -> None:
    """Enough of the kills in a backfill came in the middle of the rows."""
    intended = sum(steps.count("backfill") for steps in plan)
    assert sum(witness.halfway for witness in witnesses) >= intended // ONE_HALFWAY_OF


# Workers


@dataclass
class Worker:
    """A worker in a process of its own, and what it has told.

    Args:
        process: the worker.
        told: rows it said to have written, by batch range.
    """

    process: subprocess.Popen[str]
    told: dict[str, int] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """What it tells from now on; the first word of each line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word, *more = line.split() or [""]
            if word == "batch":
                self.told[more[0]] = int(more[1])
            yield word

    def comes_to(self, step: str, batches: int) -> None:
        """Wait until it begins a step, and in it has written so many batches, or all that there were."""
        lines = self.lines()
        assert step in lines, f"It ended before the step {step}."
        for word in itertools.islice(lines, batches):
            if word != "batch":
                break

    def ended(self) -> int:
        """How it ended, once all it had to tell is read."""
        for _ in self.lines():
            continue
        return self.process.wait(support.PATIENCE)


@contextmanager
def working(url: str, name: str) -> Iterator[Worker]:
    """A worker; whatever happens, it does not outlive the block."""
    command = [sys.executable, "-m", worker.__name__, url, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def _wait_for(hand: Worker, step: str, left: int, chance: random.Random) -> None:
    """Wait until it is time to kill.

    Args:
        hand: who takes the step.
        step: the step.
        left: rows that are not encrypted yet.
        chance: chooses.
    """
    batches = chance.randint(0, max(1, left // BATCH // 2)) if step == "backfill" else 0
    delay = chance.uniform(0, LENGTHS[step])
    hand.comes_to(step, batches)
    time.sleep(delay)
    print(f"kill {delay:.3f} s after {step} began and {batches} batches; {left} rows were left")


def _check_told(hand: Worker, more: int) -> None:
    """What was told to be committed is there, and of what was not, a batch of each range at most.

    Args:
        more: rows encrypted since the worker began.
    """
    told = sum(hand.told.values())
    assert told <= more <= told + RANGES * BATCH


def kill_workers(url: str, plan: Sequence[Plan], chance: random.Random) -> None:
    """Kill workers as planned, a table for each plan; each is brought to its end, and looked at."""
    wanted = reference(url)
    witnesses = [_table(url, number) for number in range(len(plan))]
    for witness, steps in zip(witnesses, plan, strict=True):
        for step in steps:
            _kill_worker(witness, step, chance)
        _let_end(witness, wanted)
    some_halfway(witnesses, plan)


def _kill_worker(witness: Witness, step: str, chance: random.Random) -> None:
    """Kill one in a step; again where it was quicker."""
    status = 0
    while status == 0:
        before = witness.written()
        with working(witness.url, witness.name) as hand:
            _wait_for(hand, step, ROWS - before, chance)
            hand.process.kill()
            status = hand.ended()
    assert status == -signal.SIGKILL
    witness.after_a_kill()
    _check_told(hand, witness.written() - before)


def _table(url: str, number: int) -> Witness:
    name = f"payments_{number}"
    worker.create(url, name)
    return Witness(url, name)


def _let_end(witness: Witness, wanted: list[str]) -> None:
    with working(witness.url, witness.name) as hand:
        assert hand.ended() == 0
    witness.at_the_end(wanted)


# The server


def kill_servers(server: EmbeddedPostgres, plan: Sequence[Plan], chance: random.Random) -> None:
    """Kill the server with all its processes under a worker; start it again, and go on.

    A worker may find the server again and go on to the end; the kills that are left are another table's then.
    """
    url = server.url("target")
    wanted = reference(url)
    witnesses: list[Witness] = []
    for steps in plan:
        left = list(steps)
        while left:
            witness = _table(url, len(witnesses))
            witnesses.append(witness)
            finished = False
            while left and not finished:
                finished = _kill_server_under(witness, server, left.pop(0), chance)
            _let_end(witness, wanted)
    some_halfway(witnesses, plan)


def _kill_server_under(witness: Witness, server: EmbeddedPostgres, step: str, chance: random.Random) -> bool:
    """Kill the server in a step of a worker; whether that went on to the end all the same."""
    before = witness.written()
    with working(witness.url, witness.name) as hand:
        _wait_for(hand, step, ROWS - before, chance)
        kill_server(server)
        server.ensure_running()
        # The worker may find the server again and write the rest before it has ended.
        halfway = sum(hand.told.values()) > 0 and witness.written() < ROWS
        status = hand.ended()
    # Or it gave up with an error, in words; it is never stuck.
    assert status in {0, 1, 2}
    witness.after_a_kill(halfway=halfway)
    # The rows of a server that lost nothing.
    _check_told(hand, witness.written() - before)
    return status == 0


def kill_server_in_a_build(server: EmbeddedPostgres) -> None:
    """Kill the server while an index is half built: that index is invalid, and is built again."""
    url = server.url("target")
    wanted = reference(url)
    witness = _table(url, 0)
    with closing(psycopg.connect(url)) as reader:
        # An old snapshot, which an index has to wait for.
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM pg_class")
        with working(url, witness.name) as hand:
            support.until(
                lambda: support.engine_waits(url, "CREATE%INDEX CONCURRENTLY%", behind=reader),
                "the build waits for the reader",
            )
            kill_server(server)
            server.ensure_running()
            assert hand.ended() == 1
    assert _invalid_indexes(witness) == [f"idx_{witness.name}_mail"]
    witness.after_a_kill()
    assert witness.written() == ROWS
    _let_end(witness, wanted)


def _invalid_indexes(witness: Witness) -> list[str]:
    rows = run(
        witness.url,
        "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid AND indrelid = %s::regclass ORDER BY 1",
        witness.name,
    )
    return [name for (name,) in rows]


def kill_server(server: EmbeddedPostgres) -> None:
    """The postmaster and all its children, at once."""
    postmaster = server.postmaster()
    assert postmaster is not None
    family = [postmaster, *postmaster.children(recursive=True)]
    for process in family:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    psutil.wait_procs(family, timeout=support.PATIENCE)


# Commands

COMMAND = (
    *(
        "--add-columns",
        "--migrate-data",
        "--batch-size",
        str(BATCH),
        "--workers",
        str(RANGES),
        "--autovacuum-off",
    ),
    *("--verify", "--switch-to-encrypted"),
)
# Which of Dagster's jobs a command is in, by the step.
JOBS = {
    "columns": "add_columns",
    "backfill": "migrate_data",
    "indexes": "build_indexes",
    "verify": "verify_data",
    "verdict": "verify_tables",
    "switch": "switch_to_ciphertext",
}
FINISHED = {dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}
LENGTH_OF_A_RUN = 0.3


def kill_commands(
    theirs: Place, steps: Plan, chance: random.Random, server: EmbeddedPostgres | None = None
) -> None:
    """Kill the command line, a Dagster run in it, as planned; then let it end.

    Args:
        theirs: where it runs; the table's name is "payments".
        steps: the plan.
        chance: chooses the moments.
        server: that of the target database: killed in the command's place.
    """
    wanted = reference(theirs.url)
    worker.create(theirs.url, "payments")
    witness = Witness(theirs.url, "payments")
    failed = 0
    for step in steps:
        failed += _kill_command(theirs, witness, step, chance, server)
    failed += _runs(theirs, "status = 'FAILURE'") if server is not None else 0
    assert "  Failed: 0" in theirs.succeeds(*COMMAND)
    witness.at_the_end(wanted)
    with theirs.instance() as instance:
        statuses = [run.status for run in instance.get_runs()]
    assert set(statuses) <= FINISHED, statuses
    assert statuses.count(dg.DagsterRunStatus.FAILURE) == failed
    assert witness.kills == len(steps)


def _kill_command(
    theirs: Place, witness: Witness, step: str, chance: random.Random, server: EmbeddedPostgres | None
) -> int:
    """Kill a command, or the server under it, in a step; again where the command was quicker.

    Returns:
        The number of runs that a killed command could not end.
    """
    while True:
        command = theirs.start(*COMMAND)
        _wait_for_run(command, theirs, witness, step, chance)
        if server is not None:
            kill_server(server)
            server.ensure_running()
        else:
            command.kill()
        done = command.ended(support.PATIENCE)
        assert "Traceback" not in done.stdout + done.stderr
        assert done.returncode in ({0, -signal.SIGKILL} if server is None else {0, 1, 2}), done
        if server is not None or done.returncode != 0:
            break
    witness.after_a_kill()
    # Runs of the commands killed before it were ended by this one.
    return _runs(theirs, "status NOT IN ('SUCCESS', 'FAILURE', 'CANCELED')")


def _wait_for_run(
    command: forked.Program, theirs: Place, witness: Witness, step: str, chance: random.Random
) -> None:
    """Wait until the command runs a step's job, and for a while of it."""
    written = witness.written()
    goal = chance.randint(written, (written + ROWS) // 2) if step == "backfill" else 0
    delay = chance.uniform(0, LENGTHS["backfill"] if step == "backfill" else LENGTH_OF_A_RUN)
    begun = SQL("pipeline_name = {} AND status NOT IN ('NOT_STARTED', 'STARTING')").format(
        Literal(JOBS[step])
    )
    with psycopg.connect(theirs.dagster_url, autocommit=True) as dagster:
        before = _count(dagster, begun)
        support.until(
            lambda: not command.running or (_count(dagster, begun) > before and witness.written() >= goal),
            f"the command is in {JOBS[step]} and has encrypted {goal} rows",
        )
    time.sleep(delay)
    print(f"kill {delay:.3f} s after {JOBS[step]} began and {goal} rows")


def _runs(theirs: Place, condition: LiteralString) -> int:
    with psycopg.connect(theirs.dagster_url) as dagster:
        return _count(dagster, SQL(condition))


def _count(dagster: support.Connection, condition: Composable) -> int:
    row = dagster.execute(SQL("SELECT count(*) FROM runs WHERE {}").format(condition)).fetchone()
    assert row is not None
    return int(row[0])
