"""Key rings from the environment."""

import base64

import pytest

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources import MasterKeyNotFound, load_key_ring
from alphapulse_encryption.keysources.env import EnvironmentKeySource

COMMON, FIRST, SECOND = (bytes([number] * 32) for number in (1, 2, 3))
MASTER_KEY = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
KEY_VERSION = "ALPHAPULSE_ENCRYPTION_KEY_VERSION"
READABLE = "ALPHAPULSE_ENCRYPTION_READABLE_KEY_VERSIONS"
KEY_SOURCE = "ALPHAPULSE_ENCRYPTION_KEY_SOURCE"


def text(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).decode()


def check_values(environ: dict[str, str]) -> dict[int, str]:
    keys = load_key_ring(environ)
    return {version: keys.check_value(version) for version in keys.versions}


def expected(**keys: bytes) -> dict[int, str]:
    environ = {f"{MASTER_KEY}_{version.upper()}": text(key) for version, key in keys.items()}
    return check_values(environ | {KEY_VERSION: str(len(keys))})


def test_one_key() -> None:
    keys = load_key_ring({MASTER_KEY: text(COMMON)})
    assert (keys.versions, keys.current_version) == ((1,), 1)
    assert load_key_ring({MASTER_KEY: text(COMMON), KEY_SOURCE: "env"}).versions == (1,)
    assert load_key_ring({MASTER_KEY: text(COMMON), KEY_SOURCE: "", KEY_VERSION: ""}).versions == (1,)


def test_the_common_key_serves_every_version_without_its_own() -> None:
    environ = {MASTER_KEY: text(COMMON), KEY_VERSION: "3", f"{MASTER_KEY}_V1": text(FIRST)}
    assert check_values(environ) == expected(v1=FIRST, v2=COMMON, v3=COMMON)


def test_versions_with_keys_of_their_own_need_no_common_key() -> None:
    environ = {KEY_VERSION: "2", f"{MASTER_KEY}_V1": text(FIRST), f"{MASTER_KEY}_V2": text(SECOND)}
    assert check_values(environ) == expected(v1=FIRST, v2=SECOND)
    del environ[f"{MASTER_KEY}_V1"]
    assert load_key_ring(environ).versions == (2,)


def test_the_next_version_is_readable_before_it_is_current() -> None:
    keys = load_key_ring({MASTER_KEY: text(COMMON), f"{MASTER_KEY}_V2": text(SECOND)})
    assert (keys.versions, keys.current_version) == ((1, 2), 1)


def test_listed_versions_are_readable() -> None:
    """Where one master key serves all: nobody guesses that there is a next version, nor that an old one is done."""
    environ = {MASTER_KEY: text(COMMON), READABLE: "1,2"}
    keys = load_key_ring(environ)
    assert (keys.versions, keys.current_version) == ((1, 2), 1)
    assert check_values(environ) == expected(v1=COMMON, v2=COMMON)
    keys = load_key_ring(environ | {KEY_VERSION: "2"})
    assert (keys.versions, keys.current_version) == ((1, 2), 2)
    keys = load_key_ring(environ | {KEY_VERSION: "7", READABLE: " 7 "})
    assert (keys.versions, keys.current_version) == ((7,), 7)
    # The current one is always among them, and a key of its own goes before the common one.
    environ = {MASTER_KEY: text(COMMON), f"{MASTER_KEY}_V2": text(SECOND), KEY_VERSION: "3", READABLE: "2"}
    assert check_values(environ) == {
        version: value for version, value in expected(v1=FIRST, v2=SECOND, v3=COMMON).items() if version > 1
    }
    # Without a list, versions that have no key are left out; with one, they are missing.
    del environ[MASTER_KEY]
    with pytest.raises(ConfigurationError, match=f"{MASTER_KEY}(_V3)? is not set"):
        load_key_ring(environ)
    environ = {f"{MASTER_KEY}_V2": text(SECOND), KEY_VERSION: "2", READABLE: "1 2"}
    with pytest.raises(ConfigurationError, match=f"^{MASTER_KEY}_V1 is not set"):
        load_key_ring(environ)


@pytest.mark.parametrize("value", ["0", "1;2", "1-3", "all", "1,,x", "1001", "٣"])
def test_malformed_lists_of_versions(value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{READABLE} must be whole numbers from 1 to 1000"):
        load_key_ring({MASTER_KEY: text(COMMON), READABLE: value})


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MASTER_KEY, text(COMMON))
    monkeypatch.setenv(KEY_VERSION, "2")
    assert load_key_ring().current_version == 2


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_key_is_named_and_explained(value: str | None) -> None:
    environ = {} if value is None else {MASTER_KEY: value}
    with pytest.raises(ConfigurationError, match=rf"^{MASTER_KEY} is not set.*openssl rand -base64 32"):
        load_key_ring(environ)


@pytest.mark.parametrize("variable", [MASTER_KEY, f"{MASTER_KEY}_V1", f"{MASTER_KEY}_V2"])
@pytest.mark.parametrize("value", ["c2VjcmV0", "secret!", text(COMMON) + "A"])
def test_a_malformed_key_is_named_and_not_quoted(variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_key_ring({MASTER_KEY: text(COMMON), KEY_VERSION: "2"} | {variable: value})
    message = str(caught.value)
    assert message.startswith(f"{variable} ")
    assert "openssl rand -base64 32" in message
    assert value not in message
    assert caught.value.exit_status == 2


def test_an_empty_key_of_a_version_is_malformed_not_missing() -> None:
    with pytest.raises(ConfigurationError, match=f"^{MASTER_KEY}_V1 is empty"):
        load_key_ring({MASTER_KEY: text(COMMON), f"{MASTER_KEY}_V1": ""})


@pytest.mark.parametrize("suffix", ["0", "01", "2x", "1.0", "٣"])
def test_a_key_of_no_version_is_refused(suffix: str) -> None:
    variable = f"{MASTER_KEY}_V{suffix}"
    with pytest.raises(ConfigurationError, match=f"^{variable} names no key version"):
        load_key_ring({MASTER_KEY: text(COMMON), variable: text(FIRST)})


def test_other_variables_of_the_prefix_are_left_alone() -> None:
    assert load_key_ring({MASTER_KEY: text(COMMON), f"{MASTER_KEY}_VAULT_PATH": "x"}).versions == (1,)


@pytest.mark.parametrize("value", ["0", "-1", "1.0", "x", " 1", "+1", "1001", "9" * 5000, "٣"])
def test_malformed_versions(value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{KEY_VERSION} must be a whole number from 1 to 1000$"):
        load_key_ring({MASTER_KEY: text(COMMON), KEY_VERSION: value})


def test_unknown_sources_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigurationError, match=f"^{KEY_SOURCE} names an unknown key source: supported are env, aws, vault$"
    ):
        load_key_ring({MASTER_KEY: text(COMMON), KEY_SOURCE: "Env"})


def test_the_environment_as_a_source() -> None:
    source = EnvironmentKeySource({f"{MASTER_KEY}_V7": text(FIRST)})
    assert source.master_key(7) == FIRST
    with pytest.raises(MasterKeyNotFound, match=f"{MASTER_KEY}_V6 is not set"):
        source.master_key(6)
    assert text(FIRST) not in repr(source)
