"""AlphaPulse's sample database: five tables of made-up people, accounts, positions and trades.

    python -m alphapulse_encryption.sample.database [--rows N] [--seed N] [--url URL]

The server makes the rows itself (`rows.sql`) from pools of names and places, so that a million takes no
memory here. The same size and seed always give the same data (with the same version of Faker, which the
pools come from). The first rows of every table hold values that break naive tools (`difficult.py`).
"""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple

import psycopg
from faker import Faker
from psycopg import sql

from alphapulse_encryption import secrecy
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample import difficult
from alphapulse_encryption.sample.postgres import SAMPLE_DATABASE, embedded_url

DEFAULT_ROWS = 50_000
DEFAULT_SEED = 20_240_501
# Below, the small tables would have no ordinary rows left beside the difficult ones.
MINIMUM_ROWS = 1_000
# The hash that draws the values takes the seed plus a small salt as a 64-bit number.
_MAXIMUM_SEED = 2**62

# What percentage of the rows each table gets.
_SHARES = {"users": 10, "trading_accounts": 10, "positions": 20, "trades": 55, "api_keys": 5}
TABLES: tuple[str, ...] = tuple(_SHARES)

_LOCALES = ("en_US", "de_DE", "fr_FR", "pl_PL", "tr_TR", "el_GR", "ru_RU", "fa_IR", "hi_IN", "ja_JP", "zh_CN")
_WORDS_PER_LOCALE = 40

_EXTENSIONS = ("pg_stat_statements", "pgstattuple")
# The comment on each of the tables begins so, and goes on with the size and the seed.
_MARKER = "AlphaPulse sample of "
# What our sessions and the address are called.
_NAMES = ("alphapulse_encryption sample", "the sample's URL")
# Any number will do, as long as nothing else in the database uses it.
_LOADER_LOCK = 7_310_254_901


class SampleCounts(NamedTuple):
    """Rows by table and of all, and whether this call made them or found them there."""

    tables: Mapping[str, int]
    total: int
    loaded: bool


def load_sample(conninfo: str, rows: int = DEFAULT_ROWS, seed: int = DEFAULT_SEED) -> SampleCounts:
    """Create the five tables in the schema `public` and fill them with so many rows in all, in one transaction.

    Where they are there already from the same size and seed nothing is done, whatever became of their rows and columns
    since. Another seed gives other data.

    Raises:
        RefusedError: tables of these names exist that are not this sample; they are left alone.
        DatabaseFailure: PostgreSQL refused a statement; nothing was changed.
    """
    if rows < MINIMUM_ROWS:
        raise ConfigurationError(f"The sample needs at least {MINIMUM_ROWS} rows.")
    if not 0 <= seed < _MAXIMUM_SEED:
        raise ConfigurationError("The sample's seed must be a number from 0 to 2^62.")
    counts = {table: rows * share // 100 for table, share in _SHARES.items()}
    counts["trades"] += rows - sum(counts.values())

    marker = f"{_MARKER}{rows} rows, seed {seed}"
    with Database(conninfo, *_NAMES).session("load the sample") as connection, connection.transaction():
        # Functions of rows.sql name the tables.
        connection.execute("SET LOCAL search_path TO public")
        # Another loader may take its time.
        connection.execute("SET LOCAL lock_timeout TO 0")
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOADER_LOCK])
        if _is_there(connection, marker):
            return SampleCounts(counts, rows, loaded=False)
        _create_extensions(connection)
        scripts = resources.files(__package__)
        connection.execute((scripts / "schema.sql").read_bytes())
        _make_constants(connection, counts, seed)
        connection.execute((scripts / "rows.sql").read_bytes())
        connection.execute((scripts / "indexes.sql").read_bytes())
        for table in TABLES:
            name = sql.Identifier(table)
            connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(name, sql.Literal(marker)))
            connection.execute(sql.SQL("ANALYZE {}").format(name))
    return SampleCounts(counts, rows, loaded=True)


def loaded_sample(conninfo: str) -> int | None:
    """How many rows the sample in a database was loaded with; None where there is no sample."""
    with Database(conninfo, *_NAMES).session("look for the sample") as connection:
        comments = _comments(connection)
    if len(comments) < len(TABLES) or not all(
        (comment or "").startswith(_MARKER) for comment in comments.values()
    ):
        return None
    return int(str(comments[TABLES[0]]).removeprefix(_MARKER).partition(" ")[0])


def _comments(connection: psycopg.Connection) -> dict[str, str | None]:
    """On the tables that have the names of the sample's."""
    rows = connection.execute(
        "SELECT relname::text, obj_description(oid, 'pg_class') FROM pg_class "
        "WHERE relnamespace = 'public'::regnamespace AND relname = ANY (%s)",
        [list(TABLES)],
    )
    return dict(rows)


def _is_there(connection: psycopg.Connection, marker: str) -> bool:
    """Whether this sample is there; refuses where anything else has the name of one of its tables."""
    found = _comments(connection)
    if not found:
        return False
    comments = set(found.values())
    if set(found) == set(TABLES) and comments == {marker}:
        return True
    other = next(iter(comments)) if len(comments) == 1 else None
    if other and other.startswith(_MARKER):
        raise RefusedError(
            f"The database holds another sample already ({other}), which was left alone. Ask for the same "
            "size and seed, name another database, or remove its tables first (`make clean` removes the "
            "embedded server with all its data)."
        )
    raise RefusedError(
        f"The database has tables of the sample's names already ({', '.join(sorted(found))}), which were "
        "left alone. Load the sample into another database."
    )


def _create_extensions(connection: psycopg.Connection) -> None:
    """What monitoring and the checks like to have, where the server has it and allows it."""
    available = connection.execute(
        "SELECT name::text FROM pg_available_extensions WHERE name = ANY (%s) ORDER BY name",
        [list(_EXTENSIONS)],
    ).fetchall()
    for (name,) in available:
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege), connection.transaction():
            connection.execute(sql.SQL("CREATE EXTENSION IF NOT EXISTS {}").format(sql.Identifier(name)))


def _make_constants(connection: psycopg.Connection, counts: Mapping[str, int], seed: int) -> None:
    """Make the constant functions that rows.sql refers to; the planner puts their values in their place."""
    numbers: Mapping[str, object] = {"seed": seed} | {f"{table}_rows": rows for table, rows in counts.items()}
    pools = {name: list(pool) for name, pool in {**_word_pools(seed), **difficult.POOLS}.items()}
    make = sql.SQL("CREATE FUNCTION pg_temp.{}() RETURNS {kind} IMMUTABLE LANGUAGE sql RETURN {}::{kind}")
    for kind, constants in ((sql.SQL("bigint"), numbers), (sql.SQL("text[]"), pools)):
        for name, value in constants.items():
            connection.execute(make.format(sql.Identifier(name), sql.Literal(value), kind=kind))


def _word_pools(seed: int) -> dict[str, list[str]]:
    """Names and places of several countries and scripts, and ASCII words for what is typed into forms."""
    pools: dict[str, list[str]] = {"first_names": [], "last_names": [], "streets": [], "cities": []}
    pools["locales"] = list(_LOCALES)
    for locale in _LOCALES:
        faker = Faker(locale)
        faker.seed_instance(seed)
        for _ in range(_WORDS_PER_LOCALE):
            pools["first_names"].append(faker.first_name())
            pools["last_names"].append(faker.last_name())
            pools["streets"].append(faker.street_address())
            pools["cities"].append(faker.city())
    english = Faker("en_US")
    english.seed_instance(seed)
    pools["handles"] = [english.user_name() for _ in range(10 * _WORDS_PER_LOCALE)]
    # Reserved (RFC 2606): no mail can ever reach anybody.
    pools["domains"] = ["example.com", "example.net", "example.org", "mail.example", "Trading.Example"]
    return pools


@secrecy.telling_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m alphapulse_encryption.sample.database", description="Load the sample database."
    )
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS, help="of all tables together (%(default)s)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="another one gives other data")
    parser.add_argument("--url", help="the database, default: the embedded one")
    chosen = parser.parse_args(arguments)
    counts = load_sample(chosen.url or embedded_url(SAMPLE_DATABASE), chosen.rows, chosen.seed)
    if not counts.loaded:
        print("The sample is loaded already: nothing to do.")
    for table, count in counts.tables.items() if counts.loaded else ():
        print(f"{table:<17}{count:>10,} rows")
    return 0


if __name__ == "__main__":
    secrecy.run_program(main)
