"""Messages per derived key: none uncounted, whatever runs beside or was forked; and the limit holds."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from alphapulse_encryption.crypto.envelope import AesGcmEnvelope
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.usage import MOST_MESSAGES, WARNING_FROM, KeyUsage, UsageBook
from alphapulse_encryption.errors import KeyExhausted

# Seconds: a child that waits for a lock for ever ends with a failure.
PATIENCE = 240
KEYS = KeyRing({1: bytes(32), 2: bytes(32)}, 1)


def test_the_numbers_of_the_standard() -> None:
    assert (MOST_MESSAGES, WARNING_FROM) == (4_294_967_296, 2_147_483_648)


def test_every_way_to_encrypt_counts_and_reading_does_not() -> None:
    book = UsageBook()
    cipher = AesGcmEnvelope(KEYS, book)
    envelope = cipher.encrypt("x", "a")
    cipher.encrypt_many(["x", None, "y"], "a")
    cipher.encrypt_many_utf8([b"x", None, None, b"", b"z"], "b")
    cipher.encrypt_many([None, None], "c")
    cipher.decrypt_many([envelope] * 10, "a")
    AesGcmEnvelope(KeyRing({1: bytes(32), 2: bytes(32)}, 2), book).encrypt("x", "a")
    assert book.usage() == (KeyUsage("a", 1, 3), KeyUsage("a", 2, 1), KeyUsage("b", 1, 3))


def test_the_limit() -> None:
    cipher = AesGcmEnvelope(KEYS, UsageBook(most=5))
    cipher.encrypt_many(["x"] * 4, "a")
    with pytest.raises(
        KeyExhausted, match="The key of context a, version 1, may not encrypt more than 5 mess"
    ):
        cipher.encrypt_many(["secret", "secret"], "a")
    assert cipher.encrypt("the fifth", "a")
    with pytest.raises(KeyExhausted) as caught:
        cipher.encrypt("secret", "a")
    assert "secret" not in str(caught.value)
    assert caught.value.exit_status == 1
    assert cipher.encrypt("x", "b")
    assert AesGcmEnvelope(KeyRing({1: bytes(32), 2: bytes(32)}, 2), UsageBook(most=5)).encrypt("x", "a")


def test_what_others_report_is_told_and_stops_nobody() -> None:
    """One that reports 2^32 messages would stop every other process."""
    book = UsageBook(most=100)
    cipher = AesGcmEnvelope(KEYS, book)
    cipher.encrypt_many(["x"] * 10, "a")
    cipher.encrypt("x", "b")
    sent: list[tuple[str, int, int]] = []

    def send(context: str, version: int, messages: int) -> int:
        sent.append((context, version, messages))
        return messages + 2**32

    assert book.report(send) == (KeyUsage("a", 1, 2**32 + 10), KeyUsage("b", 1, 2**32 + 1))
    assert book.report(send) == ()
    assert sent == [("a", 1, 10), ("b", 1, 1)]
    cipher.encrypt_many(["x"] * 90, "a")
    with pytest.raises(KeyExhausted):
        cipher.encrypt("x", "a")
    assert book.usage() == (KeyUsage("a", 1, 100), KeyUsage("b", 1, 1))
    book.report(send)
    assert sent[2:] == [("a", 1, 90)]


def test_what_could_not_be_reported_is_reported_the_next_time() -> None:
    book = UsageBook()
    cipher = AesGcmEnvelope(KEYS, book)
    cipher.encrypt_many(["x"] * 10, "a")

    def fails(*_: object) -> int:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        book.report(fails)
    cipher.encrypt("x", "a")
    sent: list[int] = []

    def send(_context: str, _version: int, messages: int) -> int:
        # Encrypted while it is being reported.
        cipher.encrypt("x", "a")
        sent.append(messages)
        return sum(sent)

    book.report(send)
    book.report(send)
    assert sent == [11, 1]


class Slow(int):
    """A number during whose addition other threads get their turn."""

    def __radd__(self, other: int) -> int:
        time.sleep(0)
        return int(other) + int(self)


def test_threads_lose_nothing() -> None:
    book = UsageBook()
    cipher = AesGcmEnvelope(KEYS, book)
    together = threading.Barrier(4)

    def work() -> None:
        together.wait()
        cipher.encrypt_many(["x"] * 500, "new")
        for _ in range(250):
            cipher.encrypt("x", "a")
            book.counter("b", 1).count(Slow(1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert book.usage() == (KeyUsage("a", 1, 1_000), KeyUsage("b", 1, 1_000), KeyUsage("new", 1, 2_000))


def test_a_fork_begins_anew_and_keeps_the_limit() -> None:
    book = UsageBook(most=20)
    cipher = AesGcmEnvelope(KEYS, book)
    cipher.encrypt_many(["x"] * 10, "a")

    def refused(messages: int) -> bool:
        try:
            cipher.encrypt_many(["x"] * messages, "a")
        except KeyExhausted:
            return True
        return False

    def child() -> bool:
        if book.usage() or not refused(11) or refused(10):
            return False
        reported: list[int] = []

        def send(_context: str, _version: int, messages: int) -> int:
            reported.append(messages)
            return 20

        book.report(send)
        return reported == [10] and refused(1)

    # Another thread may hold the locks at the moment of the fork, and does not exist in the child.
    with book._reporting, book.counter("a", 1)._lock:
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                signal.alarm(PATIENCE)
                status = 0 if child() else 1
            finally:
                os._exit(status)
    _, ended = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended) == 0
    assert book.usage() == (KeyUsage("a", 1, 10),)


def test_warnings() -> None:
    assert KeyUsage("a", 1, WARNING_FROM - 1).warning() is None
    warned = KeyUsage("a", 1, WARNING_FROM).warning()
    assert warned is not None
    assert "has encrypted 2,147,483,648 of the 4,294,967,296 messages that it may" in warned
    assert "may not encrypt more" in str(KeyUsage("a", 1, MOST_MESSAGES).warning())
