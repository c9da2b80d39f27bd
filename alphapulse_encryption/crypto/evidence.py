"""Authenticates what is kept beside the data: MACs by a key of the master key, which no database role has.

Only of texts and documents; what is kept where, and which is the newest, belongs to the bookkeeping.
"""

import hashlib
import hmac
import json
import re
from typing import Any

from alphapulse_encryption.crypto.keys import KeyRing, pae

_PURPOSE = "bookkeeping"
_MAC = re.compile(r"([1-9][0-9]{0,9}):([0-9a-f]{64})")


def canonical(content: Any) -> bytes:
    """The one JSON text of a document, in ASCII: members sorted, nothing between them."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sign(keys: KeyRing, kind: str, database: str, subject: str, content: Any) -> str:
    """``version:hex``: HMAC-SHA-256 under the current version's key.

    Args:
        kind: what it is evidence of, so that none passes for another.
        database: identifies the database that it is kept in.
        subject: what it speaks of, as the key of a table.
        content: a JSON document.
    """
    version = keys.current_version
    return f"{version}:{_mac(keys, version, kind, database, subject, content)}"


def is_signed(keys: KeyRing, mac: str | None, kind: str, database: str, subject: str, content: Any) -> bool:
    """Whether a MAC is by a key of this key ring, and of just that; false where there is none."""
    found = _MAC.fullmatch(mac or "")
    if found is None or int(found[1]) not in keys.versions:
        return False
    return hmac.compare_digest(found[2], _mac(keys, int(found[1]), kind, database, subject, content))


def _mac(keys: KeyRing, version: int, kind: str, database: str, subject: str, content: Any) -> str:
    message = pae(*(part.encode() for part in (kind, database, subject)), canonical(content))
    return hmac.new(keys.expand(_PURPOSE, version), message, hashlib.sha256).hexdigest()
