"""The application's ciphers, one of each per process, with the keys that the environment describes."""

import logging
from collections.abc import Callable, Sequence
from functools import cache

from alphapulse_encryption.crypto.cipher import FieldCipher, SearchableCipher
from alphapulse_encryption.crypto.envelope import AES_256_GCM, get_format
from alphapulse_encryption.crypto.text import MaybeText
from alphapulse_encryption.crypto.usage import KeyUsage, UsageBook
from alphapulse_encryption.keysources import load_key_ring

_logger = logging.getLogger("alphapulse_encryption")

# Outlives the ciphers: what was encrypted before new keys are loaded counts as well.
_usage = UsageBook()


def get_cipher() -> FieldCipher:
    """The cipher of this process; see `get_searchable_cipher`."""
    return get_searchable_cipher()


@cache
def get_searchable_cipher() -> SearchableCipher:
    """The cipher of this process, with search tokens. The first call loads the keys, or raises ConfigurationError."""
    keys = load_key_ring()
    return SearchableCipher(get_format(AES_256_GCM, keys, _usage), keys)


def encrypt_field(value: MaybeText, context: str) -> MaybeText:
    """The envelope of a value; see `FieldCipher.encrypt`."""
    return get_searchable_cipher().encrypt(value, context)


def decrypt_field(envelope: MaybeText, context: str) -> MaybeText:
    """The value in an envelope; see `FieldCipher.decrypt`."""
    return get_searchable_cipher().decrypt(envelope, context)


def key_usage() -> tuple[KeyUsage, ...]:
    """How many values this process has encrypted, by context and key version; a forked child begins anew."""
    return _usage.usage()


def report_key_usage(send: Callable[[str, int, int], int]) -> tuple[KeyUsage, ...]:
    """Add what this process has encrypted since its last report to what all processes have.

    To be called from time to time and at the end of the process. From 2^31 values of all processes on, a warning is
    logged (logger `alphapulse_encryption`). Only what this process has encrypted itself, 2^32 values under one key, is
    refused: what others report is their word.

    Args:
        send: called with context, key version and number of values, for each key with news. It has to run
            `SELECT encryption_report_key_usage(context, key_version, messages)` in the migrated database, commit, and
            return what that returns, the sum of all processes. If it raises, its values are reported the next time.

    Returns:
        The sums, of the keys that there was news of.
    """
    sums = _usage.report(send)
    for usage in sums:
        warning = usage.warning()
        if warning is not None:
            _logger.warning("%s", warning)
    return sums


def encrypt_fields(values: Sequence[str | None], context: str) -> list[str | None]:
    """The envelopes of many values of one context; see `FieldCipher.encrypt_many`."""
    return get_searchable_cipher().encrypt_many(values, context)


def decrypt_fields(envelopes: Sequence[str | None], context: str) -> list[str | None]:
    """The values in many envelopes of one context; see `FieldCipher.decrypt_many`."""
    return get_searchable_cipher().decrypt_many(envelopes, context)


def reset_ciphers() -> None:
    """Forget the keys of this process: the next use loads them again, as after a key rotation.

    Ciphers that were handed out before keep the keys they have.
    """
    get_searchable_cipher.cache_clear()
