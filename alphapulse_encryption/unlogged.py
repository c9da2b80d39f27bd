"""Keeps what libraries log at DEBUG out of the log where it would quote a key, a credential or a secret address."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unlogged(name: str, *, threads_of_its_own: bool = False) -> Iterator[None]:
    """Have a logger, and those below it, log nothing of what this thread does.

    Args:
        name: of the logger.
        threads_of_its_own: the library works in threads that it starts, so that nothing of any thread is logged.
    """
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return not threads_of_its_own and record.thread != thread

    # A filter holds for records of its own logger only, not for those of loggers below it.
    below = [known for known in list(logging.root.manager.loggerDict) if known.startswith(f"{name}.")]
    loggers = [logging.getLogger(known) for known in (name, *below)]
    for logger in loggers:
        logger.addFilter(of_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(of_others)
