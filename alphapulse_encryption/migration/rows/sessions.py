"""The connections of one worker, kept from one batch range to the next."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import psycopg

from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.reader import Reader
from alphapulse_encryption.migration.rows.throttle import Lookout, Throttle, indicators
from alphapulse_encryption.migration.rows.tuning import Tuned
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]

FIRST_BATCH = 1_000

# A thread that has its answer from the server asks for the interpreter, and another one that encrypts gives it away
# after this long (Python's own 5 ms are as long as the server needs for hundreds of rows).
_SWITCH_SECONDS = 0.001


class Sessions:
    """What a worker needs to work on ranges one after another: opened when first needed, and again after a failure.

    To be used by one worker at a time.

    Args:
        tuned: settings of the two sessions that carry the data.
    """

    def __init__(self, database: Database, tuned: Tuned | None = None) -> None:
        self.database = database
        self._tuned = tuned or Tuned()
        self._open = ExitStack()
        self._writer: Connection | None = None
        self._reader: Connection | None = None
        self._throttle: Throttle | None = None
        self._ahead: Reader | None = None
        self._metered: tuple[EnvelopeFormat, KeyRing, MeteredCipher] | None = None
        self._pids: list[int] = []
        # Whether the bookkeeping was held against its definition over these connections.
        self.knows_the_bookkeeping = False
        # Rows per batch, as the ranges so far have found it to suit.
        self.batch_size = FIRST_BATCH

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> tuple[Connection, Connection]:
        """The connection that writes, and the one that reads ahead; both in autocommit mode.

        Raises:
            DatabaseUnreachable: nobody answers.
            ConfigurationError: the server does not accept a setting.
        """
        if self._writer is None or self._reader is None:
            self.close()
            self._writer = self._connect()
            self._reader = self._connect()
            self.knows_the_bookkeeping = False
            self._pids[:] = [self._writer.info.backend_pid, self._reader.info.backend_pid]
        return self._writer, self._reader

    def read_ahead(self, reader: Reader) -> None:
        """Keep a reader of what comes next, which begins when the one before it has read its last row."""
        self._ahead = reader

    def take_ahead(self) -> Reader | None:
        """The reader kept, which is the caller's from now on: nobody else may read meanwhile."""
        ahead, self._ahead = self._ahead, None
        return ahead

    @contextmanager
    def throttle(self, on_wait: Callable[[str | None], None]) -> Iterator[Throttle]:
        """Holds the worker back while the server shows distress; looked at from the first block on, until the end.

        Args:
            on_wait: see :class:`Throttle`; for the length of the ``with`` block.
        """
        if self._throttle is None:
            lookout = Lookout(self.database, indicators(lambda: self._pids))
            self._open.callback(lookout.close)
            self._throttle = Throttle(lookout, on_wait)
            self._open.enter_context(self._throttle.looking())
        self._throttle.on_wait = on_wait
        yield self._throttle

    def metered(self, target: Target) -> MeteredCipher:
        """The cipher that encrypts for this worker, with a connection of its own; its reserve serves all ranges."""
        cipher, keys = target.cipher, target.keys
        if self._metered is None or self._metered[:2] != (cipher, keys):
            metering = MeteredCipher(target)
            self._open.callback(metering.close)
            self._metered = (cipher, keys, metering)
        return self._metered[2]

    def close(self) -> None:
        """Close everything; the server gives up what the sessions held."""
        ahead = self.take_ahead()
        if ahead is not None:
            ahead.close()
        self._writer = self._reader = self._throttle = self._metered = None
        self._open.close()

    def _connect(self) -> Connection:
        connection = self._open.enter_context(self.database.connect())
        plan_by_key(connection)
        self._tuned.apply(connection)
        return connection


_switching = threading.Lock()
_workers = 0
_usual: float = 0.0


@contextmanager
def quick_switches() -> Iterator[None]:
    """Have threads hand the interpreter over quickly while the block runs; the last of several puts it back."""
    global _workers, _usual  # noqa: PLW0603 - it is a property of the process
    with _switching:
        if _workers == 0:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_SECONDS)
        _workers += 1
    try:
        yield
    finally:
        with _switching:
            _workers -= 1
            if _workers == 0:
                sys.setswitchinterval(_usual)
