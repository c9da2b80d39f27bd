"""What children, terminals and logs get to see of secrets and values: nothing.

- A program that we start has an environment of its own, which outlives changes of ours, and which a core dump or
  `/proc` shows: no master key is in it, nor what leads to one, nor a mailbox's password.
- A terminal shows the kind of an error that nobody expected and the places it passed, never its text: a driver's quotes
  rows, pydantic's what was to be read, a KeyError its key. A crash leaves no core file, which would hold all of it.
- Libraries log keys, credentials and secret addresses at DEBUG: what they do with these is not logged.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn, ParamSpec

from alphapulse_encryption.errors import ConfigurationError, MigrationError
from alphapulse_encryption.visible import show_what_is_there

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

P = ParamSpec("P")

# What our key sources alone read; boto3 looks for its credentials in the environment itself.
_KEYS = ("ALPHAPULSE_ENCRYPTION_MASTER_KEY", "VAULT_TOKEN", "VAULT_SECRET_ID")
_KEPT_AT = "ALPHAPULSE_ENCRYPTION_KEYS_KEPT_AT"

# What PostgreSQL's programs need of it.
_NEEDED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")

# Keys; credentials of the stores that hold them, which backups to S3 use as well; where alerts go:
# whoever knows a webhook's address can post to it.
_SECRET = (
    *_KEYS,
    _KEPT_AT,
    "AWS_",
    "VAULT_",
    "ALPHAPULSE_ALERT_WEBHOOK_URL",
    "ALPHAPULSE_SMTP_URL",
    # They would reach the queue, and whoever can fill it launches runs.
    "ALPHAPULSE_CELERY_BROKER_URL",
    "ALPHAPULSE_CELERY_BACKEND_URL",
)


def bare_environment() -> dict[str, str]:
    """For programs that work for us: nothing but what any program needs."""
    return {name: os.environ[name] for name in _NEEDED if name in os.environ}


def environment_without_keys(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """For programs that a person uses, or that need our other settings."""
    environ = os.environ if environ is None else environ
    return {name: value for name, value in environ.items() if not name.startswith(_SECRET)}


def keep_keys() -> None:
    """Take the keys out of this process's environment, and keep them in its memory for :func:`with_keys`.

    What it starts then begins without them; ours ask this process for them, as long as it is there.
    Where the system has no files in memory (it is not Linux), the keys stay where they are.
    """
    keys = {name: value for name, value in with_keys().items() if name.startswith(_KEYS)}
    if keys and hasattr(os, "memfd_create"):
        kept = os.memfd_create("keys")
        os.write(kept, json.dumps(keys).encode())
        # The kernel lets nobody else's processes open it, and no child inherits it.
        os.environ[_KEPT_AT] = f"/proc/{os.getpid()}/fd/{kept}"
        for name in keys:
            os.environ.pop(name, None)


def forget_keys() -> None:
    """Keep no keys any more, and ask no process for any."""
    place = Path(os.environ.pop(_KEPT_AT, ""))
    if place.parent == Path(f"/proc/{os.getpid()}/fd"):
        os.close(int(place.name))


def with_keys() -> Mapping[str, str]:
    """This process's environment, and the keys that it, or the process that began it, has kept.

    Raises:
        ConfigurationError: that process is gone.
    """
    place = os.environ.get(_KEPT_AT)
    if place is None:
        return os.environ
    try:
        return {**json.loads(Path(place).read_text(encoding="utf-8")), **os.environ}
    except (OSError, ValueError):
        raise ConfigurationError(
            "The process that kept the master key has ended. Start this one again, by what started that one."
        ) from None


def find_fonts() -> None:
    """Before matplotlib is loaded: have it look for fonts, which it does once and keeps, in a bare process.

    It starts ``fc-list`` for that, with the environment of the process that it is in.
    """
    import matplotlib

    cache = matplotlib.get_cachedir()
    if not any(Path(cache).glob("fontlist-*.json")):
        subprocess.run(
            [sys.executable, "-c", "import matplotlib.font_manager"],
            env={**bare_environment(), "MPLCONFIGDIR": cache},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )


def private_directory(path: Path, *, passable: bool = False) -> Path:
    """Make a directory that nobody else can look into; of one that is there, take that away from others.

    Args:
        path: whose name is ours. One that an operator names may be anything, as /tmp.
        passable: whether another account may go on passing through, as the embedded server's of a superuser does.

    Raises:
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    wanted = stat.S_IMODE(found.st_mode) & (0o711 if passable else 0o700)
    if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != wanted:
        path.chmod(wanted)
    return path


def kind(error: BaseException | type[BaseException]) -> str:
    """What is told in place of its text."""
    name = (error if isinstance(error, type) else type(error)).__name__
    return f"Unexpected {name}. Its text is not kept, because it could quote data."


def places(trace: TracebackType | None) -> list[str]:
    """The places an error passed, the innermost last: file, line and function, no source and no variables."""
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(trace)]


def telling_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Have a command print an error of ours, and end with its exit status."""

    @functools.wraps(main)
    def told(*given: P.args, **named: P.kwargs) -> int:
        try:
            return main(*given, **named)
        except MigrationError as error:
            print(error, file=sys.stderr)
            return error.exit_status

    return told


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a command as a program: it tells no text of others' errors, and leaves core, keys and files to nobody."""
    show_what_is_there()
    tell_no_texts()
    leave_no_core()
    keep_keys()
    # What it makes, and what the programs make that it starts, is for its user alone.
    os.umask(0o077)
    sys.exit(main())


def tell_no_texts() -> None:
    """Have this process tell of errors that nobody caught, in any thread, without their texts."""
    sys.excepthook = _tell
    threading.excepthook = _tell_of_a_thread
    sys.unraisablehook = lambda told: _tell(told.exc_type, told.exc_value, told.exc_traceback)


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


@contextlib.contextmanager
def unlogged(name: str, *, threads_of_its_own: bool = False) -> Iterator[None]:
    """Have a logger, and those below it, log nothing of what this thread does; or any, where it has its own."""
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
