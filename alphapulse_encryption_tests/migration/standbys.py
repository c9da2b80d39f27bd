"""Standbys of a test's server: one that replays when it is told to, and a pair of which one takes over."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import psycopg
from psycopg.conninfo import make_conninfo

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run
from alphapulse_encryption_tests.stress.kills import kill_server


@contextlib.contextmanager
def standby_of(
    primary: EmbeddedPostgres, directory: Path, settings: Mapping[str, str]
) -> Iterator[EmbeddedPostgres]:
    """A streaming standby of the name ``replica``, once it has caught up; stopped afterwards."""
    cluster = directory / "cluster"
    cluster.mkdir(parents=True)
    origin = make_conninfo(primary.url("postgres"), application_name="replica")
    arguments = ["--pgdata", str(cluster), "--dbname", origin, "--write-recovery-conf", "--no-sync"]
    program = str(primary.bin_dir() / "pg_basebackup")
    subprocess.run([program, *arguments, "--checkpoint", "fast"], check=True, capture_output=True)
    # The server does not run as root.
    data = support.value(primary.url("postgres"), "SELECT current_setting('data_directory')")
    owner = Path(data).stat()
    for path in (directory, cluster, *cluster.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)
    cluster.chmod(0o700)
    with EmbeddedPostgres(directory, {**settings, "wal_receiver_status_interval": "1s"}) as server:
        caught_up(primary)
        yield server


def caught_up(primary: EmbeddedPostgres) -> None:
    """Wait until a standby has replayed all that there is."""
    query = (
        "SELECT count(*) FROM pg_stat_replication "
        "WHERE state = 'streaming' AND replay_lsn = pg_current_wal_lsn()"
    )
    url = primary.url("postgres")
    support.until(lambda: bool(support.value(url, query)), "it has caught up")


@dataclass
class Pair:
    """A primary and its standby, asynchronous."""

    primary: EmbeddedPostgres
    standby: EmbeddedPostgres

    def url(self, database: str) -> str:
        """The address of both, for whichever takes writes."""
        hosts = [parse_qs(urlsplit(s.url(database)).query)["host"][0] for s in (self.primary, self.standby)]
        role = urlsplit(self.primary.url(database)).username
        where = quote(",".join(hosts), safe="/,")
        return f"postgresql://{role}@/{database}?host={where}&port=5432&target_session_attrs=read-write"

    def cut_off(self) -> None:
        """What the primary writes from now on does not reach the standby."""
        url = self.standby.url("postgres")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET primary_conninfo TO ''")
            connection.execute("SELECT pg_reload_conf()")
        receivers = "SELECT count(*) FROM pg_stat_wal_receiver"
        support.until(lambda: not support.value(url, receivers), "it receives nothing")

    def fail_over(self) -> None:
        """The primary is killed with all its processes, and the standby takes over."""
        kill_server(self.primary)
        assert run(self.standby.url("postgres"), "SELECT pg_promote()") == [(True,)]
