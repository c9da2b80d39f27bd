"""Master keys in Vault's KV version 2: the real hvac against a small Vault (see `servers`)."""

from __future__ import annotations

import base64
import json
import logging
import shlex
import sys
from pathlib import Path

import hvac
import pytest

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources import MasterKeyNotFound, load_key_ring
from alphapulse_encryption.keysources.vault import RETRIES
from alphapulse_encryption_tests.keysources.servers import Front, Vault, answer
from alphapulse_encryption_tests.keysources.test_aws import KEY, SECOND, TEXT, same, text

MOUNT, PATH = "alphapulse", "encryption/master_key"
NAME = f"{MOUNT}/{PATH}"
ALLOWED = (f"{MOUNT}/data/{PATH}*",)


def put(front: Front, path: str = PATH, namespace: str = "", **fields: object) -> None:
    """What ``vault kv put`` does."""
    hvac.Client(url=front.url, token="root", namespace=namespace).secrets.kv.v2.create_or_update_secret(
        path=path, secret=fields, mount_point=MOUNT
    )
    front.requests.clear()


def state(front: Front) -> Vault:
    assert isinstance(front.app, Vault)
    return front.app


def refused() -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_key_ring()
    message = str(caught.value)
    for secret in (TEXT, "permission denied", "reader", "s3cret", "e30.jwt"):
        assert secret not in message
    assert caught.value.exit_status == 2
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


@pytest.mark.parametrize(
    "stored", [TEXT, f"{TEXT}\n", base64.b64encode(KEY).decode(), json.dumps({"value": TEXT})]
)
def test_a_key_as_plain_text_or_json(vault: Front, stored: str) -> None:
    put(vault, value=stored, note="another field")
    same(load_key_ring(), v1=KEY)


def test_the_guide_s_command(vault: Front) -> None:
    command = f'vault kv put alphapulse/encryption/master_key value="{TEXT}"'
    _, _, _, path, pair = shlex.split(command)
    mount, _, rest = path.partition("/")
    assert mount == MOUNT
    put(vault, rest, **dict([pair.split("=", 1)]))
    keys = load_key_ring()
    same(keys, v1=KEY)
    assert keys.origin(1) == f"the secret {NAME} in Vault"


def test_versions(vault: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    put(vault, value=TEXT)
    put(vault, f"{PATH}_v2", value=text(SECOND))
    same(load_key_ring(), v1=KEY, v2=SECOND)
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_KEY_VERSION", "3")
    keys = load_key_ring()
    same(keys, v1=KEY, v2=SECOND, v3=KEY)
    assert keys.origin(2) == f"the secret {NAME}_v2 in Vault"


def test_missing(vault: Front) -> None:
    with pytest.raises(MasterKeyNotFound):
        load_key_ring()
    vault.requests.clear()
    message = refused()
    assert message.startswith(f"There is no secret {NAME} in Vault (the common master key)")
    assert f"vault kv put {NAME} value=…" in message
    # One request for each name that is looked for, and none that writes.
    assert vault.requests == [f"GET /v1/{MOUNT}/data/{PATH}{suffix}" for suffix in ("", "_v1", "_v2")]
    assert state(vault).secrets == {("", MOUNT): {}}


def test_deleted(vault: Front) -> None:
    put(vault, value=TEXT)
    put(vault, f"{PATH}_v1", value=TEXT)
    hvac.Client(url=vault.url, token="root").secrets.kv.v2.delete_latest_version_of_secret(
        f"{PATH}_v1", mount_point=MOUNT
    )
    message = refused()
    assert message.startswith(
        f"The newest version of the secret {NAME}_v1 in Vault (the master key of version 1)"
    )
    assert f"vault kv metadata delete {NAME}_v1" in message


def test_no_engine(vault: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "root")
    state(vault).secrets.clear()
    assert "vault secrets enable -path=alphapulse -version=2 kv" in refused()


@pytest.mark.parametrize("token", ["nobody", "elsewhere"])
def test_not_allowed(vault: Front, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    put(vault, value=TEXT)
    state(vault).tokens["", "elsewhere"] = ("alphapulse/data/other",)
    monkeypatch.setenv("VAULT_TOKEN", token)
    message = refused()
    assert f"Reading the secret {NAME} in Vault (the common master key) is not allowed" in message
    assert f'"read" on {MOUNT}/data/{PATH}*' in message
    assert len(vault.requests) == 1


def test_a_version_that_may_not_be_read_is_not_replaced_by_the_common_key(vault: Front) -> None:
    put(vault, value=TEXT)
    state(vault).tokens["", "reader"] = (f"{MOUNT}/data/{PATH}",)
    assert f"Reading the secret {NAME}_v1 in Vault (the master key of version 1) is not allowed" in refused()


@pytest.mark.parametrize("status", [412, 429, 500, 502, 503])
def test_trouble_that_passes(vault: Front, status: int) -> None:
    put(vault, value=TEXT)
    # An hour, as the server says, is not waited for.
    vault.trouble = [answer(status, {"errors": []}, Retry_After="3600")]
    same(load_key_ring(), v1=KEY)
    assert len(vault.requests) == 3 + 1


@pytest.mark.parametrize(("status", "says"), [(429, "it limits requests"), (503, "it is sealed")])
def test_trouble_that_stays(vault: Front, status: int, says: str) -> None:
    vault.always = answer(status, {"errors": [TEXT]})
    message = refused()
    assert says in message
    assert f"the secret {NAME}" in message
    assert len(vault.requests) == 1 + RETRIES


def test_server_down(vault: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:1")
    message = refused()
    assert message.startswith("Vault does not answer (ConnectionError)")
    assert "VAULT_ADDR" in message


def test_not_a_vault(vault: Front) -> None:
    vault.always = answer(200, {"hello": "world"})
    assert "does not answer as Vault does" in refused()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"value": "c2VjcmV0"}, "holds 6 bytes, a master key has 32"),
        ({"value": "canary !"}, "is not base64"),
        ({"value": '{"a": 1, "b": 2}'}, "looks like JSON and holds no master key"),
        ({"value": 7}, "has no text in its field value"),
        ({"key": TEXT}, "has no text in its field value"),
        ({"value": ""}, "is empty"),
    ],
)
def test_malformed(vault: Front, fields: dict[str, object], says: str) -> None:
    put(vault, PATH, "", **fields)
    message = refused()
    assert f"the secret {NAME} in Vault (the common master key)" in message
    assert says in message
    assert "canary" not in message


def test_the_token_that_vault_login_keeps(
    vault: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(vault, value=TEXT)
    monkeypatch.delenv("VAULT_TOKEN")
    assert refused().startswith("There is no token for Vault")
    (tmp_path / ".vault-token").write_text("reader\n", encoding="ascii")
    same(load_key_ring(), v1=KEY)


def test_approle(vault: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    put(vault, value=TEXT)
    monkeypatch.delenv("VAULT_TOKEN")
    monkeypatch.setenv("VAULT_AUTH_METHOD", "approle")
    assert refused().startswith("VAULT_ROLE_ID is not set")
    monkeypatch.setenv("VAULT_ROLE_ID", "r0le")
    assert refused().startswith("VAULT_SECRET_ID is not set")
    monkeypatch.setenv("VAULT_SECRET_ID", "s3cret")
    message = refused()
    assert message.startswith("Vault refuses the login by approle at auth/approle: check VAULT_ROLE_ID")
    state(vault).roles["", "r0le", "s3cret"] = ALLOWED
    vault.requests.clear()
    same(load_key_ring(), v1=KEY)
    assert vault.requests[0] == "POST /v1/auth/approle/login"
    assert len(vault.requests) == 1 + 3, "one login for all of them"
    monkeypatch.setenv("VAULT_AUTH_MOUNT", "machines")
    assert "no authentication method at auth/machines" in refused()
    state(vault).methods["machines"] = "approle"
    same(load_key_ring(), v1=KEY)


def test_kubernetes(vault: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(vault, value=TEXT)
    monkeypatch.delenv("VAULT_TOKEN")
    monkeypatch.setenv("VAULT_AUTH_METHOD", "kubernetes")
    assert refused().startswith("VAULT_ROLE is not set")
    monkeypatch.setenv("VAULT_ROLE", "migration")
    assert "no service account token" in refused()
    jwt = tmp_path / "token"
    jwt.write_text("e30.jwt\n", encoding="ascii")
    monkeypatch.setenv("VAULT_JWT_FILE", str(jwt))
    assert "Vault refuses the login by kubernetes" in refused()
    state(vault).accounts["", "migration", "e30.jwt"] = ALLOWED
    same(load_key_ring(), v1=KEY)
    jwt.write_text("another", encoding="ascii")
    assert "check VAULT_ROLE, and the service accounts" in refused()


def test_namespace(vault: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    put(vault, value=TEXT)
    team = "alpha/pulse"
    state(vault).secrets[team, MOUNT] = {}
    state(vault).tokens |= {(team, "root"): ("*",), (team, "reader"): ALLOWED}
    put(vault, namespace=team, value=text(SECOND))
    same(load_key_ring(), v1=KEY)
    monkeypatch.setenv("VAULT_NAMESPACE", team)
    same(load_key_ring(), v1=SECOND)


def test_configuration(vault: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_CACERT", "/nowhere/ca.pem")
    monkeypatch.setenv("VAULT_ADDR", vault.url.replace("http:", "https:"))
    assert "VAULT_CACERT" in refused()
    monkeypatch.setenv("VAULT_AUTH_METHOD", "magic")
    assert refused() == "VAULT_AUTH_METHOD names an unknown method: supported are token, approle, kubernetes"
    monkeypatch.setenv("VAULT_ADDR", "vault.example.com")
    assert refused().startswith("VAULT_ADDR is no address of a server")
    monkeypatch.delenv("VAULT_ADDR")
    assert refused().startswith("VAULT_ADDR is not set")
    monkeypatch.setitem(sys.modules, "hvac", None)
    assert "pip install 'alphapulse-encryption[vault]'" in refused()


def test_the_key_is_not_logged(
    vault: Front, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(vault, value=TEXT)
    caplog.set_level(logging.DEBUG)
    library = logging.getLogger("urllib3.connectionpool")
    # Whatever other tests in this process have made of logging.
    monkeypatch.setattr(library, "disabled", False)
    caplog.set_level(logging.DEBUG, library.name)
    library.addHandler(caplog.handler)
    try:
        load_key_ring()
    finally:
        library.removeHandler(caplog.handler)
    assert "/v1/alphapulse/data/encryption/master_key" in caplog.text
    assert TEXT not in caplog.text
    assert "reader" not in caplog.text
