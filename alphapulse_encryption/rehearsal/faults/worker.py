"""The backfill in a process of its own, so that a rehearsal can kill it.

    python -m alphapulse_encryption.rehearsal.faults.worker

reads one order, a line of JSON, from its standard input, and writes a line for each batch and each range to its
standard output. Address and keys are in the order, so that nobody sees them in arguments or environment. It ends when
its input does.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from alphapulse_encryption import secrecy
from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.rows.backfill import Pace, Progress, backfill_range
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.target import Target

_saying = threading.Lock()


def say(what: Mapping[str, Any]) -> None:
    """A line for whoever started this."""
    with _saying:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


def work(order: Mapping[str, Any]) -> None:
    """Encrypt the batch ranges of an order.

    Raises:
        MigrationError: a key cannot be read; what goes wrong with one range is said, and the others go on.
    """
    catalogue = Catalogue.model_validate(order["catalogue"])
    keys = load_key_ring(order["environment"])
    target = Target.of(Database(order["url"]), catalogue, keys, Actor(order["actor"], order["run_id"]))
    pace = Pace(**order["pace"])
    ahead = queue.SimpleQueue[tuple[str, int] | None]()
    for table, number in order["parts"]:
        ahead.put((table, number))

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
        say(
            {
                "done": [table, number],
                "rows": done.rows,
                "values": done.values,
                "seconds": done.seconds,
                "held_back": done.seconds_held_back,
                "changed_meanwhile": done.changed_meanwhile,
            }
        )

    def go_on() -> None:
        try:
            with Sessions(target.database) as sessions:
                for _ in itertools.count():
                    part = ahead.get()
                    if part is None:
                        return
                    encrypt(*part, sessions)
        except BaseException as error:
            # Its text could quote rows.
            say({"broken": type(error).__name__})

    workers = [threading.Thread(target=go_on) for _ in range(order["workers"])]
    for worker in workers:
        ahead.put(None)
        worker.start()
    for worker in workers:
        worker.join()


def _end_with_input() -> None:
    sys.stdin.readline()
    os._exit(0)


def main() -> None:
    """Take the order."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        work(order)
        say({"end": True})
    except MigrationError as error:
        say({"refused": error.args[0]})
    # The thread that waits for the end of the input would be waited for.
    os._exit(0)


if __name__ == "__main__":
    secrecy.tell_no_texts()
    secrecy.leave_no_core()
    main()
