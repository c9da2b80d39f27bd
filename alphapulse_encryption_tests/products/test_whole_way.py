"""Each product goes the whole way, drop and restore included, while its own roles read and write.

A twin takes the same writes as plaintext: what it refuses has to be refused, and in the end the two dumps are the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.gates.approvals import approve_drop
from alphapulse_encryption.migration.gates.backup import take_backup
from alphapulse_encryption.migration.gates.preflight import check, refuse_blockers
from alphapulse_encryption.migration.gates.roles import roles_sql
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.verify import count_rows
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.schema.reachable_code import foreign_code
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.migration.steps.drop import drop_plaintext
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import dumps, support
from alphapulse_encryption_tests.products import auth, rental, workspace
from alphapulse_encryption_tests.products.product import Phase, Product, of, outcome, write_all
from alphapulse_encryption_tests.roles.conftest import run_script

_TRIGGERS = """
SELECT n.nspname, c.relname, t.tgname, pg_get_triggerdef(t.oid)
  FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE NOT t.tgisinternal AND t.tgparentid = 0
"""
_NOT_OURS = "current_setting('alphapulse_encryption.writer', true) IS DISTINCT FROM 'engine'"

PRODUCTS = [auth.PRODUCT, rental.PRODUCT, workspace.PRODUCT]


class Way:
    """A product's database on its way, beside its twin."""

    def __init__(self, product: Product, url: str, twin: str, bin_dir: Path) -> None:
        self.product, self.url, self.twin, self.bin_dir = product, url, twin, bin_dir
        self.catalogue = product.catalogue
        self.tables = self.catalogue.tables
        self.operator = of(url, product.login)
        self.rounds = 0
        self.begun = datetime.now(UTC)

    def target(self, url: str) -> Target:
        return support.target(url, catalogue=self.catalogue)

    def both(self, statements: str) -> None:
        for url in (self.url, self.twin):
            support.run(url, statements)

    def told(self) -> str:
        """What preflight says; nothing of it may block."""
        report = check(Database(self.operator), self.tables, support.KEYS)
        return "\n".join(f"{found.subject}: {found.message}" for found in report.findings)

    def told_of(self, table: Table, told: str) -> str:
        return "\n".join(line for line in told.splitlines() if line.startswith(f"{table.key}: "))

    def take_over(self) -> None:
        """Code and privileges of less trusted roles, by the statements that are told; the twin's as well."""
        while True:
            with Database(self.url).session("look") as connection:
                oids = [
                    read_table(connection, table, plaintext=False, look=True).oid for table in self.tables
                ]
                remedies = {one.remedy for oid in oids for one in foreign_code(connection, oid)}
            if not remedies:
                return
            self.both(" ".join(sorted(remedies)))

    def refuse_blockers(self) -> None:
        refuse_blockers(check(Database(self.operator), self.tables, support.KEYS))

    def pass_over(self, told: str) -> str:
        """Let triggers that fire for our rows pass over them, as told; returns the SQL that puts them back."""
        before = ""
        for schema, relation, name, definition in support.run(self.url, _TRIGGERS):
            key = relation if schema == "public" else f"{schema}.{relation}"
            if f"{key}: the trigger {name} (function" not in told:
                continue
            head, tail = definition.split(" EXECUTE FUNCTION ")
            drop = f'DROP TRIGGER "{name}" ON {schema}."{relation}"; '
            support.run(self.url, f"{drop} {head} WHEN ({_NOT_OURS}) EXECUTE FUNCTION {tail}")
            before += f"{drop} {definition};"
        return before

    def drop_what_is_refused(self, told: str) -> None:
        """Unique indexes that the switch would refuse; the twin loses them, too."""
        lines = [line for line in told.splitlines() if "switch_to_ciphertext will refuse" in line]
        unique = "SELECT indexrelid::regclass::text FROM pg_index WHERE indisunique AND NOT indisprimary"
        for (name,) in support.run(self.url, unique):
            if any(
                f"index {name.split('.')[-1]} " in line or f"that {name.split('.')[-1]} " in line
                for line in lines
            ):
                self.both(f"DROP INDEX {name}")

    def tell_what_is_broken(self, told: str) -> None:
        """Whatever of the product answers otherwise now than on the twin was told of before anything was begun."""
        broken = set()
        for name, question in self.product.asked.items():
            answers = []
            for url in (self.url, self.twin):
                with support.application(url, autocommit=False) as connection:
                    answers.append(outcome(connection, question))
                    connection.rollback()
            if answers[0] != answers[1]:
                broken.add(name)
        assert {name for name in broken if name not in told} == set(), broken

    @property
    def approves(self) -> str:
        return of(self.url, "products_ada") if self.product is workspace.PRODUCT else self.operator

    def write(self, phase: Phase) -> None:
        """A round of writes, whose outcomes are those of the twin."""
        self.rounds += 1
        writes = [w for w in self.product.writes if not (w.checked and phase == "ciphertext")]
        came = write_all(self.url, self.catalogue, writes, phase, self.rounds)
        assert came == write_all(self.twin, self.catalogue, writes, "plaintext", self.rounds)

    def encrypt(self) -> None:
        for table in self.tables:
            support.backfill_all(self.operator, table)

    def verify(self) -> None:
        for table in self.tables:
            assert support.verify(self.operator, table).passed
            count_rows(support.target(self.operator), table)

    def opened(self) -> dict[str, dict[support.Row, str | None]]:
        """What all envelopes hold."""
        return {
            f"{table.key}.{column.name}": {
                key: None if envelope is None else support.opened(envelope, column.context)
                for key, envelope in support.texts(self.url, table, column.encrypted).items()
            }
            for table in self.tables
            for column in table.columns
        }

    def wanted(self) -> dict[str, dict[support.Row, str | None]]:
        return {
            f"{t.key}.{c.name}": support.texts(self.twin, t, c.name) for t in self.tables for c in t.columns
        }

    def dump(self, url: str) -> Counter[str]:
        """The statements, with one word for the moments at which rows were written during the test."""
        leave_out = dumps.added_columns(*self.tables) | set(self.product.differs)
        found = dumps.dump(url, self.bin_dir, leave_out)
        days = "|".join(f"{day:%Y-%m-%d}" for day in (self.begun, datetime.now(UTC)))
        moment = re.compile(rf"'(?:{days})[ T][\d:.]+(?:\+00)?'")
        told: Counter[str] = Counter()
        for statement, count in found.items():
            told[moment.sub("'now'", statement)] += count
        return told


def _prepare_roles(way: Way, postgres: EmbeddedPostgres) -> None:
    """The rights of who migrates, as the documentation says; the owners of the twin change as well."""
    if way.product is auth.PRODUCT:
        with support.application(way.url) as connection:
            name = Identifier(connection.info.dbname)
            connection.execute(SQL("GRANT CREATE ON DATABASE {} TO products_steward").format(name))
    if way.product is workspace.PRODUCT:
        for url in (way.url, way.twin):
            with Database(url).session("look") as connection:
                script = roles_sql(connection, way.catalogue, "products_")
            run_script(postgres, url, script)
            support.run(url, "GRANT products_migrator, products_verifier, products_backup TO products_mia")
            support.run(url, "GRANT products_approver TO products_ada")


@pytest.mark.long
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
def test_a_product_comes_back_as_it_was(
    product: Product, database_of: Callable[[Product], str], postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    way = Way(product, database_of(product), database_of(product), postgres.bin_dir())
    _prepare_roles(way, postgres)
    told = way.told()
    untold = [name for name in product.told if name not in told]
    way.take_over()
    way.both(product.prepared or "SELECT")
    support.run(way.url, product.set_aside or "SELECT")
    way.drop_what_is_refused(told)
    as_they_were = way.pass_over(way.told())
    way.refuse_blockers()
    way.write("plaintext")
    take_backup(way.target(way.operator), way.tables, directory=tmp_path, bin_dirs=[way.bin_dir])

    for table in way.tables:
        support.add_columns(way.operator, table)
    support.run(way.url, product.beside or "SELECT")
    way.write("plaintext")
    way.encrypt()
    way.write("both")
    way.write("plaintext")
    way.encrypt()
    for table in way.tables:
        assert support.assert_encrypted(way.url, table)
        build_search_indexes(Database(way.operator), table, support.ACTOR)
    way.verify()
    for table in way.tables:
        create_views(Database(way.operator), table, support.ACTOR)
        switch_to_ciphertext(support.target(way.operator), table)
    way.write("ciphertext")
    assert way.opened() == way.wanted()
    way.verify()

    dropped = [t for t in way.tables if "approve_drop will refuse" not in way.told_of(t, told)]
    for table in dropped:
        ada = way.target(way.approves)
        approve_drop(ada, table, approver="Ada", reason="it serves", confirmation=table.key, backups=tmp_path)
        drop_plaintext(
            way.target(way.operator), table, backups=tmp_path, operator="Grace", default_rule="names"
        )
    way.write("ciphertext")
    assert way.opened() == way.wanted()
    way.tell_what_is_broken(told)

    result = restore_plaintext(support.target(way.operator), dropped[0], hold=True)
    assert result is not None and result.held
    for table in dropped:
        assert restore_plaintext(support.target(way.operator), table) is not None
    way.verify()
    way.write("both")
    way.write("plaintext")
    for table in way.tables:
        assert revert_to_plaintext(support.target(way.operator), table) is not None
    support.run(way.url, product.put_back + as_they_were or "SELECT")
    way.write("plaintext")

    before, after = way.dump(way.twin), way.dump(way.url)
    assert sorted(before - after) == []
    # The encrypted columns stay, with their indexes (in partitions, too) and what was granted on them.
    added = dumps.indexes_of_added_columns(*way.tables) | dumps.added_columns(*way.tables)
    assert sorted(s for s in after - before if not any(name in s for name in added)) == []
    assert untold == []
