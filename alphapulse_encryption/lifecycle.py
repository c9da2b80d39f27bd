"""The life of a table in the migration, declared once: its states, and which step leads from one to another.

Refusals, `--status`, the plan, the phases of the application and the diagram in the manual derive from it. How a state
is kept belongs to the bookkeeping; what a step does to a table belongs to the step.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, NamedTuple, Self

Authority = Literal["plaintext", "ciphertext"]
# What reports call it.
Stage = Literal["not begun", "columns", "reverted", "dropped", "restoring"]


# Which side is the source of truth, what reports call the state, the phases in which instances of the application may
# use the table, the state in words whose subject is the table, and what an instance in another phase is to wait for.
_Meaning = tuple[Authority, Stage, tuple[str, ...], str, str]

_ON_PLAINTEXT: _Meaning = (
    "plaintext",
    "columns",
    ("off", "plaintext", "dual"),
    "its plaintext is right, and ciphertext alone is refused",
    "Run --switch-to-encrypted once every instance is in the phase dual",
)
_RESTORING = (
    ("dual", "encrypted"),
    "its plaintext columns are being rebuilt and are not complete",
    "Bring every instance to the phase dual, then end it with --restore-plaintext",
)


class State(StrEnum):
    """Where a table stands. Whether it is *verified* is no state: evidence says so, against the rows as they are."""

    UNTOUCHED = (
        "untouched",
        "plaintext",
        "not begun",
        ("off",),
        "it has no encrypted columns yet",
        "Run --add-columns first",
    )
    GUARDED = ("guarded", *_ON_PLAINTEXT)
    SWITCHED = (
        "switched",
        "ciphertext",
        "columns",
        ("dual", "encrypted"),
        "its ciphertext is right, and the plaintext of what is written encrypted is gone",
        "To go back, bring every instance to the phase dual and run --revert-to-plaintext",
    )
    # The plaintext is the source of truth again; its NOT NULL is a check still.
    REVERTING = ("reverting", *_ON_PLAINTEXT)
    REVERTED = (
        "reverted",
        "plaintext",
        "reverted",
        ("off", "plaintext"),
        "it was reverted to plaintext, and its ciphertext may be older than its plaintext",
        "Begin again with --add-columns before anything reads ciphertext",
    )
    DROPPED = (
        "dropped",
        "ciphertext",
        "dropped",
        ("encrypted",),
        "its plaintext columns were dropped",
        "To go back, run --restore-plaintext --hold",
    )
    # The plaintext columns are there again, and being filled.
    RESTORING = ("restoring", "ciphertext", "restoring", *_RESTORING)
    # They are filled and the source of truth; their NOT NULL is a check still.
    RESTORED = ("restored", "plaintext", "restoring", *_RESTORING)

    authority: Authority
    stage: Stage
    phases: tuple[str, ...]
    words: str
    advice: str

    def __new__(cls, name: str, *meaning: Any) -> Self:
        state = str.__new__(cls, name)
        state._value_ = name
        state.authority, state.stage, state.phases, state.words, state.advice = meaning
        return state

    @property
    def has_both_sides(self) -> bool:
        """Whether plaintext and encrypted columns are there, and complete."""
        return self.stage in ("columns", "reverted")

    @property
    def is_guarded(self) -> bool:
        """Whether the guard is on the table."""
        return self.stage in ("columns", "restoring")


class Transition(NamedTuple):
    """A step that brings a table from one state to another; besides the state it needs something, in words."""

    step: str
    before: State
    after: State
    needs: str = ""


TRANSITIONS = (
    Transition("--add-columns", State.UNTOUCHED, State.GUARDED, "preflight without blockers"),
    Transition("--switch-to-encrypted", State.GUARDED, State.SWITCHED, "verified, nothing pending"),
    Transition("--drop-unencrypted", State.SWITCHED, State.DROPPED, "verified, backup, approval"),
    Transition("--revert-to-plaintext", State.SWITCHED, State.REVERTING, "every value decrypted"),
    Transition("--revert-to-plaintext", State.REVERTING, State.GUARDED),
    Transition("--revert-to-plaintext", State.GUARDED, State.REVERTED),
    Transition("--add-columns", State.REVERTED, State.GUARDED, "old ciphertext discarded"),
    Transition("--restore-plaintext", State.DROPPED, State.RESTORING, "definition saved at the drop"),
    Transition("--restore-plaintext", State.RESTORING, State.RESTORED, "every value decrypted"),
    Transition("--restore-plaintext", State.RESTORED, State.GUARDED),
)


def leads(before: State, after: State) -> bool:
    return any((t.before, t.after) == (before, after) for t in TRANSITIONS)


def decode(authority: str, stage: str, *, unguarded: bool, set_aside: bool) -> State:
    """The state of a table that the bookkeeping knows.

    Args:
        stage: as it is kept: ``columns``, ``dropped`` or ``restoring``.
        unguarded: a revert has taken the guard away.
        set_aside: something of the plaintext columns is to be put back.
    """
    if stage == "dropped":
        return State.DROPPED
    if stage == "restoring":
        return State.RESTORING if authority == "ciphertext" else State.RESTORED
    if unguarded:
        return State.REVERTED
    if authority == "ciphertext":
        return State.SWITCHED
    return State.REVERTING if set_aside else State.GUARDED
