"""The guide's step 5 and its validation scripts, run as they are written, in every phase and after every step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import forked
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.sample.application import snippets
from alphapulse_encryption_tests.sample.application.instances import environment

USERS = walk.CATALOGUE.table("users")
SCRIPTS = ("test_encryption_live", "benchmark_encryption")
EVERYTHING = ("old", "new", *SCRIPTS)


def run(url: str, phase: str, *names: str) -> dict[str, dict[str, Any]]:
    """Blocks of the guide in an instance whose table `users` is in this phase."""
    done = forked.run(snippets.__name__, names, environment(url, f"off,users={phase}"))
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def finds(url: str, phase: str, number: int, *names: str) -> None:
    """All of the blocks do what the guide says, and leave the table as it was."""
    before = support.fingerprints(url, USERS)
    found = run(url, phase, *names)
    assert support.fingerprints(url, USERS) == before
    for name in {"old", "new"} & set(names):
        assert found[name] == {"printed": "", "found": [number, "user@example.com"]}
    if "test_encryption_live" in names:
        printed = found["test_encryption_live"]["printed"]
        assert printed == "Email decrypted correctly: True\nData is encrypted: True\n"
    if "benchmark_encryption" in names:
        printed = found["benchmark_encryption"]["printed"]
        assert re.fullmatch(
            r"Encrypted query time: \d+\.\d{3}s for \d{3} records\nAverage per record: \d+\.\d\dms\n", printed
        )


def test_the_blocks_are_the_guides() -> None:
    found = snippets.blocks()
    assert set(found) == set(EVERYTHING)
    assert 'filter_by(email="user@example.com")' in found["old"]
    assert "filter_by(email_search=search_token)" in found["new"]
    assert "raw[0].startswith('{')" in found["test_encryption_live"]
    assert not [name for name, code in found.items() if "alpha_pulse." in code]


def test_in_every_phase(sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    url, database = sample_url, Database(sample_url)
    number = walk.value(
        url,
        "INSERT INTO users (username, email, password_hash) VALUES ('guide', 'user@example.com', 'x') RETURNING id",
    )
    finds(url, "off", number, "old")

    support.add_columns(url, USERS, ranges=walk.RANGES, keys=walk.KEYS)
    finds(url, "off", number, "old")
    # What the new code asks for is there when the backfill is done.
    finds(url, "plaintext", number, "old", "test_encryption_live")
    finds(url, "dual", number, "old", "test_encryption_live")
    walk.encrypt(url, USERS)
    for phase in ("plaintext", "dual"):
        finds(url, phase, number, *EVERYTHING)

    walk.verify(url, USERS)
    switch_to_ciphertext(walk.target(database), USERS)
    for phase in ("dual", "encrypted"):
        finds(url, phase, number, *EVERYTHING)

    walk.verify(url, USERS)
    walk.backup(url, (USERS,), tmp_path, postgres.bin_dir())
    walk.approve(url, USERS)
    walk.drop(url, USERS)
    finds(url, "encrypted", number, *EVERYTHING)

    restore_plaintext(walk.target(database), USERS, hold=True)
    finds(url, "dual", number, *EVERYTHING)
    restore_plaintext(walk.target(database), USERS)
    finds(url, "plaintext", number, *EVERYTHING)
    revert_to_plaintext(walk.target(database), USERS)
    finds(url, "plaintext", number, *EVERYTHING)
    finds(url, "off", number, "old")
