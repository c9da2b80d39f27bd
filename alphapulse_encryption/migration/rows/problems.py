"""What may be wrong with a value, what of it a repair clears, and what to type about each.

Belongs here: which step helps with which problem, as a table stands. Who finds them is ``verify``, who clears them
``repair``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.lifecycle import State

Problem = Literal[
    # Plaintext without ciphertext or token.
    "pending",
    # The same, in a row that the backfill had to set aside.
    "quarantined",
    # Decrypted to something else, or there without its plaintext.
    "mismatched",
    # Not a readable envelope of this column.
    "undecryptable",
    # The search token is not that of the value, under the key version of its ciphertext.
    "token_mismatched",
    # Right, but of a key version that is retired, whose key may be gone tomorrow.
    "retired_key",
]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)


def cleared(column: Column) -> tuple[Problem, ...]:
    """What of a column a repair clears: a pending value needs none, and of adopted tokens none is overwritten."""
    found: tuple[Problem, ...] = ("mismatched", "undecryptable")
    return found if column.adopt else (*found, "token_mismatched")


def is_repairable(state: State) -> bool:
    """Whether the plaintext is there and right, so that a ciphertext may be cleared."""
    return state.has_both_sides and state.authority == "plaintext"


def advice(table: Table, state: State, counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """What helps, each with the next command.

    Args:
        counts: by column, how many values have which problem; none where the table has to be verified first.
    """
    of = f"--table {table.key}"
    found = {(column, kind) for column in table.columns for kind in PROBLEMS if counts[column.name][kind]}
    kinds = {kind for _, kind in found}
    if "pending" in kinds:
        yield f"Encrypt what is pending (--migrate-data --verify {of})."
    if "quarantined" in kinds:
        yield (
            "Correct the rows that alphapulse_encryption.quarantine names, then encrypt them (--migrate-data --verify "
            f"{of})."
        )
    if "undecryptable" in kinds:
        yield (
            "Look whether the application writes a key version or a context that is not known here (--check-key, "
            "ALPHAPULSE_ENCRYPTION_READABLE_KEY_VERSIONS)."
        )
    wrong = {
        (column, kind)
        for column, kind in found
        if kind in ("mismatched", "undecryptable", "token_mismatched")
    }
    repaired = {(column, kind) for column, kind in wrong if is_repairable(state) and kind in cleared(column)}
    if repaired:
        yield (
            "Find who writes plaintext and ciphertext differently. The plaintext is right: clear what is wrong beside "
            f"it, and encrypt it again (--repair-mismatched --migrate-data --verify {of})."
        )
    if any(column.adopt for column, _ in repaired):
        yield "An adopted ciphertext without plaintext is kept: have the application write its plaintext."
    kept = [column for column in table.columns if (column, "token_mismatched") in wrong - repaired]
    if kept and is_repairable(state):
        for column in kept:
            yield (
                "A repair keeps adopted tokens. Have the application correct them, or clear such a row "
                f"({_clear(table, column)}) and encrypt it again (--migrate-data --verify {of})."
            )
    elif wrong - repaired:
        yield (
            "The ciphertext may be the only copy, and no step clears it. Have the application write such values again, "
            f"then verify them (--verify {of})."
        )
    if "retired_key" in kinds:
        yield (
            "Stop the instance that writes a retired key version, then encrypt its values again (--rotate-keys "
            f"{of})."
        )
    if not found:
        yield f"Verify it (--verify {of})."


def _clear(table: Table, column: Column) -> str:
    """The statement, for a person to type, after which a row is pending."""
    names = [Identifier(name) for name in (column.name, *column.derived)]
    text = SQL("UPDATE {} SET {} = {}, {} = NULL, {} = NULL WHERE …").format(
        Identifier(table.schema_name, table.name), names[0], *names
    )
    return text.as_string(None)
