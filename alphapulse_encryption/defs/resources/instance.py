"""The Dagster instance that `make ui`, the command line and the demo share."""

import contextlib
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from dagster import DagsterError, DagsterInstance

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.errors import ConfigurationError

_HOME_VARIABLE = "DAGSTER_HOME"
_FILE = "dagster.yaml"
_CONFIGURATIONS = {"local": "dagster.yaml", "celery": "dagster-celery.yaml"}


def packaged_file(name: str) -> Path:
    """A file of this package, such as `workspace.yaml`."""
    return Path(str(resources.files(__package__) / name))


def prepare_dagster_home() -> Path:
    """Make the instance's directory, with our `dagster.yaml` in it, the one for `ALPHAPULSE_RUN_LAUNCHER`.

    A directory given by `DAGSTER_HOME` keeps the `dagster.yaml` it has; in our own it suits the installed version.
    """
    home = settings.dagster_home()
    configuration = _CONFIGURATIONS[settings.Workers().run_launcher]
    given = bool(os.environ.get(_HOME_VARIABLE, "").strip())
    try:
        if given:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            if settings.TargetVariables().state_dir is None:
                secrecy.private_directory(settings.state_dir(), passable=True)
            secrecy.private_directory(home)
        target = home / _FILE
        wanted = packaged_file(configuration).read_bytes()
        if not target.exists() or (not given and target.read_bytes() != wanted):
            # Another process may read or write it at the same time: it is replaced as a whole.
            unfinished = target.with_name(f"{target.name}.{os.getpid()}")
            unfinished.write_bytes(wanted)
            unfinished.replace(target)
    except OSError as error:
        raise ConfigurationError(
            f"{home} cannot hold Dagster's instance ({error.strerror}). "
            f"Set {_HOME_VARIABLE} to a directory you can write to."
        ) from None
    return home


@contextlib.contextmanager
def open_instance() -> Iterator[DagsterInstance]:
    """Open the instance: `DAGSTER_HOME`, or `dagster_home` in the state directory.

    The variable is set for as long as it is open: parts of Dagster read it, and so do its subprocesses.
    """
    home = prepare_dagster_home()
    before = os.environ.get(_HOME_VARIABLE)
    os.environ[_HOME_VARIABLE] = str(home)
    try:
        try:
            instance = DagsterInstance.get()
        except DagsterError:
            # Its message would quote the file, which may hold a password.
            raise ConfigurationError(
                f"{home / _FILE} is not valid. Correct it, or remove it and run this "
                "again to get the packaged one."
            ) from None
        with instance:
            yield instance
    finally:
        if before is None:
            del os.environ[_HOME_VARIABLE]
        else:
            os.environ[_HOME_VARIABLE] = before
