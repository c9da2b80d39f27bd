"""The backfill in a process of its own, so that a rehearsal can kill it.

It hears one order, says a line for each batch and each range, and ends when that is done, or with its parent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, Progress
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption.rehearsal.child import heard, run, say

# Of a range's result.
_TOLD = ("rows", "by_column", "seconds", "seconds_held_back", "changed_meanwhile")


def work(order: Mapping[str, Any]) -> None:
    """Encrypt the batch ranges of an order; what goes wrong with one is said, and the others go on.

    Raises:
        MigrationError: a key cannot be read.
    """
    catalogue = Catalogue.model_validate(order["catalogue"])
    keys = load_key_ring(order["environment"])
    target = Target.of(Database(order["url"]), catalogue, keys, Actor(**order["actor"]))
    pace = Pace(**order["pace"])
    # Shared by the workers: each takes the next one.
    ahead = iter(order["parts"])

    def encrypt(table: str, number: int, sessions: Sessions) -> None:
        def note(progress: Progress) -> None:
            if progress.rows:
                say({"batch": [table, number], "at": time.time()})

        try:
            done = backfill_range(
                target, catalogue.table(table), number, pace=pace, on_progress=note, sessions=sessions
            )
        except MigrationError as error:
            say({"failed": [table, number], "why": error.args[0]})
            return
        say({"done": [table, number], "result": {name: getattr(done, name) for name in _TOLD}})

    def go_on() -> None:
        try:
            with Sessions(target) as sessions:
                for table, number in ahead:
                    encrypt(table, number, sessions)
        except BaseException as error:
            # Its text could quote rows.
            say({"broken": type(error).__name__})

    with ThreadPoolExecutor(order["workers"]) as pool:
        for _ in range(order["workers"]):
            pool.submit(go_on)


def main() -> None:
    order = next(heard())
    try:
        work(order)
        say({"end": True})
    except MigrationError as error:
        say({"refused": error.args[0]})


if __name__ == "__main__":
    run(main)
