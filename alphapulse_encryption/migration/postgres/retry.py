"""What an error of the server asks for: another try, another connection, or a row set aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import psycopg
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

T = TypeVar("T")

# After these the same statements may simply be tried again.
_RETRYABLE = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)

# Classes of SQLSTATEs that speak of a row: the rest of a batch may well go through.
_ABOUT_A_ROW = frozenset(
    {
        "21",  # cardinality_violation
        "22",  # data_exception
        "23",  # integrity_constraint_violation
        "44",  # with_check_option_violation
        "54",  # program_limit_exceeded
        "P0",  # raise_exception, in a trigger of the application
    }
)
_DATA_CORRUPTED = "XX001"
# Of a value whose text would be longer than a text may be, as that of a bytea above 512 MB; said in no other language.
_INTERNAL_ERROR, _TOO_LARGE = "XX000", "invalid memory alloc request size"


def again(
    attempt: Callable[[], T],
    when: Callable[[BaseException], bool],
    *,
    attempts: int,
    pauses: tuple[float, float],
) -> T:
    """Try until it goes through, with growing, jittered pauses; raises what does not go away, or the last try's error.

    Args:
        attempt: what to try; begins from the beginning each time.
        when: whether an error may go away by itself.
        pauses: the shortest and the longest, in seconds; the first is drawn from twice the shortest.
    """
    retrying = Retrying(
        retry=retry_if_exception(when),
        stop=stop_after_attempt(attempts),
        wait=wait_random_exponential(multiplier=2 * pauses[0], min=pauses[0], max=pauses[1]),
        reraise=True,
    )
    return retrying(attempt)


def retryable(error: BaseException) -> bool:
    """Whether the transaction may go through when it is tried again just as it was."""
    return isinstance(error, _RETRYABLE)


def about_a_row(error: psycopg.Error) -> bool:
    """Whether an error may be a single row's, so that a batch goes through without it.

    A code that is none of PostgreSQL's comes from a trigger or a function of the application.
    """
    state = error.sqlstate
    if state is None:
        return isinstance(error, psycopg.DataError)
    if state[:2] in _ABOUT_A_ROW or state == _DATA_CORRUPTED:
        return True
    if state == _INTERNAL_ERROR:
        return (error.diag.message_primary or "").startswith(_TOO_LARGE)
    try:
        psycopg.errors.lookup(state)
    except KeyError:
        return True
    return False
