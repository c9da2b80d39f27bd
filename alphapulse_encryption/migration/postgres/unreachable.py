"""Why a connection failed, and what to do about it, told by the kind of what libpq, a server or a pooler says.

Their words are not repeated: they quote addresses, and an address with a mistake in it can have a piece of the password
where the host is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict


@dataclass(frozen=True)
class Reason:
    """What went wrong, and the next thing to do; ``{}`` stands for the variable with the address."""

    what: str
    next: str

    def next_for(self, variable: str) -> str:
        """With the name of the environment variable that has the address."""
        return self.next.replace("{}", variable)


_ENTRY = "Have its administrator add the entry, and reload the configuration."
_OPTIONS = "Take the parameter options out of {}, and PGOPTIONS out of the environment."
_MALFORMED = (
    "Correct {}: postgresql://role:password@host:5432/database, with special characters percent-encoded (@ as %40, "
    "/ as %2F)."
)

# What a server answers comes before what a client says of another try: libpq tries with and without TLS, and every
# address of a host. Of libpq's fe-connect.c and fe-secure-openssl.c, the server's auth.c, hba.c, postinit.c and
# postmaster.c, PgBouncer's client.c and psycopg, in lower case.
_REASONS = tuple(
    (re.compile(pattern, re.DOTALL), Reason(what, todo))
    for pattern, what, todo in (
        (
            "password authentication failed|sasl authentication failed",
            "the password is not accepted, or there is no such role",
            "Correct role and password in {}, or in the password file where the address has no password.",
        ),
        (
            "no password supplied",
            "a password is needed",
            "Put it into {}, or into a password file (passfile).",
        ),
        (
            "(peer|ident) authentication failed",
            "the server lets in the system user of the same name only",
            "Run as that system user, or give {} a host and a password.",
        ),
        (
            "valid client certificate|certificate authentication failed|alert (certificate|bad cert|unknown ca)",
            "the server wants a client certificate that it knows",
            "Give {} sslcert and sslkey, signed by an authority of the server's ssl_ca_file.",
        ),
        (
            "authentication failed",
            "the server does not accept the log-in of the role",
            "Look into the server's log for the reason, and at the role's line in pg_hba.conf.",
        ),
        (
            'channel binding|requirement "[^"]*" failed|authentication method .* not supported',
            "the way to log in that the server offers is not one that the address allows",
            "Correct channel_binding and require_auth in {}, or the role's line in the server's pg_hba.conf.",
        ),
        (
            "not permitted to log in",
            "the role may not log in",
            "ALTER ROLE … LOGIN, or name another role in {}.",
        ),
        (
            'no such user|role "[^"]*" does not exist',
            "there is no such role",
            "Correct the role in {}, or create it: --roles-sql prints SQL for roles.",
        ),
        (
            "permission denied for database",
            "the role may not connect to that database",
            "GRANT CONNECT ON DATABASE … to the role.",
        ),
        (
            'no such database|database "[^"]*" does not exist',
            "there is no such database",
            "Correct the database in {}: psql -l lists those of a server.",
        ),
        (
            "not currently accepting connections",
            "the database does not take connections",
            "ALTER DATABASE … ALLOW_CONNECTIONS true, or name another database in {}.",
        ),
        (
            "too many|connection slots|no more connections allowed",
            "too many connections",
            "Run it again when some have ended, or raise the limit: of the role, the database, the pooler "
            "or max_connections.",
        ),
        (
            "hot standby mode is disabled",
            "it is a standby that takes no connections",
            "Give {} the address of the primary.",
        ),
        (
            "session is not read-only|not in hot standby mode",
            "it is a primary, and the address asks for a standby",
            "Take target_session_attrs out of {}, or set it to read-write: the steps need the primary.",
        ),
        (
            "session is read-only|in hot standby mode",
            "it is a standby or read-only, and the steps need the primary",
            "Give {} the address of the primary.",
        ),
        ("starting up|not yet accepting", "the server is starting up", "Run it again in a moment."),
        ("shutting down", "the server is shutting down", "Start the server, and run it again."),
        (
            "in recovery mode",
            "the server recovers from a crash",
            "Run it again when that has ended, and look into the server's log.",
        ),
        (
            "unsupported startup parameter",
            "a connection pooler does not take the address's options",
            _OPTIONS,
        ),
        (
            "query_wait_timeout|login has been failing|pgbouncer cannot connect|server_login|client_login_timeout",
            "a connection pooler answers, and cannot reach the server behind it",
            "Look into the pooler's log, or give {} the server's own address.",
        ),
        (
            'unrecognized configuration parameter|for parameter "|set parameter "|command-line argument',
            "the server does not take the address's options",
            _OPTIONS,
        ),
        ('invalid "?[a-z_]+"? value', "the connection string is malformed", _MALFORMED),
        (
            "ssl support is not compiled in",
            "the client library was built without TLS",
            "Install one with TLS, or set sslmode=disable in {} where the network is trusted.",
        ),
        (
            "root certificate file",
            "there is no root certificate to check the server's by",
            "Name the file of its authority with sslrootcert in {}, or put it into ~/.postgresql/root.crt; "
            "sslrootcert=system takes the system's.",
        ),
        (
            "certificate verify failed|certificate has expired|self.signed certificate",
            "the server's TLS certificate is not accepted: expired, revoked, or of another authority",
            "See that sslrootcert in {} names the file of its authority, and that the certificate is valid: openssl "
            "s_client -starttls postgres -connect HOST:PORT shows it.",
        ),
        (
            "server certificate|host name must be specified|does not match host name",
            "the server's TLS certificate is of another name",
            "Give {} the host by the name in the certificate, with hostaddr for another address.",
        ),
        (
            "does not support ssl|ssl was required",
            "the server offers no TLS, which sslmode asks for",
            "Turn on ssl at the server, or set sslmode=prefer in {} where the network is trusted.",
        ),
        (
            "certificate file|private key|certificate present",
            "the client certificate or its key cannot be used",
            "See that sslcert and sslkey in {} go together, can be read, and that the key is its owner's alone "
            "(chmod 600).",
        ),
        (
            "pg_hba.conf.*(no encryption|ssl off).*pg_hba.conf.*(ssl encryption|ssl on)"
            "|pg_hba.conf.*(ssl encryption|ssl on).*pg_hba.conf.*(no encryption|ssl off)",
            "the server's pg_hba.conf has no entry for us, with TLS or without",
            _ENTRY,
        ),
        (
            "pg_hba.conf.*(no encryption|ssl off)",
            "the server's pg_hba.conf has no entry for us without TLS",
            "Set sslmode=require in {}, where the server offers TLS. " + _ENTRY,
        ),
        ("pg_hba.conf", "the server's pg_hba.conf has no entry for us", _ENTRY),
        (
            "invalid response to|unexpected response|frontend protocol",
            "what answers does not speak PostgreSQL's protocol",
            "Correct host and port in {}.",
        ),
        (
            "ssl",
            "TLS could not be agreed on",
            "Compare sslmode and the TLS versions of {} with the server's.",
        ),
        ("socket.*permission denied", "this system user may not use that socket", "Run as one who may."),
        ("connection refused", "connection refused", "Start the server, or correct host and port in {}."),
        (
            "socket.*no such file",
            "no server at that socket",
            "Start the server, or correct host and port in {}: unix_socket_directories tells its own.",
        ),
        (
            "could not translate host name|failed to resolve|name or service not known|name resolution",
            "unknown host",
            "Correct the host in {}, with special characters of the password percent-encoded (@ as %40); or see "
            "that the name is resolved here.",
        ),
        (
            "definition of service|service file",
            "there is no such service in the service file",
            "Correct service in {}, or PGSERVICE and PGSERVICEFILE.",
        ),
        (
            "timeout|timed out",
            "timed out",
            "See that the server runs and that no firewall drops the packets; correct host and port in {}.",
        ),
        (
            "unreachable|no route to host",
            "there is no way to that host",
            "See that the network or VPN is up; correct the host in {}.",
        ),
        (
            "closed the connection|reset by peer|could not receive|connection to server was lost",
            "the connection was ended before it was made",
            "See that host and port in {} are PostgreSQL's, that it runs, and what its log says.",
        ),
        (
            "missing|invalid|unexpected|forbidden|unterminated|syntax",
            "the connection string is malformed",
            _MALFORMED,
        ),
    )
)
_UNKNOWN = Reason(
    "for a reason that is not known here", "See that the server of {} runs, and what its log says."
)
# Of each host of several, as psycopg tells them.
_ATTEMPT = re.compile(r"^- host: '(.*?)', port: '?(.*?)'?, hostaddr: [^:]*.*?: ", re.MULTILINE)

_LABELS = {
    "service": "service ",
    "host": "",
    "hostaddr": "address ",
    "port": "port ",
    "dbname": "database ",
    "user": "role ",
}


def reason(said: str) -> Reason:
    """The kind of what was said of one server."""
    said = said.lower()
    return next((reason for pattern, reason in _REASONS if pattern.search(said)), _UNKNOWN)


def unreachable(conninfo: str, said: str, variable: str) -> str:
    """What failed, where, and what to do.

    Args:
        said: by the driver; not repeated.
        variable: the environment variable with the address.
    """
    found = {"": reason(said)}
    _, *attempts = _ATTEMPT.split(said)
    by_server: dict[str, str] = {}
    for host, port, text in zip(attempts[::3], attempts[1::3], attempts[2::3], strict=True):
        by_server[f"{host}:{port}"] = by_server.get(f"{host}:{port}", "") + text
    where = _where(conninfo)
    if where and len(by_server) > 1:
        found = {f"{server}: ": reason(text) for server, text in by_server.items()}
    told = "; ".join(server + each.what for server, each in found.items())
    todo = " ".join(dict.fromkeys(each.next_for(variable) for each in found.values()))
    return f"The database cannot be reached ({told}). {where}{todo}"


def _where(conninfo: str) -> str:
    """What was tried, in words; nothing where a piece of a password may be in it."""
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.Error:
        return ""
    defaults = {} if given.get("service") else {o.keyword.decode(): o.val for o in pq.Conninfo.get_defaults()}
    parts = {
        name: str(given.get(name) or (defaults.get(name) or b"").decode(errors="replace")) for name in _LABELS
    }
    # An @ in a password that is not percent-encoded ends it too early: what follows is taken for the host.
    if any("@" in parts[name].lstrip("@") for name in ("host", "hostaddr", "port", "dbname")):
        return ""
    if not (parts["host"] or parts["hostaddr"] or parts["service"]):
        parts["host"] = "the default socket"
    told = (f"{label}{parts[name]}" for name, label in _LABELS.items() if parts[name])
    return f"Tried: {', '.join(told)}. "
