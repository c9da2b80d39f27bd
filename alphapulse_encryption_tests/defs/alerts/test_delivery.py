"""Delivery to real servers on loopback: what arrives, what is tried again, and what is told of trouble."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from email.message import EmailMessage
from pathlib import Path
from urllib.parse import quote

import pytest
from werkzeug.wrappers import Response

from alphapulse_encryption import settings
from alphapulse_encryption.__main__ import main
from alphapulse_encryption.defs.alerts import delivery
from alphapulse_encryption.defs.alerts.delivery import (
    Channel,
    Email,
    Message,
    Webhook,
    configured_channels,
    deliver,
)
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption_tests.defs.alerts.servers import (
    PASSWORD,
    USER,
    Mailbox,
    Posted,
    certificate,
    mail_server,
    webhook,
)
from alphapulse_encryption_tests.keysources.servers import Front

MESSAGE = Message("Two things", "<users> & more:\n- first\n- zweitens: größer")
SECRET_PATH = "/services/T0/B0/canary-of-a-webhook"
WEBHOOK, TO, FROM, SMTP = (
    "ALPHAPULSE_ALERT_WEBHOOK_URL",
    "ALPHAPULSE_ALERT_EMAIL_TO",
    "ALPHAPULSE_ALERT_EMAIL_FROM",
    "ALPHAPULSE_SMTP_URL",
)


def sent(channel: Channel, message: Message = MESSAGE) -> tuple[str | None, list[float]]:
    """Why it did not arrive, and the pauses between the tries, which nobody waits for."""
    waits: list[float] = []
    results = deliver([(channel, message)], sleep=waits.append)
    assert list(results) == [channel.name]
    return results[channel.name], waits


@pytest.fixture
def hook() -> Iterator[tuple[Posted, Front, Webhook]]:
    with webhook() as (posted, front):
        yield posted, front, Webhook(front.url + SECRET_PATH)


def test_a_webhook_gets_slacks_json(hook: tuple[Posted, Front, Webhook]) -> None:
    posted, front, channel = hook
    assert sent(channel) == (None, [])
    assert posted.texts == ["Two things\n&lt;users&gt; &amp; more:\n- first\n- zweitens: größer"]
    assert front.requests == [f"POST {SECRET_PATH}"]


@pytest.mark.parametrize(
    ("answers", "problem", "waits", "arrived"),
    [
        ([Response(status=500)], None, [0.5], 1),
        ([Response(status=503), Response(status=502)], None, [0.5, 2], 1),
        ([Response(status=500)] * 4, "HTTP status 500", [0.5, 2], 0),
        ([Response(status=429, headers={"Retry-After": "3"})], None, [3], 1),
        ([Response(status=429)], None, [0.5], 1),
        # Longer than a tick lasts: at the next one.
        ([Response(status=429, headers={"Retry-After": "120"})], "HTTP status 429", [], 0),
        ([Response(status=503, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})], None, [0.5], 1),
        ([Response("canary", status=404)], "HTTP status 404", [], 0),
        ([Response("invalid_token", status=403)], "HTTP status 403", [], 0),
        ([Response(status=302, headers={"Location": "/elsewhere"})], "HTTP status 302", [], 0),
        ([Response(status=301, headers={"Location": "http://127.0.0.1:1/"})], "HTTP status 301", [], 0),
    ],
)
def test_what_a_webhook_answers(
    hook: tuple[Posted, Front, Webhook],
    answers: Sequence[Response],
    problem: str | None,
    waits: list[float],
    arrived: int,
) -> None:
    posted, front, channel = hook
    front.trouble = list(answers)
    assert sent(channel) == (problem, waits)
    assert len(posted.texts) == arrived
    assert len(front.requests) == len(waits) + 1


def test_pauses_end_when_the_tick_would(hook: tuple[Posted, Front, Webhook]) -> None:
    _, front, channel = hook
    front.always = Response(status=429, headers={"Retry-After": "6"})
    assert sent(channel) == ("HTTP status 429", [6, 6])
    assert delivery.PATIENCE_SECONDS + 10 < 60


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_there() -> None:
    problem, waits = sent(Webhook(f"http://127.0.0.1:{unused_port()}{SECRET_PATH}"))
    assert (problem, waits) == ("it cannot be reached, or ended the connection", [0.5, 2])
    problem, waits = sent(Email(f"smtp://127.0.0.1:{unused_port()}", USER, (USER,)))
    assert (problem, waits) == ("connection refused", [0.5, 2])


def test_slow_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(delivery, "CONNECT_SECONDS", 0.1)
    # Connections are taken by the kernel, and nobody ever answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert sent(Webhook(f"http://127.0.0.1:{port}{SECRET_PATH}")) == ("no answer within 0.1 s", [0.5, 2])
        mail = Email(f"smtp://127.0.0.1:{port}", USER, (USER,))
        assert sent(mail) == ("the server ended the connection, or does not answer", [0.5, 2])
        # The handshake is a part of connecting.
        assert sent(Webhook(f"https://127.0.0.1:{port}/"))[0] in (
            "no connection within 0.1 s",
            "no answer within 0.1 s",
        )


def test_tls_that_is_not_accepted(tmp_path: Path, hook: tuple[Posted, Front, Webhook]) -> None:
    _, front, _ = hook
    refused = "its TLS certificate is not accepted, or it does not speak TLS"
    assert sent(Webhook(front.url.replace("http:", "https:"))) == (refused, [])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate(tmp_path))
    with mail_server(context) as box:
        assert sent(Email(f"smtp+starttls://127.0.0.1:{box.port}", USER, (USER,))) == (refused, [])
        # Where TLS is only offered it is no less checked.
        assert sent(Email(f"smtp://127.0.0.1:{box.port}", USER, (USER,))) == (refused, [])
    with mail_server(context, implicit=True) as box:
        assert sent(Email(f"smtps://127.0.0.1:{box.port}", USER, (USER,))) == (refused, [])
        assert box.mails == []


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's context whose certificate this process accepts."""
    path = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    return context


def mail(box: Mailbox, monkeypatch: pytest.MonkeyPatch, scheme: str, *, login: bool = False) -> Channel:
    """The channel as the environment has it."""
    user = f"{quote(USER, safe='')}:{quote(PASSWORD, safe='')}@" if login else ""
    monkeypatch.setenv(SMTP, f"{scheme}://{user}127.0.0.1:{box.port}")
    monkeypatch.setenv(TO, "ada@example.com, grace@example.org")
    monkeypatch.setenv(FROM, "alerts@example.com")
    (channel,) = configured_channels()
    return channel


def test_mail_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    with mail_server() as box:
        channel = mail(box, monkeypatch, "smtp")
        assert sent(channel, Message("Two\nthings", MESSAGE.text)) == (None, [])
        (found,) = box.mails
        assert found["Subject"] == "Two things"
        assert (found["From"], found["To"]) == ("alerts@example.com", "ada@example.com, grace@example.org")
        assert found["Auto-Submitted"] == "auto-generated"
        assert found["Message-ID"].endswith("@example.com>")
        assert found["Date"]
        assert isinstance(found, EmailMessage)
        assert found.get_content().splitlines() == MESSAGE.text.splitlines()
        assert box.recipients == [["ada@example.com", "grace@example.org"]]
        assert box.encrypted == [False]
        assert sent(mail(box, monkeypatch, "smtp+starttls")) == (
            "the server does not offer STARTTLS, or no log-in",
            [],
        )


# With TLS from the beginning there is none to be required before the log-in.
@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")
@pytest.mark.parametrize("scheme", ["smtp", "smtp+starttls", "smtps"])
def test_mail_over_tls_with_a_log_in(
    scheme: str, trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mail_server(trusted, implicit=scheme == "smtps", login=True) as box:
        assert sent(mail(box, monkeypatch, scheme, login=True)) == (None, [])
        assert (box.encrypted, box.logged_in) == ([True], [True])
        assert sent(mail(box, monkeypatch, scheme))[0] is not None
        wrong = quote(PASSWORD[:-1], safe="")
        monkeypatch.setenv(SMTP, f"{scheme}://{quote(USER, safe='')}:{wrong}@127.0.0.1:{box.port}")
        assert sent(configured_channels()[0]) == ("the log-in is not accepted (SMTP status 535)", [])
        assert len(box.mails) == 1


def test_no_password_is_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    with mail_server() as box:
        problem, waits = sent(mail(box, monkeypatch, "smtp", login=True))
        assert (problem, waits) == ("the server offers no TLS, without which no password is sent", [])
        assert box.mails == []


def test_what_a_mail_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with mail_server() as box:
        channel = mail(box, monkeypatch, "smtp")
        box.answers = ["451 greylisted, canary@example.com"]
        assert sent(channel) == (None, [0.5])
        box.answers = ["451 try later"] * 3
        assert sent(channel) == ("SMTP status 451", [0.5, 2])
        box.answers = ["554 no, canary@example.com"]
        assert sent(channel) == ("SMTP status 554", [])
        # It has arrived with somebody: again, that person would have it twice.
        box.refused = {"ada@example.com"}
        assert sent(channel) == (None, [])
        box.refused = {"ada@example.com", "grace@example.org"}
        assert sent(channel) == ("no recipient is accepted (SMTP status 550)", [])
        assert [len(recipients) for recipients in box.recipients] == [2, 1]


def test_one_that_fails_does_not_keep_the_other(
    hook: tuple[Posted, Front, Webhook], monkeypatch: pytest.MonkeyPatch
) -> None:
    posted, front, channel = hook
    with mail_server() as box:
        e_mail = mail(box, monkeypatch, "smtp")
        box.answers = ["554 no"]
        assert deliver([(e_mail, MESSAGE), (channel, MESSAGE)]) == {
            "e-mail": "SMTP status 554",
            "webhook": None,
        }
        front.trouble = [Response(status=404)]
        assert deliver([(channel, MESSAGE), (e_mail, MESSAGE)]) == {
            "webhook": "HTTP status 404",
            "e-mail": None,
        }
        assert (len(posted.texts), len(box.mails)) == (1, 1)
    assert deliver([]) == {}


def test_they_are_told_side_by_side() -> None:
    both = threading.Barrier(2, timeout=60)

    class Patient:
        def __init__(self, name: str) -> None:
            self.name = name

        def send(self, _: Message) -> None:
            both.wait()

    assert deliver([(Patient("a"), MESSAGE), (Patient("b"), MESSAGE)]) == {"a": None, "b": None}


def test_one_that_takes_for_ever_does_not_keep_the_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "LONGEST_SECONDS", 0.1)
    end = threading.Event()

    class Endless:
        name = "endless"

        def send(self, _: Message) -> None:
            end.wait()

    try:
        assert deliver([(Endless(), MESSAGE)]) == {"endless": "not done within 0.1 s"}
    finally:
        end.set()


def test_an_error_that_nobody_thought_of_quotes_nothing() -> None:
    class Broken:
        name = "broken"

        def send(self, _: Message) -> None:
            raise RuntimeError("https://canary")

    assert deliver([(Broken(), MESSAGE)]) == {"broken": "unexpected RuntimeError"}


def test_nothing_shows_an_address(
    hook: tuple[Posted, Front, Webhook], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, front, channel = hook
    caplog.set_level(logging.DEBUG)
    front.trouble = [Response(status=500)]
    with mail_server() as box:
        e_mail = mail(box, monkeypatch, "smtp", login=True)
        assert [sent(channel)[0], sent(e_mail)[0] is None] == [None, False]
        sent(Webhook(f"http://127.0.0.1:{unused_port()}{SECRET_PATH}"))
        shown = f"{channel!r} {e_mail!r} {settings.Alerts()!r} {caplog.text}"
    for secret in ("canary", "T0/B0", "p@ss", quote(PASSWORD, safe=""), "ada@", "grace@"):
        assert secret not in shown
    assert logging.getLogger("urllib3.connectionpool").filters == []


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({WEBHOOK: "hooks.example.com/canary"}, f"{WEBHOOK} is not a URL"),
        ({WEBHOOK: "file:///canary"}, f"{WEBHOOK} is not a URL"),
        ({WEBHOOK: "https://"}, f"{WEBHOOK} is not a URL"),
        ({WEBHOOK: "https://host:canary/"}, f"{WEBHOOK} is not a URL"),
        ({WEBHOOK: "https://host/ca nary"}, f"{WEBHOOK} is not a URL"),
        ({WEBHOOK: "http://[canary"}, f"{WEBHOOK} is not a URL"),
        ({TO: "ada@example.com"}, f"need {SMTP} and {FROM} as well"),
        ({SMTP: "smtp://host"}, f"need {TO} and {FROM} as well"),
        ({SMTP: "smtp://host", FROM: "a@b.c"}, f"need {TO} as well"),
        ({TO: "canary"}, f"{TO} is not an e-mail address"),
        ({TO: "a@b, canary@"}, f"{TO} is not an e-mail address"),
        ({FROM: "Canary <a@b>"}, f"{FROM} is not an e-mail address"),
        ({SMTP: "http://canary"}, f"{SMTP} is not a mail server's URL"),
        ({SMTP: "smtp://:canary@host"}, f"{SMTP} needs a user and a password"),
        ({SMTP: "smtp://canary@host"}, f"{SMTP} needs a user and a password"),
        ({SMTP: "smtp://a:canary#1@host"}, f"{SMTP} is not a mail server's URL"),
        ({SMTP: "smtp://a:can/ary@host"}, f"{SMTP} is not a mail server's URL"),
        ({SMTP: "smtp://host:canary"}, f"{SMTP} is not a mail server's URL"),
        ({SMTP: "smtps://"}, f"{SMTP} is not a mail server's URL"),
    ],
)
def test_variables_that_are_wrong(
    variables: dict[str, str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        configured_channels()
    assert "anary" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert main(["--test-alerts"]) == 2
    assert "anary" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("url", "port"),
    [("smtp://h", 25), ("smtp+starttls://h", 587), ("smtps://h", 465), ("smtps://h:2465/", 2465)],
)
def test_the_ports_of_mail(url: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], *_: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setenv(SMTP, url)
    monkeypatch.setenv(TO, "ada@example.com")
    monkeypatch.setenv(FROM, "alerts@example.com")
    monkeypatch.setattr(socket, "create_connection", refuse)
    (channel,) = configured_channels()
    assert sent(channel)[0] == "connection refused"
    assert set(asked) == {("h", port)}


def test_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.Alerts().remind_after.total_seconds() == 86_400
    assert settings.Alerts().pending_after.total_seconds() == 3_600
    assert settings.Alerts().rotate_after.days == 365
    monkeypatch.setenv("ALPHAPULSE_ALERT_PENDING_HOURS", "0.5")
    assert settings.Alerts().pending_after.total_seconds() == 1_800
    for text in ("0", "-1", "nan", "1e3", "1_0", "x", ".", "99999999999"):
        monkeypatch.setenv("ALPHAPULSE_ALERT_KEY_DAYS", text)
        with pytest.raises(ConfigurationError, match="ALPHAPULSE_ALERT_KEY_DAYS must be a number of days"):
            print(settings.Alerts().rotate_after)


def test_the_command(
    hook: tuple[Posted, Front, Webhook], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    posted, front, channel = hook
    assert main(["--test-alerts"]) == 2
    assert (
        "No channel is configured for alerts: set ALPHAPULSE_ALERT_WEBHOOK_URL, or" in capsys.readouterr().err
    )
    monkeypatch.setenv(WEBHOOK, channel.url)
    monkeypatch.setenv("ALPHAPULSE_ALERT_LABEL", "staging")
    with mail_server() as box:
        monkeypatch.setenv(SMTP, f"smtp://127.0.0.1:{box.port}")
        monkeypatch.setenv(TO, "ada@example.com")
        monkeypatch.setenv(FROM, "alerts@example.com")
        assert main(["--test-alerts"]) == 0
        assert capsys.readouterr().out == "✓ webhook: delivered\n✓ e-mail: delivered\n"
        assert posted.texts[0].startswith("AlphaPulse encryption (staging): test of the alerts\n")
        assert [found["Subject"] for found in box.mails] == [
            "AlphaPulse encryption (staging): test of the alerts"
        ]
        front.trouble = [Response(status=404)]
        assert main(["--test-alerts"]) == 1
        assert capsys.readouterr().out == "✗ webhook: not delivered: HTTP status 404\n✓ e-mail: delivered\n"
    with pytest.raises(SystemExit, match="2"):
        main(["--test-alerts", "--verify"])
