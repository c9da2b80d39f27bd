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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import phonenumbers
from stdnum import bitcoin, iban, luhn

from alphapulse_encryption.migration.discovery.sensitive_names import Category, looks_sensitive

# Of a column, so many different values are looked at.
MOST_VALUES = 300
# Fewer say nothing.
FEWEST_VALUES = 5
# Numbers without a form of their own pass a check digit one time in ten.
FEWEST_NUMBERS = 20


@dataclass(frozen=True)
class Pattern:
    """A form of values.

    Args:
        name: in words.
        category: of what such values are.
        fits: whether a value, without blanks around it, is of this form.
        digits_only: whether values may be plain digits, some of which fit by chance; then more of them are needed.
        ambiguous: whether such values are often harmless.
    """

    name: str
    category: Category
    fits: Callable[[str], bool]
    digits_only: bool = False
    ambiguous: bool = False


@dataclass(frozen=True)
class Evidence:
    """What the values of a column look like.

    Args:
        pattern: name of the form.
        category: of what such values are.
        share: of the values looked at, 0 to 1.
        looked_at: how many different ones.
        score: how much that says for a sensitive column, 0 to 1.
        inside: whether the form is found inside of longer texts or documents, and not as the value.
    """

    pattern: str
    category: Category
    share: float
    looked_at: int
    score: float
    inside: bool = False


_EMAIL = re.compile(r"[^\s@<>()\[\],;:\"]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}")
_PHONE = re.compile(r"(?:\+|00)[\d\s().\-/]{7,24}")
_CARD = re.compile(r"(?:3[0-9]|4[0-9]|5[0-9]|6[0-9]|2[2-7])\d{2}(?:[ -]?\d){9,15}")
_IBAN = re.compile(r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}")
_SSN = re.compile(r"(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}")
_PLAIN_DIGITS = re.compile(r"\d+")


def _is_phone(text: str) -> bool:
    if not _PHONE.fullmatch(text):
        return False
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(re.sub(r"^00", "+", text)))
    except phonenumbers.NumberParseException:
        return False


def _is_card(text: str) -> bool:
    return _CARD.fullmatch(text) is not None and luhn.is_valid(re.sub(r"[ -]", "", text))


def _is_iban(text: str) -> bool:
    return _IBAN.fullmatch(text) is not None and iban.is_valid(text)


def _is_address_of_a_host(text: str) -> bool:
    try:
        # As inet prints them: 192.0.2.1/32.
        address = ipaddress.ip_address(re.sub(r"/(32|128)$", "", text))
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback)


# Modules of stdnum whose numbers have check digits and are given to people, with their form as it is written.
_NATIONAL = (
    ("be.nn", r"\d{2}[. ]?\d{2}[. ]?\d{2}[- ]?\d{3}[. ]?\d{2}"),
    ("br.cpf", r"\d{3}\.?\d{3}\.?\d{3}-?\d{2}"),
    ("ch.ssn", r"756\.?\d{4}\.?\d{4}\.?\d{2}"),
    ("de.idnr", r"\d{2} ?\d{3} ?\d{3} ?\d{3}"),
    ("dk.cpr", r"\d{6}-\d{4}"),
    ("es.dni", r"\d{8}-?[A-Z]"),
    ("es.nie", r"[XYZ]-?\d{7}-?[A-Z]"),
    ("fi.hetu", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-Y]"),
    ("fr.nir", r"[12]\s?\d{2}\s?\d{2}\s?(?:\d{2}|2[AB])\s?\d{3}\s?\d{3}\s?\d{2}"),
    ("gb.nhs", r"\d{3} \d{3} \d{4}"),
    ("in_.aadhaar", r"\d{4} ?\d{4} ?\d{4}"),
    ("it.codicefiscale", r"[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]"),
    ("mx.curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z0-9]\d"),
    ("nl.bsn", r"\d{9}"),
    ("pl.pesel", r"\d{11}"),
    ("se.personnummer", r"(?:\d{2})?\d{6}[-+]\d{4}"),
)


def _national(module: str, form: str) -> Pattern:
    written = re.compile(form)

    @functools.cache
    def valid() -> Callable[[str], bool]:
        found: Callable[[str], bool] = importlib.import_module(f"stdnum.{module}").is_valid
        return found

    return Pattern(
        f"personal number ({module.partition('.')[0].strip('_').upper()})",
        "document",
        lambda text: written.fullmatch(text.upper()) is not None and valid()(text.upper()),
        digits_only=True,
    )


# Of detect-secrets; those that go by words beside the secret, or by the randomness of any text, are left out.
_SECRETS = (
    ("private_key", "PrivateKeyDetector", "private key"),
    ("jwt", "JwtTokenDetector", "JSON web token"),
    ("aws", "AWSKeyDetector", "AWS key"),
    ("azure_storage_key", "AzureStorageKeyDetector", "Azure key"),
    ("basic_auth", "BasicAuthDetector", "address with a password"),
    ("github_token", "GitHubTokenDetector", "GitHub token"),
    ("gitlab_token", "GitLabTokenDetector", "GitLab token"),
    ("openai", "OpenAIDetector", "OpenAI token"),
    ("sendgrid", "SendGridDetector", "SendGrid key"),
    ("slack", "SlackDetector", "Slack token"),
    ("square_oauth", "SquareOAuthDetector", "Square secret"),
    ("stripe", "StripeDetector", "Stripe key"),
    ("telegram_token", "TelegramBotTokenDetector", "Telegram token"),
    ("twilio", "TwilioKeyDetector", "Twilio key"),
)


def _secret(module: str, class_name: str, name: str) -> Pattern:
    @functools.cache
    def detector() -> Callable[[str], Iterable[str]]:
        plugin = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), class_name)()
        found: Callable[[str], Iterable[str]] = plugin.analyze_string
        return found

    return Pattern(name, "credential", lambda text: any(True for _ in detector()(text)))


PATTERNS = (
    Pattern("e-mail address", "contact", lambda text: _EMAIL.fullmatch(text) is not None),
    Pattern("telephone number", "contact", _is_phone),
    Pattern("IBAN", "bank", _is_iban),
    Pattern("payment card number", "bank", _is_card, digits_only=True),
    Pattern("Bitcoin address", "bank", lambda text: 25 < len(text) < 65 and bitcoin.is_valid(text)),
    Pattern("US social security number", "document", lambda text: _SSN.fullmatch(text) is not None),
    *(_national(module, form) for module, form in _NATIONAL),
    Pattern("IP address", "network", _is_address_of_a_host, ambiguous=True),
    *(_secret(*one) for one in _SECRETS),
)


@dataclass(frozen=True)
class _Inside:
    """What is looked for inside of longer texts, and held against the form as a whole."""

    name: str
    category: Category
    candidates: re.Pattern[str]
    fits: Callable[[str], bool]

    def is_in(self, text: str) -> bool:
        return any(self.fits(found[0]) for found in self.candidates.finditer(text))


_INSIDE = (
    _Inside(
        "e-mail address",
        "contact",
        re.compile(rf"(?<![\w.+-]){_EMAIL.pattern}(?![\w-])"),
        lambda _: True,
    ),
    _Inside(
        "telephone number", "contact", re.compile(r"(?<![\w+])\+\d{1,3}[\s\d().\-/]{6,18}\d(?!\w)"), _is_phone
    ),
    _Inside(
        "IBAN",
        "bank",
        re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
        _is_iban,
    ),
)

# By the share of values that fit: nearly all, or many.
_NEARLY_ALL, _MANY, _SOME = 0.8, 0.3, 0.03
_SCORE_NEARLY_ALL, _SCORE_MANY, _SCORE_INSIDE, _SCORE_AMBIGUOUS = 0.95, 0.7, 0.6, 0.55


def look_at(values: Sequence[str], *, numbers: bool = False) -> Evidence | None:
    """What most of a column's values are; None where they have no form that says anything.

    Args:
        values: different ones, as text.
        numbers: whether the column is of a type for numbers, which fit many a form by chance.
    """
    texts = [text for text in (value.strip() for value in values[:MOST_VALUES]) if text]
    if len(texts) < FEWEST_VALUES:
        return None
    found = [
        evidence
        for pattern in PATTERNS
        if (pattern.digits_only or not numbers) and (evidence := _whole(pattern, texts, numbers=numbers))
    ]
    if not numbers:
        found += [
            Evidence(one.name, one.category, share, len(texts), _SCORE_INSIDE, inside=True)
            for one in _INSIDE
            if (share := _share(texts, one.is_in)) >= _SOME
        ]
    return max(found, key=lambda evidence: (evidence.score, evidence.share), default=None)


def _whole(pattern: Pattern, texts: Sequence[str], *, numbers: bool) -> Evidence | None:
    share = _share(texts, pattern.fits)
    by_chance = pattern.digits_only and (numbers or all(_PLAIN_DIGITS.fullmatch(text) for text in texts))
    if by_chance:
        if share < _NEARLY_ALL or len(texts) < FEWEST_NUMBERS:
            return None
        return Evidence(pattern.name, pattern.category, share, len(texts), _SCORE_MANY)
    if share < (_NEARLY_ALL if pattern.ambiguous else _MANY):
        return None
    score = _SCORE_NEARLY_ALL if share >= _NEARLY_ALL else _SCORE_MANY
    return Evidence(
        pattern.name, pattern.category, share, len(texts), _SCORE_AMBIGUOUS if pattern.ambiguous else score
    )


def _share(texts: Sequence[str], fits: Callable[[str], bool]) -> float:
    return sum(_safely(fits, text) for text in texts) / len(texts)


def _safely(fits: Callable[[str], bool], text: str) -> bool:
    try:
        return fits(text)
    except Exception:
        # A value that a library stumbles over is not of its form; and its error would quote it.
        return False


def look_into(table: str, documents: Sequence[str]) -> Evidence | None:
    """What JSON documents hold: members whose names or values look sensitive. None where none do.

    Args:
        table: its name, which says what a ``name`` is the name of.
        documents: as text.
    """
    named: dict[Category, int] = {}
    texts: list[str] = []
    count = 0
    for document in documents[:MOST_VALUES]:
        try:
            content = json.loads(document)
        except (ValueError, RecursionError):
            continue
        count += 1
        seen: set[Category] = set()
        for member, value in _leaves(content):
            if isinstance(value, str):
                texts.append(value)
            suspicion = looks_sensitive(table, member, "text" if isinstance(value, str) else "numeric")
            if suspicion is not None and suspicion.confidence == "likely":
                seen.add(suspicion.category)
        for category in seen:
            named[category] = named.get(category, 0) + 1
    if count < FEWEST_VALUES:
        return None
    found = [
        Evidence(
            f"members named as {category} data",
            category,
            number / count,
            count,
            _SCORE_NEARLY_ALL,
            inside=True,
        )
        for category, number in named.items()
        if number / count >= _SOME
    ]
    inside = look_at(sorted(set(texts))[:MOST_VALUES])
    if inside is not None:
        found.append(Evidence(inside.pattern, inside.category, inside.share, count, _SCORE_MANY, inside=True))
    return max(found, key=lambda evidence: (evidence.score, evidence.share), default=None)


_MOST_DEPTH = 16


def _leaves(content: object, member: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    if depth > _MOST_DEPTH:
        return
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, str(name), depth + 1)
    elif isinstance(content, list):
        for value in content:
            yield from _leaves(value, member, depth + 1)
    elif content is not None and not isinstance(content, bool):
        yield member, content
