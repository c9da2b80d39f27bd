"""How many messages each derived key has encrypted in this process, and how many are enough.

AES-GCM with random IVs of 96 bits may encrypt at most 2^32 messages under one key (NIST SP 800-38D section 8.3). A
derived key is that of one context and key version.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from alphapulse_encryption.errors import KeyExhausted

MOST_MESSAGES = 2**32
# Half of it: time enough to rotate, at any pace that has taken years to get here.
WARNING_FROM = 2**31


@dataclass(frozen=True, order=True)
class KeyUsage:
    """How many values one derived key has encrypted.

    Args:
        reported: how many of them by the word of applications.
    """

    context: str
    key_version: int
    messages: int
    reported: int = field(default=0, compare=False)

    @property
    def share(self) -> float:
        """Of those that it may encrypt."""
        return self.messages / MOST_MESSAGES

    @property
    def used_up(self) -> bool:
        """Whether it encrypts nothing more here, whatever applications report."""
        return self.messages - self.reported >= MOST_MESSAGES

    def warning(self) -> str | None:
        """What to tell an operator; None while there is nothing to worry about."""
        if self.messages < WARNING_FROM:
            return None
        if self.used_up:
            return exhausted(self.context, self.key_version)
        return (
            f"The key of context {self.context}, version {self.key_version}, has encrypted {self.messages:,} of the "
            f"{MOST_MESSAGES:,} messages that it may"
            + (f", {self.reported:,} of them as applications report" if self.reported else "")
            + ". Plan a rotation to a new key version."
        )


def exhausted(context: str, key_version: int, most: int = MOST_MESSAGES) -> str:
    """Why a key encrypts nothing more, and what to do."""
    return (
        f"The key of context {context}, version {key_version}, may not encrypt more than {most:,} messages in all "
        "(NIST SP 800-38D section 8.3). Rotate to a new key version; what it has encrypted stays readable."
    )


class MessageCounter:
    """Counts the messages of one derived key. Safe to share between threads; a forked child begins at 0.

    Args:
        most: refuse to go beyond so many. What other processes report does not count: one that lies would end all.
    """

    __slots__ = ("_before", "_lock", "_most", "_reported", "context", "key_version", "messages")

    def __init__(self, context: str, key_version: int, most: int) -> None:
        self.context, self.key_version, self._most = context, key_version, most
        self.messages = self._reported = self._before = 0
        self._lock = threading.Lock()

    def count(self, messages: int) -> None:
        """Count messages that are about to be encrypted.

        Raises:
            KeyExhausted: they would be too many; none of them is counted.
        """
        with self._lock:
            here = self.messages + messages
            if here + self._before > self._most:
                raise KeyExhausted(exhausted(self.context, self.key_version, self._most))
            self.messages = here

    def report(self, send: Callable[[str, int, int], int]) -> KeyUsage | None:
        """See :meth:`UsageBook.report`; None where there is no news."""
        news = self.messages - self._reported
        if not news:
            return None
        total = send(self.context, self.key_version, news)
        with self._lock:
            self._reported += news
        return KeyUsage(self.context, self.key_version, total)

    def begin_anew(self) -> None:
        """In a forked child: its parent reports what is counted so far."""
        self._lock = threading.Lock()
        self._before += self.messages
        self.messages = self._reported = 0


class UsageBook:
    """The counters of a process, one for each derived key, which may encrypt `most` messages."""

    def __init__(self, most: int = MOST_MESSAGES) -> None:
        self._most = most
        self._counters: dict[tuple[str, int], MessageCounter] = {}
        self._reporting = threading.Lock()
        _books.add(self)

    def counter(self, context: str, key_version: int) -> MessageCounter:
        """The counter of a key: always the same one."""
        # Of two threads that come at once, both get the first one's.
        new = MessageCounter(context, key_version, self._most)
        return self._counters.setdefault((context, key_version), new)

    def usage(self) -> tuple[KeyUsage, ...]:
        """What this process has encrypted, by key."""
        counters = list(self._counters.values())
        return tuple(sorted(KeyUsage(c.context, c.key_version, c.messages) for c in counters if c.messages))

    def report(self, send: Callable[[str, int, int], int]) -> tuple[KeyUsage, ...]:
        """Tell of what was encrypted since the last report, one thread after another.

        Args:
            send: called with context, key version and number of messages; adds them where all processes do, commits,
                and returns the sum there. Where it raises, its messages are told of again the next time; the first
                error is raised once all keys were tried.

        Returns:
            The sums, of the keys that there was news of.
        """
        sums: list[KeyUsage | None] = []
        failed: list[Exception] = []
        with self._reporting:
            for counter in list(self._counters.values()):
                # One that is refused, as of a context that the database does not know, keeps back no other.
                try:
                    sums.append(counter.report(send))
                except Exception as error:
                    failed.append(error)
        if failed:
            raise failed[0]
        return tuple(sorted(filter(None, sums)))

    def begin_anew(self) -> None:
        """In a forked child, which has one thread; the locks may have been held by another one."""
        self._reporting = threading.Lock()
        for counter in self._counters.values():
            counter.begin_anew()


_books: weakref.WeakSet[UsageBook] = weakref.WeakSet()


def _after_fork() -> None:
    for book in _books:
        book.begin_anew()


os.register_at_fork(after_in_child=_after_fork)
