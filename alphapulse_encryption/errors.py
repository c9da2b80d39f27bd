"""The errors an operator may see. Their messages are written to be shown: never a value, a key or a DSN."""

from collections.abc import Mapping

from alphapulse_encryption.visible import visible


class MigrationError(Exception):
    """Base of every error raised on purpose by this package.

    The message names the thing, what is wrong and what to do, without user data or secrets: it can be stored.
    """

    exit_status = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(visible(a) if isinstance(a, str) else a for a in arguments))


class ConfigurationError(MigrationError):
    """Wrong usage or configuration: nothing was begun (exit status 2)."""

    exit_status = 2


class RefusedError(MigrationError):
    """The step would not be safe now; nothing was changed (exit status 1)."""


class TablesFailed(MigrationError):
    """A step did not succeed for some tables, and did for the others.

    Args:
        told: the end of the message, behind what is wrong with each table.
        failed: that, by the table's name.
    """

    def __init__(self, told: str, failed: Mapping[str, str]) -> None:
        super().__init__("\n".join((*failed.values(), told)).rstrip())
        self.failed = failed


class KeyExhausted(RefusedError):
    """A derived key has encrypted as many messages as it safely can; nothing more was encrypted."""


class DatabaseFailure(MigrationError):
    """PostgreSQL refused a statement. Carries the SQLSTATE, never the server's DETAIL, which quotes rows.

    There is no SQLSTATE where the connection itself failed.
    """

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class DecryptionError(MigrationError):
    """A stored value is not a readable envelope, or not one for this column and key."""


class LeftRunning(KeyboardInterrupt):
    """Somebody stopped a command that waited for runs on other machines: they go on. The text says how to stop them."""
