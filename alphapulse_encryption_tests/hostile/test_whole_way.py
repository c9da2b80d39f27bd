"""The whole way there and back, drop and restore included, where every object has a hostile name."""

from __future__ import annotations

from pathlib import Path

import pytest

from alphapulse_encryption.migration.gates.approvals import approve_drop
from alphapulse_encryption.migration.gates.backup import take_backup
from alphapulse_encryption.migration.gates.preflight import check, refuse_blockers
from alphapulse_encryption.migration.gates.roles import roles_sql
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.verify import count_rows
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.migration.steps.drop import drop_plaintext
from alphapulse_encryption.migration.steps.erase import erase_dropped
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.hostile.names import HOSTILE, Named, database_of, rows, shape
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.roles.conftest import run_script

# Of these, all kinds of harm are there; the others go the same way.
QUICK = ("quotes", "dollar", "format", "newline")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.long]) for kind in HOSTILE]
)
def test_there_and_back(kind: str, database_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    named = Named(HOSTILE[kind])
    url, table, database = database_url, named.table, Database(database_url)
    with database_of(named, url):
        target = support.target(database, catalogue=named.catalogue)
        before, held = shape(named, url), rows(named, url)
        refuse_blockers(check(database, [table], support.KEYS))
        support.add_columns(url, table, ranges=2)
        support.backfill_all(url, table)
        assert support.assert_encrypted(url, table) == 120
        build_search_indexes(database, table, support.ACTOR)
        assert support.verify(url, table).passed
        create_views(database, table, support.ACTOR)
        switch_to_ciphertext(target, table)
        assert support.verify(url, table).passed
        count_rows(target, table)
        with database.session("look") as connection:
            script = roles_sql(connection, named.catalogue, "hostile_")
        # Here it is only tried: it gives the table to another owner.
        run_script(postgres, url, script.replace("\nCOMMIT;\n", "\nROLLBACK;\n"))
        take_backup(
            *(target, [table]),
            directory=tmp_path,
            bin_dirs=[postgres.bin_dir()],
            drill_server=Database(postgres.url("postgres")),
        )
        # No control character gets into a line of the audit log.
        reason = "".join(filter(str.isprintable, HOSTILE[kind])).strip() or "why"
        approve_drop(target, table, backups=tmp_path, approver="Ada", reason=reason, confirmation=table.key)
        before_drop = {c.name: support.texts(url, table, c.name) for c in table.columns}
        drop_plaintext(target, table, backups=tmp_path, operator="Grace", default_rule="names")
        for column in table.columns:
            envelopes = support.texts(url, table, column.encrypted)
            opened = {key: support.opened(text or "", column.context) for key, text in envelopes.items()}
            assert opened == before_drop[column.name]
        erase_dropped(target, table, confirmation=table.key)
        restore_plaintext(target, table)
        assert rows(named, url) == held
        assert support.verify(url, table).passed
        revert_to_plaintext(target, table)
        assert rows(named, url) == held
        assert shape(named, url) == before
