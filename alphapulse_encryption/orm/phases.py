"""Which side of an encrypted attribute this process reads and writes: its phase, set in one place.

Belongs here: the phases, where they come from, and holding them against the database. What a phase makes of a
declaration is in `declaration`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from enum import StrEnum

from sqlalchemy import Connection, Engine, text

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.lifecycle import State, decode

PHASE_VARIABLE = "ALPHAPULSE_ENCRYPTION_PHASE"


class Phase(StrEnum):
    """What a process does with the encrypted attributes of a table, in the order of the journey."""

    OFF = "off"
    """Plaintext columns only: the encrypted columns need not exist and are not named."""
    PLAINTEXT = "plaintext"
    """Reads plaintext, writes both sides."""
    DUAL = "dual"
    """Reads ciphertext, and plaintext where the value is pending; writes both sides."""
    ENCRYPTED = "encrypted"
    """Ciphertext only: the plaintext columns need not exist and are not named."""


_lock = threading.Lock()
# By table, that of all others under the empty name.
_configured: dict[str, Phase] = {}
# What is settled: a table's phase is when its first attribute is declared.
_declared: dict[str, Phase] = {}


def configure(phase: Phase | str | None = None, tables: Mapping[str, Phase | str] | None = None) -> None:
    """Set the phase of this process, before the models are declared.

    What is set here goes before the environment variable ``ALPHAPULSE_ENCRYPTION_PHASE``; where neither says
    anything of a table, its phase is ``off``.

    Args:
        phase: of all tables that `tables` does not name; None leaves that to the environment.
        tables: by name, or ``schema.name`` outside ``public``: the switch goes table by table, and so may the phases.

    Raises:
        ConfigurationError: there is no such phase, or a table was declared in another one already.
    """
    phases = {
        name: _parse(value, f"configure(tables={{{name!r}: ...}})") for name, value in (tables or {}).items()
    }
    if phase is not None:
        phases[""] = _parse(phase, "configure(phase=...)")
    with _lock:
        for table, declared in _declared.items():
            wanted = _phase(table, phases)
            if wanted is not declared:
                raise ConfigurationError(
                    f"configure() comes too late for {table}: its model was declared in the phase {declared}, not "
                    f"{wanted}. Call it before the models are imported; nothing was changed."
                )
        _configured.clear()
        _configured.update(phases)


def phase_of(table: str) -> Phase:
    """The phase of a table (``name``, or ``schema.name`` outside ``public``); from then on it cannot change."""
    with _lock:
        return _declared.setdefault(table, _phase(table, _configured))


def reset_phases() -> None:
    """Forget what was configured and which tables were declared: for tests that declare models in several phases."""
    with _lock:
        _configured.clear()
        _declared.clear()


def _phase(table: str, configured: Mapping[str, Phase]) -> Phase:
    found = configured.get(table) or configured.get("")
    if found is None:
        environment = _from_environment()
        found = environment.get(table) or environment.get("")
    return found or Phase.OFF


def _from_environment() -> dict[str, Phase]:
    """As what is configured: of ``dual`` or ``plaintext,users=dual``."""
    phases: dict[str, Phase] = {}
    for entry in os.environ.get(PHASE_VARIABLE, "").split(","):
        table, separator, phase = entry.rpartition("=")
        if entry.strip():
            name = table.strip()
            if (separator and not name) or name in phases:
                raise ConfigurationError(
                    f"{PHASE_VARIABLE} must be one phase, or a list as in plaintext,users=dual that names each "
                    "table once."
                )
            phases[name] = _parse(phase.strip(), PHASE_VARIABLE)
    return phases


def _parse(phase: Phase | str, name: str) -> Phase:
    try:
        return Phase(phase)
    except ValueError:
        pass
    raise ConfigurationError(f"{name} must be one of {', '.join(Phase)}.")


# What the bookkeeping shows to applications: a view, so that this library, which imports nothing of the engine, goes on
# reading it whatever the tables behind it are.
_VIEW = text("SELECT to_regclass('public.encryption_tables')")
_READ_STATES = text(
    "SELECT table_name, authority, stage, coalesce((set_aside ->> 'unguarded')::boolean, false) "
    "FROM public.encryption_tables"
)


def check_phases(bind: Engine | Connection) -> dict[str, Phase]:
    """Hold the phase of every declared table against the database; call it when an instance starts.

    It reads the view ``encryption_tables``, which the application's role needs ``SELECT`` on. With an asynchronous
    engine: ``await connection.run_sync(check_phases)``. The phases by table are returned.

    Raises:
        RefusedError: a table's phase contradicts where the migration stands; the message names all of them and says
            which phases are right now, and what to do.
    """
    if isinstance(bind, Engine):
        with bind.connect() as connection:
            return check_phases(connection)
    states: dict[str, State] = {}
    if bind.execute(_VIEW).scalar_one() is not None:
        for table, authority, stage, unguarded in bind.execute(_READ_STATES):
            # What is set aside changes nothing for an application.
            states[table] = decode(authority, stage, unguarded=unguarded, set_aside=False)
    declared = dict(_declared)
    problems = []
    for table, phase in sorted(declared.items()):
        state = states.get(table, State.UNTOUCHED)
        if phase not in state.phases:
            problems.append(
                f"table {table} is used in the phase {phase}, but {state.words}: "
                f"{' or '.join(state.phases)} is right now. {state.advice}, or set {PHASE_VARIABLE} accordingly"
            )
    if problems:
        raise RefusedError("; ".join(problems) + ". Nothing was changed.")
    return declared
