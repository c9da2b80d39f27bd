"""The guide's validation scripts as commands, on a database of somebody else's: what they print and leave in the UI."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import dagster as dg
import psycopg

from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.place import Place

ACTS = "plaintext alone becomes pending"
WHOLE = "data is encrypted; decrypted correctly"
LIVE = [
    f"✓ sessions.token: {WHOLE}; found by its search token; ciphertext alone is refused; {ACTS}",
    f"✓ sessions.payload: {WHOLE}; ciphertext alone is refused; {ACTS}",
    f"✓ crm.order_lines.price: {WHOLE}; ciphertext alone is refused; {ACTS}",
    f"✓ crm.order_lines.note: {WHOLE}; ciphertext alone is refused; {ACTS}",
    f"✓ crm.Kunde.E-Mail: {WHOLE}; found by its search token; ciphertext alone is refused; {ACTS}",
    f"✓ crm.Kunde.geburts Tag: {WHOLE}; ciphertext alone is refused; {ACTS}",
]
QUESTIONS = [
    "sessions: one row by key",
    "sessions: 1,000 rows in key order",
    "sessions: one row by token",
]
PNG = b"\x89PNG\r\n"


def test_the_commands(theirs: Place) -> None:
    too_early = theirs.fails(1, "--live-check")
    assert "✗ Table sessions has no encrypted columns yet" in too_early.stdout
    theirs.succeeds("--add-columns", "--migrate-data")
    before = {table: another.decrypted(theirs.url, table) for table in another.TABLES}
    dumped = theirs.dump(None, "--inserts", "--schema", "crm", "--table", "sessions")

    lines = theirs.succeeds("--live-check", "--benchmark-queries", "--table", "sessions")
    assert lines[:2] == LIVE[:2]
    assert [line for line in lines if line.startswith("sessions: ")] == QUESTIONS
    assert (
        len([line for line in lines if re.fullmatch(r"    [\d.]+ times the plaintext's median", line)]) == 3
    )
    assert theirs.succeeds("--live-check") == LIVE
    assert {table: another.decrypted(theirs.url, table) for table in another.TABLES} == before
    assert theirs.dump(None, "--inserts", "--schema", "crm", "--table", "sessions") == dumped

    plot = Path(lines[-1].removeprefix("Plot: "))
    assert plot.read_bytes().startswith(PNG)
    _the_plot_is_in_the_ui(theirs, plot.read_bytes())

    with psycopg.connect(theirs.url, autocommit=True) as connection:
        connection.execute('ALTER TABLE crm."Kunde" DISABLE TRIGGER USER')
    broken = theirs.fails(1, "--live-check", "--table", "crm.Kunde")
    assert "✗ crm.Kunde.E-Mail: " in broken.stdout
    assert f"{ACTS}: no" in broken.stdout and "ciphertext alone is refused: no" in broken.stdout


def _the_plot_is_in_the_ui(theirs: Place, picture: bytes) -> None:
    with theirs.instance() as instance:
        (run,) = instance.get_runs(dg.RunsFilter(job_name="benchmark_queries"))
        metadata = next(
            event.dagster_event.step_output_data.metadata
            for event in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_OUTPUT)
            if event.dagster_event is not None
        )
    assert base64.b64encode(picture).decode() in str(metadata["plot"].value)
    (table,) = [value for name, value in metadata.items() if name == "times"]
    assert isinstance(table, dg.TableMetadataValue)
    assert [(r.data["question"], r.data["side"]) for r in table.records] == [
        (question.removeprefix("sessions: "), side)
        for question in QUESTIONS
        for side in ("encrypted", "plaintext")
    ]
