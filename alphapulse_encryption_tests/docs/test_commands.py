"""Every command that the pages show is run, by the walk here or by a test that is named, or it is said why not.

The walk follows the guide, and then the pages for when something goes wrong, in one database of the sample's.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import Any

import dagster as dg
import psycopg
import pytest
import yaml

from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.cli.commands.parser import build_parser, check_usage
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.docs.pages import ROOT, SHELL, Block, page, pages
from alphapulse_encryption_tests.docs.walk import Walk, own, own_commands, plain
from alphapulse_encryption_tests.migration import walk as engine
from alphapulse_encryption_tests.place import Place, place

pytestmark = pytest.mark.xdist_group("the manual's commands")

# In this order, each going on from where the one before ended.
WALKED = ("docs/guide.md", "docs/rollback.md", "docs/disasters.md", "docs/key-rotation.md")

# Programs that are not here, or would reach for what is not ours.
NOT_HERE = {
    "aws": "AWS itself; the key source is tested against moto's Secrets Manager (keysources/test_aws.py)",
    "dagster": "Dagster's own; that its pools hold our runs back is tested in scale_out/test_celery.py",
    "docker": "a daemon; what the Dockerfile does is tested in scale_out/test_deploy.py",
    "helm": "a cluster; the values are held against the chart's models in scale_out/test_deploy.py",
    "kubectl": "a cluster; the manifests are held against Kubernetes' schemas in scale_out/test_deploy.py",
    "vault": "a Vault; the key source is tested against a server of ours (keysources/test_vault.py)",
}
# Options of ours that the walk leaves out; other tests run them.
RUN_BY_OTHERS = {
    *("--analyze", "--limit", "--rebuild-indexes", "--slow-queries"),
    *("--discover", "--json", "--json-schema", "--output", "--sample", "--schema"),
    *("--rehearse", "--roles-sql", "--runs", "--test-alerts"),
}
# Blocks that are run by a test as they stand, by a phrase of theirs.
BLOCKS_RUN_BY_OTHERS = {
    "age -d -i identity.txt backup.dump.age | pg_restore": "test_backup.py",
    "python -m alphapulse_encryption.sample.application": "sample/application/test_journey.py",
    "python -m alphapulse_encryption.ui": "browser/demonstration.py",
    "python -m alphapulse_encryption.scale_out.worker": "scale_out/test_celery.py",
}

# Of the sample, as many tables as there are ways to go; more would only take longer.
CATALOGUE = load_catalogue()
CATALOGUE = CATALOGUE.model_copy(
    update={"tables": tuple(CATALOGUE.table(key) for key in ("trades", "users"))}
)

BLOCKS = [block for of in pages() for block in of.blocks if block.language in SHELL]


@pytest.fixture(scope="module")
def there(
    postgres: EmbeddedPostgres, _sample_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    databases = fresh_database(postgres, _sample_template)
    url = next(databases)
    with place(postgres, url, tmp_path_factory.mktemp("state"), "", catalogue_text()) as found:
        yield found
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        for name in ("scratch", "restored"):
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())
    next(databases, None)


@pytest.fixture(scope="module")
def walked(there: Place, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The walk, looked at by other means at the end of each page."""
    url, restored = there.url, there.postgres.url("restored")
    with psycopg.connect(there.postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS approver")
        connection.execute("CREATE ROLE approver LOGIN SUPERUSER")
    addresses = {
        "postgresql://approver@db.example.com/alphapulse": url.replace("//postgres@", "//approver@", 1),
        "postgresql://migrator@db.example.com/alphapulse": url,
        "postgresql://migrator@new.example.com/restored": restored,
    }
    walk = Walk(there, tmp_path_factory.mktemp("walk"), addresses, frozenset(NOT_HERE))
    original = {table.key: plaintexts(url, table.key) for table in CATALOGUE.tables}
    guide, rollback, disasters, rotation = (page(name) for name in WALKED)

    walk.follow(guide)
    assert set(engine.columns_of(url, "users")).isdisjoint(sensitive("users"))
    assert {key: decrypted(walk, key, url) for key in original} == original
    assert versions(url) == {1}

    walk.follow(rollback)
    assert plaintexts(url, "users") == original["users"] == decrypted(walk, "users", url)
    states = dict(engine.query(url, "SELECT table_name, authority FROM alphapulse_encryption.tables"))
    assert (states["users"], states["trades"]) == ("plaintext", "plaintext")

    first_key = there.environment()["ALPHAPULSE_ENCRYPTION_MASTER_KEY"]
    with place(there.postgres, restored, there.state, "", there.catalogue) as another:

        def lose_storage() -> None:
            there.dagster_url = another.dagster_url

        walk.follow(disasters, {"Dagster's storage is lost": lose_storage})
        assert there.environment()["ALPHAPULSE_ENCRYPTION_MASTER_KEY"] != first_key
        assert {key: plaintexts(restored, key) for key in original} == original
        assert {key: decrypted(walk, key, restored) for key in original} == original
        with there.instance() as instance:
            ranges = {f"{number:02d}|{key}" for number in range(there.ranges) for key in original}
            assert instance.get_materialized_partitions(dg.AssetKey("encrypted_data")) == ranges
            assert len(instance.get_runs()) == len(original) * 5

        walk.follow(rotation)
    assert versions(restored) == {2}
    assert {key: decrypted(walk, key, restored) for key in original} == original
    return walk


def catalogue_text() -> str:
    """As a file."""
    return yaml.safe_dump(CATALOGUE.model_dump(mode="json", by_alias=True, exclude_none=True))


def sensitive(key: str) -> list[str]:
    return sorted(column.name for column in CATALOGUE.table(key).columns)


def plaintexts(url: str, key: str) -> list[tuple[Any, ...]]:
    return engine.contents(url, key, ["id", *sensitive(key)])


def decrypted(walk: Walk, key: str, url: str) -> list[tuple[Any, ...]]:
    """A table's values from its ciphertext, in the order and the form of :func:`plaintexts`."""
    columns = {column.name: column for column in CATALOGUE.table(key).columns}
    names = sorted(["id", *columns])
    encrypted = [columns[name].encrypted if name in columns else name for name in names]
    selected = ", ".join(f"{name}::text" for name in encrypted)
    found = []
    for row in engine.query(url, f"SELECT {selected} FROM {key}"):
        found.append(
            tuple(
                value if value is None or name not in columns else _opened(walk, value)
                for name, value in zip(names, row, strict=True)
            )
        )
    return sorted(found, key=repr)


def _opened(walk: Walk, envelope: str) -> str:
    members = json.loads(envelope)
    environment = walk.place.environment()
    name = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
    master_key = environment.get(f"{name}_V{members['key_version']}", environment[name])
    key = _derived(base64.urlsafe_b64decode(master_key), members["context"], members["key_version"])
    return independent.open_envelope(key, envelope)


_derived = functools.cache(independent.derive)


def versions(url: str) -> set[int]:
    found = set()
    for table in CATALOGUE.tables:
        for column in table.columns:
            found |= {
                number
                for (number,) in engine.query(
                    url,
                    f"SELECT DISTINCT ({column.encrypted}::jsonb ->> 'key_version')::int FROM {table.key}",
                )
                if number is not None
            }
    return found


@pytest.mark.long
def test_the_pages_can_be_followed(walked: Walk) -> None:
    shown = [
        plain(command)
        for name in WALKED
        for block in page(name).blocks
        if block.language in SHELL
        for command in block.commands
    ]
    left_out = [command for command in shown if command.split()[0] in NOT_HERE]
    assert walked.done == [command for command in shown if command not in left_out]
    assert len(walked.done) > 60


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_command_is_one(block: Block) -> None:
    """Without running it: our own are taken by our parser, targets of make and extras exist, variables are known."""
    for ours in own_commands(block.text):
        parser = build_parser()
        try:
            check_usage(parser, parser.parse_args(list(ours.arguments)))
        except SystemExit:
            pytest.fail(f"{block}: not a command: {' '.join(ours.arguments)}")
    for command in block.commands:
        assert problem_of(command, block) is None, f"{block}: {command}: {problem_of(command, block)}"


def problem_of(command: str, block: Block) -> str | None:
    """Why a command is not one that is run, or known not to be; None where it is."""
    known = page("docs/settings.md").text
    for name in re.findall(r"\b((?:ALPHAPULSE|DAGSTER|VAULT)_[A-Z0-9_]*[A-Z0-9])=", command):
        if name not in known and not name.startswith("ALPHAPULSE_ENCRYPTION_MASTER_KEY_V"):
            return f"{name} is not described in docs/settings.md"
    first, *rest = shlex.split(command.replace("$(", "("), comments=True)
    into_a_file = re.fullmatch(r"([^|&;<>]+)> *[\w.]+", plain(command))
    if own(into_a_file[1] if into_a_file else command) is not None:
        return None
    if command.startswith("export ") or first in NOT_HERE:
        return None
    if first == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wrong = [word for word in rest if "=" not in word and word not in targets]
        return f"make has no {', '.join(wrong)}" if wrong else None
    if first == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = re.findall(rf"{project['name']}\[([^]]+)\]", command)
        missing = {extra for names in wanted for extra in names.split(",")} - set(
            project["optional-dependencies"]
        )
        return f"there is no extra {', '.join(sorted(missing))}" if missing or not wanted else None
    walked = {
        plain(c) for name in WALKED for b in page(name).blocks if b.language in SHELL for c in b.commands
    }
    if plain(command) in walked or any(phrase in block.text for phrase in BLOCKS_RUN_BY_OTHERS):
        return None
    return (
        "no test runs it. Show it on a page that the walk follows (WALKED), or name the test that runs its block "
        "(BLOCKS_RUN_BY_OTHERS), or say why its program cannot be run here (NOT_HERE)"
    )


@pytest.mark.long
def test_every_option_of_ours_that_is_shown_is_run(walked: Walk) -> None:
    shown = {flag for block in BLOCKS for ours in own_commands(block.text) for flag in ours.flags}
    assert shown - walked.flags - RUN_BY_OTHERS == set(), "no test runs these (RUN_BY_OTHERS)"


@pytest.mark.long
def test_statements_in_the_text_are_accepted_by_the_server(walked: Walk) -> None:
    statements = {
        code
        for of in pages()
        for code in of.inline
        if code.startswith("SELECT ") and " FROM " in code and "…" not in code
    }
    assert len(statements) > 5
    with psycopg.connect(walked.place.url) as connection:
        for statement in sorted(statements):
            connection.execute(statement.encode())


def test_no_exception_is_stale() -> None:
    text = "\n".join(block.text for block in BLOCKS)
    tests = ROOT / "alphapulse_encryption_tests"
    first = {command.split()[0] for block in BLOCKS for command in block.commands}
    assert set(NOT_HERE) <= first
    for program, reason in NOT_HERE.items():
        assert all((tests / name).is_file() for name in re.findall(r"[\w/]+\.py", reason)), program
    others = "".join(path.read_text() for path in tests.rglob("*.py") if path.parent != tests / "docs")
    assert {flag for flag in RUN_BY_OTHERS if f'"{flag}"' not in others} == set()
    for phrase, name in BLOCKS_RUN_BY_OTHERS.items():
        assert phrase in text and (tests / name).is_file(), (phrase, name)


def test_a_command_that_nothing_runs_is_found() -> None:
    def problem(command: str) -> str | None:
        return problem_of(command, Block("docs/x.md", 1, "", command))

    assert problem("python -m alphapulse_encryption --verify") is None
    assert problem("make demo ROWS=100") is None
    assert problem("make nonsense") == "make has no nonsense"
    assert problem("pip install 'alphapulse-encryption[nonsense]'") == "there is no extra nonsense"
    assert "NOT_HERE" in (problem("rm -rf x") or "")
    assert (
        problem("export ALPHAPULSE_NONSENSE=1") == "ALPHAPULSE_NONSENSE is not described in docs/settings.md"
    )
    (ours,) = own_commands("A=1 python -m alphapulse_encryption --verify --table 'x y' > out  # why")
    assert ours.arguments[:3] == ("--verify", "--table", "x y")
    assert own("python -m alphapulse_encryption --backup-identity > identity.txt") is None
