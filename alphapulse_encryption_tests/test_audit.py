"""What is made of an audit's report."""

from __future__ import annotations

from alphapulse_encryption_tests.audit import LOCKS, ROOT, asked, faults, locked

REPORT = {
    "dependencies": [
        {"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.6"]}]},
        {"name": "yaml", "version": "1.0", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]},
        {"name": "rich", "version": "14.0", "vulns": []},
        {"name": "gone", "skip_reason": "Dependency not found on PyPI"},
    ]
}


def test_faults_are_named_with_the_version_that_mends_them() -> None:
    assert faults(REPORT) == [
        "jinja2 2.4.1: PYSEC-1, mended in 3.1.6",
        "yaml 1.0: PYSEC-2, mended in no version",
    ]
    assert asked(REPORT) == 3


def test_what_is_locked_is_listed_with_its_day() -> None:
    for name in LOCKS:
        found = {package: (version, day) for package, version, day in locked(ROOT / name)}
        assert {"cryptography", "psycopg", "dagster"} <= set(found)
        assert all(version[0].isdigit() for version, _ in found.values())
