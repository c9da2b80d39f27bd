"""What takes alerts, on loopback: a webhook that keeps what is posted, and mail servers with TLS and log-in."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from email.policy import default
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from werkzeug.wrappers import Request, Response

from alphapulse_encryption_tests.keysources.servers import Front, serving

USER, PASSWORD = "alerts@example.com", "canary p@ss:w/ord"


@dataclass
class Posted:
    """An incoming webhook.

    Args:
        texts: what was posted and accepted.
    """

    texts: list[str] = field(default_factory=list)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        assert (request.method, request.content_type) == ("POST", "application/json")
        members = json.loads(request.get_data())
        assert set(members) == {"text"}
        self.texts.append(members["text"])
        return Response("ok")(environ, start_response)


@contextlib.contextmanager
def webhook() -> Iterator[tuple[Posted, Front]]:
    posted = Posted()
    with serving(posted) as front:
        yield posted, front


@dataclass
class Mailbox:
    """What a mail server took.

    Args:
        answers: to the next messages, in place of taking them.
        refused: recipients that are not taken.
    """

    mails: list[Message] = field(default_factory=list)
    recipients: list[list[str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    encrypted: list[bool] = field(default_factory=list)
    logged_in: list[bool] = field(default_factory=list)
    attempts: int = 0
    port: int = 0

    async def handle_RCPT(self, _: Any, __: Any, envelope: Any, address: str, ___: Any) -> str:
        if address in self.refused:
            return "550 no such mailbox as canary@example.com"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.attempts += 1
        if self.answers:
            return self.answers.pop(0)
        self.mails.append(message_from_bytes(envelope.content, policy=default))
        self.recipients.append(envelope.rcpt_tos)
        self.encrypted.append(server.transport.get_extra_info("cipher") is not None)
        self.logged_in.append(session.authenticated)
        return "250 OK"


def _authenticated(_: Any, __: Any, ___: Any, ____: Any, data: Any) -> AuthResult:
    # Not handled: the server itself answers.
    right = (data.login, data.password) == (USER.encode(), PASSWORD.encode())
    return AuthResult(success=right, handled=False)


@contextlib.contextmanager
def mail_server(
    context: ssl.SSLContext | None = None, *, implicit: bool = False, login: bool = False
) -> Iterator[Mailbox]:
    """A mail server.

    Args:
        context: with its certificate; None for a server without TLS.
        implicit: TLS from the beginning, not by STARTTLS.
        login: whether nobody may send without.
    """
    box = Mailbox()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        box.port = probe.getsockname()[1]
    options: dict[str, Any] = {"ssl_context" if implicit else "tls_context": context} if context else {}
    if login:
        options |= {"authenticator": _authenticated, "auth_required": True, "auth_require_tls": not implicit}
    controller = Controller(box, hostname="127.0.0.1", port=box.port, **options)
    controller.start()
    try:
        yield box
    finally:
        controller.stop()


def certificate(directory: Path) -> Path:
    """A key and a certificate of its own for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path
