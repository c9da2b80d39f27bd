"""A database that is not AlphaPulse's: a club's, in two languages and two schemas, with decoys.

What is sensitive in it was decided before anything was looked for. Values are made up: IBANs, cards and numbers are the
published examples of their formats or carry check digits of our own making, telephone numbers are of ranges kept for
fiction.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import psycopg
from stdnum import luhn
from stdnum.de import idnr

SCHEMA = """
CREATE SCHEMA verein;
CREATE TABLE verein."Mitglied" (
    "MitgliedsNr" integer PRIMARY KEY,
    "Vorname" text NOT NULL,
    "Nachname" text NOT NULL,
    "Mail" text UNIQUE,
    "Rufnummer" varchar(40),
    "Geburtsdatum" date,
    "PLZ" varchar(5),
    "SteuerNr" text,
    "Mitgliedschaft" text NOT NULL DEFAULT 'aktiv',
    "Sprache" char(2) NOT NULL DEFAULT 'de',
    angelegt timestamptz NOT NULL DEFAULT now());
CREATE TABLE verein.beitrag (
    id uuid PRIMARY KEY,
    mitglied integer NOT NULL REFERENCES verein."Mitglied",
    konto text,
    betrag numeric(10, 2) NOT NULL,
    waehrung char(3) NOT NULL DEFAULT 'EUR',
    quittung text NOT NULL UNIQUE,
    ansprechpartner text NOT NULL);
CREATE TABLE bookings (
    booking_uuid uuid PRIMARY KEY,
    ref text NOT NULL,
    c1 text,
    c2 bigint,
    remarks text,
    description text NOT NULL,
    status text NOT NULL,
    country char(2) NOT NULL,
    ean text NOT NULL,
    build text NOT NULL,
    amount_of_seats integer NOT NULL,
    preferences jsonb NOT NULL,
    extra jsonb);
CREATE TABLE products (
    sku text PRIMARY KEY,
    name text NOT NULL,
    price numeric NOT NULL,
    notes text,
    email_template text NOT NULL,
    mobile text NOT NULL);
CREATE TABLE integrations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    endpoint text NOT NULL,
    auth text,
    checksum text NOT NULL,
    token_type text NOT NULL,
    token_count bigint NOT NULL);
CREATE TABLE visits (at timestamptz NOT NULL, remote inet, client_ip inet, page text NOT NULL);
"""

SENSITIVE = {
    *(
        ("verein", "Mitglied", column)
        for column in ("Vorname", "Nachname", "Mail", "Rufnummer", "Geburtsdatum")
    ),
    *(("verein", "Mitglied", column) for column in ("PLZ", "SteuerNr")),
    ("verein", "beitrag", "konto"),
    ("public", "bookings", "c1"),
    ("public", "bookings", "c2"),
    ("public", "bookings", "remarks"),
    ("public", "bookings", "extra"),
    ("public", "integrations", "auth"),
    # Not possible: it has no primary key. Told all the same.
    ("public", "visits", "client_ip"),
    ("public", "visits", "remote"),
    # Names of people, in a column whose name is in no list: nothing tells them from other words.
    ("verein", "beitrag", "ansprechpartner"),
}
MISSED = {("verein", "beitrag", "ansprechpartner")}

# No other text of the database has any of these.
CANARIES = ("Zwiebelfisch", "Quastenflosser", "kanarienvogel", "Marderhund")


def load(url: str, rows: int = 120) -> None:
    """Make and fill it."""
    with psycopg.connect(url) as connection:
        connection.execute(SCHEMA.encode())
        for table, made in (
            ('verein."Mitglied"', [_member(n) for n in range(rows)]),
            ("verein.beitrag", [_fee(n) for n in range(rows)]),
            ("bookings", [_booking(n) for n in range(rows)]),
            ("products", [_product(n) for n in range(rows)]),
            (
                "integrations (endpoint, auth, checksum, token_type, token_count)",
                [_login(n) for n in range(rows)],
            ),
            ("visits", [_visit(n) for n in range(rows)]),
        ):
            marks = ", ".join(["%s"] * len(made[0]))
            with connection.cursor() as cursor:
                cursor.executemany(f"INSERT INTO {table} VALUES ({marks})".encode(), made)
        connection.execute("ANALYZE")


def iban(number: int) -> str:
    """One of a bank that there is not, with its check digits."""
    rest = f"{37040044_0000000000 + number:018d}"
    # ISO 13616: D is 13, E is 14.
    return f"DE{98 - int(rest + '131400') % 97:02d}{rest}"


def card(number: int) -> int:
    """A payment card's number, with its check digit."""
    digits = f"411111{number:09d}"
    return int(digits + luhn.calc_check_digit(digits))


def tax_number(number: int) -> str:
    """A German tax number that is one by its check digit."""
    for last in range(10):
        text = f"{8609574200 + number * 7}{last}"
        if idnr.is_valid(text):
            return text
    return "86095742719"


def _member(n: int) -> tuple[Any, ...]:
    return (
        n,
        f"{CANARIES[1]}{n}",
        f"{CANARIES[0]}{n}",
        f"{CANARIES[2]}.{n}@example.org" if n % 9 else None,
        f"+44 7700 900{n:03d}",
        f"19{50 + n % 40}-0{1 + n % 9}-11",
        f"{10000 + 37 * n}",
        tax_number(n),
        ("aktiv", "passiv")[n % 2],
        ("de", "en", "fr")[n % 3],
        "2024-01-01T00:00:00Z",
    )


def _fee(n: int) -> tuple[Any, ...]:
    return (
        f"00000000-0000-4000-8000-{n:012d}",
        n,
        iban(n),
        12 + n % 5,
        "EUR",
        f"Q-2024-{n:05d}",
        f"{CANARIES[1]}{n}",
    )


def _booking(n: int) -> tuple[Any, ...]:
    remark = f"please call {CANARIES[3]} back" if n % 4 else f"write to {CANARIES[2]}.{n}@example.net, thanks"
    return (
        f"10000000-0000-4000-8000-{n:012d}",
        f"BK{n:06d}",
        f"{CANARIES[2]}.{n}@example.com",
        card(n * 7919),
        remark,
        f"A seat at table {n} near the window, with a view of the garden",
        ("open", "paid", "cancelled")[n % 3],
        ("DE", "FR", "GB")[n % 3],
        f"{4006381333000 + n}",
        f"1.{n % 30}.{n % 7}.{n}-rc",
        1 + n % 6,
        ('{"theme": "dark"}', '{"theme": "light"}')[n % 2],
        f'{{"guest": {{"firstName": "{CANARIES[1]}", "phone": "+44 7700 900{n:03d}"}}, "n": {n}}}',
    )


def _product(n: int) -> tuple[Any, ...]:
    return (f"SKU-{n:04d}", f"Thing {n}", 3 + n, f"Stored in shelf {n}", "welcome", ("yes", "no")[n % 2])


def _login(n: int) -> tuple[Any, ...]:
    def part(content: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    token = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part({'sub': n})}.{part({'x': CANARIES[0] * 3})}"
    checksum = hashlib.sha256(str(n).encode()).hexdigest()
    return (f"https://example.com/hooks/{n}", token, checksum, "bearer", n)


def _visit(n: int) -> tuple[Any, ...]:
    return ("2024-01-01T00:00:00Z", f"192.0.2.{n % 250}", f"198.51.100.{n % 250}", f"/page/{n % 9}")
