"""Writers in processes of their own, for as long as a larger table takes; and many more sequences of transactions."""

from __future__ import annotations

import pytest

from alphapulse_encryption_tests.migration.rows.test_live_writes import explore
from alphapulse_encryption_tests.stress import interleaved
from alphapulse_encryption_tests.stress.application import SHAPES, faults_named
from alphapulse_encryption_tests.stress.interleaved import Migration
from alphapulse_encryption_tests.stress.writers import Story, migrate_under_writers

pytestmark = pytest.mark.stress


def migrate(url: str, kind: str, seed: int, *, unguarded: bool = False) -> Story:
    return migrate_under_writers(
        url,
        kind,
        rows=20_000,
        writers=4,
        batch_size=100,
        seed=seed,
        between=300,
        processes=True,
        after_columns=lambda: interleaved.without_guard(url, SHAPES[kind]) if unguarded else None,
    )


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("kind", list(SHAPES))
def test_writers_at_full_speed(database_url: str, kind: str, turn: int, seed: int) -> None:
    story = migrate(database_url, kind, seed + turn)
    assert story.faults == [], faults_named(story.faults)
    assert story.switched
    assert story.quiet_steps == []
    assert story.changed_meanwhile > 0
    assert all(log.rolled_back and log.refused for log in story.logs)


def test_without_the_optimistic_check_writes_are_lost(
    database_url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    interleaved.without_check(monkeypatch)
    assert migrate(database_url, "bigint key", seed).faults


def test_without_the_guard_writes_are_lost(
    database_url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    interleaved.unnoticed(monkeypatch)
    assert migrate(database_url, "bigint key", seed, unguarded=True).faults


@pytest.mark.parametrize("kind", list(SHAPES))
def test_any_sequence_of_steps_and_transactions(database_url: str, kind: str) -> None:
    explore(Migration, database_url, kind, examples=150)
