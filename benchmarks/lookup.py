"""A lookup by e-mail on ciphertext beside the same lookup on plaintext, both through the ORM.

    python benchmarks/lookup.py [--rows 1000000] [--lookups 4000] [--check]

One table with an e-mail column, its envelopes and its tokens, a unique index on the plaintext and one on the tokens;
two models of it, in the phases `off` and `encrypted`. The same addresses are looked up by both, in turns, so that
caches and the machine's moods are the same for both; what is loaded is the key, as a log-in does it. The lookup with
decrypting what was found is shown as well.

The table is loaded by COPY, on a PostgreSQL server of its own. With --check the exit status is 1 if the median on
ciphertext is more than 1.3 times that on plaintext.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table
from sqlalchemy import BigInteger, String, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from alphapulse_encryption.orm import EncryptedString, configure, copy_rows, encrypted, reset_phases
from alphapulse_encryption.sample.postgres import EmbeddedPostgres

MOST_TIMES_PLAINTEXT = 1.3
PERCENTILES = (50, 90, 99)

CREATE = """
CREATE TABLE users (id bigint PRIMARY KEY, email varchar(320), email_encrypted text, email_search varchar(64))
"""
INDEXES = """
ALTER TABLE users ADD CONSTRAINT users_email_key UNIQUE (email);
CREATE UNIQUE INDEX idx_user_email_search ON users (email_search);
VACUUM ANALYZE users;
"""


def model(phase: str) -> Any:
    """The table's model in a phase."""
    reset_phases()
    configure(phase=phase)

    class Base(DeclarativeBase):
        pass

    class User(Base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
        email: Mapped[str] = encrypted(EncryptedString("user_pii"), String(320), search=True)

    return User


def address(number: int) -> str:
    return f"user{number:08}@example.com"


@contextlib.contextmanager
def own_server() -> Iterator[EmbeddedPostgres]:
    with (
        tempfile.TemporaryDirectory(prefix="alphapulse-lookup-", ignore_cleanup_errors=True) as directory,
        EmbeddedPostgres(Path(directory) / "postgres", settings={"shared_buffers": "1GB"}) as server,
    ):
        yield server


def load(url: str, rows: int) -> None:
    """Fill the table, and build its indexes afterwards."""
    columns, made = copy_rows(model("dual"), ["id", "email"], ((n, address(n)) for n in range(rows)))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(CREATE)
        statement = f"COPY users ({', '.join(columns)}) FROM STDIN".encode()
        with connection.cursor().copy(statement) as copy:
            for row in made:
                copy.write_row(row)
        for index in filter(str.strip, INDEXES.split(";")):
            connection.execute(index.encode())


def measure(url: str, rows: int, lookups: int) -> dict[str, list[float]]:
    """Milliseconds of each lookup, by what is done."""
    plain, ciphertext = model("off"), model("encrypted")
    generator = random.Random(4711)
    engine = create_engine("postgresql+psycopg" + url.removeprefix("postgresql"))
    found: dict[str, list[float]] = {"plaintext": [], "ciphertext": [], "ciphertext, decrypted": []}
    with Session(engine) as session:

        def by(user: Any) -> Callable[[str], Any]:
            return lambda email: session.scalars(select(user.id).where(user.email == email)).one()

        def load_email(email: str) -> Any:
            return session.scalars(select(ciphertext.email).where(ciphertext.email == email)).one()

        contestants = {
            "plaintext": by(plain),
            "ciphertext": by(ciphertext),
            "ciphertext, decrypted": load_email,
        }
        for number in range(lookups + lookups // 10):
            email = address(generator.randrange(rows))
            order = list(contestants.items())
            # Whoever comes first finds the row's page cold.
            generator.shuffle(order)
            for name, look_up in order:
                started = time.perf_counter()
                look_up(email)
                elapsed = (time.perf_counter() - started) * 1000
                if number >= lookups // 10:
                    found[name].append(elapsed)
    engine.dispose()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="size of the table")
    parser.add_argument("--lookups", type=int, default=4_000, help="how many of each kind")
    parser.add_argument("--check", action="store_true", help="exit status 1 if the requirement is not met")
    options = parser.parse_args()
    os.environ["ALPHAPULSE_ENCRYPTION_KEY_SOURCE"] = "env"
    os.environ["ALPHAPULSE_ENCRYPTION_MASTER_KEY"] = b64encode(os.urandom(32)).decode()
    with own_server() as server:
        server.ensure_database("lookup")
        url = server.url("lookup")
        load(url, options.rows)
        found = measure(url, options.rows, options.lookups)
    table = Table("lookup by e-mail", *(f"p{p}, ms" for p in PERCENTILES), "times plaintext (median)")
    base = statistics.median(found["plaintext"])
    for name, milliseconds in found.items():
        cuts = statistics.quantiles(milliseconds, n=100)
        ratio = statistics.median(milliseconds) / base
        table.add_row(name, *(f"{cuts[p - 1]:.3f}" for p in PERCENTILES), f"{ratio:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{options.rows:,} rows, {options.lookups:,} lookups of each kind")
    met = statistics.median(found["ciphertext"]) <= MOST_TIMES_PLAINTEXT * base
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
