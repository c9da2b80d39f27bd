"""``--rehearse``, as a person at a terminal sees it; ``make rehearsal`` is nothing else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.__main__ import main
from alphapulse_encryption.cli.rehearse import _make_staging_copy
from alphapulse_encryption.rehearsal.measures import Stage
from alphapulse_encryption.sample.database import loaded_sample
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import forked
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.migration.walk import query
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.rehearsal.circle import clones

LINE = re.compile(r"✓ (\w+) +\d+\.\d s")


def test_on_a_bare_machine(server_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded server, a staging copy of the sample and its key are made; the sample itself is not there."""
    server = EmbeddedPostgres(server_dir, settings=UNSAFE_SETTINGS)
    environment = {
        **{n: v for n, v in os.environ.items() if not n.startswith(("ALPHAPULSE_", "DAGSTER_", "PG"))},
        "ALPHAPULSE_STATE_DIR": str(server_dir.parent),
        "ALPHAPULSE_BATCH_RANGES": "2",
    }

    def rehearse(*arguments: str) -> str:
        given = ("--rehearse", "--table", "api_keys", "--rate", "0", *arguments)
        done = forked.run("alphapulse_encryption", given, environment)
        assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
        return done.stdout

    with server:
        said = rehearse("--rows", "1000")
        assert "Loaded the sample's staging copy: 1,000 rows" in said
        assert LINE.findall(said) == list(Stage)
        assert "✓ The rehearsal went all the way there and back" in said
        (page,) = re.findall(r"^  Report: (.*)$", said, re.MULTILINE)
        assert Path(page).read_text().startswith("<!DOCTYPE html>")
        with pytest.MonkeyPatch.context() as patch:
            for name, text in environment.items():
                patch.setenv(name, text)
            for name in os.environ.keys() - environment.keys():
                patch.delenv(name)
            # Of another size, it is made anew; otherwise it is left as it is.
            _make_staging_copy(1100)
            assert capsys.readouterr().out == "Loaded the sample's staging copy: 1,100 rows\n"
            _make_staging_copy(None)
            assert capsys.readouterr().out == "The sample's staging copy is there: 1,100 rows\n"
        url = server.url("alphapulse_staging")
        assert loaded_sample(url) == 1100
        databases = {
            name for (name,) in query(url, "SELECT datname FROM pg_database WHERE NOT datistemplate")
        }
    assert databases == {"postgres", "dagster", "alphapulse_staging"}


def test_how_it_ends_otherwise(small: Place) -> None:
    quiet = ("--rehearse", "--rate", "0")
    query(small.url, 'CREATE VIEW addresses AS SELECT "E-Mail" FROM crm."Kunde"')
    done = small.fails(1, *quiet, "--table", "crm.Kunde", "--keep-clone")
    assert [*LINE.findall(done.stdout)] == list(Stage)[: list(Stage).index(Stage.APPROVAL)]
    assert "✗ The rehearsal failed in approval, because: Other objects depend on the plaintext" in done.stdout
    # It is kept for a while, to go on after a correction; and goes with the next rehearsal.
    (kept,) = clones(small)
    query(small.url, "DROP VIEW addresses")
    small.succeeds(*quiet, "--table", "sessions", "--keep-clone")
    (left,) = clones(small)
    assert left != kept
    assert query(small.postgres.url(left), "SELECT count(*) FROM sessions") == [(60,)]
    wrong = small.fails(1, *quiet, "--table", "sessions", ALPHAPULSE_DATABASE_URL=small.url)
    assert "are the same database" in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "2000"], "--rows goes with --rehearse"),
        (["--rate", "0", "--verify"], "--rate goes with --rehearse"),
        (["--keep-clone", "--verify"], "--keep-clone goes with --rehearse"),
        (["--rehearse", "--verify"], "to be given without a step"),
        (["--rehearse", "--pause"], "to be given without a step"),
        (["--rehearse", "--rows", "10"], "at least 1000"),
        (["--rehearse", "--rate", "1001"], "up to 1000"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert says in capsys.readouterr().err


def test_rows_are_the_samples(small: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with small.in_environment():
        assert main(["--rehearse", "--rows", "2000"]) == 2
        assert main(["--rehearse", "--table", "nobody"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    assert clones(small) == []


def test_what_was_never_loaded_is_no_sample(small: Place) -> None:
    assert loaded_sample(small.url) is None
    with psycopg.connect(small.url) as connection:
        connection.execute("COMMENT ON TABLE sessions IS 'AlphaPulse sample of 5 rows, seed 1'")
    assert loaded_sample(small.url) is None
