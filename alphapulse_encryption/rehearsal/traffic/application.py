"""The process that makes the traffic: instances of an application at work on one database, until they are told to end.

It answers each order with a line: to begin, with address and keys, then to end, and so on, until its input ends.

Requests are an open loop: each client draws the times at which its requests are due, and does not wait for answers to
draw the next. How long one took is counted from then, so that a request that waited for its turn behind a slow one is
as slow as it would be for a user.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from alphapulse_encryption import secrecy
from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.bookkeeping.tables import states
from alphapulse_encryption.migration.postgres.database import (
    TEXT_FORM_SETTINGS,
    Database,
    answer,
    configure,
    keep_values_out_of_the_log,
)
from alphapulse_encryption.orm import Phase
from alphapulse_encryption.rehearsal.child import heard, run, say
from alphapulse_encryption.rehearsal.measures import Latency, Traffic
from alphapulse_encryption.rehearsal.traffic import owned_rows, samples
from alphapulse_encryption.rehearsal.traffic.owned_rows import Book, Remembered, Target
from alphapulse_encryption.rehearsal.traffic.tables import Values, read_shape
from alphapulse_encryption.rehearsal.traffic.ways import MOST_FOUND, Key, RowIsMissing, Way, libraries, plain
from alphapulse_encryption.runtime import reset_ciphers

APPLICATION_NAME = "alphapulse_encryption rehearsal traffic"

# Of one client and table.
ROWS_EACH = 25
ROWS_OF_A_REPORT = 100
# How long an application looks for a server that is being restarted, in seconds.
PATIENCE = 30.0
_BLINK = 0.05
# Waits for locks that are shorter than that may go unseen.
_SECONDS_BETWEEN_LOOKS = 0.2

# The kinds of requests: as the configuration has them, and as measurements call them.
KINDS = {
    "read": "read by key",
    "look_up": "look up by search column",
    "update": "update",
    "insert": "insert",
    "delete": "delete",
    "report": "report",
}
FINAL = "read all at the end"

# Gets the session, and whether it may have been done already: that its transaction was committed is not known of a
# connection that was lost.
Request = Callable[[Session, bool], Any]


class Load:
    """Clients at work from now on; what was written under an earlier load on the same database has to be read.

    Raises:
        RefusedError: a phase contradicts where the migration stands.
    """

    def __init__(self, order: Mapping[str, Any], books: dict[str, Book]) -> None:
        self.config: Mapping[str, Any] = order["config"]
        self.phases = tuple(Phase(phase) for phase in order["phases"])
        self.engine = _engine(order["url"], self.config["clients"])
        self.targets = self._targets(order, books)
        self.clients = [Client(self, number) for number in range(self.config["clients"])]
        self.stopped, self._answered = threading.Event(), threading.Event()
        # With all sessions open.
        with ExitStack() as connections:
            for _ in self.clients:
                connections.enter_context(self.engine.connect())
        working = [client for client in self.clients if client.tables]
        rate = self.config["rate"] / max(len(working), 1)
        self._pool = ThreadPoolExecutor(len(self.clients) + 1)
        self._waits = self._pool.submit(_lock_waits, order["url"], self._answered)
        self.began, self.ended = time.time(), math.inf
        self._working = [self._pool.submit(client.work, rate) for client in working]

    def _targets(self, order: Mapping[str, Any], books: dict[str, Book]) -> list[Target]:
        tables = Catalogue.model_validate(order["catalogue"]).tables
        with Database(order["url"], APPLICATION_NAME).session(
            "look at the tables of the traffic"
        ) as connection:
            shapes = [read_shape(connection, table) for table in tables]
            stands = states(connection)
        # A list for each table, of a way for each phase.
        ways = zip(*(libraries(shapes, phase, self.engine) for phase in self.phases), strict=True)
        chance = random.Random(self.config["seed"])  # noqa: S311 - to be repeated
        made = []
        for shape, library in zip(shapes, ways, strict=True):
            key = shape.table.key
            state = stands.get(key)
            in_plaintext = state is None or (state.authority == "plaintext" and state.state.has_both_sides)
            # Who sends plain SQL knows of no encryption, as an instance in the phase off, and goes when those go.
            past = plain(shape) if Phase.OFF in self.phases and in_plaintext else None
            if key not in books:
                rows = ROWS_EACH * self.config["clients"]
                books[key] = owned_rows.open_book(self.engine, shape, library[0], rows, chance)
            target = Target(shape, library, past, books[key], left_out=list(shape.left_out))
            target.try_out(self.engine, chance)
            made.append(target)
        return made

    def end(self) -> Traffic:
        """Make the requests that are due by now, and none after them; what all of them add up to.

        Raises:
            MigrationError: a client could not do its work.
        """
        self.ended = time.time()
        self.stopped.set()
        for working in self._working:
            if (error := working.exception()) is not None:
                raise MigrationError(f"The traffic of the rehearsal does not work: {_where(error)}.")
        self._answered.set()
        waits, longest_wait = self._waits.result()
        self._pool.shutdown()
        for number, target in enumerate(self.targets):
            target.book.rows = [row for client in self.clients for row in client.rows[number]]
        made = [sample for client in self.clients for sample in client.samples]
        final = self._read_all()
        self.engine.dispose()
        overall = samples.latency("all", "all", made)
        wrong = overall.wrong_answers + sum(latency.wrong_answers for latency in final)
        return Traffic(
            phases=tuple(str(phase) for phase in self.phases),
            overall=overall.model_copy(update={"wrong_answers": wrong}),
            by_kind=(*samples.by_kind(made), *final),
            moments=samples.moments(made, self.began, self.ended),
            lock_waits=dict(waits),
            longest_lock_wait=longest_wait,
            error_kinds=dict(Counter(one.error for one in made if one.error is not None).most_common()),
            retried=sum(client.retried for client in self.clients),
            left_out=tuple(note for target in self.targets for note in target.left_out),
        )

    def _read_all(self) -> list[Latency]:
        """Hold all rows that are owned against what is there, each way: nobody has read yet what was written last."""
        found: dict[str, list[samples.Sample]] = {}
        for target in self.targets:
            keys = [row.key for row in target.book.rows]
            for way in target.ways:
                began = time.time()
                there = self.clients[0].read_all(way, keys)
                took = (time.time() - began) * 1000
                found.setdefault(way.name, []).extend(
                    samples.Sample(began, took, FINAL, way.name, None, not row.agrees(there.get(row.key)))
                    for row in target.book.rows
                )
        return [samples.latency(FINAL, way, those) for way, those in found.items()]


class Client:
    """One client: its rows, its requests one after another, and how long each took."""

    def __init__(self, load: Load, number: int) -> None:
        self.load = load
        self.chance = random.Random(f"{load.config['seed']} {number} {load.phases}")  # noqa: S311
        self.rows = [target.book.rows[number :: load.config["clients"]] for target in load.targets]
        self.samples: list[samples.Sample] = []
        self.retried = 0
        self._mix: Mapping[str, float] = load.config["mix"]
        self._kinds = [self._kinds_of(target) for target in load.targets]

    def _kinds_of(self, target: Target) -> list[str]:
        allowed = {
            "read": True,
            "look_up": any(field.searchable for field in target.shape.sensitive),
            "update": bool(target.changing),
            "insert": target.inserting,
            "delete": target.inserting,
            "report": True,
        }
        return [kind for kind in KINDS if allowed[kind] and self._mix[kind] > 0]

    @property
    def tables(self) -> list[int]:
        """Those that it may do anything to."""
        return [n for n, kinds in enumerate(self._kinds) if kinds and self.rows[n]]

    def work(self, rate: float) -> None:
        """Make requests when they are due, until the load ends."""
        due = self.load.began
        while True:
            due += self.chance.expovariate(rate)
            # Over, it makes those that were due before.
            if self.load.stopped.wait(max(due - time.time(), 0.0)) and due > self.load.ended:
                return
            self._request(due)

    def _request(self, due: float) -> None:
        number = self.chance.choice(self.tables)
        target, rows, kinds = self.load.targets[number], self.rows[number], self._kinds[number]
        kind = self.chance.choices(kinds, [self._mix[kind] for kind in kinds])[0]
        way = self.chance.choice(target.library)
        if target.plain is not None and self.chance.random() >= self.load.config["library_share"]:
            way = target.plain
        if kind == "delete" and not any(row.inserted for row in rows):
            kind = "insert"
        error, wrong = None, False
        try:
            wrong = not getattr(self, f"_{kind}")(target, way, rows)
        except RowIsMissing:
            wrong = True
        except Exception as problem:
            error = owned_rows.named(problem)
        self.samples.append(
            samples.Sample(due, (time.time() - due) * 1000, KINDS[kind], way.name, error, wrong)
        )

    def _ask(self, request: Request) -> Any:
        """Make a request in a transaction; once more where the connection was lost, as applications do."""
        for again in (False, True):
            try:
                with Session(self.load.engine, expire_on_commit=False) as session:
                    answer = request(session, again)
                    session.commit()
                    return answer
            except DBAPIError as error:
                if again or not owned_rows.was_lost(error):
                    raise
                self.retried += 1
                _find_server(self.load.engine)
        raise AssertionError

    def read_all(self, way: Way, keys: list[Key]) -> dict[Key, Values]:
        """Rows by their keys, those that can be read."""
        found: dict[Key, Values] = self._ask(lambda session, _: owned_rows.readable(way, session, keys))
        return found

    def _read(self, target: Target, way: Way, rows: list[Remembered]) -> bool:
        row = self.chance.choice(rows)
        found = self._ask(lambda session, _: way.read(session, [row.key]))
        return row.agrees(found.get(row.key))

    def _look_up(self, target: Target, way: Way, rows: list[Remembered]) -> bool:
        row = self.chance.choice(rows)
        attribute, value = self.chance.choice(list(row.searched.items()))
        if value is None:
            return self._read(target, way, rows)
        found = self._ask(lambda session, _: way.look_up(session, attribute, value))
        return row.key in found or len(found) >= MOST_FOUND

    def _report(self, target: Target, way: Way, rows: list[Remembered]) -> bool:
        first = self.chance.choice(rows)
        try:
            found = self._ask(lambda session, _: way.read_on(session, first.key, ROWS_OF_A_REPORT))
        except owned_rows.UNREADABLE as error:
            if not owned_rows.has_no_value(error):
                raise
            # Another row holds what Python has no value for: no report has ever gone past it.
            found = self._ask(lambda session, _: way.read(session, [first.key]))
        return first.key in found and all(row.agrees(found[row.key]) for row in rows if row.key in found)

    def _update(self, target: Target, way: Way, rows: list[Remembered]) -> bool:
        row = self.chance.choice(rows)
        fields = self.chance.sample(target.changing, self.chance.randint(1, min(3, len(target.changing))))
        values = target.new_values(self.chance, fields)
        try:
            self._ask(lambda session, _: way.update(session, row.key, values))
        except DBAPIError as error:
            if owned_rows.was_lost(error):
                rows.remove(row)  # nobody knows what it holds now
            raise
        row.wrote(values)
        return True

    def _insert(self, target: Target, way: Way, rows: list[Remembered]) -> bool:
        def request(session: Session, again: bool) -> Remembered:
            # Made anew each time: the first one may have been committed.
            row = target.new_row(self.chance)
            return Remembered(target.shape, way.insert(session, row), row, inserted=True)

        rows.append(self._ask(request))
        return True

    def _delete(self, target: Target, way: Way, rows: list[Remembered]) -> bool:
        row = self.chance.choice([row for row in rows if row.inserted])

        def request(session: Session, again: bool) -> None:
            try:
                way.delete(session, row.key)
            except RowIsMissing:
                if not again:
                    raise

        rows.remove(row)
        self._ask(request)
        return True


# PostgreSQL manual, 53.13 "pg_locks": waitstart is NULL for a very short time after a wait began. Whose lock it is, is
# said by application name: a number would say nothing to anybody afterwards.
_WAITING = """
SELECT a.pid, coalesce(l.waitstart, a.query_start)::text, l.locktype, coalesce(c.relname, ''),
       extract(epoch FROM clock_timestamp() - coalesce(l.waitstart, a.query_start))::float8,
       coalesce((SELECT string_agg(DISTINCT nullif(b.application_name, ''), ', ')
                   FROM pg_stat_activity b WHERE b.pid = ANY (pg_blocking_pids(a.pid))), '')
  FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid AND NOT l.granted
  LEFT JOIN pg_class c ON l.database <> 0 AND c.oid = l.relation
 WHERE a.application_name = %s AND a.datname = current_database() AND a.wait_event_type = 'Lock'
"""


def _lock_waits(url: str, ended: threading.Event) -> tuple[Counter[str], float]:
    """How often our sessions were seen waiting for what, and the longest wait in seconds."""
    seen, longest = Counter[str](), 0.0
    known: set[tuple[Any, ...]] = set()
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        # A server that is being restarted has nobody waiting.
        with (
            suppress(psycopg.Error),
            psycopg.connect(
                url, autocommit=True, application_name=f"{APPLICATION_NAME}, watched", connect_timeout=10
            ) as connection,
        ):
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                for pid, since, kind, relation, seconds, holder in connection.execute(
                    _WAITING, [APPLICATION_NAME]
                ):
                    longest = max(longest, seconds)
                    if (pid, since) not in known:
                        known.add((pid, since))
                        what = f"{kind} {relation}".strip()
                        seen[f"{what} held by {holder}" if holder else what] += 1
    return seen, longest


def _engine(url: str, clients: int) -> Engine:
    def connect() -> psycopg.Connection[Any]:
        connection = psycopg.connect(
            url, application_name=APPLICATION_NAME, connect_timeout=10, autocommit=True
        )
        configure(connection, TEXT_FORM_SETTINGS)
        # The values are real ones; an application's own sessions would leave theirs in the log.
        keep_values_out_of_the_log(connection)
        connection.autocommit = False
        return connection

    return create_engine(
        "postgresql+psycopg://", creator=connect, hide_parameters=True, pool_size=clients, max_overflow=1
    )


def _find_server(engine: Engine) -> None:
    """Wait until the server answers again, for as long as an application would."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            with engine.connect():
                return
        except DBAPIError:
            time.sleep(_BLINK)


def _where(error: BaseException) -> str:
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{owned_rows.named(error)} at {os.path.basename(last.filename)}:{last.lineno}"


def main() -> None:
    environment: dict[str, str] = {}
    # What was written is remembered from one stage to the next; of one database only.
    database, books = "", dict[str, Book]()
    orders = heard()
    try:
        for order in (said["begin"] for said in orders):
            if order["environment"] != environment:
                # Of this process as it is from now on; what the kernel shows of it is what it was started with.
                secrecy.forget_keys()
                for name in environment:
                    os.environ.pop(name, None)
                environment = order["environment"]
                os.environ.update(environment)
                secrecy.keep_keys()
                reset_ciphers()
            if (which := _which(order)) != database:
                database, books = which, {}
            load = Load(order, books)
            say({"began": True})
            if next(orders, None) is not None:
                say({"measured": load.end().model_dump(mode="json")})
    except MigrationError as error:
        say({"refused": error.args[0], "status": error.exit_status})
    except Exception as error:
        say({"broken": _where(error)})


def _which(order: Mapping[str, Any]) -> str:
    """What tells a database, and a way of working on it, from any other."""
    with Database(order["url"], APPLICATION_NAME).session("find out which database it is") as connection:
        oid = answer(connection, "SELECT oid FROM pg_database WHERE datname = current_database()")
    return json.dumps([oid, order["url"], order["config"]["clients"], order["catalogue"]], sort_keys=True)


if __name__ == "__main__":
    run(main)
