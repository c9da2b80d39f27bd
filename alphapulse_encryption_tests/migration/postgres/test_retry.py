"""Which errors of the server speak of a single row."""

from __future__ import annotations

import psycopg
import pytest

from alphapulse_encryption.migration.postgres import retry
from alphapulse_encryption_tests.migration import support


@pytest.mark.parametrize(
    ("message", "so"),
    [
        # As the server says it of a bytea above 512 MB, whose text would have more than 1 GB.
        ("invalid memory alloc request size 1200000003", True),
        ("cache lookup failed for type 4711", False),
    ],
)
def test_an_internal_error_is_a_row_s_where_its_value_is_too_large(
    database_url: str, message: str, so: bool
) -> None:
    with pytest.raises(psycopg.errors.InternalError_) as raised:
        support.run(
            database_url,
            f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = '{message}'; END $$",
        )
    assert retry.about_a_row(raised.value) == so
