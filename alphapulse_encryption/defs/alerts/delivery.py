"""Delivery: a webhook as Slack has it, and e-mail; either, both or none, as the environment says.

Addresses of webhooks are secrets: whoever knows one can post to it. So neither they nor passwords are in any
representation, log line or error, and of what a library or a server says only the kind of trouble is told.

Not by a notification library: apprise 2.3 returns no reason for a failure, ignores Retry-After, speaks no STARTTLS
where it is only offered, and sends each recipient a mail of its own.
"""

from __future__ import annotations

import smtplib
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from html import escape
from typing import Protocol
from urllib.parse import unquote, urlsplit

import requests
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
)

from alphapulse_encryption import settings
from alphapulse_encryption.errors import ConfigurationError, MigrationError
from alphapulse_encryption.secrecy import unlogged

ATTEMPTS = 3
# Dagster ends a sensor's tick after a minute. Channels are told side by side, and none begins anew after this.
PATIENCE_SECONDS = 25.0
# Each step of a conversation has its own time limit; this is that of all of them together.
LONGEST_SECONDS = 30.0
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 8.0
# Whoever asks for more patience than this is asked at the next tick.
LONGEST_PAUSE_SECONDS = 6.0
_PORTS = {"smtps": 465, "smtp+starttls": 587, "smtp": 25}

VARIABLES = (
    "ALPHAPULSE_ALERT_WEBHOOK_URL, or ALPHAPULSE_SMTP_URL with ALPHAPULSE_ALERT_EMAIL_TO and "
    "ALPHAPULSE_ALERT_EMAIL_FROM"
)


@dataclass(frozen=True)
class Message:
    """What a person gets: a line, and all the rest as plain text."""

    subject: str
    text: str


class DeliveryError(MigrationError):
    """A message did not arrive; says why in words of ours, and whether and after how many seconds to try again."""

    def __init__(self, message: str, *, again: bool, after: float | None = None) -> None:
        super().__init__(message)
        self.again = again and (after or 0) <= LONGEST_PAUSE_SECONDS
        self.after = after


class Channel(Protocol):
    """A way to a person. Its name is what ticks and the terminal call it, and tells no address."""

    @property
    def name(self) -> str: ...

    def send(self, message: Message) -> None:
        """Try once; raises DeliveryError, or the library's own OSError, of which only the kind may be told."""


@dataclass(frozen=True)
class Webhook:
    """An incoming webhook: JSON ``{"text": …}`` by POST, as Slack, Mattermost and others take it."""

    url: str = field(repr=False)
    name: str = field(default="webhook", init=False)

    def send(self, message: Message) -> None:
        """See `Channel.send`. Redirects are not followed: a POST would become a GET, and nothing arrive."""
        with (
            unlogged("urllib3.connectionpool"),
            requests.post(
                self.url,
                # These characters mean something in Slack's text: a table's name could notify a channel.
                json={"text": escape(f"{message.subject}\n{message.text}", quote=False)},
                timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
                allow_redirects=False,
                # What it answers beyond its status is not read.
                stream=True,
            ) as answer,
        ):
            status, after = answer.status_code, answer.headers.get("Retry-After", "")
        if not 200 <= status < 300:
            # RFC 9110 section 10.2.3; of its two forms the date is not honoured, and the usual pause serves.
            seconds = float(after) if after.isascii() and after.isdigit() else None
            again = status in {408, 425, 429} or status >= 500
            raise DeliveryError(f"HTTP status {status}", again=again, after=seconds)


@dataclass(frozen=True)
class Email:
    """Mail by SMTP, to the server of a URL as ``ALPHAPULSE_SMTP_URL`` has it.

    A password is sent over TLS only, and certificates are checked (``SSL_CERT_FILE`` names further authorities).
    """

    url: str = field(repr=False)
    sender: str = field(repr=False)
    recipients: tuple[str, ...] = field(repr=False)
    name: str = field(default="e-mail", init=False)

    def send(self, message: Message) -> None:
        """See `Channel.send`. It has arrived when the server took it for one recipient at least."""
        taken = False
        try:
            with self._connected() as connection:
                connection.send_message(self._written(message))
                taken = True
        except OSError:
            # How a server takes its leave does not matter.
            if not taken:
                raise

    @contextmanager
    def _connected(self) -> Iterator[smtplib.SMTP]:
        url, context = urlsplit(self.url), ssl.create_default_context()
        host, port = url.hostname or "", url.port or _PORTS[url.scheme]
        secure = url.scheme == "smtps"
        with (
            smtplib.SMTP_SSL(host, port, timeout=ANSWER_SECONDS, context=context)
            if secure
            else smtplib.SMTP(host, port, timeout=ANSWER_SECONDS)
        ) as connection:
            connection.ehlo_or_helo_if_needed()
            if url.scheme == "smtp+starttls" or (not secure and connection.has_extn("starttls")):
                connection.starttls(context=context)
                secure = True
            if url.username and url.password:
                if not secure:
                    raise DeliveryError(
                        "the server offers no TLS, without which no password is sent", again=False
                    )
                connection.login(unquote(url.username), unquote(url.password))
            yield connection

    def _written(self, message: Message) -> EmailMessage:
        mail = EmailMessage()
        mail["Subject"] = " ".join(message.subject.split())
        mail["From"] = self.sender
        mail["To"] = ", ".join(self.recipients)
        mail["Date"] = formatdate()
        # Not this machine's name.
        mail["Message-ID"] = make_msgid(domain=self.sender.rpartition("@")[2])
        # Vacation notices and the like are not sent in answer (RFC 3834).
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content(message.text)
        return mail


def _trouble(error: OSError) -> DeliveryError:  # noqa: PLR0912 -- one for each kind
    """What a library met, without its text, which may quote an address."""
    match error:
        case smtplib.SMTPAuthenticationError(smtp_code=code):
            # 454 is a temporary failure (RFC 4954 section 6).
            return DeliveryError(f"the log-in is not accepted (SMTP status {code})", again=code == 454)
        case smtplib.SMTPRecipientsRefused(recipients=refused):
            codes = sorted({code for code, _ in refused.values()})
            return DeliveryError(
                f"no recipient is accepted (SMTP status {', '.join(map(str, codes))})",
                again=all(400 <= code < 500 for code in codes),
            )
        case smtplib.SMTPResponseException(smtp_code=code):
            return DeliveryError(f"SMTP status {code}", again=400 <= code < 500)
        case smtplib.SMTPNotSupportedError():
            return DeliveryError("the server does not offer STARTTLS, or no log-in", again=False)
        case smtplib.SMTPServerDisconnected():
            # smtplib says this of an answer that does not come as well.
            return DeliveryError("the server ended the connection, or does not answer", again=True)
        case ssl.SSLError() | requests.exceptions.SSLError():
            return DeliveryError("its TLS certificate is not accepted, or it does not speak TLS", again=False)
        case requests.exceptions.ProxyError():
            return DeliveryError("the proxy does not serve", again=True)
        case requests.exceptions.ConnectTimeout():
            return DeliveryError(f"no connection within {CONNECT_SECONDS:g} s", again=True)
        case TimeoutError() | requests.exceptions.Timeout():
            return DeliveryError(f"no answer within {ANSWER_SECONDS:g} s", again=True)
        case socket.gaierror():
            return DeliveryError("its host is not known", again=True)
        case ConnectionRefusedError():
            return DeliveryError("connection refused", again=True)
        case smtplib.SMTPException() | requests.RequestException() if not isinstance(
            error, requests.exceptions.ConnectionError
        ):
            return DeliveryError(type(error).__name__, again=False)
        case _:
            return DeliveryError("it cannot be reached, or ended the connection", again=True)


def configured_channels() -> tuple[Channel, ...]:
    """The channels that the environment names."""
    said = settings.Alerts()
    channels: list[Channel] = [] if said.webhook_url is None else [Webhook(said.webhook_url)]
    wanted = {
        "ALPHAPULSE_SMTP_URL": said.mail_url,
        "ALPHAPULSE_ALERT_EMAIL_TO": said.recipients,
        "ALPHAPULSE_ALERT_EMAIL_FROM": said.sender,
    }
    missing = [name for name, value in wanted.items() if not value]
    if said.mail_url is not None and said.sender is not None and said.recipients:
        channels.append(Email(said.mail_url, said.sender, said.recipients))
    elif len(missing) < len(wanted):
        raise ConfigurationError(f"Alerts by e-mail need {' and '.join(missing)} as well.")
    return tuple(channels)


def deliver(
    messages: Sequence[tuple[Channel, Message]], *, sleep: Callable[[float], None] = time.sleep
) -> dict[str, str | None]:
    """Send to each channel its message, side by side; one that fails does not keep the others.

    What may pass is tried again, after the pause that the server asks for; not for longer than a sensor's tick lasts.
    Says by the channels' names why the message did not arrive; None where it did.
    """
    if not messages:
        return {}

    pool = ThreadPoolExecutor(max_workers=len(messages))
    results = {channel.name: pool.submit(_sent, channel, message, sleep) for channel, message in messages}
    wait(results.values(), timeout=LONGEST_SECONDS)
    # Whoever is that slow may have it all the same; better twice than never.
    pool.shutdown(wait=False)
    return {
        name: result.result() if result.done() else f"not done within {LONGEST_SECONDS:g} s"
        for name, result in results.items()
    }


def _sent(channel: Channel, message: Message, sleep: Callable[[float], None]) -> str | None:
    usual = wait_exponential(multiplier=0.5, exp_base=4)

    def send() -> None:
        try:
            channel.send(message)
        except OSError as error:
            raise _trouble(error) from None

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.after if isinstance(error, DeliveryError) else None
        return usual(state) if asked is None else asked

    try:
        Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, DeliveryError) and error.again),
            stop=stop_after_attempt(ATTEMPTS)
            | stop_before_delay(PATIENCE_SECONDS - CONNECT_SECONDS - ANSWER_SECONDS),
            wait=pause,
            sleep=sleep,
            reraise=True,
        )(send)
    except DeliveryError as error:
        return str(error)
    except Exception as error:
        # Its text could quote an address.
        return f"unexpected {type(error).__name__}"
    return None


def trial_message(label: str | None) -> Message:
    """What ``--test-alerts`` sends."""
    about = f" ({label})" if label else ""
    return Message(
        f"AlphaPulse encryption{about}: test of the alerts",
        "This is what --test-alerts sends. Alerts arrive here once their sensors are started in Dagster's UI, under "
        "Automation.",
    )
