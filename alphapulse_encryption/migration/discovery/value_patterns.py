"""What values look like: addresses, numbers with check digits, tokens and keys. Nothing is kept of them but counts.

Maintained libraries know the formats: `phonenumbers` (Google's), `python-stdnum` (IBAN, Luhn, national numbers),
`detect-secrets` (private keys, JSON web tokens, cloud services' tokens). They are asked whether a value as a whole is
such a thing, which is what columns hold. Detectors for running text (presidio, datafog) look for what is in a text
somewhere: of a column of order numbers they make telephone numbers and postcodes, and presidio needs a language model
that would have to be fetched. Names of people are not told by their form: that is left to the columns' names.
"""

from __future__ import annotations

import functools
import importlib
import ipaddress
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources

import phonenumbers
import yaml
from stdnum import bitcoin, iban, luhn

from alphapulse_encryption.migration.schema.sensitive_names import Category, looks_sensitive

# Of a column, so many different values are looked at.
MOST_VALUES = 300
# Fewer say nothing.
FEWEST_VALUES = 5
# Numbers without a form of their own pass a check digit one time in ten.
FEWEST_NUMBERS = 20


@dataclass(frozen=True)
class Pattern:
    """A form of values."""

    name: str
    category: Category
    fits: Callable[[str], bool]
    # Values may be plain digits, some of which fit by chance; then more of them are needed.
    digits_only: bool = False
    # Such values are often harmless.
    ambiguous: bool = False
    # What in a longer text is held against the form; None where it is not looked for there.
    inside: re.Pattern[str] | None = None

    def is_in(self, text: str) -> bool:
        """Whether such a value is somewhere in a text."""
        return self.inside is not None and any(
            _safely(self.fits, found[0]) for found in self.inside.finditer(text)
        )


@dataclass(frozen=True)
class Evidence:
    """What the values of a column look like.

    Args:
        share: of the values looked at, 0 to 1.
        score: how much that says for a sensitive column, 0 to 1.
        inside: whether the form is found inside of longer texts or documents, and not as the value.
    """

    pattern: str
    category: Category
    share: float
    looked_at: int
    score: float
    inside: bool = False


_EMAIL = r"[^\s@<>()\[\],;:\"]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}"
_PHONE = r"(?:\+|00)[\d\s().\-/]{7,24}"
_CARD = r"(?:3[0-9]|4[0-9]|5[0-9]|6[0-9]|2[2-7])\d{2}(?:[ -]?\d){9,15}"
_IBAN = r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}"
_SSN = r"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}"
_PLAIN_DIGITS = re.compile(r"\d+")


def _written(form: str, valid: Callable[[str], bool] = bool) -> Callable[[str], bool]:
    """A form first: the libraries take more than is ever written, and are slower."""
    compiled = re.compile(form)
    return lambda text: compiled.fullmatch(text) is not None and valid(text)


def _is_phone(text: str) -> bool:
    return phonenumbers.is_valid_number(phonenumbers.parse(re.sub(r"^00", "+", text)))


def _is_address_of_a_host(text: str) -> bool:
    # As inet prints them: 192.0.2.1/32.
    address = ipaddress.ip_address(re.sub(r"/(32|128)$", "", text))
    return not (address.is_unspecified or address.is_loopback)


def _national(module: str, form: str) -> Pattern:
    valid: Callable[[str], bool] = importlib.import_module(f"stdnum.{module}").is_valid
    fits = _written(form, valid)
    country = module.partition(".")[0].strip("_").upper()
    return Pattern(
        f"personal number ({country})", "document", lambda text: fits(text.upper()), digits_only=True
    )


def _secret(detector: str, name: str) -> Pattern:
    module, _, class_name = detector.partition(".")
    plugin = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), class_name)()
    return Pattern(name, "credential", lambda text: any(True for _ in plugin.analyze_string(text)))


@functools.cache
def _patterns() -> tuple[Pattern, ...]:
    known = yaml.safe_load(resources.files(__package__).joinpath("value_patterns.yaml").read_bytes())
    email = re.compile(rf"(?<![\w.+-]){_EMAIL}(?![\w-])")
    phone = re.compile(r"(?<![\w+])\+\d{1,3}[\s\d().\-/]{6,18}\d(?!\w)")
    account = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
    return (
        Pattern("e-mail address", "contact", _written(_EMAIL), inside=email),
        Pattern("telephone number", "contact", _written(_PHONE, _is_phone), inside=phone),
        Pattern("IBAN", "bank", _written(_IBAN, iban.is_valid), inside=account),
        Pattern(
            "payment card number",
            "bank",
            _written(_CARD, lambda text: luhn.is_valid(re.sub(r"[ -]", "", text))),
            digits_only=True,
        ),
        Pattern("Bitcoin address", "bank", _written(r".{26,64}", bitcoin.is_valid)),
        Pattern("US social security number", "document", _written(_SSN)),
        *(_national(*one) for one in known["national_numbers"].items()),
        Pattern("IP address", "network", _is_address_of_a_host, ambiguous=True),
        *(_secret(*one) for one in known["secrets"].items()),
    )


# By the share of values that fit: nearly all, or many.
_NEARLY_ALL, _MANY, _SOME = 0.8, 0.3, 0.03
_SCORE_NEARLY_ALL, _SCORE_MANY, _SCORE_INSIDE, _SCORE_AMBIGUOUS = 0.95, 0.7, 0.6, 0.55


def look_at(values: Sequence[str], *, numbers: bool = False) -> Evidence | None:
    """What most of a column's different values are; None where they have no form that says anything.

    Args:
        numbers: whether the column is of a type for numbers, which fit many a form by chance.
    """
    texts = [text for text in (value.strip() for value in values[:MOST_VALUES]) if text]
    if len(texts) < FEWEST_VALUES:
        return None
    found = [
        evidence
        for pattern in _patterns()
        if (pattern.digits_only or not numbers) and (evidence := _whole(pattern, texts, numbers=numbers))
    ]
    if not numbers:
        found += [
            Evidence(one.name, one.category, share, len(texts), _SCORE_INSIDE, inside=True)
            for one in _patterns()
            if (share := _share(texts, one.is_in)) >= _SOME
        ]
    return max(found, key=lambda evidence: (evidence.score, evidence.share), default=None)


def _whole(pattern: Pattern, texts: Sequence[str], *, numbers: bool) -> Evidence | None:
    share = _share(texts, pattern.fits)
    by_chance = pattern.digits_only and (numbers or all(_PLAIN_DIGITS.fullmatch(text) for text in texts))
    needed = _NEARLY_ALL if pattern.ambiguous or by_chance else _MANY
    if share < needed or (by_chance and len(texts) < FEWEST_NUMBERS):
        return None
    score = _SCORE_NEARLY_ALL if share >= _NEARLY_ALL and not by_chance else _SCORE_MANY
    if pattern.ambiguous:
        score = _SCORE_AMBIGUOUS
    return Evidence(pattern.name, pattern.category, share, len(texts), score)


def _share(texts: Sequence[str], fits: Callable[[str], bool]) -> float:
    return sum(_safely(fits, text) for text in texts) / len(texts)


def _safely(fits: Callable[[str], bool], text: str) -> bool:
    try:
        return fits(text)
    except Exception:
        # A value that a library stumbles over is not of its form; and its error would quote it.
        return False


def look_into(table: str, documents: Sequence[str]) -> Evidence | None:
    """What JSON documents hold: members whose names or values look sensitive. None where none do."""
    named: Counter[Category] = Counter()
    texts: set[str] = set()
    count = 0
    for document in documents[:MOST_VALUES]:
        try:
            leaves = list(_leaves(json.loads(document)))
        except (ValueError, RecursionError):
            continue
        count += 1
        texts |= {value for _, value in leaves if isinstance(value, str)}
        found = {
            looks_sensitive(table, member, "text" if isinstance(value, str) else "numeric")
            for member, value in leaves
        }
        named.update({why.category for why in found if why is not None and why.confidence == "likely"})
    if count < FEWEST_VALUES:
        return None
    evidence = [
        Evidence(
            f"members named as {category} data", category, n / count, count, _SCORE_NEARLY_ALL, inside=True
        )
        for category, n in named.items()
        if n / count >= _SOME
    ]
    inside = look_at(sorted(texts)[:MOST_VALUES])
    if inside is not None:
        evidence.append(replace(inside, looked_at=count, score=_SCORE_MANY, inside=True))
    return max(evidence, key=lambda one: (one.score, one.share), default=None)


_MOST_DEPTH = 16


def _leaves(content: object, member: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    if isinstance(content, dict | list) and depth <= _MOST_DEPTH:
        items = content.items() if isinstance(content, dict) else ((member, value) for value in content)
        for name, value in items:
            yield from _leaves(value, str(name), depth + 1)
    elif content is not None and not isinstance(content, bool | dict | list):
        yield member, content
