"""What a terminal shows of an error that nobody expected: its kind and the places it passed, never its text.

A driver's text quotes rows, pydantic's what was to be read, a KeyError its key; and a file in which a crash left the
memory of a process holds all of it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from types import TracebackType

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


def kind(error: BaseException | type[BaseException]) -> str:
    """What is told in place of its text."""
    name = (error if isinstance(error, type) else type(error)).__name__
    return f"Unexpected {name}. Its text is not kept, because it could quote data."


def places(trace: TracebackType | None) -> list[str]:
    """The places an error passed, the innermost last: file, line and function, no source and no variables."""
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(trace)]


def tell_no_texts() -> None:
    """Have this process tell of errors that nobody caught, in any thread, without their texts."""
    sys.excepthook = _tell
    threading.excepthook = _tell_of_a_thread
    sys.unraisablehook = _tell_of_a_finalizer


def leave_no_core() -> None:
    """Have the kernel write no core file of this process, or of those that it starts (``setrlimit(2)``)."""
    if resource is not None:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _tell(error: type[BaseException], _: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return
    print(f"{kind(error)} Where:", *places(trace), sep="\n  ", file=sys.stderr)


def _tell_of_a_thread(arguments: threading.ExceptHookArgs) -> None:
    if not issubclass(arguments.exc_type, SystemExit):
        _tell(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


def _tell_of_a_finalizer(arguments: sys.UnraisableHookArgs) -> None:
    _tell(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
