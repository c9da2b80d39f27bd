"""Master keys from the KV v2 engine of HashiCorp Vault or OpenBao, through hvac, which is loaded when a key is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources.base import FIELD, KeySource, MasterKeyNotFound, parse_secret

if TYPE_CHECKING:
    from hvac.exceptions import VaultError

MOUNT = "alphapulse"
PATH = "encryption/master_key"

SECONDS = 10.0
# Four requests, 0, 0.5 and 1 s apart.
RETRIES = 3
_BACKOFF_FACTOR = 0.25
# 412: a replica that has not seen the token yet; the rest are throttling, and a server in trouble.
_RETRIED = (412, 429, 500, 502, 503, 504)

SERVICE_ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path
METHODS = ("token", "approle", "kubernetes")


class VaultKeySource(KeySource):
    """Reads the field ``value`` of ``alphapulse/encryption/master_key``, or of ``…_v<n>`` for version n's own key.

    The server and the way to it are named by the variables of Vault's own command line: ``VAULT_ADDR``,
    ``VAULT_TOKEN``, ``VAULT_NAMESPACE``, ``VAULT_CACERT``, ``VAULT_CAPATH``, ``VAULT_CLIENT_CERT``,
    ``VAULT_CLIENT_KEY``, ``VAULT_SKIP_VERIFY``. ``VAULT_AUTH_METHOD`` is ``token`` (the default), ``approle`` (with
    ``VAULT_ROLE_ID`` and ``VAULT_SECRET_ID``) or ``kubernetes`` (with ``VAULT_ROLE``, and ``VAULT_JWT_FILE`` where the
    service account's token is elsewhere); ``VAULT_AUTH_MOUNT`` names the method's mount where it is another.
    """

    where = "the secret {} in Vault"
    common = f"{MOUNT}/{PATH}"

    def _read(self, name: str, place: str) -> bytes:
        client = self._client
        with _told(lambda error: _not_read(error, name, place)):
            response = client.secrets.kv.v2.read_secret_version(
                path=name.removeprefix(f"{MOUNT}/"), mount_point=MOUNT, raise_on_deleted_version=True
            )
            text = response["data"]["data"].get(FIELD)
        if not isinstance(text, str):
            raise ConfigurationError(
                f"{place} has no text in its field {FIELD}: store the key with: vault kv put {name} {FIELD}=…"
            )
        return parse_secret(text, place=f"the field {FIELD} of {place}")

    def _variable(self, name: str) -> str | None:
        return self._environ.get(name, "").strip() or None

    def _required(self, name: str, why: str) -> str:
        value = self._variable(name)
        if value is None:
            raise ConfigurationError(f"{name} is not set: {why}")
        return value

    @cached_property
    def _client(self) -> Any:
        """A client with a token, of this process's own or got by logging in."""
        try:
            import hvac
            import requests
            from requests.adapters import HTTPAdapter
            from urllib3.util import Retry
        except ImportError:
            raise ConfigurationError(
                "Keys in Vault need hvac, which is not installed: pip install 'alphapulse-encryption[vault]'."
            ) from None
        address = self._required("VAULT_ADDR", "it must hold Vault's address, https://vault.example.com:8200")
        if not address.startswith(("https://", "http://")):
            raise ConfigurationError("VAULT_ADDR is no address of a server: it must begin with https://")
        method = self._variable("VAULT_AUTH_METHOD") or METHODS[0]
        if method not in METHODS:
            raise ConfigurationError(
                f"VAULT_AUTH_METHOD names an unknown method: supported are {', '.join(METHODS)}"
            )
        session = requests.Session()
        # A Retry-After of the server's own could be any number of hours.
        retry = Retry(
            total=RETRIES,
            status_forcelist=_RETRIED,
            allowed_methods=None,
            backoff_factor=_BACKOFF_FACTOR,
            raise_on_status=False,
            respect_retry_after_header=False,
        )
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        # hvac looks at the session alone where it is given one.
        session.verify, session.cert = self._verify(), self._certificate()
        client = hvac.Client(
            url=address,
            token=self._token() if method == "token" else "",
            namespace=self._variable("VAULT_NAMESPACE"),
            verify=session.verify,
            timeout=SECONDS,
            session=session,
        )
        if method != "token":
            mount = self._variable("VAULT_AUTH_MOUNT") or method
            with _told(lambda error: _not_logged_in(error, method, mount)):
                self._log_in(client, method, mount)
        return client

    def _log_in(self, client: Any, method: str, mount: str) -> None:
        if method == "approle":
            client.auth.approle.login(
                role_id=self._required("VAULT_ROLE_ID", "it must hold the role's id for AppRole"),
                secret_id=self._required("VAULT_SECRET_ID", "it must hold the role's secret id for AppRole"),
                mount_point=mount,
            )
        else:
            role = self._required("VAULT_ROLE", "it must name the role of Vault's Kubernetes method")
            client.auth.kubernetes.login(role=role, jwt=self._service_account_token(), mount_point=mount)

    def _token(self) -> str:
        if token := self._variable("VAULT_TOKEN") or _text_of(Path.home() / ".vault-token"):
            return token
        raise ConfigurationError(
            "There is no token for Vault: set VAULT_TOKEN, log in with vault login, or set VAULT_AUTH_METHOD to "
            "approle or kubernetes."
        )

    def _service_account_token(self) -> str:
        if token := _text_of(Path(self._variable("VAULT_JWT_FILE") or SERVICE_ACCOUNT_TOKEN)):
            return token
        raise ConfigurationError(
            "There is no service account token to log in to Vault with: it is expected at "
            f"{SERVICE_ACCOUNT_TOKEN}, or where VAULT_JWT_FILE says."
        )

    def _verify(self) -> bool | str:
        # As Vault's own command line reads it (Go's strconv.ParseBool).
        if (self._variable("VAULT_SKIP_VERIFY") or "").lower() in {"1", "t", "true"}:
            return False
        return self._variable("VAULT_CACERT") or self._variable("VAULT_CAPATH") or True

    def _certificate(self) -> str | tuple[str, str] | None:
        certificate, key = self._variable("VAULT_CLIENT_CERT"), self._variable("VAULT_CLIENT_KEY")
        return (certificate, key) if certificate and key else certificate


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


@contextmanager
def _told(explain: Callable[[VaultError], ConfigurationError]) -> Iterator[None]:
    """Turn the libraries' errors, whose texts quote requests and responses, into ours."""
    import requests
    from hvac.exceptions import VaultError as Refused

    try:
        yield
    except Refused as error:
        raise explain(error) from None
    except (requests.RequestException, OSError, ValueError) as error:
        raise ConfigurationError(
            f"Vault does not answer ({type(error).__name__}): check VAULT_ADDR, the network, and VAULT_CACERT where it "
            "has a certificate of your own."
        ) from None
    except (AttributeError, KeyError, TypeError):
        raise ConfigurationError(
            "What answers at VAULT_ADDR does not answer as Vault does: check the address, and that the secrets "
            f"engine at {MOUNT} is KV version 2."
        ) from None


def _not_read(error: VaultError, secret: str, place: str) -> ConfigurationError:
    """What Vault's refusal of a secret means; of its own text nothing is told."""
    from hvac import exceptions

    if isinstance(error, exceptions.InvalidPath):
        if _was_deleted(error):
            return ConfigurationError(
                f"The newest version of {place} was deleted: bring it back with vault kv undelete, or remove the "
                f"secret for good with: vault kv metadata delete {secret}"
            )
        if error.errors:
            return ConfigurationError(
                f"Vault has no secrets engine at {MOUNT}, where {place} should be: check VAULT_NAMESPACE, or make it "
                f"with: vault secrets enable -path={MOUNT} -version=2 kv"
            )
        return MasterKeyNotFound(
            f"There is no {place.removeprefix('the ')}: check VAULT_ADDR and VAULT_NAMESPACE, or store the key with: "
            f"vault kv put {secret} {FIELD}=…"
        )
    if isinstance(error, exceptions.Forbidden | exceptions.Unauthorized):
        return ConfigurationError(
            f"Reading {place} is not allowed: the token is no longer valid, or its policy lacks the capability "
            f'"read" on {MOUNT}/data/{PATH}*, versions with a key of their own included.'
        )
    return _trouble(error, f"Vault did not give {place}")


def _not_logged_in(error: VaultError, method: str, mount: str) -> ConfigurationError:
    from hvac import exceptions

    if isinstance(error, exceptions.InvalidRequest | exceptions.Forbidden | exceptions.Unauthorized):
        credentials = {
            "approle": "VAULT_ROLE_ID and VAULT_SECRET_ID, which may have expired or been used up",
            "kubernetes": "VAULT_ROLE, and the service accounts and namespaces it is bound to",
        }
        return ConfigurationError(
            f"Vault refuses the login by {method} at auth/{mount}: check {credentials[method]}."
        )
    if isinstance(error, exceptions.InvalidPath):
        return ConfigurationError(
            f"Vault has no authentication method at auth/{mount}: check VAULT_AUTH_MOUNT and VAULT_NAMESPACE."
        )
    return _trouble(error, f"Vault refused the login by {method} at auth/{mount}")


def _trouble(error: VaultError, what: str) -> ConfigurationError:
    from hvac import exceptions

    if isinstance(error, exceptions.VaultDown):
        return ConfigurationError(f"{what}: it is sealed or in maintenance (asked several times).")
    if isinstance(error, exceptions.RateLimitExceeded):
        return ConfigurationError(f"{what}: it limits requests (asked several times); try again later.")
    return ConfigurationError(f"{what} ({type(error).__name__}): see the log of the server.")


def _was_deleted(error: VaultError) -> bool:
    try:
        metadata = error.json["data"]["metadata"]
        return bool(metadata["deletion_time"] or metadata["destroyed"])
    except (KeyError, TypeError):
        return False
