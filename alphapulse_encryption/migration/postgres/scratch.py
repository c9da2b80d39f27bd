"""Scratch databases for dumps: each is owned by a role of its own without rights, and worked on as that role.

A dump is code: its triggers, defaults, checks and index expressions run with the rights of the role that restores it
and of the one that works on it. The role of the server's address makes the database, and the extensions while nothing
else is in it; from then on it runs nothing there, and drops the database from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import LiteralString

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Composable, Identifier, Literal

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres import locks, programs
from alphapulse_encryption.migration.postgres.database import (
    LOG_SETTINGS,
    SET_PRIVILEGES,
    Connection,
    Database,
    DatabaseUnreachable,
    answer,
)

_MARK = "alphapulse_encryption: owns the scratch database of the same name"

# What of a database's locale is told under other names, or not at all, by older servers (15, 17).
_LOCALE = """
SELECT pg_encoding_to_char(encoding), datcollate, datctype, to_jsonb(d) ->> 'datlocprovider',
       coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'), to_jsonb(d) ->> 'daticurules'
  FROM pg_database d WHERE datname = current_database()
"""
# In the order in which they were created: one that needs another comes after it.
_EXTENSIONS = """
SELECT e.extname, n.nspname, n.oid::bigint FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
 WHERE e.extname <> 'plpgsql' ORDER BY e.oid
"""


@dataclass(frozen=True)
class Like:
    """What a scratch database has before a dump is restored into it: of the original, which is only read.

    Args:
        options: of ``CREATE DATABASE``, so that it sorts and encodes as the original.
        extensions: name, schema, and the schema's oid in the original.
    """

    options: Composable
    extensions: tuple[tuple[str, str, int], ...] = ()


def read_like(connection: Connection) -> Like:
    """What is needed to make a database like the one of a session."""
    ((encoding, collate, ctype, provider, locale, rules),) = connection.execute(_LOCALE)
    options = {"ENCODING": encoding, "LC_COLLATE": collate, "LC_CTYPE": ctype}
    if provider == "i":
        options |= {"LOCALE_PROVIDER": "icu", "ICU_LOCALE": locale, "ICU_RULES": rules}
    elif provider == "b":
        options |= {"LOCALE_PROVIDER": "builtin", "BUILTIN_LOCALE": locale}
    given = SQL(" ").join(
        SQL("{} {}").format(SQL(name), Literal(value)) for name, value in options.items() if value is not None
    )
    return Like(given, tuple(connection.execute(_EXTENSIONS).fetchall()))


# A role may change its own password and settings: so code that runs as it gets all that it may do elsewhere.
_ABOUT_US = """
SELECT rolsuper, rolsuper OR rolcreatedb, rolsuper OR rolcreaterole,
       rolreplication OR EXISTS (SELECT FROM pg_auth_members m WHERE m.member = r.oid)
  FROM pg_roles r WHERE rolname = current_user
"""


def refuse_unless_possible(connection: Connection, what: str, variable: str) -> bool:
    """Find out whether the role of a session may make a scratch database; whether it gets a role of its own, too.

    Args:
        what: needs it, as the subject of a sentence.
        variable: names another server.

    Raises:
        RefusedError: it may not, or the dump's code would get rights of this role.
    """
    ((_, databases, roles, more),) = connection.execute(_ABOUT_US)
    if not databases:
        raise RefusedError(
            f"{what} needs a scratch database, and this role may not create a database. Give it CREATEDB, or name "
            f"another server with {variable}; nothing was done."
        )
    if not roles and more:
        name = answer(connection, "SELECT current_user::text")
        raise RefusedError(
            f"{what} runs code of the dump, and would run it as {name}, which is a member of other roles and may not "
            "create a role without rights for it. Nothing was done. Make a role that may create databases and nothing "
            f"else (CREATE ROLE encryption_scratch LOGIN CREATEDB PASSWORD '…'), and name it in {variable}."
        )
    return bool(roles)


def make(server: Database, connection: Connection, name: str, like: Like, *, limit: int = -1) -> Database:
    """Make a scratch database beside the one of a session, and the role that owns it; returns the way in.

    Args:
        name: of the database and of the role; the session holds its lock.
        limit: of connections; by what it was born with, a database is known before it has a comment.

    Raises:
        RefusedError: an extension of the original cannot be created there, or the owner cannot log in.
        DatabaseFailure: the server refused.
    """
    ((superuser, _, roles, _),) = connection.execute(_ABOUT_US)
    owner = Identifier(name)
    if roles:
        connection.execute(
            SQL("CREATE ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS").format(
                owner
            )
        )
        connection.execute(SQL("COMMENT ON ROLE {} IS {}").format(owner, Literal(_MARK)))
        if not superuser:
            # To give it a database, and to drop that.
            connection.execute(SQL("GRANT {} TO CURRENT_USER").format(owner))
    connection.execute(
        SQL("CREATE DATABASE {} {} TEMPLATE template0 CONNECTION LIMIT {} {}").format(
            owner, SQL("OWNER {}").format(owner) if roles else SQL(""), Literal(limit), like.options
        )
    )
    connection.execute(SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(owner))
    if roles:
        _keep_values_out_of_the_log(connection, owner)
    if superuser:
        _furnish(server, connection, name, like)
    try:
        inside(server, name).connect().close()
    except DatabaseUnreachable as error:
        raise RefusedError(
            f"The server does not let in the role that was made for the copy of a database: {error.args[0]} It logs in "
            "with a password, over the same address: pg_hba.conf needs a line with the method scram-sha-256 for it."
        ) from None
    return inside(server, name)


def _keep_values_out_of_the_log(connection: Connection, owner: Composable) -> None:
    """Of its owner's sessions, whatever the code of a dump sets there; as far as the role of a session may."""
    known = connection.execute("SELECT name FROM pg_settings WHERE name = ANY (%s)", [list(LOG_SETTINGS)])
    for (setting,) in known.fetchall():
        parameter = SQL(".").join(map(Identifier, setting.split(".")))
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
            connection.execute(
                SQL("ALTER ROLE {} SET {} TO {}").format(owner, parameter, Literal(LOG_SETTINGS[setting]))
            )


# What a dump brings of an extension: rows of its tables, and what is made with its wrappers.
_PRIVILEGES_ON: Mapping[str, LiteralString] = {
    "r": "SELECT, INSERT ON TABLE",
    "S": "ALL ON SEQUENCE",
    "w": "USAGE ON FOREIGN DATA WRAPPER",
}
_EXTENSIONS_OBJECTS = """
SELECT c.relkind::text, ARRAY[n.nspname, c.relname]::text[]
  FROM pg_extension e, unnest(e.extconfig) AS f (oid) JOIN pg_class c ON c.oid = f.oid
  JOIN pg_namespace n ON n.oid = c.relnamespace
UNION ALL
SELECT 'w', ARRAY[fdwname]::text[] FROM pg_foreign_data_wrapper
"""


def _furnish(server: Database, connection: Connection, name: str, like: Like) -> None:
    """What takes a superuser, while the database is empty: there is no code of anybody's in it yet."""
    owner = Identifier(name)
    if connection.info.server_version >= SET_PRIVILEGES:
        # As those who migrate have it.
        connection.execute(SQL("GRANT SET ON PARAMETER session_replication_role TO {}").format(owner))
    with beside(server, name).session("prepare the scratch database") as empty:
        empty.execute(SQL("ALTER SCHEMA public OWNER TO {}").format(owner))
        for extension, schema, _ in like.extensions:
            if schema != "public" and not schema.startswith("pg_"):
                empty.execute(
                    SQL("CREATE SCHEMA IF NOT EXISTS {} AUTHORIZATION {}").format(Identifier(schema), owner)
                )
            try:
                empty.execute(
                    SQL("CREATE EXTENSION IF NOT EXISTS {} WITH SCHEMA {}").format(
                        Identifier(extension), Identifier(schema)
                    )
                )
            except psycopg.Error as error:
                raise RefusedError(
                    f"The extension {extension} cannot be created on the server for the copy of the database "
                    f"({error.sqlstate}). Install its package there."
                ) from None
        for kind, names in empty.execute(_EXTENSIONS_OBJECTS).fetchall():
            granted = SQL(_PRIVILEGES_ON[kind])
            empty.execute(SQL("GRANT {} {} TO {}").format(granted, Identifier(*names), owner))


def beside(server: Database, name: str) -> Database:
    """A database of the same server, as the role of the address."""
    return replace(server, conninfo=make_conninfo(server.conninfo, dbname=name))


# Of the owners of scratch databases: in the memory of this process alone. None where that is the role of the address.
# Another process that goes on with a database gives its owner another password.
_passwords: dict[str, str | None] = {}
_entering = threading.Lock()


def inside(server: Database, name: str) -> Database:
    """A scratch database as its owner: the only way in, once something of a dump is there.

    Raises:
        DatabaseFailure: the server refused.
        ConfigurationError: it cannot be reached.
    """
    with _entering:
        if name not in _passwords:
            with server.session("log in to the scratch database") as connection:
                _passwords[name] = _new_password(connection, name)
        password = _passwords[name]
    if password is None:
        return beside(server, name)
    way = make_conninfo(server.conninfo, dbname=name, user=name, password=password)
    return replace(server, conninfo=way)


def _new_password(connection: Connection, name: str) -> str | None:
    if not _has_owner(connection, name):
        return None
    password = secrets.token_urlsafe(32)
    # The server, and its log, are told what a password is checked by.
    check = connection.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256")
    connection.execute(SQL("ALTER ROLE {} PASSWORD {}").format(Identifier(name), Literal(check.decode())))
    return password


def _has_owner(connection: Connection, name: str) -> bool:
    query: LiteralString = (
        "SELECT true FROM pg_roles WHERE rolname = %s AND shobj_description(oid, 'pg_authid') = %s"
    )
    return bool(answer(connection, query, name, _MARK))


def drop(connection: Connection, name: str) -> None:
    """Drop a scratch database, with all connections to it, and its owner; from a session beside it."""
    database = Identifier(name)
    # The owner may make it one, and that cannot be dropped.
    if answer(connection, "SELECT datistemplate FROM pg_database WHERE datname = %s", name):
        connection.execute(SQL("ALTER DATABASE {} IS_TEMPLATE false").format(database))
    connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(database))
    if _has_owner(connection, name):
        connection.execute(SQL("DROP OWNED BY {}").format(database))
        connection.execute(SQL("DROP ROLE IF EXISTS {}").format(database))
    _passwords.pop(name, None)


def drop_abandoned_owners(connection: Connection, prefix: str) -> None:
    """Drop the owners whose databases are gone, or were never made, because a process was killed in between."""
    left = connection.execute(
        "SELECT rolname FROM pg_roles WHERE starts_with(rolname, %s) AND shobj_description(oid, 'pg_authid') = %s "
        "AND NOT EXISTS (SELECT FROM pg_database WHERE datname = rolname)",
        [prefix, _MARK],
    )
    for (name,) in left.fetchall():
        if locks.try_hold(connection, name):
            try:
                # Another role's, which it has to drop: what is begun here does not wait for that.
                with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
                    drop(connection, name)
            finally:
                locks.release(connection, name)


# An entry of a list reads ``4321; 0 16385 TABLE DATA public users owner`` (pg_restore's manual, option ``-l``): its
# number, a catalogue and the oid of the object in the original, what it is, and names. What only a superuser may
# make, of these kinds, stays out; a mapping holds a password for another server.
_ENTRY = re.compile(
    r"\d+; \d+ (?P<oid>\d+) "
    r"(?P<what>(?:COMMENT - )?(?:EVENT TRIGGER|EXTENSION)|USER MAPPING|SCHEMA)? ?(?P<name>.*)"
)


def restore(
    way: programs.Way,
    pair: programs.Pair,
    listing: str,
    like: Like,
    feed: Callable[[subprocess.Popen[bytes]], int],
) -> tuple[str | None, tuple[str, ...]]:
    """Restore a dump as the owner of a scratch database; what went wrong, and what was left out.

    Args:
        way: to the database, as its owner.
        listing: what ``pg_restore --list`` says of the dump.
        feed: gives the dump to pg_restore; returns its exit status.
    """
    with way.database.session("look at the scratch database") as connection:
        there = {name for (name,) in connection.execute("SELECT nspname FROM pg_namespace")}
        untrusted = {name for (name,) in connection.execute(_UNTRUSTED)}
    made = {str(oid) for _, schema, oid in like.extensions if schema in there}
    wanted, left_out = [], []
    for line in listing.splitlines():
        entry = _ENTRY.match(line)
        what = entry["what"] if entry is not None else None
        about = entry["name"].removeprefix("- ").strip() if entry is not None else ""
        if entry is None or what is None or (what == "EXTENSION" and about not in untrusted):
            wanted.append(line)
        elif what == "SCHEMA":
            wanted += [] if entry["oid"] in made else [line]
        elif not what.startswith("COMMENT"):
            left_out.append(f"{what.lower()} {about}")
    entries, entrance = os.pipe()

    def hand_over() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(entrance, "w", encoding="utf-8") as pipe:
            pipe.write("".join(f"{line}\n" for line in wanted))

    handing = threading.Thread(target=hand_over, name="list of entries", daemon=True)
    handing.start()
    try:
        command = [*programs.restore_command(pair, way), f"--use-list=/dev/fd/{entries}"]
        with programs.child(
            command, way.environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, inherited=[entries]
        ) as (process, said):
            status = feed(process)
    finally:
        os.close(entries)
        handing.join()
    problem = programs.restore_problem(status, said(), way)
    if problem is None:
        with way.database.session("read the restored database") as connection:
            # For its owner, too, it would hide rows.
            for names in connection.execute(_FORCED).fetchall():
                connection.execute(
                    SQL("ALTER TABLE {} NO FORCE ROW LEVEL SECURITY").format(Identifier(*names))
                )
    return problem, tuple(left_out)


# Not there, and not for its owner to create. What needs one fails, and is named.
_UNTRUSTED = """
SELECT a.name FROM pg_available_extensions a
  JOIN pg_available_extension_versions v ON v.name = a.name AND v.version = a.default_version
 WHERE a.installed_version IS NULL AND v.superuser AND NOT v.trusted
"""
_FORCED = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relforcerowsecurity
"""
