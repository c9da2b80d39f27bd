"""A server of the machine's own PostgreSQL, which has TLS and is of another version than the embedded one."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from alphapulse_encryption.sample.postgres import EmbeddedPostgres

BINS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
NEEDED = "There is no PostgreSQL in /usr/lib/postgresql (Debian: apt install postgresql)."
HOST = "db.example"
_ACCESS = """
local all all trust
host all guarded 127.0.0.1/32 scram-sha-256
hostssl all owner 127.0.0.1/32 cert
hostssl tls all 127.0.0.1/32 trust
host tls all 127.0.0.1/32 reject
host refused all 127.0.0.1/32 reject
host all all 127.0.0.1/32 trust
"""
_SETTINGS = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = '{folder}'
fsync = off
max_connections = 12
ssl = on
ssl_cert_file = '{folder}/server.crt'
ssl_key_file = '{folder}/server.key'
ssl_ca_file = '{folder}/root.crt'
"""


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    folder: Path
    bin_dir: Path

    def url(self, database: str, role: str = "postgres", **options: str) -> str:
        """Over TCP; a host other than the certificate's, unless it is given."""
        given = {"host": "127.0.0.1", "port": str(self.port), "user": role, "dbname": database} | options
        return psycopg.conninfo.make_conninfo(**given)

    def socket(self, database: str, role: str = "postgres") -> str:
        return f"host={self.folder} port={self.port} user={role} dbname={database}"

    @property
    def authority(self) -> str:
        return str(self.folder / "root.crt")

    def certify(self, days: int) -> None:
        """A certificate for :data:`HOST` that ends after so many days, of an authority of its own."""
        now = datetime.datetime.now(datetime.UTC)
        keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "server")}
        for name, subject in (("root", "authority"), ("server", HOST)):
            until = now + datetime.timedelta(days=3650 if name == "root" else days)
            certificate = (
                x509.CertificateBuilder()
                .subject_name(_named(subject))
                .issuer_name(_named("authority"))
                .public_key(keys[name].public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(days=30))
                .not_valid_after(until)
                .add_extension(x509.BasicConstraints(ca=name == "root", path_length=None), critical=True)
                .add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
                .sign(keys["root"], hashes.SHA256())
            )
            (self.folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        secret = self.folder / "server.key"
        secret.write_bytes(
            keys["server"].private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        secret.chmod(0o600)
        os.chown(secret, self.folder.stat().st_uid, self.folder.stat().st_gid)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@contextlib.contextmanager
def installed_server(embedded: EmbeddedPostgres) -> Iterator[Server]:
    """Started as the account that the embedded server runs under."""
    account = Path(str(psycopg.conninfo.conninfo_to_dict(embedded.url("postgres"))["host"])).stat()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not below pytest's own directory, which is closed to that account.
    with tempfile.TemporaryDirectory() as name:
        server = Server(port, Path(name), BINS[-1])
        os.chown(name, account.st_uid, account.st_gid)
        Path(name).chmod(0o755)
        server.certify(30)
        data = server.folder / "data"

        def run(program: str, *arguments: str) -> None:
            subprocess.run(
                [server.bin_dir / program, "-D", data, *arguments],
                check=True,
                cwd="/",
                stdout=subprocess.DEVNULL,
                user=account.st_uid if os.geteuid() == 0 else None,
                group=account.st_gid if os.geteuid() == 0 else None,
            )

        run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale", "C", "--no-sync")
        (data / "pg_hba.conf").write_text(_ACCESS)
        with (data / "postgresql.conf").open("a") as file:
            file.write(_SETTINGS.format(port=port, folder=name))
        run("pg_ctl", "-w", "-l", str(server.folder / "log"), "start")
        try:
            yield server
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
