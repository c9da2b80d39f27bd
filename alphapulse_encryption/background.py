"""A thread that works for the length of a block: it watches, keeps or tells something meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background(
    work: Callable[[threading.Event], None], *, name: str, patience: float | None = None
) -> Iterator[None]:
    """Run ``work`` in a thread while the block runs. It returns within ``patience`` seconds once the event is set."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=[ended], name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(patience)
