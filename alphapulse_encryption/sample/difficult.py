"""Values that break naive tools; the first rows of the sample's tables hold them, one by one.

Every pool is cast to its column's type by PostgreSQL, so its texts are what PostgreSQL reads, and within
a pool no two are equal, for some of them go into unique columns.
"""

import json
from collections.abc import Sequence

_LONG = 100_000

_ENVELOPE = '{"ciphertext": "AAAA", "key_version": 1, "context": "user_pii", "algorithm": "AES-256-GCM"}'

SHORT_TEXTS: tuple[str, ...] = (
    # nothing, blanks, line ends
    *("", " ", " leading and trailing ", "tab\there", "two\nlines", "carriage\r\nreturn", "\n"),
    # look like something else
    *("0012345", "1e5", "1.0", "-0", "true", "null", "NULL", "None", "NaN", "Infinity", "{}", "[1, 2]"),
    *('"quoted"', "\\N", "\\x6869", "2024-02-30"),
    # quotes, escapes, placeholders
    *("O'Brien", "it''s", 'say "hi"', "C:\\temp\\new", "back\\slash\\"),
    *("100%s %(name)s {brace} $1 :name ?", "'; DROP TABLE users; --", "a,b;c|d"),
    # unicode: composed and decomposed, beyond the first plane, joined, right to left, noncharacters
    *("caf\u00e9", "cafe\u0301", "Z\u0351\u036b\u0343a\u0363\u0365lgo\u0315\u0321", "\U0001f600\U0001f680"),
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    *("\u0645\u0631\u062d\u0628\u0627 \u0628\u0643", "\u05e9\u05dc\u05d5\u05dd abc \u202etxt\u202c"),
    *("\uffff\ufffe\U0010ffff", "\ufeffbom", "zero\u200bwidth\u00a0space"),
    *("\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8", "Stra\u00dfe \u0130stanbul \u01c5", "\x01\x1f\x7f"),
)

# Some hundred bytes: these too fit into an index entry.
TEXTS: tuple[str, ...] = (
    *SHORT_TEXTS,
    _ENVELOPE,
    _ENVELOPE.replace("}", ', "search_token": "AAAA"}'),
    "long " * 60,
    "\u6f22" * 250,
)

LONG_TEXTS: tuple[str, ...] = (*TEXTS, "0123456789" * (_LONG // 10), "\u00e4\u6f22\U0001f600" * (_LONG // 9))

# Unique, and different only in case, in a dot or in what the domain's owner would ignore.
EMAILS: tuple[str, ...] = (
    *("A@x.example", "a@x.example", "a@X.example", "a+tag@x.example"),
    "\u00fcnic\u00f6de@x.example",
    '"quoted local"@x.example',
    *TEXTS,
)

# For numeric(28, 10): it pads to ten decimals and knows NaN, but not Infinity.
AMOUNTS: tuple[str, ...] = (
    *("0", "-0", "0.0000000001", "-0.0000000001", "1", "1.5", "1.0000000000", "0012.340", "-17.25"),
    *("100000", "999999999999999999.9999999999", "-999999999999999999.9999999999", "NaN"),
)

# For numeric, which keeps the digits it was given.
NUMERICS: tuple[str, ...] = (
    *("0", "0.0", "0.0000000000", "-0.00", "1.1", "1.10", "1.1000000000", "1e5", "1e-20", "1.50e-3"),
    *("1e40", "-12345678901234567890.1234567890", "3." + "14159265358979323846" * 10, "9" * 200, "NaN"),
    *("Infinity", "-Infinity"),
)

FLOATS: tuple[str, ...] = (
    *("0", "-0", "0.1", "0.30000000000000004", "-1.5", "100000", "1e15", "1e16", "1e-5", "1e-300"),
    *("5e-324", "1.7976931348623157e308", "123456789.123456789", "NaN", "Infinity", "-Infinity"),
)


_HISTORY = [{"n": number, "note": f"entry {number} \u00e9\U0001f600"} for number in range(2_800)]

# For jsonb, which orders keys and drops repeated ones, but keeps the digits of numbers.
DOCUMENTS: tuple[str, ...] = (
    *("{}", "[]", "null", "true", '""', '"0012345"', "0.10", "1e5", '{"a": null}'),
    '{"b": 1, "a": 2, "aa": 3}',
    '{"aa": 3, "a": 2, "b": 1}',
    '{"price": 1.50, "Price": 1.5, "zero": -0.0, "big": 12345678901234567890.123}',
    '{"": "", " ": " ", "quote\\"": "back\\\\slash", "line\\n": "tab\\t"}',
    '{"name": "cafe\\u0301 caf\\u00e9 \\ud83d\\ude00 \u0645\u0631\u062d\u0628\u0627"}',
    '{"nested": {"list": [[], [{}], [[1, [2, [3]]]]]}}',
    _ENVELOPE,
    json.dumps({"document": _ENVELOPE}),
    json.dumps({"history": _HISTORY}, ensure_ascii=False),
)

# For json, which keeps the text as it came.
REPORTS: tuple[str, ...] = (
    *DOCUMENTS,
    ' {"leading":  "blanks" }\n',
    '{"a":1,"b":2}',
    '{"b":2,"a":1}',
    '{"repeated": 1, "repeated": 2}',
    '{"nul": "\\u0000"}',
)


# By the names that rows.sql knows them by.
POOLS: dict[str, Sequence[str]] = {
    "difficult_short_texts": SHORT_TEXTS,
    "difficult_texts": TEXTS,
    "difficult_long_texts": LONG_TEXTS,
    "difficult_emails": EMAILS,
    "difficult_amounts": AMOUNTS,
    "difficult_numerics": NUMERICS,
    "difficult_floats": FLOATS,
    "difficult_documents": DOCUMENTS,
    "difficult_reports": REPORTS,
}
