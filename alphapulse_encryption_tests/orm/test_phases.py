"""Phases: where they come from, and that a phase which contradicts the database is found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.orm import Phase, check_phases, configure, reset_phases
from alphapulse_encryption.orm.phases import phase_of
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.orm import models
from alphapulse_encryption_tests.orm.conftest import Place

VARIABLE = "ALPHAPULSE_ENCRYPTION_PHASE"


def test_the_phase_is_off_where_nothing_says_otherwise() -> None:
    assert phase_of("users") is Phase.OFF


def test_the_environment_names_one_phase_or_one_for_each_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "dual")
    assert phase_of("users") is Phase.DUAL
    reset_phases()
    monkeypatch.setenv(VARIABLE, " plaintext, users = dual,crm.people=encrypted ")
    assert [phase_of(name) for name in ("users", "crm.people", "trades")] == [
        "dual",
        "encrypted",
        "plaintext",
    ]
    reset_phases()
    monkeypatch.setenv(VARIABLE, "users=dual")
    assert [phase_of(name) for name in ("users", "trades")] == ["dual", "off"]


@pytest.mark.parametrize(
    "text", ["both", "DUAL", "dual,plaintext", "users=dual,users=off", "=dual", "users="]
)
def test_a_phase_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigurationError, match=VARIABLE):
        phase_of("users")


def test_what_is_configured_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "dual")
    configure(phase="plaintext", tables={"users": Phase.ENCRYPTED})
    assert [phase_of(name) for name in ("users", "trades")] == ["encrypted", "plaintext"]
    reset_phases()
    configure(tables={"users": "off"})
    assert [phase_of(name) for name in ("users", "trades")] == ["off", "dual"]
    with pytest.raises(ConfigurationError, match="must be one of off, plaintext, dual, encrypted"):
        configure(phase="ciphertext")


def test_a_phase_cannot_change_once_a_model_was_declared() -> None:
    models.declare("plaintext")
    with pytest.raises(ConfigurationError, match=r"too late for people: .* in the phase plaintext, not dual"):
        configure(phase="dual")
    configure(phase="dual", tables={"people": "plaintext"})
    assert phase_of("people") is Phase.PLAINTEXT


RIGHT = {
    "plain": {"off"},
    "columns": {"off", "plaintext", "dual"},
    "switched": {"dual", "encrypted"},
    "dropped": {"encrypted"},
    "restoring": {"dual", "encrypted"},
    "reverted": {"off", "plaintext"},
}


@pytest.mark.parametrize("stage", RIGHT)
def test_a_phase_that_contradicts_the_database_is_refused(at: Callable[..., Place], stage: str) -> None:
    begun = {"restoring": "dropped", "reverted": "switched"}.get(stage, stage)
    place = at("off", begun)
    if stage == "reverted":
        revert_to_plaintext(support.target(place.url), models.ENTRY)
    if stage == "restoring":
        support.run(place.url, "UPDATE alphapulse_encryption.tables SET stage = 'restoring'")
    for phase in Phase:
        models.declare(phase)
        if phase in RIGHT[stage]:
            assert check_phases(place.engine) == {"people": phase}
            continue
        with pytest.raises(RefusedError, match=f"table people is used in the phase {phase}, but") as caught:
            check_phases(place.engine)
        message = str(caught.value)
        assert " or ".join(name for name in Phase if name in RIGHT[stage]) + " is right now" in message
        assert message.endswith("Nothing was changed.")
        with place.engine.connect() as connection, pytest.raises(RefusedError):
            check_phases(connection)


def test_phases_are_checked_over_an_asynchronous_connection(at: Callable[..., Place]) -> None:
    place = at("encrypted", "columns")

    async def check() -> None:
        engine = create_async_engine(models.sqlalchemy_url(place.url))
        async with engine.connect() as connection:
            await connection.run_sync(check_phases)

    with pytest.raises(RefusedError, match="its plaintext is right"):
        asyncio.run(check())


def test_only_the_tables_that_contradict_are_named(at: Callable[..., Place]) -> None:
    place = at("dual", "columns")
    phase_of("elsewhere.others")
    with pytest.raises(RefusedError, match=r"table elsewhere\.others .* no encrypted columns yet") as caught:
        check_phases(place.engine)
    assert "people" not in str(caught.value)
