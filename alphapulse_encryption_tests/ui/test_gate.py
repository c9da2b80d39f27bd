"""What a browser can be made to send, over a socket, to an application that counts what reaches it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from alphapulse_encryption.ui.gate import Gate, Rules

EVIL = "http://pictures.example"
JSON = ("Content-Type", "application/json")
Headers = Sequence[tuple[str, str]]


@dataclass
class Behind:
    """What stands behind the gate."""

    port: int = 0
    reached: list[str] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        self.reached.append(f"{scope.get('method', scope['type'])} {scope['path']}")
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept", "subprotocol": "graphql-ws"})
            await send({"type": "websocket.close"})
            return
        own = (b"content-security-policy", b"base-uri 'none'"), (b"referrer-policy", b"unsafe-url")
        await send({"type": "http.response.start", "status": 200, "headers": list(own)})
        await send({"type": "http.response.body", "body": b"behind"})

    def ask(
        self, method: str, path: str, *headers: tuple[str, str], host: str | None = None, body: str = ""
    ) -> http.client.HTTPResponse:
        """Ask, with these headers and no other ones; the body of the answer is its ``text``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in (("Host", host or f"localhost:{self.port}"), *headers):
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body.encode())
        answer = connection.getresponse()
        answer.text = answer.read().decode()  # type: ignore[attr-defined]
        connection.close()
        return answer

    @property
    def origin(self) -> tuple[str, str]:
        return "Origin", f"http://localhost:{self.port}"


@contextmanager
def served(rules: Rules) -> Iterator[Behind]:
    behind = Behind()
    server = uvicorn.Server(uvicorn.Config(Gate(behind, rules), port=0, log_level="error", lifespan="off"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        behind.port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield behind
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def _behind() -> Iterator[Behind]:
    with served(Rules(["dagster.internal", "other.internal:8080"], "https://ui.example.com")) as behind:
        yield behind


@pytest.fixture
def behind(_behind: Behind) -> Behind:
    _behind.reached.clear()
    return _behind


QUERY = json.dumps({"query": "mutation { launchRun }"})
SAME, CROSS, SITE = (("Sec-Fetch-Site", name) for name in ("same-origin", "cross-site", "same-site"))


@pytest.mark.parametrize(
    ("method", "path", "headers", "named"),
    [
        # As <img>, <script>, <iframe>, a link, a typed address and fetch send them.
        ("GET", "/graphql?query=mutation", [("Origin", EVIL), CROSS], "Sec-Fetch-Site"),
        ("GET", "/graphql?query=mutation", [CROSS, ("Sec-Fetch-Mode", "no-cors")], "Sec-Fetch-Site"),
        ("GET", "/graphql?query=mutation", [("Accept", "*/*")], "POST"),
        ("GET", "/graphql?query=mutation", [("Accept", "text/html"), SAME], "POST"),
        ("GET", "/graphql%0A?query=mutation", [SAME], "control characters"),
        ("HEAD", "/graphql?query=mutation", [], ""),
        (
            "GET",
            "/runs",
            [CROSS, ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "iframe")],
            "Sec-Fetch-Site",
        ),
        (
            "GET",
            "/favicon.png",
            [CROSS, ("Sec-Fetch-Mode", "no-cors"), ("Sec-Fetch-Dest", "image")],
            "Sec-Fetch-Site",
        ),
        ("GET", "/download_debug/1", [SITE, ("Sec-Fetch-Mode", "cors")], "Sec-Fetch-Site"),
        # As forms, beacons and fetch send them without being asked first.
        ("POST", "/graphql", [("Origin", EVIL), ("Content-Type", "text/plain")], "Origin"),
        ("POST", "/graphql", [("Origin", "null"), JSON], "Origin"),
        ("POST", "/graphql", [("Origin", EVIL), JSON], "Origin"),
        ("POST", "/graphql", [("Origin", "http://localhost"), JSON], "Origin"),
        ("POST", "/graphql", [("Origin", "http://localhost:9"), SITE, JSON], "Sec-Fetch-Site"),
        (
            "POST",
            "/graphql",
            [CROSS, ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document"), JSON],
            "Sec-Fetch",
        ),
        ("POST", "/graphql", [], "Content-Type"),
        ("POST", "/graphql", [("Content-Type", "text/plain; application/json")], "Content-Type"),
        ("POST", "/graphql", [("Content-Type", "application/graphql")], "Content-Type"),
        ("POST", "/graphql", [("Content-Type", "application/x-www-form-urlencoded"), SAME], "Content-Type"),
        ("POST", "/graphql", [("Content-Type", "text/plain"), JSON], "Content-Type"),
        ("POST", "/graphql?query=mutation", [JSON], "address"),
        ("POST", "/graphql?op=Runs&query=mutation", [JSON, SAME], "address"),
        ("OPTIONS", "/graphql", [("Origin", EVIL), CROSS], "Sec-Fetch-Site"),
        ("OPTIONS", "/graphql", [], "POST"),
        # What changes something elsewhere, and what reads more than pages.
        ("POST", "/report_asset_materialization/plaintext_dropped", [JSON], "/graphql"),
        ("POST", "/report_asset_check/verified_table", [JSON, SAME], "/graphql"),
        ("POST", "/report_asset_observation/users", [], "/graphql"),
        ("DELETE", "/runs", [SAME], "/graphql"),
        ("GET", "/notebook?path=x.ipynb", [], "/notebook"),
        ("GET", "/dagit/notebook?path=x.ipynb", [SAME], "/dagit/notebook"),
        ("GET", "/logs/run/compute_logs/out", [SAME], "/logs"),
        ("GET", "/%6Eotebook?path=x.ipynb", [], "/notebook"),
    ],
)
def test_refused(behind: Behind, method: str, path: str, headers: Headers, named: str) -> None:
    answer = behind.ask(method, path, *headers, body=QUERY if method == "POST" else "")
    assert answer.status >= 400
    assert named in answer.text  # type: ignore[attr-defined]
    assert behind.reached == []


@pytest.mark.parametrize(
    "host",
    [
        "rebound.example",
        "rebound.example:{port}",
        "localhost.rebound.example",
        "localhost@rebound.example",
        "localhost:{port}.rebound.example",
        "127.0.0.1.rebound.example",
        "dagster.internal.",
        "other.internal",
        "other.internal:80",
        "user@localhost",
        "",
    ],
)
def test_a_name_that_is_not_known(behind: Behind, host: str) -> None:
    host = host.replace("{port}", str(behind.port))
    for origin in (f"http://{host}", EVIL):
        answer = behind.ask("POST", "/graphql", ("Origin", origin), SAME, JSON, host=host or " ", body=QUERY)
        assert answer.status >= 400
        assert behind.ask("GET", "/", host=host or " ").status >= 400
    assert behind.reached == []
    said = behind.ask("GET", "/", host="rebound.example").text  # type: ignore[attr-defined]
    assert all(word in said for word in ("Host", "'rebound.example'", "ALPHAPULSE_UI_HOSTS"))


def test_two_of_a_header_are_not_taken_for_one(behind: Behind) -> None:
    own = behind.origin
    for headers in (
        [own, own, JSON],
        [JSON, JSON, own],
        [("Host", "localhost"), own, JSON],
        [SAME, CROSS, JSON],
    ):
        assert behind.ask("POST", "/graphql", *headers, body=QUERY).status == 400
    assert behind.reached == []


def test_its_own_pages_and_tools_are_let_in(behind: Behind) -> None:
    port, own = behind.port, behind.origin
    link = (CROSS, ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document"))
    let_in: list[tuple[str, str, Headers, str]] = [
        ("POST", "/graphql", [own, SAME, JSON], f"localhost:{port}"),
        # As the pages name what they ask for.
        ("POST", "/graphql?op=RunsQuery", [own, SAME, JSON], f"localhost:{port}"),
        ("POST", "/graphql", [own, ("Content-Type", "Application/JSON; charset=utf-8")], f"LOCALHOST:{port}"),
        # A tool says nothing of where it is; a browser would, of a POST.
        ("POST", "/graphql", [JSON], f"127.0.0.1:{port}"),
        # Forwarded ports, and a proxy that ends TLS.
        ("POST", "/graphql", [("Origin", "http://localhost:8080"), SAME, JSON], "localhost:8080"),
        ("POST", "/graphql", [("Origin", "http://[::1]:3000"), JSON], "[::1]:3000"),
        ("POST", "/graphql", [("Origin", "https://dagster.internal"), SAME, JSON], "dagster.internal"),
        ("POST", "/graphql", [("Origin", "http://other.internal:8080"), SAME, JSON], "other.internal:8080"),
        ("POST", "/graphql", [("Origin", "https://ui.example.com"), SAME, JSON], "ui.example.com"),
        # A proxy that asks under a name of its own.
        ("POST", "/graphql", [("Origin", "https://ui.example.com"), SAME, JSON], "dagster.internal"),
        ("GET", "/", [("Sec-Fetch-Site", "none")], f"localhost:{port}"),
        ("GET", "/runs/1?focused=2", link, f"localhost:{port}"),
        ("HEAD", "/server_info", [], f"localhost:{port}"),
        ("GET", "/download_debug/1", [SAME], f"localhost:{port}"),
    ]
    for method, path, headers, host in let_in:
        answer = behind.ask(method, path, *headers, host=host, body=QUERY if method == "POST" else "")
        assert answer.status == 200, (method, path, headers, host)
    assert behind.reached == [f"{method} {path.partition('?')[0]}" for method, path, _, _ in let_in]
    # The address that people use is no origin of a page under another name.
    assert behind.ask("POST", "/graphql", ("Origin", "http://ui.example.com"), JSON).status == 403


def test_no_foreign_page_shows_one_of_these(behind: Behind) -> None:
    for path, status in (("/", 200), ("/notebook", 404)):
        answer = behind.ask("GET", path)
        assert answer.status == status
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers.get_all("Referrer-Policy") == ["same-origin"]
        assert answer.headers["Access-Control-Allow-Origin"] is None
    assert "base-uri 'none'" in behind.ask("GET", "/").headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/graphql", {"Origin": EVIL}, 403),
        ("/graphql", {}, 403),
        ("/graphql", {"Origin": "null"}, 403),
        ("/graphql", {"Origin": "{own}", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "websocket"}, 403),
        ("/graphql", {"Origin": "http://rebound.example:{port}", "Host": "rebound.example:{port}"}, 421),
        ("/other", {"Origin": "{own}"}, 404),
    ],
)
def test_a_websocket_of_another_page(behind: Behind, path: str, headers: dict[str, str], status: int) -> None:
    filled = {
        name: value.replace("{own}", behind.origin[1]).replace("{port}", str(behind.port))
        for name, value in headers.items()
    }
    host = filled.pop("Host", f"localhost:{behind.port}")
    with pytest.raises(InvalidStatus) as refused, socket.create_connection(("127.0.0.1", behind.port)) as to:
        connect(f"ws://{host}{path}", sock=to, additional_headers=filled).close()
    assert refused.value.response.status_code == status
    assert (refused.value.response.body or b"").startswith(b"Refused: ")
    assert behind.reached == []


def test_a_websocket_of_its_own(behind: Behind) -> None:
    with connect(
        f"ws://localhost:{behind.port}/graphql",
        origin=Origin(behind.origin[1]),
        subprotocols=[Subprotocol("graphql-ws")],
        additional_headers={"Sec-Fetch-Site": "same-origin"},
    ) as opened:
        assert opened.subprotocol == "graphql-ws"
    assert behind.reached == ["websocket /graphql"]


def test_under_a_prefix() -> None:
    with served(Rules(prefix="/dagster")) as behind:
        assert behind.ask("POST", "/dagster/graphql", JSON, body=QUERY).status == 200
        behind.reached.clear()
        for path in ("/dagster/graphql?query=mutation", "/dagster/notebook", "/dagster/logs/x"):
            assert behind.ask("GET", path).status >= 400
        assert behind.ask("POST", "/dagster/report_asset_check/x", JSON).status == 405
        assert behind.reached == []
