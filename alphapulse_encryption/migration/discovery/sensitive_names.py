"""Which columns look sensitive by name and type alone: no value is ever read.

A name is cut into words (``twoFactorSecret``, ``two_factor_secret`` and ``two factor secret`` are the same three), and
runs of neighbouring words are looked up, joined, in lists: ``firstname`` is found in ``first_name``, ``FirstName`` and
``customer_firstname``, and not in ``filename``. Then the type has its say: a flag or a moment is not what its name is
about (``two_factor_enabled boolean``, ``email_verified_at timestamptz``), and a number that ends in ``id`` points
elsewhere. What is told is a guess with its reason, for a person to decide on.

The lists are in English, with the words of a few other languages that are common in schemas. They lean to recall for
what identifies or authenticates a person and to precision for the rest: a word stands in a list only if a column of
that name is more often sensitive than not. Libraries that do this (piicatcher, detectpii) search for patterns inside
the whole name, so that ``filename`` and ``username_count`` are persons, and know no money, no keys and no documents.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Category = Literal[
    "credential", "contact", "person", "birth", "address", "document", "bank", "health", "origin", "network", "money",
    "free form",
]  # fmt: skip
# Whether most columns of such a name hold what the category says, or many hold something harmless.
Confidence = Literal["likely", "possible"]


@dataclass(frozen=True)
class Suspicion:
    """Why a column looks sensitive.

    Args:
        category: of what it seems to hold.
        confidence: how sure that is.
        reason: in words: the part of the name, or the type.
    """

    category: Category
    confidence: Confidence
    reason: str


@dataclass(frozen=True)
class _Rule:
    category: Category
    confidence: Confidence
    # Joined words, lower case and singular.
    words: frozenset[str]
    kinds: frozenset[str]
    # Only in tables with one of these words in their names; any where it is empty.
    tables: frozenset[str] = frozenset()


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TEXT = _words("text bytes")
_DOCUMENT_KINDS = _words("text bytes number")
_ANY_VALUE = _words("text bytes number json")

_PEOPLE = _words(
    "user customer client person people contact employee staff member patient student applicant candidate "
    "beneficiary subscriber tenant guest owner recipient payee payer lead kunde benutzer mitarbeiter cliente "
    "usuario utilisateur"
)
_TRADING = _words("position trade order fill execution portfolio holding deal transaction account")

# The first rule that fits is the one that is told.
_RULES = (
    _Rule(
        "credential",
        "likely",
        _words(
            "password passwd passphrase passcode pwd secret clientsecret apisecret apikey apitoken accesskey "
            "accesstoken refreshtoken authtoken bearertoken sessiontoken sessionid privatekey secretkey signingkey "
            "encryptionkey sshkey pgpkey token otp otpsecret totp totpsecret twofactorsecret mfasecret "
            "recoverycode backupcode securityanswer securityquestion pin pincode credential cookie seedphrase "
            "mnemonic apikeyreference connectionstring dsn passwort kennwort contrasena motdepasse"
        ),
        _words("text bytes json number uuid"),
    ),
    _Rule("credential", "possible", _words("permission scope authorization"), _words("json")),
    _Rule(
        "contact",
        "likely",
        _words(
            "email emailaddress mail mailaddress phone phonenumber telephone telephonenumber mobile mobilenumber "
            "cellphone fax faxnumber msisdn whatsapp telegram skype imessage telefon telefonnummer handynummer "
            "correo telefono courriel mobil tel rufnummer"
        ),
        _ANY_VALUE,
    ),
    _Rule(
        "birth",
        "likely",
        _words(
            "birthdate dateofbirth dob birthday birth birthyear birthplace placeofbirth dateofdeath geburtstag "
            "geburtsdatum geburtsort fechanacimiento datenaissance"
        ),
        _words("text bytes number date moment json"),
    ),
    _Rule("birth", "possible", _words("age alter edad"), _words("number"), _PEOPLE),
    _Rule(
        "document",
        "likely",
        _words(
            "ssn socialsecurity socialsecuritynumber nino nationalid nationalinsurance nationalinsurancenumber "
            "personalid personalnumber passport passportnumber driverlicense driverslicense drivinglicense "
            "driverslicensenumber licenseplate taxid taxnumber tin ein vatnumber vatid itin steuernummer steuerid "
            "ausweisnummer dni nie nif curp rfc cpf cnpj pesel aadhaar identitynumber identitycard idcard idnumber "
            "documentnumber kyc kycdocument kycdata"
        ),
        _words("text bytes number json"),
    ),
    _Rule(
        "bank",
        "likely",
        _words(
            "iban bic swift accountnumber bankaccount bankaccountnumber routingnumber sortcode cardnumber "
            "creditcard creditcardnumber debitcard pan cvv cvc cvc2 cardholder kontonummer bankverbindung "
            "walletaddress wallet cardexpiry clabe"
        ),
        _ANY_VALUE,
    ),
    _Rule(
        "address",
        "likely",
        _words(
            "address addressdata addressline street streetaddress streetname housenumber postcode postalcode zip "
            "zipcode postaladdress homeaddress billingaddress shippingaddress pobox adresse anschrift strasse "
            "hausnummer plz postleitzahl direccion calle codigopostal latitude longitude latlong latlng "
            "geolocation gpslocation coordinate"
        ),
        _words("text bytes number json geometry"),
    ),
    _Rule("address", "possible", _words("city town county location ort stadt ciudad ville"), _TEXT, _PEOPLE),
    _Rule(
        "person",
        "likely",
        _words(
            "firstname lastname middlename fullname surname forename givenname familyname maidenname nickname "
            "displayname legalname realname fname lname initials vorname nachname familienname apellido prenom "
            "nomdefamille signature photo portrait avatarimage biometric fingerprintdata faceid voiceprint"
        ),
        _ANY_VALUE,
    ),
    _Rule("person", "possible", _words("username login loginname userhandle benutzername"), _TEXT),
    _Rule("person", "possible", _words("name nombre nom"), _TEXT, _PEOPLE),
    _Rule(
        "health",
        "likely",
        _words(
            "diagnosis diagnose medicalrecord medicalrecordnumber mrn medication prescription allergy bloodtype "
            "disability healthdata healthrecord patientnote insurancenumber krankenkasse symptom genome dna"
        ),
        _ANY_VALUE,
    ),
    _Rule(
        "origin",
        "likely",
        _words(
            "gender sex ethnicity race religion nationality citizenship maritalstatus sexualorientation "
            "politicalparty tradeunion geschlecht nationalitaet staatsangehoerigkeit familienstand"
        ),
        _words("text number other"),
    ),
    _Rule(
        "network",
        "possible",
        _words(
            "ip ipaddress remoteaddr remoteip clientip macaddress deviceid devicefingerprint useragent imei imsi "
            "idfa"
        ),
        _words("text network uuid number bytes"),
    ),
    _Rule(
        "money",
        "likely",
        _words(
            "balance availablebalance salary wage income compensation payroll networth creditlimit creditscore "
            "accountbalance pnl unrealizedpnl realizedpnl profitloss gehalt lohn kontostand"
        ),
        _DOCUMENT_KINDS,
    ),
    _Rule(
        "money",
        "possible",
        _words(
            "price entryprice currentprice exitprice quantity qty size amount fee cost volume orderid "
            "orderreference stoploss takeprofit"
        ),
        _DOCUMENT_KINDS,
        _TRADING,
    ),
    _Rule("money", "possible", _words("revenue turnover invoicetotal bonus commission dividend"), _words("number")),
    _Rule(
        "free form",
        "possible",
        _words("note remark comment message body transcript bio biography freetext bemerkung notiz"),
        _TEXT,
        _PEOPLE | _words("support ticket chat message conversation medical session order"),
    ),
)  # fmt: skip

# What a name ends in that says: derived from the value, about it, or encrypted already.
_NOT_THE_VALUE = _words(
    "hash hashed digest checksum hmac encrypted ciphertext search masked redacted anonymized enabled verified "
    "confirmed valid required count counter total type kind status state format currency flag version length "
    "domain at until attempt expiry expires policy template setting preference consent optin source"
)
_POINTS_ELSEWHERE = _words("id fk ref oid uid uuid")

_LONGEST_RUN = 4


def looks_sensitive(table: str, column: str, type_name: str) -> Suspicion | None:
    """Whether a column looks as if it held something sensitive.

    Args:
        table: the table's name, without its schema.
        column: the column's name, without quotes.
        type_name: as PostgreSQL's ``format_type`` prints it.

    Returns:
        Why; None where nothing speaks for it.
    """
    words = split_words(column)
    kind = kind_of(type_name)
    if not words or kind == "flag":
        return None
    of_table = {_singular(word) for word in split_words(table)}
    runs = dict(_runs(words))
    for rule in _RULES:
        if kind not in rule.kinds or (rule.tables and not rule.tables & of_table):
            continue
        found = max(rule.words & runs.keys(), key=len, default=None)
        if found is not None and not _is_about(words, runs[found], kind):
            where = f" in a table of {', '.join(sorted(rule.tables & of_table))}" if rule.tables else ""
            return Suspicion(
                rule.category, rule.confidence, f"its name says {' '.join(words[slice(*runs[found])])}{where}"
            )
    if kind == "json" and words[-1] not in _NOT_THE_VALUE:
        return Suspicion("free form", "possible", f"{type_name} may hold anything")
    return None


def _is_about(words: list[str], run: tuple[int, int], kind: str) -> bool:
    """Whether the name goes on after the sensitive words to say that the column is something else."""
    rest = [_singular(word) for word in words[run[1] :]]
    if not rest:
        return False
    if rest[-1] in _POINTS_ELSEWHERE:
        return kind in {"number", "uuid"}
    return rest[-1] in _NOT_THE_VALUE


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
    """The words of a name: lower case, without accents and numbers at their ends.

    ``E-Mail`` is ``mail`` behind an ``e``, and so is joined again by who looks for ``email``.
    """
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
