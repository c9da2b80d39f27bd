"""Which versions have which known faults, and that preflight names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.postgres.known_faults import OF_CLIENTS, OF_SERVERS, split, told
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk


# The advisories' own words: "Versions before PostgreSQL 17.6, 16.10, 15.14, 14.19, and 13.22 are affected."
@pytest.mark.parametrize(
    ("version", "name", "has"),
    [
        ((17, 5), "CVE-2025-8715", True),
        ((17, 6), "CVE-2025-8715", False),
        ((16, 9), "CVE-2025-8714", True),
        ((16, 10), "CVE-2025-8714", False),
        ((18, 0), "CVE-2025-8715", False),
        ((18, 0), "CVE-2025-12818", True),
        ((14, 12), "CVE-2024-7348", True),
        ((17, 0), "CVE-2024-7348", False),
        ((13, 22), "CVE-2025-8715", True),
        ((19, 0), "CVE-2026-6477", False),
    ],
)
def test_a_clients_version(version: tuple[int, int], name: str, has: bool) -> None:
    assert (name in told(OF_CLIENTS, version)) is has


def test_a_servers_version() -> None:
    assert "15.3" in told(OF_SERVERS, split(150_002))
    assert "CVE-2023-2454" not in told(OF_SERVERS, split(150_003))
    assert "CVE-2024-10979" in told(OF_SERVERS, split(170_000))
    assert told(OF_SERVERS, (19, 0)) == ""


def test_preflight_names_programs_with_known_faults(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Programs of a minor version that is older than the server's own."""
    for name in ("pg_dump", "pg_restore"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "{name} (PostgreSQL) 18.0" && exit\n'
            f'exec {postgres.bin_dir() / name} "$@"\n'
        )
        program.chmod(0o755)
    report = check(Database(sample_url), walk.CATALOGUE.tables, walk.KEYS, bin_dirs=[tmp_path])
    (found,) = [each for each in report.warnings if each.subject == "client programs"]
    for word in ("18.0", "CVE-2026-6477", "18.4", str(tmp_path), "postgresql-client-18"):
        assert word in found.message
    assert "CVE-2025-8715" not in found.message
    report = check(Database(sample_url), walk.CATALOGUE.tables, walk.KEYS, bin_dirs=[postgres.bin_dir()])
    assert [each for each in report.warnings if each.subject == "client programs"] == []
