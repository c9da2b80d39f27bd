"""What is sensitive: the catalogue of tables and columns, read from YAML and checked before anything uses it.

Only what the file says is checked here. Whether the database has these tables and columns is
asked by the preflight, and which envelope formats exist is known to `crypto.envelope`.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from alphapulse_encryption.errors import ConfigurationError

PACKAGED_CATALOGUE = Path(__file__).with_name("catalogue.yaml")

# PostgreSQL cuts longer identifiers silently (NAMEDATALEN - 1, manual section 4.1.1).
MAX_IDENTIFIER_BYTES = 63
_KEPT = f"PostgreSQL keeps {MAX_IDENTIFIER_BYTES}"
MAX_CONTEXT_LENGTH = 200

ENCRYPTED_SUFFIX = "_encrypted"
SEARCH_SUFFIX = "_search"

# The engine keeps its bookkeeping in tables of this prefix in the schema public.
ENGINE_SCHEMA = "public"
ENGINE_TABLE_PREFIX = "encryption_"

# Table names become Dagster partition keys, which do not allow these.
NOT_IN_PARTITION_KEYS = ("|", "[", "]", ",", "...")


def _problem(problem: str, *location: str | int) -> PydanticCustomError:
    """An error about a place below the model that is being validated."""
    return PydanticCustomError("catalogue", "{problem}", {"problem": problem, "location": location})


def _has_controls(text: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in text)


def _check_identifier(name: str) -> str:
    if "\x00" in name:
        raise _problem("must not contain a NUL character")
    size = len(name.encode())
    if size > MAX_IDENTIFIER_BYTES:
        raise _problem(f"is {size} bytes long, {_KEPT}")
    return name


def _check_partition_name(name: str) -> str:
    for forbidden in NOT_IN_PARTITION_KEYS:
        if forbidden in name:
            raise _problem(f"must not contain {forbidden!r}: Dagster does not allow it in partition keys")
    if _has_controls(name):
        raise _problem("must not contain control characters: Dagster does not allow them in partition keys")
    return name


def _check_context(context: str) -> str:
    # A colon is harmless in the salt `{context}:v{version}`: the last `:v` always separates the two.
    if _has_controls(context):
        raise _problem("must not contain control characters")
    return context


def _check_schema(schema: str) -> str:
    if schema == "information_schema" or schema.startswith("pg_"):
        raise _problem("is a schema of PostgreSQL itself")
    return schema


Text = Annotated[StrictStr, Field(min_length=1)]
Identifier = Annotated[Text, AfterValidator(_check_identifier)]
PartitionName = Annotated[Identifier, AfterValidator(_check_partition_name)]
SchemaName = Annotated[PartitionName, AfterValidator(_check_schema)]
Context = Annotated[Text, Field(max_length=MAX_CONTEXT_LENGTH), AfterValidator(_check_context)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Column(_Entry):
    """One plaintext column that is to be encrypted, by its exact name.

    The context names the derived key, and is stored in every envelope. A column with a search index is searchable.
    What the columns of envelopes and tokens hold before the first step is the application's own where it is adopted:
    it is kept and verified, and no token of it is overwritten.
    """

    name: Identifier
    context: Context
    search_index: Identifier | None = None
    adopt: StrictBool = False

    @model_validator(mode="after")
    def _derived_names_fit(self) -> "Column":
        for derived in self.derived:
            size = len(derived.encode())
            if size > MAX_IDENTIFIER_BYTES:
                raise _problem(f"the derived name {derived} is {size} bytes long, {_KEPT}", "name")
        return self

    @property
    def encrypted(self) -> str:
        """Name of the column that holds the envelopes (TEXT)."""
        return self.name + ENCRYPTED_SUFFIX

    @property
    def search(self) -> str:
        """Name of the column that holds the search tokens (VARCHAR(64)); it exists for searchable columns."""
        return self.name + SEARCH_SUFFIX

    @property
    def searchable(self) -> bool:
        return self.search_index is not None

    @property
    def derived(self) -> tuple[str, ...]:
        """Names of the columns that the engine adds for this one."""
        return (self.encrypted, self.search) if self.searchable else (self.encrypted,)


class Table(_Entry):
    """A table, its sensitive columns, and others that its safe view leaves out; names are exact, without quotes."""

    name: PartitionName
    schema_name: SchemaName = Field(default="public", alias="schema")
    columns: tuple[Column, ...]
    hide: tuple[Identifier, ...] = ()

    @model_validator(mode="after")
    def _columns_agree(self) -> "Table":
        if not self.columns:
            raise _problem("must name at least one column", "columns")
        if self.schema_name == ENGINE_SCHEMA and self.name.startswith(ENGINE_TABLE_PREFIX):
            raise _problem(f"tables named {ENGINE_TABLE_PREFIX}… hold the bookkeeping", "name")
        names = [column.name for column in self.columns]
        for position, name in enumerate(names):
            if name in names[:position]:
                raise _problem(f"{name} is listed twice", "columns", position, "name")
        for position, column in enumerate(self.columns):
            for derived in column.derived:
                if derived in names:
                    problem = f"the derived name {derived} is another column of the catalogue"
                    raise _problem(problem, "columns", position, "name")
        left_out = {*names, *(derived for column in self.columns for derived in column.derived)}
        for position, name in enumerate(self.hide):
            if name in left_out:
                raise _problem(f"the safe view leaves {name} out already", "hide", position)
            left_out.add(name)
        return self

    @property
    def key(self) -> str:
        """What `--table` and partitions call it: its name in the schema public, `schema.name` elsewhere."""
        return self.name if self.schema_name == "public" else f"{self.schema_name}.{self.name}"


class Catalogue(_Entry):
    """Everything that is to be encrypted in one database, and how: `crypto.envelope.get_format` knows the format."""

    format: Text = "AES-256-GCM"
    tables: tuple[Table, ...]
    _path: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _tables_agree(self) -> "Catalogue":
        if not self.tables:
            raise _problem("must name at least one table", "tables")
        seen: dict[str, Table] = {}
        for position, table in enumerate(self.tables):
            other = seen.setdefault(table.key, table)
            if other is table:
                continue
            problem = f"{table.key} is listed twice"
            if (other.schema_name, other.name) != (table.schema_name, table.name):
                problem = (
                    f"{table.key} would name two tables: {other.name} in the schema {other.schema_name} "
                    f"and {table.name} in the schema {table.schema_name}"
                )
            raise _problem(problem, "tables", position, "name")
        # Tables and indexes of a schema share one namespace.
        relations = {(table.schema_name, table.name): f"the table {table.name}" for table in self.tables}
        for table_position, table in enumerate(self.tables):
            for position, column in enumerate(table.columns):
                if column.search_index is None:
                    continue
                relation = (table.schema_name, column.search_index)
                if relation in relations:
                    raise _problem(
                        f"{column.search_index} is already the name of {relations[relation]}",
                        *("tables", table_position, "columns", position, "search_index"),
                    )
                relations[relation] = f"the index of {table.key}.{column.name}"
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all tables, in the order of the catalogue."""
        return tuple(table.key for table in self.tables)

    @property
    def source(self) -> str:
        """Where it was read from, in a sentence."""
        if self._path == PACKAGED_CATALOGUE:
            return (
                f"The catalogue is AlphaPulse's own, which is packaged ({self._path}): set "
                "ALPHAPULSE_ENCRYPTION_CATALOGUE to the path of yours."
            )
        return f"The catalogue is {self._path}." if self._path else ""

    def table(self, key: str) -> Table:
        """The table of that key, or a ConfigurationError that lists the known ones."""
        for table in self.tables:
            if table.key == key:
                return table
        raise ConfigurationError(f"unknown table {key!r}: the catalogue has {', '.join(self.keys)}")

    def fingerprint(self, table_key: str) -> str:
        """Hex SHA-256 of what the catalogue says about a table, its format included.

        Writing a default out or listing the columns in another order does not change it, nor does what says only how
        the migration begins or what views show.
        """
        table = self.table(table_key)
        columns = sorted(table.columns, key=lambda column: column.name)
        entry = {
            "format": self.format,
            "schema": table.schema_name,
            "name": table.name,
            "columns": [column.model_dump(exclude={"adopt"}) for column in columns],
        }
        canonical = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


# A process has one; tests have some.
_CATALOGUES_KEPT = 8


def load_catalogue(path: Path | None = None) -> Catalogue:
    """Read and check a catalogue, the packaged one where no YAML file is named.

    Raises:
        ConfigurationError: the message names the file, the places in it and what is wrong there.
    """
    path = path or PACKAGED_CATALOGUE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"catalogue {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"catalogue {path}: is not UTF-8 text (byte {error.start})") from None
    return _checked(text, path)


@functools.lru_cache(maxsize=_CATALOGUES_KEPT)
def _checked(text: str, path: Path) -> Catalogue:
    """The catalogue that a text is. Each step of a run asks for it, some of them many times, and nobody changes it."""
    document = _parse(text, path)
    if not isinstance(document, dict):
        raise ConfigurationError(f"catalogue {path}: must be a mapping with the key tables")
    try:
        catalogue = Catalogue.model_validate(document)
        catalogue._path = path
    except ValidationError as error:
        problems = [_describe(details) for details in error.errors(include_url=False)]
        raise ConfigurationError(f"catalogue {path}: {'; '.join(problems)}") from None
    return catalogue


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, where YAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str, path: Path) -> object:
    try:
        # A subclass of SafeLoader builds plain data only.
        return yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        # The name of a tag or an alias, which may be anything where the file is no catalogue.
        problem = re.sub(r"'[^']{3,}'", "that is written there", error.problem or "")
        raise ConfigurationError(f"catalogue {path}: {place}not valid YAML: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigurationError(f"catalogue {path}: not valid YAML") from None


def _describe(details: ErrorDetails) -> str:
    """One error of pydantic in our words: `tables[1].columns[0].contxt: unknown key`."""
    location = [*details["loc"], *details.get("ctx", {}).get("location", ())]
    place = ""
    for part in location:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
    kind = _YAML_KINDS.get(type(details["input"]), f"a {type(details['input']).__name__}")
    problem = {
        "extra_forbidden": "unknown key",
        "missing": "is missing",
        "string_type": f"must be a string, not {kind}; put it in quotes",
        "bool_type": f"must be true or false, not {kind}",
        "string_too_short": "must not be empty",
        "string_too_long": f"is longer than {MAX_CONTEXT_LENGTH} characters",
        "string_unicode": "must not contain lone surrogates",
        "tuple_type": f"must be a list, not {kind}",
        "model_type": f"must be a mapping, not {kind}",
    }.get(details["type"], details["msg"])
    return f"{place}: {problem}" if place else problem


_YAML_KINDS = {bool: "a boolean", str: "text", list: "a list", dict: "a mapping", type(None): "empty"}
_YAML_KINDS |= dict.fromkeys((int, float), "a number")
