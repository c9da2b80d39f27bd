"""Which columns look sensitive by name and type alone: no value is ever read.

A name is cut into words (``twoFactorSecret``, ``two_factor_secret`` and ``two factor secret`` are the same three), and
runs of neighbouring words are looked up, joined, in lists: ``firstname`` is found in ``first_name``, ``FirstName`` and
``customer_firstname``, and not in ``filename``. Then the type has its say: a flag or a moment is not what its name is
about (``two_factor_enabled boolean``, ``email_verified_at timestamptz``), and a number that ends in ``id`` points
elsewhere. What is told is a guess with its reason, for a person to decide on.

The lists are in ``sensitive_names.yaml``. Libraries that do this (piicatcher, detectpii) search for patterns inside the
whole name, so that ``filename`` and ``username_count`` are persons, and know no money, no keys and no documents.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from importlib import resources
from typing import Literal, NamedTuple

import yaml

Category = Literal[
    "credential", "contact", "person", "birth", "address", "document", "bank", "health", "origin", "network", "money",
    "free form",
]  # fmt: skip
Confidence = Literal["likely", "possible"]


class Suspicion(NamedTuple):
    """Why a column looks sensitive, the reason in words: the part of the name, or the type."""

    category: Category
    confidence: Confidence
    reason: str


class _Rule(NamedTuple):
    category: Category
    confidence: Confidence
    kinds: frozenset[str]
    words: frozenset[str]
    tables: frozenset[str]


class _Lists(NamedTuple):
    rules: tuple[_Rule, ...]
    not_the_value: frozenset[str]
    points_elsewhere: frozenset[str]
    made_of_secrets: frozenset[str]


@functools.cache
def _lists() -> _Lists:
    read = yaml.safe_load(resources.files(__package__).joinpath("sensitive_names.yaml").read_bytes())
    groups = read["groups"]

    def words(text: str) -> frozenset[str]:
        return frozenset(word for part in text.split() for word in groups.get(part, part).split())

    rules = tuple(
        _Rule(rule["category"], rule["confidence"], *(words(rule.get(of, "")) for of in _Rule._fields[2:]))
        for rule in read["rules"]
    )
    others = ("not_the_value", "points_elsewhere", "made_of_secrets")
    return _Lists(rules, *(words(read[name]) for name in others))


_LONGEST_RUN = 4


def looks_sensitive(table: str, column: str, type_name: str) -> Suspicion | None:
    """Why a column looks as if it held something sensitive; None where nothing speaks for it.

    The table comes without its schema, the type as PostgreSQL's ``format_type`` prints it.
    """
    words = split_words(column)
    kind = kind_of(type_name)
    if not words or kind == "flag":
        return None
    of_table = {_singular(word) for word in split_words(table)}
    runs = dict(_runs(words))
    for rule in _lists().rules:
        if kind not in rule.kinds or (rule.tables and not rule.tables & of_table):
            continue
        found = max(rule.words & runs.keys(), key=len, default=None)
        if found is not None and not _is_about(words, runs[found], kind):
            where = f" in a table of {', '.join(sorted(rule.tables & of_table))}" if rule.tables else ""
            return Suspicion(
                rule.category, rule.confidence, f"its name says {' '.join(words[slice(*runs[found])])}{where}"
            )
    if kind == "json" and words[-1] not in _lists().not_the_value:
        return Suspicion("free form", "possible", f"{type_name} may hold anything")
    return None


def looks_secret(table: str, column: str, type_name: str) -> bool:
    """Whether a column looks as if it held what people or programs log in by, or what was made of that.

    A hash or a salt is no value to encrypt, but nothing to show to everybody either.
    """
    made_of = _lists().made_of_secrets
    words = split_words(column)
    if "salt" in words:
        return kind_of(type_name) in {"text", "bytes"}
    rest = [word.removesuffix("hash").removesuffix("digest") for word in words if word not in made_of]
    found = looks_sensitive(table, "_".join(rest), type_name)
    return found is not None and (found.category, found.confidence) == ("credential", "likely")


def _is_about(words: list[str], run: tuple[int, int], kind: str) -> bool:
    """Whether the name goes on after the sensitive words to say that the column is something else."""
    last = _singular(words[-1]) if run[1] < len(words) else ""
    if last in _lists().points_elsewhere:
        return kind in {"number", "uuid"}
    return last in _lists().not_the_value


def _runs(words: list[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Neighbouring words joined, with where they begin and end; also with the last of them in the singular."""
    for length in range(1, _LONGEST_RUN + 1):
        for start in range(len(words) - length + 1):
            run = words[start : start + length]
            for last in {run[-1], _singular(run[-1])}:
                yield "".join([*run[:-1], last]), (start, start + length)


_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SEPARATORS = re.compile(r"[^a-z0-9]+")
# A number at the end tells columns of one kind apart: address_line2, phone1.
_NUMBER_AT_END = re.compile(r"(?<=[a-z]{3})[0-9]+$")


def split_words(name: str) -> list[str]:
    """The words of a name: lower case, without accents and numbers at their ends."""
    plain = unicodedata.normalize("NFKD", name.replace("ß", "ss"))
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    words = _SEPARATORS.split(_CAMEL.sub(" ", plain).lower())
    return [_NUMBER_AT_END.sub("", word) for word in words if word and not word.isdigit()]


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


# Kinds by the beginning of what format_type prints (PostgreSQL manual, table 8.1); the first that fits.
_KINDS = (
    (r"boolean|bit\b|bit varying", "flag"),
    (r"timestamp|time\b", "moment"),
    (r"date\b", "date"),
    (r"jsonb?\b|hstore|xml", "json"),
    (r"character|text|varchar|bpchar|citext|name\b|\"char\"", "text"),
    (r"bytea", "bytes"),
    (r"smallint|integer|bigint|numeric|real|double precision|money", "number"),
    (r"uuid", "uuid"),
    (r"inet|cidr|macaddr", "network"),
    (r"point|geometry|geography|box\b|polygon|path|circle|line\b|lseg", "geometry"),
    (r"interval|tsvector|tsquery|.*range\b|oid\b|reg|pg_lsn|xid", "technical"),
)  # fmt: skip


def kind_of(type_name: str) -> str:
    """What kind of values a type has; ``other`` for enumerations, domains and composite types."""
    # Extensions' types outside the search path come with their schema, and arrays hold what their elements are.
    bare = type_name.removesuffix("[]").rpartition(".")[2].lower()
    return next((kind for pattern, kind in _KINDS if re.match(pattern, bare)), "other")
