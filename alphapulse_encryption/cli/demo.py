"""The whole way on the sample database: what `make demo` and `make demo-drop` run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from psycopg.rows import dict_row
from psycopg.sql import SQL, Identifier
from rich.console import Console
from rich.table import Table as Grid

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.bounds import whole_number
from alphapulse_encryption.catalogue import Table, load_catalogue
from alphapulse_encryption.cli.console import Terminal
from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.bookkeeping.approvals import list_approvals
from alphapulse_encryption.migration.bookkeeping.backups import latest_backup
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.tables import table_state
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.sample.database import DEFAULT_ROWS, MINIMUM_ROWS, load_sample
from alphapulse_encryption.sample.key import make_sample_key
from alphapulse_encryption.sample.postgres import SAMPLE_DATABASE, embedded, embedded_url

if TYPE_CHECKING:
    from alphapulse_encryption.cli.steps import Steps

PROGRAM = "make demo"
# The row that is shown: an ordinary one, behind those with difficult values.
SHOWN_USER = 100
SHOWN_COLUMNS = ("email", "phone_number", "first_name", "last_name")
DROPPED_TABLE = "users"

_OF_OTHERS = ("ALPHAPULSE_DATABASE_URL", "ALPHAPULSE_WRITER_DATABASE_URL", "ALPHAPULSE_ENCRYPTION_CATALOGUE")


@dataclass
class Demo:
    """What the demo works with."""

    steps: Steps
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def users(self) -> Table:
        return self.steps.catalogue.table(DROPPED_TABLE)

    def headline(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]", highlight=False)

    def show(self, text: str) -> None:
        """Print a line as it is: tests and people look for it letter by letter."""
        print(text, flush=True)

    def user(self, columns: Sequence[str]) -> dict[str, Any]:
        """The shown row of users."""
        with self.steps.database.session("read the shown user") as connection:
            query = SQL("SELECT {} FROM public.users WHERE id = %s").format(
                SQL(", ").join(Identifier(column) for column in columns)
            )
            row = connection.cursor(row_factory=dict_row).execute(query, [SHOWN_USER]).fetchone()
        return row or dict.fromkeys(columns)


_WALK = {
    "preflight": "Pre-migration checklist",
    "backup": "Backup",
    "add_columns": "Step 2: add encrypted columns",
    "migrate_data": "Step 3: migrate data",
    "verify": "Step 4: verify",
    "create_views": "Step 6: create views",
}


def walk_to_views(demo: Demo, rows: int) -> int:
    """From the plaintext sample to verified ciphertext and views; the exit status."""
    demo.headline("The sample database")
    started = time.monotonic()
    counts = load_sample(demo.steps.database.conninfo, rows=rows)
    demo.seconds["sample"] = time.monotonic() - started
    what = ", ".join(f"{table} {count:,}" for table, count in counts.tables.items())
    demo.show(f"{'Loaded' if counts.loaded else 'Already there'}: {counts.total:,} rows ({what})")

    for name, headline in _WALK.items():
        demo.headline(headline)
        if not (_backup(demo) if name == "backup" else demo.steps.run(name)):
            return 1
    plaintext = _state(demo) == "columns"
    if plaintext:
        _before_and_after(demo)
        _search(demo, demo.user(["email"])["email"])
    else:
        demo.show(f"The plaintext of {DROPPED_TABLE} was dropped; make demo-drop brings it back.")
    _timings(demo)
    if counts.loaded or demo.steps.changed:
        still = "; its plaintext columns are still there" if plaintext else ""
        demo.headline(f"Done. The sample is encrypted{still}.")
    else:
        demo.headline("Nothing was changed: the sample had been migrated already, and was verified again.")
    demo.show(_NEXT)
    return 0


_NEXT = """
What next:
  make ui                              see the graph, the partitions and these runs
  make psql                            look at the tables: SELECT * FROM encryption_migrations;
  make demo-drop                       walk through switch, approval, drop and restore
  .venv/bin/python -m alphapulse_encryption --help    the same steps one by one
To drop by hand, in the UI or here (P = .venv/bin/python -m alphapulse_encryption):
  P --switch-to-encrypted --table users
  P --approve-drop --table users --approver "Your Name" --reason "…" --confirmation users
  P --drop-unencrypted --confirm --table users
  P --restore-plaintext --table users     brings it back"""


def _backup(demo: Demo) -> bool:
    with demo.steps.database.session("look for a backup") as connection:
        backup = latest_backup(connection, demo.users) if bookkeeping_exists(connection) else None
    if backup is None:
        return demo.steps.run("backup")
    demo.show(f"✓ There is a verified backup, taken at {backup.taken_at:%Y-%m-%d %H:%M} UTC")
    return True


def _before_and_after(demo: Demo) -> None:
    demo.headline(f"One row of users (id {SHOWN_USER}), before and after")
    sensitive = {column.name: column for column in demo.users.columns}
    plain = demo.user(SHOWN_COLUMNS)
    encrypted = demo.user([sensitive[name].encrypted for name in SHOWN_COLUMNS])
    grid = Grid("column", "before", "after (<column>_encrypted)")
    for name in SHOWN_COLUMNS:
        after = encrypted[sensitive[name].encrypted]
        grid.add_row(name, str(plain[name]), f"{after[:58]}…" if after else "NULL")
    demo.console.print(grid, highlight=False, markup=False)


def _search(demo: Demo, email: str) -> None:
    demo.headline("Finding a user by search token")
    column = next(column for column in demo.users.columns if column.name == "email")
    token = search_token(demo.steps.keys, email, column.context)
    with demo.steps.database.session("find a user by search token") as connection:
        row = connection.execute(
            "SELECT id, username, email_encrypted FROM public.users WHERE email_search = %s", [token]
        ).fetchone()
    if row is None:
        raise RefusedError("No user has that search token: verify the table users (--verify --table users).")
    user, username, envelope = row
    found = get_format(demo.steps.catalogue.format, demo.steps.keys).decrypt(envelope, column.context)
    demo.show(f"  {email}  →  token {token}")
    demo.show(f"  WHERE email_search = token  →  id {user}, {username}, decrypted e-mail {found}")


def _timings(demo: Demo) -> None:
    demo.headline("Timings")
    grid = Grid("stage")
    grid.add_column("seconds", justify="right")
    for stage, seconds in {**demo.seconds, **demo.steps.seconds}.items():
        grid.add_row(stage, f"{seconds:.1f}")
    demo.console.print(grid, highlight=False)


def walk_through_drop(demo: Demo) -> int:
    """Switch, refusal without approval, approval, drop, restore: of one table; the exit status."""
    run = demo.steps.run
    state = _state(demo)
    if state is None:
        raise RefusedError("The sample is not encrypted yet: run make demo first.")
    if state != "columns":
        demo.show(f"The plaintext of {DROPPED_TABLE} was dropped before, so only its restoration is left.")
        return _restore(demo, None)
    before = demo.user(SHOWN_COLUMNS)
    demo.headline(f"Step 7: make the encrypted columns of {DROPPED_TABLE} the right side")
    if not (run("switch_to_encrypted") and run("verify")):
        return 1
    with demo.steps.database.session("look for an approval") as connection:
        approved = any(approval.is_open for approval in list_approvals(connection, demo.users))
    if not approved:
        demo.headline("A drop without an approval is refused")
        # By steps of its own: a table that is refused is left out of those that come after it.
        if replace(demo.steps).run("drop_unencrypted"):
            demo.show("✗ The drop went through without an approval, which must not happen.")
            return 1
    demo.headline("A fresh backup, and the approval of a person")
    person = {"approver": "Demo Operator", "reason": "walking through the demo"}
    if not (run("backup") and run("approve_drop", **person, confirmation=DROPPED_TABLE)):
        return 1
    demo.headline("Step 8: drop the plaintext columns")
    if not run("drop_unencrypted"):
        return 1
    with demo.steps.database.session("look for the plaintext columns") as connection:
        left = read_table(connection, demo.users, plaintext=False, look=True).plaintext_columns
    if _state(demo) != "dropped" or left:
        demo.show("✗ The plaintext columns are still there.")
        return 1
    demo.show(f"✓ {DROPPED_TABLE} has no plaintext column any more")
    _search(demo, before["email"])
    return _restore(demo, before)


def _restore(demo: Demo, before: dict[str, Any] | None) -> int:
    demo.headline("Rollback after the drop: restore the plaintext columns from the ciphertext")
    if not (demo.steps.run("restore_plaintext") and demo.steps.run("verify")):
        return 1
    after = demo.user(SHOWN_COLUMNS)
    if before is not None and after != before:
        demo.show("✗ The restored row differs from the one before the drop.")
        return 1
    if before is not None:
        demo.show(f"✓ The row of users with id {SHOWN_USER} reads as it did before the drop")
    _timings(demo)
    return 0


def _state(demo: Demo) -> str | None:
    """Where the table that the demo drops stands; None before its encrypted columns were added."""
    with demo.steps.database.session(f"look where {DROPPED_TABLE} stands") as connection:
        state = table_state(connection, demo.users) if bookkeeping_exists(connection) else None
    return None if state is None else state.state.stage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0 when done, 1 where a step failed, 2 for wrong usage or configuration."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="The whole migration on the sample database.")
    rows = whole_number(MINIMUM_ROWS, sys.maxsize, f"a whole number of at least {MINIMUM_ROWS}")
    parser.add_argument("--rows", type=rows, default=DEFAULT_ROWS, help="rows of the sample in total")
    parser.add_argument("--drop", action="store_true", help="approval, drop and restore, after the demo")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except MigrationError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: stopped. Run it again to go on.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    given = [name for name in _OF_OTHERS if os.environ.get(name)]
    if given:
        raise ConfigurationError(
            f"The demo works on its own embedded database and catalogue: unset {' and '.join(given)}. "
            "For your database use python -m alphapulse_encryption."
        )
    # Dagster takes a second to load.
    from alphapulse_encryption.cli.launch import launcher
    from alphapulse_encryption.cli.steps import Steps
    from alphapulse_encryption.defs.resources.environment import key_environment

    # What can be wrong is looked at before a server is started.
    ranges = settings.TargetVariables().batch_ranges
    make_sample_key()
    catalogue = load_catalogue()
    keys = load_key_ring(key_environment())
    tables = (DROPPED_TABLE,) if options.drop else catalogue.keys
    with embedded():
        database = Database(embedded_url(SAMPLE_DATABASE))
        with launcher(ranges) as found:
            demo = Demo(Steps(found, database, catalogue, keys, tables), Terminal(soft_wrap=True))
            return walk_through_drop(demo) if options.drop else walk_to_views(demo, options.rows)


if __name__ == "__main__":
    secrecy.run_program(main)
