"""A thread that works for the length of a block: it watches, keeps or tells something meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(
    work: Callable[[threading.Event], None], *, name: str, patience: float | None = None
) -> Iterator[None]:
    """Run ``work`` in a thread while the block runs.

    Args:
        work: is to return once the event is set, and waits between two looks with its ``wait``.
        patience: how many seconds it may take to return after that; None for any time.
    """
    ended = threading.Event()
    thread = threading.Thread(target=work, args=[ended], name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(patience)
