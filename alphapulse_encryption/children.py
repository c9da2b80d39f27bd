"""What programs that we start get of our environment: never a master key, what leads to one, or a mailbox's password.

A child's environment is its own: it outlives changes of ours, and a core dump or `/proc` shows it.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# What PostgreSQL's programs need of it.
_NEEDED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")

# Keys; credentials of the stores that hold them, which backups to S3 use as well; where alerts go:
# whoever knows a webhook's address can post to it.
_SECRET = (
    "ALPHAPULSE_ENCRYPTION_MASTER_KEY",
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
    """For programs that a person uses, or that need our other settings.

    Args:
        environ: the variables; None for those of the process.
    """
    environ = os.environ if environ is None else environ
    return {name: value for name, value in environ.items() if not name.startswith(_SECRET)}


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
