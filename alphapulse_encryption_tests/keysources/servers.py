"""Servers on loopback that hold master keys: moto's Secrets Manager, and a small Vault.

Neither Vault nor OpenBao comes as a package of Python's, so `Vault` here answers as the documentation of Vault's HTTP
API says (KV version 2; the AppRole and Kubernetes login; namespaces by header; errors), to the real hvac.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

Environ = dict[str, Any]


class Silent(WSGIRequestHandler):
    """Says nothing of requests."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@dataclass
class Front:
    """What stands before a server: it counts requests, and answers the next ones with what was put into ``trouble``.

    Args:
        app: the server, as a WSGI application.
        trouble: answers to the next requests, used up.
        always: the answer to every further request, where there is one.
        requests: method and path of every request.
    """

    app: Any
    trouble: list[Response] = field(default_factory=list)
    always: Response | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        answer = self.trouble.pop(0) if self.trouble else self.always
        app = self.app if answer is None else answer
        body: Iterable[bytes] = app(environ, start_response)
        return body


@contextlib.contextmanager
def serving(app: Any) -> Iterator[Front]:
    """The application on a free port of loopback."""
    front = Front(app)
    server = make_server("127.0.0.1", 0, front, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    front.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield front
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(status: int, body: Mapping[str, Any], **headers: str) -> Response:
    return Response(
        json.dumps(body),
        status=status,
        content_type="application/json",
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def aws_error(status: int, code: str) -> Response:
    """An error as AWS's JSON protocol 1.1 has it."""
    return answer(status, {"__type": code, "message": "a text of the server's"}, x_amzn_ErrorType=code)


Secret = list[dict[str, Any] | None]


@dataclass
class Vault:
    """KV version 2 at ``alphapulse``, AppRole and Kubernetes, by namespace.

    Args:
        secrets: by namespace, mount and path, the versions of each; None for a deleted one.
        tokens: by namespace and token, the paths that may be read, as patterns.
        roles: by namespace, role id and secret id, the paths that the token of a login may read.
        accounts: by role and service account token, the same.
    """

    secrets: dict[tuple[str, str], dict[str, Secret]] = field(default_factory=dict)
    tokens: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    roles: dict[tuple[str, str, str], tuple[str, ...]] = field(default_factory=dict)
    accounts: dict[tuple[str, str, str], tuple[str, ...]] = field(default_factory=dict)
    methods: dict[str, str] = field(
        default_factory=lambda: {"approle": "approle", "kubernetes": "kubernetes"}
    )

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        response: Iterable[bytes] = self._respond(Request(environ))(environ, start_response)
        return response

    def _respond(self, request: Request) -> Response:
        namespace = request.headers.get("X-Vault-Namespace", "")
        version, _, path = request.path.strip("/").partition("/")
        if version != "v1":
            return _errors(404)
        if path.startswith("auth/") and path.endswith("/login") and request.method in {"POST", "PUT"}:
            mount = path.removeprefix("auth/").removesuffix("/login")
            return self._log_in(namespace, self.methods.get(mount), request.get_json())
        allowed = self.tokens.get((namespace, request.headers.get("X-Vault-Token", "")), ())
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in allowed):
            return _errors(403, "permission denied")
        mount, _, rest = path.partition("/")
        if (namespace, mount) not in self.secrets or not rest.startswith("data/"):
            return _errors(404, f'no handler for route "{path}". route entry not found.')
        return self._secret(self.secrets[namespace, mount], rest.removeprefix("data/"), request)

    def _secret(self, secrets: dict[str, Secret], path: str, request: Request) -> Response:
        if request.method in {"POST", "PUT"}:
            secrets.setdefault(path, []).append(request.get_json()["data"])
            return answer(200, _envelope(data=_metadata(secrets[path])))
        versions = secrets.get(path)
        if request.method == "DELETE":
            if versions:
                versions[-1] = None
            return Response(status=204)
        if not versions:
            return _errors(404)
        found = {"data": versions[-1], "metadata": _metadata(versions)}
        return answer(404 if versions[-1] is None else 200, _envelope(data=found))

    def _log_in(self, namespace: str, method: str | None, body: Mapping[str, str]) -> Response:
        if method == "approle":
            allowed = self.roles.get((namespace, body["role_id"], body["secret_id"]))
            refusal = _errors(400, "invalid role or secret ID")
        elif method == "kubernetes":
            known = any(role == body["role"] for _, role, _ in self.accounts)
            allowed = self.accounts.get((namespace, body["role"], body["jwt"]))
            refusal = (
                _errors(403, "permission denied")
                if known
                else _errors(400, f'invalid role name "{body["role"]}"')
            )
        else:
            return _errors(404, "no handler for route. route entry not found.")
        if allowed is None:
            return refusal
        token = f"hvs.{uuid.uuid4().hex}"
        self.tokens[namespace, token] = allowed
        auth = {
            "client_token": token,
            "accessor": uuid.uuid4().hex,
            "policies": ["default", "migration"],
            "token_policies": ["default", "migration"],
            "metadata": {},
            "lease_duration": 1200,
            "renewable": True,
            "token_type": "service",
        }
        return answer(200, _envelope(auth=auth))


def _errors(status: int, *texts: str) -> Response:
    return answer(status, {"errors": list(texts)})


def _envelope(**members: Any) -> dict[str, Any]:
    return {
        "request_id": str(uuid.uuid4()),
        "lease_id": "",
        "renewable": False,
        "lease_duration": 0,
        "data": None,
        "wrap_info": None,
        "warnings": None,
        "auth": None,
        **members,
    }


def _metadata(versions: Secret) -> dict[str, Any]:
    return {
        "created_time": "2026-01-01T00:00:00.000000000Z",
        "custom_metadata": None,
        "deletion_time": "" if versions[-1] is not None else "2026-01-02T00:00:00.000000000Z",
        "destroyed": False,
        "version": len(versions),
    }
