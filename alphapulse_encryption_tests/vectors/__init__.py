"""Known answers made with the application's own code."""

import json
from pathlib import Path
from typing import NamedTuple, cast

VECTORS = json.loads(Path(__file__).with_name("alphapulse_envelope.json").read_text(encoding="utf-8"))


class EnvelopeVector(NamedTuple):
    """A value and an envelope of it."""

    context: str
    key_version: int
    plaintext: str
    envelope: str


class TokenVector(NamedTuple):
    """A value and its search token."""

    context: str
    key_version: int
    plaintext: str
    token: str


MASTER_KEY = cast(str, VECTORS["master_key"])
ENVELOPES = [EnvelopeVector(**case) for case in VECTORS["cases"]]
TOKENS = [TokenVector(**case) for case in VECTORS["tokens"]]
