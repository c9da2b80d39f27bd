"""A large application of an object mapper: mixed-case names, many types, an audit, privileges on single columns."""

from __future__ import annotations

import uuid
from hashlib import md5

from alphapulse_encryption_tests.products.product import Product, Write

_APP = "products_app"


def _cuid(n: int) -> str:
    return "c" + md5(str(n).encode()).hexdigest()[:24]


PRODUCT = Product(
    name="workspace",
    login="products_mia",
    told=(
        *("userByEmail", "ageOf", "User_displayName_check", "User_emailAddress_key", "User_stats"),
        *("User_audit", "User_updatedAt", "Invoice_iban_check", "Invoice_paid", "Invoice_iban_idx"),
        *("Account_provider_providerAccountId_key", "TeamInvitation_teamId_eMail_key", "products_support"),
    ),
    beside="""
        GRANT UPDATE ("phoneNumber_encrypted", "phoneNumber_search") ON public."User" TO products_support;
        GRANT SELECT ("displayName_encrypted", role_encrypted) ON public."User" TO products_support;
        GRANT SELECT ("emailAddress_encrypted", "emailAddress_search") ON public."User" TO products_support
            WITH GRANT OPTION;
    """,
    set_aside="""DROP FUNCTION public."userByEmail"(text);""",
    put_back="""
        CREATE FUNCTION public."userByEmail"(address text) RETURNS text LANGUAGE sql STABLE
            BEGIN ATOMIC SELECT u.id FROM public."User" u WHERE u."emailAddress" = address; END;
    """,
    asked={
        "ageOf": f"""SELECT public."ageOf"('{_cuid(3)}')""",
        "ActiveTeam": """SELECT * FROM public."ActiveTeam\"""",
        "User_updatedAt": """UPDATE public."User" SET "emailVerified" = NULL""",
        "Invoice_updatedAt": """UPDATE public."Invoice" SET status = 'VOID'""",
        "Feature03Item_updatedAt": """UPDATE public."Feature03Item" SET position = 1""",
    },
    # The audit keeps what the application wrote: of one that encrypts, envelopes.
    differs=("rowData",),
    writes=(
        Write(
            *(_APP, "insert", "User", {"id": "new{n}"}),
            {
                **{"emailAddress": "new{n}@work.example", "displayName": "Née {n}", "phoneNumber": "+1 {n}"},
                **{"dateOfBirth": "1980-01-0{n}", "role": "guest user", "apiScopes": '{a,"b, \\"c\\"",""}'},
                **{
                    "preferences": '{"n": 1.50}',
                    "rawProfile": '{"a" :1,  "a": 2}',
                    "homeAddress": '("x, {n}",)',
                },
                **{"salary": "1.1" + 29 * "0", "lastIp": "10.0.0.0/8", "avatar": "\\x0{n}"},
                **{"twoFactor Secret": "", "seenFor": "1 mon"},
            },
        ),
        Write(
            *(_APP, "insert", "User", {"id": "again{n}"}),
            {
                **{
                    "emailAddress": "new{n}@work.example",
                    "displayName": "x",
                    "role": "OWNER",
                    "apiScopes": "{}",
                },
                "preferences": "{}",
            },
        ),
        Write(
            _APP,
            "update",
            "User",
            {"id": _cuid(4)},
            {"emailAddress": "moved{n}@work.example", "salary": None},
        ),
        Write(_APP, "update", "User", {"id": _cuid(5)}, {"emailVerified": "2023-01-01"}),
        # With privileges on single columns.
        Write("products_support", "update", "User", {"id": _cuid(6)}, {"phoneNumber": "+2 {n}"}),
        Write("products_support", "update", "User", {"id": _cuid(6)}, {"emailAddress": "x{n}@work.example"}),
        Write(
            _APP,
            "update",
            "Account",
            {"id": str(uuid.UUID(md5(b"account3").hexdigest()))},
            {"access_token": "t{n}"},
        ),
        Write(
            *(_APP, "insert", "Account", {"id": "00000000-0000-4000-8000-00000000000{n}"}),
            {"userId": _cuid(4), "provider": "github", "providerAccountId": "ext-{n}", "access_token": None},
        ),
        Write(
            _APP,
            "insert",
            "TeamInvitation",
            {"teamId": "1", "Invited On": "2024-01-0{n}"},
            {"eMail": "n{n}@work.example", "note": "ä {n}"},
        ),
        Write(
            _APP,
            "insert",
            "TeamInvitation",
            {"teamId": "1", "Invited On": "2024-02-0{n}"},
            {"eMail": "n{n}@work.example"},
        ),
        Write(
            _APP,
            "insert",
            "TeamInvitation",
            {"teamId": "2", "Invited On": "2024-01-0{n}"},
            {"eMail": "n{n}@work.example"},
        ),
        Write(
            *(_APP, "insert", "Invoice", {"number": "10{n}"}),
            {
                "status": "PAID",
                "amount": "{n}.50",
                "iban": "DE{n}",
                "lines": '{"{\\"n\\": 1}"}',
                "vatRate": "0.07",
            },
        ),
        Write(_APP, "update", "Invoice", {"id": "{n}"}, {"amount": "0.00", "status": "VOID", "iban": None}),
        Write(_APP, "update", "Feature01Item", {"position": "{n}"}, {"privateNote": "note of {n}"}),
        Write(
            _APP,
            "update",
            "Feature02Item",
            {"position": "1"},
            {"privateNote": "note of {n}", "flags": "101{n}"},
        ),
        Write(_APP, "insert", "_TeamToUser", {"A": "1", "B": "new{n}"}),
        Write(_APP, "delete", "User", {"id": _cuid(10)}),
    ),
)
