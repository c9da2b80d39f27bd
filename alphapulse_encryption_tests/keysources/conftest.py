"""Servers that hold master keys, one of each per test process, and the environment that leads to them."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from alphapulse_encryption_tests.keysources.servers import Front, Vault, serving

REGION = "eu-central-1"


@pytest.fixture(scope="session")
def _moto() -> Iterator[Front]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    with serving(DomainDispatcherApplication(create_backend_app)) as front:
        yield front


@pytest.fixture
def aws(_moto: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Front]:
    """An empty Secrets Manager, and an environment in which boto3 finds it."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    variables = {
        "AWS_ENDPOINT_URL": _moto.url,
        "AWS_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "nothing to hide",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "ALPHAPULSE_ENCRYPTION_KEY_SOURCE": "aws",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _post(f"{_moto.url}/moto-api/reset")
    _moto.requests.clear()
    yield _moto
    _moto.trouble, _moto.always = [], None


@pytest.fixture
def authorized(aws: Front) -> Iterator[Front]:
    """The same; permissions are looked at once `enforce` was called."""
    yield aws
    _post(f"{aws.url}/moto-api/reset-auth", b"inf")


def enforce(front: Front) -> None:
    """From now on every request needs a permission."""
    _post(f"{front.url}/moto-api/reset-auth", b"0")


def client(service: str = "secretsmanager") -> Any:
    """boto3 by itself."""
    return boto3.client(service, region_name=REGION)


@pytest.fixture(scope="session")
def _vault() -> Iterator[Front]:
    with serving(Vault()) as front:
        yield front


@pytest.fixture
def vault(_vault: Front, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Front]:
    """A Vault with an empty KV engine at ``alphapulse``, and an environment that leads to it."""
    for name in list(os.environ):
        if name.startswith("VAULT_"):
            monkeypatch.delenv(name)
    _vault.app = Vault(
        secrets={("", "alphapulse"): {}},
        tokens={("", "root"): ("*",), ("", "reader"): ("alphapulse/data/encryption/master_key*",)},
    )
    variables = {
        "VAULT_ADDR": _vault.url,
        "VAULT_TOKEN": "reader",
        "HOME": str(tmp_path),
        "ALPHAPULSE_ENCRYPTION_KEY_SOURCE": "vault",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _vault.requests.clear()
    yield _vault
    _vault.trouble, _vault.always = [], None


def _post(url: str, body: bytes = b"") -> None:
    headers = {"Content-Type": "text/plain"}
    with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers, method="POST")):
        pass
