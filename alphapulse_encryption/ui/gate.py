"""Which requests reach Dagster's web server: of its own pages, of tools with JSON, and links that a person follows.

Dagster's server asks nobody who they are, and takes mutations by GET, from any page and under any name. A browser sends
such requests for every page that its user has open, from inside the network that the user is in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

HOSTS = "ALPHAPULSE_UI_HOSTS"
URL = "ALPHAPULSE_UI_URL"

# Names of this machine, which no name server answers for.
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:@/\s]+)(:[0-9]+)?")
_API = "/graphql"
# The UI's own pages write what they ask for into the address, for people who look at requests.
_NAMED = re.compile(rb"(op=\w*)?")
# Reads: of files that the code location can read (whose scripts the page would run), and of logs that nobody keeps.
_CLOSED = ("/notebook", "/dagit", "/logs")
# Told of them twice, a browser keeps to the stricter one.
_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Rules:
    """What is let in.

    Args:
        hosts: names under which people reach the server, each with or without a port, beside those of this machine.
        url: where they find it, if a proxy stands before it: its name is one more host, its origin the server's own.
        prefix: what every path begins with; empty, or with a slash before it.
    """

    hosts: Iterable[str] = ()
    url: str | None = None
    prefix: str = ""
    _hosts: frozenset[str] = field(init=False)
    _origin: str | None = field(init=False)

    def __post_init__(self) -> None:
        own = urlsplit(self.url or "")
        known = {host.lower() for host in (*_LOCAL, *self.hosts, own.netloc) if host}
        object.__setattr__(self, "_hosts", frozenset(known))
        object.__setattr__(self, "_origin", f"{own.scheme}://{own.netloc}".lower() if own.netloc else None)

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server."""
        parts = _HOST.fullmatch(host.lower())
        return parts is not None and bool({parts[0], parts["name"]} & self._hosts)

    def is_own(self, origin: str, host: str) -> bool:
        """Whether an Origin is that of the pages which are asked for under this host.

        A proxy may end TLS, so that the scheme is not known here; ``Sec-Fetch-Site`` tells schemes apart.
        """
        scheme, _, name = origin.lower().partition("://")
        return (scheme in ("http", "https") and name == host.lower()) or origin.lower() == self._origin


class Refusal(NamedTuple):
    """Why a request goes no further, in words for the person who sees it."""

    status: HTTPStatus
    why: str


class Gate:
    """An ASGI application before another one. It answers what is not let in, and has no page shown in a foreign one."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(scope=message)
                policy = _HEADERS["Content-Security-Policy"]
                if earlier := headers.get("Content-Security-Policy"):
                    policy = f"{earlier}, {policy}"
                headers.update({**_HEADERS, "Content-Security-Policy": policy})
            await send(message)

        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif (refused := refusal(scope, self._rules)) is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "http":
            await _answer(refused)(scope, receive, send_with_headers)
        else:
            await WebSocket(scope, receive, send_with_headers).send_denial_response(_answer(refused))


def _answer(refused: Refusal) -> PlainTextResponse:
    allowed = {"Allow": "POST"} if refused.status is HTTPStatus.METHOD_NOT_ALLOWED else {}
    return PlainTextResponse(f"Refused: {refused.why}\n", refused.status, allowed)


def refusal(scope: Scope, rules: Rules) -> Refusal | None:
    """Why a request is refused; None where it is let in."""
    headers = Headers(scope=scope)
    for name in ("Host", "Origin", "Sec-Fetch-Site", "Content-Type"):
        if len(headers.getlist(name)) > 1:
            return Refusal(HTTPStatus.BAD_REQUEST, f"there is more than one header {name}.")
    # A route of Dagster's also matches its path with a line's end behind it.
    if not scope["path"].isprintable():
        return Refusal(HTTPStatus.BAD_REQUEST, "the path has control characters.")
    return _by_name(headers, rules) or _by_origin(scope, headers, rules) or _by_kind(scope, headers, rules)


def _by_name(headers: Headers, rules: Rules) -> Refusal | None:
    # A foreign name may be made to lead here (DNS rebinding): then the foreign page has this server's origin.
    host = headers.get("Host", "")
    if rules.knows(host):
        return None
    return Refusal(
        HTTPStatus.MISDIRECTED_REQUEST,
        f"the header Host names {_shown(host)}, by which this UI is not known. If people are to reach it so, add the "
        f"name to {HOSTS}, or set {URL}, and start it again.",
    )


def _by_origin(scope: Scope, headers: Headers, rules: Rules) -> Refusal | None:
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
    socket = scope["type"] == "websocket"
    if site not in (None, "same-origin", "none"):
        # A link in an alert: the browser shows what it finds, and the page that had the link learns nothing.
        followed = (headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")) == ("navigate", "document")
        if socket or scope["method"] != "GET" or not followed:
            return Refusal(
                HTTPStatus.FORBIDDEN,
                f"the header Sec-Fetch-Site says {_shown(site)}: another page than this UI's own asks for it.",
            )
    if origin is None and not socket:
        return None
    if origin is None or not rules.is_own(origin, headers["Host"]):
        return Refusal(
            HTTPStatus.FORBIDDEN,
            f"the header Origin is {_shown(origin)}, and not this UI's own under the Host {_shown(headers['Host'])}. "
            f"Where a proxy changes Host, set {URL} to the address that people use, and start it again.",
        )
    return None


def _by_kind(scope: Scope, headers: Headers, rules: Rules) -> Refusal | None:
    path = scope["path"].removeprefix(rules.prefix)
    if scope["type"] == "websocket":
        return None if path == _API else Refusal(HTTPStatus.NOT_FOUND, f"WebSockets are for {_API} alone.")
    if path == _API:
        if scope["method"] != "POST":
            return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"{_API} is asked by POST alone.")
        if not _NAMED.fullmatch(scope["query_string"]):
            return Refusal(HTTPStatus.BAD_REQUEST, f"{_API} takes no query in the address, only in the body.")
        # By a form, and without being asked first, a browser sends other types of content.
        if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            return Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"{_API} takes the Content-Type application/json alone."
            )
        return None
    if scope["method"] not in ("GET", "HEAD"):
        return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"whatever changes something is a POST to {_API}.")
    if any(path == closed or path.startswith(f"{closed}/") for closed in _CLOSED):
        return Refusal(HTTPStatus.NOT_FOUND, f"{_shown(path)} is not served here.")
    return None


def _shown(text: str | None) -> str:
    return "missing" if not text else ascii(text[:100])
