"""Whether a rehearsal on few rows predicts the time of the migration of many.

    python benchmarks/prediction.py [--rows 50000] [--times 10] [--rounds 1] [--check]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from alphapulse_encryption.catalogue import Catalogue, Table, load_catalogue
from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.approvals import approve_drop
from alphapulse_encryption.migration.backfill import backfill_range
from alphapulse_encryption.migration.backup import take_backup
from alphapulse_encryption.migration.columns import add_encrypted_columns
from alphapulse_encryption.migration.database import Actor, Database
from alphapulse_encryption.migration.drop import drop_plaintext
from alphapulse_encryption.migration.erase import erase_dropped
from alphapulse_encryption.migration.indexes import build_search_indexes
from alphapulse_encryption.migration.preflight import check
from alphapulse_encryption.migration.restore import restore_plaintext
from alphapulse_encryption.migration.sessions import Sessions
from alphapulse_encryption.migration.switch import switch_to_ciphertext
from alphapulse_encryption.migration.verify import count_rows, verify_range
from alphapulse_encryption.migration.views import create_views
from alphapulse_encryption.rehearsal.measures import (
    Circumstances,
    Rehearsal,
    Sizes,
    Stage,
    StageMeasure,
    TableSize,
    TableWork,
)
from alphapulse_encryption.sample.database import load_sample
from alphapulse_encryption.sample.postgres import EmbeddedPostgres

KEYS = KeyRing({1: bytes(range(32))}, 1)
CIPHER = get_format("AES-256-GCM", KEYS)
ACTOR = Actor("benchmark")
RANGES = 16


def sizes(url: str, catalogue: Catalogue) -> Sizes:
    with psycopg.connect(url) as connection:
        tables = {}
        for table in catalogue.tables:
            row = connection.execute(
                f'SELECT (SELECT count(*) FROM "{table.name}"), pg_table_size(oid), pg_indexes_size(oid) '
                "FROM pg_class WHERE oid = %s::regclass".encode(),
                [f'"{table.name}"'],
            ).fetchone()
            assert row
            tables[table.key] = TableSize(rows=row[0], heap=row[1], indexes=row[2])
        (database,) = connection.execute("SELECT pg_database_size(current_database())").fetchone()
        return Sizes(database=database, tables=tables)


class Walk:
    def __init__(self, url: str, catalogue: Catalogue, directory: Path, bin_dir: Path) -> None:
        self.url, self.catalogue, self.database = url, catalogue, Database(url)
        self.directory, self.bin_dir = directory, bin_dir
        self.stages: list[StageMeasure] = []

    def lsn(self) -> int:
        with psycopg.connect(self.url) as c:
            return int(c.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint").fetchone()[0])

    def stage(self, stage: Stage, each: Callable[[Table], TableWork | None]) -> None:
        started, wal, tables = datetime.now(UTC), self.lsn(), {}
        total = 0.0
        for table in self.catalogue.tables:
            began = time.monotonic()
            work = each(table) or TableWork()
            seconds = time.monotonic() - began
            total += seconds
            tables[table.key] = work.model_copy(update={"seconds": seconds})
        self.stages.append(
            StageMeasure(stage=stage, started=started, ended=datetime.now(UTC), seconds=total, tables=tables,
                         wal=self.lsn() - wal, sizes=sizes(self.url, self.catalogue)))
        print(f"    {stage:14} {total:8.2f} s", flush=True)

    def whole(self, stage: Stage, work: Callable[[], Any]) -> None:
        started, wal = datetime.now(UTC), self.lsn()
        began = time.monotonic()
        work()
        total = time.monotonic() - began
        self.stages.append(
            StageMeasure(stage=stage, started=started, ended=datetime.now(UTC), seconds=total,
                         wal=self.lsn() - wal, sizes=sizes(self.url, self.catalogue)))
        print(f"    {stage:14} {total:8.2f} s", flush=True)

    def backfill(self, table: Table) -> TableWork:
        ranges, rows, values = [], 0, 0
        with Sessions(self.database) as sessions:
            for number, following in itertools.zip_longest(range(RANGES), range(1, RANGES)):
                began = time.monotonic()
                r = backfill_range(self.database, table, number, CIPHER, KEYS, ACTOR, sessions=sessions, following=following)
                if r.rows:
                    ranges.append((r.rows, time.monotonic() - began))
                rows += r.rows
                values += r.values
        return TableWork(rows=rows, values=values, ranges=tuple(ranges))

    def verify(self, table: Table) -> TableWork:
        ranges, rows, values = [], 0, 0
        for number in range(RANGES):
            r = verify_range(self.database, table, number, CIPHER, KEYS, ACTOR)
            if r.rows:
                ranges.append((r.rows, r.seconds))
            rows += r.rows
            values += r.values
        count_rows(self.database, table, KEYS, ACTOR)
        return TableWork(rows=rows, values=values, ranges=tuple(ranges))

    def run(self) -> Rehearsal:
        db, started = self.database, datetime.now(UTC)
        before = sizes(self.url, self.catalogue)
        self.whole(Stage.PREFLIGHT, lambda: check(db, self.catalogue, KEYS))
        self.stage(Stage.COLUMNS, lambda t: add_encrypted_columns(db, t, KEYS, ACTOR, batch_ranges=RANGES) and None)
        self.stage(Stage.BACKFILL, self.backfill)
        self.stage(Stage.INDEXES, lambda t: build_search_indexes(db, t, ACTOR) and None)
        self.stage(Stage.VERIFY, self.verify)
        self.stage(Stage.VIEWS, lambda t: create_views(db, t, ACTOR) and None)
        self.stage(Stage.SWITCH, lambda t: switch_to_ciphertext(db, t, KEYS, ACTOR) and None)
        self.stage(Stage.VERIFY_AGAIN, self.verify)
        self.whole(Stage.BACKUP, lambda: take_backup(db, self.catalogue.tables, KEYS, ACTOR, directory=self.directory, bin_dir=self.bin_dir, drill_server=db))
        self.stage(Stage.APPROVAL, lambda t: approve_drop(db, self.catalogue, t, KEYS, ACTOR, approver="Ada", reason="because", confirmation=t.key) and None)
        self.stage(Stage.DROP, lambda t: drop_plaintext(db, self.catalogue, t, CIPHER, KEYS, ACTOR, operator="Grace") and None)
        self.stage(Stage.ERASURE, lambda t: erase_dropped(db, t, CIPHER, KEYS, ACTOR, confirmation=t.key) and None)
        self.stage(Stage.RESTORE, lambda t: restore_plaintext(db, t, CIPHER, KEYS, ACTOR) and None)
        return Rehearsal(run_id="benchmark", started=started, ended=datetime.now(UTC), before=before, stages=tuple(self.stages),
            circumstances=Circumstances(source="sample", cloned_by="template", server_version="18", cores=os.cpu_count() or 1, workers=1, batch_ranges=RANGES, rate=0, version="0"))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("/tmp/brief7/walks"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="alphapulse-prediction-", ignore_cleanup_errors=True) as d, EmbeddedPostgres(Path(d) / "postgres") as server:
        os.chmod(d, 0o755)
        control = psycopg.connect(server.url("postgres"), autocommit=True)
        for rows in options.rows:
            server.ensure_database(f"template_{rows}")
            load_sample(server.url(f"template_{rows}"), rows)
            with psycopg.connect(server.url(f"template_{rows}"), autocommit=True) as c:
                c.execute("VACUUM (ANALYZE, FREEZE)")
        for round_ in range(options.rounds):
            for rows in options.rows:
                print(rows, round_)
                control.execute(f"CREATE DATABASE w TEMPLATE template_{rows}")
                control.execute("CHECKPOINT")
                os.sync()
                backups = Path(d) / f"b{rows}{round_}"
                r = Walk(server.url("w"), load_catalogue(), backups, server.bin_dir()).run()
                (options.out / f"{rows}-{round_}-{int(time.time())}.json").write_text(r.model_dump_json())
                control.execute("DROP DATABASE w WITH (FORCE)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
