"""The connections of one worker, kept from one batch range to the next."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import Connection, may_pass_over_triggers
from alphapulse_encryption.migration.postgres.identity import elsewhere, identity
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.throttle import Throttle, indicators
from alphapulse_encryption.migration.rows.tuning import use_memory
from alphapulse_encryption.migration.target import Target

if TYPE_CHECKING:
    from alphapulse_encryption.migration.rows.reader import Reader


FIRST_BATCH = 1_000

# A thread that has its answer from the server asks for the interpreter, and another one that encrypts gives it away
# after this long (Python's own 5 ms are as long as the server needs for hundreds of rows).
_SWITCH_SECONDS = 0.001


class Sessions:
    """What a worker needs to work on ranges one after another: opened when first needed, and again after a failure.

    To be used by one worker at a time.

    Args:
        work_mem: of the two sessions that carry the data; see :func:`use_memory`.

    Attributes:
        writer: the connection that writes; as the one that reads ahead, open after :meth:`open`, in autocommit mode.
        reader: the one that reads ahead.
        cipher: encrypts for this worker, over a connection of its own; its reserve serves all ranges.
        ahead: a reader of what comes next, which begins when the one before it has read its last row.
        batch_size: rows per batch, as the ranges so far have found it to suit.
        knows_the_bookkeeping: whether the bookkeeping was held against its definition over these connections.
        may_pass_over_triggers: whether their role may write without firing triggers.
    """

    writer: Connection
    reader: Connection

    def __init__(self, target: Target, work_mem: str | None = None) -> None:
        self.target = target
        self.cipher = MeteredCipher(target)
        self.ahead: Reader | None = None
        self.batch_size = FIRST_BATCH
        self.knows_the_bookkeeping = False
        self.may_pass_over_triggers = False
        self._work_mem = work_mem
        self._open = ExitStack()
        self._is_open = False
        self._throttle: Throttle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> Connection:
        """Connect where that is not done; the connection that writes.

        Raises:
            DatabaseUnreachable: nobody answers.
            ConfigurationError: the server does not accept a setting, or the writer's address leads to another database.
        """
        if not self._is_open:
            self.close()
            self._open.enter_context(quick_switches())
            self.writer, self.reader = self._connect(), self._connect()
            self._refuse_another_database()
            self.knows_the_bookkeeping = False
            self.may_pass_over_triggers = may_pass_over_triggers(self.writer)
            self._is_open = True
        return self.writer

    def throttle(self, on_wait: Callable[[str | None], None]) -> Throttle:
        """Holds the worker back while the server shows distress; looks from now on until the sessions are closed.

        Args:
            on_wait: see :class:`Throttle`.
        """
        if self._throttle is None:
            ours = [self.writer.info.backend_pid, self.reader.info.backend_pid]
            self._throttle = Throttle(self.target.database, indicators(ours), on_wait)
            self._open.enter_context(self._throttle.looking())
        self._throttle.on_wait = on_wait
        return self._throttle

    def close(self) -> None:
        """Close everything; the server gives up what the sessions held."""
        if self.ahead is not None:
            self.ahead.close()
        self.ahead = self._throttle = None
        self._is_open = False
        self.cipher.close()
        self._open.close()

    def _refuse_another_database(self) -> None:
        if self.target.writer is None:
            return
        with self.target.database.session("see which database it is") as connection:
            if not identity(connection).same_database(identity(self.writer)):
                raise ConfigurationError(elsewhere(self.target.writer))

    def _connect(self) -> Connection:
        connection = self._open.enter_context(self.target.data_path.connect())
        plan_by_key(connection)
        use_memory(connection, self._work_mem)
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
