"""The catalogue: the packaged one, derived names, and every kind of bad input."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from alphapulse_encryption.catalogue import Catalogue, Column, Table, load_catalogue
from alphapulse_encryption.errors import ConfigurationError

VALID = """
tables:
  - name: users
    columns:
      - name: email
        context: user_pii
        search_index: idx_user_email_search
      - {name: phone_number, context: user_pii}
  - name: Patient Files
    schema: clinic
    columns:
      - {name: 'Blood "Type"', context: medical}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "catalogue.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(directory: Path, text: str) -> str:
    """The message without the file's name, which every message begins with."""
    path = write(directory, text)
    with pytest.raises(ConfigurationError) as caught:
        load_catalogue(path)
    prefix = f"catalogue {path}: "
    assert str(caught.value).startswith(prefix)
    return str(caught.value).removeprefix(prefix)


def test_packaged_catalogue() -> None:
    catalogue = load_catalogue()
    assert catalogue.keys == ("trading_accounts", "positions", "trades", "users", "api_keys")
    assert sum(len(table.columns) for table in catalogue.tables) == 23
    assert catalogue.format == "AES-256-GCM"
    searchable = {
        (table.key, column.name): column.search_index
        for table in catalogue.tables
        for column in table.columns
        if column.searchable
    }
    assert searchable == {
        ("trading_accounts", "account_number"): "idx_trading_account_search",
        ("users", "email"): "idx_user_email_search",
    }
    contexts = {column.name: column.context for column in catalogue.table("trades").columns}
    assert contexts == {
        "quantity": "trade_execution",
        "price": "trade_execution",
        "fee": "trade_execution",
        "order_id": "trade_order",
        "execution_details": "trade_details",
    }


def test_names_and_keys(tmp_path: Path) -> None:
    catalogue = load_catalogue(write(tmp_path, VALID))
    assert catalogue.keys == ("users", "clinic.Patient Files")
    email, phone = catalogue.table("users").columns
    assert (email.encrypted, email.search, email.searchable) == ("email_encrypted", "email_search", True)
    assert email.derived == ("email_encrypted", "email_search")
    assert not phone.searchable
    assert phone.derived == ("phone_number_encrypted",)
    files = catalogue.table("clinic.Patient Files")
    assert (files.schema_name, files.name) == ("clinic", "Patient Files")
    assert files.columns[0].encrypted == 'Blood "Type"_encrypted'


def test_a_file_is_checked_once_until_it_changes(tmp_path: Path) -> None:
    path = write(tmp_path, VALID)
    first = load_catalogue(path)
    assert load_catalogue(path) is first
    changed = load_catalogue(write(tmp_path, VALID.replace("phone_number", "fax")))
    assert [column.name for column in changed.table("users").columns] == ["email", "fax"]


def test_unknown_table_lists_the_known_ones(tmp_path: Path) -> None:
    catalogue = load_catalogue(write(tmp_path, VALID))
    with pytest.raises(ConfigurationError, match=r"unknown table 'Users'.*users, clinic\.Patient Files"):
        catalogue.table("Users")


def test_models_are_frozen_and_can_be_built_in_python() -> None:
    table = Table(name="t", schema="s", columns=(Column(name="c", context="x"),))
    assert Catalogue(tables=(table,)).table("s.t") is table
    with pytest.raises(ValidationError):
        table.name = "other"  # type: ignore[misc]


def test_fingerprint_follows_the_meaning_not_the_spelling(tmp_path: Path) -> None:
    def fingerprint(text: str) -> str:
        return load_catalogue(write(tmp_path, text)).fingerprint("t")

    one, two = "{name: a, context: x}", "{name: b, context: y}"
    base = fingerprint(f"tables: [{{name: t, columns: [{one}, {two}]}}]")
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    same = f"format: AES-256-GCM\ntables: [{{name: t, schema: public, columns: [{two}, {one}]}}]"
    assert fingerprint(same) == base
    other_table = f"{{name: u, columns: [{one}]}}"
    shown = f"tables: [{{name: t, columns: [{one}, {two}], hide: [salt]}}]"
    assert fingerprint(shown.replace("context", "adopt: true, context", 1)) == base
    assert fingerprint(f"tables: [{other_table}, {{name: t, columns: [{one}, {two}]}}]") == base
    changed = [
        f"tables: [{{name: t, columns: [{one}]}}]",
        f"format: other\ntables: [{{name: t, columns: [{one}, {two}]}}]",
        "tables: [{name: t, columns: [{name: a, context: x}, {name: b, context: z}]}]",
        "tables: [{name: t, columns: [{name: a, context: x, search_index: i}, {name: b, context: y}]}]",
    ]
    assert len({base, *map(fingerprint, changed)}) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping with the key tables"),
        ("- a", "must be a mapping with the key tables"),
        ("{}", "tables: is missing"),
        ("tables:", "tables: must be a list, not empty"),
        ("tables: users", "tables: must be a list, not text"),
        ("tables: []", "tables: must name at least one table"),
        ("tables: [users]", "tables[0]: must be a mapping, not text"),
        ("tables: [{name: t, columns: []}]", "tables[0].columns: must name at least one column"),
        ("tables: [{name: t}]", "tables[0].columns: is missing"),
        ("format: ''\ntables: [{name: t, columns: [{name: a, context: x}]}]", "format: must not be empty"),
        (
            "tables: [{name: t, columns: [{name: a, context: x, adopt: 'yes'}]}]",
            "tables[0].columns[0].adopt: must be true or false, not text",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: x}], hide: a}]",
            "tables[0].hide: must be a list, not text",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: x}], hide: [salt, a_encrypted]}]",
            "tables[0].hide[1]: the safe view leaves a_encrypted out already",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: x}], hide: [salt, salt]}]",
            "tables[0].hide[1]: the safe view leaves salt out already",
        ),
        ("tables: [{name: t, columns: [{name: a, context: x}]}]\nowner: me", "owner: unknown key"),
        (
            "tables: [{name: t, schema_name: s, columns: [{name: a, context: x}]}]",
            "tables[0].schema_name: unknown key",
        ),
        (
            "tables: [{name: s, columns: [{name: a, context: x}]},"
            " {name: t, columns: [{name: a, context: x, contxt: y}]}]",
            "tables[1].columns[0].contxt: unknown key",
        ),
        (
            "tables: [{name: t, columns: [{name: a, contxt: y}]}]",
            "tables[0].columns[0].context: is missing; tables[0].columns[0].contxt: unknown key",
        ),
        (
            "tables: [{name: 1, columns: [{name: a, context: x}]}]",
            "tables[0].name: must be a string, not a number; put it in quotes",
        ),
        (
            "tables: [{name: t, columns: [{name: no, context: x}]}]",
            "tables[0].columns[0].name: must be a string, not a boolean; put it in quotes",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: 2024-01-02}]}]",
            "tables[0].columns[0].context: must be a string, not a date; put it in quotes",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: x}, {name: a, context: y}]}]",
            "tables[0].columns[1].name: a is listed twice",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: x}]},"
            " {name: t, columns: [{name: b, context: x}]}]",
            "tables[1].name: t is listed twice",
        ),
        (
            "tables: [{name: a.b, columns: [{name: a, context: x}]},"
            " {name: b, schema: a, columns: [{name: a, context: x}]}]",
            "tables[1].name: a.b would name two tables: a.b in the schema public and b in the schema a",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: x, search_index: i},"
            " {name: b, context: x, search_index: i}]}]",
            "tables[0].columns[1].search_index: i is already the name of the index of t.a",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: x, search_index: t}]}]",
            "tables[0].columns[0].search_index: t is already the name of the table t",
        ),
        (
            "tables: [{name: t, columns: [{name: a_encrypted, context: x}, {name: a, context: x}]}]",
            "tables[0].columns[1].name: the derived name a_encrypted is another column of the catalogue",
        ),
        (
            "tables: [{name: t, columns: [{name: a, context: x, search_index: i},"
            " {name: a_search, context: x}]}]",
            "tables[0].columns[0].name: the derived name a_search is another column of the catalogue",
        ),
        (
            "tables: [{name: encryption_migrations, columns: [{name: a, context: x}]}]",
            "tables[0].name: tables named encryption_… hold the bookkeeping",
        ),
        (
            "tables: [{name: t, schema: pg_catalog, columns: [{name: a, context: x}]}]",
            "tables[0].schema: is a schema of PostgreSQL itself",
        ),
        ("tables: [{name: '', columns: [{name: a, context: x}]}]", "tables[0].name: must not be empty"),
        (
            "tables: [{name: t, columns: [{name: a, context: ''}]}]",
            "tables[0].columns[0].context: must not be empty",
        ),
        (
            'tables: [{name: t, columns: [{name: a, context: "a\\tb"}]}]',
            "tables[0].columns[0].context: must not contain control characters",
        ),
        (
            'tables: [{name: t, columns: [{name: "a\\0", context: x}]}]',
            "tables[0].columns[0].name: must not contain a NUL character",
        ),
        (
            'tables: [{name: t, columns: [{name: "\\ud800", context: x}]}]',
            "tables[0].columns[0].name: must not contain lone surrogates",
        ),
        (
            f"tables: [{{name: t, columns: [{{name: {'é' * 27}, context: x}}]}}]",
            f"tables[0].columns[0].name: the derived name {'é' * 27}_encrypted is 64 bytes long, "
            "PostgreSQL keeps 63",
        ),
        (
            f"tables: [{{name: {'t' * 64}, columns: [{{name: a, context: x}}]}}]",
            "tables[0].name: is 64 bytes long, PostgreSQL keeps 63",
        ),
        ("tables: []\ntables: []", "line 2, column 1: not valid YAML: the key tables is given twice"),
        ("tables: [{name: 2024-99-99}]", "not valid YAML"),
        ("[" * 1500, "not valid YAML"),
    ],
)
def test_bad_input(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message


@pytest.mark.parametrize("name", ["a|b", "a[b", "a]b", "a,b", "a...b", "a\\nb"])
@pytest.mark.parametrize("place", ["name", "schema"])
def test_table_names_that_cannot_be_partition_keys(tmp_path: Path, place: str, name: str) -> None:
    names = {"name": "t", "schema": "s", place: name}
    table = f'name: "{names["name"]}", schema: "{names["schema"]}", columns: [{{name: a, context: x}}]'
    text = f"tables: [{{{table}}}]"
    message = refusal(tmp_path, text)
    assert message.startswith(f"tables[0].{place}: must not contain ")
    assert "Dagster" in message


def test_longest_names_are_accepted(tmp_path: Path) -> None:
    text = f"tables: [{{name: {'t' * 63}, columns: [{{name: {'c' * 53}, context: 'a:v1'}}]}}]"
    assert len(load_catalogue(write(tmp_path, text)).tables[0].columns[0].encrypted) == 63


def test_column_names_may_hold_what_partition_keys_may_not(tmp_path: Path) -> None:
    text = 'tables: [{name: t, columns: [{name: "a|b, [c]...", context: x}]}]'
    assert load_catalogue(write(tmp_path, text)).tables[0].columns[0].name == "a|b, [c]..."


def test_engine_prefix_is_free_in_other_schemas(tmp_path: Path) -> None:
    text = "tables: [{name: encryption_log, schema: app, columns: [{name: a, context: x}]}]"
    assert load_catalogue(write(tmp_path, text)).keys == ("app.encryption_log",)


def test_broken_yaml_says_where(tmp_path: Path) -> None:
    assert refusal(tmp_path, "tables:\n  - name: [t\n").startswith("line 3, column 1: not valid YAML: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigurationError, match=r"missing\.yaml: cannot be read: No such file or directory"):
        load_catalogue(missing)
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load_catalogue(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"tables: \xff")
    with pytest.raises(ConfigurationError, match=r"is not UTF-8 text \(byte 8\)"):
        load_catalogue(binary)
